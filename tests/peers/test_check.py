# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""`vhost check` on programs that nobody here wrote, and on ours: what fails is what docs/conformance.md says.

Exactly that: a new deviation is noticed, and so is a rule that went soft.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peers import catalogue
from peers.support import make_disk, require

pytestmark = pytest.mark.peer

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "conformance.md"
SIZE = 16 << 20
# Only to tell slow from stuck; the second is for what must not happen.
LIMITS = ("--timeout", "10", "--settle", "0.4")
SERVE = (sys.executable, "-m", "vhost", "serve")


def documented(heading: str) -> set[str]:
    """The rules in the table below a heading."""
    sections = re.split(r"^### ", DOCUMENT.read_text(), flags=re.MULTILINE)
    (section,) = [text for text in sections if text.startswith(heading)]
    return set(re.findall(r"^\| ([a-z-]+\.[\w-]+) \|", section, flags=re.MULTILINE))


def verdicts(*arguments: str | Path, env: dict[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """By rule. The exit code has to fit them."""
    done = subprocess.run(
        [sys.executable, "-m", "vhost", "check", "--json", *LIMITS, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env={**os.environ, **(env or {})},
    )
    assert done.returncode in (0, 1), done.stderr
    results = {result["id"]: result for result in json.loads(done.stdout)["results"]}
    failed = any(result["verdict"] == "fail" for result in results.values())
    assert done.returncode == int(failed)
    return results


def compare(results: dict[str, dict[str, Any]], heading: str) -> None:
    failing = {name: result for name, result in results.items() if result["verdict"] == "fail"}
    wanted = documented(heading)
    news = "\n".join(
        f"{name}: {failing[name]['reason']}\n    " + "\n    ".join(failing[name]["evidence"])
        for name in sorted(failing.keys() - wanted)
    )
    assert not news, f"not in {DOCUMENT.name}:\n{news}"
    assert not wanted - failing.keys(), f"{DOCUMENT.name} says that these fail, and they do not"
    assert len(results) > 200
    assert sum(result["verdict"] == "pass" for result in results.values()) > 150


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.raw", SIZE)


def test_qemu_storage_daemon(tmp_path: Path, disk: Path) -> None:
    require("qsd")
    path = tmp_path / "s"
    export = f"type=vhost-user-blk,id=e,addr.type=unix,addr.path={path},node-name=f,writable=on,num-queues=2"
    command = ["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=f,filename={disk}"]
    compare(verdicts(path, "--write", "--run", *command, "--export", export), "qemu-storage-daemon")


def test_contrib_vhost_user_blk(tmp_path: Path, disk: Path) -> None:
    require("contrib-vhost-user-blk")
    path = tmp_path / "s"
    command = [catalogue.CONTRIB_BLK, "-s", path, "-b", disk]
    compare(verdicts(path, "--write", "--run", *command), "contrib/vhost-user-blk")


def test_virtiofsd(tmp_path: Path) -> None:
    require("virtiofsd")
    path, folder = tmp_path / "s", tmp_path / "shared"
    folder.mkdir()
    command = catalogue.virtiofsd(path, folder)
    compare(verdicts(path, "--device", "fs", "--run", *command), "virtiofsd")


def pmd(vdev: str, mode: str) -> list[str]:
    """testpmd without its prompt, which would end with our end of its standard input."""
    cpu = min(os.sched_getaffinity(0))
    return [
        *("dpdk-testpmd", "--lcores", f"(0,1)@{cpu}", "--no-pci", "--no-telemetry", "--no-huge", "-m", "256"),
        *("--file-prefix", "check", "--vdev", vdev, "--", "--total-num-mbufs=16384", "--disable-link-check"),
        *(f"--forward-mode={mode}", "--stats-period=86400"),
    ]


def test_dpdk_vhost(tmp_path: Path) -> None:
    require("dpdk")
    path = tmp_path / "s"
    command = pmd(f"net_vhost0,iface={path},queues=1", "rxonly")
    results = verdicts(path, "--write", "--run", *command, env={"XDG_RUNTIME_DIR": str(tmp_path)})
    compare(results, "DPDK 22.11's vhost library")


def test_vhost_user_gpu(tmp_path: Path) -> None:
    require("vhost-user-gpu")
    path = tmp_path / "s"
    (libraries,) = catalogue.VHOST_USER_GPU.glob("usr/lib/*-linux-gnu")
    command = [catalogue.VHOST_USER_GPU / "usr/lib/qemu/vhost-user-gpu", f"--socket-path={path}"]
    results = verdicts(path, "--device", "gpu", "--run", *command, env={"LD_LIBRARY_PATH": str(libraries)})
    compare(results, "vhost-user-gpu")


def test_our_disk(tmp_path: Path, disk: Path) -> None:
    path = tmp_path / "s"
    command = [*SERVE, "blk", "--socket-path", path, "--blk-file", disk, "--num-queues", "2"]
    compare(verdicts(path, "--write", "--run", *command), "pyvhost: `vhost serve blk`")
    assert disk.read_bytes() == bytes(SIZE), "the disk is not as it was"


def test_our_disk_in_python(tmp_path: Path, disk: Path) -> None:
    path = tmp_path / "s"
    code = (
        "import sys, vhost\n"
        "make = lambda: vhost.devices.Blk(sys.argv[2], handler='python', num_queues=2)\n"
        "vhost.serve(make, sys.argv[1])"
    )
    command = [sys.executable, "-c", code, path, disk]
    compare(verdicts(path, "--write", "--run", *command), "pyvhost: `vhost serve blk`")
    assert disk.read_bytes() == bytes(SIZE), "the disk is not as it was"


def test_our_rng(tmp_path: Path) -> None:
    path = tmp_path / "s"
    command = [*SERVE, "rng", "--socket-path", path]
    compare(verdicts(path, "--device", "rng", "--run", *command), "pyvhost: `vhost serve rng`")


# -- front-ends ------------------------------------------------------------------------------------


def compare_frontend(results: dict[str, dict[str, Any]], heading: str) -> None:
    failing = {name: result for name, result in results.items() if result["verdict"] == "fail"}
    assert set(failing) == documented(heading), json.dumps(failing, indent=1)
    assert sum(result["verdict"] == "pass" for result in results.values()) > 30


def test_qemu_as_front_end(tmp_path: Path) -> None:
    require("qemu")
    path = tmp_path / "s"
    command = [
        *("qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-m", "128", "-nodefaults", "-no-user-config"),
        *("-display", "none", "-object", "memory-backend-memfd,id=m0,size=128M,share=on"),
        *("-numa", "node,memdev=m0", "-chardev", f"socket,id=c0,path={path}"),
        *("-device", "vhost-user-blk-pci,chardev=c0,num-queues=1"),
    ]
    results = verdicts("--listen", path, "--run", *command)
    compare_frontend(results, "QEMU 10.0 as a front-end")
    for asked in ("ask.config-change", "ask.unknown", "order.stop", "refusal.memory"):
        assert results[asked]["verdict"] == "pass"


def test_libblkio_as_front_end(tmp_path: Path, blkio_bench: Path) -> None:
    path = tmp_path / "s"
    command = [blkio_bench, "--runtime=600", "--iodepth=4", "--readwrite=randread"]
    results = verdicts("--listen", path, "--run", *command, "virtio-blk-vhost-user", f"path={path}")
    compare_frontend(results, "libblkio 1.5 as a front-end")
    assert results["refusal.address"]["verdict"] == "pass"


def test_dpdk_virtio_user_as_front_end(tmp_path: Path) -> None:
    require("dpdk")
    path = tmp_path / "s"
    command = pmd(f"net_virtio_user0,path={path},queues=1", "txonly")
    results = verdicts(
        "--listen", path, "--device", "net", "--run", *command, env={"XDG_RUNTIME_DIR": str(tmp_path)}
    )
    compare_frontend(results, "DPDK 22.11's virtio_user as a front-end")
    assert results["order.stop"]["verdict"] == "pass"
