# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Packed rings that a guest set up to hurt: each breaks its queue with a reason, and nothing else."""

from __future__ import annotations

import random
import struct

import pytest

from hostile_rings import (
    BAD_BUFFERS,
    BAD_TABLES,
    SPARE,
    TABLE,
    Desc,
    assert_breaks,
    hostile_rig,
    random_descs,
    torture,
    torture_driver,
)
from model import AVAIL, INDIRECT, NEXT, USED, WRITE
from rig import BASE, Rig
from vhost.errors import QueueBroken

pytestmark = pytest.mark.usefixtures("no_leaks")
NUM = 7  # no power of two
GOOD: Desc = (SPARE, 16, 0)


def packed_rig(**more: bool) -> Rig:
    return hostile_rig(NUM, packed=True, **more)


def desc(rig: Rig, slot: int, addr: int, length: int, flags: int, buffer_id: int = 0, lap: int = 0) -> None:
    """Available in the first lap, or in a later one."""
    marks = USED if lap % 2 else AVAIL
    rig.ram.put("QIHH", rig.areas.desc + 16 * slot, addr, length, buffer_id, flags | marks)


def table(rig: Rig, descs: list[Desc], at: int = TABLE) -> None:
    for i, (addr, length, flags) in enumerate(descs):
        rig.ram.put("QIHH", at + 16 * i, addr, length, 0, flags)


@pytest.mark.parametrize("case", BAD_BUFFERS)
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_bad_buffers(case: str, indirect: bool) -> None:
    descs, reason = BAD_BUFFERS[case]
    rig = packed_rig()
    desc(rig, 0, *GOOD, buffer_id=6)
    if indirect:
        table(rig, descs)
        desc(rig, 1, TABLE, 16 * len(descs), INDIRECT, buffer_id=2)
    else:
        for i, (addr, length, flags) in enumerate(descs):
            more = NEXT if i < len(descs) - 1 else 0
            desc(rig, 1 + i, addr, length, flags | more, buffer_id=2)
    assert_breaks(rig, rf"{reason} .*\(chain 2, value 0x", served=[6])


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_tables(case: str) -> None:
    (addr, length, flags), reason = BAD_TABLES[case]
    rig = packed_rig()
    table(rig, [GOOD])
    desc(rig, 0, addr, length, flags | INDIRECT)
    desc(rig, 1, *GOOD)
    assert_breaks(rig, reason)


@pytest.mark.parametrize("flags", [0, AVAIL | USED, AVAIL | USED | NEXT])
def test_a_head_of_the_wrong_lap_is_not_there(flags: int) -> None:
    rig = packed_rig()
    rig.ram.put("QIHH", rig.areas.desc, *GOOD[:2], 0, flags)
    desc(rig, 1, *GOOD)
    queue = rig.device()
    assert queue.pop() is None
    assert not queue.has_work()
    assert not queue.enable_notification()
    assert list(queue) == queue.pop_batch() == []
    assert queue.broken is None
    # One lap on, the wrap counter is the other one, and so is what is there.
    again = rig.device(base=rig.start(NUM)[1])
    assert again.pop() is None
    rig.ram.put("QIHH", rig.areas.desc, *GOOD[:2], 0, USED)
    assert queue.pop() is None
    assert again.pop() is not None


@pytest.mark.parametrize("tail", [0, USED, AVAIL | USED])
def test_a_head_that_comes_before_its_tail(tail: int) -> None:
    rig = packed_rig()
    desc(rig, 0, SPARE, 16, NEXT)
    rig.ram.put("QIHH", rig.areas.desc + 16, *GOOD[:2], 0, tail)
    assert_breaks(rig, r"goes on in a slot that is not available .*value 0x1\b")


@pytest.mark.parametrize("start", [0, 3, NUM - 1])
def test_a_chain_longer_than_the_ring(start: int) -> None:
    rig = packed_rig()
    for slot in range(NUM):
        desc(rig, slot, SPARE, 16, NEXT, lap=slot < start)
    queue = rig.device(base=rig.start(start)[1])
    with pytest.raises(QueueBroken, match="longer than the ring allows, or loops"):
        queue.pop()


def test_a_chain_as_long_as_the_ring_is_one() -> None:
    rig = packed_rig()
    for slot in range(NUM):
        desc(rig, slot, SPARE, 16, NEXT if slot < NUM - 1 else 0, buffer_id=3)
    queue = rig.device()
    taken = queue.pop()
    assert taken is not None
    assert (taken.id, taken.readable_len, queue.in_flight) == (3, 16 * NUM, NUM)


def test_the_next_lap_before_this_one_is_used() -> None:
    rig = packed_rig()
    for slot in range(NUM):
        desc(rig, slot, *GOOD, buffer_id=slot)
    queue = rig.device()
    taken = queue.pop_batch(NUM - 1)
    desc(rig, 0, *GOOD, buffer_id=NUM - 1, lap=1)
    desc(rig, 1, *GOOD, buffer_id=NUM - 1, lap=1)
    taken += queue.pop_batch(1)
    with pytest.raises(QueueBroken, match=r"still in use|longer than the ring"):
        queue.pop()
    queue.push_batch(taken)
    assert queue.in_flight == 0


@pytest.mark.parametrize("buffer_id", [NUM, 8, 0x7FFF, 0xFFFF])
def test_buffer_ids_out_of_range(buffer_id: int) -> None:
    rig = packed_rig()
    desc(rig, 0, *GOOD, buffer_id=4)
    desc(rig, 1, *GOOD, buffer_id=buffer_id)
    assert_breaks(rig, rf"buffer id is outside the ring .*value {buffer_id:#x}, limit 0x7\)", served=[4])


def test_only_the_last_descriptors_id_counts() -> None:
    rig = packed_rig()
    desc(rig, 0, SPARE, 16, NEXT, buffer_id=0xFFFF)
    desc(rig, 1, *GOOD, buffer_id=4)
    taken = rig.device().pop()
    assert taken is not None
    assert taken.id == 4


def test_the_same_buffer_id_twice() -> None:
    rig = packed_rig()
    desc(rig, 0, *GOOD, buffer_id=4)
    desc(rig, 1, *GOOD, buffer_id=4)
    assert_breaks(rig, "buffer id is still in use", served=[4])


@pytest.mark.parametrize("flags", [0, WRITE])
def test_tables_do_not_nest(flags: int) -> None:
    """2.8.7: a device ignores all flags but WRITE there, so what INDIRECT is set on is a plain buffer."""
    rig = packed_rig()
    table(rig, [GOOD, (TABLE + 64, 16, INDIRECT | flags)])
    table(rig, [GOOD], at=TABLE + 64)
    desc(rig, 0, TABLE, 32, INDIRECT)
    taken = rig.device().pop()
    assert taken is not None
    assert [len(buffer) for buffer in taken.readable + taken.writable] == [GOOD[1], 16]
    assert taken.writable_len == (16 if flags else 0)


def test_tables_without_the_feature() -> None:
    rig = packed_rig()
    table(rig, [GOOD])
    desc(rig, 0, TABLE, 16, INDIRECT)
    assert_breaks(rig, "not negotiated", indirect=False)


def test_a_table_longer_than_any_chain_may_be() -> None:
    rig = packed_rig()
    table(rig, [(SPARE, 1, 0)] * 1024, at=rig.end - 16 * 1025)
    desc(rig, 0, rig.end - 16 * 1025, 16 * 1024, INDIRECT)
    taken = rig.device().pop()
    assert taken is not None
    assert taken.readable_len == 1024
    desc(rig, 0, rig.end - 16 * 1025, 16 * 1025, INDIRECT)
    assert_breaks(rig, "longer than the ring allows")


def test_next_in_a_table_means_nothing() -> None:
    rig = packed_rig()
    table(rig, [(SPARE, 4, NEXT), (SPARE, 4, 0), (SPARE, 4, WRITE | NEXT)])
    desc(rig, 0, TABLE, 48, INDIRECT)
    taken = rig.device().pop()
    assert taken is not None
    assert (taken.readable_len, taken.writable_len) == (8, 4)


@pytest.mark.parametrize("flags", [0, 1, 2, 3, 4, 0xFFFF])
@pytest.mark.parametrize("off_wrap", [0, NUM - 1, NUM, 0x7FFF, 0x8000, 0x8000 | NUM, 0xFFFF])
@pytest.mark.parametrize("event_idx", [False, True])
def test_any_event_flags_are_harmless(flags: int, off_wrap: int, event_idx: bool) -> None:
    rig = packed_rig(event_idx=event_idx)
    driver, queue = rig.model_driver(), rig.device()
    for _ in range(2 * NUM):
        rig.ram.put("HH", rig.areas.avail, off_wrap, flags)
        rig.ram.put("HH", rig.areas.used, off_wrap, flags)
        driver.add([(SPARE, 4)], [])
        for taken in queue:
            queue.push(taken)
        assert len(driver.get_used()) == 1
    assert queue.broken is None


def test_reserved_event_flags_suppress_nothing() -> None:
    rig = packed_rig()
    driver, queue = rig.model_driver(), rig.device()
    for flags, told in ((0, True), (1, False), (3, True), (0xFFFF, True)):
        driver.add([(SPARE, 4)], [])
        (taken,) = queue.pop_batch()
        queue.should_notify()
        rig.ram.put("HH", rig.areas.avail, 0, flags)
        queue.fill(taken)
        queue.flush()
        assert queue.should_notify() == told
        driver.get_used()


def test_everything_changes_while_it_is_read() -> None:
    rig = packed_rig()
    pick = random.Random(4)
    images = []
    for _ in range(300):
        ring = random_descs(pick, NUM, packed=True)
        ring += b"".join(pick.choice([0, 1, 2, 3, 0x8003, 0xFFFF]).to_bytes(2, "little") for _ in range(4))
        images.append(ring)
    assert rig.areas.avail == rig.areas.desc + 16 * NUM
    inner = memoryview(rig.memory[0])[TABLE - BASE : TABLE - BASE + 64]
    inner[:] = random_descs(pick, 4, packed=False)
    torture(rig, images)


def test_a_device_that_changes_everything_while_the_driver_reads() -> None:
    rig = packed_rig()
    pick = random.Random(6)
    images = []
    for _ in range(300):
        ring = b""
        for _ in range(NUM):
            marks = pick.choice([0, AVAIL | USED, AVAIL | USED, AVAIL | USED, AVAIL, USED])
            buffer_id = pick.choice([0, 1, 2, pick.randrange(NUM), NUM])
            ring += struct.pack("<QIHH", 0, pick.getrandbits(32), buffer_id, marks | pick.choice([0, WRITE]))
        images.append(ring)
    torture_driver(rig, images)
