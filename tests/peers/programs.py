# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Build the small C programs that the peers' tests run: our own and libblkio's example.

Knows compilers' command lines. Does not run what it builds.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from peers.catalogue import LIBBLKIO

HERE = Path(__file__).resolve().parent
GUEST = HERE.parent / "guest"
STRICT = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror")


def _gcc(*arguments: str | Path) -> None:
    subprocess.run(["gcc", *map(str, arguments)], check=True)


def iocheck(folder: Path) -> Path:
    """Verified I/O on a file; static, because it also runs in the guest, which has no C library."""
    target = folder / "iocheck"
    _gcc(*STRICT, "-static", "-o", target, GUEST / "iocheck.c")
    return target


def pagecheck(folder: Path) -> Path:
    """What notices pages that a migration lost; static, for the guest."""
    target = folder / "pagecheck"
    _gcc(*STRICT, "-static", "-o", target, GUEST / "pagecheck.c")
    return target


def _blkio_flags() -> list[str]:
    (library,) = (LIBBLKIO / "usr" / "lib").glob("*-linux-gnu")
    include = LIBBLKIO / "usr" / "include"
    return [f"-I{include}", f"-L{library}", f"-Wl,-rpath,{library}", "-lblkio", "-lpthread"]


def blkio_verify(folder: Path) -> Path:
    """Our program on libblkio: verified I/O."""
    target = folder / "blkio_verify"
    _gcc(*STRICT, f"-I{GUEST}", "-o", target, HERE / "blkio_verify.c", *_blkio_flags())
    return target


def blkio_bench(folder: Path) -> Path:
    """libblkio's own example. The environment variable BLKIO_QUEUE_SIZE sets what it has no option for."""
    target = folder / "blkio-bench"
    (source,) = (LIBBLKIO / "usr" / "share" / "doc").glob("*/examples/blkio-bench.c")
    shim = HERE / "blkio_bench_shim.h"
    _gcc("-O2", "-w", "-D_GNU_SOURCE", "-include", shim, "-o", target, source, *_blkio_flags())
    return target
