# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a chain costs a device: ns per blk-shaped chain, from an unchecked C loop to plain Python.

A chain is 16 readable and 4096 + 1 writable bytes in three descriptors; every case pops, walks,
translates and pushes it, and decides once a batch whether to notify. The driver's work is laid out
before the clock starts, so that publishing a batch is one 16-bit store, whose cost (with the clock's)
is measured by itself and taken off. All of it is one process on one core: what a cache line costs on
its way from the driver's core comes on top for everybody.
"""

from __future__ import annotations

import ctypes
import functools
import os
import random
import time
from collections.abc import Callable
from contextlib import ExitStack

from benchmarks import harness, limits, ring_python
from benchmarks.facts import BATCH, ENGINE, ENGINE_BATCH, FLOOR, ITERATE, LIBVHOST_USER, PLAIN, REQUEST
from benchmarks.harness import NS, Case, Cases, Suite, Table, again, cell
from benchmarks.virtqueue_peers import libvhost_user
from vhost.memory import GuestMemory, Region
from vhost.virtio_blk import HEADER
from vhost.virtqueue import DeviceQueue

NUM = 1024
ROUND = 256  # chains laid out at once; a batch divides it
BATCHES = (1, 32, 256)
REGIONS = (1, 8, 64, 509)
FORMATS = ("split", "packed")

DATA = 4096
WRITTEN = DATA + 1

GUEST_BASE = 1 << 32
SHIFT = 22  # regions of 4 MiB, so that 509 of them are 2 GiB of (sparse) memory
AREA = 40 << 10  # one case's ring, headers and status bytes, all in region 0
AVAIL, USED, SMALL = 16 << 10, 19 << 10, 28 << 10
POOL = 4096  # data addresses to walk through

AGAIN = again(FLOOR)
CASES = (FLOOR, AGAIN, ENGINE, ENGINE_BATCH, LIBVHOST_USER, ITERATE, BATCH, REQUEST, PLAIN)

SAMPLE_NS = 2_000_000  # about what one sample shall take
GUESS = {
    FLOOR: 10,
    AGAIN: 10,
    ENGINE: 25,
    ENGINE_BATCH: 25,
    LIBVHOST_USER: 70,
    ITERATE: 100,
    BATCH: 80,
    REQUEST: 200,
    PLAIN: 4000,
}


TITLE = (
    "What a chain of a 16-byte header, 4096 bytes of data and a status byte costs a device: popped, walked, "
    f"translated, pushed, and one decision to notify a batch; rings of {NUM}."
)
TABLES = tuple(
    Table(f"{form} ring", NS, rows=("subject",), columns=("regions", "batch"), where={"format": form})
    for form in FORMATS
)


def build() -> ctypes.CDLL:
    """The floor and csrc, with the flags of the real build."""
    here = harness.HERE
    lib = harness.library(
        "ring", [here / "ring_floor.c", here / "ring_engine.c", *harness.rings()]
    )
    pointer, u32, u64, flag = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_bool
    return harness.declare(
        lib,
        ("ring_new", pointer, flag, u32, pointer, pointer, pointer, pointer, u32, u32, u64, pointer, u32),
        ("ring_delete", None, pointer),
        ("ring_refill", None, pointer, u32, u32),
        ("ring_check", u32, pointer, flag),
        ("ring_publish_at", ctypes.POINTER(u32), pointer),
        ("ring_publish_values", ctypes.POINTER(ctypes.c_uint16), pointer),
        ("ring_floor_run", u64, pointer, flag, u32, u32, u32),
        ("ring_engine_new", ctypes.c_int, pointer),
        ("ring_engine_delete", None, pointer),
        ("ring_engine_run", u64, pointer, flag, u32, u32, u32),
        ("ring_run", u64, pointer, pointer, pointer, u32, u32, u32),
    )


class GuestRegion(ctypes.Structure):
    _fields_ = [
        ("guest_addr", ctypes.c_uint64),
        ("user_addr", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("host", ctypes.c_uint64),
    ]


class Arena:
    """Guest memory of n regions, windows of one file, with room for each case's ring in the first."""

    def __init__(self, nregions: int, areas: int) -> None:
        size = 1 << SHIFT
        self.nregions = nregions
        fd = os.memfd_create("benchmark")
        try:
            os.ftruncate(fd, nregions * size)
            self.regions = [
                Region.from_fd(fd, size, guest_addr=at, user_addr=at, mmap_offset=at - GUEST_BASE)
                for at in range(GUEST_BASE, GUEST_BASE + nregions * size, size)
            ]
        finally:
            os.close(fd)
        self.memory = GuestMemory(self.regions)
        self.c_regions = (GuestRegion * nregions)(
            *(GuestRegion(r.guest_addr, r.user_addr, r.size, r.host_addr) for r in self.regions)
        )
        taken = areas * AREA
        room = (size - taken) // DATA
        shuffled = random.Random(nregions)
        places = [(i, k) for k in range(min(room, -(-POOL // nregions))) for i in range(nregions)]
        shuffled.shuffle(places)
        addresses = [GUEST_BASE + i * size + taken + k * DATA for i, k in places[:POOL]]
        self.data = (ctypes.c_uint64 * len(addresses))(*addresses)
        self.next_area = 0

    def area(self) -> int:
        at = self.next_area
        self.next_area += AREA
        return at


class Ring:
    """One case's ring: the C driver that refills it, and a device that is measured on it."""

    def __init__(self, lib: ctypes.CDLL, arena: Arena, packed: bool) -> None:
        self.lib, self.arena, self.packed = lib, arena, packed
        self.offset = arena.area()
        host = arena.regions[0].host_addr + self.offset
        self.handle = lib.ring_new(
            packed,
            NUM,
            host,
            host + AVAIL,
            host + USED,
            ctypes.addressof(arena.c_regions),
            arena.nregions,
            SHIFT,
            GUEST_BASE + self.offset + SMALL,
            ctypes.addressof(arena.data),
            len(arena.data),
        )
        area = memoryview(arena.regions[0])[self.offset : self.offset + AREA]
        self.desc, self.avail, self.used = area[:AVAIL], area[AVAIL:USED], area[USED:SMALL]
        self.words = (self.desc if packed else self.avail).cast("H")

    def check(self, status: bool, name: str) -> None:
        good = self.lib.ring_check(self.handle, status)
        if good != ROUND:
            raise RuntimeError(f"{name}: {ROUND - good} of {ROUND} chains did not come back as they must")

    def published(self, batch: int) -> list[tuple[int, int]]:
        """Lay out a round; what to store, and where, to publish each batch."""
        self.lib.ring_refill(self.handle, ROUND, batch)
        n = ROUND // batch
        at = self.lib.ring_publish_at(self.handle)[:n]
        return list(zip(at, self.lib.ring_publish_values(self.handle)[:n], strict=True))

    def queue(self) -> DeviceQueue:
        base = GUEST_BASE + self.offset
        queue = DeviceQueue(
            self.arena.memory, NUM, base, base + AVAIL, base + USED, packed=self.packed, event_idx=True
        )
        queue.budget = 2 * ROUND
        return queue


# ---------------------------------------------------------------- the devices in Python
#
# Each gives a function that is timed as a whole: for every batch, publish it and serve it.

Batches = list[tuple[int, int]]
Timed = Callable[[Batches], None]


def nothing(ring: Ring) -> Timed:
    words = ring.words

    def run(batches: Batches) -> None:
        for at, value in batches:
            words[at] = value

    return run


def iterate(ring: Ring) -> Timed:
    words, queue = ring.words, ring.queue()

    def run(batches: Batches) -> None:
        push = queue.push
        for at, value in batches:
            words[at] = value
            for chain in queue:
                push(chain, WRITTEN)

    return run


def batched(ring: Ring) -> Timed:
    words, queue = ring.words, ring.queue()

    def run(batches: Batches) -> None:
        lengths = [WRITTEN] * (ROUND // len(batches))
        for at, value in batches:
            words[at] = value
            chains = queue.pop_batch(ROUND)
            queue.push_batch(chains, lengths)

    return run


def full_request(ring: Ring) -> Timed:
    words, queue = ring.words, ring.queue()
    ok, unsupported = 0, 2

    def run(batches: Batches) -> None:
        for at, value in batches:
            words[at] = value
            for chain in queue:
                kind, _, sector = chain.unpack(HEADER)  # wherever the driver cut it in pieces
                chain.finish(ok if kind == 0 and sector < 1 << 20 else unsupported, DATA)

    return run


def plain(ring: Ring) -> Timed:
    words = ring.words
    memory = ring_python.Memory([(r.guest_addr, memoryview(r)) for r in ring.arena.regions])
    kind = ring_python.PackedRing if ring.packed else ring_python.SplitRing
    device = kind(memory, NUM, ring.desc, ring.avail, ring.used)

    def handle(readable: list[memoryview], writable: list[memoryview]) -> int:
        return WRITTEN

    def run(batches: Batches) -> None:
        for at, value in batches:
            words[at] = value
            device.serve(handle)

    return run


PYTHON = {ITERATE: iterate, BATCH: batched, REQUEST: full_request, PLAIN: plain}


# ---------------------------------------------------------------- measuring


def c_case(ring: Ring, idle: Ring, name: str) -> Callable[[int], float]:
    """Per chain, with the cost of clock and publishing measured beside it and taken off."""
    lib, handle = ring.lib, ring.handle
    rounds = max(1, SAMPLE_NS // (GUESS[name] * ROUND))
    idle_rounds = max(1, rounds // 4)
    engine = name in (ENGINE, ENGINE_BATCH)
    if engine and (error := lib.ring_engine_new(handle)):
        raise OSError(-error, os.strerror(-error))

    def measure(batch: int) -> float:
        empty = lib.ring_floor_run(idle.handle, False, idle_rounds, ROUND, batch) / idle_rounds
        if engine:
            total = lib.ring_engine_run(handle, name == ENGINE_BATCH, rounds, ROUND, batch)
        else:
            total = lib.ring_floor_run(handle, True, rounds, ROUND, batch)
        ring.check(False, name)
        return float(total / rounds - empty) / ROUND

    return measure


def foreign_case(ring: Ring, idle: Ring, peer: ctypes.CDLL) -> Callable[[int], float]:
    """libvhost-user: as c_case, with its code in a library of its own."""
    lib, arena = ring.lib, ring.arena
    rounds = max(1, SAMPLE_NS // (GUESS[LIBVHOST_USER] * ROUND))
    idle_rounds = max(1, rounds // 4)
    host = arena.regions[0].host_addr + ring.offset
    device = peer.ring_libvhost_new(
        ctypes.addressof(arena.c_regions), arena.nregions, NUM, host, host + AVAIL, host + USED
    )
    serve = ctypes.cast(peer.ring_libvhost_serve, ctypes.c_void_p)

    def measure(batch: int) -> float:
        empty = lib.ring_floor_run(idle.handle, False, idle_rounds, ROUND, batch) / idle_rounds
        total = lib.ring_run(ring.handle, serve, device, rounds, ROUND, batch)
        ring.check(False, LIBVHOST_USER)
        return float(total / rounds - empty) / ROUND

    return measure


def python_case(ring: Ring, idle: Ring, name: str) -> Callable[[int], float]:
    rounds = max(1, SAMPLE_NS // (GUESS[name] * ROUND))
    run, do_nothing = PYTHON[name](ring), nothing(idle)
    clock = time.perf_counter_ns

    def timed(function: Timed, batches: Batches) -> int:
        start = clock()
        function(batches)
        return clock() - start

    def measure(batch: int) -> float:
        empty = min(timed(do_nothing, idle.published(batch)) for _ in range(3))
        total = sum(timed(run, ring.published(batch)) for _ in range(rounds))
        ring.check(name == REQUEST, name)
        return float(total / rounds - empty) / ROUND

    return measure


def make_cases(suite: Suite, lib: ctypes.CDLL, regions: tuple[int, ...], batches: tuple[int, ...]) -> Cases:
    cases: Cases = {}
    peer = libvhost_user("ring_libvhost", harness.HERE / "ring_libvhost.c")
    if isinstance(peer, str):
        suite.leave_out(LIBVHOST_USER, peer)
    else:
        pointer, u32 = ctypes.c_void_p, ctypes.c_uint32
        harness.declare(peer, ("ring_libvhost_new", pointer, pointer, u32, u32, pointer, pointer, pointer))
    for nregions in regions:
        arena = Arena(nregions, len(FORMATS) * (len(CASES) + 1))
        for form in FORMATS:
            idle = Ring(lib, arena, form == "packed")
            for name in CASES:
                ring = Ring(lib, arena, form == "packed")
                if name == LIBVHOST_USER:
                    if isinstance(peer, str) or ring.packed:
                        continue  # it knows split rings only
                    measure = foreign_case(ring, idle, peer)
                else:
                    measure = (python_case if name in PYTHON else c_case)(ring, idle, name)
                for batch in batches:
                    case = Case(name, cell(format=form, regions=nregions, batch=batch))
                    cases[case] = functools.partial(measure, batch)

    # Cases and region counts side by side: the ratios that count are between neighbours.
    def order(case: Case) -> tuple[object, ...]:
        axes = dict(case.cell)
        return axes["format"], axes["batch"], CASES.index(case.subject), axes["regions"]

    return {case: cases[case] for case in sorted(cases, key=order)}


def run(suite: Suite) -> None:
    regions = (1, 64, 509) if suite.quick else REGIONS
    batches = (1, 32) if suite.quick else BATCHES
    lib = build()
    harness.raise_fd_limit()
    with ExitStack() as stack:
        stack.enter_context(harness.pinned_to(harness.cores()[1]))
        cases = make_cases(suite, lib, regions, batches)
        cases |= harness.limit_cases(stack, limits.LINE, limits.SYSCALL, limits.COPY_4K)
        suite.interleave(cases, NS, 9 if suite.quick else 15, budget=40 if suite.quick else 120)
