# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Split rings that a guest set up to hurt: each breaks its queue with a reason, and nothing else."""

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
from model import INDIRECT, NEXT, WRITE
from rig import BASE, Rig
from vhost.errors import QueueBroken
from vhost.memory import GuestMemory, Region
from vhost.virtqueue import DeviceQueue

pytestmark = pytest.mark.usefixtures("no_leaks")
NUM = 8
GOOD: Desc = (SPARE, 16, 0)


def desc(
    rig: Rig, index: int, addr: int, length: int, flags: int, following: int = 0, table: int = 0
) -> None:
    rig.ram.put("QIHH", (table or rig.areas.desc) + 16 * index, addr, length, flags, following)


def chain(rig: Rig, descs: list[Desc], first: int = 0, table: int = 0) -> None:
    for i, (addr, length, flags) in enumerate(descs):
        more = i < len(descs) - 1
        desc(rig, first + i, addr, length, flags | (NEXT if more else 0), first + i + 1 if more else 0, table)


def avail(rig: Rig, *heads: int, idx: int | None = None) -> None:
    for i, head in enumerate(heads):
        rig.ram.put("H", rig.areas.avail + 4 + 2 * (i % rig.num), head)
    rig.ram.put("H", rig.areas.avail + 2, len(heads) if idx is None else idx)


@pytest.mark.parametrize("case", BAD_BUFFERS)
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_bad_buffers(case: str, indirect: bool) -> None:
    descs, reason = BAD_BUFFERS[case]
    rig = hostile_rig(NUM)
    desc(rig, 7, *GOOD)
    if indirect:
        chain(rig, descs, table=TABLE)
        desc(rig, 2, TABLE, 16 * len(descs), INDIRECT)
    else:
        chain(rig, descs, first=2)
    avail(rig, 7, 2)
    assert_breaks(rig, rf"{reason} .*\(chain 2, value 0x", served=[7])


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_tables(case: str) -> None:
    (addr, length, flags), reason = BAD_TABLES[case]
    rig = hostile_rig(NUM)
    chain(rig, [GOOD], table=TABLE)
    desc(rig, 0, addr, length, flags | INDIRECT, 1)
    desc(rig, 1, *GOOD)
    avail(rig, 0)
    assert_breaks(rig, reason)


@pytest.mark.parametrize("loop", [[0], [0, 1], [3, 5, 4], list(range(NUM))])
@pytest.mark.parametrize("write", [0, WRITE])
def test_descriptor_loops(loop: list[int], write: int) -> None:
    rig = hostile_rig(NUM)
    for here, following in zip(loop, loop[1:] + loop[:1], strict=True):
        desc(rig, here, SPARE, 16, write | NEXT, following)
    avail(rig, loop[0])
    assert_breaks(rig, "longer than the ring allows, or loops")


def test_a_loop_that_is_entered_from_outside() -> None:
    rig = hostile_rig(NUM)
    for i in range(NUM):
        desc(rig, i, SPARE, 16, NEXT, min(i + 1, NUM - 1))
    avail(rig, 0)
    assert_breaks(rig, "or loops")


@pytest.mark.parametrize("entries", [1, 2, 100])
def test_loops_in_a_table(entries: int) -> None:
    rig = hostile_rig(NUM)
    for i in range(entries):
        desc(rig, i, SPARE, 16, NEXT, (i + 1) % entries, table=TABLE)
    desc(rig, 0, TABLE, 16 * entries, INDIRECT)
    avail(rig, 0)
    assert_breaks(rig, "or loops")


@pytest.mark.parametrize("following", [NUM, NUM + 1, 0x7FFF, 0xFFFF])
def test_next_out_of_range(following: int) -> None:
    rig = hostile_rig(NUM)
    desc(rig, 0, SPARE, 16, NEXT, following)
    avail(rig, 0)
    assert_breaks(rig, rf"next descriptor is outside .*value {following:#x}, limit 0x8\)")


@pytest.mark.parametrize("following", [2, 3, 0xFFFF])
def test_next_out_of_a_table(following: int) -> None:
    rig = hostile_rig(NUM)
    chain(rig, [GOOD] * 3, table=TABLE)
    desc(rig, 0, SPARE, 16, NEXT, following, table=TABLE)
    desc(rig, 0, TABLE, 32, INDIRECT)
    avail(rig, 0)
    assert_breaks(rig, "next descriptor is outside")


def test_a_table_longer_than_any_chain_may_be() -> None:
    rig = hostile_rig(NUM)
    chain(rig, [(SPARE, 1, 0)] * 1023, table=TABLE)
    desc(rig, 0, TABLE, 16 * 1023, INDIRECT)
    avail(rig, 0)
    queue = rig.device()
    (good,) = queue.pop_batch()
    assert good.readable_len == 1023
    rig = hostile_rig(NUM)
    far = rig.end - 16 * 1025
    chain(rig, [(SPARE, 1, 0)] * 1025, table=far)
    desc(rig, 0, far, 16 * 1025, INDIRECT)
    avail(rig, 0)
    assert_breaks(rig, "longer than the ring allows")


def test_more_descriptors_out_than_there_are() -> None:
    """Heads that differ, chains that share their tails."""
    rig = hostile_rig(NUM)
    for i in range(NUM):
        desc(rig, i, SPARE, 16, NEXT if i < NUM - 1 else 0, i + 1)
    avail(rig, 0, 1)
    assert_breaks(rig, "longer than the ring allows", served=[0])


@pytest.mark.parametrize("flags", [0, WRITE, NEXT])
def test_nested_tables(flags: int) -> None:
    rig = hostile_rig(NUM)
    desc(rig, 0, SPARE, 16, NEXT, 1, table=TABLE)
    desc(rig, 1, TABLE + 64, 16, INDIRECT | flags, 0, table=TABLE)
    desc(rig, 0, *GOOD, table=TABLE + 64)
    desc(rig, 0, TABLE, 32, INDIRECT)
    avail(rig, 0)
    assert_breaks(rig, "inside an indirect table")


def test_a_table_that_contains_itself() -> None:
    rig = hostile_rig(NUM)
    desc(rig, 0, TABLE, 16, INDIRECT, table=TABLE)
    desc(rig, 0, TABLE, 16, INDIRECT)
    avail(rig, 0)
    assert_breaks(rig, "inside an indirect table")


def test_tables_without_the_feature() -> None:
    rig = hostile_rig(NUM)
    chain(rig, [GOOD], table=TABLE)
    desc(rig, 0, TABLE, 16, INDIRECT)
    avail(rig, 0)
    assert_breaks(rig, "not negotiated", indirect=False)


@pytest.mark.parametrize("head", [NUM, NUM + 1, 0x8000, 0xFFFF])
def test_heads_out_of_range(head: int) -> None:
    rig = hostile_rig(NUM)
    desc(rig, 3, *GOOD)
    avail(rig, 3, head)
    assert_breaks(rig, rf"head is outside .*value {head:#x}, limit 0x8\)", served=[3])


@pytest.mark.parametrize("idx", [NUM + 1, 0x7FFF, 0x8000, 0xFFFF])
def test_an_available_index_that_jumps(idx: int) -> None:
    rig = hostile_rig(NUM)
    for i in range(NUM):
        desc(rig, i, *GOOD)
    avail(rig, *range(NUM), idx=idx)
    assert_breaks(rig, rf"index ran ahead .*value {idx:#x}, limit 0x9\)")


def test_an_available_index_that_goes_back() -> None:
    rig = hostile_rig(NUM)
    for i in range(NUM):
        desc(rig, i, *GOOD)
    avail(rig, *range(NUM))
    queue = rig.device()
    queue.push_batch(queue.pop_batch())
    rig.ram.put("H", rig.areas.avail + 2, NUM - 1)
    with pytest.raises(QueueBroken, match=r"ran ahead .*value 0xffff"):
        queue.pop()


def test_the_same_head_twice_at_once() -> None:
    rig = hostile_rig(NUM)
    desc(rig, 5, *GOOD)
    avail(rig, 5, 5)
    assert_breaks(rig, "made available again before it was used", served=[5])


def test_the_same_head_again_before_it_is_used() -> None:
    rig = hostile_rig(NUM)
    desc(rig, 5, *GOOD)
    avail(rig, 5)
    queue = rig.device()
    first = queue.pop()
    assert first is not None
    avail(rig, 5, 5)
    with pytest.raises(QueueBroken, match="made available again"):
        queue.pop()
    queue.push(first)
    assert rig.ram.get("HHII", rig.areas.used) == (0, 1, 5, 0)


def test_flags_that_mean_nothing_are_ignored() -> None:
    rig = hostile_rig(NUM)
    desc(rig, 0, SPARE, 16, 0xFFF8 | NEXT, 1)
    desc(rig, 1, SPARE, 16, 0xFFF8 | WRITE, 0xFFFF)
    avail(rig, 0)
    (good,) = rig.device().pop_batch()
    assert (good.readable_len, good.writable_len) == (16, 16)


@pytest.mark.parametrize("event", [0, 1, 0x7FFF, 0x8000, 0xFFFF])
@pytest.mark.parametrize("flags", [0, 1, 0xFFFF])
@pytest.mark.parametrize("event_idx", [False, True])
def test_any_wish_for_calls_is_harmless(event: int, flags: int, event_idx: bool) -> None:
    rig = hostile_rig(NUM, event_idx=event_idx)
    driver, queue = rig.model_driver(), rig.device()
    for _ in range(2 * NUM):
        rig.ram.put("H", rig.areas.avail, flags)
        rig.ram.put("H", rig.areas.avail + 4 + 2 * NUM, event)
        driver.add([(SPARE, 4)], [])
        for taken in queue:
            queue.push(taken)
        assert len(driver.get_used()) == 1


def test_a_broken_queue_leaves_its_neighbour_alone() -> None:
    rig = hostile_rig(NUM)
    other = DeviceQueue(rig.memory, NUM, BASE + 0x4000, BASE + 0x5000, BASE + 0x6000)
    avail(rig, NUM)
    queue = rig.device()
    with pytest.raises(QueueBroken):
        queue.pop()
    rig.ram.put("QIHH", BASE + 0x4000, SPARE, 4, WRITE, 0)
    rig.ram.put("HHH", BASE + 0x5000, 0, 1, 0)
    for taken in other:
        other.push(taken, taken.write(b"fine"))
    assert rig.ram.get("HHII", BASE + 0x6000) == (0, 1, 0, 4)
    assert queue.broken
    assert other.broken is None


def test_buffers_in_more_pieces_than_are_kept() -> None:
    """A table of buffers that each lie across all 509 regions: 2048 pieces are enough for a small ring."""
    size, count = 64, 509
    regions = [Region.allocate(1 << 16, guest_addr=BASE, user_addr=0)]
    start = BASE + (1 << 16)
    regions += [
        Region.allocate(size, guest_addr=start + size * i, user_addr=(1 << 32) + size * i)
        for i in range(count - 1)
    ]
    memory = GuestMemory(regions)
    queue = DeviceQueue(memory, NUM, BASE, BASE + 0x1000, BASE + 0x2000, name="victim")
    whole = size * (count - 1)
    for entries, fits in ((4, True), (5, False)):
        for i in range(entries):
            more = NEXT if i < entries - 1 else 0
            memory.write(BASE + 0x4000 + 16 * i, struct.pack("<QIHH", start, whole, more, i + 1))
        index = 1 if fits else 2
        memory.write(BASE, struct.pack("<QIHH", BASE + 0x4000, 16 * entries, INDIRECT, 0))
        memory.write(BASE + 0x1000, b"\0\0" + index.to_bytes(2, "little"))
        if fits:
            taken = queue.pop()
            assert taken is not None
            assert len(taken.readable) == entries * (count - 1)
            assert taken.readable_len == entries * whole
            assert taken.read_at(whole * 2 - 3, 6) == bytes(6)
            queue.push(taken)
        else:
            with pytest.raises(QueueBroken, match="scattered over too many pieces"):
                queue.pop()


@pytest.mark.parametrize("entries", [255, 256])
def test_chains_of_4_gib(entries: int) -> None:
    """2.7.5.2: fewer than 2^32 bytes. The memory is never touched, so there need not be any."""
    whole = 1 << 24
    memory = GuestMemory([Region.allocate(whole, guest_addr=BASE, user_addr=0)])
    for i in range(entries):
        more = NEXT if i < entries - 1 else 0
        memory.write(BASE + 0x4000 + 16 * i, struct.pack("<QIHH", BASE, whole, more | WRITE, i + 1))
    memory.write(BASE, struct.pack("<QIHH", BASE + 0x4000, 16 * entries, INDIRECT, 0))
    memory.write(BASE + 0x1000, b"\0\0\1\0")
    queue = DeviceQueue(memory, NUM, BASE, BASE + 0x1000, BASE + 0x2000)
    if entries == 256:
        with pytest.raises(QueueBroken, match=r"2\^32 bytes or more .*value 0x100000000, limit 0x100000000"):
            queue.pop()
    else:
        taken = queue.pop()
        assert taken is not None
        assert taken.writable_len == 255 << 24
        taken.write_at((255 << 24) - 1, b"!")
        queue.push(taken, taken.writable_len)
        assert memory.read(BASE + 0x2000, 12) == struct.pack("<HHII", 0, 1, 0, 255 << 24)


def test_everything_changes_while_it_is_read() -> None:
    rig = hostile_rig(NUM)
    pick = random.Random(3)
    images = []
    for _ in range(300):
        ring = random_descs(pick, NUM, packed=False)
        ring += bytes(2) + pick.randrange(3 * NUM).to_bytes(2, "little")
        ring += b"".join(
            pick.choice([*range(NUM), *range(NUM), NUM]).to_bytes(2, "little") for _ in range(NUM + 1)
        )
        images.append(ring)
    assert rig.areas.avail == rig.areas.desc + 16 * NUM
    table = memoryview(rig.memory[0])[TABLE - BASE : TABLE - BASE + 64]
    table[:] = random_descs(pick, 4, packed=False)
    torture(rig, images)


def test_a_device_that_changes_everything_while_the_driver_reads() -> None:
    rig = hostile_rig(NUM)
    pick = random.Random(6)
    used = rig.areas.used - BASE
    images = []
    for _ in range(300):
        ring = b"".join(
            struct.pack(
                "<II", pick.choice([*range(0, NUM, 2), pick.randrange(NUM), 1 << 31]), pick.getrandbits(32)
            )
            for _ in range(NUM)
        )
        images.append(
            random_descs(pick, NUM, packed=False)[: used - 40]
            + bytes(40)
            + bytes(2)
            + pick.randrange(8).to_bytes(2, "little")
            + ring
        )
    torture_driver(rig, images)
