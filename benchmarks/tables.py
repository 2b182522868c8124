# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What is said of a suite, as headers and rows of text: for the terminal and for the page alike.

Pure: knows series, facts and limits, not how a table is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.judge import Outcome
from benchmarks.limits import COPY_RAM, Far, bandwidth
from benchmarks.samples import number
from benchmarks.suite import LIMIT, Axis, Series, Suite, Table

# The share of samples that could never be taken in quiet, above which a reader is warned.
NOISY = 0.1


@dataclass(frozen=True)
class Text:
    """A table of words: the first column to the left, numbers to the right."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


def _value(series: Series, axis: str) -> Axis:
    return series.subject if axis == "subject" else series.axes.get(axis, "")


def _label(axes: Sequence[str], values: Sequence[Axis]) -> str:
    words = [
        f"{axis} {value}" if isinstance(value, int) else value
        for axis, value in zip(axes, values, strict=True)
    ]
    return ", ".join(word for word in words if word)  # fmt: skip


def medians(suite: Suite, table: Table) -> Text:
    """A suite's table: a median a cell, and a row's worst spread."""
    picked = [series for series in suite.series if table.shows(series)]
    grid: dict[tuple[Axis, ...], dict[tuple[Axis, ...], Series]] = {}
    columns: dict[tuple[Axis, ...], None] = {}
    for series in picked:
        row = tuple(_value(series, axis) for axis in table.rows)
        column = tuple(_value(series, axis) for axis in table.columns)
        grid.setdefault(row, {})[column] = series
        columns[column] = None
    names = [_label(table.columns, column) or "median" for column in columns]
    rows = []
    for row, found in grid.items():
        cells = [number(found[c].samples.median()) if c in found else "" for c in columns]
        spreads = [series.samples.spread() for series in found.values()]
        worst = max((s for s in spreads if not math.isnan(s)), default=math.nan)
        rows.append([_label(table.rows, row), *cells, "" if math.isnan(worst) else f"±{worst:.0%}"])
    return Text(table.title, [table.unit.name, *names, "MAD"], rows)


def facts(outcomes: Sequence[Outcome]) -> Text:
    """Each fact: its limit, the cell that decides, the range over all cells, the verdict."""
    rows = []
    for outcome in outcomes:
        telling = outcome.telling
        if telling is None:
            rows.append([outcome.fact.what, outcome.fact.bound, "-", "", "", "not measured"])
            continue
        values = [one.value for one in outcome.cells]
        spread = f"{number(min(values))}-{number(max(values))}" if len(values) > 1 else ""
        verdict = outcome.summary
        if not verdict:  # no limit: then the question is whether there is a difference at all
            same = sum(one.no_difference for one in outcome.cells)
            verdict = (
                ""
                if not same
                else "inside noise" + (f" in {same} of {len(values)}" if len(values) > 1 else "")
            )
        name = f" ({telling.name})" if len(values) > 1 else ""
        rows.append(
            [
                outcome.fact.what,
                outcome.fact.bound,
                f"{number(telling.value)} ±{telling.band:.0%}{name}",
                spread,
                str(len(values)),
                verdict,
            ]
        )
    return Text(
        "compared", ["ratio of medians", "aim", "deciding cell", "all cells", "cells", "verdict"], rows
    )


def distances(found: Sequence[Far]) -> Text:
    """How far from what the machine cannot do without."""
    rows = [[far.what, number(far.ours), number(far.limit), f"{number(far.times)}x", far.of] for far in found]
    return Text(
        "how far from the machine's limit (below 1x: it is spared, by spinning or by sharing one in a batch)",
        ["ns an operation", "measured", "limit", "", "the limit is"],
        rows,
    )


def limits(suite: Suite) -> Text:
    """The limits themselves, as measured beside this suite."""
    rows = []
    for series in suite.series:
        if series.subject.startswith(LIMIT):
            name = series.subject.removeprefix(LIMIT)
            extra = f"{number(bandwidth(series.samples))} GB/s" if name == COPY_RAM else ""
            rows.append([name, number(series.samples.median()), f"±{series.samples.spread():.0%}", extra])
    return Text("limits of this machine", ["ns", "median", "MAD", ""], rows)


def controls(suite: Suite) -> str:
    """One sentence on the A/A controls, and on the samples that were thrown away."""
    pairs = [pair.median() for _, pair in suite.controls()]
    words = []
    if pairs:
        n = "1 cell" if len(pairs) == 1 else f"{len(pairs)} cells"
        words.append(f"the same twice (A/A control, {n}): {number(min(pairs))}-{number(max(pairs))}")
    if suite.taken:
        noisy = sum(series.samples.noisy for series in suite.series)
        if noisy > NOISY * (suite.taken + noisy):
            words.append("THIS MACHINE WAS BUSY: many samples were taken beside something else")
        words.append(f"samples: {suite.taken} taken, {suite.rejected} thrown away, {noisy} noisy ones kept")
    return "; ".join(words)
