# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""How to take samples: between calibration loops, in turns, within a budget of time.

Knows nothing of rings, disks or sockets, and nothing of what is made of the samples.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TypeVar

from benchmarks.samples import Samples

Key = TypeVar("Key")


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


LEAST_ROUNDS = 3


def interleave(
    cases: Mapping[Key, Callable[[], float]],
    rounds: int,
    calibration: Calibration | None = None,
    *,
    budget: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Key, Samples]:
    """A, B, C, A, B, C, ...: `rounds` values of each case, fewer (at least 3) when the budget of
    seconds is spent. `progress` is told the steps that were done and those that there are."""
    results = {key: Samples() for key in cases}
    steps, step = rounds * len(cases), 0
    start = time.monotonic()
    for done in range(rounds):
        if budget is not None and done >= LEAST_ROUNDS and time.monotonic() - start > budget:
            break
        # Every other round backwards, so that nobody always runs behind the same neighbour.
        order = list(cases.items())
        for key, measure in order if done % 2 == 0 else reversed(order):
            if calibration is None:
                results[key].values.append(measure())
            else:
                calibration.sample(measure, results[key])
            step += 1
            if progress is not None:
                progress(step, steps)
    if progress is not None:
        progress(steps, steps)
    return results
