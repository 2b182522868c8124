# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a suite needs of the harness, in one import: `from benchmarks import harness`."""

from benchmarks.compile import CSRC, HERE, declare, library, rings
from benchmarks.limits import cases as limit_cases
from benchmarks.machine import (
    autogroup_first,
    cores,
    cpu_seconds,
    pin,
    pinned_to,
    raise_fd_limit,
    voluntary_switches,
)
from benchmarks.samples import COUNT, CPU_US, KIOPS, KPPS, MPPS, NS, US, Samples, Unit, number, ratio
from benchmarks.suite import Case, Cases, Cell, Suite, Table, again, cell

__all__ = [
    "COUNT",
    "CPU_US",
    "CSRC",
    "HERE",
    "KIOPS",
    "KPPS",
    "MPPS",
    "NS",
    "US",
    "Case",
    "Cases",
    "Cell",
    "Samples",
    "Suite",
    "Table",
    "Unit",
    "again",
    "autogroup_first",
    "cell",
    "cores",
    "cpu_seconds",
    "declare",
    "library",
    "limit_cases",
    "number",
    "pin",
    "pinned_to",
    "raise_fd_limit",
    "ratio",
    "rings",
    "voluntary_switches",
]
