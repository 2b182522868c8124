# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Tests of a kernel's own vhost: they run in a guest (``tests/guest/kernel.py``), where PYVHOST_GUEST
is the name of its kernel, and are deselected anywhere else.

``pytest.mark.kernel("vdpa", "net")`` names the facilities that a test needs, of
``peers.kernels.FACILITIES``. A kernel that does not promise one deselects the test; one that promises
it and lacks it fails ``test_promises.py``, and the test too. So nothing here ever skips.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from peers.kernels import FACILITIES, KERNELS, NODES, Kernel

HERE = Path(__file__).resolve().parent
GUEST = os.environ.get("PYVHOST_GUEST", "")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    promised = KERNELS[GUEST].facilities if GUEST else ()
    out = []
    for item in items:
        if not item.path.is_relative_to(HERE):
            continue
        marks = list(item.iter_markers("kernel"))
        if not marks:
            raise pytest.UsageError(f"{item.nodeid} has no pytest.mark.kernel")
        needed = {name for mark in marks for name in mark.args}
        if not needed <= set(FACILITIES):
            raise pytest.UsageError(f"{item.nodeid}: no such facility: {needed - set(FACILITIES)}")
        if not GUEST or not needed <= set(promised):
            out.append(item)
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in set(out)]


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("kernel"):
        for facility in mark.args:
            for node in NODES[facility]:
                if not Path(node).exists():
                    pytest.fail(f"{facility} is promised, but {node} is not there", pytrace=False)


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    """The kernel that this runs on, by what the catalogue says of it."""
    return KERNELS[GUEST]


@pytest.fixture(scope="session")
def kernel_release() -> str:
    return os.uname().release
