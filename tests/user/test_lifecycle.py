# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Orders in which things can come, memory that changes or goes away, and ends in the middle."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import resource
import select
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

import fds
import vhost
from user import hostile as h
from user.hostile import RawFrontend
from vhost.user.backend import Backend

AVAIL, USED, DATA = 0x1000, 0x2000, 0x4000


class Hoarder(vhost.Device):
    """Takes chains, and gives them back when it is told to."""

    device_id = vhost.DeviceId.RNG
    queues = ("keep", "keep")

    def __init__(self) -> None:
        self.chains: list[tuple[vhost.DeviceQueue, vhost.Chain]] = []
        self.taken = os.eventfd(0)

    def keep(self, queue: vhost.DeviceQueue) -> None:
        for chain in queue:
            self.chains.append((queue, chain))
            os.eventfd_write(self.taken, 1)

    def wait_for(self, count: int) -> None:
        while len(self.chains) < count:
            os.eventfd_read(self.taken)

    def close(self) -> None:
        os.close(self.taken)


class Guest:
    """The driver's half of a split ring, by hand, in the raw front-end's memfd."""

    def __init__(self, raw: RawFrontend) -> None:
        self.raw = raw
        self.map = mmap.mmap(raw.memfd, h.SIZE)
        self.idx = 0

    def offer(self, *, addr: int = h.GUEST + DATA) -> None:
        """64 writable bytes."""
        head = self.idx % h.NUM
        struct.pack_into("<QIHH", self.map, head * 16, addr, 64, 2, 0)
        struct.pack_into("<H", self.map, AVAIL + 4 + self.idx % h.NUM * 2, head)
        self.idx += 1
        struct.pack_into("<H", self.map, AVAIL + 2, self.idx & 0xFFFF)

    def kick(self) -> None:
        os.eventfd_write(self.raw.kick, 1)

    @property
    def used(self) -> int:
        return int(struct.unpack_from("<H", self.map, USED + 2)[0])

    def wait_used(self, count: int) -> None:
        """Until that many came back; the call eventfd says when to look."""
        deadline = time.monotonic() + 20
        while self.used < count:
            ready, _, _ = select.select([self.raw.call], [], [], deadline - time.monotonic())
            assert ready, f"{self.used} of {count} chains came back"
            os.eventfd_read(self.raw.call)

    def close(self) -> None:
        self.map.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@contextlib.contextmanager
def guest_on(path: Path) -> Iterator[tuple[RawFrontend, Guest]]:
    with (
        contextlib.closing(RawFrontend(path)) as raw,
        contextlib.closing(Guest(raw)) as guest,
    ):
        yield raw, guest


# -- orders ------------------------------------------------------------------------------------------


def test_addresses_before_memory(path: Path, no_leaks: None) -> None:
    with h.served(vhost.devices.Rng(), path), guest_on(path) as (raw, _):
        raw.negotiate()
        assert raw.status(h.SET_VRING_NUM, h.state(0, h.NUM)) == 0
        assert raw.status(h.SET_VRING_ADDR, h.address(0)) != 0
        assert raw.share_memory() == 0
        raw.start_ring()


def test_ring_that_runs_is_not_reshaped(path: Path, no_leaks: None) -> None:
    with h.served(vhost.devices.Rng(), path), guest_on(path) as (raw, guest):
        raw.start()
        guest.offer()
        guest.kick()
        guest.wait_used(1)
        assert raw.status(h.SET_VRING_NUM, h.state(0, 16)) != 0
        assert raw.status(h.SET_VRING_BASE, h.state(0, 3)) != 0
        assert raw.status(h.SET_VRING_ADDR, h.address(0, h.USER + 0x8000)) != 0
        assert raw.status(h.SET_FEATURES, h.u64(h.VERSION_1 | 1 << 29 | h.PROTOCOL_FEATURES)) != 0
        assert raw.status(h.SET_VRING_ADDR, h.address(0)) == 0, "QEMU repeats it"
        guest.offer()
        guest.kick()
        guest.wait_used(2)


def test_enable_before_features_and_memory(path: Path, no_leaks: None) -> None:
    """QEMU does."""
    with h.served(vhost.devices.Rng(), path), guest_on(path) as (raw, guest):
        raw.ask(h.GET_FEATURES)
        raw.send(h.SET_PROTOCOL_FEATURES, h.u64(raw.ask(h.GET_PROTOCOL_FEATURES).u64 & ~h.GPA_ADDRESSES))
        assert raw.status(h.SET_VRING_ENABLE, h.state(0, 1)) == 0
        assert raw.status(h.SET_FEATURES, h.u64(h.VERSION_1 | h.PROTOCOL_FEATURES)) == 0
        assert raw.share_memory() == 0
        raw.set_ring()
        assert raw.status(h.SET_VRING_KICK, h.u64(0), [raw.kick]) == 0
        guest.offer()
        guest.kick()
        guest.wait_used(1)


def test_kick_before_enable(path: Path, no_leaks: None) -> None:
    with h.served(vhost.devices.Rng(), path), guest_on(path) as (raw, guest):
        raw.negotiate()
        assert raw.share_memory() == 0
        raw.set_ring()
        guest.offer()
        guest.kick()
        assert raw.status(h.SET_VRING_KICK, h.u64(0), [raw.kick]) == 0
        assert raw.ask(h.GET_FEATURES)
        assert guest.used == 0, "disabled: nothing is done yet"
        assert raw.status(h.SET_VRING_ENABLE, h.state(0, 1)) == 0
        guest.wait_used(1)


def test_without_protocol_features_everything_is_enabled(path: Path, no_leaks: None) -> None:
    with h.served(vhost.devices.Rng(), path), guest_on(path) as (raw, guest):
        raw.send(h.SET_OWNER)
        raw.send(h.SET_FEATURES, h.u64(h.VERSION_1))
        raw.send(h.SET_MEM_TABLE, h.table((h.GUEST, h.SIZE, h.USER, 0)), [raw.memfd])
        raw.send(h.SET_VRING_NUM, h.state(0, h.NUM))
        raw.send(h.SET_VRING_ADDR, h.address(0))
        raw.send(h.SET_VRING_CALL, h.u64(0), [raw.call])
        raw.send(h.SET_VRING_KICK, h.u64(0), [raw.kick])
        guest.offer()
        guest.kick()
        guest.wait_used(1)


def test_restarted_ring_holds_work_that_nobody_kicks_for(path: Path, no_leaks: None) -> None:
    with h.served(vhost.devices.Rng(), path), guest_on(path) as (raw, guest):
        raw.start()
        guest.offer()
        guest.kick()
        guest.wait_used(1)
        base = raw.ask(h.GET_VRING_BASE, h.state(0, 0)).payload
        assert base == h.state(0, 1)
        guest.offer()
        raw.set_ring()
        assert raw.status(h.SET_VRING_BASE, base) == 0
        assert raw.status(h.SET_VRING_KICK, h.u64(0), [raw.kick]) == 0
        guest.wait_used(2)


def test_ring_without_a_kick_is_polled(path: Path, no_leaks: None) -> None:
    with h.served(vhost.devices.Rng(), path), guest_on(path) as (raw, guest):
        raw.negotiate()
        assert raw.share_memory() == 0
        raw.set_ring()
        assert raw.status(h.SET_VRING_KICK, h.u64(h.NOFD)) == 0
        assert raw.status(h.SET_VRING_ENABLE, h.state(0, 1)) == 0
        guest.offer()
        guest.wait_used(1)


def test_base_with_chains_out(path: Path, no_leaks: None) -> None:
    """What the device gives back after the ring stopped is never published."""
    with contextlib.closing(Hoarder()) as device, h.served(device, path), guest_on(path) as (raw, guest):
        raw.start()
        for _ in range(3):
            guest.offer()
        guest.kick()
        device.wait_for(3)
        assert raw.ask(h.GET_VRING_BASE, h.state(0, 0)).payload == h.state(0, 3)
        for queue, chain in device.chains:
            with pytest.raises(vhost.InvalidQueue):
                queue.push(chain, 0)
        assert guest.used == 0
        device.chains.clear()


def test_base_of_a_ring_that_never_ran(path: Path, no_leaks: None) -> None:
    with h.served(vhost.devices.Rng, path), contextlib.closing(RawFrontend(path)) as raw:
        raw.negotiate()
        assert raw.ask(h.GET_VRING_BASE, h.state(0, 0)).payload == h.state(0, 0)
        packed = h.VERSION_1 | h.PROTOCOL_FEATURES | vhost.features.VirtioF.RING_PACKED
        assert raw.status(h.SET_FEATURES, h.u64(packed)) == 0
        assert raw.ask(h.GET_VRING_BASE, h.state(0, 0)).payload == h.state(0, 0x8000_8000)
        assert raw.status(h.SET_VRING_BASE, h.state(0, 0x3_0003)) == 0
        assert raw.ask(h.GET_VRING_BASE, h.state(0, 0)).payload == h.state(0, 0x3_0003)


def test_size_comes_last(path: Path, no_leaks: None) -> None:
    with h.served(vhost.devices.Rng, path), guest_on(path) as (raw, guest):
        raw.negotiate()
        assert raw.share_memory() == 0
        assert raw.status(h.SET_VRING_ENABLE, h.state(0, 1)) == 0
        assert raw.status(h.SET_VRING_CALL, h.u64(0), [raw.call]) == 0
        assert raw.status(h.SET_VRING_KICK, h.u64(0), [raw.kick]) == 0
        assert raw.status(h.SET_VRING_ADDR, h.address(0)) == 0
        guest.offer()
        guest.kick()
        assert raw.status(h.SET_VRING_NUM, h.state(0, h.NUM)) == 0
        guest.wait_used(1)


@pytest.mark.parametrize("new_ring", [True, False])
def test_restart_without_a_base(path: Path, no_leaks: None, new_ring: bool) -> None:
    """Front-ends that never send SET_VRING_BASE: a guest that rebooted begins at 0, one that was paused
    goes on."""
    with h.served(vhost.devices.Rng, path), guest_on(path) as (raw, guest):
        raw.start()
        for count in (1, 2, 3):
            guest.offer()
            guest.kick()
            guest.wait_used(count)
        assert raw.ask(h.GET_VRING_BASE, h.state(0, 0)).payload == h.state(0, 3)
        assert raw.ask(h.GET_VRING_BASE, h.state(0, 0)).payload == h.state(0, 3), "it still stands there"
        if new_ring:
            guest.map[:] = bytes(len(guest.map))
            guest.idx = 0
            assert raw.status(h.SET_VRING_NUM, h.state(0, h.NUM)) == 0
            assert raw.status(h.SET_VRING_ADDR, h.address(0)) == 0
        guest.offer()
        assert raw.status(h.SET_VRING_KICK, h.u64(0), [raw.kick]) == 0
        guest.wait_used(1 if new_ring else 4)
        assert raw.ask(h.GET_VRING_BASE, h.state(0, 0)).payload == h.state(0, 1 if new_ring else 4)


def test_owner_that_was_reset(path: Path, no_leaks: None) -> None:
    with h.served(vhost.devices.Rng, path), guest_on(path) as (raw, guest):
        raw.start()
        assert raw.status(h.RESET_OWNER) == 0
        guest.offer()
        guest.kick()
        assert raw.ask(h.GET_FEATURES)
        assert guest.used == 0, "all rings are disabled"
        assert raw.status(h.SET_OWNER) == 0
        assert raw.status(h.SET_VRING_ENABLE, h.state(0, 1)) == 0
        guest.wait_used(1)


def test_a_handler_that_fails_leaves_no_ring_paused(path: Path, no_leaks: None) -> None:
    """A table is exchanged while rings run, and the handlers fail when they go on."""

    class Moody(vhost.Device):
        device_id = vhost.DeviceId.RNG
        queues = ("serve", "serve")
        refuses = False

        def __init__(self) -> None:
            self.served = [os.eventfd(0), os.eventfd(0)]

        def serve(self, queue: vhost.DeviceQueue) -> None:
            if self.refuses:
                raise vhost.VhostError("not now")
            os.eventfd_write(self.served[queue.index], 1)

        def close(self) -> None:
            for fd in self.served:
                os.close(fd)

    with contextlib.closing(Moody()) as device, h.served(device, path), guest_on(path) as (raw, _):
        raw.start()
        assert raw.status(h.SET_VRING_NUM, h.state(1, h.NUM)) == 0
        areas = (h.USER + 0x8000, h.USER + 0x9000, h.USER + 0xA000)
        assert raw.status(h.SET_VRING_ADDR, h.address(1, *areas)) == 0
        kick = os.eventfd(0)
        assert raw.status(h.SET_VRING_KICK, h.u64(1), [kick]) == 0
        assert raw.status(h.SET_VRING_ENABLE, h.state(1, 1)) == 0
        device.refuses = True
        assert raw.share_memory() != 0
        device.refuses = False
        for fd, served in zip((raw.kick, kick), device.served, strict=True):
            os.eventfd_read(served)  # the look when it started
            os.eventfd_write(fd, 1)
            assert select.select([served], [], [], 20)[0]
        os.close(kick)


def test_reset_device(path: Path, no_leaks: None) -> None:
    with h.served(vhost.devices.Rng(), path), guest_on(path) as (raw, guest):
        raw.start()
        assert raw.status(h.RESET_DEVICE) == 0
        guest.offer()
        guest.kick()
        assert raw.ask(h.GET_FEATURES)
        assert guest.used == 0
        guest.map[: USED + 256] = bytes(USED + 256)
        guest.idx = 0
        assert raw.status(h.SET_FEATURES, h.u64(h.VERSION_1 | h.PROTOCOL_FEATURES)) == 0
        raw.start_ring()
        guest.offer()
        guest.kick()
        guest.wait_used(1)


def test_reset_by_status_begins_anew(path: Path, no_leaks: None) -> None:
    """A front-end that gives no base means the ring's beginning."""
    with h.served(vhost.devices.Rng, path), guest_on(path) as (raw, guest):
        raw.start()
        for count in (1, 2, 3):
            guest.offer()
            guest.kick()
            guest.wait_used(count)
        assert raw.status(h.SET_STATUS, h.u64(0)) == 0
        guest.map[:] = bytes(len(guest.map))
        guest.idx = 0
        assert raw.status(h.SET_VRING_ADDR, h.address(0)) == 0
        assert raw.status(h.SET_VRING_KICK, h.u64(0), [raw.kick]) == 0
        guest.offer()
        guest.kick()
        guest.wait_used(1)


class Nic(vhost.Device):
    """As much of a network device as the control plane sees."""

    device_id = vhost.DeviceId.NET
    queues = ("rx", "tx")
    mtu = 0
    announced = b""

    def set_mtu(self, mtu: int) -> None:
        if mtu < 1280:
            raise vhost.VhostError(f"MTU {mtu}, must be at least 1280")
        self.mtu = mtu

    def send_rarp(self, mac: bytes) -> None:
        self.announced = mac


def test_network_device(path: Path, no_leaks: None) -> None:
    device = Nic()
    with h.served(device, path), vhost.Frontend.connect(path) as frontend:
        assert frontend.protocol_features & vhost.ProtocolF.MTU
        assert frontend.protocol_features & vhost.ProtocolF.RARP
        frontend.net_set_mtu(1500)
        with pytest.raises(vhost.ProtocolError, match="NET_SET_MTU"):
            frontend.net_set_mtu(68)
        frontend.send_rarp(bytes.fromhex("525400123456"))
        frontend.reset_device()
    assert device.mtu == 1500
    assert device.announced == bytes.fromhex("525400123456")


def test_broken_ring_that_is_polled_costs_nothing(path: Path, no_leaks: None) -> None:
    with h.served(vhost.devices.Rng(), path) as server, guest_on(path) as (raw, guest):
        raw.negotiate()
        assert raw.share_memory() == 0
        raw.set_ring()
        guest.offer(addr=0xDEAD0000)
        assert raw.status(h.SET_VRING_ENABLE, h.state(0, 1)) == 0
        assert raw.status(h.SET_VRING_KICK, h.u64(h.NOFD)) == 0
        ready, _, _ = select.select([raw.err], [], [], 20)
        assert ready
        assert raw.ask(h.GET_FEATURES)
        ready, _, _ = select.select([server.fileno()], [], [], 0.2)
        assert not ready


# -- a guest that breaks its ring --------------------------------------------------------------------


def test_broken_ring_leaves_the_rest_alone(path: Path, no_leaks: None) -> None:
    with contextlib.closing(Hoarder()) as device, h.served(device, path), guest_on(path) as (raw, guest):
        raw.start()
        guest.offer(addr=0xDEAD0000)
        guest.kick()
        ready, _, _ = select.select([raw.err], [], [], 20)
        assert ready, "the error eventfd says so"
        assert raw.ask(h.GET_FEATURES), "the session lives"
        guest.offer()
        guest.kick()
        assert raw.ask(h.GET_VRING_BASE, h.state(0, 0)).number == h.GET_VRING_BASE
        assert not device.chains
        # And can be set up anew.
        guest.map[: USED + 256] = bytes(USED + 256)
        guest.idx = 0
        raw.start_ring()
        guest.offer()
        guest.kick()
        device.wait_for(1)
        device.chains.clear()


# -- memory ------------------------------------------------------------------------------------------

TOP = (1 << 64) - 4096


@pytest.mark.parametrize(
    "regions",
    [
        [],
        [(h.GUEST, 0, h.USER, 0)],
        [(TOP, h.SIZE, h.USER, 0)],
        [(h.GUEST, h.SIZE, TOP, 0)],
        [(h.GUEST, h.SIZE, h.USER, 4096)],
        [(h.GUEST, h.SIZE, h.USER, TOP)],
        [(h.GUEST, 1 << 62, h.USER, 0)],
        [(h.GUEST, 8192, h.USER, 0), (h.GUEST + 4096, 8192, h.USER + 65536, 0)],
        [(h.GUEST, 8192, h.USER, 0), (h.GUEST + 65536, 8192, h.USER + 4096, 0)],
        [(h.GUEST, 8192, h.USER, 0)] * 2,
        [(h.GUEST + i * 4096, 4096, h.USER + i * 4096, 0) for i in range(33)],
    ],
    ids=["none", "empty", "wraps", "user wraps", "beyond", "offset wraps", "huge", "overlap", "user overlap",
         "twice", "many"],
)  # fmt: skip
def test_tables_that_are_refused(
    path: Path, no_leaks: None, regions: list[tuple[int, int, int, int]]
) -> None:
    with h.served(vhost.devices.Rng(), path), guest_on(path) as (raw, guest):
        raw.negotiate()
        descriptors = [raw.memfd] * len(regions)
        if len(regions) > 32:
            raw.send(h.SET_MEM_TABLE, h.table(*regions), descriptors)
            assert raw.ended()
            return
        assert raw.status(h.SET_MEM_TABLE, h.table(*regions), descriptors) != 0
        if regions:
            for region in regions[:-1]:
                assert raw.status(h.ADD_MEM_REG, h.slot(*region), [raw.memfd]) == 0
            assert raw.status(h.ADD_MEM_REG, h.slot(*regions[-1]), [raw.memfd]) != 0
            for region in regions[:-1]:
                assert raw.status(h.REM_MEM_REG, h.slot(*region)) == 0
        raw.share_memory()
        raw.start_ring()
        guest.offer()
        guest.kick()
        guest.wait_used(1)


def test_as_many_slots_as_promised(path: Path, no_leaks: None) -> None:
    with h.served(vhost.devices.Rng(), path), guest_on(path) as (raw, _):
        raw.negotiate()
        slots = raw.ask(h.GET_MAX_MEM_SLOTS).u64
        assert slots == 509
        for i in range(slots):
            region = (h.GUEST + i * 8192, 4096, h.USER + i * 8192, i * 4096)
            assert raw.status(h.ADD_MEM_REG, h.slot(*region), [raw.memfd]) == 0
        assert raw.status(h.ADD_MEM_REG, h.slot(0, 4096, 0, 0), [raw.memfd]) != 0
        assert raw.status(h.REM_MEM_REG, h.slot(h.GUEST, 4096, h.USER, 77), [raw.memfd]) == 0
        assert raw.status(h.ADD_MEM_REG, h.slot(0, 4096, 0, 0), [raw.memfd]) == 0


def test_removing_what_is_not_there_or_lives(path: Path, no_leaks: None) -> None:
    with h.served(vhost.devices.Rng(), path), guest_on(path) as (raw, guest):
        raw.start()
        assert raw.status(h.REM_MEM_REG, h.slot(h.GUEST, h.SIZE, h.USER, 0)) != 0, "holds a live ring"
        assert raw.status(h.REM_MEM_REG, h.slot(h.GUEST, h.SIZE - 4096, h.USER, 0)) != 0
        assert raw.status(h.REM_MEM_REG, h.slot(0, 4096, 0, 0)) != 0
        other = h.table((0, 4096, 0, 0))
        assert raw.status(h.SET_MEM_TABLE, other, [raw.memfd]) != 0, "a live ring would be lost"
        guest.offer()
        guest.kick()
        guest.wait_used(1)


def test_new_table_with_chains_out(path: Path, no_leaks: None) -> None:
    with contextlib.closing(Hoarder()) as device, h.served(device, path), guest_on(path) as (raw, guest):
        raw.start()
        guest.offer()
        guest.kick()
        device.wait_for(1)
        # The same memory, at another guest address: chains that are out keep what they had.
        moved = h.table((h.GUEST + (1 << 30), h.SIZE, h.USER, 0))
        assert raw.status(h.SET_MEM_TABLE, moved, [raw.memfd]) == 0
        ((queue, chain),) = device.chains
        device.chains.clear()
        chain.write(b"late but right")
        queue.push(chain)
        del chain, queue
        guest.wait_used(1)
        assert guest.map[DATA : DATA + 14] == b"late but right"
        guest.offer(addr=h.GUEST + (1 << 30) + DATA)
        guest.kick()
        device.wait_for(1)
        device.chains.clear()


TRUNCATE = """
import os, socket, sys
from pathlib import Path
import vhost
from vhost.memory import install_sigbus_handler
sys.path.insert(0, {tests!r})
from user import hostile as h
from user.test_lifecycle import guest_on
install_sigbus_handler()
path = Path({path!r})
device = vhost.devices.Blk({image!r}) if {kind!r} == "blk" else vhost.devices.Rng()
with h.served(device, path), guest_on(path) as (other, fine):
    with guest_on(path) as (raw, guest):
        if {kind!r} == "rng":
            other.start()
        raw.start() if {kind!r} == "blk" else raw.negotiate()
        if {kind!r} != "blk":
            assert raw.share_memory() == 0
        if {kind!r} == "rng":
            other.ask(h.GET_VRING_BASE, h.state(0, 0))
            raw.start_ring()
        if {kind!r} == "start":
            raw.set_ring()
            assert raw.status(h.SET_VRING_ENABLE, h.state(0, 1)) == 0
        os.ftruncate(raw.memfd, 0)
        if {kind!r} == "start":
            raw.send(h.SET_VRING_KICK, h.u64(0), [raw.kick], flags=h.VERSION | h.NEED_REPLY)
        guest.kick()
        assert raw.ended()
    assert other.ask(h.GET_FEATURES).u64
device.close()
print("alive")
"""


@pytest.mark.parametrize("kind", ["rng", "blk", "start"])
def test_memory_that_is_truncated_under_a_running_ring(tmp_path: Path, kind: str) -> None:
    """In a process of its own, for the handler is the process's: python rings and the C engine, and a
    ring that is about to start, where a refusal would not be enough."""
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    code = TRUNCATE.format(
        tests=str(Path(__file__).parent.parent), path=str(tmp_path / "s"), kind=kind, image=str(image)
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "alive\n", done.stderr
    assert "truncated" in done.stderr


FULL = """
import contextlib, os, sys
from pathlib import Path
import vhost
sys.path.insert(0, {tests!r})
from user import hostile as h
from user.test_lifecycle import guest_on
path = Path({path!r})
factory = vhost.devices.Rng if {kind!r} == "rng" else lambda: vhost.devices.Blk({image!r})
with h.served(factory, path), guest_on(path) as (other, _), guest_on(path) as (raw, guest):
    other.negotiate()
    raw.start()
    for fd in (raw.call, raw.err):
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(fd)
        os.eventfd_write(fd, 2**64 - 2)
        os.set_blocking(fd, True)
    guest.offer()
    guest.offer(addr=1)  # outside: the ring breaks, which is told by `err`
    guest.kick()
    raw.ask(h.GET_VRING_BASE, h.state(0, 0))
    assert other.ask(h.GET_FEATURES).u64
print("alive")
"""


@pytest.mark.parametrize("kind", ["rng", "blk"])
def test_eventfds_that_would_block(tmp_path: Path, kind: str) -> None:
    """The peer has the same open file: it fills the counter, and makes it blocking after we looked. In
    a process of its own, for one that waits there cannot be stopped."""
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    code = FULL.format(
        tests=str(Path(__file__).parent.parent), path=str(tmp_path / "s"), kind=kind, image=str(image)
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "alive\n", done.stderr


def test_eventfds_stay_as_the_front_end_made_them(path: Path, no_leaks: None) -> None:
    """It may wait for a call in a blocking read."""
    with h.served(vhost.devices.Rng, path), guest_on(path) as (raw, guest):
        os.set_blocking(raw.call, True)
        raw.start()
        assert os.get_blocking(raw.call)
        guest.offer()
        guest.kick()
        while guest.used < 1:
            os.eventfd_read(raw.call)


# -- ends --------------------------------------------------------------------------------------------


def test_disconnect_at_every_boundary_and_in_between(path: Path, no_leaks: None) -> None:
    messages = [
        (h.SET_OWNER, b"", ""),
        (h.SET_FEATURES, h.u64(h.VERSION_1 | h.PROTOCOL_FEATURES), ""),
        (h.SET_MEM_TABLE, h.table((h.GUEST, h.SIZE, h.USER, 0)), "memfd"),
        (h.SET_VRING_NUM, h.state(0, h.NUM), ""),
        (h.SET_VRING_BASE, h.state(0, 0), ""),
        (h.SET_VRING_ADDR, h.address(0), ""),
        (h.SET_VRING_CALL, h.u64(0), "call"),
        (h.SET_VRING_ERR, h.u64(0), "err"),
        (h.SET_VRING_KICK, h.u64(0), "kick"),
        (h.SET_VRING_ENABLE, h.state(0, 1), ""),
        (h.GET_VRING_BASE, h.state(0, 0), ""),
    ]
    with h.served(vhost.devices.Rng(), path):
        for count in range(len(messages) + 1):
            for torn in (0, 5, 12, 15):
                with guest_on(path) as (raw, guest):
                    guest.offer()
                    guest.kick()
                    for number, payload, fd in messages[:count]:
                        raw.send(number, payload, [getattr(raw, fd)] if fd else [])
                    if torn and count < len(messages):
                        number, payload, fd = messages[count]
                        whole = h.HEADER.pack(number, h.VERSION, len(payload)) + payload
                        raw.raw(whole[:torn], [getattr(raw, fd)] if fd else [])
        with guest_on(path) as (raw, _):
            assert raw.ask(h.GET_FEATURES)


def wait_until_nobody_is_left(server: vhost.Server) -> None:
    """The server's thread may not have seen the end of the last session yet."""
    deadline = time.monotonic() + 20
    while server.backends:
        assert time.monotonic() < deadline
        os.sched_yield()


def test_a_thousand_sessions(path: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    device = vhost.devices.Blk(image)

    def session() -> None:
        with guest_on(path) as (raw, guest):
            raw.start()
            # Header and status in one writable chain would be malformed; a flush is the shortest request.
            struct.pack_into("<IIQ", guest.map, DATA, 4, 0, 0)
            struct.pack_into("<QIHH", guest.map, 0, h.GUEST + DATA, 16, 1, 1)
            struct.pack_into("<QIHH", guest.map, 16, h.GUEST + DATA + 64, 1, 2, 0)
            struct.pack_into("<HHH", guest.map, AVAIL, 0, 1, 0)
            guest.kick()
            guest.wait_used(1)

    with h.served(device, path) as server:
        session()
        wait_until_nobody_is_left(server)
        with fds.no_leaks():
            for _ in range(1000):
                session()
            wait_until_nobody_is_left(server)
    device.close()


def test_a_session_goes_when_it_is_over() -> None:
    """Not when the collector comes: a device made for it has threads, files and descriptors."""
    ours, theirs = socket.socketpair()
    device = vhost.devices.Rng()
    session = Backend(device, ours)
    gone = weakref.ref(session)
    theirs.close()
    gc.disable()
    try:
        assert not session.step()
        del session
        assert gone() is None
    finally:
        gc.enable()


def test_idle_costs_nothing(path: Path, tmp_path: Path) -> None:
    """With a ring that ran and a session that sits there: no wake-ups, no CPU."""
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    device = vhost.devices.Blk(image)
    with (
        h.served(device, path),
        vhost.Frontend.connect(path) as frontend,
        vhost.drivers.Blk(frontend) as disk,
    ):
        disk.write(0, b"x" * 4096)
        disk.read(0, 8)
        select.select([], [], [], 0.2)  # spinning after work is allowed, for a while
        before = resource.getrusage(resource.RUSAGE_SELF)
        select.select([], [], [], 1.0)
        after = resource.getrusage(resource.RUSAGE_SELF)
    device.close()
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.05
    assert after.ru_nvcsw - before.ru_nvcsw < 10
