#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Install the real programs that tests/peers and benchmarks use, on Debian.

    python3 tests/install_peers.py            what the tests need
    python3 tests/install_peers.py --bench    also QEMU's contrib/vhost-user-blk, built from source
    python3 tests/install_peers.py --check    install nothing; say what is missing, exit 1 if so

Without root it installs what it can and names the packages that are missing; it then ends with 0,
unless CI=true.

Quick when all is there. Programs come from ``apt-get install`` and so need root; the guest kernel
and libblkio are only downloaded and unpacked below ``.cache/`` (or ``PYVHOST_CACHE``), which any
user may do. Debian 12 has too old a QEMU and no libblkio: those come from bookworm-backports and
trixie, through apt lists of our own below the cache with those suites at priority 50, so that the
machine's own apt configuration stays as it is.

Knows apt. Does not know what the tests do with the programs. Standard library only.
"""

from __future__ import annotations

import argparse
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers.catalogue import CACHE, CONTRIB_BLK, KERNEL, LIBBLKIO, PEERS, REPOSITORY

# The suites that a release lacks something from: (QEMU, libblkio). None: its own is fine.
EXTRA_SUITES = {"bookworm": ("bookworm-backports", "trixie")}

# In a guest, in this order; "virtio" before "virtio_ring" would miss symbols.
MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
    "rng-core",
    "virtio-rng",
)


def say(text: str) -> None:
    print(f"peers: {text}", flush=True)


def run(*command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a command; its output is shown only when it fails, all of it."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode:
        raise SystemExit(f"peers: {' '.join(command)}: exit {done.returncode}\n{done.stdout}")
    return done.stdout


def codename() -> str:
    release = dict(
        line.strip().split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
    )
    return release.get("VERSION_CODENAME", "").strip('"')


class Apt:
    """apt with sources, lists and preferences of its own, and the machine's dpkg status."""

    def __init__(self) -> None:
        self.root = CACHE / "apt"
        self.sources, preferences = self.root / "sources.list.d", self.root / "preferences.d"
        for folder in (
            self.sources,
            preferences,
            self.root / "lists/partial",
            self.root / "archives/partial",
        ):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        etc = Path("/etc/apt")
        for file in (etc / "sources.list", *etc.glob("sources.list.d/*")):
            if file.suffix in (".list", ".sources") and file.exists():
                (self.sources / file.name).symlink_to(file)
        for file in (etc / "preferences", *etc.glob("preferences.d/*")):
            if file.suffix in ("", ".pref") and file.exists():
                (preferences / file.name).symlink_to(file)
        config = self.root / "apt.conf"
        config.write_text(
            'Dir::Etc::SourceList "/dev/null";\n'
            f'Dir::Etc::SourceParts "{self.sources}";\n'
            'Dir::Etc::Preferences "/dev/null";\n'
            f'Dir::Etc::PreferencesParts "{preferences}";\n'
            f'Dir::State::Lists "{self.root}/lists";\n'
            f'Dir::Cache "{self.root}";\n'
            f'Dir::Cache::Archives "{self.root}/archives";\n'
            # The sandbox user may not enter a home directory; every index and package is still verified.
            'APT::Sandbox::User "root";\n'
            'Acquire::Retries "3";\n'
        )
        self.env = {**os.environ, "APT_CONFIG": str(config), "LC_ALL": "C"}
        self.env["DEBIAN_FRONTEND"] = "noninteractive"
        say("apt-get update (lists of our own)")
        self("update")
        release = codename()
        self.qemu_suite, self.blkio_suite = EXTRA_SUITES.get(release, (release, release))
        extra = EXTRA_SUITES.get(release, ())
        if extra:
            self._add_suites(release, extra, preferences)

    def _add_suites(self, release: str, suites: Sequence[str], preferences: Path) -> None:
        """Take more suites from wherever this machine has its own release from."""
        targets = self("indextargets", "--format", "$(CODENAME) $(REPO_URI)", "Created-By: Packages")
        addresses = [line.split(" ", 1)[1] for line in targets.splitlines() if line.startswith(f"{release} ")]
        if not addresses:
            raise SystemExit(f"peers: apt has no source for {release}:\n{targets}")
        keys = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
        (self.sources / "pyvhost-extra.sources").write_text(
            "\n".join(
                f"Types: deb deb-src\nURIs: {addresses[0]}\nSuites: {suite}\nComponents: main\n"
                f"Signed-By: {keys}\n"
                for suite in suites
            )
        )
        (preferences / "pyvhost").write_text(
            "\n".join(f"Package: *\nPin: release n={suite}\nPin-Priority: 50\n" for suite in suites)
        )
        self("update")

    def __call__(self, *arguments: str, cwd: Path | None = None) -> str:
        return run("apt-get", "-q", *arguments, cwd=cwd, env=self.env)

    def unpack(self, packages: Sequence[str], suite: str, into: Path) -> None:
        """Download packages and unpack them somewhere without installing them."""
        downloads = self.root / "downloads"
        shutil.rmtree(downloads, ignore_errors=True)
        downloads.mkdir()
        self("download", *(f"{package}/{suite}" if suite else package for package in packages), cwd=downloads)
        for package in downloads.glob("*.deb"):
            run("dpkg", "-x", str(package), str(into))
        shutil.rmtree(downloads)

    def kernel_package(self) -> str:
        """The real package behind linux-image-cloud-amd64."""
        text = run("apt-cache", "depends", "linux-image-cloud-amd64", env=self.env)
        return next(line.split()[1] for line in text.splitlines() if "Depends: linux-image-" in line)


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


def install_kernel(apt: Apt) -> None:
    package = apt.kernel_package()
    say(f"{package}: download and unpack")
    staging = CACHE / "kernel.new"
    shutil.rmtree(staging, ignore_errors=True)
    apt.unpack([package], "", staging)
    shutil.rmtree(KERNEL, ignore_errors=True)
    modules = KERNEL / "modules"
    modules.mkdir(parents=True)
    (image,) = (staging / "boot").glob("vmlinuz-*")
    shutil.copy(image, KERNEL / "vmlinuz")
    vmlinux = extract_vmlinux(image.read_bytes())
    if vmlinux is not None:
        (KERNEL / "vmlinux").write_bytes(vmlinux)
    order = []
    for name in MODULES:
        found = list((staging / "lib" / "modules").rglob(f"{name}.ko*"))
        if not found:
            continue  # built in
        data = found[0].read_bytes()
        (modules / f"{name}.ko").write_bytes(lzma.decompress(data) if found[0].suffix == ".xz" else data)
        order.append(name)
    (KERNEL / "order").write_text("\n".join(order) + "\n")
    shutil.rmtree(staging)
    (KERNEL / "complete").write_text(package + "\n")


def install_libblkio(apt: Apt) -> None:
    say("libblkio: download and unpack")
    shutil.rmtree(LIBBLKIO, ignore_errors=True)
    apt.unpack(PEERS["libblkio"].packages, apt.blkio_suite, LIBBLKIO)
    (LIBBLKIO / "complete").write_text("\n")


def install_contrib_blk(apt: Apt) -> None:
    """QEMU's sample back-end, from Debian's source package with gcc alone and a shim of headers."""
    say("contrib/vhost-user-blk: download QEMU's source and build")
    folder = CACHE / "qemu-source"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    apt("source", "--download-only", "--tar-only", f"qemu/{apt.qemu_suite}", cwd=folder)
    (tarball,) = folder.glob("qemu_*.orig.tar.*")
    wanted = (
        "contrib/vhost-user-blk/",
        "subprojects/libvhost-user/",
        "include/standard-headers/",
        "include/qemu/",
    )
    with tarfile.open(tarball) as archive:
        # Debian 12's Python does not know filters yet, and ignores the attribute.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        for member in archive:
            member.name = member.name.split("/", 1)[-1]
            if member.name.startswith(wanted):
                archive.extract(member, folder)
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
    shutil.rmtree(folder)


def missing(bench: bool) -> dict[str, str]:
    reasons = {name: peer.missing() for name, peer in PEERS.items() if bench or not peer.benchmark_only}
    return {name: reason for name, reason in reasons.items() if reason}


def report(reasons: dict[str, str]) -> None:
    for name, reason in reasons.items():
        say(f"{name}: {reason}; Debian package: {', '.join(PEERS[name].packages)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--bench", action="store_true", help="also what only the benchmarks use")
    parser.add_argument("--check", action="store_true", help="install nothing")
    options = parser.parse_args()
    todo = missing(options.bench)
    if not todo:
        say("all there")
        return 0
    if options.check or not shutil.which("apt-get"):
        report(todo)
        return 1
    CACHE.mkdir(parents=True, exist_ok=True)
    apt = Apt()
    if os.geteuid() == 0:
        qemu = [package for name in ("qemu", "qsd") if name in todo for package in PEERS[name].packages]
        tools = [
            package for name in ("busybox", "cpio", "gcc") if name in todo for package in PEERS[name].packages
        ]
        if "kernel" in todo:
            tools += ["lz4"]  # the kernel is packed with it
        if "contrib-vhost-user-blk" in todo:
            tools += ["pkg-config", "libglib2.0-dev"]
        if tools:
            say(f"apt-get install {' '.join(tools)}")
            apt("install", "-y", "--no-install-recommends", *tools)
        if qemu:
            say(f"apt-get install -t {apt.qemu_suite} {' '.join(qemu)}")
            apt("install", "-y", "--no-install-recommends", "-t", apt.qemu_suite, *qemu)
    if "kernel" in todo:
        install_kernel(apt)
    if "libblkio" in todo:
        install_libblkio(apt)
    if "contrib-vhost-user-blk" in todo:
        install_contrib_blk(apt)
    shutil.rmtree(apt.root)  # 80 MB of lists that the next run would fetch again
    todo = missing(options.bench)
    report(todo)
    if not todo:
        say("all there")
    # A person without root goes on with the tests that can run; in CI nothing may be missing.
    return 1 if todo and os.environ.get("CI") == "true" else 0


if __name__ == "__main__":
    sys.exit(main())
