# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The kernel has what the catalogue promises of it, so that no other test is left out by mistake."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from peers.kernels import FACILITIES, NODES, Kernel

pytestmark = pytest.mark.kernel


def test_release(kernel: Kernel, kernel_release: str) -> None:
    assert kernel_release == kernel.release


@pytest.mark.parametrize(
    "node", [pytest.param(n, marks=pytest.mark.kernel(name)) for name, nodes in NODES.items() for n in nodes]
)
def test_node_opens(node: str) -> None:
    descriptor = os.open(node, os.O_RDWR | os.O_CLOEXEC)
    try:
        assert stat.S_ISCHR(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


def test_modules_are_loaded(kernel: Kernel) -> None:
    missing = [path.stem for path in kernel.modules("run") if not Path("/sys/module", path.stem).exists()]
    assert not missing


@pytest.mark.kernel("vdpa")
def test_vdpa_drivers_wait_for_devices() -> None:
    assert sorted(path.name for path in Path("/sys/bus/vdpa/drivers").iterdir()) == [
        "vhost_vdpa",
        "virtio_vdpa",
    ]


def test_every_facility_has_modules() -> None:
    assert set(FACILITIES) == set(NODES)
