# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The physical limits of this machine, measured among the cases of each suite, and how far we are from them.

`cases(...)` gives limits to be measured in turns with the rest; `DISTANCES` is the table of what is
compared with which of them. What a limit is: steps that cannot be left out, done with nothing around them.
"""

from __future__ import annotations

import ctypes
import functools
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from benchmarks import compile, machine
from benchmarks.facts import (
    BATCH,
    BLK,
    CONTRIB,
    DPDK,
    ENGINE,
    FILE,
    IOCTL,
    ITERATE,
    METHOD,
    NULL,
    OURS,
    QSD,
    ROW,
)
from benchmarks.samples import KIOPS, MPPS, NAN, NS, US, Samples, Unit
from benchmarks.suite import LIMIT, Axis, Case, Cases, Series, Suite

LINE = "a cache line to the other core and back"
EVENTFD = "an eventfd wakes the other core, and back"
SOCKET = "a 20-byte message on a socket to the other core, and back"
SYSCALL = "a bare system call"
COPY_64, COPY_1500, COPY_2K, COPY_4K = (f"memcpy of {n} bytes" for n in (64, 1500, 2048, 4096))
COPY_RAM = "memcpy of 1 MiB, from and to RAM"
PREAD, PWRITE = "pread of 4 KiB on tmpfs", "pwrite of 4 KiB on tmpfs"

CACHED = 256 << 10  # two pools of this size stay in the second-level cache or near it
RAM = 256 << 20
FILE_BLOCKS = 16 << 10  # 64 MiB

Step = Callable[[int], int]


@functools.cache
def _library() -> ctypes.CDLL:
    u32, u64, fd, flag = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int, ctypes.c_bool
    return compile.declare(
        compile.library("limits", [compile.HERE / "limits.c"]),
        ("limit_memcpy", u64, u32, u32, u32),
        ("limit_syscall", u64, u32),
        ("limit_file", u64, u32, fd, u32, u32, flag),
        ("limit_line", u64, u32, fd),
        ("limit_eventfd", u64, u32, fd),
        ("limit_socket", u64, u32, fd, u32),
    )


def _tmpfs(stack: ExitStack) -> int:
    file = stack.enter_context(tempfile.TemporaryFile(dir="/dev/shm"))  # noqa: SIM115
    for _ in range(FILE_BLOCKS * 4096 >> 20):
        file.write(os.urandom(1 << 20))
    file.flush()
    return file.fileno()


def _steps(stack: ExitStack, names: tuple[str, ...]) -> dict[str, tuple[Step, int]]:
    """Each limit, and how many of it make a sample of about a millisecond."""
    lib = _library()

    def other() -> int:  # the core that the caller is not on
        here = os.sched_getaffinity(0)
        return next(core for core in reversed(machine.cores()) if core not in here or len(here) > 1)

    file = _tmpfs(stack) if {PREAD, PWRITE} & set(names) else -1
    steps: dict[str, tuple[Step, int]] = {
        LINE: (lambda n: lib.limit_line(n, other()), 5000),
        EVENTFD: (lambda n: lib.limit_eventfd(n, other()), 200),
        SOCKET: (lambda n: lib.limit_socket(n, other(), 20), 200),
        SYSCALL: (lib.limit_syscall, 5000),
        COPY_RAM: (lambda n: lib.limit_memcpy(n, 1 << 20, RAM), 64),
        PREAD: (lambda n: lib.limit_file(n, file, 4096, FILE_BLOCKS, False), 2000),
        PWRITE: (lambda n: lib.limit_file(n, file, 4096, FILE_BLOCKS, True), 2000),
    }

    def copy(size: int) -> Step:
        return lambda n: int(lib.limit_memcpy(n, size, CACHED))

    for name, size in ((COPY_64, 64), (COPY_1500, 1500), (COPY_2K, 2048), (COPY_4K, 4096)):
        steps[name] = copy(size), 10000
    return steps


def cases(stack: ExitStack, *names: str) -> Cases:
    """Cases to put among those of a suite. The caller is pinned to one of `machine.cores()`; what needs
    another thread has it on the other."""
    found: Cases = {}
    steps = _steps(stack, names)
    for name in names:
        step, rounds = steps[name]

        def measure(step: Step = step, rounds: int = rounds, name: str = name) -> float:
            total = step(rounds)
            if not total:
                raise RuntimeError(f"{name} cannot be measured here")
            return total / rounds

        found[Case(LIMIT + name)] = measure
    return found


@dataclass(frozen=True)
class Distance:
    """What a subject pays for one operation, beside the limits that add up to the least of it."""

    suite: str
    subjects: tuple[str, ...]
    unit: Unit
    limits: tuple[str, ...]
    where: Mapping[str, Axis] = field(default_factory=dict)
    on_top: bool = False  # what was measured does not contain the limit, and is paid besides


def _file(kind: str, step: str) -> tuple[Distance, ...]:
    def row(limits: tuple[str, ...], wait: str, depth: int) -> Distance:
        where: dict[str, Axis] = {"device": FILE, "kind": kind, "wait": wait, "depth": depth}
        return Distance("block", (OURS, CONTRIB, QSD), KIOPS, limits, where)

    return row((EVENTFD, step), "event", 1), row((LINE, step), "poll", 1), row((step,), "poll", 32)


_NULL = {"device": NULL, "kind": "randread"}
DISTANCES = (
    # One core has both sides there. A chain that comes alone costs a line to fetch and one to answer, too.
    Distance("ring", (ENGINE, ITERATE), NS, (LINE,), {"regions": 1, "batch": 1}, on_top=True),
    Distance("virtqueue", (ENGINE, BATCH), NS, (COPY_2K,)),
    Distance("block", (OURS, QSD), KIOPS, (EVENTFD,), {**_NULL, "wait": "event", "depth": 1}),
    Distance("block", (OURS, QSD), KIOPS, (LINE,), {**_NULL, "wait": "poll", "depth": 1}),
    Distance("block", (OURS, QSD), KIOPS, (LINE,), {**_NULL, "wait": "poll", "depth": 32}),
    *_file("randread", PREAD),
    *_file("randwrite", PWRITE),
    Distance("net", (OURS, DPDK), MPPS, (COPY_64,), {"size": 64}),
    Distance("net", (OURS, DPDK), MPPS, (COPY_1500,), {"size": 1500}),
    Distance("net", (OURS, DPDK), MPPS, (LINE,), {"size": 64, "direction": "loop"}),
    Distance("session", (BLK,), US, (SOCKET,), {"what": "GET_FEATURES", "placement": "two cores"}),
    Distance("kernel", (IOCTL, ROW, METHOD), US, (SYSCALL,), {"ioctl": "VHOST_GET_FEATURES"}),
)


@dataclass(frozen=True)
class Far:
    """One subject beside its limit, in nanoseconds an operation."""

    what: str
    ours: float
    limit: float
    of: str

    @property
    def times(self) -> float:
        return self.ours / self.limit if self.limit else NAN

    def as_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "ns": self.ours,
            "limit_ns": self.limit,
            "of": self.of,
            "times": self.times,
        }


def distances(suite: Suite) -> list[Far]:
    """The rows of the table that this suite has the figures for."""
    measured = {s.subject.removeprefix(LIMIT): s.samples for s in suite.series if s.subject.startswith(LIMIT)}
    found = []
    for row in DISTANCES:
        if row.suite != suite.name or not all(name in measured for name in row.limits):
            continue
        limit = sum(measured[name].median() for name in row.limits)
        for subject in row.subjects:
            for series in suite.find(row.unit, subject, row.where):
                ours = row.unit.ns(series.samples.median()) + (limit if row.on_top else 0)
                found.append(Far(_name(subject, series), ours, limit, " + ".join(row.limits)))
    return found


def _name(subject: str, series: Series) -> str:
    axes = [f"{name} {value}" if isinstance(value, int) else str(value) for name, value in series.cell]
    return ", ".join([subject, *axes])


def bandwidth(values: Samples) -> float:
    """GB a second, of COPY_RAM."""
    return (1 << 20) / values.median()
