# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A back-end behind an IOMMU: what it asks for, when it asks again, and what it does until it is answered."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

import vhost
from user import hostile as h
from user.iommu import (
    ACCESS_FAIL,
    ACCESS_PLATFORM,
    AVAIL,
    DATA,
    INVALIDATE,
    IOTLB_MSG,
    IOVA,
    MISS,
    PAGE,
    RING,
    RO,
    RW,
    UPDATE,
    USED,
    WO,
    Iommu,
    iommu_of,
)
from user.test_lifecycle import Hoarder
from vhost._iotlb import MAX_ENTRIES
from vhost.features import ProtocolF
from vhost.user import iotlb
from vhost.user.backend import Backend


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


class Filler(vhost.Device):
    """Writes to whatever it gets."""

    device_id = vhost.DeviceId.RNG
    queues = ("fill", "fill")

    def fill(self, queue: vhost.DeviceQueue) -> None:
        for chain in queue:
            queue.push(chain, chain.write(b"\x5a" * chain.writable_len))


@pytest.fixture
def iommu(path: Path, no_leaks: None) -> Iterator[Iommu]:
    with h.served(Filler(), path), iommu_of(path) as found:
        yield found


# -- a ring comes up -----------------------------------------------------------------------------------


def test_a_ring_starts_when_all_of_it_is_mapped(iommu: Iommu) -> None:
    iommu.start()
    assert [iommu.asked()[1:] for _ in RING] == list(RING)
    iommu.offer(DATA)
    for iova, access in RING:
        assert iommu.asks_nothing()
        assert iommu.update(iova, access=access) == 0
    assert iommu.serve_miss() == (MISS, DATA, WO)
    iommu.wait_used(1)
    assert iommu.map[DATA - IOVA : DATA - IOVA + 64] == b"\x5a" * 64


def test_mappings_in_advance_ask_for_nothing(iommu: Iommu) -> None:
    """A front-end is not expected to take the initiative, but may."""
    iommu.negotiate()
    assert iommu.share_memory() == 0
    assert iommu.update(IOVA, h.SIZE) == 0
    iommu.start_ring()
    iommu.offer(DATA)
    iommu.wait_used(1)
    assert iommu.asks_nothing()


def test_a_ring_that_never_came_up_says_where_it_would_go_on(iommu: Iommu) -> None:
    iommu.idx = 7
    iommu.start()
    assert iommu.ask(h.GET_VRING_BASE, h.state(0, 0)).payload == h.state(0, 7)


def test_a_ring_whose_areas_are_no_ring(iommu: Iommu) -> None:
    """Whoever maps it is not to blame; the driver is told by the error eventfd."""
    iommu.negotiate()
    assert iommu.share_memory() == 0
    assert iommu.status(h.SET_VRING_NUM, h.state(0, 3)) == 0
    assert iommu.status(h.SET_VRING_ADDR, h.address(0, IOVA, AVAIL, USED)) == 0
    assert iommu.status(h.SET_VRING_ERR, h.u64(0), [iommu.err]) == 0
    assert iommu.status(h.SET_VRING_KICK, h.u64(0), [iommu.kick]) == 0
    for _ in RING:
        iommu.serve_miss()
    iommu.wait_err()


# -- misses --------------------------------------------------------------------------------------------


def test_the_same_miss_is_asked_for_once(iommu: Iommu) -> None:
    iommu.started()
    iommu.offer(DATA)
    assert iommu.asked() == (MISS, DATA, WO)
    for _ in range(5):
        os.eventfd_write(iommu.kick, 1)
        assert iommu.update(DATA + 7 * PAGE) == 0  # of something else
        assert iommu.asks_nothing()
    # It says that there is no such mapping; a kick is a reason to ask once more.
    iommu.answer(1)
    assert iommu.asks_nothing()
    os.eventfd_write(iommu.kick, 1)
    assert iommu.asked() == (MISS, DATA, WO)
    iommu.update(DATA)
    iommu.wait_used(1)


def test_a_chain_in_many_pages(iommu: Iommu) -> None:
    iommu.started()
    iommu.offer(DATA, DATA + PAGE, DATA + 2 * PAGE + 1, length=PAGE)
    missed = [iommu.serve_miss().iova for _ in range(4)]
    assert missed == [DATA, DATA + PAGE, DATA + 2 * PAGE + 1, DATA + 3 * PAGE]
    iommu.wait_used(1)


def test_reading_is_not_writing(iommu: Iommu) -> None:
    """The answer allows less than is needed: the ring is given up, and nothing else is."""
    iommu.started()
    iommu.offer(DATA)
    iommu.serve_miss(RO)
    assert iommu.asked() == (ACCESS_FAIL, DATA, WO)
    iommu.wait_err()
    assert iommu.used == 0
    assert iommu.map[DATA - IOVA : DATA - IOVA + 64] == bytes(64)
    assert iommu.ask(h.GET_VRING_BASE, h.state(0, 0)).payload == h.state(0, 0)


def test_what_was_mapped_to_be_read_is_asked_for_to_be_written(iommu: Iommu) -> None:
    """It may be writable as well, and nobody asked yet."""
    iommu.started()
    assert iommu.update(DATA, access=RO) == 0
    iommu.offer(DATA)
    iommu.serve_miss(WO)
    iommu.wait_used(1)


def test_no_access_at_all(iommu: Iommu) -> None:
    iommu.started()
    iommu.offer(DATA)
    iommu.serve_miss(0)
    assert iommu.asked() == (ACCESS_FAIL, DATA, WO)
    iommu.wait_err()


def test_a_chain_that_never_fits(iommu: Iommu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iotlb, "MISSES_AT_ONE_PLACE", 20)
    iommu.started()
    iommu.offer(DATA, DATA + PAGE)
    served = 0
    while not iommu.broken():
        # Never both of them.
        page = iommu.serve_miss().iova
        served += 1
        if not iommu.broken():
            assert iommu.invalidate(page, PAGE) == 0
    assert 15 < served <= 21


# -- invalidations -------------------------------------------------------------------------------------


def test_a_buffer_that_was_unmapped_is_missed_again(iommu: Iommu) -> None:
    iommu.started()
    iommu.offer(DATA)
    iommu.serve_miss()
    iommu.wait_used(1)
    assert iommu.invalidate(DATA, PAGE) == 0
    iommu.map[DATA - IOVA : DATA - IOVA + 64] = bytes(64)
    iommu.offer(DATA)
    assert iommu.asked() == (MISS, DATA, WO)
    assert iommu.map[DATA - IOVA : DATA - IOVA + 64] == bytes(64)
    iommu.update(DATA)
    iommu.wait_used(2)


def test_completions_wait_for_a_ring_that_was_unmapped(path: Path, no_leaks: None) -> None:
    hoarder = Hoarder()
    with contextlib.closing(hoarder), h.served(hoarder, path), iommu_of(path) as iommu:
        iommu.started()
        assert iommu.update(DATA) == 0
        iommu.offer(DATA)
        iommu.offer(DATA + 64)
        hoarder.wait_for(2)
        assert iommu.invalidate() == 0
        # From the answer on, nothing of it is touched, whatever the device does.
        before = bytes(iommu.map)
        for queue, chain in hoarder.chains:
            queue.push(chain, chain.write(b"data"))
        lacking = [iommu.asked()[1:] for _ in RING]
        assert lacking == list(RING)
        after = bytearray(iommu.map)
        after[DATA - IOVA : DATA - IOVA + 128] = bytes(128)  # the chains were out: theirs until given back
        assert after == before
        for iova, _ in lacking:
            assert iommu.update(iova) == 0
        iommu.wait_used(2)


def test_a_ring_moves_with_what_is_in_flight(path: Path, no_leaks: None) -> None:
    hoarder = Hoarder()
    with contextlib.closing(hoarder), h.served(hoarder, path), iommu_of(path) as iommu:
        iommu.started()
        assert iommu.update(DATA) == 0
        iommu.offer(DATA)
        hoarder.wait_for(1)
        assert iommu.invalidate(USED, PAGE) == 0
        ((queue, chain),) = hoarder.chains
        queue.push(chain, 5)
        # The guest moved its used ring to another page, contents and all.
        there = 8 * PAGE
        iommu.map[there : there + PAGE] = iommu.map[USED - IOVA : USED - IOVA + PAGE]
        assert iommu.asked() == (MISS, USED, RW)
        assert iommu.update(USED, user=h.USER + there) == 0
        os.eventfd_read(iommu.call)
        assert struct.unpack_from("<HHII", iommu.map, there) == (0, 1, 0, 5)
        assert iommu.used == 0


def test_memory_that_goes_takes_mappings_along(iommu: Iommu) -> None:
    iommu.started()
    iommu.offer(DATA)
    iommu.serve_miss()
    iommu.wait_used(1)
    assert iommu.status(h.SET_MEM_TABLE, h.table((h.GUEST, PAGE, h.USER, 0)), [iommu.memfd]) == 0
    # Of the ring, the page with the descriptors is still there.
    assert [iommu.asked()[1:] for _ in range(2)] == [(AVAIL, RO), (USED, RW)]
    assert iommu.share_memory() == 0
    for iova in (AVAIL, USED):
        assert iommu.update(iova) == 0
    iommu.offer(DATA)
    iommu.serve_miss()
    iommu.wait_used(2)


def test_a_stopped_device_forgets(iommu: Iommu) -> None:
    """The front-end need not tell it of what it unmaps then."""
    iommu.started()
    iommu.ask(h.GET_VRING_BASE, h.state(0, 0))
    iommu.start_ring()
    assert [iommu.asked()[1:] for _ in RING] == list(RING)


# -- GPA_ADDRESSES -------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [0, ACCESS_PLATFORM], ids=["guest addresses", "IOVAs"])
def test_guest_addresses_instead_of_user_addresses(path: Path, features: int, no_leaks: None) -> None:
    with h.served(Filler(), path), iommu_of(path) as raw:
        raw.negotiate(features, without=0)
        # What stands for a user address in the table means nothing then.
        assert raw.status(h.SET_MEM_TABLE, h.table((h.GUEST, h.SIZE, 0, 0)), [raw.memfd]) == 0
        base = IOVA if features else h.GUEST
        if features:
            assert raw.update(IOVA, h.SIZE, user=h.USER) != 0
            assert raw.update(IOVA, h.SIZE, user=h.GUEST) == 0
        assert raw.status(h.SET_VRING_NUM, h.state(0, h.NUM)) == 0
        assert raw.status(h.SET_VRING_ADDR, h.address(0, base, base + PAGE, base + 2 * PAGE)) == 0
        assert raw.status(h.SET_VRING_CALL, h.u64(0), [raw.call]) == 0
        assert raw.status(h.SET_VRING_KICK, h.u64(0), [raw.kick]) == 0
        assert raw.status(h.SET_VRING_ENABLE, h.state(0, 1)) == 0
        raw.offer(base + 4 * PAGE)
        raw.wait_used(1)


# -- what a front-end may send -------------------------------------------------------------------------


def test_messages_that_are_refused(iommu: Iommu) -> None:
    iommu.started()
    end = 1 << 64
    for iova, size, user, access in (
        (IOVA, 0, h.USER, RW),
        (end - 1, 2, h.USER, RW),
        (IOVA, 2, end - 1, RW),
        (IOVA, PAGE, h.USER - 1, RW),
        (IOVA, h.SIZE + 1, h.USER, RW),
        (0, end - 1, h.USER, RW),
        (IOVA, PAGE, h.USER, 4),
        (IOVA, PAGE, h.USER, 0xFF),
    ):
        assert iommu.iotlb(UPDATE, iova, size, user, access) != 0
    for kind in (0, MISS, ACCESS_FAIL, 5, 6, 0xFF):
        assert iommu.iotlb(kind, IOVA, PAGE, h.USER, RW) != 0
    # The ring is none the worse for it.
    iommu.offer(DATA)
    iommu.serve_miss()
    iommu.wait_used(1)


@pytest.mark.parametrize(
    ("iova", "size"), [(0, 0), (0, (1 << 64) - 1), (IOVA, 0), (DATA, 1), ((1 << 64) - 1, 5), (DATA, 1 << 63)]
)
def test_invalidations_are_never_refused(iommu: Iommu, iova: int, size: int) -> None:
    iommu.started()
    iommu.offer(DATA)
    iommu.serve_miss()
    iommu.wait_used(1)
    assert iommu.iotlb(INVALIDATE, iova, size) == 0
    iommu.offer(DATA)
    if iova < (1 << 64) - 1:
        while iommu.serve_miss().iova != DATA:
            pass
    iommu.wait_used(2)


def test_without_the_feature(iommu: Iommu) -> None:
    iommu.negotiate(0)
    assert iommu.ask(IOTLB_MSG, struct.pack("=QQQBB6x", IOVA, PAGE, h.USER, RW, UPDATE)).u64 != 0


def test_a_flood_of_mappings(iommu: Iommu) -> None:
    """They cost no more than so many; the ring, which is missed again when it goes, lives on."""
    iommu.started()
    message = struct.Struct("=IIIQQQBB6x")
    count = 2 * MAX_ENTRIES
    for start in range(0, count, 64):
        batch = b"".join(
            # Neighbours that are not one.
            message.pack(IOTLB_MSG, h.VERSION, 32, i * 2 * PAGE, PAGE, h.USER, RW, UPDATE)
            for i in range(start, start + 64)
        )
        iommu.raw(batch)
        for _ in range(64):
            assert iommu.reply().u64 == 0
    iommu.offer(DATA)
    while iommu.serve_miss().iova != DATA:
        pass
    iommu.wait_used(1)


@pytest.mark.parametrize("missing", [ProtocolF.REPLY_ACK, ProtocolF.BACKEND_REQ])
def test_without_a_way_to_ask_it_is_not_offered(missing: ProtocolF, no_leaks: None) -> None:
    ours, theirs = socket.socketpair()
    with theirs, Backend(Filler(), ours, without=int(missing)) as backend:
        assert not backend.offered_features() & ACCESS_PLATFORM
    ours, theirs = socket.socketpair()
    with theirs, Backend(Filler(), ours) as backend:
        assert backend.offered_features() & ACCESS_PLATFORM


def test_no_channel_to_ask_on(path: Path, no_leaks: None) -> None:
    """The ring waits until it is mapped, or until there is one."""
    with h.served(Filler(), path), iommu_of(path) as iommu:
        iommu.negotiate(channel=False)
        assert iommu.share_memory() == 0
        iommu.start_ring()
        iommu.give_channel()
        for _ in RING:
            iommu.serve_miss()
        iommu.offer(DATA)
        iommu.serve_miss()
        iommu.wait_used(1)


def test_a_front_end_that_goes_while_it_is_asked(path: Path, no_leaks: None) -> None:
    with h.served(Filler(), path):
        for _ in range(3):
            with iommu_of(path) as iommu:
                iommu.started()
                iommu.offer(DATA)
                assert iommu.asked() == (MISS, DATA, WO)
        with iommu_of(path) as iommu:
            iommu.started()
            iommu.channel.close()
            iommu.offer(DATA)
            iommu.ask(h.GET_FEATURES)
            assert iommu.update(DATA) == 0
            iommu.wait_used(1)


# -- what a hostile front-end does to the session ------------------------------------------------------


def idle_ring(iommu: Iommu, base: int) -> None:
    """Started, for nobody is to kick, and untouched, for it is disabled."""
    assert iommu.status(h.SET_VRING_NUM, h.state(0, h.NUM)) == 0
    assert iommu.status(h.SET_VRING_BASE, h.state(0, 0)) == 0
    assert iommu.status(h.SET_VRING_ADDR, h.address(0, base, base + PAGE, base + 2 * PAGE)) == 0
    assert iommu.status(h.SET_VRING_KICK, h.u64(h.NOFD)) == 0


def test_the_feature_comes_to_a_ring_that_did_nothing(iommu: Iommu) -> None:
    """It goes by IOVAs from then on, and so it is not mapped."""
    iommu.negotiate(0)
    assert iommu.share_memory() == 0
    idle_ring(iommu, h.USER)
    features = h.VERSION_1 | h.PROTOCOL_FEATURES | ACCESS_PLATFORM
    assert iommu.status(h.SET_FEATURES, h.u64(features)) == 0
    assert iommu.asked() == (MISS, h.USER, RO)
    assert iommu.update(h.USER, h.SIZE, user=h.USER) == 0
    assert iommu.invalidate() == 0


def test_the_feature_leaves_a_ring_that_did_nothing(path: Path, no_leaks: None) -> None:
    """Its areas are no user addresses; that it cannot start is told, and it keeps no IOTLB."""
    with h.served(Filler(), path) as server, iommu_of(path) as iommu:
        iommu.negotiate()
        assert iommu.share_memory() == 0
        assert iommu.update(IOVA, h.SIZE) == 0
        idle_ring(iommu, IOVA)
        (backend,) = server.backends.values()
        assert backend.rings[0].queue is not None
        assert iommu.status(h.SET_FEATURES, h.u64(h.VERSION_1 | h.PROTOCOL_FEATURES)) != 0
        assert backend.iotlb is None
        assert backend.rings[0].queue is None
        assert iommu.update(IOVA) != 0


def test_an_error_eventfd_that_is_full(iommu: Iommu) -> None:
    """And blocking: whoever writes to it waits for the front-end, which reads when it likes."""
    iommu.negotiate()
    assert iommu.share_memory() == 0
    full = os.eventfd(0)
    os.eventfd_write(full, 2**64 - 2)
    try:
        assert iommu.status(h.SET_VRING_NUM, h.state(0, h.NUM)) == 0
        assert iommu.status(h.SET_VRING_ADDR, h.address(0, IOVA + 8, AVAIL, USED)) == 0
        assert iommu.status(h.SET_VRING_ERR, h.u64(0), [full]) == 0
        assert iommu.status(h.SET_VRING_KICK, h.u64(0), [iommu.kick]) == 0
        assert iommu.update(IOVA, h.SIZE) == 0
        assert iommu.ask(h.GET_FEATURES).u64 & ACCESS_PLATFORM
    finally:
        os.close(full)


class Failing(Filler):
    """Has a bug that shows when it is told to."""

    fails = False

    def fill(self, queue: vhost.DeviceQueue) -> None:
        if self.fails:
            raise RuntimeError("a bug of the device")
        super().fill(queue)


def test_a_device_that_fails_when_a_miss_is_denied(
    path: Path, no_leaks: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Rings that go on after it are served. Only their session ends."""
    device = Failing()
    with h.served(lambda: device, path), iommu_of(path) as iommu:
        iommu.negotiate()
        assert iommu.share_memory() == 0
        assert iommu.update(IOVA, 3 * PAGE) == 0
        idle = DATA + 4 * PAGE
        assert iommu.update(idle, 3 * PAGE) == 0
        assert iommu.status(h.SET_VRING_NUM, h.state(1, h.NUM)) == 0
        assert iommu.status(h.SET_VRING_ADDR, h.address(1, idle, idle + PAGE, idle + 2 * PAGE)) == 0
        kick = os.eventfd(0)
        assert iommu.status(h.SET_VRING_CALL, h.u64(1), [iommu.call]) == 0
        assert iommu.status(h.SET_VRING_KICK, h.u64(1), [kick]) == 0
        assert iommu.status(h.SET_VRING_ENABLE, h.state(1, 1)) == 0
        os.close(kick)
        iommu.start_ring()
        iommu.offer(DATA)
        asked = iommu.asked()
        assert asked == (MISS, DATA, WO)
        assert iommu.update(asked.iova & -PAGE, access=RO) == 0
        device.fails = True
        iommu.answer()
        assert iommu.ended()
        device.fails = False
        with contextlib.closing(h.RawFrontend(path)) as other:
            assert other.ask(h.GET_FEATURES).u64 & ACCESS_PLATFORM
    caplog.clear()  # the records have the frames
