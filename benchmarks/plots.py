# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Pictures of a run, drawn by matplotlib: medians of each table, and the facts beside their limits.

Knows matplotlib; which figures there are comes from the suites.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import matplotlib

matplotlib.use("svg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.judge import Outcome
from benchmarks.samples import INSIDE, MET, NO_LIMIT, NOT_MET
from benchmarks.suite import Series, Suite, Table, again

VERDICTS = {MET: "#2f855a", INSIDE: "#b7791f", NOT_MET: "#c53030", NO_LIMIT: "#4a5568"}
# Okabe and Ito's colours, which everybody can tell apart.
SUBJECTS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442", "#000000", "#999999")
WIDTH, ROW = 10.0, 0.26
matplotlib.rcParams.update(
    {
        "svg.fonttype": "none",  # text stays text: small, and found by a search
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
    }
)


def figures(
    tables: Sequence[Table], suite: Suite, outcomes: Sequence[Outcome]
) -> Iterator[tuple[str, Figure]]:
    """Each picture of a suite, with a name for its file."""
    drawn = [outcome for outcome in outcomes if outcome.cells and outcome.fact.under is not None]
    if drawn:
        yield f"{suite.name}-facts", _facts(drawn)
    controls = {again(series.subject) for series in suite.series}
    for i, table in enumerate(tables):
        picked = [
            series
            for series in suite.series
            if table.shows(series)
            and series.subject not in controls
            and math.isfinite(series.samples.median())
        ]
        if picked:
            yield f"{suite.name}-{i}", _medians(table, picked)


def _facts(outcomes: Sequence[Outcome]) -> Figure:
    """A line a fact: a dot for each cell with its band, and the limit as a bar across."""
    figure = Figure(figsize=(WIDTH, 0.9 + ROW * 1.3 * len(outcomes)), layout="constrained")
    axes: Axes = figure.subplots()
    labels = []
    for y, outcome in enumerate(outcomes):
        fact, n = outcome.fact, len(outcome.cells)
        for i, one in enumerate(outcome.cells):
            at = y + (0.5 * (i - (n - 1) / 2) / n if n > 1 else 0)
            reach = one.value * min(one.band, 0.99)
            axes.errorbar(one.value, at, xerr=reach, fmt="o", ms=3.5, lw=1, color=VERDICTS[one.verdict])
        if fact.limit:
            axes.plot([fact.limit] * 2, [y - 0.38, y + 0.38], color="black", lw=1.8, solid_capstyle="butt")
        labels.append(f"{fact.what}  {fact.bound}".rstrip())
    axes.axvline(1, color="#a0aec0", lw=0.8, zorder=0)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xscale("log")
    _plain_ticks(axes)
    axes.set_xlabel("ratio, with its band of noise; black: the aim")
    for verdict, colour in VERDICTS.items():
        if any(one.verdict == verdict for outcome in outcomes for one in outcome.cells):
            axes.plot([], [], "o", ms=4, color=colour, label=verdict or "no aim")
    figure.legend(loc="outside upper right", ncols=4, frameon=False)
    return figure


def _medians(table: Table, picked: Sequence[Series]) -> Figure:
    """A group of bars a cell, a bar a subject, whiskers from the first to the third quartile."""
    subjects = list(dict.fromkeys(series.subject for series in picked))
    cells = list(dict.fromkeys(series.cell for series in picked))
    by_case = {(series.cell, series.subject): series.samples for series in picked}
    bars = len(by_case)
    figure = Figure(figsize=(WIDTH, 1.2 + 0.17 * bars + 0.08 * len(cells)), layout="constrained")
    axes: Axes = figure.subplots()
    y, ticks = 0.0, []
    named = set()
    for cell in cells:
        present = [subject for subject in subjects if (cell, subject) in by_case]
        ticks.append(y + (len(present) - 1) / 2)
        for subject in present:
            samples = by_case[cell, subject]
            middle = samples.median()
            low, high = samples.quartiles()
            reach = [[middle - low], [high - middle]]
            colour = SUBJECTS[subjects.index(subject) % len(SUBJECTS)]
            label = None if subject in named else subject
            named.add(subject)
            axes.barh(y, middle, height=0.86, color=colour, label=label)
            axes.errorbar(middle, y, xerr=reach, fmt="none", ecolor="#2d3748", lw=0.7)
            y += 1
        y += 0.6
    axes.set_yticks(ticks, [_name(cell) for cell in cells])
    axes.set_ylim(y - 0.4, -0.9)
    values = [samples.median() for samples in by_case.values()]
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_xscale("log")
    _plain_ticks(axes)
    better = "more" if table.unit.more_is_better else "less"
    axes.set_xlabel(f"{table.unit.name}; {better} is better; median and quartiles")
    figure.legend(loc="outside upper left", ncols=4, frameon=False)
    return figure


def _plain_ticks(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="x", color="#e2e8f0", lw=0.6)
    axes.set_axisbelow(True)


def _name(cell: tuple[tuple[str, str | int], ...]) -> str:
    return ", ".join(f"{name} {value}" if isinstance(value, int) else value for name, value in cell) or "all"
