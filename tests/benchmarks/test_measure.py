# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The order in which samples are taken, and which of them count."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

from benchmarks import measure
from benchmarks.measure import Calibration, interleave
from benchmarks.samples import NS, US, Samples
from benchmarks.suite import LIMIT, Case, Suite


def test_cases_take_turns_and_every_other_round_goes_backwards() -> None:
    order: list[str] = []

    def case(name: str) -> Callable[[], float]:
        def measured() -> float:
            order.append(name)
            return float(len(order))

        return measured

    results = interleave({name: case(name) for name in "abc"}, 3)
    assert "".join(order) == "abccbaabc"
    # Values stay in the order of the rounds, so that they can be paired.
    assert results["a"].values == [1.0, 6.0, 7.0]


def test_the_budget_ends_it_but_never_before_three_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    hours = itertools.count(step=3600)
    monkeypatch.setattr(measure.time, "monotonic", lambda: next(hours))
    steps: list[tuple[int, int]] = []
    results = interleave({"a": lambda: 1.0}, 50, budget=1, progress=lambda *step: steps.append(step))
    assert results["a"].values == [1.0] * measure.LEAST_ROUNDS
    assert steps[-1] == (50, 50)


class Scripted(Calibration):
    """Loops of given cost, instead of real ones."""

    def __init__(self, costs: Iterator[int]) -> None:
        self.costs = costs
        super().__init__(tries=3)

    def _loop(self) -> int:  # type: ignore[override]
        return next(self.costs)


def test_a_sample_counts_when_it_was_quiet_before_and_after() -> None:
    costs = itertools.chain([100] * 256, [100, 150, 150, 100, 105, 109])
    calibration, into = Scripted(costs), Samples()
    attempts = iter([7.0, 8.0, 9.0])
    calibration.sample(lambda: next(attempts), into)
    assert into.values == [9.0]
    assert (calibration.taken, calibration.rejected, into.noisy) == (1, 2, 0)


def test_a_machine_that_is_never_quiet_leaves_no_hole() -> None:
    costs = itertools.chain([100] * 256, itertools.repeat(200))
    calibration, into = Scripted(costs), Samples()
    attempts = iter([7.0, 5.0, 9.0])
    calibration.sample(lambda: next(attempts), into)
    assert into.values == [5.0]
    assert (calibration.taken, calibration.rejected, into.noisy) == (0, 3, 1)


def test_limits_are_kept_in_nanoseconds_among_cases_of_any_unit() -> None:
    suite = Suite("s")
    cases = {Case("us"): lambda: 2.0, Case(f"{LIMIT}a step"): lambda: 3.0}
    suite.interleave(cases, US, 3, calibrate=False)
    assert {series.subject: series.unit for series in suite.series} == {"us": US, f"{LIMIT}a step": NS}
