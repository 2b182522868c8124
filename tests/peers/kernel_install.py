# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Download a Debian kernel and keep what a guest needs of it: the image and a few modules.

Knows Debian's kernel packages, the boot protocol's header and a module's own list of dependencies.
Does not install anything on the machine. Standard library only.
"""

from __future__ import annotations

import lzma
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from peers.apt import Apt, say
from peers.kernels import Kernel
from peers.vdpa_sim import build_vdpa_sim

REAL_PACKAGE = r"linux-(image|binary|modules)-\d.*"  # since 7.x the image is split in three


def extract_vmlinux(bzimage: bytes) -> bytes | None:
    """The ELF image inside a bzImage (Linux Documentation/arch/x86/boot.rst); QEMU starts it by
    PVH, which saves the guest from unpacking it under TCG. None: the program for it is not there."""
    setup_sectors = bzimage[0x1F1] or 4
    start = (setup_sectors + 1) * 512 + int.from_bytes(bzimage[0x248:0x24C], "little")
    payload = bzimage[start : start + int.from_bytes(bzimage[0x24C:0x250], "little")]
    if payload.startswith(b"\xfd7zXZ\x00"):
        return lzma.LZMADecompressor().decompress(payload)
    unpackers = {b"\x28\xb5\x2f\xfd": "zstd", b"\x02\x21\x4c\x18": "lz4"}
    program = unpackers.get(payload[:4])
    if program is None or not shutil.which(program):
        return None
    # The unpacked size follows the stream as four bytes of its own.
    done = subprocess.run([program, "-dcq"], input=payload[:-4], capture_output=True)
    return done.stdout if done.returncode == 0 and done.stdout[:4] == b"\x7fELF" else None


def _canonical(name: str) -> str:
    """A file may be called virtio-rng.ko and the module virtio_rng."""
    return name.replace("-", "_")


class Modules:
    """The modules of an unpacked package, and the order that their dependencies ask for."""

    def __init__(self, root: Path) -> None:
        files = list(root.rglob("*.ko")) + list(root.rglob("*.ko.xz"))
        self._files = {_canonical(file.name.split(".ko")[0]): file for file in files}
        self._data: dict[str, bytes] = {}

    def data(self, name: str) -> bytes:
        if name not in self._data:
            raw = self._files[name].read_bytes()
            self._data[name] = lzma.decompress(raw) if self._files[name].suffix == ".xz" else raw
        return self._data[name]

    def depends(self, name: str) -> list[str]:
        # The section .modinfo is a row of "key=value" strings, each with its zero (what depmod reads).
        match = re.search(rb"\0depends=([\w,-]*)\0", self.data(name))
        return [_canonical(part.decode()) for part in match[1].split(b",") if part] if match else []

    def ordered(self, names: Iterable[str], loaded: Iterable[str] = ()) -> list[str]:
        """The names that exist, each after what it depends on, without what is loaded already."""
        done = list(loaded)
        start = len(done)

        def add(name: str) -> None:
            if name not in done and name in self._files:
                for dependency in self.depends(name):
                    add(dependency)
                done.append(name)

        for name in names:
            add(_canonical(name))
        return done[start:]


def install_kernel(apt: Apt, kernel: Kernel) -> None:
    packages = apt.depends(kernel.package, kernel.suite, REAL_PACKAGE)
    for package in packages:  # grows while it is walked
        packages += (
            name for name in apt.depends(package, kernel.suite, REAL_PACKAGE) if name not in packages
        )
    say(f"{' '.join(packages)}: download and unpack")
    staging = kernel.folder.with_name(f"{kernel.folder.name}.new")
    shutil.rmtree(staging, ignore_errors=True)
    package, target = staging / "package", staging / "kernel"
    for folder in (package, target / "modules"):
        folder.mkdir(parents=True)
    apt.unpack(packages, kernel.suite, package)
    image = next(package.glob("boot/vmlinuz-*"), None) or next(package.rglob("vmlinuz"))
    shutil.copy(image, target / "vmlinuz")
    vmlinux = extract_vmlinux(image.read_bytes())
    if vmlinux is not None:
        (target / "vmlinux").write_bytes(vmlinux)
    (tree,) = (
        package.glob("lib/modules/*") if (package / "lib").exists() else package.glob("usr/lib/modules/*")
    )
    if "vdpa_sim" in kernel.facilities:
        build_vdpa_sim(apt, kernel.suite, tree.name, tree)
    modules = Modules(tree)
    boot = modules.ordered(kernel.boot)
    run = modules.ordered(kernel.run, boot)
    for name in (*boot, *run):
        (target / "modules" / f"{name}.ko").write_bytes(modules.data(name))
    (target / "order.boot").write_text("".join(f"{name}\n" for name in boot))
    (target / "order.run").write_text("".join(f"{name}\n" for name in run))
    (target / "release").write_text(tree.name + "\n")
    (target / "complete").write_text(f"{packages[0]} {kernel.recipe}\n")
    # All at once, for others who share the cache.
    shutil.rmtree(kernel.folder, ignore_errors=True)
    target.rename(kernel.folder)
    shutil.rmtree(staging)
