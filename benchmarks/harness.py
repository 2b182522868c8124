# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""How to measure: samples between calibration loops, interleaved repeats, paired ratios, tables.

Knows nothing of rings, disks or sockets: the three suites bring the cases, this file decides which
samples count and what is printed of them.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHILD = "PYVHOST_BENCHMARK_CHILD"


# ---------------------------------------------------------------- where and beside whom we run


def autogroup_first(pid: int | str = "self") -> bool:
    """Ask the scheduler to prefer the session of `pid`.

    `nice` works only within an autogroup (one per session), so a process that is to be measured
    has a session of its own, and the session gets the niceness.
    """
    try:
        Path(f"/proc/{pid}/autogroup").write_text("-20")
    except OSError:
        return False
    return True


def pin(cores: Iterable[int]) -> None:
    with contextlib.suppress(OSError):  # not ours to use any more: then it runs where it may
        os.sched_setaffinity(0, cores)


@contextlib.contextmanager
def pinned_to(core: int) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    pin([core])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cores() -> tuple[int, int]:
    """Two cores: for the client (or the only process) and for the back-end."""
    available = sorted(os.sched_getaffinity(0))
    return available[0], available[1 % len(available)]


def raise_fd_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def in_own_session(argv: Sequence[str]) -> int | None:
    """Run ourselves again in a session of our own: its exit status, or None in the session itself."""
    if os.environ.get(CHILD):
        return None
    env = dict(os.environ, **{CHILD: "1"})
    command = [sys.executable, "-m", "benchmarks", *argv]
    with subprocess.Popen(command, env=env, start_new_session=True) as child:
        autogroup_first(child.pid)
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:  # the terminal's signal does not reach another session
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGINT)


def machine() -> dict[str, Any]:
    model = ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    compiler = autogroup = ""
    with contextlib.suppress(OSError):
        autogroup = Path("/proc/self/autogroup").read_text().strip()
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(["gcc", "--version"], capture_output=True, text=True, check=True)
        compiler = done.stdout.splitlines()[0]
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "compiler": compiler,
        "load": round(os.getloadavg()[0], 2),
        "autogroup": autogroup,
    }


# ---------------------------------------------------------------- samples


@dataclass
class Samples:
    """What one case gave, one value a round; nan where a round failed."""

    values: list[float] = field(default_factory=list)
    noisy: int = 0  # taken although the machine was never quiet enough

    def median(self) -> float:
        return statistics.median(self.values) if self.values else float("nan")

    def spread(self) -> float:
        """Median absolute deviation, as a fraction of the median."""
        middle = self.median()
        if not self.values or not middle:
            return float("nan")
        return statistics.median(abs(value - middle) for value in self.values) / middle

    def as_json(self) -> dict[str, Any]:
        if not self.values:
            return {"n": 0}
        return {
            "n": len(self.values),
            "median": self.median(),
            "min": min(self.values),
            "max": max(self.values),
            "mad": self.spread(),
            "noisy": self.noisy,
        }


def ratio(ours: Samples, theirs: Samples) -> Samples:
    """Paired by round, so that what slowed both down in that round cancels out."""
    pairs = zip(ours.values, theirs.values, strict=False)
    return Samples([a / b for a, b in pairs if b], ours.noisy + theirs.noisy)


class Calibration:
    """A loop of known cost. A sample counts when the loop before and the loop after it ran within
    `tolerance` of the loop's best, that is, when nothing else had the core or its caches.

    The best is that of the last few hundred loops, because the clock frequency drifts by more than
    the tolerance; `drift` from the best ever is what we put down to that.
    """

    def __init__(self, tolerance: float = 0.10, drift: float = 0.30, tries: int = 8) -> None:
        self.tolerance, self.drift = tolerance, drift
        self.tries = tries
        self.recent = deque((self._loop() for _ in range(256)), maxlen=256)
        self.best = min(self.recent)
        self.taken = self.rejected = 0

    @staticmethod
    def _loop() -> int:
        start = time.perf_counter_ns()
        total = 0
        for i in range(2000):
            total += i
        return time.perf_counter_ns() - start

    def quiet(self) -> bool:
        cost = self._loop()
        self.recent.append(cost)
        self.best = min(self.best, cost)
        return cost <= min(min(self.recent) * (1 + self.tolerance), self.best * (1 + self.drift))

    def sample(self, measure: Callable[[], float], into: Samples) -> None:
        value = float("inf")
        for _ in range(self.tries):
            before = self.quiet()
            attempt = measure()
            if before & self.quiet():
                self.taken += 1
                into.values.append(attempt)
                return
            self.rejected += 1
            value = min(value, attempt)
        # Never quiet: the best attempt, marked, rather than a hole that would shift the pairs.
        into.values.append(value)
        into.noisy += 1


def interleave(
    cases: dict[Any, Callable[[], float]],
    rounds: int,
    calibration: Calibration | None = None,
    *,
    budget: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Any, Samples]:
    """A, B, C, A, B, C, ...: `rounds` values of each case, fewer (at least 3) when the budget is spent."""
    results = {key: Samples() for key in cases}
    start = time.monotonic()
    for done in range(rounds):
        if budget is not None and done >= 3 and time.monotonic() - start > budget:
            break
        for key, measure in cases.items():
            if calibration is None:
                results[key].values.append(measure())
            else:
                calibration.sample(measure, results[key])
        if progress is not None:
            progress(done + 1, rounds)
    return results


def show_progress(name: str) -> Callable[[int, int], None]:
    def progress(done: int, rounds: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == rounds else ""
            print(f"\r{name}: round {done} of {rounds}", end=end, file=sys.stderr, flush=True)

    return progress


# ---------------------------------------------------------------- aims


@dataclass(frozen=True)
class Aim:
    """`what` shall be at most (or at least) `limit`. Printed next to the measured value."""

    what: str
    limit: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def row(self, samples: Samples) -> list[str]:
        value = samples.median()
        bound = f"{'>=' if self.at_least else '<='} {self.limit:g}"
        if value != value:
            return [self.what, bound, "-", "", "not measured"]
        low, high = min(samples.values), max(samples.values)
        verdict = "met" if self.met(value) else "NOT MET"
        return [self.what, bound, f"{value:.2f}", f"{low:.2f}-{high:.2f}", verdict]

    def as_json(self, samples: Samples) -> dict[str, Any]:
        value = samples.median()
        return {
            "what": self.what,
            "limit": self.limit,
            "at_least": self.at_least,
            "ratio": samples.as_json(),
            "met": self.met(value) if value == value else None,
        }


AIM_HEADERS = ["aim (median of paired ratios)", "limit", "measured", "min-max", ""]


# ---------------------------------------------------------------- printing


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> str:
    """Plain text: the first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = zip(cells[1:], widths[1:], strict=True)
        return "  ".join([first, *(cell.rjust(width) for cell, width in rest)])

    out = [title] if title else []
    out += [line(headers), "  ".join("-" * width for width in widths)]
    out += [line(row).rstrip() for row in rows]
    return "\n".join(out) + "\n"


def number(value: float) -> str:
    if value != value:
        return "-"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
