# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Where and beside whom we run: cores, the scheduler's groups, what machine this is.

Knows processes and CPUs. Does not know what is measured on them.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

CHILD = "PYVHOST_BENCHMARK_CHILD"


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


_AVAILABLE = sorted(os.sched_getaffinity(0))


def cores() -> tuple[int, int]:
    """Two cores: for the client (or the only process) and for the back-end. Those that there were
    when we started: whoever is pinned just now still means the same two."""
    return _AVAILABLE[0], _AVAILABLE[1 % len(_AVAILABLE)]


def cpu_seconds(pid: int) -> float:
    """User and system time of a whole process, threads that ended included, to the nanosecond:
    its CPU-time clock, named as clock_getcpuclockid(3) does."""
    return time.clock_gettime((~pid << 3) | 2)


def voluntary_switches(pid: int) -> int:
    """How often the threads of a process went to sleep by themselves, which is how often they were awake."""
    total = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        for line in status.read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches:"):
                total += int(line.split()[1])
    return total


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

        def pass_on(number: int, frame: object) -> None:  # a terminal's signals do not reach another session
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGINT)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, pass_on)
        return child.wait()


def describe() -> dict[str, Any]:
    """What a reader of the figures has to know of the machine; the load is that of the moment."""
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
        "cores": len(_AVAILABLE),
        "kernel": platform.release(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "compiler": compiler,
        "load": round(os.getloadavg()[0], 2),
        "autogroup": autogroup,
    }
