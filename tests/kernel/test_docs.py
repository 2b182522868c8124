# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The examples of docs/kernel.md are run as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernel.vdpa_bus import vhost_vdpa

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "kernel.md"


def run_example(number: int, *arguments: str) -> str:
    code = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[number]
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.kernel("net")
def test_frames_through_a_tap() -> None:
    assert run_example(0) == "on the tap: hello\nfrom the tap: hello\n"


@pytest.mark.kernel("vdpa", "vdpa_sim")
def test_disk_on_the_vdpa_bus() -> None:
    with vhost_vdpa("docs", "vdpasim_blk") as path:
        out = run_example(1, path)
    assert out.startswith("<DeviceId.BLOCK: 2> 1 queue(s)\nread back True ")
