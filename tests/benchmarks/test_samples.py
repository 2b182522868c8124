# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The arithmetic behind every verdict of the benchmarks."""

from __future__ import annotations

import math

import pytest

from benchmarks.samples import (
    INSIDE,
    KIOPS,
    LEAST_BAND,
    MET,
    NOT_MEASURED,
    NOT_MET,
    NS,
    US,
    Samples,
    Unit,
    band,
    control_error,
    number,
    ratio,
    verdict,
)


def test_the_median_does_not_care_for_one_wild_value() -> None:
    assert Samples([3.0, 1.0, 2.0, 1000.0, 2.5]).median() == 2.5
    assert math.isnan(Samples().median())


def test_the_spread_is_a_fraction_of_the_median() -> None:
    # Deviations from 10 are 2, 1, 0, 1, 90: their median is 1.
    assert Samples([8.0, 11.0, 10.0, 9.0, 100.0]).spread() == pytest.approx(0.1)
    assert Samples([5.0] * 7).spread() == 0
    assert math.isnan(Samples([0.0, 0.0, 0.0]).spread())


def test_quartiles_leave_wild_values_out() -> None:
    assert Samples([1000.0, 1.0, 2.0, 3.0, 4.0]).quartiles() == (2.0, 4.0)
    assert Samples([7.0]).quartiles() == (7.0, 7.0)


def test_the_error_of_a_median_shrinks_with_the_root_of_the_repeats() -> None:
    few, many = Samples([9.0, 10.0, 11.0] * 3), Samples([9.0, 10.0, 11.0] * 12)
    assert few.error() == pytest.approx(2 * many.error())
    # Twice 1.2533 * 1.4826 * MAD / sqrt(n).
    assert few.error() == pytest.approx(2 * 1.2533 * 1.4826 * 0.1 / 3)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 1.0]])
def test_too_few_repeats_say_nothing(values: list[float]) -> None:
    assert Samples(values).error() == math.inf


def test_ratios_are_paired_so_that_a_slow_round_cancels_out() -> None:
    quiet, busy = [10.0, 10.0, 10.0], [30.0, 10.0, 20.0]
    over = Samples([2 * value for value in busy], noisy=1)
    pair = ratio(over, Samples(busy, noisy=2))
    assert pair.values == [2.0, 2.0, 2.0]
    assert pair.noisy == 3
    # The ratio of medians would have hidden that over was measured in other rounds than under.
    assert ratio(over, Samples(quiet)).values == [6.0, 2.0, 4.0]


def test_a_ratio_to_nothing_is_left_out() -> None:
    assert ratio(Samples([1.0, 2.0]), Samples([0.0, 4.0])).values == [0.5]


def test_the_band_is_the_controls_error_and_the_ratios_own() -> None:
    pair = Samples([1.9, 2.0, 2.1] * 3)
    assert band(pair, 0.03) == pytest.approx(0.03 + pair.error())
    assert band(Samples([2.0] * 9), 0.0) == LEAST_BAND
    assert band(Samples([2.0]), 0.0) == math.inf


def test_the_worst_control_counts_whichever_way_it_is_off() -> None:
    controls = [Samples([1.02] * 3), Samples([0.95] * 3), Samples([1.0] * 3), Samples()]
    assert control_error(controls) == pytest.approx(0.05)
    assert control_error([]) == 0


@pytest.mark.parametrize(
    ("value", "limit", "at_least", "width", "expected"),
    [
        (2.0, 2.5, False, 0.05, MET),
        (3.0, 2.5, False, 0.05, NOT_MET),
        (2.45, 2.5, False, 0.05, INSIDE),
        (2.55, 2.5, False, 0.05, INSIDE),
        (1.3, 1.1, True, 0.05, MET),
        (0.9, 1.1, True, 0.05, NOT_MET),
        (1.08, 1.1, True, 0.05, INSIDE),
        (1.12, 1.1, True, 0.05, INSIDE),
        (1.1, 1.1, True, 0.0, INSIDE),
        (5.0, 1.0, True, math.inf, INSIDE),
        (math.nan, 1.0, True, 0.05, NOT_MEASURED),
    ],
)
def test_a_verdict_needs_the_limit_outside_the_band(
    value: float, limit: float, at_least: bool, width: float, expected: str
) -> None:
    assert verdict(value, limit, at_least=at_least, band=width) == expected


@pytest.mark.parametrize(
    ("unit", "value", "ns"),
    [(NS, 5.0, 5.0), (US, 5.0, 5000.0), (KIOPS, 500.0, 2000.0)],
)
def test_a_figure_can_stand_beside_a_physical_limit(unit: Unit, value: float, ns: float) -> None:
    assert unit.ns(value) == pytest.approx(ns)


def test_a_count_has_no_nanoseconds() -> None:
    assert math.isnan(Unit("a second").ns(3.0))
    assert math.isnan(KIOPS.ns(0.0))


@pytest.mark.parametrize(
    ("value", "text"),
    [(math.nan, "-"), (math.inf, "inf"), (0.0, "0.00"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1234")],
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text
