# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What grows with queues and connections: the CPU that a back-end pays for a request. And what it does while
nobody asks it anything.

4 KiB random reads from a file on tmpfs, each checked; the clients are libblkio's example (queues) and one of
ours over libblkio (connections). The machine has two cores, which client and back-end share, so what is
compared is the CPU of a request and not the rate.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import harness, limits, machine
from benchmarks.block_client import build_client, link, run_client
from benchmarks.block_peers import Backend, missing, serve_blk
from benchmarks.facts import IDLE_CPU, IDLE_SWITCHES, OURS
from benchmarks.harness import COUNT, CPU_US, KIOPS, NS, US, Case, Samples, Suite, Table, again, cell

TITLE = (
    "4 KiB random reads of a file on tmpfs: from one and from two queues, from one and from a hundred "
    "connections; what a back-end does that has a hundred connections and nothing to do."
)
TABLES = (
    *(
        Table(f"{what}: {axis}", unit, rows=("load", axis), columns=("subject",))
        for axis in ("queues", "connections")
        for what, unit in (("CPU of the back-end", CPU_US), ("I/O", KIOPS))
    ),
    Table("idle, wake-ups in a second", COUNT, rows=("subject", "connections")),
    Table("idle, CPU in a second", US, rows=("subject", "connections")),
)
BLOCK, BLOCKS = 4096, 16 << 10  # 64 MiB
DEPTH = 32
MANY = 100
# A worker that polls gives up well before this; then it has to be asleep.
SETTLE, WATCH = 0.5, 1.0


def make_file(folder: Path) -> Path:
    """Each block begins with its number."""
    file = folder / "disk"
    file.write_bytes(b"".join(n.to_bytes(8, "little") + bytes(BLOCK - 8) for n in range(BLOCKS)))
    return file


class Connections:
    """The client, with its connections open."""

    def __init__(
        self, program: Path, backend: Backend, n: int, busy: int, depth: int, *, check: bool
    ) -> None:
        assert backend.process is not None
        self.pid = backend.process.pid
        words = (str(program), str(backend.path), str(n), str(busy), str(depth), str(BLOCKS), str(int(check)))
        self.client = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: harness.pin([harness.cores()[0]]),
        )
        harness.autogroup_first(self.client.pid)
        self._expect("ready")

    def _line(self) -> str:
        assert self.client.stdout is not None
        return self.client.stdout.readline().strip()

    def _expect(self, word: str) -> None:
        if (line := self._line()) != word:
            raise RuntimeError(f"scale_client: {line!r} instead of {word!r}, exit {self.client.wait(10)}")

    def run(self, ms: int) -> tuple[float, float]:
        """Thousand I/Os a second, and CPU microseconds of the back-end per I/O."""
        assert self.client.stdin is not None
        before, start = harness.cpu_seconds(self.pid), time.monotonic()
        self.client.stdin.write(f"{ms}\n")
        self.client.stdin.flush()
        line = self._line()
        used, took = harness.cpu_seconds(self.pid) - before, time.monotonic() - start
        if not line:
            raise RuntimeError(f"scale_client: exit {self.client.wait(10)}")
        return int(line) / took / 1e3, used * 1e6 / int(line)

    def idle(self) -> tuple[float, float]:
        """Voluntary context switches of the back-end's threads, and its CPU in microseconds, in a second."""
        time.sleep(SETTLE)
        switches, used = machine.voluntary_switches(self.pid), harness.cpu_seconds(self.pid)
        time.sleep(WATCH)
        return (
            (machine.voluntary_switches(self.pid) - switches) / WATCH,
            (harness.cpu_seconds(self.pid) - used) * 1e6 / WATCH,
        )

    def close(self) -> None:
        assert self.client.stdin is not None
        self.client.stdin.close()
        if self.client.wait(20):
            raise RuntimeError(f"scale_client: exit {self.client.returncode}")


@contextlib.contextmanager
def open_connections(program: Path, backend: Backend, n: int, busy: int, depth: int) -> Iterator[Connections]:
    connections = Connections(program, backend, n, busy, depth, check=True)
    try:
        yield connections
    finally:
        connections.close()


def run(suite: Suite) -> None:
    if why := missing("libblkio"):
        suite.skip(f"no client: {why}")
        return
    rounds, ms = (3, 150) if suite.quick else (9, 250)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vhost-bench-")))
        shm = stack.enter_context(tempfile.TemporaryDirectory(prefix="vhost-bench-", dir="/dev/shm"))
        harness.raise_fd_limit()
        file = make_file(Path(shm))
        example, program = (
            build_client(scratch),
            link(
                scratch / "scale_client", "-Wall", "-Wextra", "-Werror", str(harness.HERE / "scale_client.c")
            ),
        )
        queues, many = (
            Backend(OURS, serve_blk(file, *extra), scratch / f"ours{i}")
            for i, extra in enumerate((["--num-queues", "2"], ["--share"]))
        )
        for backend in (queues, many):
            stack.callback(backend.stop)
            backend.start(harness.cores() if backend is queues else None)
        for done in range(rounds):
            suite.progress(done, rounds, "queues")
            one_round(suite, example, program, queues, many, ms)
        stack.enter_context(harness.pinned_to(harness.cores()[0]))
        suite.interleave(
            harness.limit_cases(stack, limits.PREAD, limits.EVENTFD), NS, 9, budget=10, doing="limits"
        )


def one_round(suite: Suite, example: Path, program: Path, queues: Backend, many: Backend, ms: int) -> None:
    found: list[tuple[Case, float, float]] = []
    for n, name in ((1, OURS), (2, OURS), (1, again(OURS))):
        both = run_client(example, queues, DEPTH, "event", "randread", ms, threads=n, cores=harness.cores())
        found.append((Case(name, cell(load="queues, all busy", queues=n)), *both))
    # Less in flight on each of a hundred, so that it is some hundreds at once in both.
    for n, busy, load in (
        (1, 1, "one busy"),
        (MANY, 1, "one busy"),
        (1, 1, "all busy"),
        (MANY, MANY, "all busy"),
    ):
        depth = DEPTH if busy == 1 else 4
        with open_connections(program, many, n, busy, depth) as connections:
            both = connections.run(ms)
            found.append((Case(OURS, cell(load=f"connections, {load}", connections=n)), *both))
            if n == MANY and busy == 1:
                switches, used = connections.idle()
                keep(suite, COUNT, Case(IDLE_SWITCHES, cell(connections=n)), switches)
                keep(suite, US, Case(IDLE_CPU, cell(connections=n)), used)
    for case, rate, cost in found:
        keep(suite, KIOPS, case, rate)
        keep(suite, CPU_US, case, cost)


def keep(suite: Suite, unit: harness.Unit, case: Case, value: float) -> None:
    for series in suite.find(unit, case.subject, {}):
        if series.cell == case.cell:
            series.samples.values.append(value)
            return
    suite.add(unit, case, Samples([value]))
