# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vhost serve net`` under Linux guests: two that a bridge connects, one on a tap of this machine. They
ping, and move data by TCP that is compared at the other end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from guest.machine import Guest, vhost_user_net
from peers.conftest import Boot
from peers.support import Process, Serve, require, wait_until
from vhost.features import NetF, VirtioF
from vhost.kernel.tap import Tap

pytestmark = pytest.mark.guest

MACS = ("52:54:00:00:00:01", "52:54:00:00:00:02")
ADDRESSES = ("198.51.100.1", "198.51.100.2")
MIB = 8
MTU = 1500
ETH_P_ALL = 3


def up(guest: Guest, number: int, mtu: int = MTU) -> None:
    assert guest.read("/sys/class/net/eth0/address") == MACS[number]
    guest.run(f"ip addr add {ADDRESSES[number]}/24 dev eth0; ip link set eth0 mtu {mtu} up")


def ping(guest: Guest, address: str) -> None:
    """Of several lengths, the longest in pieces."""
    for size in (0, 56, 1400, 20000):
        said = guest.run(f"ping -c 3 -i 0.1 -W 10 -s {size} {address}").text
        assert " 0% packet loss" in said, said


def make_data(guest: Guest) -> str:
    """A file that no other is like; its checksum."""
    guest.run(f"dd if=/dev/urandom of=/tmp/data bs=1048576 count={MIB} 2>/dev/null")
    return guest.run("md5sum </tmp/data").text.split()[0]


def send(sender: Guest, receiver: Guest, address: str) -> None:
    """TCP from one to the other; what came is what was sent."""
    want = make_data(sender)
    # An nc that reads its input's end says so to its peer, which ends then.
    job = receiver.start("rm -f open; mkfifo open; nc -l -p 5001 0<>open | md5sum")
    receiver.run("for i in $(seq 100); do netstat -ltn | grep -q :5001 && break; sleep 0.1; done")
    sender.run(f"nc {address} 5001 </tmp/data")
    assert job.wait().text.split()[0] == want


def counters(process: Process, devices: int) -> list[dict[str, int]]:
    """What they counted, in no certain order."""
    before = len(process.errors().splitlines())
    process.process.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + 10
    while len(lines := process.errors().splitlines()[before:]) < devices:
        assert time.monotonic() < deadline, process.errors()
        time.sleep(0.02)
    return [json.loads(line) for line in lines]


class Witness:
    """Sees the frames that a device of the host carries, as the kernel has them: the longest of each way."""

    def __init__(self, name: str) -> None:
        self.received = self.sent = 0
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)  # of no device yet
        self._socket.bind((name, ETH_P_ALL))
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        with self._socket:
            # It ends with the device: ENETDOWN then.
            with contextlib.suppress(OSError):
                while True:
                    data, (_, _, way, *_) = self._socket.recvfrom(1 << 17)
                    if way == socket.PACKET_OUTGOING:
                        self.sent = max(self.sent, len(data))
                    else:
                        self.received = max(self.received, len(data))


def unacknowledged(guest: Guest) -> int:
    """How many bytes wait in the guest's TCP sockets."""
    lines = guest.read("/proc/net/tcp").splitlines()[1:]
    return max((int(line.split()[4].split(":")[0], 16) for line in lines), default=0)


def dropped(one: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in one.items() if name.startswith("dropped_") and count}


@pytest.mark.parametrize(
    ("first", "second", "ours"),
    [
        pytest.param(
            {"packed": True, "pairs": 2, "cpus": 2},
            {"legacy": True, "more": ",mrg_rxbuf=off"},
            ("--queue-pairs", "2"),
            id="packed, two pairs; legacy without mergeable buffers",
        ),
        pytest.param(
            {"packed": False},
            {"packed": True, "more": ",guest_tso4=off,guest_tso6=off,guest_csum=off"},
            (),
            id="split; packed without offloads",
        ),
    ],
)
def test_bridge(
    boot: Boot, tmp_path: Path, first: dict[str, Any], second: dict[str, Any], ours: tuple[str, ...]
) -> None:
    paths = (tmp_path / "a", tmp_path / "b")
    command = [sys.executable, "-m", "vhost", "serve", "net", "--bridge", *map(str, paths), *ours]
    process = Process(command, ready="serving")
    try:
        with ThreadPoolExecutor() as pool:
            cpus = [options.pop("cpus", 1) for options in (first, second)]
            booted = [
                pool.submit(boot, vhost_user_net(path, mac=mac, **options), cpus=count)
                for path, mac, options, count in zip(paths, MACS, (first, second), cpus, strict=True)
            ]
            a, b = (one.result() for one in booted)
        with a, b:
            assert bool(a.features() & VirtioF.RING_PACKED) == first["packed"]
            assert bool(b.features() & VirtioF.VERSION_1) != second.get("legacy", False)
            assert a.features() & (NetF.HOST_TSO4 | NetF.GUEST_TSO4) == NetF.HOST_TSO4 | NetF.GUEST_TSO4
            if first.get("pairs"):
                assert a.run("ls -d /sys/class/net/eth0/queues/rx-*").text.split()[1].endswith("rx-1")
            up(a, 0)
            up(b, 1)
            ping(a, ADDRESSES[1])
            ping(b, ADDRESSES[0])
            send(a, b, ADDRESSES[1])
            send(b, a, ADDRESSES[0])
            for one in counters(process, 2):
                assert one["tx_bytes"] > MIB << 20
                assert one["rx_bytes"] > MIB << 20
        assert "Traceback" not in process.terminate()
    finally:
        process.kill()


def test_tap(boot: Boot, tmp_path: Path) -> None:
    """Data in both directions; segments of TCP are passed on whole, as the kernel sees on the tap."""
    require("iproute2")
    try:
        Tap("pvguest%d").close()
    except OSError as error:
        pytest.skip(f"needs /dev/net/tun and CAP_NET_ADMIN: {error}")
    name = f"pvguest{os.getpid() % 1000}"
    with Serve("net", tmp_path / "s", "--tap", name) as server:
        subprocess.run(["ip", "addr", "add", f"{ADDRESSES[1]}/24", "dev", name], check=True)
        with boot(vhost_user_net(tmp_path / "s", mac=MACS[0], packed=True)) as guest:
            up(guest, 0)
            ping(guest, ADDRESSES[1])
            witness = Witness(name)
            with socket.create_server((ADDRESSES[1], 0)) as listener:
                listener.settimeout(60)
                port = listener.getsockname()[1]
                want = make_data(guest)
                job = guest.start(f"nc {ADDRESSES[1]} {port} </tmp/data")
                with listener.accept()[0] as stream:
                    # What waits in the guest's socket goes in large segments, however slowly it was written.
                    wait_until(lambda: unacknowledged(guest) > 20 * MTU, pause=0.1)
                    data = stream.makefile("rb").read()
                job.wait()
                assert (len(data), hashlib.md5(data).hexdigest()) == (MIB << 20, want)
                (counted,) = counters(server, 1)
                assert counted["tx_bytes"] > MIB << 20
                wait_until(lambda: witness.received > 2 * MTU)
                back = os.urandom(MIB << 20)
                job = guest.start(f"nc {ADDRESSES[1]} {port} | md5sum")
                with listener.accept()[0] as stream:
                    stream.sendall(back)
                assert job.wait().text.split()[0] == hashlib.md5(back).hexdigest()
            (counted,) = counters(server, 1)
            assert counted["rx_bytes"] > MIB << 20
            wait_until(lambda: witness.sent > 2 * MTU)
            assert not set(dropped(counted)) - {"dropped_wire"}
