# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The runner itself: what a guest does is reported as it was, above all when it goes wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from guest.kernel import Outcome, run_in_kernel
from guest.report import read
from peers.kernels import KERNELS, REPOSITORY, Kernel
from peers.support import require

INNER = """
import pytest, warnings

def test_good(record_property):
    record_property("facility", "net")

def test_bad():
    assert 1 == 2, "one is not two"

@pytest.fixture
def bad_end():
    yield
    raise RuntimeError("at the end")

def test_bad_end(bad_end, record_property):
    record_property("facility", "vsock")

@pytest.mark.skip(reason="no wish")
def test_skipped():
    pass
"""


@pytest.fixture
def oldest() -> Kernel:
    """The quickest to boot."""
    require("qemu", "busybox", "cpio", "kernel-6.1")
    return KERNELS["6.1"]


@pytest.mark.guest
def test_output_and_exit_code(oldest: Kernel) -> None:
    live: list[str] = []
    command = "echo $PYVHOST_GUEST $(pwd); touch in-the-repository; echo c >/tmp/own && cat /tmp/own; exit 7"
    outcome = run_in_kernel(oldest, command, live=live.append)
    assert (outcome.code, outcome.problem) == (7, "")
    lines = outcome.output.splitlines()
    assert lines[0] == f"6.1 {REPOSITORY}"
    assert "Read-only file system" in lines[1]
    assert lines[2:] == ["c"]
    assert "".join(live) == outcome.output
    assert "init: ready" in outcome.console


@pytest.mark.guest
def test_panic(oldest: Kernel) -> None:
    outcome = run_in_kernel(oldest, "echo before; echo c >/proc/sysrq-trigger; sleep 1000")
    assert outcome.code is None
    assert "went down" in outcome.problem
    assert "Kernel panic" in outcome.problem
    assert outcome.output == "before\n"
    assert outcome.seconds < 300


@pytest.mark.guest
def test_deadline(oldest: Kernel) -> None:
    outcome = run_in_kernel(oldest, "trap '' ABRT; sleep 1000", timeout=12)
    assert outcome.code is None
    assert "did not end in time" in outcome.problem
    assert outcome.seconds < 60


@pytest.fixture(scope="module")
def inner(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run with every kind of result, on the host, for no kernel is needed to write it down."""
    folder = tmp_path_factory.mktemp("inner")
    (folder / "test_inner.py").write_text(INNER)
    junit = folder / "junit.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={junit}",
        str(folder),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    console = "ready\n[ 1.0] WARNING: CPU: 0 PID: 1 at x.c\nwell\n"
    return Outcome(done.returncode, "", done.stdout, console, junit.read_text(), 1.0)


@pytest.fixture
def two(tmp_path: Path) -> Kernel:
    (tmp_path / "release").write_text("1.2.3\n")
    return Kernel("two", "", "none", tmp_path, (), ("net", "vsock"))


def test_report(inner: Outcome, two: Kernel) -> None:
    report = read(two, inner)
    assert (report.passed, len(report.failures), len(report.skipped)) == (1, 2, 1)
    assert dict(report.facilities) == {"net": 1}
    problems = "\n".join(report.problems(skips_fail=False))
    assert "one is not two" in problems
    assert "at the end" in problems
    assert "WARNING: CPU" in problems
    assert "no wish" not in problems
    assert "no wish" in "\n".join(report.problems(skips_fail=True))
    assert "1 passed, 2 failed, 1 skipped" in report.lines()[0]


def test_a_facility_that_nobody_used_is_a_problem(two: Kernel) -> None:
    junit = (
        '<testsuites><testsuite><testcase classname="a" name="b"><properties>'
        '<property name="facility" value="net"/></properties></testcase></testsuite></testsuites>'
    )
    report = read(two, Outcome(0, "", "1 passed", "", junit, 1.0))
    assert report.problems(skips_fail=True) == ["no test used vsock"]


@pytest.mark.parametrize(
    "outcome", [Outcome(None, "it went down", "", "", "", 1.0), Outcome(5, "", "", "", "", 1.0)]
)
def test_a_run_without_results_is_a_problem(outcome: Outcome, two: Kernel) -> None:
    assert read(two, outcome).problems(skips_fail=False)
