# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The wheel as a stranger gets it: built from the sdist, installed alone, used from elsewhere."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

SMOKE = """
import vhost
from vhost.memory import GuestMemory, Region
from vhost.virtqueue import DriverQueue
memory = GuestMemory([Region.allocate(1 << 20)])
layout = DriverQueue.layout(7, packed=True)
queue = DriverQueue(memory, 7, desc=layout.desc, avail=layout.avail, used=layout.used, packed=True)
queue.add([(65536, 16)], [(131072, 1)], "token")
print(vhost.__file__)
"""


def run(*command: object, cwd: Path) -> str:
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs the git checkout: what it tracks is what is packed")
    tree = tmp_path_factory.mktemp("tree")
    for name in run("git", "ls-files", cwd=ROOT).splitlines():
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    run(sys.executable, "-m", "build", "--no-isolation", cwd=tree)
    (built,) = (tree / "dist").glob("*.whl")
    return built


def test_wheel_works_alone(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", wheel, cwd=tmp_path)
    assert str(tmp_path) in run(python, "-c", SMOKE, cwd=tmp_path)
    rows = json.loads(run(tmp_path / "venv" / "bin" / "vhost", "messages", "--json", cwd=tmp_path))
    assert len(rows) == 45 + 10 + 12  # front-end, back-end, GPU
    usage = run(python, "-m", "vhost", "--help", cwd=tmp_path)
    assert "serve" in usage
    assert "probe" in usage


def test_wheel_is_typed_and_has_no_sources_of_the_build(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "vhost/py.typed" in names
    assert "vhost/memory.pyi" in names
    assert "vhost/device_queue.pyi" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "csrc/"))]
    assert not [name for name in names if name.endswith(".c")]


def test_wheel_has_baseline_instructions_only(wheel: Path, tmp_path: Path) -> None:
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump (package binutils)")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    modules = list(tmp_path.rglob("*.so"))
    assert len(modules) >= 3
    for module in modules:
        code = run("objdump", "-d", "--no-show-raw-insn", module, cwd=tmp_path)
        beyond = re.search(r"%[yz]mm\d|\bv(?:mov|pxor|padd)\w*\s+%xmm|\b(?:popcnt|lzcnt|andn|shlx)\b", code)
        assert beyond is None, f"{module.name}: {beyond.group() if beyond else ''}"
