# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The one command: runs the suites that were asked for, prints tables, writes JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import harness

SUITES = ("ring", "session", "block", "kernel")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suite", nargs="*", choices=[*SUITES, []], help="default: all of them")
    parser.add_argument("--quick", action="store_true", help="fewer repeats and cases: under a minute")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every figure here, too")
    options = parser.parse_args(argv)
    status = harness.in_own_session(argv)
    if status is not None:
        return status
    report: dict[str, Any] = {"machine": harness.machine(), "quick": options.quick, "suites": {}}
    print("  ".join(f"{key}: {value}" for key, value in report["machine"].items() if value != ""))
    for name in options.suite or SUITES:
        print(f"\n== {name}", flush=True)
        start = time.monotonic()
        suite = importlib.import_module(f"benchmarks.{name}")
        report["suites"][name] = suite.run(quick=options.quick)
        report["suites"][name]["seconds"] = round(time.monotonic() - start, 1)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
