# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The one command: runs the suites that were asked for; reports on the terminal, as JSON and as a page."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks import limits, machine
from benchmarks.judge import judge
from benchmarks.samples import INSIDE, MET, NOT_MEASURED, NOT_MET
from benchmarks.suite import MARK, Suite

SUITES = ("ring", "virtqueue", "block", "scale", "net", "session", "kernel")
RESULTS = Path(__file__).parent / "results"
EXTRA = ("rich", "matplotlib")


def parse(argv: list[str]) -> argparse.Namespace:
    there = [name for name in SUITES if importlib.util.find_spec(f"benchmarks.{name}")]

    def suite(name: str) -> str:
        if name not in there:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(there)}")
        return name

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    # Not `choices`: of no argument at all, argparse asks whether [] is one.
    parser.add_argument(
        "suite", nargs="*", type=suite, default=there, help=f"default: all of them: {', '.join(there)}"
    )
    parser.add_argument("--quick", action="store_true", help="fewer repeats and cases: a few minutes")
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="every figure (default: DATE.json in benchmarks/results)"
    )
    parser.add_argument(
        "--html", metavar="FILE", type=Path, help="a page of tables and plots (default: DATE.html there)"
    )
    parser.add_argument("--plots", metavar="DIR", type=Path, help="the plots as PNG files, too")
    parser.add_argument("--raw", action="store_true", help=argparse.SUPPRESS)  # see kernel.py
    return parser.parse_args(argv)


def run_one(name: str, options: argparse.Namespace, progress: Any) -> tuple[Any, Suite, float]:
    module = importlib.import_module(f"benchmarks.{name}")
    suite = Suite(name, quick=options.quick, progress=progress)
    start = time.monotonic()
    try:
        module.run(suite)
    except Exception:  # the other suites go on; the exit status tells
        suite.failed = traceback.format_exc()
    return module, suite, time.monotonic() - start


def raw(options: argparse.Namespace) -> int:
    """In a guest: measure, and print the series for whoever started it; nothing of the extra is needed."""
    found = {}
    for name in options.suite:
        _, suite, _ = run_one(name, options, lambda done, steps, doing="": None)
        if suite.failed:
            sys.exit(suite.failed)
        found[name] = suite.as_json()
    print(f"\n{MARK}{json.dumps(found)}")
    return 0


def main(argv: list[str]) -> int:
    options = parse(argv)
    if options.raw:
        return raw(options)
    if missing := [name for name in EXTRA if not importlib.util.find_spec(name)]:
        print(
            f"{', '.join(missing)}: not installed; pip install -e '.[bench]', or make bench", file=sys.stderr
        )
        return 2
    status = machine.in_own_session(argv)
    if status is not None:
        return status
    return report(options)


def report(options: argparse.Namespace) -> int:
    from benchmarks import page
    from benchmarks.terminal import Terminal

    date = time.strftime("%Y-%m-%dT%H%M%S")
    options.json = options.json or RESULTS / f"{date}.json"
    options.html = options.html or RESULTS / f"{date}.html"
    for folder in (options.json.parent, options.html.parent, options.plots):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    terminal = Terminal()
    what = machine.describe()
    terminal.say("  ".join(f"{key}: {value}" for key, value in what.items() if value != ""))
    whole: dict[str, Any] = {"machine": what, "date": date, "quick": options.quick, "suites": {}}
    sections, verdicts, failed = [], [], False
    for name in options.suite:
        with terminal.progress(name) as progress:
            module, suite, seconds = run_one(name, options, progress)
        outcomes, far = judge(suite), limits.distances(suite)
        failed = failed or bool(suite.failed)
        verdicts += [outcome.verdict for outcome in outcomes]
        terminal.suite(module.TITLE, module.TABLES, suite, outcomes, far)
        whole["suites"][name] = {
            **suite.as_json(),
            "facts": [outcome.as_json() for outcome in outcomes],
            "distances": [one.as_json() for one in far],
            "seconds": round(seconds, 1),
        }
        sections.append(page.section(module.TITLE, module.TABLES, suite, outcomes, far, options.plots))
        # After each suite, so that what was measured is there if the next one fails.
        options.json.write_text(json.dumps(whole, indent=1) + "\n")
        options.html.write_text(page.page(what, date, sections))
    count = {word: verdicts.count(word) for word in (MET, NOT_MET, INSIDE, NOT_MEASURED)}
    said = ", ".join(f"{n} {word}" for word, n in count.items() if n)
    terminal.say(f"aims: {said or 'none'}")
    terminal.say(f"figures: {options.json}  page: {options.html}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
