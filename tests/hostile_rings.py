# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What the hostile ring tests of both formats share: buffers that are none, and how a queue has to break."""

from __future__ import annotations

import itertools
import os
import random
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from model import AVAIL, INDIRECT, NEXT, USED, WRITE
from rig import BASE, Rig, error_event, signals
from vhost.errors import QueueBroken
from vhost.memory import GuestMemory, Region
from vhost.virtqueue import Chain, DeviceQueue

SIZE = 1 << 16  # of each of the two regions; there is a hole behind them
END = BASE + 2 * SIZE
TOP = 1 << 64
SPARE = BASE + 0x8000  # room for buffers
TABLE = BASE + 0xC000  # room for indirect tables

Desc = tuple[int, int, int]  # address, length, flags other than NEXT

OUTSIDE = "buffer is outside guest memory"
# Chains that are wrong whatever the ring is, in its descriptors or in an indirect table.
BAD_BUFFERS: dict[str, tuple[list[Desc], str]] = {
    "outside": ([(0, 16, 0)], OUTSIDE),
    "below": ([(BASE - 1, 16, 0)], OUTSIDE),
    "at the end": ([(END, 1, WRITE)], OUTSIDE),
    "over the end": ([(END - 8, 9, WRITE)], OUTSIDE),
    "far over the end": ([(BASE, 0xFFFF_FFFF, WRITE)], OUTSIDE),
    "wrapping": ([(TOP - 8, 16, 0)], OUTSIDE),
    "wrapping into memory": ([(TOP - 1, 0xFFFF_FFFF, 0)], OUTSIDE),
    "last address": ([(TOP - 1, 1, 0)], OUTSIDE),
    "second one outside": ([(SPARE, 16, 0), (END, 16, WRITE)], OUTSIDE),
    "length 0": ([(SPARE, 0, 0)], "length 0"),
    "length 0 later": ([(SPARE, 16, 0), (SPARE, 0, WRITE)], "length 0"),
    "length 0 outside": ([(0, 0, 0)], "length 0"),
    "readable after writable": ([(SPARE, 16, WRITE), (SPARE, 16, 0)], "device-readable buffer after"),
    "readable between": ([(SPARE, 1, 0), (SPARE, 1, WRITE), (SPARE, 1, 0)], "device-readable buffer after"),
}

BAD_TABLES: dict[str, tuple[tuple[int, int, int], str]] = {
    "length 0": ((TABLE, 0, 0), "no length, or no multiple of 16"),
    "length 8": ((TABLE, 8, 0), "no multiple of 16"),
    "length 17": ((TABLE, 17, 0), "no multiple of 16"),
    "length 4 GiB - 1": ((TABLE, 0xFFFF_FFFF, 0), "no multiple of 16"),
    "with next": ((TABLE, 16, NEXT), "with a next one"),
    "outside": ((END, 16, 0), OUTSIDE),
    "over the end": ((END - 8, 16, 0), OUTSIDE),
    "wrapping": ((TOP - 8, 16, 0), OUTSIDE),
    "at 0": ((0, 16, 0), OUTSIDE),
}


def hostile_rig(num: int = 8, **more: bool) -> Rig:
    rig = Rig(num, sizes=(SIZE, SIZE), **more)
    rig.model_driver()  # a ring that is empty, as a driver starts
    return rig


def assert_breaks(rig: Rig, reason: str, served: Sequence[int] = (), **options: bool) -> None:
    """Every way of taking chains serves what is good, and then says what is wrong, for ever."""
    takers: tuple[Callable[[DeviceQueue], Iterator[Chain]], ...] = (by_pop, by_loop, by_batch)
    for take in takers:
        with error_event() as err:
            queue = rig.device(err=err, name="victim", base=rig.start(0)[1], **options)
            taken = []
            with pytest.raises(QueueBroken, match=f"^victim: .*{reason}") as caught:
                for chain in take(queue):
                    taken.append(chain)
            assert [chain.id for chain in taken] == list(served)
            assert signals(err) == 1
            assert queue.broken == caught.value.reason
            for again in (by_pop, by_loop, by_batch):
                with pytest.raises(QueueBroken, match=reason):
                    list(again(queue))
            assert not queue.has_work()
            assert signals(err) == 0
            for chain in taken:
                chain.read()
                chain.writable  # noqa: B018 - looked at
            # The memory is another matter than the ring: a new queue on it can be used.
            queue.set_memory(GuestMemory(rig.memory.regions))
            queue.close()


def by_pop(queue: DeviceQueue) -> Iterator[Chain]:
    while (chain := queue.pop()) is not None:
        yield chain


def by_loop(queue: DeviceQueue) -> Iterator[Chain]:
    yield from queue


def by_batch(queue: DeviceQueue) -> Iterator[Chain]:
    while chains := queue.pop_batch(3):
        yield from chains


def assert_inside(queue: DeviceQueue, chain: Chain) -> None:
    """What a chain shows lies in guest memory, and is as long as it says."""
    for buffers, total in ((chain.readable, chain.readable_len), (chain.writable, chain.writable_len)):
        assert sum(map(len, buffers)) == total
        for buffer in buffers:
            assert len(buffer) > 0
            assert any(
                region.host_addr <= buffer.address
                and buffer.address + len(buffer) <= region.host_addr + region.size
                for region in queue.memory
            )


# Copies images over the beginning of a file at random, as fast as it can, until it is killed.
MUTATOR = """
import mmap, os, random, sys
ring, images, size, count = map(int, sys.argv[1:])
target = memoryview(mmap.mmap(ring, mmap.PAGESIZE))[:size]
pick = random.Random(5)
offsets = [size * pick.randrange(count) for _ in range(9973)]
print("go", flush=True)
while True:
    for offset in offsets:
        os.preadv(images, [target], offset)
"""


@contextmanager
def mutator(region: Region, images: list[bytes]) -> Iterator[None]:
    """Another process (a thread of ours would wait for the GIL) writes one image after the other over
    the first bytes of the region."""
    fd = os.memfd_create("images")
    os.write(fd, b"".join(images))
    command = [sys.executable, "-c", MUTATOR, *map(str, (region.fd, fd, len(images[0]), len(images)))]
    with subprocess.Popen(command, pass_fds=(region.fd, fd), stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"go\n"
            yield
            assert process.poll() is None
        finally:
            process.kill()
            os.close(fd)


def until_varied(seen: Counter[str], good: str, kinds: int) -> Iterator[int]:
    """Rounds: some thousand, and then on until much that is good and enough kinds of evil were met, or the
    test would say nothing. On a busy machine the other process may take its time."""
    deadline = time.monotonic() + 120
    for i in itertools.count():
        if i >= 3000 and seen[good] > 300 and len(seen) >= kinds:
            return
        assert time.monotonic() < deadline, seen
        yield i


def torture(rig: Rig, images: list[bytes]) -> None:
    """Take chains from a ring that changes all the time."""
    seen: Counter[str] = Counter()
    pick = random.Random(7)
    with mutator(rig.memory[0], images), error_event() as err:
        for _ in until_varied(seen, "served", kinds=8):
            base = rig.start(pick.randrange(2 * rig.num))[1]
            queue = rig.device(err=err, call=err, base=base, event_idx=bool(pick.getrandbits(1)))
            queue.budget = 50
            try:
                for chain in queue:
                    assert_inside(queue, chain)
                    seen["served"] += 1
                    chain.read()
                    if chain.writable_len:
                        chain.write_at(0, b"x")
                    queue.push(chain, chain.writable_len and 1)
                seen["empty, or budget spent"] += 1
            except QueueBroken as error:
                seen[error.reason.split(" (")[0]] += 1


def torture_driver(rig: Rig, images: list[bytes]) -> None:
    """The same for a driver whose device writes anything at any time."""
    seen: Counter[str] = Counter()
    with mutator(rig.memory[0], images):
        for i in until_varied(seen, "came back", kinds=4):
            queue = rig.driver(base=rig.start(i % 5)[1])
            try:
                for number in range(20):
                    while queue.free > 1:
                        size = 1 + (number + queue.free) % 9
                        queue.add([(SPARE, 1)], [(SPARE, size)], size)
                    queue.kick_prepare()
                    for size, written in queue.get_used_batch():
                        assert 0 <= written <= size
                        seen["came back"] += 1
                    queue.enable_callbacks()
                seen["in peace"] += 1
            except QueueBroken as error:
                seen[error.reason.split(" (")[0]] += 1
            assert 0 <= queue.free <= rig.num


def random_descs(pick: random.Random, num: int, *, packed: bool) -> bytes:
    """A descriptor table in which most entries are good. Those of one image belong to one lap, mostly:
    what is read while one image replaces the other is of both."""
    table = b""
    lap = pick.choice([AVAIL, USED])
    for i in range(num):
        addr, length = pick.choice([SPARE, SPARE + 64, BASE + SIZE - 8]), pick.choice([1, 16, 32])
        flags = pick.choice([0, 0, WRITE, WRITE, NEXT, NEXT | WRITE])
        following, marks = (i + 1) % num, lap
        if pick.random() < 0.1:
            addr, length, flags = TABLE, pick.choice([16, 32, 48, 64]), INDIRECT
        if pick.random() < 0.05:
            addr = pick.choice([0, END, END - 8, TOP - 8])
        if pick.random() < 0.03:
            length = pick.choice([0, 7, 0xFFFF_FFFF])
        if pick.random() < 0.03:
            flags = pick.choice([INDIRECT, INDIRECT | NEXT])
        if pick.random() < 0.05:
            following = pick.randrange(2 * num)
            marks = pick.choice([0, AVAIL, USED, AVAIL | USED])
        last = (following, flags | marks) if packed else (flags, following)
        table += struct.pack("<QIHH", addr, length, *last)
    return table
