# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Ring libraries of others, compiled together with our use of them: libvhost-user, rust-vmm's virtio-queue.

Knows where `make peers` put their sources and how each is built. Each function gives the library, or the
reason why there is none.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import compile

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
catalogue = importlib.import_module("peers.catalogue")
SHIM = compile.HERE.parent / "tests" / "peers" / "qemu_shim"
RUST = compile.HERE / "virtqueue_rust"


def libvhost_user(name: str, source: Path) -> ctypes.CDLL | str:
    """libvhost-user, with a file of ours that calls it."""
    if why := catalogue.PEERS["libvhost-user"].missing():
        return f"{why} (make peers)"
    folder = catalogue.LIBVHOST_USER
    return compile.library(
        name,
        [],
        # Its headers do not stand our warnings.
        foreign=[source, folder / "libvhost-user.c"],
        include=(compile.HERE, folder, SHIM),
        flags=("-D_GNU_SOURCE",),
    )


def virtio_queue(profile: str) -> ctypes.CDLL | str:
    """virtio-queue with our use of it, in a profile of its Cargo.toml; built by cargo without the network."""
    if shutil.which("cargo") is None:
        return "cargo is not installed (make bench, as root)"
    if why := catalogue.BENCHMARK_PEERS["virtio-queue"].missing():
        return f"{why} (make bench)"
    crates = catalogue.CRATES / "usr" / "share" / "cargo" / "registry"
    digest = hashlib.sha256(" ".join([profile, *sorted(path.name for path in crates.iterdir())]).encode())
    for path in (RUST / "Cargo.toml", RUST / "src" / "lib.rs"):
        digest.update(path.read_bytes())
    made = compile.folder() / f"virtqueue_rust-{digest.hexdigest()[:16]}.so"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=made.parent) as scratch:
            build = Path(scratch) / "build"
            shutil.copytree(RUST, build, ignore=shutil.ignore_patterns("target", "Cargo.lock"))
            command = ["cargo", "build", "--quiet", "--profile", profile, "--offline"]
            command += ["--config", 'source.crates-io.replace-with="unpacked"']
            command += ["--config", f'source.unpacked.directory="{crates}"']
            environment = {**os.environ, "CARGO_TARGET_DIR": str(build / "target")}
            done = subprocess.run(
                command,
                cwd=build,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            if done.returncode:
                return f"cargo cannot build it: {done.stdout.strip().splitlines()[-1]}"
            (build / "target" / profile / "libvirtqueue_rust.so").replace(made)
    return ctypes.CDLL(str(made))
