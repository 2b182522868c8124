# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""From series to verdicts: which cells a fact is judged in, with which control, and what decides."""

from __future__ import annotations

import importlib.util
import math

import pytest

from benchmarks.facts import FACTS, Fact
from benchmarks.judge import Outcome, control_of, judge
from benchmarks.limits import DISTANCES, distances
from benchmarks.samples import (
    COUNT,
    INSIDE,
    KIOPS,
    MET,
    NO_LIMIT,
    NOT_MEASURED,
    NOT_MET,
    NS,
    Samples,
    Unit,
)
from benchmarks.suite import LIMIT, Axis, Case, Suite, again, cell


def suite_of(*series: tuple[str, dict[str, Axis], float], unit: Unit = NS, name: str = "s") -> Suite:
    suite = Suite(name)
    for subject, axes, value in series:
        suite.add(unit, Case(subject, cell(**axes)), Samples([value] * 5))
    return suite


def one(suite: Suite, fact: Fact) -> Outcome:
    (outcome,) = judge(suite, [fact])
    return outcome


def test_a_fact_is_judged_in_every_cell_in_which_both_were_measured() -> None:
    suite = suite_of(
        ("us", {"form": "split"}, 20.0),
        ("them", {"form": "split"}, 10.0),
        ("us", {"form": "packed"}, 30.0),
        ("them", {"form": "packed"}, 10.0),
        ("us", {"form": "only us"}, 90.0),
    )
    outcome = one(suite, Fact("s", "us", "them", NS, at_most=2.5))
    assert [(dict(c.cell)["form"], c.value, c.verdict) for c in outcome.cells] == [
        ("split", 2.0, MET),
        ("packed", 3.0, NOT_MET),
    ]
    assert outcome.verdict == NOT_MET
    assert outcome.telling is not None and outcome.telling.value == 3.0
    assert outcome.summary == "1 NOT MET, 1 met"


def test_where_picks_cells_and_beside_finds_the_other_one() -> None:
    suite = suite_of(
        ("us", {"batch": 32, "regions": 1}, 10.0),
        ("us", {"batch": 32, "regions": 64}, 12.0),
        ("us", {"batch": 1, "regions": 1}, 50.0),
        ("us", {"batch": 1, "regions": 64}, 51.0),
    )
    fact = Fact("s", "us", "us", NS, at_most=1.1, where={"regions": 64}, beside={"regions": 1})
    outcome = one(suite, fact)
    assert [c.value for c in outcome.cells] == pytest.approx([1.2, 1.02])
    assert [c.verdict for c in outcome.cells] == [NOT_MET, MET]
    assert fact.what == "us: regions 64 / regions 1"


def test_at_least_is_decided_by_the_lowest_cell_and_at_most_by_the_highest() -> None:
    suite = suite_of(
        ("us", {"d": 1}, 12.0), ("them", {"d": 1}, 10.0), ("us", {"d": 2}, 30.0), ("them", {"d": 2}, 10.0)
    )
    least, most = (
        one(suite, Fact("s", "us", "them", NS, at_least=1.1)),
        one(suite, Fact("s", "us", "them", NS, at_most=5)),
    )
    assert least.telling is not None and least.telling.value == pytest.approx(1.2)
    assert most.telling is not None and most.telling.value == pytest.approx(3.0)


def test_some_is_content_with_one_cell() -> None:
    suite = suite_of(
        ("us", {"d": 1}, 0.9), ("them", {"d": 1}, 1.0), ("us", {"d": 2}, 1.2), ("them", {"d": 2}, 1.0)
    )
    every, some = (one(suite, Fact("s", "us", "them", NS, at_least=1.0, some=flag)) for flag in (False, True))
    assert every.verdict == NOT_MET
    assert some.verdict == MET
    assert some.telling is not None and some.telling.value == pytest.approx(1.2)
    assert some.summary == "met: 1 of 2"


def test_a_wild_control_makes_a_near_miss_undecided() -> None:
    quiet = suite_of(("us", {}, 2.6), ("them", {}, 1.0), ("them (A/A)", {}, 1.0))
    wild = suite_of(("us", {}, 2.6), ("them", {}, 1.0), ("them (A/A)", {}, 1.1))
    fact = Fact("s", "us", "them", NS, at_most=2.5)
    assert one(quiet, fact).verdict == NOT_MET
    assert one(wild, fact).verdict == INSIDE


def test_the_control_of_the_very_cell_counts_and_else_the_worst() -> None:
    suite = suite_of(
        ("us", {"d": 1}, 1.0),
        (again("us"), {"d": 1}, 1.02),
        ("us", {"d": 2}, 1.0),
        (again("us"), {"d": 2}, 1.2),
        ("us", {"d": 3}, 1.0),
    )
    errors = {dict(s.cell)["d"]: control_of(suite, s) for s in suite.series if s.subject == "us"}
    assert errors == pytest.approx({1: 0.02, 2: 0.2, 3: 0.2})


def test_controls_of_another_unit_say_nothing() -> None:
    suite = suite_of(("us", {}, 1.0), (again("us"), {}, 1.3), unit=KIOPS)
    suite.add(NS, Case("us"), Samples([1.0] * 5))
    suite.add(NS, Case(again("us")), Samples([1.01] * 5))
    (in_ns,) = suite.find(NS, "us", {})
    assert control_of(suite, in_ns) == pytest.approx(0.01)


def test_zero_is_exact() -> None:
    fact = Fact("s", "us, idle", None, COUNT, at_most=0)
    assert one(suite_of(("us, idle", {}, 0.0), unit=COUNT), fact).verdict == MET
    assert one(suite_of(("us, idle", {}, 3.0), unit=COUNT), fact).verdict == NOT_MET


def test_without_a_limit_it_is_told_whether_there_is_a_difference() -> None:
    suite = suite_of(
        ("us", {"d": 1}, 1.005), ("them", {"d": 1}, 1.0), ("us", {"d": 2}, 0.5), ("them", {"d": 2}, 1.0)
    )
    outcome = one(suite, Fact("s", "us", "them", NS))
    assert outcome.verdict == NO_LIMIT
    assert [c.no_difference for c in outcome.cells] == [True, False]
    assert outcome.telling is not None and outcome.telling.value == 0.5


def test_what_was_not_measured_is_said_to_be_so() -> None:
    outcome = one(suite_of(("us", {}, 1.0)), Fact("s", "us", "them", NS, at_most=1))
    assert outcome.verdict == outcome.summary == NOT_MEASURED
    assert outcome.telling is None


def test_facts_of_another_suite_are_not_judged() -> None:
    assert judge(suite_of(("us", {}, 1.0)), [Fact("t", "us", None, NS, at_most=1)]) == []


def test_series_survive_the_way_out_of_a_guest() -> None:
    suite = suite_of(("us", {"d": 1}, 2.0), ("them", {"d": 1}, 1.0))
    suite.note("a note")
    suite.leave_out("somebody", "not here")
    other = Suite("s")
    other.load(suite.as_json())
    fact = Fact("s", "us", "them", NS, at_most=1)
    assert one(other, fact).as_json() == one(suite, fact).as_json()
    assert (other.notes, other.absent) == (["a note"], ["somebody: not here"])


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: f"{fact.suite}: {fact.what}")
def test_every_row_makes_sense(fact: Fact) -> None:
    assert fact.at_most is None or fact.at_least is None
    assert set(fact.beside) <= set(fact.where)
    assert fact.under is not None or fact.limit is not None
    assert fact.over != fact.under or fact.beside
    if fact.suite != "net":  # comes with the network device
        assert importlib.util.find_spec(f"benchmarks.{fact.suite}")


def test_a_distance_adds_up_its_limits() -> None:
    row = next(row for row in DISTANCES if row.suite == "block" and len(row.limits) == 2)
    suite = Suite("block")
    where = {**row.where, "device": row.where["device"]}
    suite.add(row.unit, Case(row.subjects[0], cell(**where)), Samples([100.0] * 3))
    for name, ns in zip(row.limits, (3000.0, 1000.0), strict=True):
        suite.add(NS, Case(LIMIT + name), Samples([ns] * 3))
    (far,) = distances(suite)
    assert (far.ours, far.limit, far.times) == pytest.approx((10_000.0, 4000.0, 2.5))


def test_a_limit_that_is_paid_besides_is_added() -> None:
    row = next(row for row in DISTANCES if row.on_top)
    suite = Suite(row.suite)
    suite.add(row.unit, Case(row.subjects[0], cell(**row.where)), Samples([50.0] * 3))
    suite.add(NS, Case(LIMIT + row.limits[0]), Samples([100.0] * 3))
    (far,) = distances(suite)
    assert far.times == pytest.approx(1.5)


def test_without_its_limit_a_distance_is_not_told() -> None:
    row = DISTANCES[0]
    suite = Suite(row.suite)
    suite.add(row.unit, Case(row.subjects[0], cell(**row.where)), Samples([50.0] * 3))
    assert distances(suite) == []
    assert math.isnan(Samples().median())
