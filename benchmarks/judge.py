# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What the facts come to in one run: a ratio, its band and a verdict for each cell of each fact.

Pure: takes series and facts, prints nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks import samples
from benchmarks.facts import FACTS, Fact
from benchmarks.samples import INSIDE, MET, NO_LIMIT, NOT_MEASURED, NOT_MET, Samples
from benchmarks.suite import Cell, Series, Suite


@dataclass(frozen=True)
class Judged:
    """One fact in one cell."""

    cell: Cell
    values: Samples  # of the ratio, or of the figure itself
    band: float
    verdict: str

    @property
    def value(self) -> float:
        return self.values.median()

    @property
    def no_difference(self) -> bool:
        """The two sides cannot be told apart."""
        return abs(self.value - 1) <= self.band * self.value

    @property
    def name(self) -> str:
        return ", ".join(
            f"{name} {value}" if isinstance(value, int) else str(value) for name, value in self.cell
        )


@dataclass(frozen=True)
class Outcome:
    """One fact in all of its cells."""

    fact: Fact
    cells: tuple[Judged, ...]

    @property
    def verdict(self) -> str:
        if not self.cells:
            return NOT_MEASURED
        if self.fact.limit is None:
            return NO_LIMIT
        verdicts = {one.verdict for one in self.cells}
        # The worst cell decides, or the best one where one is enough.
        order = (MET, INSIDE, NOT_MET) if self.fact.some else (NOT_MET, INSIDE, MET)
        return next((verdict for verdict in order if verdict in verdicts), NOT_MEASURED)

    @property
    def telling(self) -> Judged | None:
        """The cell that decides: the farthest on the wrong side, or on the right one for `some`; without a
        limit the one farthest from 1."""
        if not self.cells:
            return None
        if self.fact.limit is None:
            return max(self.cells, key=lambda one: abs(math.log(one.value)) if one.value > 0 else math.inf)
        lowest = (self.fact.at_most is None) != self.fact.some
        return (min if lowest else max)(self.cells, key=lambda one: one.value)

    @property
    def summary(self) -> str:
        """The verdict, and in how many cells it is what."""
        if len(self.cells) < 2 or self.fact.limit is None:
            return self.verdict
        count = Counter(one.verdict for one in self.cells)
        if self.fact.some:
            return f"{self.verdict}: {count[MET]} of {len(self.cells)}"
        parts = [f"{count[v]} {v}" for v in (NOT_MET, INSIDE, MET) if count[v]]
        return parts[0].split(" ", 1)[1] if len(parts) == 1 else ", ".join(parts)

    def as_json(self) -> dict[str, Any]:
        return {
            "suite": self.fact.suite,
            "what": self.fact.what,
            "limit": self.fact.limit,
            "bound": self.fact.bound,
            "verdict": self.verdict,
            "cells": [
                {
                    "cell": dict(one.cell),
                    "value": one.value,
                    "band": one.band,
                    "verdict": one.verdict,
                    "inside_noise_of_1": one.no_difference,
                    **one.values.as_json(),
                }
                for one in self.cells
            ],
        }


def control_of(suite: Suite, series: Series) -> float:
    """How far a control is off 1: those of this very cell, or else the worst of the suite."""
    controls = [(s, pair) for s, pair in suite.controls() if s.unit.name == series.unit.name]
    controls = controls or suite.controls()
    here = [pair for s, pair in controls if s.cell == series.cell]
    return samples.control_error(here or [pair for _, pair in controls])


def _judge(fact: Fact, suite: Suite, over: Series, pair: Samples) -> Judged:
    value = pair.median()
    if fact.under is None:  # a count has no control
        width = 0.0 if not value else pair.error()
    else:
        width = samples.band(pair, control_of(suite, over))
    verdict = NO_LIMIT
    if fact.limit is not None:
        verdict = samples.verdict(value, fact.limit, at_least=fact.at_least is not None, band=width)
        # Zero is exact: at the limit is met.
        if fact.under is None and value == fact.limit:
            verdict = MET
    cell = tuple((name, value) for name, value in over.cell if name not in fact.where)
    return Judged(cell, pair, width, verdict)


def judge(suite: Suite, facts: Iterable[Fact] = FACTS) -> list[Outcome]:
    """The facts of this suite."""
    outcomes = []
    for fact in facts:
        if fact.suite != suite.name:
            continue
        cells = []
        for over in suite.find(fact.unit, fact.over, fact.where):
            if fact.under is None:
                cells.append(_judge(fact, suite, over, over.samples))
                continue
            beside = {**over.axes, **fact.beside}
            for under in suite.find(fact.unit, fact.under, beside):
                if len(under.cell) == len(over.cell):
                    cells.append(_judge(fact, suite, over, samples.ratio(over.samples, under.samples)))
        outcomes.append(Outcome(fact, tuple(cells)))
    return outcomes
