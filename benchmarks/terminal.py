# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The report on the terminal: tables, and a progress bar for each suite, drawn by rich.

Knows rich; what is said comes from `tables.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table as RichTable
from rich.text import Text as RichText

from benchmarks import suite as shape
from benchmarks import tables
from benchmarks.judge import Outcome
from benchmarks.limits import Far
from benchmarks.samples import INSIDE, MET, NOT_MET
from benchmarks.suite import Suite, Table

COLOURS = {NOT_MET: "red", INSIDE: "yellow", MET: "green"}


class Terminal:
    def __init__(self) -> None:
        self.out = Console(highlight=False)
        if not self.out.is_terminal:  # a file has no edge to wrap at
            self.out = Console(highlight=False, width=200)
        self.err = Console(stderr=True)

    @contextmanager
    def progress(self, name: str) -> Iterator[shape.Progress]:
        """A bar that goes away when the suite has been measured; nothing where nobody looks."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        # Once a second: drawing takes time from a core that something is measured on.
        with Progress(
            *columns, console=self.err, transient=True, disable=not self.err.is_terminal, auto_refresh=False
        ) as bar:
            task = bar.add_task(name, total=None)
            last = 0.0

            def step(done: int, steps: int, doing: str = "") -> None:
                nonlocal last
                description = f"{name}: {doing}" if doing else name
                bar.update(task, completed=done, total=steps, description=description)
                if bar.get_time() - last >= 1 or done == steps:
                    last = bar.get_time()
                    bar.refresh()

            yield step

    def say(self, text: str, style: str = "") -> None:
        self.out.print(text, style=style or None, markup=False, soft_wrap=True)

    def table(self, text: tables.Text) -> None:
        if not text.rows:
            return
        drawn = RichTable(
            title=text.title, title_justify="left", title_style="bold", pad_edge=False, box=SIMPLE_HEAD
        )
        for i, header in enumerate(text.headers):
            left = i == 0 or header in ("the limit is", "verdict", "deciding cell")
            drawn.add_column(header, justify="left" if left else "right", overflow="fold")
        for row in text.rows:
            colour = next(
                (COLOURS[word] for word in COLOURS if text.headers[-1] == "verdict" and word in row[-1]), ""
            )
            drawn.add_row(*(RichText(cell) for cell in row[:-1]), RichText(row[-1], style=colour))
        self.out.print(drawn)

    def suite(
        self, title: str, shown: tuple[Table, ...], suite: Suite, outcomes: list[Outcome], far: list[Far]
    ) -> None:
        """All that there is to say of one suite."""
        self.out.rule(suite.name, align="left")
        self.say(title)
        if suite.skipped:
            self.say(f"skipped: {suite.skipped}", "yellow")
        if suite.failed:
            self.say(suite.failed, "red")
        for who in suite.absent:
            self.say(f"without {who}", "yellow")
        for table in shown:
            self.table(tables.medians(suite, table))
        self.table(tables.facts(outcomes))
        self.table(tables.limits(suite))
        self.table(tables.distances(far))
        for line in (tables.controls(suite), *suite.notes):
            if line:
                self.say(line)
