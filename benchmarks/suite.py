# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The one shape of a suite: cases that are measured in turns become series; tables say how to show them.

A suite is a module of this package with

    TITLE   what it measures, in a sentence or two
    TABLES  how its series are laid out (`Table`)
    run(suite)  measures: `suite.interleave(cases, unit, rounds)`, or `suite.add(...)` sample by sample

A case is a *subject* (who is measured) in a *cell* (under which circumstances). The same subject in other
circumstances, another subject in the same: `facts.py` says which of them are compared and what is aimed at.
Knows nothing of what is measured, nor how it is printed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from benchmarks import measure, samples
from benchmarks.samples import Samples, Unit

Axis = str | int
Cell = tuple[tuple[str, Axis], ...]
LIMIT = "limit: "
MARK = "figures: "  # before the series on standard output, where they come from a guest


def cell(**axes: Axis) -> Cell:
    """The circumstances of a case, by name: cell(format="split", batch=32)."""
    return tuple(axes.items())


def again(subject: str) -> str:
    """The name of the control: the same subject, measured once more as if it were another."""
    return f"{subject} (A/A)"


class Case(NamedTuple):
    subject: str
    cell: Cell = ()


Cases = dict[Case, Callable[[], float]]


@dataclass
class Series:
    """The samples of one case, in one unit."""

    unit: Unit
    subject: str
    cell: Cell
    samples: Samples

    @property
    def axes(self) -> dict[str, Axis]:
        return dict(self.cell)

    def matches(self, where: Mapping[str, Axis]) -> bool:
        axes = self.axes
        return all(axes.get(name) == value for name, value in where.items())

    def as_json(self) -> dict[str, Any]:
        return {
            "unit": self.unit.name,
            "subject": self.subject,
            "cell": self.axes,
            "values": self.samples.values,
            **self.samples.as_json(),
        }


@dataclass(frozen=True)
class Table:
    """Medians of one unit, a row for each value of `rows` and a column for each value of `columns`; both
    name axes of the cells, or "subject". `where` picks cells."""

    title: str
    unit: Unit
    rows: tuple[str, ...] = ("subject",)
    columns: tuple[str, ...] = ()
    where: Mapping[str, Axis] = field(default_factory=dict)

    def shows(self, series: Series) -> bool:
        axes = (*self.rows, *self.columns)
        return (
            series.unit.name == self.unit.name
            and series.matches(self.where)
            and not series.subject.startswith(LIMIT)
            and all(axis == "subject" or axis in series.axes for axis in axes)
        )


class Progress(Protocol):
    """Somebody who shows how far a suite is."""

    def __call__(self, done: int, steps: int, doing: str = ...) -> None: ...


def silent(done: int, steps: int, doing: str = "") -> None:
    pass


class Suite:
    """What one suite measured in this run."""

    def __init__(
        self, name: str, *, quick: bool = False, progress: Progress = silent, options: Any = None
    ) -> None:
        self.name, self.quick, self.progress = name, quick, progress
        self.options = options  # the command line's
        self.series: list[Series] = []
        self.notes: list[str] = []
        self.absent: list[str] = []  # who does not take part, and why
        self.skipped = ""
        self.failed = ""  # the traceback of what ended it
        self.taken = self.rejected = 0

    def interleave(
        self,
        cases: Cases,
        unit: Unit,
        rounds: int,
        *,
        calibrate: bool = True,
        budget: float | None = None,
        doing: str = "",
    ) -> dict[Case, Samples]:
        """Measure the cases in turns, and keep what they gave. `budget`: seconds; `calibrate`: for
        samples that are shorter than a scheduler's tick, to take those that nothing disturbed.

        The physical limits (`limits.cases`) among the cases are in nanoseconds, whatever the unit is."""
        calibration = measure.Calibration() if calibrate else None

        def progress(done: int, steps: int) -> None:
            self.progress(done, steps, doing)

        found = measure.interleave(cases, rounds, calibration, budget=budget, progress=progress)
        for case, values in found.items():
            self.add(samples.NS if case.subject.startswith(LIMIT) else unit, case, values)
        if calibration is not None:
            self.taken += calibration.taken
            self.rejected += calibration.rejected
        return found

    def add(self, unit: Unit, case: Case, values: Samples) -> None:
        """Keep a series that was taken otherwise than by `interleave`."""
        self.series.append(Series(unit, case.subject, case.cell, values))

    def note(self, text: str) -> None:
        """A sentence for the reader of the figures."""
        if text not in self.notes:
            self.notes.append(text)

    def leave_out(self, who: str, why: str) -> None:
        """A peer that is not here; the suite goes on without it."""
        text = f"{who}: {why}"
        if text not in self.absent:
            self.absent.append(text)

    def skip(self, why: str) -> None:
        """Nothing can be measured here."""
        self.skipped = why

    # ------------------------------------------------------------ what the others ask

    def find(self, unit: Unit, subject: str, where: Mapping[str, Axis]) -> list[Series]:
        return [
            series
            for series in self.series
            if series.unit.name == unit.name and series.subject == subject and series.matches(where)
        ]

    def controls(self) -> list[tuple[Series, Samples]]:
        """Each control, and its ratio to the subject that it repeats."""
        by_name = {(s.unit.name, s.subject, s.cell): s for s in self.series}
        found = []
        for (unit, subject, cell), series in by_name.items():
            other = by_name.get((unit, again(subject), cell))
            if other is not None:
                found.append((series, samples.ratio(other.samples, series.samples)))
        return found

    def as_json(self) -> dict[str, Any]:
        return {
            "series": [series.as_json() for series in self.series],
            "controls": [
                {"subject": s.subject, "cell": s.axes, "unit": s.unit.name, **pair.as_json()}
                for s, pair in self.controls()
            ],
            "notes": self.notes,
            "absent": self.absent,
            "skipped": self.skipped,
            "failed": self.failed,
            "samples": {"taken": self.taken, "rejected": self.rejected},
        }

    def load(self, report: Mapping[str, Any]) -> None:
        """Take over what `as_json` said elsewhere: in a guest, say."""
        units = {unit.name: unit for unit in vars(samples).values() if isinstance(unit, Unit)}
        for one in report["series"]:
            values = Samples(list(one["values"]), one.get("noisy", 0))
            self.add(units[one["unit"]], Case(one["subject"], tuple(one["cell"].items())), values)
        self.notes += report["notes"]
        self.absent += report["absent"]
        self.skipped = report["skipped"]
        self.taken += report["samples"]["taken"]
        self.rejected += report["samples"]["rejected"]
