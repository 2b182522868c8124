# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""In-flight tracking on the wire: buffers that are asked for and given back, those that lie, and what a ring
that stops leaves in them."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

import vhost
from user import hostile as h
from user.hostile import RawFrontend
from user.test_frontend import RawBackend, backend
from user.test_lifecycle import Guest
from vhost.errors import InactiveFeature, InvalidMessage, InvalidQueue
from vhost.features import ProtocolF
from vhost.inflight import inflight_size
from vhost.user.frontend_base import WANTED

GET_INFLIGHT_FD, SET_INFLIGHT_FD = 31, 32
INFLIGHT = struct.Struct("=QQHH4x")
# Of the first queue's region, if it is a split one: features, version, desc_num, last_batch_head, used_idx.
HEAD = struct.Struct("<QHHHH")
ENTRIES = 16
SHMFD, HAND_OVER = int(ProtocolF.INFLIGHT_SHMFD), int(ProtocolF.GET_VRING_BASE_INFLIGHT)
SKIP_DRAIN, GET_VRING_BASE_SKIP_DRAIN = 1 << 23, 45


class Lazy(vhost.Device):
    """Takes what comes, and completes it when it is told to, or when its ring stops."""

    device_id = vhost.DeviceId.RNG
    queues = ("keep", "keep")

    def __init__(self) -> None:
        self.chains: list[tuple[vhost.DeviceQueue, vhost.Chain]] = []
        self.taken = os.eventfd(0)
        self.a_call = 64
        """How many it takes in one call."""
        self.dies = False
        """It ends without a word, as a process that is killed."""

    def keep(self, queue: vhost.DeviceQueue) -> None:
        chains = queue.pop_batch(self.a_call)
        self.chains += [(queue, chain) for chain in chains]
        queue.enable_notification()
        if chains:
            os.eventfd_write(self.taken, len(chains))

    def wait_for(self, count: int) -> None:
        while len(self.chains) < count:
            os.eventfd_read(self.taken)

    def stop_queue(self, queue: vhost.DeviceQueue) -> None:
        mine = [chain for other, chain in self.chains if other is queue]
        self.chains = [pair for pair in self.chains if pair[0] is not queue]
        for chain in [] if self.dies else mine:
            queue.push(chain, chain.write(b"done"))

    def suspend_queue(self, queue: vhost.DeviceQueue) -> None:
        """Whatever it has taken can be cancelled."""

    def close(self) -> None:
        os.close(self.taken)


class Buffer(NamedTuple):
    size: int
    offset: int
    num_queues: int
    queue_size: int
    fd: int

    def describe(self, **other: int) -> bytes:
        return INFLIGHT.pack(*self._replace(**other)[:4])


def get_buffer(raw: RawFrontend, num_queues: int, queue_size: int) -> Buffer:
    """fd -1: none came with the answer."""
    raw.send(GET_INFLIGHT_FD, INFLIGHT.pack(0, 0, num_queues, queue_size))
    data, descriptors, _, _ = socket.recv_fds(raw.sock, h.HEADER.size + INFLIGHT.size, 4)
    assert h.HEADER.unpack(data[: h.HEADER.size]) == (GET_INFLIGHT_FD, h.VERSION | h.REPLY, INFLIGHT.size)
    return Buffer(*INFLIGHT.unpack(data[h.HEADER.size :]), *(descriptors or [-1]))


@pytest.fixture
def device(tmp_path: Path, no_leaks: None) -> Iterator[Lazy]:
    lazy = Lazy()
    with h.served(lazy, tmp_path / "s"):
        yield lazy
    lazy.close()


@contextmanager
def connection(path: Path, memfd: int = -1) -> Iterator[RawFrontend]:
    raw = RawFrontend(path)
    if memfd >= 0:
        os.dup2(memfd, raw.memfd)
    try:
        yield raw
    finally:
        raw.close()


@pytest.fixture
def raw(device: Lazy, tmp_path: Path) -> Iterator[RawFrontend]:
    with connection(tmp_path / "s") as raw:
        raw.negotiate()
        yield raw


@pytest.fixture
def buffer(raw: RawFrontend) -> Iterator[Buffer]:
    buffer = get_buffer(raw, 2, ENTRIES)
    yield buffer
    os.close(buffer.fd)


# -- asking for a buffer -------------------------------------------------------------------------------


def test_a_buffer_as_it_was_asked_for(raw: RawFrontend, buffer: Buffer) -> None:
    assert buffer[:4] == (inflight_size(2, ENTRIES, packed=False), 0, 2, ENTRIES)
    assert os.fstat(buffer.fd).st_size == buffer.size
    assert fcntl.fcntl(buffer.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    assert os.pread(buffer.fd, buffer.size, 0) == bytes(buffer.size), "nobody used it yet"


def test_each_request_makes_a_new_one(raw: RawFrontend, buffer: Buffer) -> None:
    seen = {os.fstat(buffer.fd).st_ino}
    for _ in range(300):
        again = get_buffer(raw, 2, ENTRIES)
        seen.add(os.fstat(again.fd).st_ino)
        os.close(again.fd)
    assert len(seen) > 1
    assert raw.ask(h.GET_FEATURES).u64


@pytest.mark.parametrize(
    ("num_queues", "queue_size"), [(0, ENTRIES), (3, ENTRIES), (0xFFFF, ENTRIES), (1, 0), (1, 32769)]
)
def test_no_buffer_for_that(raw: RawFrontend, num_queues: int, queue_size: int) -> None:
    assert get_buffer(raw, num_queues, queue_size) == (0, 0, 0, 0, -1)
    assert raw.ask(h.GET_FEATURES).u64


def test_room_for_packed_rings_before_anybody_knows(device: Lazy, tmp_path: Path) -> None:
    with connection(tmp_path / "s") as raw:
        raw.send(h.SET_PROTOCOL_FEATURES, h.u64(raw.ask(h.GET_PROTOCOL_FEATURES).u64 & ~h.GPA_ADDRESSES))
        buffer = get_buffer(raw, 1, 7)
        os.close(buffer.fd)
        assert buffer.size == inflight_size(1, 7, packed=True)


def test_not_offered(tmp_path: Path, no_leaks: None) -> None:
    with h.served(vhost.devices.Rng(), tmp_path / "s", without=SHMFD), connection(tmp_path / "s") as raw:
        assert not raw.ask(h.GET_PROTOCOL_FEATURES).u64 & (SHMFD | HAND_OVER | SKIP_DRAIN)
        raw.negotiate()
        assert get_buffer(raw, 1, ENTRIES) == (0, 0, 0, 0, -1)


@pytest.mark.parametrize("lacks", [SHMFD | SKIP_DRAIN, SHMFD | HAND_OVER, HAND_OVER])
def test_hand_over_needs_a_buffer(device: Lazy, tmp_path: Path, lacks: int) -> None:
    with connection(tmp_path / "s") as raw:
        offered = raw.ask(h.GET_PROTOCOL_FEATURES).u64 & ~h.GPA_ADDRESSES
        assert offered & SHMFD
        assert offered & HAND_OVER
        assert offered & SKIP_DRAIN
        raw.send(h.SET_PROTOCOL_FEATURES, h.u64(offered & ~lacks))
        assert raw.ended()


# -- giving it back ------------------------------------------------------------------------------------


def test_buffers_that_are_none(raw: RawFrontend, buffer: Buffer) -> None:
    for fd, what in (
        (raw.kick, buffer.describe()),
        (raw.sock.fileno(), buffer.describe()),
        (buffer.fd, buffer.describe(size=0)),
        (buffer.fd, buffer.describe(size=(1 << 64) - 64)),
        (buffer.fd, buffer.describe(size=buffer.size + 64)),
        (buffer.fd, buffer.describe(size=inflight_size(2, ENTRIES, packed=False) - 64)),
        (buffer.fd, buffer.describe(offset=64)),
        (buffer.fd, buffer.describe(size=1024, offset=8, num_queues=1)),
        (buffer.fd, buffer.describe(offset=(1 << 64) - 4096)),
        (buffer.fd, buffer.describe(num_queues=0)),
        (buffer.fd, buffer.describe(num_queues=0xFFFF)),
        (buffer.fd, buffer.describe(queue_size=0)),
        (buffer.fd, buffer.describe(queue_size=0xFFFF)),
    ):
        assert raw.status(SET_INFLIGHT_FD, what, [fd]) != 0, what
    assert raw.status(SET_INFLIGHT_FD, buffer.describe()) != 0, "no descriptor"
    assert raw.status(SET_INFLIGHT_FD, buffer.describe(), [buffer.fd]) == 0


def test_not_under_a_running_ring(raw: RawFrontend, buffer: Buffer) -> None:
    raw.share_memory()
    raw.start_ring()
    assert raw.status(SET_INFLIGHT_FD, buffer.describe(), [buffer.fd]) != 0
    raw.ask(h.GET_VRING_BASE, h.state(0, 0))
    assert raw.status(SET_INFLIGHT_FD, buffer.describe(), [buffer.fd]) == 0


@pytest.mark.parametrize(
    "lie",
    [
        HEAD.pack(0, 2, ENTRIES, 0, 0),
        HEAD.pack(0, 1, ENTRIES - 1, 0, 0),
        HEAD.pack(0, 1, ENTRIES, 0, 1),
        HEAD.pack(0, 1, ENTRIES, 0, 0xFFFF) + bytes([1]),
        HEAD.pack(0, 1, ENTRIES, 0, 0) + bytes([7]),
    ],
    ids=["version", "entries", "used index", "batch of nothing", "flag"],
)
def test_a_buffer_that_lies(raw: RawFrontend, buffer: Buffer, lie: bytes) -> None:
    """The ring does not start, and that is all."""
    os.pwrite(buffer.fd, lie, 0)
    assert raw.status(SET_INFLIGHT_FD, buffer.describe(), [buffer.fd]) == 0
    raw.share_memory()
    raw.set_ring()
    if lie[HEAD.size :] == b"\1":
        # One batch was used, of a head that is not in the ring any more: that is believed.
        assert raw.status(h.SET_VRING_KICK, h.u64(0), [raw.kick]) == 0
    else:
        assert raw.status(h.SET_VRING_KICK, h.u64(0), [raw.kick]) != 0
    raw.start_ring(1)


def test_a_ring_that_is_larger_than_its_part(raw: RawFrontend) -> None:
    buffer = get_buffer(raw, 1, h.NUM // 2)
    assert raw.status(SET_INFLIGHT_FD, buffer.describe(), [buffer.fd]) == 0
    os.close(buffer.fd)
    raw.share_memory()
    raw.set_ring()
    assert raw.status(h.SET_VRING_KICK, h.u64(0), [raw.kick]) != 0
    raw.start_ring(1)  # has no part in it


TRUNCATED = """
import os, sys
from pathlib import Path
import vhost
sys.path.insert(0, {tests!r})
from user import hostile as h
from user.hostile import RawFrontend
from user.test_inflight import INFLIGHT, SET_INFLIGHT_FD
from user.test_lifecycle import Guest
from vhost.memory import install_sigbus_handler
install_sigbus_handler()
path = Path({path!r})
device = vhost.devices.Blk({image!r}) if {kind!r} == "c" else vhost.devices.Rng()
with h.served(device, path):
    raw = RawFrontend(path)
    raw.negotiate()
    raw.share_memory()
    fd = os.memfd_create("mine")
    os.ftruncate(fd, 4096)
    assert raw.status(SET_INFLIGHT_FD, INFLIGHT.pack(4096, 0, 1, h.NUM), [fd]) == 0
    raw.start_ring()
    os.ftruncate(fd, 0)
    Guest(raw).offer()
    os.eventfd_write(raw.kick, 1)
    assert raw.ended()
    again = RawFrontend(path)
    assert again.ask(h.GET_FEATURES).u64
print("alive")
"""


@pytest.mark.parametrize("kind", ["python", "c"])
def test_a_buffer_that_is_truncated(tmp_path: Path, kind: str) -> None:
    """In a process of its own, for the handler is the process's."""
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    tests = str(Path(__file__).parent.parent)
    code = TRUNCATED.format(tests=tests, path=str(tmp_path / "s"), kind=kind, image=str(image))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout == "alive\n", done.stderr
    assert "truncated" in done.stderr


# -- what is in flight ---------------------------------------------------------------------------------


def begin(raw: RawFrontend, buffer: Buffer, *, base: int = 0) -> None:
    assert raw.status(SET_INFLIGHT_FD, buffer.describe(), [buffer.fd]) == 0
    assert raw.share_memory() == 0
    raw.set_ring()
    assert raw.status(h.SET_VRING_BASE, h.state(0, base)) == 0
    assert raw.status(h.SET_VRING_KICK, h.u64(0), [raw.kick]) == 0
    assert raw.status(h.SET_VRING_ENABLE, h.state(0, 1)) == 0


def used_heads(guest: Guest) -> list[int]:
    return [struct.unpack_from("<I", guest.map, 0x2004 + i * 8)[0] for i in range(guest.used)]


@contextmanager
def died_with(count: int, device: Lazy, path: Path) -> Iterator[tuple[RawFrontend, Guest, Buffer]]:
    """A session whose predecessor died with so many in flight, the second of which had been completed."""
    with connection(path) as first:
        first.negotiate()
        buffer = get_buffer(first, 1, ENTRIES)
        guest = Guest(first)
        begin(first, buffer)
        for _ in range(count + 1):
            guest.offer()
        guest.kick()
        device.wait_for(count + 1)
        queue, chain = device.chains.pop(1)
        queue.push(chain, 0)
        guest.wait_used(1)
        device.dies = True
        with connection(path, first.memfd) as second:
            first.sock.close()
            second.negotiate()
            hand_over(second, 0)
            while device._running:  # the server has seen the end of the first
                second.ask(h.GET_FEATURES)
            device.dies = False
            guest.raw = second
            yield second, guest, buffer
    guest.map.close()
    os.close(buffer.fd)


def test_what_was_in_flight_comes_again(device: Lazy, tmp_path: Path) -> None:
    with died_with(3, device, tmp_path / "s") as (raw, guest, buffer):
        guest.offer()
        begin(raw, buffer, base=guest.used)  # all that QEMU can say
        device.wait_for(4)
        assert [chain.id for _, chain in device.chains] == [0, 2, 3, 4]
        raw.ask(h.GET_VRING_BASE, h.state(0, 0))
        guest.wait_used(5)
        assert sorted(used_heads(guest)) == [0, 1, 2, 3, 4]


def test_all_of_it_is_done_before_a_ring_stops(device: Lazy, tmp_path: Path) -> None:
    """No index can say what was in flight before it."""
    with died_with(5, device, tmp_path / "s") as (raw, guest, buffer):
        device.a_call = 1
        begin(raw, buffer)
        assert raw.ask(h.GET_VRING_BASE, h.state(0, 0)).payload == h.state(0, 6)
        assert guest.used == 6
        assert sorted(used_heads(guest)) == [0, 1, 2, 3, 4, 5]


def test_a_buffer_that_came_too_late(device: Lazy, tmp_path: Path) -> None:
    """The driver made new rings, of which the buffer knows nothing."""
    with died_with(2, device, tmp_path / "s") as (raw, guest, buffer):
        assert raw.status(SET_INFLIGHT_FD, buffer.describe(), [buffer.fd]) == 0
        assert raw.status(h.RESET_DEVICE) == 0
        guest.map[:0x4000] = bytes(0x4000)
        guest.idx = 0
        guest.offer()
        assert raw.share_memory() == 0
        raw.start_ring()
        device.wait_for(1)
        assert [chain.id for _, chain in device.chains] == [0]


def hand_over(raw: RawFrontend, protocol_features: int) -> None:
    offered = raw.ask(h.GET_PROTOCOL_FEATURES).u64 & ~h.GPA_ADDRESSES
    raw.send(h.SET_PROTOCOL_FEATURES, h.u64(offered & ~(HAND_OVER | SKIP_DRAIN) | protocol_features))
    assert raw.status(h.SET_FEATURES, h.u64(h.VERSION_1 | h.PROTOCOL_FEATURES)) == 0


@pytest.mark.parametrize(
    ("negotiated", "stop", "left"),
    [
        (0, h.GET_VRING_BASE, False),
        (HAND_OVER, h.GET_VRING_BASE, True),
        # Who has a message for it says each time whether to wait.
        (HAND_OVER | SKIP_DRAIN, h.GET_VRING_BASE, False),
        (HAND_OVER | SKIP_DRAIN, GET_VRING_BASE_SKIP_DRAIN, True),
    ],
    ids=["drained", "handed over", "drained all the same", "not drained"],
)
def test_a_ring_that_stops(device: Lazy, tmp_path: Path, negotiated: int, stop: int, left: bool) -> None:
    """GET_VRING_BASE waits for what is in flight, or leaves it in the buffer; nothing is published later."""
    with connection(tmp_path / "s") as raw:
        hand_over(raw, negotiated)
        buffer = get_buffer(raw, 1, ENTRIES)
        guest = Guest(raw)
        begin(raw, buffer)
        for _ in range(3):
            guest.offer()
        guest.kick()
        device.wait_for(3)
        chains = list(device.chains)
        assert raw.ask(stop, h.state(0, 0)).payload == h.state(0, 3)
        assert guest.used == (0 if left else 3)
        before = guest.map[:0x4000], os.pread(buffer.fd, buffer.size, 0)
        for queue, chain in chains:
            with pytest.raises(InvalidQueue):
                queue.push(chain, 0)
        assert (guest.map[:0x4000], os.pread(buffer.fd, buffer.size, 0)) == before
        device.chains.clear()
        begin(raw, buffer, base=3)
        if left:
            device.wait_for(3)
            assert [chain.id for _, chain in device.chains] == [0, 1, 2]
            for queue, chain in device.chains:
                queue.push(chain, 0)
            device.chains.clear()
        guest.offer()
        guest.kick()
        device.wait_for(1)
        assert guest.used == 3
        guest.map.close()
        os.close(buffer.fd)


# -- the front-end's part ------------------------------------------------------------------------------


def test_front_end_owns_the_buffer(device: Lazy, tmp_path: Path) -> None:
    with vhost.Frontend.connect(tmp_path / "s") as frontend:
        assert frontend.tracks_inflight
        frontend.set_features(h.VERSION_1)
        buffer = frontend.get_inflight_fd(2, ENTRIES)
        assert buffer is not None
        assert (buffer.size, buffer.offset) == (inflight_size(2, ENTRIES, packed=False), 0)
        assert os.fstat(buffer.fd).st_size == buffer.size
        frontend.set_inflight_fd(buffer)
        assert frontend.get_inflight_fd(3, ENTRIES) is None, "the device has two queues"
        buffer.close()
        buffer.close()


def test_front_end_does_not_wait(device: Lazy, tmp_path: Path) -> None:
    everything = int(WANTED | ProtocolF.GET_VRING_BASE_INFLIGHT) | SKIP_DRAIN
    with vhost.Frontend.connect(tmp_path / "s", protocol_features=everything) as frontend:
        assert frontend.protocol_features & SKIP_DRAIN
        frontend.set_features(h.VERSION_1)
        frontend.set_vring_base(0, 7)
        assert frontend.get_vring_base(0, drain=False) == 7
    with vhost.Frontend.connect(tmp_path / "s") as frontend, pytest.raises(InactiveFeature):
        frontend.get_vring_base(0, drain=False)


@pytest.mark.parametrize("has", [HAND_OVER | SKIP_DRAIN, SHMFD | SKIP_DRAIN, SKIP_DRAIN])
def test_front_end_does_not_ask_for_what_cannot_be(has: int, no_leaks: None) -> None:
    """Whatever is offered: each of these needs those before it."""
    with (
        backend(lambda raw: raw.handshake(h.PROTOCOL_FEATURES, has)) as sock,
        vhost.Frontend(sock, protocol_features=SHMFD | HAND_OVER | SKIP_DRAIN) as frontend,
    ):
        assert frontend.protocol_features == has & SHMFD


def test_front_end_of_a_back_end_without(tmp_path: Path, no_leaks: None) -> None:
    with (
        h.served(vhost.devices.Rng(), tmp_path / "s", without=SHMFD),
        vhost.Frontend.connect(tmp_path / "s") as frontend,
    ):
        assert not frontend.tracks_inflight
        assert frontend.get_inflight_fd(1, ENTRIES) is None


@pytest.mark.parametrize(
    ("answer", "gives"),
    [((0, 0, 0, 0), None), ((4096, 0, 1, ENTRIES), "no descriptor"), ((1 << 63, 7, 9, 9), "no descriptor")],
)
def test_answers_without_a_buffer(answer: tuple[int, ...], gives: str | None, no_leaks: None) -> None:
    def script(raw: RawBackend) -> None:
        raw.handshake(h.PROTOCOL_FEATURES | h.VERSION_1, SHMFD)
        number, _, payload = raw.receive()
        assert (number, payload) == (GET_INFLIGHT_FD, INFLIGHT.pack(0, 0, 1, ENTRIES))
        raw.reply(number, INFLIGHT.pack(*answer))

    with backend(script) as sock, vhost.Frontend(sock) as frontend:
        if gives is None:
            assert frontend.get_inflight_fd(1, ENTRIES) is None
        else:
            with pytest.raises(InvalidMessage, match=gives):
                frontend.get_inflight_fd(1, ENTRIES)
