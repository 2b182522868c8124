# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""tests/kernel, on each kernel that Debian has for us: one boot each, the failures of the inside shown.

Knows how to start the runs, two at a time, since each keeps about one core busy. What is tested is in
tests/kernel; ``tests/guest/kernel.py`` runs a part of it by hand.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from guest.kernel import Outcome, pytest_command, run_in_kernel
from guest.report import read
from peers.conftest import KERNEL_REPORTS
from peers.kernels import KERNELS
from peers.support import require

pytestmark = pytest.mark.guest

TIMEOUT = 1500.0

Runs = dict[str, Future[Outcome]]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[Runs]:
    """The runs of all kernels that are selected and there, started with the first that is asked for."""
    chosen = {
        item.callspec.params["name"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.function is test_kernel
    }
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {
            name: pool.submit(run_in_kernel, kernel, pytest_command(["-v"]), timeout=TIMEOUT)
            for name, kernel in KERNELS.items()
            if name in chosen and not kernel.missing()
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", KERNELS)
def test_kernel(name: str, request: pytest.FixtureRequest) -> None:
    require("qemu", "busybox", "cpio", "iproute2", f"kernel-{name}")
    runs: Runs = request.getfixturevalue("runs")
    report = read(KERNELS[name], runs[name].result())
    request.config.stash[KERNEL_REPORTS].append(report)
    problems = report.problems(skips_fail=os.environ.get("CI") == "true")
    if problems:
        pytest.fail("\n\n".join([f"on {report.kernel.release}:", *problems]), pytrace=False)
