# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Packets through the kernel's vhost-net with drivers.Net, against read() and write() on a tap.

Runs where /dev/vhost-net is: in a guest. A packet socket on the tap's interface is the other end; what is
compared is the same number of frames of the same size the same way, in turns.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks import harness
from vhost.drivers import Net
from vhost.kernel import Tap, VhostNet

ETHERTYPE = 0x88B5
FRAME = bytes.fromhex("020000000001020000000002") + ETHERTYPE.to_bytes(2, "big") + bytes(50)
BURST = 32
HEADER = bytes(10)
HERE = Path(__file__).parent


def build(scratch: Path) -> ctypes.CDLL:
    library = scratch / "tap_floor.so"
    source = str(HERE / "tap_floor.c")
    subprocess.run(["gcc", "-O2", "-fPIC", "-shared", source, "-o", str(library)], check=True)
    lib = ctypes.CDLL(str(library))
    lib.tap_floor_send.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint]
    lib.tap_floor_recv.argtypes = [ctypes.c_int, ctypes.c_uint]
    return lib


@contextmanager
def tap_up() -> Iterator[Tap]:
    with Tap() as tap:
        Path(f"/proc/sys/net/ipv6/conf/{tap.name}/disable_ipv6").write_text("1")
        tap.up()
        yield tap


def per_second(count: int, work: Callable[[int], None]) -> float:
    start = time.perf_counter()
    work(count)
    return count / (time.perf_counter() - start)


def senders(lib: ctypes.CDLL, nic: Net, tap: Tap) -> dict[str, Callable[[int], None]]:
    frames = [FRAME] * BURST

    def singles(count: int) -> None:
        for _ in range(count):
            nic.send(FRAME)
        nic.flush(30)

    def batches(count: int) -> None:
        left = count
        while left:
            sent = nic.send_batch(frames[:left])
            left -= sent
            if not sent:
                nic.send(FRAME)  # waits for room
                left -= 1
        nic.flush(30)

    def pump(count: int) -> None:
        nic.pump_send(FRAME, count, 30)
        nic.flush(30)

    def raw(count: int) -> None:
        fd, data = tap.fileno(), HEADER + FRAME
        for _ in range(count):
            os.write(fd, data)

    def floor(count: int) -> None:
        data = HEADER + FRAME
        assert lib.tap_floor_send(tap.fileno(), data, len(data), count) == count

    return {
        "write() in Python": raw,
        "write() in C": floor,
        "send": singles,
        "send_batch": batches,
        "pump (C)": pump,
    }


def receivers(
    lib: ctypes.CDLL, nic: Net, tap: Tap, to_nic: socket.socket, to_tap: socket.socket
) -> dict[str, Callable[[int], None]]:
    """A burst is sent into the tap, then received. The sending, which is the same for all, is in the time:
    ratios are nearer to 1 than those of receiving alone would be."""

    def fill(wire: socket.socket, count: int) -> None:
        for _ in range(count):
            wire.send(FRAME)

    def timed(wire: socket.socket, take: Callable[[int], None]) -> Callable[[int], None]:
        def work(count: int) -> None:
            for _ in range(count // BURST):
                fill(wire, BURST)
                take(BURST)

        return work

    def singles(count: int) -> None:
        for _ in range(count):
            assert nic.recv(10) is not None

    def batches(count: int) -> None:
        while count:
            got = len(nic.recv_batch(count, 10))
            assert got, "a frame is lost"
            count -= got

    def pump(count: int) -> None:
        assert nic.pump_recv(FRAME, count, 10).frames == count

    def raw(count: int) -> None:
        fd = tap.fileno()
        for _ in range(count):
            os.read(fd, 2048)

    def floor(count: int) -> None:
        assert lib.tap_floor_recv(tap.fileno(), count) == count

    return {
        "read() in Python": timed(to_tap, raw),
        "read() in C": timed(to_tap, floor),
        "recv": timed(to_nic, singles),
        "recv_batch": timed(to_nic, batches),
        "pump (C)": timed(to_nic, pump),
    }


def run(*, quick: bool = False) -> dict[str, Any]:
    count, rounds = (2048, 3) if quick else (8192, 7)
    report: dict[str, Any] = {}
    with ExitStack() as stack:
        tap, bare = stack.enter_context(tap_up()), stack.enter_context(tap_up())
        nic = stack.enter_context(Net(stack.enter_context(VhostNet()), backend=tap))
        wires = []
        for one in (tap, bare):
            wire = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
            wire.bind((one.name, 0))
            wires.append(wire)
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="vhost-bench-"))
        lib = build(Path(scratch))
        directions = {"send": senders(lib, nic, bare), "receive": receivers(lib, nic, bare, *wires)}
        for direction, work in directions.items():
            cases = {name: (lambda do=do: per_second(count, do)) for name, do in work.items()}
            results = harness.interleave(cases, rounds)
            python, c = list(results.values())[:2]
            rows = [
                [name, harness.number(s.median() / 1000),
                 *(f"{harness.ratio(s, baseline).median():.2f}" for baseline in (python, c))]
                for name, s in results.items()
            ]  # fmt: skip
            title = f"{direction}, {len(FRAME)}-byte frames, one pair"
            print(harness.table(["", "thousand/s", "/ Python's", "/ C's"], rows, title))
            report[direction] = {name: samples.as_json() for name, samples in results.items()}
    return report


if __name__ == "__main__":
    run(quick="--quick" in sys.argv)
