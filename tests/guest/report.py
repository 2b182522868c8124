# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a run of pytest in a guest says: counts, failures, and which of the kernel's facilities it used.

Knows JUnit's XML as pytest writes it, and what a kernel prints when it is unwell. Does not boot.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass

from guest.kernel import Outcome
from peers.kernels import NODES, Kernel

# The property that tests/kernel/conftest.py notes at each test, one for each facility.
FACILITY = "facility"
_COMPLAINT = re.compile(
    r"\b(WARNING: |BUG: |Oops|general protection fault|unable to handle|blocked for more than|soft lockup)"
)


@dataclass(frozen=True)
class Report:
    kernel: Kernel
    outcome: Outcome
    passed: int
    skipped: tuple[str, ...]
    failures: tuple[str, ...]
    deselected: int
    facilities: Counter[str]  # tests that passed, by facility
    complaints: tuple[str, ...]  # lines of the kernel's console

    def problems(self, *, skips_fail: bool) -> list[str]:
        """Why this run is no success, each for people to read; empty if it is one."""
        found = list(self.failures)
        if skips_fail:
            found += [f"skipped: {name}" for name in self.skipped]
        if self.outcome.problem:
            found.append(f"{self.outcome.problem}\n--- output\n{self.outcome.output[-8000:]}")
        elif self.outcome.code and not self.failures:
            found.append(f"pytest exited with {self.outcome.code}:\n{self.outcome.output[-8000:]}")
        # A facility that no test used would be a promise that nobody kept.
        found += [
            f"no test used {name}"
            for name in self.kernel.facilities
            if not self.facilities[name] and not found
        ]
        if found and self.complaints:
            found.append("the kernel says:\n" + "\n".join(self.complaints))
        return found

    def lines(self) -> list[str]:
        """For the end of the session: what was exercised."""
        counts = (
            f"{self.passed} passed, {len(self.failures)} failed, {len(self.skipped)} skipped, "
            f"{self.deselected} not for this kernel, {self.outcome.seconds:.0f} s"
        )
        used = [
            f"{name} {self.facilities[name]}" + (f" ({' '.join(NODES[name])})" if NODES[name] else "")
            for name in self.kernel.facilities
        ]
        return [
            f"{self.kernel.name} ({self.kernel.release}): {counts}",
            f"    tests by facility: {', '.join(used)}",
            *(f"    skipped: {name}" for name in self.skipped),
            *(f"    the kernel says: {line}" for line in self.complaints),
        ]


def read(kernel: Kernel, outcome: Outcome) -> Report:
    passed = 0
    skipped, failures = [], []
    facilities: Counter[str] = Counter()
    cases = ElementTree.fromstring(outcome.junit).iter("testcase") if outcome.junit else ()
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        bad = [child for child in case if child.tag in ("failure", "error")]
        skip = case.find("skipped")
        if bad:
            failures.append(
                "\n".join(f"{name}: {child.tag}\n{child.text or child.get('message')}" for child in bad)
            )
        elif skip is not None:
            skipped.append(f"{name}: {skip.get('message')}")
        else:
            passed += 1
            facilities.update(
                item.get("value", "") for item in case.iter("property") if item.get("name") == FACILITY
            )
    deselected = re.search(r"(\d+) deselected", outcome.output)
    return Report(
        kernel,
        outcome,
        passed,
        tuple(skipped),
        tuple(failures),
        int(deselected[1]) if deselected else 0,
        facilities,
        tuple(line.strip() for line in outcome.console.splitlines() if _COMPLAINT.search(line)),
    )
