# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""4 KiB random I/O through three vhost-user-blk back-ends, driven by one client that nobody here wrote.

Back-ends: `python -m vhost serve blk`, qemu-storage-daemon in the best of its modes (found out by a
short pilot), QEMU's contrib/vhost-user-blk. Client: libblkio's example blkio-bench, one queue. The
client is on one core, the back-end on the other. The file is on tmpfs, so that what is compared is
the back-ends and not a disk; contrib/vhost-user-blk has no null device and is compared on the file only.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import harness, limits
from benchmarks.block_client import best_qsd, build_client, run_client
from benchmarks.block_peers import Backend, contrib, missing, ours, qsd_modes
from benchmarks.facts import CONTRIB, FILE, NULL, OURS, QSD
from benchmarks.harness import CPU_US, KIOPS, NS, Case, Samples, Suite, Table, again, cell
from vhost.drivers import Blk
from vhost.user.frontend import Frontend

DEPTHS = (1, 32, 128)
WAITS = ("event", "poll")
KINDS = ("randread", "randwrite")
FILE_BYTES = 256 << 20
# The control is in these cells only: a run of each costs as much as any other.
CONTROL = (("randread", "event", 1), ("randread", "poll", 32))

TITLE = (
    "4 KiB random I/O from libblkio's own client, one queue, on a core of its own, through back-ends on the "
    "other: a device that does nothing, and a file on tmpfs."
)
TABLES = tuple(
    Table(
        f"{device}: {what}",
        unit,
        rows=("kind", "wait", "depth"),
        columns=("subject",),
        where={"device": device},
    )
    for device in (NULL, FILE)
    for what, unit in (("I/O", KIOPS), ("CPU of the back-end", CPU_US))
)

__all__ = ["Backend", "make_file", "qsd_modes", "run", "verify"]


def make_file(folder: Path) -> Path:
    file = folder / "disk"
    with file.open("wb") as disk:
        for _ in range(FILE_BYTES >> 20):
            disk.write(os.urandom(1 << 20))
    return file


def verify(backend: Backend, file: Path) -> None:
    """What it reads is in the file, and what is written to it gets there: at places all over it."""
    if backend.once:
        backend.start()
    places = random.Random(4096)
    with file.open("rb") as disk, Frontend.connect(backend.path) as frontend, Blk(frontend) as blk:
        for i in range(64):
            at = places.randrange(FILE_BYTES >> 12) << 12
            if i % 2:
                data = places.randbytes(4096)
                blk.write(at >> 9, data)
            disk.seek(at)
            expected = disk.read(4096)
            got = bytes(blk.read(sector=at >> 9, count=8))
            if got != expected or (i % 2 and got != data):
                raise RuntimeError(f"{backend.name} gives wrong data at {at:#x}")
    if backend.once:
        backend.stop()


def participants(suite: Suite, device: str, program: Path, scratch: Path, file: Path) -> Iterator[Backend]:
    """Who takes part, not started."""
    yield Backend(OURS, ours(device, file), scratch / f"ours-{device[0]}")
    if why := missing("qsd"):
        suite.leave_out(QSD, why)
    else:
        qsd, mode = best_qsd(program, device, file, scratch / f"qsd-{device[0]}", 100)
        if qsd is None:
            suite.leave_out(QSD, f"no mode of it works here on the {device}")
        else:
            suite.note(f"{device}: best mode of {QSD}: {mode}")
            yield qsd
    if device == NULL:
        suite.note(f"{CONTRIB} has no null device")
    elif why := missing("contrib-vhost-user-blk"):
        suite.leave_out(CONTRIB, why)
    else:
        yield Backend(CONTRIB, contrib(file), scratch / "contrib", once=True)


def run(suite: Suite) -> None:
    if why := missing("libblkio"):
        suite.skip(f"no client: {why}")
        return
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vhost-bench-")))
        shm = stack.enter_context(tempfile.TemporaryDirectory(prefix="vhost-bench-", dir="/dev/shm"))
        file = make_file(Path(shm))
        program = build_client(scratch)
        suite.progress(0, 1, "which mode of qemu-storage-daemon is best")
        found = {device: list(participants(suite, device, program, scratch, file)) for device in (NULL, FILE)}
        for backend in (backend for list_ in found.values() for backend in list_):
            stack.callback(backend.stop)
            if not backend.once:
                backend.start()
        for backend in found[FILE]:
            verify(backend, file)
        measure(suite, program, found)
        for backend in found[FILE]:  # and it still does
            verify(backend, file)
        stack.enter_context(harness.pinned_to(harness.cores()[0]))
        names = (limits.LINE, limits.EVENTFD, limits.PREAD, limits.PWRITE, limits.COPY_4K, limits.COPY_RAM)
        suite.interleave(harness.limit_cases(stack, *names), NS, 9, budget=10, doing="limits")


Result = dict[Case, Samples]


def measure(suite: Suite, program: Path, found: dict[str, list[Backend]]) -> None:
    """Two figures a run, so in turns by hand: the rate, and the back-end's CPU."""
    quick = suite.quick
    ms, rounds, budget = (150, 3, 60) if quick else (250, 7, 150)
    depths, kinds = ((1, 32), KINDS[:1]) if quick else (DEPTHS, KINDS)
    cells = [(d, k, w, n) for d in found for k in kinds for w in WAITS for n in depths]
    rates: Result = {}
    costs: Result = {}
    start = time.monotonic()
    for done in range(rounds):
        if done >= 3 and time.monotonic() - start > budget:
            break
        for i, (device, kind, wait, depth) in enumerate(cells):
            suite.progress(done * len(cells) + i, rounds * len(cells), device)
            runs = [(backend, backend.name) for backend in found[device]]
            if (kind, wait, depth) in CONTROL:
                runs.append((found[device][0], again(OURS)))
            # Every other round backwards, so that nobody always runs behind the same neighbour.
            for backend, name in runs if done % 2 == 0 else runs[::-1]:
                rate, cost = run_client(program, backend, depth, wait, kind, ms)
                case = Case(name, cell(device=device, kind=kind, wait=wait, depth=depth))
                rates.setdefault(case, Samples()).values.append(rate)
                costs.setdefault(case, Samples()).values.append(cost)
    suite.progress(rounds * len(cells), rounds * len(cells))
    for unit, results in ((KIOPS, rates), (CPU_US, costs)):
        for case, values in results.items():
            suite.add(unit, case, values)
