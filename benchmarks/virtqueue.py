# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The workloads of the benchmark that rust-vmm's virtio-queue has of its own, for four ring libraries.

128 descriptors in a split ring of 256: walked as one chain, as 128 chains of one, as the same in indirect
tables; and 128 used elements. Its benchmark iterates and counts. Ours and libvhost-user pop, which checks and
translates every buffer, too, so what they do there is more.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from benchmarks import harness, limits
from benchmarks.facts import BATCH, ENGINE, LIBVHOST_USER, RUST, RUST_LTO
from benchmarks.harness import HERE, NS, Case, Cases, Suite, Table, again, cell
from benchmarks.virtqueue_peers import libvhost_user, virtio_queue
from vhost.memory import GuestMemory, Region
from vhost.virtqueue import DeviceQueue

TITLE = (
    "128 descriptors in a split ring of 256, once through: the workloads of virtio-queue's own benchmark. "
    "It counts descriptors; the others check and translate every buffer, too."
)
TABLES = (Table("128 descriptors", NS, rows=("workload",), columns=("subject",)),)

DESCRIPTORS = 128
WRITTEN = 0x1000
NUM = 256
GUEST, SIZE = 1 << 32, 4 << 20
DESC, AVAIL, USED = 0x1000, 0x2000, 0x3000
ROUNDS = 200  # a sample


@dataclass(frozen=True)
class Workload:
    name: str
    chains: int
    length: int
    indirect: bool = False
    push: str = ""  # how used elements are published, where that is what is measured


WORKLOADS = (
    Workload("one chain of 128", 1, 128),
    Workload("128 chains of 1", 128, 1),
    Workload("one indirect chain of 128", 1, 128, True),
    Workload("128 indirect chains of 1", 128, 1, True),
    Workload("128 used, each published", 128, 1, push="each"),
    Workload("128 used, published together", 128, 1, push="together"),
)


class BenchMemory(ctypes.Structure):
    _fields_ = [
        ("host", ctypes.c_void_p),
        ("guest", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("desc", ctypes.c_uint64),
        ("avail", ctypes.c_uint64),
        ("used", ctypes.c_uint64),
        ("num", ctypes.c_uint32),
    ]


class BenchDriver(ctypes.Structure):
    _fields_ = [("refill", ctypes.c_void_p), ("driver", ctypes.c_void_p)]


class Rig:
    """One device's memory, and the driver that fills its ring."""

    def __init__(self, lib: ctypes.CDLL, workload: Workload) -> None:
        self.lib = lib
        self.region = Region.allocate(SIZE, guest_addr=GUEST)
        self.memory = BenchMemory(self.region.host_addr, GUEST, SIZE, DESC, AVAIL, USED, NUM)
        where = ctypes.byref(self.memory)
        self.handle = lib.driver_new(where, workload.chains, workload.length, workload.indirect)
        self.driver = BenchDriver(ctypes.cast(lib.driver_refill, ctypes.c_void_p), self.handle)

    def refill(self) -> None:
        self.lib.driver_refill(self.handle)

    def check(self, who: str, workload: Workload) -> None:
        good = self.lib.driver_check(self.handle)
        if good != workload.chains:
            raise RuntimeError(f"{who}, {workload.name}: {workload.chains - good} chains did not come back")


def declare_device(lib: ctypes.CDLL, name: str) -> ctypes.CDLL:
    pointer, u32, u64, flag = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_bool
    return harness.declare(
        lib,
        (f"{name}_new", pointer, ctypes.POINTER(BenchMemory)),
        (f"{name}_delete", None, pointer),
        (f"{name}_walk", u64, pointer, BenchDriver, u32, ctypes.POINTER(u64)),
        (f"{name}_push", u64, pointer, BenchDriver, u32, flag),
    )


def build() -> ctypes.CDLL:
    """The driver and csrc."""
    sources = [HERE / "virtqueue_driver.c", HERE / "virtqueue_engine.c", *harness.rings()]
    lib = declare_device(harness.library("virtqueue", sources), "engine")
    pointer, u32 = ctypes.c_void_p, ctypes.c_uint32
    return harness.declare(
        lib,
        ("driver_new", pointer, ctypes.POINTER(BenchMemory), u32, u32, ctypes.c_bool),
        ("driver_refill", None, pointer),
        ("driver_check", u32, pointer),
    )


def c_case(rig: Rig, lib: ctypes.CDLL, name: str, who: str, workload: Workload) -> Callable[[], float]:
    """A device of the shape of virtqueue_bench.h; ns for the 128 descriptors."""
    device = getattr(lib, f"{name}_new")(ctypes.byref(rig.memory))
    if not device:
        raise RuntimeError(f"{who} cannot be set up")
    walk, push = getattr(lib, f"{name}_walk"), getattr(lib, f"{name}_push")
    seen = ctypes.c_uint64()

    def measure() -> float:
        if workload.push:
            total = push(device, rig.driver, ROUNDS, workload.push == "together")
        else:
            total = walk(device, rig.driver, ROUNDS, ctypes.byref(seen))
            if seen.value != ROUNDS * DESCRIPTORS:
                raise RuntimeError(
                    f"{who}, {workload.name}: {seen.value} descriptors, {ROUNDS} times 128 are there"
                )
        if name != "rust" or workload.push:  # its iterator gives nothing back
            rig.check(who, workload)
        return float(total / ROUNDS)

    return measure


def python_case(rig: Rig, workload: Workload) -> Callable[[], float]:
    queue = DeviceQueue(GuestMemory([rig.region]), NUM, GUEST + DESC, GUEST + AVAIL, GUEST + USED)
    lengths = [WRITTEN] * workload.chains
    clock = time.perf_counter_ns

    def measure() -> float:
        total = 0
        for _ in range(ROUNDS // 4):
            rig.refill()
            start = clock()
            chains = queue.pop_batch(DESCRIPTORS)
            popped = clock()
            queue.push_batch(chains, lengths)
            pushed = clock()
            total += pushed - popped if workload.push else popped - start
            size = sum(chain.writable_len for chain in chains)
            if size != DESCRIPTORS * WRITTEN:
                raise RuntimeError(f"{BATCH}, {workload.name}: {size} bytes")
            # Nobody holds them: the queue may use them again.
            chains.clear()
        rig.check(BATCH, workload)
        return total / (ROUNDS // 4)

    return measure


def run(suite: Suite) -> None:
    lib = build()
    devices = {ENGINE: (lib, "engine"), again(ENGINE): (lib, "engine")}
    for who, name, found in (
        (LIBVHOST_USER, "libvhost", libvhost_user("virtqueue_libvhost", HERE / "virtqueue_libvhost.c")),
        (RUST, "rust", virtio_queue("release")),
        (RUST_LTO, "rust", virtio_queue("lto")),
    ):
        if isinstance(found, str):
            suite.leave_out(who, found)
        else:
            devices[who] = declare_device(found, name), name
    cases: Cases = {}
    with ExitStack() as stack:
        stack.enter_context(harness.pinned_to(harness.cores()[1]))
        for workload in WORKLOADS:
            here = cell(workload=workload.name)
            for who, (library, name) in devices.items():
                cases[Case(who, here)] = c_case(Rig(lib, workload), library, name, who, workload)
            if workload.push != "each":  # of the batch API there is nothing to publish one by one
                cases[Case(BATCH, here)] = python_case(Rig(lib, workload), workload)
        cases |= harness.limit_cases(stack, limits.COPY_2K, limits.LINE)
        suite.interleave(cases, NS, 9 if suite.quick else 21, budget=20 if suite.quick else 60)
    suite.note("a descriptor is 16 bytes: the limit is one copy of what has to be read")
