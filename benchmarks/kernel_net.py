# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Packets through the kernel's vhost-net with drivers.Net, against read() and write() on a tap.

Runs where /dev/vhost-net is: in a guest. A packet socket on the tap's interface is the other end; what is
compared is the same number of frames of the same size the same way, in turns.
"""

from __future__ import annotations

import ctypes
import functools
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks import harness
from benchmarks.facts import BATCHES, PUMP, SINGLES, TAP_C, TAP_PYTHON
from benchmarks.harness import KPPS, Case, Cases, Suite, again, cell
from vhost.drivers import Net
from vhost.kernel import Tap, VhostNet

ETHERTYPE = 0x88B5
FRAME = bytes.fromhex("020000000001020000000002") + ETHERTYPE.to_bytes(2, "big") + bytes(50)
BURST = 32
HEADER = bytes(10)


def build() -> ctypes.CDLL:
    fd, count = ctypes.c_int, ctypes.c_uint
    return harness.declare(
        harness.library("tap", [harness.HERE / "tap_floor.c"]),
        ("tap_floor_send", count, fd, ctypes.c_char_p, ctypes.c_size_t, count),
        ("tap_floor_recv", count, fd, count),
    )


@contextmanager
def tap_up() -> Iterator[Tap]:
    with Tap() as tap:
        Path(f"/proc/sys/net/ipv6/conf/{tap.name}/disable_ipv6").write_text("1")
        tap.up()
        yield tap


def per_second(count: int, work: Callable[[int], None]) -> float:
    """Thousands."""
    start = time.perf_counter()
    work(count)
    return count / (time.perf_counter() - start) / 1e3


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
        TAP_PYTHON: raw,
        TAP_C: floor,
        SINGLES: singles,
        BATCHES: batches,
        PUMP: pump,
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
        TAP_PYTHON: timed(to_tap, raw),
        TAP_C: timed(to_tap, floor),
        SINGLES: timed(to_nic, singles),
        BATCHES: timed(to_nic, batches),
        PUMP: timed(to_nic, pump),
    }


def run(suite: Suite) -> None:
    count, rounds = (2048, 3) if suite.quick else (8192, 7)
    with ExitStack() as stack:
        tap, bare = stack.enter_context(tap_up()), stack.enter_context(tap_up())
        nic = stack.enter_context(Net(stack.enter_context(VhostNet()), backend=tap))
        wires = []
        for one in (tap, bare):
            wire = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
            wire.bind((one.name, 0))
            wires.append(wire)
        lib = build()
        directions = {"send": senders(lib, nic, bare), "receive": receivers(lib, nic, bare, *wires)}
        for direction, work in directions.items():
            cases: Cases = {}
            for name, do in work.items():
                measure = functools.partial(per_second, count, do)
                cases[Case(name, cell(direction=direction))] = measure
                if name == TAP_C:
                    cases[Case(again(name), cell(direction=direction))] = measure
            suite.interleave(cases, KPPS, rounds, calibrate=False, doing=direction)
