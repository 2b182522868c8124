# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The ring under a DeviceQueue: where it may lie, where it goes on, its end; well-behaved drivers only."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rig import BASE, USER, Rig, signals
from vhost.errors import InvalidGuestMemory, InvalidQueue, QueueBroken
from vhost.memory import GuestMemory, Region
from vhost.virtqueue import DeviceQueue

pytestmark = pytest.mark.usefixtures("no_leaks")
both = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


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


# ---------------------------------------------------------------------- another memory table


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
