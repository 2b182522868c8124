# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Kicks, calls and errors as messages, both sides; and both sides waiting for each other's answer."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import vhost
from user import hostile as h
from user.hostile import RawChannel, RawFrontend
from user.test_frontend import RawBackend, backend
from user.test_lifecycle import Guest
from vhost.features import ProtocolF
from vhost.user.frontend_base import WANTED

INBAND = WANTED | ProtocolF.INBAND_NOTIFICATIONS
VRING_KICK, VRING_CALL, VRING_ERR = 35, 4, 5


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@contextlib.contextmanager
def raw_on(path: Path, device: vhost.Device | None = None) -> Iterator[tuple[RawFrontend, Guest, RawChannel]]:
    """A front-end that negotiated everything, and set up ring 0 but for its eventfds."""
    with (
        h.served(device or vhost.devices.Rng(), path),
        contextlib.closing(RawFrontend(path)) as raw,
        contextlib.closing(Guest(raw)) as guest,
    ):
        raw.negotiate()
        with contextlib.closing(RawChannel(raw)) as channel:
            assert raw.share_memory() == 0
            assert raw.status(h.SET_VRING_NUM, h.state(0, h.NUM)) == 0
            assert raw.status(h.SET_VRING_ADDR, h.address(0)) == 0
            assert raw.status(h.SET_VRING_ENABLE, h.state(0, 1)) == 0
            yield raw, guest, channel


def expect(channel: RawChannel, number: int, index: int = 0) -> None:
    """The request, which asks for an answer."""
    assert channel.receive() == (number, h.VERSION | h.NEED_REPLY, h.state(index, 0), [])


def test_ring_without_any_eventfd(path: Path, no_leaks: None) -> None:
    with raw_on(path) as (raw, guest, channel):
        for count in range(1, 4):
            guest.offer()
            assert raw.status(VRING_KICK, h.state(0, 0)) == 0
            assert guest.used == count, "the answer comes when the kick was processed"
            expect(channel, VRING_CALL)
            channel.answer(VRING_CALL)
        # It stops as ever, and a kick starts it again.
        assert raw.ask(h.GET_VRING_BASE, h.state(0, 0)).payload == h.state(0, 3)
        guest.offer()
        assert raw.ask(h.GET_FEATURES)
        assert guest.used == 3
        assert raw.status(VRING_KICK, h.state(0, 0)) == 0
        assert guest.used == 4


def test_suspended_device_sends_nothing(path: Path, no_leaks: None) -> None:
    """What there is to call for is said before the answer that suspends it, also if the call before was not
    answered yet; nothing comes after it."""
    with raw_on(path) as (raw, guest, channel):
        guest.offer()
        assert raw.status(VRING_KICK, h.state(0, 0)) == 0
        expect(channel, VRING_CALL)
        guest.offer()
        assert raw.status(VRING_KICK, h.state(0, 0)) == 0
        assert raw.ask(h.GET_VRING_BASE, h.state(0, 0)).payload == h.state(0, 2)
        channel.sock.setblocking(False)
        expect(channel, VRING_CALL)
        channel.answer(VRING_CALL)
        channel.answer(VRING_CALL)
        assert channel.silent(raw)


def test_both_wait_for_each_other(path: Path, no_leaks: None) -> None:
    """We want an answer to our call, and have to answer before we get one; and no call is repeated until
    then, however much is used."""
    with raw_on(path) as (raw, guest, channel):
        for count in range(1, 200):
            guest.offer()
            assert raw.status(VRING_KICK, h.state(0, 0)) == 0
            assert guest.used == count
        expect(channel, VRING_CALL)
        assert channel.silent(raw)
        channel.answer(VRING_CALL)
        expect(channel, VRING_CALL)
        channel.answer(VRING_CALL, h.u64(1))  # refused: complained of, and nothing else
        guest.offer()
        assert raw.status(VRING_KICK, h.state(0, 0)) == 0
        expect(channel, VRING_CALL)


def test_channel_that_comes_late(path: Path, no_leaks: None) -> None:
    """What there was to say is said then."""
    with raw_on(path) as (raw, guest, old):
        guest.offer()
        assert raw.status(VRING_KICK, h.state(0, 0)) == 0
        expect(old, VRING_CALL)
        guest.offer()
        assert raw.status(VRING_KICK, h.state(0, 0)) == 0
        with contextlib.closing(RawChannel(raw)) as channel:
            expect(channel, VRING_CALL)


def test_no_descriptor_is_polling(path: Path, no_leaks: None) -> None:
    """As the specification has it, also where messages could be used."""
    with raw_on(path) as (raw, guest, channel):
        assert raw.status(h.SET_VRING_CALL, h.u64(h.NOFD)) == 0
        guest.offer()
        assert raw.status(VRING_KICK, h.state(0, 0)) == 0
        assert guest.used == 1
        assert channel.silent(raw)


def test_eventfds_are_preferred(path: Path, no_leaks: None) -> None:
    with raw_on(path) as (raw, guest, channel):
        assert raw.status(h.SET_VRING_CALL, h.u64(0), [raw.call]) == 0
        assert raw.status(h.SET_VRING_KICK, h.u64(0), [raw.kick]) == 0
        guest.offer()
        guest.kick()
        guest.wait_used(1)
        guest.offer()
        assert raw.status(VRING_KICK, h.state(0, 0)) == 0, "a message does as well"
        assert guest.used == 2
        assert channel.silent(raw)
        # Given later, it replaces the messages of a ring that runs.
        assert raw.status(h.RESET_DEVICE) == 0


def test_reset_brings_the_messages_back(path: Path, no_leaks: None) -> None:
    with raw_on(path) as (raw, guest, channel):
        assert raw.status(h.SET_VRING_CALL, h.u64(h.NOFD)) == 0
        assert raw.status(h.RESET_DEVICE) == 0
        assert raw.status(h.SET_VRING_NUM, h.state(0, h.NUM)) == 0
        assert raw.status(h.SET_VRING_ADDR, h.address(0)) == 0
        assert raw.status(h.SET_VRING_ENABLE, h.state(0, 1)) == 0
        guest.offer()
        assert raw.status(VRING_KICK, h.state(0, 0)) == 0
        expect(channel, VRING_CALL)


def test_broken_ring(path: Path, no_leaks: None) -> None:
    with raw_on(path) as (raw, guest, channel):
        guest.offer(addr=0x42)
        raw.status(VRING_KICK, h.state(0, 0))
        # Who starts a ring calls once in any case: a predecessor may have owed that.
        requests = sorted(channel.receive()[:3] for _ in range(2))
        assert requests == [(n, h.VERSION | h.NEED_REPLY, h.state(0, 0)) for n in (VRING_CALL, VRING_ERR)]
        assert raw.status(VRING_KICK, h.state(0, 0)) == 0, "broken for good, and nothing else"
        assert channel.silent(raw)


def test_kicks_that_are_refused(path: Path, no_leaks: None) -> None:
    with raw_on(path) as (raw, guest, _channel):
        assert raw.status(VRING_KICK, h.state(0, 1)) != 0, "num is reserved"
        assert raw.status(VRING_KICK, h.state(1, 0)) != 0, "there is no ring 1"
        assert raw.status(VRING_KICK, h.state(1 << 31, 0)) != 0
        guest.offer()
        assert raw.status(VRING_KICK, h.state(0, 0)) == 0
        assert guest.used == 1


def test_kick_before_anything_is_known_of_the_ring(path: Path, no_leaks: None) -> None:
    with h.served(vhost.devices.Rng(), path), contextlib.closing(RawFrontend(path)) as raw:
        raw.negotiate()
        for _ in range(3):
            assert raw.status(VRING_KICK, h.state(0, 0)) == 0
        with contextlib.closing(Guest(raw)) as guest:
            guest.offer()
            assert raw.share_memory() == 0
            raw.set_ring()
            assert raw.status(h.SET_VRING_ENABLE, h.state(0, 1)) == 0
            guest.wait_used(1)


def test_kick_that_would_make_us_wait(path: Path, tmp_path: Path, no_leaks: None) -> None:
    """The front-end's eventfd blocks, and is full."""
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    device = vhost.devices.Blk(tmp_path / "disk.raw")
    with raw_on(path, device) as (raw, _guest, _channel):
        kick = os.eventfd(0)
        try:
            assert raw.status(h.SET_VRING_KICK, h.u64(0), [kick]) == 0
            for _ in range(3):
                os.eventfd_write(kick, 0xFFFFFFFFFFFFFFFE - _count(kick))
                assert raw.status(VRING_KICK, h.state(0, 0)) == 0
        finally:
            os.close(kick)
    device.close()


def _count(fd: int) -> int:
    """What is in an eventfd."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        if line.startswith("eventfd-count:"):
            return int(line.split()[1], 16)
    raise AssertionError("no eventfd")


@pytest.mark.parametrize("lacks", [ProtocolF.REPLY_ACK, ProtocolF.BACKEND_REQ])
@pytest.mark.parametrize("need_reply", [False, True])
def test_not_without_its_companions(path: Path, lacks: ProtocolF, need_reply: bool, no_leaks: None) -> None:
    """The specification wants the connection closed, for nothing else would be understood."""
    with h.served(vhost.devices.Rng(), path), contextlib.closing(RawFrontend(path)) as raw:
        offered = raw.ask(h.GET_PROTOCOL_FEATURES).u64
        assert offered & ProtocolF.INBAND_NOTIFICATIONS
        flags = h.VERSION | (h.NEED_REPLY if need_reply else 0)
        raw.send(h.SET_PROTOCOL_FEATURES, h.u64(offered & ~int(lacks)), flags=flags)
        assert raw.ended()
    with h.served(vhost.devices.Rng(), path, without=int(lacks)):
        with vhost.Frontend.connect(path, protocol_features=INBAND) as frontend:
            assert not frontend.offered_protocol_features & ProtocolF.INBAND_NOTIFICATIONS


def test_front_end_does_not_ask_for_half_of_it(no_leaks: None) -> None:
    def script(raw: RawBackend) -> None:
        raw.handshake(h.PROTOCOL_FEATURES, int(ProtocolF.INBAND_NOTIFICATIONS | ProtocolF.REPLY_ACK))

    with backend(script) as sock, vhost.Frontend(sock, protocol_features=INBAND) as frontend:
        assert frontend.protocol_features == ProtocolF.REPLY_ACK


def wait(frontend: vhost.Frontend, until: float) -> None:
    select.select([frontend], [], [], until - time.monotonic())
    assert frontend.step()
    assert time.monotonic() < until


def test_driver_over_messages(path: Path, no_leaks: None) -> None:
    """It uses eventfds and knows nothing; the loop of whoever owns the front-end does."""
    with h.served(vhost.devices.Rng(), path):
        with vhost.Frontend.connect(path, protocol_features=INBAND) as frontend:
            assert frontend.protocol_features & ProtocolF.INBAND_NOTIFICATIONS
            with vhost.drivers.Rng(frontend) as rng:
                (queue,) = rng.queues
                until = time.monotonic() + 20
                for _ in range(50):
                    queue.add((), [(rng.data_addr, 64)], None)
                    queue.kick()
                    while not queue.has_used():
                        wait(frontend, until)
                    assert queue.get_used() == (None, 64)
                    assert queue.get_used() is None  # and so the next one is called for
                    while not select.select([queue.call_fd], [], [], 0)[0]:  # the call may come after it
                        wait(frontend, until)
                    os.eventfd_read(queue.call_fd)


@pytest.mark.parametrize("packed", [False, True])
def test_engine_without_the_gil(path: Path, tmp_path: Path, packed: bool, no_leaks: None) -> None:
    """Its threads wait on a kick of ours and signal a call of ours."""
    image = tmp_path / "disk.raw"
    image.write_bytes(os.urandom(1 << 20))
    want = image.read_bytes()
    device = vhost.devices.Blk(image)
    with h.served(device, path):
        with vhost.Frontend.connect(path, protocol_features=INBAND) as frontend:
            with vhost.drivers.Blk(frontend, packed=packed) as disk:
                until = time.monotonic() + 20
                for _ in range(10):
                    for i in range(32):
                        disk.submit_read(i * 8, 8, i)
                    got = {done.token: done.data for done in disk.poll(0)}
                    while disk.in_flight:
                        wait(frontend, until)
                        got.update({done.token: done.data for done in disk.poll(0)})
                    assert got == {i: want[i * 4096 : (i + 1) * 4096] for i in range(32)}
    device.close()


def test_calls_without_a_driver(no_leaks: None) -> None:
    """Callbacks, for whoever kicks by hand; and a back-end that calls what is no ring."""

    def script(raw: RawBackend) -> None:
        protocol = ProtocolF.REPLY_ACK | ProtocolF.BACKEND_REQ | ProtocolF.INBAND_NOTIFICATIONS
        raw.handshake(h.VERSION_1 | h.PROTOCOL_FEATURES, int(protocol))
        with contextlib.closing(raw.channel()) as channel:
            assert channel.ask(VRING_CALL, h.state(1, 0)) != 0, "no ring was set up"
            raw.grant(h.SET_VRING_NUM)
            raw.expect(VRING_KICK, h.state(1, 0))
            assert channel.ask(VRING_CALL, h.state(1, 0)) == 0
            assert channel.ask(VRING_CALL, h.state(1, 0)) == 0
            assert channel.ask(VRING_ERR, h.state(1, 0)) == 0
            assert channel.ask(VRING_CALL, h.state(1, 7)) != 0, "num is reserved"
            assert channel.ask(VRING_CALL, h.state(0, 0)) != 0
            assert channel.ask(VRING_CALL, h.state(0xFFFFFFFF, 0)) != 0
            raw.reply(VRING_KICK, h.u64(0))

    heard: list[tuple[str, int]] = []
    with backend(script) as sock, vhost.Frontend(sock, protocol_features=INBAND) as frontend:
        frontend.on_vring_call = lambda index: heard.append(("call", index))
        frontend.on_vring_err = lambda index: heard.append(("err", index))
        frontend.set_vring_num(1, 8)
        assert not heard
        frontend.vring_kick(1)
        assert heard == [("call", 1), ("err", 1)], "told after the request, each once"
