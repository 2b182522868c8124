# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a process holds that must not grow: descriptors, mappings of files, threads."""

from __future__ import annotations

import gc
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Holdings:
    fds: dict[int, str]
    maps: Counter[str]
    threads: frozenset[str]

    def __sub__(self, before: Holdings) -> str:
        """What is here and was not there, in words; empty if nothing."""
        parts = [f"fd {fd} -> {name}" for fd, name in self.fds.items() if fd not in before.fds] + [
            f"{count} x {line}" for line, count in (self.maps - before.maps).items()
        ]
        parts += [f"thread {task}" for task in self.threads - before.threads]
        return ", ".join(parts)


def open_fds() -> dict[int, str]:
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            found[int(entry)] = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:
            continue  # the descriptor by which the directory itself was listed
    return found


def shared_maps() -> Counter[str]:
    """Shared mappings and those of memfds. What the allocator maps privately comes and goes."""
    found: Counter[str] = Counter()
    for line in Path("/proc/self/maps").read_text().splitlines():
        _range, perms, _offset, device, inode, *name = line.split(maxsplit=5)
        if perms.endswith("s") or (name and name[0].startswith("/memfd:")):
            # Some kernels number anonymous inodes: one like the other is no leak.
            which = "anonymous" if name and name[0].startswith("anon_inode:") else f"{device}:{inode}"
            found[f"{perms} {which} {' '.join(name)}"] += 1
    return found


def holdings() -> Holdings:
    tasks = os.listdir("/proc/self/task")
    return Holdings(open_fds(), shared_maps(), frozenset(tasks))


@contextmanager
def no_leaks() -> Iterator[None]:
    """Nothing that the block opened, mapped or started outlives it."""
    gc.collect()  # so that older garbage does not go away in the meantime
    before = holdings()
    yield
    if holdings() - before:
        gc.collect()
    # The kernel may list a thread for an instant after it was joined.
    deadline = time.monotonic() + 5
    while holdings().threads - before.threads and time.monotonic() < deadline:
        os.sched_yield()
    after = holdings()
    assert not after - before, f"leaked: {after - before}"
    assert not before - after, f"lost: {before - after}"
