# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Stopped and started, disabled and enabled, suspended (vhost-user, "Ring states"): what a back-end does in
each of them, by the effects that a front-end sees."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

import vhost
from user import hostile as h
from user.test_lifecycle import AVAIL, DATA, Guest, Hoarder, guest_on
from vhost.drivers.base import GUEST_ADDR
from vhost.errors import InvalidMessage, RequestFailed

CONFIG_CHANGE = 2  # a request of the back-end


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


class Sink(vhost.Device):
    """A transmitter: enabled it keeps what it is sent, disabled it drops that, as the specification says of
    network devices. What each ring did is counted by an eventfd."""

    device_id = vhost.DeviceId.NET
    queues = ("rx", "tx")

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.dropped = 0
        self.config_space = bytes(8)

    @property
    def config(self) -> bytes:
        return self.config_space

    def rx(self, queue: vhost.DeviceQueue) -> None:
        """Nothing ever comes."""

    def tx(self, queue: vhost.DeviceQueue) -> None:
        for chain in queue:
            self.sent.append(bytes(chain.read()))
            queue.push(chain, 0)

    def handle_disabled(self, queue: vhost.DeviceQueue) -> None:
        if queue.index == 1:
            for chain in queue:
                self.dropped += 1
                queue.push(chain, 0)


TX = 1


class Sender(Guest):
    """Offers readable buffers on a ring of its own."""

    def send(self, text: bytes) -> None:
        head = self.idx % h.NUM
        self.map[DATA + head * 64 : DATA + head * 64 + len(text)] = text
        struct.pack_into("<QIHH", self.map, head * 16, h.GUEST + DATA + head * 64, len(text), 0, 0)
        struct.pack_into("<H", self.map, AVAIL + 4 + head * 2, head)
        self.idx += 1
        struct.pack_into("<H", self.map, AVAIL + 2, self.idx & 0xFFFF)


@contextlib.contextmanager
def sender_on(path: Path) -> Iterator[tuple[h.RawFrontend, Sender]]:
    with contextlib.closing(h.RawFrontend(path)) as raw, contextlib.closing(Sender(raw)) as guest:
        raw.negotiate()
        assert raw.share_memory() == 0
        yield raw, guest


def let_it_look(raw: h.RawFrontend) -> None:
    """What was kicked for before this returns has been looked at: a session takes kicks and messages in
    turn, and each wait for an answer is a turn."""
    for _ in range(2):
        raw.ask(h.GET_FEATURES)


# -- disabled ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kicks", [True, False], ids=["kick", "polled"])
def test_disabled_ring_is_processed_without_effects(path: Path, no_leaks: None, kicks: bool) -> None:
    """It takes what is sent, and drops it; enabled again, it goes on with what comes then."""
    device = Sink()
    with h.served(device, path), sender_on(path) as (raw, guest):
        raw.set_ring(TX)
        kick = ([raw.kick],) if kicks else ()
        assert raw.status(h.SET_VRING_KICK, h.u64(TX if kicks else TX | h.NOFD), *kick) == 0
        assert raw.status(h.SET_VRING_ENABLE, h.state(TX, 1)) == 0
        for count, enabled in enumerate((1, 0, 1), 1):
            assert raw.status(h.SET_VRING_ENABLE, h.state(TX, enabled)) == 0
            guest.send(b"%d" % count)
            guest.kick()
            guest.wait_used(count)
    assert device.sent == [b"1", b"3"]
    assert device.dropped == 1


def test_what_came_before_the_first_kick_waits_for_enable(path: Path, no_leaks: None) -> None:
    """The destination of a migration finds frames in the ring; between SET_VRING_KICK and SET_VRING_ENABLE
    the ring is stopped, not disabled."""
    device = Sink()
    with h.served(device, path), sender_on(path) as (raw, guest):
        guest.send(b"waits")
        for fds in ((raw.kick,), ()):
            raw.set_ring(TX)
            number = TX if fds else TX | h.NOFD
            assert raw.status(h.SET_VRING_KICK, h.u64(number), fds) == 0
            let_it_look(raw)
            assert raw.ask(h.GET_VRING_BASE, h.state(TX, 0)).payload == h.state(TX, 0)
        raw.start_ring(TX)
        guest.wait_used(1)
    assert device.sent == [b"waits"]


def test_disabling_looks_once_more(path: Path, no_leaks: None) -> None:
    """What the driver added while the ring was enabled, and the device did not take, is dropped then: the
    driver was not asked to kick again."""
    device = Sink()
    served = device.tx
    device.tx = lambda queue: served(queue) if not device.sent else queue.disable_notification()  # type: ignore[method-assign]
    with h.served(device, path), sender_on(path) as (raw, guest):
        raw.start_ring(TX)
        guest.send(b"one")
        guest.kick()
        guest.wait_used(1)
        guest.kick()  # the device asks for no more kicks
        let_it_look(raw)
        guest.send(b"two")
        assert raw.status(h.SET_VRING_ENABLE, h.state(TX, 0)) == 0
        guest.wait_used(2)
    assert device.sent == [b"one"]
    assert device.dropped == 1


def test_disabled_ring_that_breaks_leaves_the_session_alone(path: Path, no_leaks: None) -> None:
    with h.served(Sink(), path), sender_on(path) as (raw, guest):
        raw.start_ring(TX)
        assert raw.status(h.SET_VRING_ENABLE, h.state(TX, 0)) == 0
        guest.offer(addr=0xDEAD0000)
        guest.kick()
        ready, _, _ = select.select([raw.err], [], [], 20)
        assert ready
        assert raw.ask(h.GET_FEATURES)


def test_disabled_ring_of_a_device_that_waits_costs_nothing(path: Path, no_leaks: None) -> None:
    """Polled or not: there is nothing to look for."""
    with h.served(vhost.devices.Rng(), path) as server, guest_on(path) as (raw, guest):
        raw.negotiate()
        assert raw.share_memory() == 0
        raw.set_ring()
        assert raw.status(h.SET_VRING_KICK, h.u64(h.NOFD)) == 0
        assert raw.status(h.SET_VRING_ENABLE, h.state(0, 1)) == 0
        guest.offer()
        guest.wait_used(1)
        assert raw.status(h.SET_VRING_ENABLE, h.state(0, 0)) == 0
        guest.offer()
        assert not select.select([server.fileno()], [], [], 0.2)[0]
        assert guest.used == 1
        assert raw.status(h.SET_VRING_ENABLE, h.state(0, 1)) == 0
        guest.wait_used(2)


def test_enabled_is_remembered_while_stopped(path: Path, no_leaks: None) -> None:
    with h.served(vhost.devices.Rng(), path), guest_on(path) as (raw, guest):
        raw.negotiate()
        assert raw.share_memory() == 0
        assert raw.status(h.SET_VRING_ENABLE, h.state(0, 1)) == 0
        for count in (1, 2):
            raw.set_ring()
            assert raw.status(h.SET_VRING_BASE, h.state(0, count - 1)) == 0
            assert raw.status(h.SET_VRING_KICK, h.u64(0), [raw.kick]) == 0
            guest.offer()
            guest.kick()
            guest.wait_used(count)
            raw.ask(h.GET_VRING_BASE, h.state(0, 0))
        assert raw.status(h.SET_VRING_ENABLE, h.state(0, 0)) == 0
        raw.set_ring()
        assert raw.status(h.SET_VRING_BASE, h.state(0, 2)) == 0
        assert raw.status(h.SET_VRING_KICK, h.u64(0), [raw.kick]) == 0
        guest.offer()
        guest.kick()
        let_it_look(raw)
        assert guest.used == 2


def test_features_without_protocol_features_enable_what_was_disabled(path: Path, no_leaks: None) -> None:
    with h.served(vhost.devices.Rng(), path), guest_on(path) as (raw, guest):
        raw.start()
        assert raw.status(h.SET_VRING_ENABLE, h.state(0, 0)) == 0
        raw.ask(h.GET_VRING_BASE, h.state(0, 0))
        assert raw.status(h.SET_FEATURES, h.u64(h.VERSION_1)) == 0
        raw.set_ring()
        assert raw.status(h.SET_VRING_KICK, h.u64(0), [raw.kick]) == 0
        guest.offer()
        guest.kick()
        guest.wait_used(1)


# -- stopped -----------------------------------------------------------------------------------------


def test_kick_first_and_all_else_after_it(path: Path, no_leaks: None) -> None:
    """On a restart the old size and place are known, but a ring is stopped until it is kicked: where it was
    must not be touched."""
    with h.served(vhost.devices.Rng(), path), guest_on(path) as (raw, guest):
        raw.start()
        guest.offer()
        guest.kick()
        guest.wait_used(1)
        raw.ask(h.GET_VRING_BASE, h.state(0, 0))
        kick = os.eventfd(0)
        assert raw.status(h.SET_VRING_KICK, h.u64(0), [kick]) == 0
        assert raw.status(h.SET_FEATURES, h.u64(h.VERSION_1 | 1 << 28 | h.PROTOCOL_FEATURES)) == 0
        assert raw.status(h.SET_VRING_NUM, h.state(0, h.NUM * 2)) == 0
        assert raw.status(h.SET_VRING_NUM, h.state(0, 0)) != 0
        assert raw.status(h.SET_VRING_BASE, h.state(0, 0)) == 0
        moved = (h.USER + 0x8000, h.USER + 0x9000, h.USER + 0xA000)
        assert raw.status(h.SET_VRING_ADDR, h.address(0, *moved)) == 0
        assert raw.status(h.SET_VRING_CALL, h.u64(0), [raw.call]) == 0
        struct.pack_into("<QIHH", guest.map, 0x8000, h.GUEST + DATA, 64, 2, 0)
        struct.pack_into("<HHH", guest.map, 0x9000, 0, 1, 0)
        os.eventfd_write(kick, 1)
        while struct.unpack_from("<H", guest.map, 0xA002)[0] != 1:
            assert select.select([raw.call], [], [], 20)[0]
            os.eventfd_read(raw.call)
        assert guest.used == 1, "the old place"
        assert raw.status(h.SET_VRING_NUM, h.state(0, h.NUM)) != 0, "now it runs"
        os.close(kick)


@pytest.mark.parametrize("packed", [False, True])
def test_a_ring_that_ran_must_be_stopped_first(path: Path, no_leaks: None, packed: bool) -> None:
    device = vhost.devices.Rng()
    with h.served(device, path), vhost.Frontend.connect(path) as frontend:
        with vhost.drivers.Rng(frontend, packed=packed) as rng:
            assert len(rng.read(64)) == 64
            base = rng.queues[0].base
            for change in (
                lambda: frontend.set_vring_num(0, 64),
                lambda: frontend.set_vring_base(0, base),
                lambda: frontend.set_features(rng.negotiated & ~int(vhost.VirtioF.RING_EVENT_IDX)),
                lambda: frontend.set_vring_addr(0, *(GUEST_ADDR + i * 1024 for i in range(3))),
            ):
                with pytest.raises(RequestFailed):
                    change()
            assert len(rng.read(64)) == 64


def test_what_a_device_keeps_of_a_stopped_ring_reaches_nobody(path: Path, no_leaks: None) -> None:
    """Neither its eventfds, nor the files that have their numbers by then."""
    with contextlib.closing(Hoarder()) as device, h.served(device, path), guest_on(path) as (raw, guest):
        raw.start()
        guest.offer()
        guest.kick()
        device.wait_for(1)
        ((queue, chain),) = device.chains
        device.chains.clear()
        assert raw.ask(h.GET_VRING_BASE, h.state(0, 0))
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(raw.call)  # one too many, for a predecessor who may have died
        queue.mark_broken("too late")
        with pytest.raises(vhost.InvalidQueue):
            queue.push(chain, 0)
        del chain, queue
        for name in ("err", "call"):
            assert not select.select([getattr(raw, name)], [], [], 0)[0], name
        assert guest.used == 0


# -- suspended ---------------------------------------------------------------------------------------


@pytest.fixture
def channel() -> Iterator[tuple[socket.socket, int]]:
    """Our end of a back-end channel, and the descriptor to give away."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(20)
        yield ours, theirs.fileno()


def news_on(channel: socket.socket) -> int:
    number, _, size = h.HEADER.unpack(channel.recv(h.HEADER.size, socket.MSG_WAITALL))
    assert size == 0
    return int(number)


def silent(channel: socket.socket) -> bool:
    return not select.select([channel], [], [], 0)[0]


def test_suspended_device_is_silent(path: Path, no_leaks: None, channel: tuple[socket.socket, int]) -> None:
    """Before its first ring starts and after its last one stopped; what it had to say comes then."""
    ours, theirs = channel
    device = Sink()
    with h.served(device, path), sender_on(path) as (raw, _):
        assert raw.status(h.SET_BACKEND_REQ_FD, b"", [theirs]) == 0
        device.config_changed()
        let_it_look(raw)
        assert silent(ours), "no ring was started yet"
        raw.start_ring(0)
        assert news_on(ours) == CONFIG_CHANGE
        raw.start_ring(TX)
        device.config_changed()
        assert news_on(ours) == CONFIG_CHANGE
        raw.ask(h.GET_VRING_BASE, h.state(0, 0))
        device.config_changed()
        assert news_on(ours) == CONFIG_CHANGE, "one ring still runs"
        raw.ask(h.GET_VRING_BASE, h.state(TX, 0))
        for _ in range(3):
            device.config_changed()
        let_it_look(raw)
        assert silent(ours)
        raw.start_ring(TX)
        assert news_on(ours) == CONFIG_CHANGE
        let_it_look(raw)
        assert silent(ours), "once is enough"


def test_suspended_device_answers(path: Path, no_leaks: None) -> None:
    """Everything that needs no running ring, and writes to no memory meanwhile."""
    with h.served(vhost.devices.Rng(), path), guest_on(path) as (raw, guest):
        raw.start()
        guest.offer()
        guest.kick()
        guest.wait_used(1)
        assert raw.ask(h.GET_VRING_BASE, h.state(0, 0)).payload == h.state(0, 1)
        guest.offer()
        before = guest.map[:]
        guest.kick()
        assert raw.status(h.SET_VRING_ENABLE, h.state(0, 0)) == 0
        assert raw.status(h.SET_VRING_ENABLE, h.state(0, 1)) == 0
        assert raw.share_memory() == 0
        assert raw.ask(h.GET_VRING_BASE, h.state(0, 0)).payload == h.state(0, 1)
        assert guest.map[:] == before
        assert not select.select([raw.err], [], [], 0)[0]


# -- resets ------------------------------------------------------------------------------------------


def test_reset_device_keeps_the_way_to_the_driver(path: Path, no_leaks: None) -> None:
    """QEMU gives `call` and `err` when it connects; they are no state of the device."""
    with h.served(vhost.devices.Rng(), path), guest_on(path) as (raw, guest):
        raw.start()
        assert raw.status(h.RESET_DEVICE) == 0
        assert raw.status(h.SET_VRING_NUM, h.state(0, h.NUM)) == 0
        assert raw.status(h.SET_VRING_ADDR, h.address(0)) == 0
        assert raw.status(h.SET_VRING_KICK, h.u64(0), [raw.kick]) == 0
        guest.offer()
        guest.kick()
        let_it_look(raw)
        assert guest.used == 0, "and disabled all rings"
        assert raw.status(h.SET_VRING_ENABLE, h.state(0, 1)) == 0
        guest.wait_used(1)
        guest.offer(addr=0xDEAD0000)
        guest.kick()
        assert select.select([raw.err], [], [], 20)[0]


@pytest.mark.parametrize("how", ["status", "reset_device"])
def test_features_are_negotiated_again_after_a_reset(path: Path, no_leaks: None, how: str) -> None:
    """Packed, then split, then packed: the rings of one say nothing about those of the next."""
    with h.served(vhost.devices.Rng(), path), vhost.Frontend.connect(path) as frontend:
        for packed in (True, False, True):
            rng = vhost.drivers.Rng(frontend, packed=packed)
            assert rng.packed is packed
            assert len(rng.read(64)) == 64
            if how == "status":
                frontend.set_status(0)
            else:
                frontend.reset_device()
            rng.close()


class Stateful(vhost.devices.Rng):
    """Counts its resets."""

    def __init__(self) -> None:
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1


def test_pause_of_the_machine_is_no_reset(path: Path, no_leaks: None) -> None:
    """QEMU sets the status to 0 whenever it stops the device, as for a pause or a migration, and adds
    RESET_DEVICE, if that was negotiated, when the driver did reset it."""
    device = Stateful()
    with h.served(device, path), guest_on(path) as (raw, guest):
        raw.start()
        assert raw.status(h.SET_STATUS, h.u64(15)) == 0
        guest.offer()
        guest.kick()
        guest.wait_used(1)
        base = raw.ask(h.GET_VRING_BASE, h.state(0, 0)).payload
        assert raw.status(h.SET_STATUS, h.u64(0)) == 0
        assert raw.ask(h.GET_STATUS).u64 == 0
        assert device.resets == 0
        raw.set_ring()
        assert raw.status(h.SET_VRING_BASE, base) == 0
        assert raw.status(h.SET_VRING_KICK, h.u64(0), [raw.kick]) == 0
        assert raw.status(h.SET_STATUS, h.u64(15)) == 0
        guest.offer()
        guest.kick()
        guest.wait_used(2)
        assert raw.status(h.RESET_DEVICE) == 0
        assert device.resets == 1


def test_status_resets_where_nothing_else_can(path: Path, no_leaks: None) -> None:
    device = Stateful()
    with h.served(device, path):
        for features, resets in ((vhost.ProtocolF.STATUS, 1), (~0, 2)):
            with vhost.Frontend.connect(path, protocol_features=int(features)) as frontend:
                frontend.set_status(15)
                frontend.set_status(0)
                assert frontend.get_status() == 0
                assert device.resets == resets


# -- configuration space -----------------------------------------------------------------------------


def config(offset: int, size: int, flags: int = 0) -> bytes:
    return struct.pack("=III", offset, size, flags) + bytes(size)


def test_sizes_of_the_configuration_space(path: Path, no_leaks: None) -> None:
    """Longer than ours is answered in the length asked for; beyond the end is an error, which is an answer
    of no bytes."""
    device = Sink()
    device.config_space = bytes(range(200))
    with h.served(device, path), contextlib.closing(h.RawFrontend(path)) as raw:
        raw.negotiate()

        def ask(offset: int, size: int) -> bytes:
            head, data = (reply := raw.ask(h.GET_CONFIG, config(offset, size)).payload)[:12], reply[12:]
            assert struct.unpack("=III", head)[1] == len(data)
            return data

        assert ask(0, 0) == b""
        assert ask(0, 257) == device.config_space + bytes(57)
        assert ask(0, 4096) == device.config_space + bytes(3896)
        assert ask(199, 4) == bytes((199, 0, 0, 0))
        for beyond in (200, 4096, 0xFFFFFFFF):
            assert ask(beyond, 1) == b""
            assert raw.status(h.SET_CONFIG, config(beyond, 1)) != 0
        for size in (0, 257, 4096):
            assert raw.status(h.SET_CONFIG, config(0, size)) != 0, "it is read-only, or too long"
        assert raw.status(h.SET_CONFIG, config(0, 200, 1)) == 0, "for live migration"
        assert raw.status(h.SET_CONFIG, config(0, 200, 2)) != 0, "flags that nobody knows"


@pytest.mark.parametrize("number", [h.GET_CONFIG, h.SET_CONFIG])
def test_a_configuration_space_too_long_for_any_message(path: Path, no_leaks: None, number: int) -> None:
    with h.served(Sink(), path), contextlib.closing(h.RawFrontend(path)) as raw:
        raw.negotiate()
        raw.send(number, config(0, 4097), flags=h.VERSION | h.NEED_REPLY)
        assert raw.ended()


def test_frontend_and_sizes_of_the_configuration_space(path: Path, no_leaks: None) -> None:
    device = Sink()
    device.config_space = bytes(range(200))
    with h.served(device, path), vhost.Frontend.connect(path) as frontend:
        assert frontend.get_config(0, 0) == b""
        assert frontend.get_config(0, 257) == device.config_space + bytes(57)
        assert frontend.get_config(100, 4) == bytes(range(100, 104))
        with pytest.raises(InvalidMessage, match="GET_CONFIG: no 4 bytes of configuration at 200"):
            frontend.get_config(200, 4)
        for call in (lambda: frontend.get_config(0, 4097), lambda: frontend.set_config(0, bytes(4097))):
            with pytest.raises(ValueError, match=r"4097.*limit 4096"):
                call()
        with pytest.raises(RequestFailed, match="SET_CONFIG"):
            frontend.set_config(200, b"x")
        assert frontend.get_config(0, 200) == device.config_space
