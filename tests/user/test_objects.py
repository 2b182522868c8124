# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What back-ends share with their front-end: shared memory regions, objects, doorbells; and what they may
not."""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vhost
from user import hostile as h
from user.hostile import RawChannel, RawFrontend
from user.test_frontend import RawBackend, RawRequests, backend
from user.test_lifecycle import Guest
from vhost.errors import InactiveFeature, InvalidMessage, InvalidState, ProtocolError
from vhost.features import ProtocolF
from vhost.user.shared_objects import MAX_PER_OWNER, SharedObjects

PAGE = mmap.PAGESIZE
SIZES = (4 * PAGE, 0, 16 * PAGE)
HOST_NOTIFIER, ADD, REMOVE, LOOKUP, MAP, UNMAP = 3, 6, 7, 8, 9, 10
GET_SHARED_OBJECT, GET_SHMEM_CONFIG = 41, 44
ID = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")
OTHER = uuid.UUID(int=7)


class Asker(vhost.Device):
    """Does in its session's thread what it is told to, once for each kick, and keeps what it hears."""

    device_id = vhost.DeviceId.RNG
    queues = ("work",)
    shmem_sizes = SIZES
    shares_objects = True
    has_host_notifiers = True

    def __init__(self) -> None:
        self.todo: list[Callable[[], None]] = []
        self.heard: list[Any] = []
        self.objects: dict[uuid.UUID, int] = {}

    def work(self, queue: vhost.DeviceQueue) -> None:
        for chain in queue:
            try:
                self.todo.pop(0)()
            except ProtocolError as error:
                self.heard.append(error)
            queue.push(chain, 1)

    def get_shared_object(self, uuid: uuid.UUID) -> int | None:
        return self.objects.get(uuid)


class Peer:
    """A device, and a front-end with its driver."""

    def __init__(self, device: Asker, frontend: vhost.Frontend) -> None:
        self.device, self.frontend = device, frontend
        self.rng = vhost.drivers.Rng(frontend)

    def run(self, action: Callable[[], None], *others: vhost.Frontend) -> Any:
        """What the device hears of its request, while this front-end and others are served."""
        self.device.todo.append(action)
        (queue,) = self.rng.queues
        queue.add((), [(self.rng.data_addr, 1)], None)
        queue.kick()
        until = time.monotonic() + 20
        while not self.device.heard:
            assert time.monotonic() < until
            select.select([self.frontend, *others], [], [], 0.05)
            for frontend in (self.frontend, *others):
                assert frontend.step()
        assert queue.wait(20)
        queue.get_used_batch()
        (heard,) = self.device.heard
        self.device.heard.clear()
        return heard

    def close(self) -> None:
        self.rng.close()


@contextlib.contextmanager
def peer_on(path: Path, *, without: int = 0, shared: SharedObjects | None = None) -> Iterator[Peer]:
    device = Asker()
    with h.served(device, path, without=without), vhost.Frontend.connect(path) as frontend:
        if shared is not None:
            frontend.shared_objects = shared
        with contextlib.closing(Peer(device, frontend)) as peer:
            yield peer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@contextlib.contextmanager
def memfd(data: bytes = b"") -> Iterator[int]:
    fd = os.memfd_create("object")
    os.write(fd, data)
    try:
        yield fd
    finally:
        os.close(fd)


# -- shared memory regions ---------------------------------------------------------------------------


def test_device_maps_and_unmaps(path: Path, no_leaks: None) -> None:
    with peer_on(path) as peer, memfd(bytes(PAGE) + b"hello".ljust(PAGE, b"!")) as fd:
        device, frontend = peer.device, peer.frontend
        then = device.heard.append
        assert frontend.shmem == {}
        assert peer.run(lambda: device.shmem_map(0, 0, PAGE, fd, then=then)) is False, "nobody asked yet"
        assert frontend.get_shmem_config() == SIZES == frontend.get_shmem_config()
        assert {shmid: region.size for shmid, region in frontend.shmem.items()} == {0: SIZES[0], 2: SIZES[2]}
        assert peer.run(lambda: device.shmem_map(2, PAGE, PAGE, fd, PAGE, writable=True, then=then)) is True
        region = frontend.shmem[2]
        assert region.read(PAGE, 5) == b"hello"
        region.write(PAGE, b"HELLO")
        assert os.pread(fd, 5, PAGE) == b"HELLO"
        assert peer.run(lambda: device.shmem_map(2, PAGE, PAGE, fd, then=then)) is False, "not over another"
        assert peer.run(lambda: device.shmem_map(2, 0, 2 * PAGE, fd, then=then)) is False
        assert peer.run(lambda: device.shmem_map(1, 0, PAGE, fd, then=then)) is False, "region of size 0"
        assert peer.run(lambda: device.shmem_map(255, 0, PAGE, fd, then=then)) is False
        assert peer.run(lambda: device.shmem_map(0, 0, PAGE, fd, then=then)) is True
        assert peer.run(lambda: device.shmem_unmap(2, 0, 2 * PAGE, then=then)) is False
        assert peer.run(lambda: device.shmem_unmap(2, PAGE, PAGE, then=then)) is True
        assert region.mappings == ()
        assert frontend.shmem[0].mappings == ((0, PAGE, False),)
        frontend.set_status(0)
        assert frontend.shmem[0].mappings == (), "gone with the reset"


def test_what_was_not_negotiated_is_not_asked(path: Path, no_leaks: None) -> None:
    fds = ProtocolF.BACKEND_SEND_FD
    with peer_on(path, without=int(fds | ProtocolF.SHARED_OBJECT)) as peer, memfd(bytes(PAGE)) as fd:
        device = peer.device
        then = device.heard.append
        assert isinstance(peer.run(lambda: device.shmem_map(0, 0, PAGE, fd, then=then)), InactiveFeature)
        assert isinstance(peer.run(lambda: device.share_object(ID, then=then)), InactiveFeature)
        assert isinstance(peer.run(lambda: device.offer_host_notifier(0, fd, 0, PAGE)), InactiveFeature)
        with pytest.raises(InactiveFeature):
            peer.frontend.get_shared_object(ID)


def test_a_suspended_device_is_silent() -> None:
    with pytest.raises(InvalidState, match="no vhost-user session runs the rings"):
        Asker().share_object(ID)


def test_devices_without_are_not_asked(path: Path, no_leaks: None) -> None:
    shared = ProtocolF.SHMEM_MAP | ProtocolF.SHARED_OBJECT | ProtocolF.HOST_NOTIFIER
    with h.served(vhost.devices.Rng(), path), contextlib.closing(RawFrontend(path)) as raw:
        offered = raw.ask(h.GET_PROTOCOL_FEATURES).u64
        assert not offered & (shared | ProtocolF.BACKEND_SEND_FD)
        raw.send(h.SET_PROTOCOL_FEATURES, h.u64(offered))
        assert raw.status(h.SET_OWNER) == 0
        raw.send(GET_SHMEM_CONFIG)
        assert raw.reply().payload == bytes(8 + 256 * 8), "no regions"


def mapping(shmid: int, fd_offset: int, shm_offset: int, size: int, flags: int = 0) -> bytes:
    return struct.pack("=B7xQQQQ", shmid, fd_offset, shm_offset, size, flags)


SHMEM = ProtocolF.SHMEM_MAP | ProtocolF.BACKEND_SEND_FD
CHANNEL = ProtocolF.REPLY_ACK | ProtocolF.BACKEND_REQ


@contextlib.contextmanager
def asking(
    protocol: ProtocolF, script: Callable[[RawBackend, RawRequests], None]
) -> Iterator[vhost.Frontend]:
    """A front-end whose back-end does as the script says."""

    def run(raw: RawBackend) -> None:
        raw.handshake(h.VERSION_1 | h.PROTOCOL_FEATURES, int(CHANNEL | protocol))
        with contextlib.closing(raw.channel()) as channel:
            script(raw, channel)

    with backend(run) as sock, vhost.Frontend(sock) as frontend:
        yield frontend


def test_maps_of_a_hostile_back_end(no_leaks: None) -> None:
    def script(raw: RawBackend, channel: RawRequests) -> None:
        raw.expect(GET_SHMEM_CONFIG, b"")
        raw.reply(GET_SHMEM_CONFIG, struct.pack("=I4x256Q", 1, 8 * PAGE, *[0] * 255))
        got, _, _ = raw.receive()
        with memfd(bytes(4 * PAGE)) as fd:
            for refused in (
                mapping(1, 0, 0, PAGE),
                mapping(0, 0, 0, PAGE, 2),
                mapping(0, 0, 0, PAGE, 1 << 63),
                mapping(0, 0, 0, 0),
                mapping(0, 0, 1, PAGE),
                mapping(0, 0, 8 * PAGE, PAGE),
                mapping(0, 0, (1 << 64) - PAGE, 2 * PAGE),
                mapping(0, 0, PAGE, (1 << 64) - PAGE),
                mapping(0, 4 * PAGE, 0, PAGE),
                mapping(0, (1 << 64) - PAGE, 0, PAGE),
            ):
                assert channel.ask(MAP, refused, [fd]) != 0
            assert channel.ask(MAP, mapping(0, 0, 0, PAGE)) != 0, "no descriptor"
            assert channel.ask(MAP, mapping(0, 0, 0, PAGE), [fd, fd]) != 0
            assert channel.ask(UNMAP, mapping(0, 0, 0, PAGE), [fd]) != 0
            assert channel.ask(UNMAP, mapping(0, 0, 0, PAGE)) != 0
            assert channel.ask(MAP, mapping(0, 0, PAGE, 2 * PAGE), [fd]) == 0
            assert channel.ask(MAP, mapping(0, 0, 0, 2 * PAGE), [fd]) != 0
            with open(f"/proc/self/fd/{fd}", "rb") as read_only:
                assert channel.ask(MAP, mapping(0, 0, 4 * PAGE, PAGE, 1), [read_only.fileno()]) != 0
                assert channel.ask(MAP, mapping(0, 0, 4 * PAGE, PAGE), [read_only.fileno()]) == 0
        raw.reply(got, h.u64(0))

    with asking(SHMEM, script) as frontend:
        assert frontend.get_shmem_config() == (8 * PAGE,)
        frontend.set_vring_num(0, 8)
        assert frontend.shmem[0].mappings == ((PAGE, 2 * PAGE, False), (4 * PAGE, PAGE, False))


@pytest.mark.parametrize(
    ("sizes", "count"),
    [((PAGE + 1,), 1), ((1 << 62,), 1), ((1 << 39, 1 << 39, PAGE), 3), ((PAGE,), 2), ((0, PAGE), 2)],
)
def test_sizes_of_a_hostile_back_end(sizes: tuple[int, ...], count: int, no_leaks: None) -> None:
    def script(raw: RawBackend, channel: RawRequests) -> None:
        raw.expect(GET_SHMEM_CONFIG, b"")
        raw.reply(GET_SHMEM_CONFIG, struct.pack("=I4x256Q", count, *sizes, *[0] * (256 - len(sizes))))

    with asking(SHMEM, script) as frontend:
        with pytest.raises(InvalidMessage, match=r"sizes|num regions"):
            frontend.get_shmem_config()
        assert frontend.shmem == {}


def test_sizes_may_not_change(no_leaks: None) -> None:
    def script(raw: RawBackend, channel: RawRequests) -> None:
        for size in (PAGE, 2 * PAGE):
            raw.expect(GET_SHMEM_CONFIG, b"")
            raw.reply(GET_SHMEM_CONFIG, struct.pack("=I4x256Q", 1, size, *[0] * 255))

    with asking(SHMEM, script) as frontend:
        frontend.get_shmem_config()
        with pytest.raises(InvalidMessage, match="not those of before"):
            frontend.get_shmem_config()


# -- shared objects ----------------------------------------------------------------------------------


def test_one_back_end_finds_what_another_exports(tmp_path: Path, no_leaks: None) -> None:
    table = SharedObjects()
    with (
        peer_on(tmp_path / "a", shared=table) as one,
        peer_on(tmp_path / "b", shared=table) as two,
        memfd(b"pixels") as fd,
    ):
        exporter, finder = one.device, two.device
        assert two.run(lambda: finder.lookup_object(ID, finder.heard.append)) is None
        exporter.objects[ID] = fd
        assert one.run(lambda: exporter.share_object(ID, then=exporter.heard.append)) is True
        assert ID in table
        found = two.run(lambda: finder.lookup_object(ID, finder.heard.append), one.frontend)
        assert os.pread(found, 6, 0) == b"pixels"
        os.close(found)
        fetched = one.frontend.get_shared_object(ID)
        assert fetched is not None
        assert os.pread(fetched, 6, 0) == b"pixels"
        os.close(fetched)
        assert one.frontend.get_shared_object(OTHER) is None
        # Who does not own it can neither take it over nor away.
        assert two.run(lambda: finder.share_object(ID, then=finder.heard.append)) is False
        assert two.run(lambda: finder.unshare_object(ID, then=finder.heard.append)) is False
        assert two.run(lambda: finder.unshare_object(OTHER, then=finder.heard.append)) is False
        assert ID in table
        del exporter.objects[ID]
        assert two.run(lambda: finder.lookup_object(ID, finder.heard.append)) is None, "the owner lost it"
        assert one.run(lambda: exporter.unshare_object(ID, then=exporter.heard.append)) is True
        assert len(table) == 0
        assert one.run(lambda: exporter.share_object(OTHER, then=exporter.heard.append)) is True
    assert len(table) == 0, "nothing outlives its owner"


def test_table_that_is_given_later(path: Path, no_leaks: None) -> None:
    with peer_on(path) as peer:
        device = peer.device
        assert peer.run(lambda: device.share_object(ID, then=device.heard.append)) is True
        table = SharedObjects()
        peer.frontend.shared_objects = table
        assert table.owner(ID) is peer.frontend


def test_lookup_in_the_middle_of_a_request(no_leaks: None) -> None:
    """Of what this back-end itself exports: the front-end cannot ask now, and says so at once. Waiting
    would be for ever, were the back-end to wait, too."""
    idle = threading.Event()

    def script(raw: RawBackend, channel: RawRequests) -> None:
        got, _, _ = raw.receive()
        assert channel.ask(ADD, ID.bytes) == 0
        assert channel.ask(ADD, ID.bytes) != 0
        channel.send(LOOKUP, ID.bytes)
        assert channel.answer(LOOKUP) == (1, [])
        channel.send(LOOKUP, OTHER.bytes)
        assert channel.answer(LOOKUP) == (1, [])
        raw.reply(got, h.u64(0))
        assert idle.wait(20)
        # Between requests it is asked like any other; what it answers with is a descriptor or none.
        channel.send(LOOKUP, ID.bytes)
        raw.expect(GET_SHARED_OBJECT, ID.bytes)
        raw.reply(GET_SHARED_OBJECT, b"")
        assert channel.answer(LOOKUP) == (1, [])

    with asking(ProtocolF.SHARED_OBJECT, script) as frontend:
        frontend.set_vring_num(0, 8)
        idle.set()
        until = time.monotonic() + 20
        while frontend.step():
            assert time.monotonic() < until
            select.select([frontend], [], [], 0.05)


def test_back_end_that_exports_without_end(no_leaks: None) -> None:
    def script(raw: RawBackend, channel: RawRequests) -> None:
        got, _, _ = raw.receive()
        statuses = [channel.ask(ADD, uuid.UUID(int=i).bytes) for i in range(MAX_PER_OWNER + 2)]
        assert statuses == [0] * MAX_PER_OWNER + [1, 1]
        raw.reply(got, h.u64(0))

    with asking(ProtocolF.SHARED_OBJECT, script) as frontend:
        frontend.set_vring_num(0, 8)
        assert len(frontend.shared_objects) == MAX_PER_OWNER


def test_object_without_a_uuid(path: Path, no_leaks: None) -> None:
    """QEMU sends the request without counting it: there is nothing to look for."""
    with h.served(Asker(), path), contextlib.closing(RawFrontend(path)) as raw:
        raw.negotiate()
        assert raw.ask(GET_SHARED_OBJECT).payload == b""
        assert raw.ask(GET_SHARED_OBJECT, ID.bytes).payload == b""


# -- doorbells ---------------------------------------------------------------------------------------


def area(index: int, size: int, offset: int) -> bytes:
    return struct.pack("=QQQ", index, size, offset)


def test_doorbell(path: Path, no_leaks: None) -> None:
    with peer_on(path) as peer, memfd(bytes(2 * PAGE)) as fd:
        device, frontend = peer.device, peer.frontend
        then = device.heard.append
        assert peer.run(lambda: device.offer_host_notifier(0, fd, PAGE, PAGE, then=then)) is True
        page = frontend.host_notifiers[0]
        page[0:2] = b"\1\0"
        assert os.pread(fd, 2, PAGE) == b"\1\0", "the device sees the kick"
        del page
        assert peer.run(lambda: device.offer_host_notifier(0, fd, 0, PAGE, then=then)) is True, "another one"
        assert frontend.host_notifiers[0][0:2] == b"\0\0"
        assert peer.run(lambda: device.withdraw_host_notifier(0, then=then)) is True
        assert frontend.host_notifiers == {}
        assert peer.run(lambda: device.offer_host_notifier(0, fd, 0, PAGE, then=then)) is True
        known = frontend.host_notifiers
        assert peer.run(lambda: device.offer_host_notifier(0, fd, 2 * PAGE, PAGE, then=then)) is False
        assert frontend.host_notifiers == known, "what is refused changes nothing"
        del known
        frontend.get_vring_base(0)
        assert frontend.host_notifiers == {}, "it was for the ring that has stopped"


def test_doorbells_of_a_hostile_back_end(no_leaks: None) -> None:
    def script(raw: RawBackend, channel: RawRequests) -> None:
        raw.grant(h.SET_VRING_NUM)
        got, _, _ = raw.receive()
        with memfd(bytes(PAGE)) as fd:
            for refused in (
                area(1, PAGE, 0),
                area(0, 2 * PAGE, 0),
                area(0, PAGE - 1, 0),
                area(0, 0, 0),
                area(0, PAGE, 1),
                area(0, PAGE, PAGE),  # past the end of the file
                area(0, PAGE, 1 << 63),
                area(1 << 9, PAGE, 0),
                area(h.NOFD, PAGE, 0),  # and yet there is one
            ):
                assert channel.ask(HOST_NOTIFIER, refused, [fd]) != 0
            assert channel.ask(HOST_NOTIFIER, area(0, PAGE, 0)) != 0
            assert channel.ask(HOST_NOTIFIER, area(h.NOFD | 3, 0, 0)) != 0
            for other in (*os.pipe(), os.eventfd(0)):
                assert channel.ask(HOST_NOTIFIER, area(0, PAGE, 0), [other]) != 0
                os.close(other)
            assert channel.ask(HOST_NOTIFIER, area(0, PAGE, 0), [fd]) == 0
            assert channel.ask(HOST_NOTIFIER, area(h.NOFD, 0, 0)) == 0
            assert channel.ask(HOST_NOTIFIER, area(h.NOFD, 0, 0)) == 0, "none to remove is fine"
        raw.reply(got, h.u64(0))

    with asking(ProtocolF.HOST_NOTIFIER | ProtocolF.BACKEND_SEND_FD, script) as frontend:
        frontend.set_vring_num(0, 8)
        frontend.set_vring_num(0, 8)
        assert frontend.host_notifiers == {}


def test_descriptors_that_were_not_agreed_on(no_leaks: None) -> None:
    def script(raw: RawBackend, channel: RawRequests) -> None:
        raw.grant(h.SET_VRING_NUM)
        got, _, _ = raw.receive()
        with memfd(bytes(PAGE)) as fd:
            assert channel.ask(HOST_NOTIFIER, area(0, PAGE, 0), [fd]) != 0
        raw.reply(got, h.u64(0))

    with asking(ProtocolF.HOST_NOTIFIER, script) as frontend:
        frontend.set_vring_num(0, 8)
        frontend.set_vring_num(0, 8)
        assert frontend.host_notifiers == {}


# -- a front-end that answers what it likes ----------------------------------------------------------


def test_answers_of_a_hostile_front_end(path: Path, no_leaks: None) -> None:
    """A refusal with a descriptor, success without one: neither is an object."""
    device = Asker()
    with h.served(device, path), contextlib.closing(RawFrontend(path)) as raw:
        raw.negotiate()
        with (
            contextlib.closing(RawChannel(raw)) as channel,
            contextlib.closing(Guest(raw)) as guest,
            memfd(b"x") as fd,
        ):
            assert raw.share_memory() == 0
            raw.start_ring()
            for status, fds in ((1, [fd]), (0, []), (0, [fd])):
                device.todo.append(lambda: device.lookup_object(ID, device.heard.append))
                guest.offer()
                guest.kick()
                assert channel.receive() == (LOOKUP, h.VERSION, ID.bytes, [])
                channel.answer(LOOKUP, h.u64(status), fds)
                for _ in range(2):
                    raw.ask(h.GET_FEATURES)
            assert device.heard[:2] == [None, None]
            os.close(device.heard[2])


def test_a_table_that_has_one_of_the_objects_already_is_left_as_it_is(path: Path) -> None:
    with peer_on(path) as peer:
        first, second = uuid.uuid4(), uuid.uuid4()
        frontend, other = peer.frontend, SharedObjects()
        old = frontend.shared_objects
        for object in (first, second):
            old.add(object, frontend)
        other.add(second, owner := Owner())
        with pytest.raises(InvalidState, match=f"object {second} is exported already"):
            frontend.shared_objects = other
        assert frontend.shared_objects is old
        assert (other.of(frontend), other.owner(second)) == ([], owner)
        frontend.shared_objects = old
        assert old.of(frontend) == [first, second]


class Owner:
    def get_shared_object(self, uuid: uuid.UUID) -> int | None:
        return None
