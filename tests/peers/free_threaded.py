# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A CPython without the interpreter's lock, built from Debian's source of it, which Debian itself does not
build that way.

Knows how it is configured and where it lies; knows nothing of what is tested with it. Standard library only.
"""

from __future__ import annotations

import os
import shutil

from peers.apt import Apt, run, say
from peers.catalogue import FREE_THREADED

VERSION = "3.13"
SUITE = "trixie"
# What pip and the tests' imports need of the system.
LIBRARIES = ("gcc", "make", "pkg-config", "libc6-dev", "zlib1g-dev", "libssl-dev", "libffi-dev")


def install_free_threaded(apt: Apt) -> None:
    say(f"free-threaded CPython {VERSION}: download the source and build, which takes minutes")
    source = FREE_THREADED.with_name("python-source")
    apt.source(f"python{VERSION}", SUITE, source)
    shutil.rmtree(FREE_THREADED, ignore_errors=True)
    run(
        *("./configure", "-q", "--disable-gil", f"--prefix={FREE_THREADED}"),
        *("--with-ensurepip=no", "--disable-test-modules"),
        cwd=source,
    )
    run("make", "-s", f"-j{os.cpu_count()}", cwd=source)
    run("make", "-s", "install", cwd=source)
    (FREE_THREADED / "complete").write_text("\n")
    shutil.rmtree(source)
