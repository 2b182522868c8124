# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Arithmetic on repeats: medians, spread, paired ratios, and how far a ratio can be trusted.

Pure: no clock, no file. Everything that is printed as a verdict comes from here.

What noise is: a *control* measures the same thing twice under two names, and its ratio should be 1. How
far its median is off says what order, memory layout and drift do to a ratio, which more repeats do not
average out. The spread of the ratio itself says what chance does. The band is the sum of both.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

NAN = float("nan")
# A ratio is never trusted to better than this, however alike a few repeats happen to be.
LEAST_BAND = 0.01
# Of a normal distribution: the standard deviation from the MAD, and the median's error from that.
SIGMA_OF_MAD = 1.4826
MEDIAN_ERROR = 1.2533


@dataclass(frozen=True)
class Unit:
    """What a figure counts, and whether less or more of it is better. `ns` makes it nanoseconds an
    operation, so that it can stand beside a physical limit; None where that makes no sense."""

    name: str
    more_is_better: bool = False
    ns_of_one: float | None = None  # ns = value * this, or this / value where more is better

    def ns(self, value: float) -> float:
        if self.ns_of_one is None or not value:
            return NAN
        return self.ns_of_one / value if self.more_is_better else value * self.ns_of_one


NS = Unit("ns", ns_of_one=1.0)
US = Unit("us", ns_of_one=1e3)
KIOPS = Unit("thousand I/Os a second", more_is_better=True, ns_of_one=1e6)
CPU_US = Unit("CPU us an I/O", ns_of_one=1e3)
MPPS = Unit("million packets a second", more_is_better=True, ns_of_one=1e3)
KPPS = Unit("thousand a second", more_is_better=True, ns_of_one=1e6)
COUNT = Unit("a second")


@dataclass
class Samples:
    """What one case gave, one value a round; nan where a round failed."""

    values: list[float] = field(default_factory=list)
    noisy: int = 0  # taken although the machine was never quiet enough

    def median(self) -> float:
        return statistics.median(self.values) if self.values else NAN

    def spread(self) -> float:
        """Median absolute deviation, as a fraction of the median."""
        middle = self.median()
        if not self.values or not middle or math.isnan(middle):
            return NAN
        return statistics.median(abs(value - middle) for value in self.values) / abs(middle)

    def quartiles(self) -> tuple[float, float]:
        """The first and the third; the only value twice where there is one."""
        if len(self.values) < 2:
            return self.median(), self.median()
        first, _, third = statistics.quantiles(self.values, n=4, method="inclusive")
        return first, third

    def error(self) -> float:
        """Twice the standard error of the median, as a fraction of it; infinite for fewer than 3 values."""
        if len(self.values) < 3:
            return math.inf
        return 2 * MEDIAN_ERROR * SIGMA_OF_MAD * self.spread() / math.sqrt(len(self.values))

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


def ratio(over: Samples, under: Samples) -> Samples:
    """Paired by round, so that what slowed both down in that round cancels out."""
    pairs = zip(over.values, under.values, strict=False)
    return Samples([a / b for a, b in pairs if b], over.noisy + under.noisy)


def control_error(controls: Iterable[Samples]) -> float:
    """How far the worst of these A/A ratios is off 1."""
    return max((abs(samples.median() - 1) for samples in controls if samples.values), default=0.0)


def band(pair: Samples, control: float) -> float:
    """What a ratio's median may be off by, as a fraction: the control's error and the ratio's own."""
    return max(LEAST_BAND, control + pair.error())


MET, NOT_MET, INSIDE, NOT_MEASURED, NO_LIMIT = "met", "NOT MET", "inside noise", "not measured", ""


def verdict(value: float, limit: float, *, at_least: bool, band: float) -> str:
    """Does `value` keep to `limit`? Inside noise: the limit is within the band around the value."""
    if math.isnan(value):
        return NOT_MEASURED
    if abs(value - limit) <= band * abs(value):
        return INSIDE
    return MET if (value >= limit if at_least else value <= limit) else NOT_MET


def number(value: float) -> str:
    """Three digits that mean something."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "inf"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
