# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""DeviceQueue, Chain and Buffer as their users meet them; well-behaved drivers only."""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fds
from rig import BASE, USER, Rig, eventfds, signals
from vhost.errors import InvalidGuestMemory, InvalidQueue, QueueBroken
from vhost.memory import GuestMemory, Region
from vhost.virtqueue import Buffer, Chain, DeviceQueue

pytestmark = pytest.mark.usefixtures("no_leaks")
both = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
AREAS = ("desc", "avail", "used")


@pytest.fixture
def events() -> Iterator[list[int]]:
    with eventfds(3) as made:
        yield made


# ---------------------------------------------------------------------- set-up


@pytest.mark.parametrize("num", [-1, 0, 3, 24, 32767, 32769, 65536, 1 << 40])
def test_split_sizes_that_are_none(num: int) -> None:
    rig = Rig(16)
    with pytest.raises(InvalidQueue, match=rf"queue: num {num}: a split ring has a power of two"):
        DeviceQueue(rig.memory, num, rig.areas.desc, rig.areas.avail, rig.areas.used)


@pytest.mark.parametrize("num", [-1, 0, 32769, 65536, 1 << 40])
def test_packed_sizes_that_are_none(num: int) -> None:
    rig = Rig(16, packed=True)
    with pytest.raises(InvalidQueue, match=rf"queue: num {num}: a packed ring has 1 to 32768"):
        DeviceQueue(rig.memory, num, rig.areas.desc, rig.areas.avail, rig.areas.used, packed=True)


@pytest.mark.parametrize(
    ("num", "packed"),
    [(1, False), (2, False), (32768, False), (1, True), (3, True), (32767, True), (32768, True)],
)
def test_sizes_at_the_limits_work(num: int, packed: bool) -> None:
    rig = Rig(num, packed=packed, sizes=(2 << 20,))
    driver, queue = rig.model_driver(), rig.device()
    for i in range(3):
        driver.add([], [(rig.data, 8)])
        for chain in queue:
            queue.push(chain, chain.write(bytes([i] * 8)))
        assert driver.get_used()[0][1] == 8
        assert rig.ram.read(rig.data, 8) == bytes([i] * 8)


@both
@pytest.mark.parametrize("area", range(3))
def test_misaligned_areas(packed: bool, area: int) -> None:
    rig = Rig(16, packed=packed, sizes=(1 << 16, 1 << 16))
    good = [BASE, BASE + 0x1000, BASE + 0x2000]
    align = (16, 4, 4)[area] if packed else (16, 2, 4)[area]
    for offset in range(1, align):
        addrs = list(good)
        addrs[area] += offset
        with pytest.raises(InvalidQueue, match=f"no multiple of {align}"):
            DeviceQueue(rig.memory, 16, *addrs, packed=packed)
    good[area] += align
    DeviceQueue(rig.memory, 16, *good, packed=packed)


def test_a_region_mapped_askew_cannot_hold_a_ring(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(bytes(1 << 16))
    fd = os.open(tmp_path / "m", os.O_RDWR)
    region = Region.from_fd(fd, 0x8000, guest_addr=BASE, user_addr=0, mmap_offset=8)
    os.close(fd)
    with pytest.raises(InvalidQueue, match="mmap offset is no multiple of 16"):
        DeviceQueue(GuestMemory([region]), 16, BASE, BASE + 0x1000, BASE + 0x2000)


@both
@pytest.mark.parametrize("user", [False, True], ids=["guest", "user"])
@pytest.mark.parametrize("area", range(3))
def test_areas_outside_memory(packed: bool, area: int, user: bool) -> None:
    rig = Rig(16, packed=packed, sizes=(1 << 16, 1 << 16))
    start = USER if user else BASE
    size = (256, 4, 4)[area] if packed else (256, 38, 134)[area]
    outside = [
        0,
        start - 16,
        start + (1 << 17),
        start + (1 << 17) - size // 16 * 16 + 16,
        (1 << 64) - 16,
        BASE if user else USER,  # the other kind of address
    ]
    for addr in outside:
        addrs = [start + 0x4000, start + 0x5000, start + 0x6000]
        addrs[area] = addr
        with pytest.raises(InvalidQueue, match="not wholly within one of 2 memory regions"):
            DeviceQueue(rig.memory, 16, *addrs, packed=packed, user_addresses=user)
    # To the last byte of a region it is fine, over its end it is not, though a neighbour follows.
    addrs[area] = start + (1 << 17) - (size + 15) // 16 * 16
    DeviceQueue(rig.memory, 16, *addrs, packed=packed, user_addresses=user)
    if size > 16:
        addrs[area] = start + (1 << 16) - 16
        with pytest.raises(InvalidQueue, match="not wholly within one"):
            DeviceQueue(rig.memory, 16, *addrs, packed=packed, user_addresses=user)


@both
def test_overlapping_areas(packed: bool) -> None:
    rig = Rig(16, packed=packed)
    good = [BASE, BASE + 0x1000, BASE + 0x2000]
    for area, where in [(1, BASE), (1, BASE + 252), (2, BASE + 252), (2, BASE + 0x1000), (0, BASE + 0x1000)]:
        addrs = list(good)
        addrs[area] = where
        with pytest.raises(InvalidQueue, match=r"at 0x\w+, size 0x\w+ overlaps the .* at 0x\w+, size 0x\w+"):
            DeviceQueue(rig.memory, 16, *addrs, packed=packed)
    DeviceQueue(rig.memory, 16, BASE, BASE + 256, BASE + 256 + 40, packed=packed)


@both
def test_user_addresses(packed: bool) -> None:
    rig = Rig(16, packed=packed)
    driver = rig.model_driver()
    shift = USER - BASE
    queue = DeviceQueue(
        rig.memory,
        16,
        rig.areas.desc + shift,
        rig.areas.avail + shift,
        rig.areas.used + shift,
        packed=packed,
        user_addresses=True,
        name="requestq",
        index=3,
    )
    driver.add([(rig.data, 4)], [])
    chain = queue.pop()
    assert chain is not None
    queue.push(chain)
    assert driver.get_used() == [(chain.id, 0)]
    assert (queue.name, queue.index, queue.num, queue.packed) == ("requestq", 3, 16, packed)
    assert (queue.indirect, queue.event_idx, queue.in_order) == (True, False, False)
    assert queue.memory is rig.memory
    assert "requestq" in repr(queue)


@pytest.mark.parametrize("base", [-1, 0x10000, 0x80008000])
def test_split_bases_that_are_none(base: int) -> None:
    with pytest.raises(InvalidQueue, match=f"base {base:#x}"):
        Rig(16).device(base=base)


@pytest.mark.parametrize("base", [-1, 1 << 32, 0x80108000, 0x80008010, 0x8010])
def test_packed_bases_that_are_none(base: int) -> None:
    with pytest.raises(InvalidQueue, match=f"base {base & 0xFFFF:#x}|base {base:#x}|base 0x80108010"):
        Rig(16, packed=True).device(base=base)


def test_without_a_base_a_split_ring_goes_on_where_it_was_used() -> None:
    rig = Rig(16)
    rig.model_driver(start=1000)
    assert rig.device().base == 1000
    assert rig.device(base=1001).base == 1001


def test_packed_bases() -> None:
    rig = Rig(16, packed=True)
    assert rig.device().base == 0x80008000
    assert rig.device(base=0x80078007).base == 0x80078007
    # One position stands for both: some front-ends know no more.
    assert rig.device(base=0x8000).base == 0x80008000
    assert rig.device(base=0x8003).base == 0x80038003


# ---------------------------------------------------------------------- chains


@both
def test_a_chain_reads_and_writes_across_its_pieces(packed: bool) -> None:
    rig = Rig(32, packed=packed, sizes=(1 << 16, 1 << 16))
    driver, queue = rig.model_driver(), rig.device()
    border = BASE + (1 << 16)
    readable = [(rig.data, 3), (border - 5, 10), *((rig.data + 64 * i, 1) for i in range(1, 11))]
    writable = [(rig.data + 0x1000, 2), (border + 0x100, 5), (rig.data + 0x1100, 1)]
    text = b"abc0123456789ABCDEFGHIJ"
    at = 0
    for addr, size in readable:
        rig.ram.write(addr, text[at : at + size])
        at += size
    driver.add(readable, writable)
    chain = queue.pop()
    assert chain is not None
    assert (chain.readable_len, chain.writable_len, chain.written) == (23, 8, 0)
    assert [bytes(b) for b in chain.readable] == [
        b"abc",
        b"01234",
        b"56789",
        *(bytes([c]) for c in b"ABCDEFGHIJ"),
    ]
    assert [len(b) for b in chain.writable] == [2, 5, 1]
    assert chain.readable is chain.readable

    assert (chain.read(0), chain.read(2), chain.read(5)) == (b"", b"ab", b"c0123")
    into = bytearray(6)
    assert chain.readinto(into) == 6
    assert into == b"456789"
    assert chain.read() == b"ABCDEFGHIJ"
    assert (chain.read(), chain.read(5), chain.readinto(bytearray(5))) == (b"", b"", 0)
    assert (chain.read_at(1, 4), chain.read_at(23, 0), chain.read_at(0, 23)) == (b"bc01", b"", text)

    assert chain.write(b"1") == 1
    assert chain.write(bytearray(b"2345")) == 4
    assert chain.written == 5
    with pytest.raises(ValueError, match="4 bytes do not fit into the 3 that are left of 8"):
        chain.write(b"6789")
    assert chain.written == 5
    assert chain.write(memoryview(b"xx678xx")[2:5]) == 3
    assert chain.write(b"") == 0
    assert b"".join(map(bytes, chain.writable)) == b"12345678"
    chain.write_at(7, b"!")
    chain.write_at(8, b"")
    chain.write_at(1, b"()")
    assert chain.written == 8
    queue.push(chain)
    assert driver.get_used() == [(chain.id, 8)]
    assert rig.ram.read(writable[0][0], 2) + rig.ram.read(writable[1][0], 5) == b"1()4567"


@both
def test_parts_of_a_chain(packed: bool) -> None:
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device()
    rig.ram.write(rig.data, b"0123456789")
    driver.add(
        [(rig.data, 4), (rig.data + 4, 1), (rig.data + 5, 5)], [(rig.data + 32, 3), (rig.data + 35, 3)]
    )
    chain = queue.pop()
    assert chain is not None
    for offset in range(11):
        for size in range(11 - offset):
            parts = chain.readable_part(offset, size)
            assert b"".join(map(bytes, parts)) == b"0123456789"[offset : offset + size]
            assert all(len(p) for p in parts)
    assert [len(p) for p in chain.readable_part(3, 3)] == [1, 1, 1]
    assert [len(p) for p in chain.writable_part(2)] == [1, 3]
    assert not chain.writable_part(0)[0].readonly
    for offset, size in [(-1, 2), (0, 11), (10, 1), (11, 0), (11, -1), (0, -2), (1 << 62, 1), (5, 1 << 62)]:
        with pytest.raises(ValueError, match="are not within its 10 readable bytes"):
            chain.readable_part(offset, size)
        if size != -1:
            with pytest.raises(ValueError, match="readable"):
                chain.read_at(offset, size)
    with pytest.raises(ValueError, match="are not within its 6 writable bytes"):
        chain.writable_part(0, 7)
    for offset in (-1, 5, 7):
        with pytest.raises(ValueError, match=r"2 bytes at .* are not within its 6 writable bytes"):
            chain.write_at(offset, b"ab")


def test_copying_between_overlapping_parts_of_guest_memory() -> None:
    rig = Rig(16)
    driver, queue = rig.model_driver(), rig.device()
    rig.ram.write(rig.data, bytes(range(100)))
    driver.add([(rig.data, 90)], [(rig.data + 10, 90)])
    chain = queue.pop()
    assert chain is not None
    chain.write(chain.readable[0])
    assert rig.ram.read(rig.data + 10, 90) == bytes(range(90))


def test_buffers_speak_the_buffer_protocol() -> None:
    rig = Rig(16)
    driver, queue = rig.model_driver(), rig.device()
    driver.add([(rig.data, 16)], [(rig.data + 0x100, 16)])
    chain = queue.pop()
    assert chain is not None
    (readable,), (writable,) = chain.readable, chain.writable
    for buffer, readonly in ((readable, True), (writable, False)):
        view = memoryview(buffer)
        assert (view.format, view.itemsize, view.ndim, view.nbytes) == ("B", 1, 1, 16)
        assert view.readonly == buffer.readonly == readonly
        assert view.c_contiguous
        assert view.obj is buffer
        assert len(buffer) == 16
    assert readable.address == rig.memory[0].host_addr + rig.data - BASE
    with pytest.raises(TypeError):
        memoryview(readable)[0] = 1
    with pytest.raises((TypeError, BufferError)):
        os.readv(0, [readable])
    memoryview(writable)[3] = 7
    assert rig.ram.read(rig.data + 0x103, 1) == b"\x07"
    for kind in (Buffer, Chain):
        with pytest.raises(TypeError, match="come from a"):
            kind()


def test_buffers_go_straight_into_system_calls(tmp_path: Path) -> None:
    rig = Rig(16)
    driver, queue = rig.model_driver(), rig.device()
    rig.ram.write(rig.data, b"guest to file")
    driver.add([(rig.data, 6), (rig.data + 6, 7)], [(rig.data + 0x100, 4), (rig.data + 0x200, 9)])
    chain = queue.pop()
    assert chain is not None
    fd = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    near, far = socket.socketpair()
    try:
        assert os.pwritev(fd, chain.readable, 3) == 13
        assert os.preadv(fd, chain.writable, 3) == 13
        assert rig.ram.read(rig.data + 0x100, 4) + rig.ram.read(rig.data + 0x200, 9) == b"guest to file"
        assert near.sendmsg(chain.readable) == 13
        assert far.recv(100) == b"guest to file"
        far.send(b"file to guest")
        assert near.recvmsg_into(chain.writable)[0] == 13
        assert rig.ram.read(rig.data + 0x100, 4) + rig.ram.read(rig.data + 0x200, 9) == b"file to guest"
    finally:
        near.close()
        far.close()
        os.close(fd)


# ---------------------------------------------------------------------- pop and push


@both
def test_what_was_written_is_what_write_counted_or_what_push_is_told(packed: bool) -> None:
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device()
    for told, expected in [(None, 3), (0, 0), (2, 2), (8, 8), (True, 1)]:
        driver.add([], [(rig.data, 8)])
        chain = queue.pop()
        assert chain is not None
        chain.write(b"abc")
        queue.push(chain, told)
        assert driver.get_used() == [(chain.id, expected)]


@both
@pytest.mark.parametrize("written", [9, -1, 1 << 32, (1 << 32) + 4, -(1 << 32) + 4, 1 << 64, -(1 << 70)])
def test_more_than_the_writable_bytes_is_refused_and_nothing_published(packed: bool, written: int) -> None:
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device()
    driver.add([(rig.data, 100)], [(rig.data, 8)])
    chain = queue.pop()
    assert chain is not None
    for call in (queue.push, queue.fill, lambda c, n: queue.push_batch([c], [n])):
        with pytest.raises(ValueError, match="only 8 are writable"):
            call(chain, written)
        assert driver.get_used() == []
    with pytest.raises(TypeError):
        queue.push(chain, "8")  # type: ignore[arg-type]
    queue.push(chain, 8)
    assert driver.get_used() == [(chain.id, 8)]


@both
def test_a_chain_comes_back_once(packed: bool) -> None:
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device()
    for _ in range(3):
        driver.add([], [(rig.data, 8)])
    chain = queue.pop()
    assert chain is not None
    queue.push(chain, 4)
    for again in (queue.push, queue.fill, queue.unpop, lambda c: queue.push_batch([c])):
        with pytest.raises(InvalidQueue, match=f"chain {chain.id}"):
            again(chain)
    for late in (lambda: chain.write(b"x"), lambda: chain.write_at(0, b"x")):
        with pytest.raises(InvalidQueue, match="was given back"):
            late()
    chain.read()  # harmless
    assert driver.get_used() == [(chain.id, 4)]
    assert queue.in_flight == 0


@both
def test_a_stale_chain_cannot_complete_a_newer_one(packed: bool) -> None:
    """The same head, the same queue: only the object of the newest pop counts."""
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device()
    driver.add([], [(rig.data, 8)])
    stale = queue.pop()
    assert stale is not None
    queue.unpop(stale)
    fresh = queue.pop()
    assert fresh is not None
    assert fresh.id == stale.id
    assert fresh is not stale
    with pytest.raises(InvalidQueue):
        queue.push(stale)
    with pytest.raises(InvalidQueue):
        stale.write(b"stale")
    with pytest.raises(InvalidQueue):
        queue.unpop(stale)
    assert driver.get_used() == []
    queue.push(fresh, fresh.write(b"fresh"))
    assert driver.get_used() == [(fresh.id, 5)]


class Late:
    """A length that gives its chain back before it says what it is."""

    def __init__(self, do: Callable[[], object]) -> None:
        self.do = do

    def __index__(self) -> int:
        self.do()
        return 4


@both
@pytest.mark.parametrize("how", ["push", "fill", "push_batch"])
def test_a_length_that_gives_the_chain_back_itself(packed: bool, how: str) -> None:
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device()
    driver.add([], [(rig.data, 8)])
    chain, newer = queue.pop(), []

    def do() -> None:
        queue.push(chain, 1)
        driver.get_used()
        driver.add([], [(rig.data, 8)])
        newer.append(queue.pop())

    with pytest.raises(InvalidQueue, match="was given back"):
        if how == "push_batch":
            queue.push_batch([chain], [Late(do)])
        else:
            getattr(queue, how)(chain, Late(do))
    assert queue.in_flight == 1
    queue.push(newer[0], 8)
    assert [written for _, written in driver.get_used()] == [8]


@both
def test_a_chain_of_an_earlier_queue_is_refused_by_its_successor(packed: bool) -> None:
    rig = Rig(16, packed=packed)
    driver, first = rig.model_driver(), rig.device()
    driver.add([], [(rig.data, 8)])
    old = first.pop()
    assert old is not None
    base = rig.device().base
    first.close()
    del first
    gc.collect()
    second = rig.device(base=base)
    new = second.pop()
    assert new is not None
    assert new.id == old.id
    with pytest.raises(InvalidQueue, match="another queue"):
        second.push(old)
    with pytest.raises(InvalidQueue):
        second.unpop(old)
    assert driver.get_used() == []
    second.push(new)
    assert len(driver.get_used()) == 1


@both
def test_unpop_takes_the_newest_only(packed: bool) -> None:
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device()
    ids = [driver.add([(rig.data, 1 + i), (rig.data, 1)], []) for i in range(3)]
    one, two = queue.pop(), queue.pop()
    assert one is not None
    assert two is not None
    assert queue.in_flight == 4
    with pytest.raises(InvalidQueue, match="not the one that was popped last"):
        queue.unpop(one)
    queue.unpop(two)
    queue.unpop(one)
    assert queue.in_flight == 0
    assert queue.base == rig.start(0)[1]
    again = queue.pop_batch()
    assert [c.id for c in again] == ids
    assert [c.readable_len for c in again] == [2, 3, 4]
    queue.push_batch(again)
    assert [i for i, _ in driver.get_used()] == ids


@both
def test_batches(packed: bool) -> None:
    rig = Rig(256, packed=packed, sizes=(1 << 20,))
    driver, queue = rig.model_driver(), rig.device()
    assert queue.pop_batch() == []
    for lap in range(3):
        ids = [driver.add([], [(rig.data + 16 * i, 16)]) for i in range(200)]
        first = queue.pop_batch(3)
        rest = queue.pop_batch(1000)
        assert [c.id for c in first + rest] == ids
        assert queue.pop_batch() == []
        assert [len(queue.pop_batch(n)) for n in (1, 0)] == [0, 0]
        queue.push_batch(first, [lap, 1, 2])
        for chain in rest:
            chain.write(b"abcd")
        queue.push_batch(tuple(rest))
        assert driver.get_used() == list(zip(ids, [lap, 1, 2] + [4] * 197, strict=True))
    with pytest.raises(OverflowError):
        queue.pop_batch(-1)


@both
def test_a_batch_is_all_that_there_is(packed: bool) -> None:
    """Also what came after an earlier look, which saw some that are still to be popped."""
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device()
    for _ in range(2):
        driver.add([], [(rig.data, 8)])
    assert queue.pop() is not None
    for _ in range(3):
        driver.add([], [(rig.data, 8)])
    assert len(queue.pop_batch(8)) == 4


@both
def test_a_batch_with_a_mistake_in_it(packed: bool) -> None:
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device()
    ids = [driver.add([], [(rig.data, 8)]) for _ in range(4)]
    a, b, c, d = queue.pop_batch()
    with pytest.raises(ValueError, match="2 chains, but 1 lengths"):
        queue.push_batch([a, b], [1])
    assert driver.get_used() == []
    with pytest.raises(ValueError, match="9 bytes written"):
        queue.push_batch([a, b, c], [1, 9, 2])
    assert driver.get_used() == [(ids[0], 1)]
    with pytest.raises(InvalidQueue):
        queue.push_batch([b, b])
    with pytest.raises(TypeError):
        queue.push_batch([c, "no chain"])  # type: ignore[list-item]
    queue.push(d)
    assert [i for i, _ in driver.get_used()] == ids[1:]


@both
def test_fill_is_seen_after_flush(packed: bool) -> None:
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device()
    ids = [driver.add([], [(rig.data, 8)]) for _ in range(3)]
    for chain in queue.pop_batch():
        queue.fill(chain, 5)
        assert driver.get_used() == []
    queue.flush()
    assert driver.get_used() == [(i, 5) for i in ids]
    queue.flush()


@both
def test_in_order_waits_for_the_elders(packed: bool) -> None:
    rig = Rig(8, packed=packed, in_order=True)
    driver, queue = rig.model_driver(), rig.device()
    for _ in range(5):
        ids = [driver.add([], [(rig.data, 8)]) for _ in range(4)]
        a, b, c, d = queue.pop_batch()
        queue.push(c, 3)
        queue.push(b, 2)
        assert driver.get_used() == []
        queue.push(a, 1)
        assert [i for i, _ in driver.get_used()] == ids[:3]
        queue.push(d, 4)
        assert driver.get_used() == [(ids[3], 4)]


# ---------------------------------------------------------------------- the loop, notifications


@both
@pytest.mark.parametrize("event_idx", [False, True])
def test_a_loop_notifies_once_and_rearms(packed: bool, event_idx: bool, events: list[int]) -> None:
    rig = Rig(16, packed=packed, event_idx=event_idx)
    driver, queue = rig.model_driver(), rig.device(kick=events[0], call=events[1], err=events[2])
    for lap in range(3):
        driver.want_call()
        for _ in range(5):
            driver.add([], [(rig.data, 8)])
        assert driver.need_kick()
        for served, chain in enumerate(queue):
            driver.add([], [(rig.data, 8)]) if served < 3 else None
            assert not driver.need_kick()
            queue.push(chain)
            assert signals(events[1]) == 0
        assert signals(events[1]) == 1
        assert len(driver.get_used()) == 8
        assert served == 7, lap
        assert not queue.has_work()
    assert signals(events[0]) == signals(events[2]) == 0


@both
def test_who_wants_no_calls_gets_none(packed: bool, events: list[int]) -> None:
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device(call=events[1])

    def serve() -> None:
        driver.add([], [(rig.data, 8)])
        for chain in queue:
            queue.push(chain)
        driver.get_used()

    serve()
    assert signals(events[1]) == 1  # the first decision of a new queue is always yes
    driver.suppress_calls()
    serve()
    assert signals(events[1]) == 0
    driver.want_call()
    serve()
    assert signals(events[1]) == 1
    for chain in queue:
        raise AssertionError(chain)
    assert signals(events[1]) == 0


@both
def test_push_outside_a_loop_notifies_at_once(packed: bool, events: list[int]) -> None:
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device(call=events[1])
    for _ in range(6):
        driver.add([], [(rig.data, 8)])
    chains = queue.pop_batch()
    queue.push(chains[0])
    assert signals(events[1]) == 1
    queue.push_batch(chains[1:3])
    assert signals(events[1]) == 1
    queue.fill(chains[3])
    queue.flush()
    assert signals(events[1]) == 0
    assert queue.notify()
    assert signals(events[1]) == 1
    assert not queue.notify()
    queue.fill(chains[4])
    queue.flush()
    assert queue.should_notify()
    assert not queue.should_notify()
    driver.suppress_calls()
    queue.push(chains[5])
    assert signals(events[1]) == 0
    # Without an eventfd the decision is still made.
    driver.want_call()
    queue.call = -1
    driver.add([], [(rig.data, 8)])
    (chain,) = queue.pop_batch()
    queue.fill(chain)
    queue.flush()
    assert queue.notify()


@both
@pytest.mark.parametrize("event_idx", [False, True])
def test_a_spent_budget_leaves_a_kick(packed: bool, event_idx: bool, events: list[int]) -> None:
    rig = Rig(16, packed=packed, event_idx=event_idx)
    driver, queue = rig.model_driver(), rig.device(kick=events[0], call=events[1])
    queue.budget = 4
    for _ in range(9):
        driver.add([], [(rig.data, 8)])
    counts = []
    while True:
        served = 0
        for chain in queue:
            served += 1
            queue.push(chain)
        counts.append(served)
        if not signals(events[0]):
            break
        assert queue.has_work()
    assert counts == [4, 4, 1]
    # All of it served exactly at the end of the budget: nobody needs to come back.
    for _ in range(4):
        driver.add([], [(rig.data, 8)])
    driver.get_used()
    assert len([queue.push(c) for c in queue]) == 4
    assert signals(events[0]) == 0
    driver.need_kick()
    driver.add([], [(rig.data, 8)])
    assert driver.need_kick()
    with pytest.raises(ValueError, match="budget 0"):
        queue.budget = 0
    with pytest.raises(OverflowError):
        queue.budget = -1


@both
@pytest.mark.parametrize("how", ["break", "exception", "drop"])
def test_a_loop_that_is_left_early_rearms_and_notifies(packed: bool, how: str, events: list[int]) -> None:
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device(kick=events[0], call=events[1])
    for _ in range(3):
        driver.add([], [(rig.data, 8)])
    if how == "break":
        for chain in queue:
            queue.push(chain)
            break
    elif how == "exception":
        with pytest.raises(ZeroDivisionError):
            for chain in queue:
                queue.push(chain)
                _ = 1 // 0
    else:
        loop = iter(queue)
        queue.push(next(loop))
        driver.need_kick()
        driver.add([], [(rig.data, 8)])
        assert not driver.need_kick()
        assert signals(events[1]) == 0
        del loop
    assert signals(events[1]) == 1
    assert queue.has_work()
    assert signals(events[0]) == 0
    driver.need_kick()
    driver.add([], [(rig.data, 8)])
    assert driver.need_kick()
    assert len(driver.get_used()) == 1


@both
def test_a_poller_stays_without_kicks(packed: bool) -> None:
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device()
    queue.disable_notification()
    driver.add([], [(rig.data, 8)])
    assert not driver.need_kick()
    for chain in queue:
        queue.push(chain)
    driver.add([], [(rig.data, 8)])
    assert not driver.need_kick()
    assert queue.enable_notification()
    for chain in queue:
        queue.push(chain)
    assert not queue.enable_notification()
    driver.add([], [(rig.data, 8)])
    assert driver.need_kick()


@both
def test_loops_in_loops_notify_at_the_outermost_end(packed: bool, events: list[int]) -> None:
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device(call=events[1])
    for _ in range(4):
        driver.add([], [(rig.data, 8)])
    for outer in queue:
        for inner in queue:
            queue.push(inner)
            break
        assert signals(events[1]) == 0
        queue.push(outer)
    assert signals(events[1]) == 1
    finished = iter(queue)
    assert list(finished) == []
    assert list(finished) == []


def test_a_call_eventfd_that_is_full_is_no_error(events: list[int]) -> None:
    rig = Rig(16)
    driver, queue = rig.model_driver(), rig.device(call=events[1])
    os.eventfd_write(events[1], 0xFFFF_FFFF_FFFF_FFFE)
    driver.add([], [(rig.data, 8)])
    for chain in queue:
        queue.push(chain)
    assert len(driver.get_used()) == 1


def test_a_call_fd_that_is_none_is_an_error_after_publishing() -> None:
    rig = Rig(16)
    driver, queue = rig.model_driver(), rig.device(call=100000)
    driver.add([], [(rig.data, 8)])
    chain = queue.pop()
    assert chain is not None
    with pytest.raises(OSError, match="eventfd 100000: Bad file descriptor"):
        queue.push(chain)
    assert len(driver.get_used()) == 1


# ---------------------------------------------------------------------- chain objects


def test_a_loop_needs_two_chain_objects_beside_those_it_looks_ahead() -> None:
    rig = Rig(16)
    driver, queue = rig.model_driver(), rig.device()
    seen = set()
    for _ in range(100):
        driver.add([], [(rig.data, 8)])
        driver.add([], [(rig.data, 8)])
        for chain in queue:
            seen.add(id(chain))
            queue.push(chain)
        driver.get_used()
    # Without the interpreter's lock it settles at one or two more; what counts is that it does.
    locked = getattr(sys, "_is_gil_enabled", lambda: True)()
    assert len(seen) <= (2 + 3 if locked else 4 + 3)


def test_batches_need_two_batches_of_chain_objects() -> None:
    rig = Rig(64)
    driver, queue = rig.model_driver(), rig.device()
    seen = set()
    for _ in range(50):
        for _ in range(32):
            driver.add([], [(rig.data, 8)])
        chains = queue.pop_batch(32)
        seen.update(map(id, chains))
        queue.push_batch(chains)
        driver.get_used()
    assert len(seen) <= 64 + 1


@both
def test_a_chain_that_somebody_holds_is_never_used_again(packed: bool) -> None:
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device()
    held: list[tuple[Chain, int, bytes]] = []
    for i in range(200):
        rig.ram.write(rig.data, bytes([i]) * 4)
        driver.add([(rig.data, 1 + i % 4)], [])
        for chain in queue:
            held.append((chain, chain.id, chain.read()))
            queue.push(chain)
        driver.get_used()
    assert len({id(chain) for chain, _, _ in held}) == 200
    for i, (chain, head, data) in enumerate(held):
        assert (chain.id, chain.readable_len, data) == (head, 1 + i % 4, bytes([i]) * (1 + i % 4))


@both
def test_a_held_buffer_is_not_moved_by_the_next_chain(packed: bool) -> None:
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device()
    driver.add([(rig.data, 4)], [])
    for chain in queue:
        (kept,) = chain.readable
        queue.push(chain)
    del chain
    driver.get_used()
    rig.ram.write(rig.data, b"kept")
    for i in range(1, 10):
        driver.add([(rig.data + 64 * i, 8)], [])
        for chain in queue:
            assert len(chain.readable[0]) == 8
            queue.push(chain)
        del chain
        driver.get_used()
    assert bytes(kept) == b"kept"


# ---------------------------------------------------------------------- lifetimes


@both
def test_views_outlive_queue_memory_table_and_file(packed: bool, tmp_path: Path) -> None:
    before = fds.shared_maps()
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device()
    rig.ram.write(rig.data, b"still here")
    driver.add([(rig.data, 10)], [(rig.data + 64, 10)])
    chain = queue.pop()
    assert chain is not None
    source, target = chain.readable[0], memoryview(chain.writable[0])[2:5]
    other = Rig(16, packed=packed)
    queue.set_memory(other.memory)
    queue.close()
    copy = memoryview(rig.memory[0])
    del rig, driver, queue, other
    gc.collect()
    assert chain.read() == b"still here"
    del chain
    gc.collect()
    assert bytes(source) == b"still here"
    target[:] = b"abc"
    assert bytes(copy).count(b"abc") == 1
    del source, target, copy
    gc.collect()
    assert fds.shared_maps() == before


@both
def test_set_memory_keeps_the_chains_that_are_out(packed: bool) -> None:
    rig = Rig(16, packed=packed, sizes=(1 << 17, 1 << 17))
    ring = rig.memory[0]
    driver, queue = rig.model_driver(), rig.device()
    out = BASE + (1 << 17)
    driver.add([(out, 5)], [(out + 64, 5)])
    driver.add([(out, 5)], [])
    chain = queue.pop()
    assert chain is not None
    rig.ram.write(out, b"12345")
    smaller = GuestMemory([ring])
    queue.set_memory(smaller)
    assert queue.memory is smaller
    chain.write(chain.read())
    assert rig.ram.read(out + 64, 5) == b"12345"
    queue.push(chain)
    assert driver.get_used() == [(chain.id, 5)]
    # What is taken from now on is looked up in the new table.
    with pytest.raises(QueueBroken, match="outside guest memory"):
        queue.pop()


@both
def test_set_memory_without_the_ring_changes_nothing(packed: bool) -> None:
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device()
    elsewhere = GuestMemory([Region.allocate(1 << 18, guest_addr=BASE + (1 << 30))])
    with pytest.raises(InvalidQueue, match="not wholly within one of 1 memory regions"):
        queue.set_memory(elsewhere)
    assert queue.memory is rig.memory
    driver.add([(rig.data, 1)], [])
    for chain in queue:
        queue.push(chain)
    assert len(driver.get_used()) == 1


@both
def test_a_moved_ring_goes_on_in_the_new_mapping(packed: bool) -> None:
    """The same file mapped again, as after a memory slot was removed and added."""
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device()
    old = rig.memory[0]
    fd = os.dup(old.fd)
    again = Region.from_fd(fd, old.size, guest_addr=old.guest_addr, user_addr=old.user_addr)
    os.close(fd)
    driver.add([(rig.data, 1)], [])
    chain = queue.pop()
    queue.set_memory(GuestMemory([again]))
    driver.add([(rig.data, 2)], [])
    second = queue.pop()
    assert chain is not None
    assert second is not None
    queue.push_batch([chain, second])
    assert len(driver.get_used()) == 2


def test_idle_chain_objects_do_not_hold_a_replaced_table() -> None:
    rig = Rig(64)
    driver, queue = rig.model_driver(), rig.device()
    for _ in range(20):
        driver.add([(rig.data, 1)], [])
    queue.push_batch(queue.pop_batch())
    old = rig.memory
    queue.set_memory(GuestMemory(old.regions))
    rig.memory = queue.memory
    assert sys.getrefcount(old) == 2
    # Nor does one that comes back later.
    driver.get_used()
    driver.add([(rig.data, 1)], [])
    chain = queue.pop()
    assert chain is not None
    old = queue.memory
    queue.set_memory(GuestMemory(old.regions))
    rig.memory = queue.memory
    queue.push(chain)
    del chain
    assert sys.getrefcount(old) == 2


# ---------------------------------------------------------------------- close and restart


@both
def test_close_refuses_what_comes_later(packed: bool, events: list[int]) -> None:
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device(call=events[1])
    for _ in range(3):
        driver.add([], [(rig.data, 8)])
    loops = [iter(queue)]
    chain = next(loops[0])
    staged = next(loops[0])
    queue.fill(staged)
    queue.close()
    queue.close()
    assert queue.closed
    calls: list[Callable[[], object]] = [
        lambda: queue.push(chain),
        lambda: queue.fill(chain),
        lambda: queue.push_batch([chain]),
        lambda: queue.unpop(chain),
        queue.flush,
        queue.notify,
        queue.should_notify,
        queue.pop,
        queue.pop_batch,
        queue.enable_notification,
        queue.disable_notification,
        lambda: queue.set_memory(rig.memory),
        lambda: iter(queue),
        lambda: next(loops[0]),
    ]
    for call in calls:
        with pytest.raises(InvalidQueue, match="queue: closed"):
            call()
    loops.clear()
    assert not queue.has_work()
    assert queue.broken is None
    assert driver.get_used() == []
    assert signals(events[1]) == 0


@both
@pytest.mark.parametrize("start", [0, 5, 15, 16, 17, 31, 65530])
def test_a_successor_goes_on_from_the_base(packed: bool, start: int) -> None:
    rig = Rig(16, packed=packed)
    at, base = rig.start(start)
    driver, queue = rig.model_driver(at), rig.device(base=base)
    assert queue.base == base
    for lap in range(40):
        sizes = [1 + (lap + i) % 3 for i in range(3)]
        for size in sizes:
            driver.add([(rig.data, 1)] * size, [])
        queue.push_batch(queue.pop_batch(2))
        assert queue.in_flight == 0
        successor = rig.device(base=queue.base)
        queue.close()
        queue = successor
        assert queue.has_work()
        queue.push_batch(queue.pop_batch())
        assert len(driver.get_used()) == 3


def test_broken_by_the_device(events: list[int]) -> None:
    rig = Rig(16)
    driver, queue = rig.model_driver(), rig.device(err=events[2], name="requestq")
    for _ in range(3):
        driver.add([], [(rig.data, 8)])
    chain = queue.pop()
    assert chain is not None
    assert queue.broken is None
    queue.mark_broken("request without a status byte")
    queue.mark_broken("another reason")
    assert queue.broken == "request without a status byte"
    assert signals(events[2]) == 1
    for call in (queue.pop, queue.pop_batch, lambda: list(queue)):
        with pytest.raises(QueueBroken, match="requestq: request without a status byte") as caught:
            call()
        assert (caught.value.queue, caught.value.reason) == ("requestq", queue.broken)
    assert not queue.has_work()
    queue.push(chain)  # what was served is still told
    assert len(driver.get_used()) == 1
    assert signals(events[2]) == 0


def test_errors_are_of_one_tree() -> None:
    assert issubclass(QueueBroken, InvalidQueue)
    assert not issubclass(InvalidQueue, InvalidGuestMemory)
