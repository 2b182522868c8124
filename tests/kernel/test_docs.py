# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The examples of docs/kernel.md, and the README's of the kernel, are run as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernel.vdpa_bus import vhost_vdpa

ROOT = Path(__file__).resolve().parents[2]


def run_example(document: str, number: int, *arguments: str) -> str:
    code = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)[number]
    code = code if "import vhost" in code else f"import vhost\n{code}"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.kernel("net")
def test_frames_through_a_tap() -> None:
    assert run_example("docs/kernel.md", 0) == "on the tap: hello\nfrom the tap: hello\n"


@pytest.mark.kernel("net")
def test_nic_of_the_readme() -> None:
    assert run_example("README.md", 2) == ""


@pytest.mark.kernel("vdpa", "vdpa_sim")
def test_disk_on_the_vdpa_bus() -> None:
    with vhost_vdpa("docs", "vdpasim_blk") as path:
        out = run_example("docs/kernel.md", 1, path)
    assert out.startswith("<DeviceId.BLOCK: 2> 1 queue(s)\nread back True ")


@pytest.mark.kernel("vsock")
def test_sockets_without_a_guest() -> None:
    assert run_example("docs/kernel.md", 2) == "42 from the guest\nfrom the host\n"
