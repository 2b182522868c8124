# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""`vhost check` on programs that nobody here wrote, and on ours: what fails is what docs/conformance.md says.

Exactly that: a new deviation is noticed, and so is a rule that went soft. A run waits for most of its time,
so that several go side by side.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from peers import catalogue, programs
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


# -- what is checked -------------------------------------------------------------------------------


class Target(NamedTuple):
    needs: tuple[str, ...]
    heading: str  # in the document
    arguments: Callable[[Path], list[str | Path]]  # of `vhost check`, in a folder of its own
    passes: tuple[str, ...] = ()  # rules that ask this program for something it is known to do
    front_end: bool = False

    def missing(self) -> bool:
        return any(catalogue.PEERS[name].missing() for name in self.needs)


def disk(folder: Path) -> Path:
    return folder / "disk.raw"


def qsd(folder: Path) -> list[str | Path]:
    path = folder / "s"
    export = f"type=vhost-user-blk,id=e,addr.type=unix,addr.path={path},node-name=f,writable=on,num-queues=2"
    blockdev = f"driver=file,node-name=f,filename={disk(folder)}"
    return [path, "--write", "--run", "qemu-storage-daemon", "--blockdev", blockdev, "--export", export]


def contrib(folder: Path) -> list[str | Path]:
    path = folder / "s"
    return [path, "--write", "--run", catalogue.CONTRIB_BLK, "-s", path, "-b", disk(folder)]


def virtiofsd(folder: Path) -> list[str | Path]:
    path, shared = folder / "s", folder / "shared"
    shared.mkdir()
    return [path, "--device", "fs", "--run", *catalogue.virtiofsd(path, shared)]


def pmd(folder: Path, vdev: str, mode: str) -> list[str]:
    """testpmd without its prompt, which would end with our end of its standard input."""
    cpu = min(os.sched_getaffinity(0))
    return [
        *("env", f"XDG_RUNTIME_DIR={folder}"),
        *("dpdk-testpmd", "--lcores", f"(0,1)@{cpu}", "--no-pci", "--no-telemetry", "--no-huge", "-m", "256"),
        *("--file-prefix", "check", "--vdev", vdev, "--", "--total-num-mbufs=16384", "--disable-link-check"),
        *(f"--forward-mode={mode}", "--stats-period=86400"),
    ]


def dpdk_vhost(folder: Path) -> list[str | Path]:
    path = folder / "s"
    return [path, "--write", "--run", *pmd(folder, f"net_vhost0,iface={path},queues=1", "rxonly")]


def vhost_user_gpu(folder: Path) -> list[str | Path]:
    path = folder / "s"
    (libraries,) = catalogue.VHOST_USER_GPU.glob("usr/lib/*-linux-gnu")
    program = catalogue.VHOST_USER_GPU / "usr/lib/qemu/vhost-user-gpu"
    command = ["env", f"LD_LIBRARY_PATH={libraries}", program, f"--socket-path={path}"]
    return [path, "--device", "gpu", "--run", *command]


def our_disk(folder: Path) -> list[str | Path]:
    path = folder / "s"
    command = [*SERVE, "blk", "--socket-path", path, "--blk-file", disk(folder), "--num-queues", "2"]
    return [path, "--write", "--run", *command]


def our_disk_in_python(folder: Path) -> list[str | Path]:
    path = folder / "s"
    code = (
        "import sys, vhost\n"
        "make = lambda: vhost.devices.Blk(sys.argv[2], handler='python', num_queues=2)\n"
        "vhost.serve(make, sys.argv[1])"
    )
    return [path, "--write", "--run", sys.executable, "-c", code, path, disk(folder)]


def our_rng(folder: Path) -> list[str | Path]:
    path = folder / "s"
    return [path, "--device", "rng", "--run", *SERVE, "rng", "--socket-path", path]


def qemu(folder: Path) -> list[str | Path]:
    path = folder / "s"
    return [
        *("--listen", path, "--run"),
        *("qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-m", "128", "-nodefaults", "-no-user-config"),
        *("-display", "none", "-object", "memory-backend-memfd,id=m0,size=128M,share=on"),
        *("-numa", "node,memdev=m0", "-chardev", f"socket,id=c0,path={path}"),
        *("-device", "vhost-user-blk-pci,chardev=c0,num-queues=1"),
    ]


def libblkio(folder: Path) -> list[str | Path]:
    path = folder / "s"
    client = [programs.blkio_bench(folder), "--runtime=600", "--iodepth=4", "--readwrite=randread"]
    return ["--listen", path, "--run", *client, "virtio-blk-vhost-user", f"path={path}"]


def virtio_user(folder: Path) -> list[str | Path]:
    path = folder / "s"
    command = pmd(folder, f"net_virtio_user0,path={path},queues=1", "txonly")
    return ["--listen", path, "--device", "net", "--run", *command]


TARGETS = {
    "dpdk-vhost": Target(("dpdk",), "DPDK 22.11's vhost library", dpdk_vhost),
    "virtiofsd": Target(("virtiofsd",), "virtiofsd", virtiofsd),
    "contrib": Target(("contrib-vhost-user-blk",), "contrib/vhost-user-blk", contrib),
    "vhost-user-gpu": Target(("vhost-user-gpu",), "vhost-user-gpu", vhost_user_gpu),
    "qsd": Target(("qsd",), "qemu-storage-daemon", qsd),
    "our-disk": Target((), "pyvhost: `vhost serve blk`", our_disk),
    "our-disk-in-python": Target((), "pyvhost: `vhost serve blk`", our_disk_in_python),
    "our-rng": Target((), "pyvhost: `vhost serve rng`", our_rng),
    "qemu": Target(
        ("qemu",),
        "QEMU 10.0 as a front-end",
        qemu,
        ("ask.config-change", "ask.unknown", "order.stop", "refusal.memory"),
        front_end=True,
    ),
    "libblkio": Target(
        ("gcc", "libblkio"), "libblkio 1.5 as a front-end", libblkio, ("refusal.address",), front_end=True
    ),
    "virtio-user": Target(
        ("dpdk",), "DPDK 22.11's virtio_user as a front-end", virtio_user, ("order.stop",), front_end=True
    ),
}

# -- that it is so ---------------------------------------------------------------------------------


def check(target: Target, folder: Path) -> subprocess.CompletedProcess[str]:
    make_disk(disk(folder), SIZE)
    return subprocess.run(
        [sys.executable, "-m", "vhost", "check", "--json", *LIMITS, *map(str, target.arguments(folder))],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


Runs = dict[str, tuple[Path, Future[subprocess.CompletedProcess[str]]]]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """All that are selected, and whose programs are there; started with the first that is asked for."""
    chosen = [
        item.callspec.params["name"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.function is test_check
    ]
    with ThreadPoolExecutor(max_workers=3) as pool:
        started: Runs = {}
        for name in chosen:
            if not TARGETS[name].missing():
                folder = tmp_path_factory.mktemp(name)
                started[name] = folder, pool.submit(check, TARGETS[name], folder)
        yield started
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", TARGETS)
def test_check(name: str, request: pytest.FixtureRequest) -> None:
    target = TARGETS[name]
    require(*target.needs)
    runs: Runs = request.getfixturevalue("runs")
    folder, run = runs[name]
    done = run.result()
    assert done.returncode in (0, 1), done.stderr
    results: dict[str, dict[str, Any]] = {
        result["id"]: result for result in json.loads(done.stdout)["results"]
    }
    failing = {rule: result for rule, result in results.items() if result["verdict"] == "fail"}
    assert done.returncode == bool(failing)
    wanted = documented(target.heading)
    news = "\n".join(
        f"{rule}: {failing[rule]['reason']}\n    " + "\n    ".join(failing[rule]["evidence"])
        for rule in sorted(failing.keys() - wanted)
    )
    assert not news, f"not in {DOCUMENT.name}:\n{news}"
    assert not wanted - failing.keys(), f"{DOCUMENT.name} says that these fail, and they do not"
    for rule in target.passes:
        assert results[rule]["verdict"] == "pass"
    assert len(results) > (60 if target.front_end else 200)
    assert sum(result["verdict"] == "pass" for result in results.values()) > (30 if target.front_end else 150)
    if name.startswith("our-disk"):
        assert disk(folder).read_bytes() == bytes(SIZE), "the disk is not as it was"
