#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Install the real programs that tests/peers and benchmarks use, on Debian.

    python3 tests/install_peers.py            what the tests and the benchmarks need
    python3 tests/install_peers.py --check    install nothing; say what is missing, exit 1 if so
    python3 tests/install_peers.py --benchmarks   and Rust, for what only the benchmarks compare with
    python3 tests/install_peers.py --free-threaded    only a CPython without the interpreter's lock

Without root it installs what it can and names the packages that are missing; it then ends with 0,
unless CI=true.

Quick when all is there. Programs come from ``apt-get install`` and so need root; the guests' kernels,
kernel headers, libblkio, virtiofsd, User Mode Linux and vhost-user-gpu are only downloaded and unpacked
below ``.cache/`` (or ``PYVHOST_CACHE``), and QEMU's contrib/vhost-user-blk is built there from Debian's
source, which any user may do. What this release lacks comes from other suites, through apt lists of our own
below the cache with those suites at priority 50, so that the machine's own apt configuration stays as it is:
on Debian 12 QEMU, libblkio and virtiofsd, and everywhere most of the kernels (``peers/kernels.py``).

Knows which package each peer is in. Does not know what the tests do with the programs. Standard library only.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import sys
from collections.abc import Collection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers.apt import Apt, codename, run, say
from peers.catalogue import (
    BENCHMARK_PEERS,
    BUILD_PACKAGES,
    BUILD_PROGRAMS,
    CONTRIB_BLK,
    CRATES,
    FREE_THREADED_PEERS,
    KERNEL_HEADERS,
    LIBBLKIO,
    LIBVHOST_USER,
    PEERS,
    QEMU_PPC,
    UML,
    VHOST_USER_GPU,
    VIRTIOFSD,
    Peer,
)
from peers.free_threaded import LIBRARIES, SUITE, install_free_threaded
from peers.kernel_install import install_kernel
from peers.kernels import CACHE, CLOUD, KERNELS, NEWEST_SUITE, REPOSITORY, Kernel

# The suites that a release lacks something from: (QEMU, what is unpacked). None: its own is fine.
EXTRA_SUITES = {"bookworm": ("bookworm-backports", "trixie")}


def unpack(apt: Apt, name: str, suite: str, into: Path) -> None:
    """The packages of a peer that is used from where it is unpacked."""
    say(f"{name}: download and unpack")
    shutil.rmtree(into, ignore_errors=True)
    apt.unpack({**PEERS, **BENCHMARK_PEERS}[name].packages, suite, into)
    (into / "complete").write_text("\n")


def install_contrib_blk(apt: Apt, suite: str) -> None:
    """QEMU's sample back-end, from Debian's source package with gcc alone and a shim of headers; and the
    source of the library that it is made with."""
    say("contrib/vhost-user-blk: download QEMU's source and build")
    folder = CACHE / "qemu-source"
    wanted = (
        "contrib/vhost-user-blk/",
        "subprojects/libvhost-user/",
        "include/standard-headers/",
        "include/qemu/",
    )
    apt.source("qemu", suite, folder, wanted)
    CONTRIB_BLK.parent.mkdir(exist_ok=True)
    library = folder / "subprojects" / "libvhost-user"
    includes = [REPOSITORY / "tests" / "peers" / "qemu_shim", library]
    sources = [
        folder / "contrib" / "vhost-user-blk" / "vhost-user-blk.c",
        library / "libvhost-user.c",
        library / "libvhost-user-glib.c",
    ]
    run(
        *("gcc", "-O2", "-D_GNU_SOURCE", "-w"),
        *(f"-I{path}" for path in includes),
        *("-o", str(CONTRIB_BLK), *map(str, sources)),
        *run("pkg-config", "--cflags", "--libs", "glib-2.0").split(),
        "-lpthread",
    )
    # What the benchmarks compile together with their own use of it.
    shutil.rmtree(LIBVHOST_USER, ignore_errors=True)
    shutil.copytree(library, LIBVHOST_USER)  # links are followed: the standard headers come with it
    (LIBVHOST_USER / "complete").write_text("\n")
    shutil.rmtree(folder)


def _kernels() -> dict[str, Kernel]:
    return {"kernel": CLOUD, **{f"kernel-{name}": kernel for name, kernel in KERNELS.items()}}


def missing(peers: dict[str, Peer]) -> dict[str, str]:
    reasons = {name: peer.missing() for name, peer in peers.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def report(reasons: dict[str, str], peers: dict[str, Peer]) -> None:
    for name, reason in reasons.items():
        say(f"{name}: {reason}; Debian package: {', '.join(peers[name].packages)}")


def install(todo: Collection[str]) -> None:
    """Of these names, all that this user may."""
    release = codename()
    qemu_suite, blkio_suite = EXTRA_SUITES.get(release, (release, release))
    kernels = [kernel for name, kernel in _kernels().items() if name in todo]
    suites = (qemu_suite, blkio_suite, NEWEST_SUITE, SUITE, *(kernel.suite for kernel in kernels))
    apt = Apt(CACHE / "apt", dict.fromkeys(suites))
    if os.geteuid() == 0:
        qemu = [package for name in ("qemu", "qsd") if name in todo for package in PEERS[name].packages]
        tools = [
            package
            for name in ("busybox", "cpio", "gcc", "iproute2", "dpdk")
            if name in todo
            for package in PEERS[name].packages
        ]
        if kernels:
            tools += ["lz4", "zstd"]  # images are packed with them
        if any(kernel.builds for kernel in kernels):
            tools += BUILD_PACKAGES
        if {"contrib-vhost-user-blk", "libvhost-user"} & set(todo):
            tools += ["pkg-config", "libglib2.0-dev"]
        if "free-threaded" in todo:
            tools += LIBRARIES
        if "cargo" in todo:
            tools.append("cargo-web" if release == "bookworm" else "cargo")
        if tools:
            say(f"apt-get install {' '.join(tools)}")
            apt("install", "-y", "--no-install-recommends", *tools)
        if qemu:
            say(f"apt-get install -t {qemu_suite} {' '.join(qemu)}")
            apt("install", "-y", "--no-install-recommends", "-t", qemu_suite, *qemu)
    for kernel in kernels:
        if not kernel.builds or all(map(shutil.which, BUILD_PROGRAMS)):
            install_kernel(apt, kernel)
    if "libblkio" in todo:
        unpack(apt, "libblkio", blkio_suite, LIBBLKIO)
    if "qemu-ppc" in todo:
        unpack(apt, "qemu-ppc", qemu_suite, QEMU_PPC)
    if "uml" in todo:
        unpack(apt, "uml", "", UML)
    if "vhost-user-gpu" in todo:
        unpack(apt, "vhost-user-gpu", "", VHOST_USER_GPU)
    if "virtiofsd" in todo:
        unpack(apt, "virtiofsd", blkio_suite, VIRTIOFSD)
    if "kernel-headers" in todo:
        unpack(apt, "kernel-headers", NEWEST_SUITE, KERNEL_HEADERS)
    if {"contrib-vhost-user-blk", "libvhost-user"} & set(todo) and all(
        map(shutil.which, ("gcc", "pkg-config"))
    ):
        install_contrib_blk(apt, qemu_suite)
    if "virtio-queue" in todo:
        unpack(apt, "virtio-queue", blkio_suite, CRATES)
    if "free-threaded" in todo:
        install_free_threaded(apt)
    shutil.rmtree(apt.root)  # 80 MB of lists that the next run would fetch again


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="install nothing")
    parser.add_argument("--benchmarks", action="store_true", help="and what only the benchmarks need")
    parser.add_argument(
        "--free-threaded", action="store_true", help="nothing but an interpreter without the lock"
    )
    options = parser.parse_args()
    peers = {**PEERS, **BENCHMARK_PEERS} if options.benchmarks else PEERS
    if options.free_threaded:
        peers = FREE_THREADED_PEERS
    may_install = not options.check and shutil.which("apt-get")
    todo = missing(peers)
    if todo and may_install:
        CACHE.mkdir(parents=True, exist_ok=True)
        with (CACHE / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two share a folder of apt's, which waits for nobody
            if todo := missing(peers):
                install(todo)
        todo = missing(peers)
    report(todo, peers)
    if not todo:
        say("all there")
    # A person without root goes on with the tests that can run; in CI nothing may be missing.
    return 1 if todo and (not may_install or os.environ.get("CI") == "true") else 0


if __name__ == "__main__":
    sys.exit(main())
