# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The report as one page that needs nothing beside it: tables as HTML, plots as SVG within.

Knows HTML; the words come from `tables.py` and the pictures from `plots.py`.
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import plots, tables
from benchmarks.judge import Outcome
from benchmarks.limits import Far
from benchmarks.samples import INSIDE, MET, NOT_MET
from benchmarks.suite import Suite, Table

STYLE = """
:root { color-scheme: light; font: 15px/1.5 system-ui, sans-serif; color: #1a202c }
body { max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 3rem; border-bottom: 2px solid #e2e8f0 }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; display: block; overflow-x: auto }
caption { text-align: left; font-weight: 600; padding: .3rem 0; white-space: nowrap }
td, th { padding: .15rem .6rem; border-bottom: 1px solid #e2e8f0; text-align: right }
th { white-space: nowrap; background: #f7fafc }
td:first-child, th:first-child, td.word { text-align: left }
td { font-variant-numeric: tabular-nums }
.met { color: #2f855a } .bad { color: #c53030; font-weight: 600 } .noise { color: #b7791f }
svg { max-width: 100%; height: auto } .note { color: #4a5568; margin: .2rem 0 }
dl { display: grid; grid-template-columns: max-content auto; gap: 0 1rem; font-size: 13px } dd { margin: 0 }
"""
CLASSES = {NOT_MET: "bad", INSIDE: "noise", MET: "met"}


def _table(text: tables.Text) -> str:
    if not text.rows:
        return ""
    escape = html.escape
    head = "".join(f"<th>{escape(cell)}</th>" for cell in text.headers)
    body = []
    for row in text.rows:
        kind = next((CLASSES[word] for word in CLASSES if word in row[-1]), "")
        cells = [f"<td>{escape(cell)}</td>" for cell in row[:-1]]
        cells.append(f'<td class="word {kind}">{escape(row[-1])}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    caption = f"<caption>{escape(text.title)}</caption>" if text.title else ""
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    # No date: the same figures make the same page.
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def section(
    title: str,
    shown: Sequence[Table],
    suite: Suite,
    outcomes: Sequence[Outcome],
    far: Sequence[Far],
    folder: Path | None,
) -> str:
    """One suite; its pictures are written to `folder`, too, as PNG."""
    parts = [f'<h2 id="{suite.name}">{suite.name}</h2>', f"<p>{html.escape(title)}</p>"]
    if suite.skipped:
        parts.append(f'<p class="noise">skipped: {html.escape(suite.skipped)}</p>')
    if suite.failed:
        parts.append(f'<pre class="bad">{html.escape(suite.failed)}</pre>')
    parts += [f'<p class="noise">without {html.escape(who)}</p>' for who in suite.absent]
    parts.append(_table(tables.facts(outcomes)))
    for name, figure in plots.figures(shown, suite, outcomes):
        parts.append(f"<figure>{_svg(figure)}</figure>")
        if folder is not None:
            figure.savefig(folder / f"{name}.png", dpi=150)
    parts += [_table(tables.medians(suite, table)) for table in shown]
    parts += [_table(tables.limits(suite)), _table(tables.distances(far))]
    parts += [
        f'<p class="note">{html.escape(line)}</p>' for line in (tables.controls(suite), *suite.notes) if line
    ]
    return "\n".join(parts)


def page(machine: Mapping[str, Any], when: str, sections: Sequence[str]) -> str:
    """The whole page."""
    facts = "".join(
        f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>" for key, value in machine.items()
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>pyvhost benchmarks</title>'
        f"<style>{STYLE}</style></head><body><h1>pyvhost benchmarks</h1>"
        f"<p>{when}. What counts are ratios within this run. A ratio is inside noise when its aim (or 1, "
        "where there is none) lies within its band: what the controls are off by, and twice the error of "
        "the median.</p>"
        f"<dl>{facts}</dl>{''.join(sections)}</body></html>\n"
    )
