# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The real programs that the tests run against: where each one is, and what to install for it.

Knows names, versions and places; standard library only, because the installer runs before any
virtual environment exists. Does not install (``tests/install_peers.py`` does) and does not skip
(``peers.support`` does).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peers.kernels import CACHE, CLOUD, KERNELS, Kernel

LIBBLKIO = CACHE / "libblkio"  # libblkio1 and libblkio-dev, unpacked and not installed
KERNEL_HEADERS = CACHE / "kernel-headers"  # the newest linux-libc-dev, unpacked
UML = CACHE / "uml"  # a Linux that is a program, and a vhost-user front-end; unpacked
VHOST_USER_GPU = CACHE / "vhost-user-gpu"  # QEMU's, and the libraries that it needs; unpacked
QEMU_PPC = CACHE / "qemu-ppc"  # for a guest of the other byte order, with its firmware; unpacked
CONTRIB_BLK = CACHE / "bin" / "vhost-user-blk"
LIBVHOST_USER = CACHE / "libvhost-user"  # its source, from QEMU's
CRATES = CACHE / "crates"  # rust-vmm's virtio-queue and what it needs, sources, unpacked
VIRTIOFSD = CACHE / "virtiofsd"  # unpacked with the C library that it was built for
FREE_THREADED = CACHE / "python-free-threaded"  # a CPython without the interpreter's lock, built
BUSYBOX = Path("/bin/busybox")

# For modules that Debian's kernels lack.
BUILD_PROGRAMS = ("gcc", "make", "strip")
BUILD_PACKAGES = ("gcc", "make", "binutils")

VIRTIOFSD_LIBRARIES = ("libc6", "libseccomp2", "libcap-ng0", "libgcc-s1")
# virtio-queue and its dependencies, as Cargo resolves them for any target.
CRATE_PACKAGES = tuple(
    f"librust-{name}-dev"
    for name in (
        *("virtio-queue", "virtio-bindings", "vm-memory", "vmm-sys-util", "log", "libc", "arc-swap"),
        *("bitflags", "bitflags-1", "thiserror-1", "thiserror-impl-1", "proc-macro2", "quote", "syn"),
        *("unicode-ident", "winapi", "winapi-i686-pc-windows-gnu", "winapi-x86-64-pc-windows-gnu"),
    )
)
# Of vhost-user-gpu: it and what QEMU without a display does not need.
GPU_PACKAGES = (
    "qemu-system-gui",
    *("libvirglrenderer1", "libepoxy0", "libvulkan1", "libva2", "libva-drm2"),
    *("libgbm1", "libdrm2", "libwayland-server0", "libpixman-1-0"),
)

# reconnect-ms appeared in 9.2; the export tells its front-end about a resize since 8.1.
QEMU_MINIMUM = (9, 2)


@dataclass(frozen=True)
class Peer:
    """One program. ``missing`` says in a phrase why it cannot be used; "" means that it can."""

    name: str
    packages: tuple[str, ...]
    missing: Callable[[], str]


def qemu_version(program: str) -> tuple[int, ...] | None:
    """(10, 0, 2) for "QEMU emulator version 10.0.2 (Debian ...)"; None when it is not there."""
    path = shutil.which(program)
    if path is None:
        return None
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"version (\d+(?:\.\d+)+)", text)
    return tuple(int(part) for part in match[1].split(".")) if match else None


def _qemu(program: str) -> Callable[[], str]:
    def missing() -> str:
        version = qemu_version(program)
        if version is None:
            return f"{program} is not installed"
        if version < QEMU_MINIMUM:
            have, want = (".".join(map(str, v)) for v in (version, QEMU_MINIMUM))
            return f"{program} is {have}, {want} or newer is needed"
        return ""

    return missing


def _program(name: str) -> Callable[[], str]:
    # root's programs too: it is the guest's root that runs those.
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    return lambda: "" if shutil.which(name, path=path) else f"{name} is not installed"


def _file(path: Path) -> Callable[[], str]:
    return lambda: "" if path.exists() else f"{path} is not there"


def dpdk() -> str:
    """testpmd, and the drivers that it loads for either end of a vhost-user socket."""
    folders = list(Path("/usr/lib").glob("*/dpdk/pmds-*"))
    for driver in ("vhost", "virtio"):
        if not any(folder.glob(f"librte_net_{driver}.so.*") for folder in folders):
            return f"DPDK's net_{driver} driver is not installed"
    return _program("dpdk-testpmd")()


def virtiofsd(socket: Path, folder: Path) -> list[str]:
    """The command that serves a folder. Its own loader finds it its own C library."""
    (loader,) = (VIRTIOFSD / "usr").glob("lib*/ld-linux-*.so.*")
    (libraries,) = (VIRTIOFSD / "usr" / "lib").glob("*-linux-gnu")
    program = VIRTIOFSD / "usr" / "libexec" / "virtiofsd"
    command = [str(loader), "--library-path", str(libraries), str(program)]
    # Without a sandbox of its own it needs no privileges.
    return [*command, "--socket-path", str(socket), "--shared-dir", str(folder), "--sandbox", "none"]


def static_busybox() -> str:
    """The guest has no C library, so busybox must need none: no interpreter named in the file."""
    if not BUSYBOX.exists():
        return f"{BUSYBOX} is not there"
    with BUSYBOX.open("rb") as file:
        head = file.read(4096)
    return f"{BUSYBOX} is not static" if b"ld-linux" in head else ""


def _kernel(kernel: Kernel) -> Peer:
    build = BUILD_PACKAGES if kernel.builds else ()
    return Peer(f"kernel-{kernel.name}", (f"{kernel.package} of {kernel.suite}", *build), kernel.missing)


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("qemu", ("qemu-system-x86",), _qemu("qemu-system-x86_64")),
        Peer("qsd", ("qemu-utils",), _qemu("qemu-storage-daemon")),
        Peer("busybox", ("busybox-static",), static_busybox),
        Peer("cpio", ("cpio",), _program("cpio")),
        Peer("gcc", ("gcc", "libc6-dev"), _program("gcc")),
        Peer("kernel", (CLOUD.package,), CLOUD.missing),
        *(_kernel(kernel) for kernel in KERNELS.values()),
        # It depends on libdpdk-dev and that on every driver, whose names have the release's ABI in them.
        Peer("dpdk", ("dpdk-dev",), dpdk),
        Peer("iproute2", ("iproute2",), _program("vdpa")),
        Peer("kernel-headers", ("linux-libc-dev",), _file(KERNEL_HEADERS / "complete")),
        Peer("libblkio", ("libblkio1", "libblkio-dev"), _file(LIBBLKIO / "complete")),
        Peer("contrib-vhost-user-blk", ("qemu (source)",), _file(CONTRIB_BLK)),
        Peer("libvhost-user", ("qemu (source)",), _file(LIBVHOST_USER / "complete")),
        Peer("virtiofsd", ("virtiofsd", *VIRTIOFSD_LIBRARIES), _file(VIRTIOFSD / "complete")),
        Peer("uml", ("user-mode-linux",), _file(UML / "complete")),
        Peer("vhost-user-gpu", GPU_PACKAGES, _file(VHOST_USER_GPU / "complete")),
        Peer("qemu-ppc", ("qemu-system-ppc", "qemu-system-data"), _file(QEMU_PPC / "complete")),
    )
}

# What `make bench` compares with, too, and no test needs.
BENCHMARK_PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("virtio-queue", CRATE_PACKAGES, _file(CRATES / "complete")),
        # Debian 12's own is too old for these crates; the other one is for browsers, and newer.
        Peer("cargo", ("cargo", "cargo-web on Debian 12"), _program("cargo")),
    )
}

# The interpreter that `make test-free-threaded` runs on.
FREE_THREADED_PEERS: dict[str, Peer] = {
    "free-threaded": Peer("free-threaded", ("python3.13 (source)",), _file(FREE_THREADED / "complete")),
}
