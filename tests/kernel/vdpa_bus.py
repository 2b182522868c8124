# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Devices on the vDPA bus: made with the ``vdpa`` program, bound to the driver that a test wants.

``vdpa dev add`` and ``del`` wait for a VDUSE daemon, so whoever serves one must run meanwhile.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BUS = Path("/sys/bus/vdpa")


def vdpa(*words: str) -> str:
    done = subprocess.run(["vdpa", *words], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"vdpa {' '.join(words)}: {done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def device(name: str, management: str, *attributes: str, driver: str = "vhost_vdpa") -> Iterator[Path]:
    """Add a device and bind it; its folder in sysfs."""
    (BUS / "drivers_autoprobe").write_text("0")
    vdpa("dev", "add", "name", name, "mgmtdev", management, *attributes)
    try:
        (BUS / "drivers" / driver / "bind").write_text(name)
        yield BUS / "devices" / name
    finally:
        vdpa("dev", "del", name)


@contextmanager
def vhost_vdpa(name: str, management: str, *attributes: str) -> Iterator[str]:
    """The same, for a process: the path of its node."""
    with device(name, management, *attributes) as folder:
        (node,) = folder.glob("vhost-vdpa-*")
        yield f"/dev/{node.name}"
