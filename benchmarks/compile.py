# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""C beside the benchmarks, compiled once per state of its sources into the user's cache, and loaded.

Knows gcc and ctypes; does not know what is in the files.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
# Calls between the files are direct, as in the extension modules, where they are hidden.
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-pthread", "-fno-semantic-interposition", "-Wl,-Bsymbolic")
OURS = ("-Wall", "-Wextra", "-Werror")


def folder() -> Path:
    """Where what was compiled is kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyvhost" / "benchmarks"
    cache.mkdir(parents=True, exist_ok=True)
    return cache


RINGS = (
    "chain",
    "device_",
    "dirty_log",
    "driver_packed",
    "driver_split",
    "guest_memory",
    "inflight",
    "iotlb",
    "ring_",
    "sigbus",
    "virtqueue",
)


def rings() -> list[Path]:
    """Of csrc what rings and guest memory are, without devices, drivers and what serves them."""
    return sorted(path for path in CSRC.glob("*.c") if path.name.startswith(RINGS))


def library(
    name: str,
    sources: Iterable[Path],
    *,
    include: Sequence[Path] = (CSRC, HERE),
    foreign: Iterable[Path] = (),
    flags: Sequence[str] = (),
) -> ctypes.CDLL:
    """`sources` with all warnings, and `foreign` ones, which nobody here wrote, without any."""
    sources, foreign = list(sources), list(foreign)
    headers = [path for place in include for path in sorted(place.glob("*.h"))]
    words = [*FLAGS, *flags, *(f"-I{place}" for place in include)]
    digest = hashlib.sha256(" ".join([*words, *map(str, [*sources, *foreign])]).encode())
    for path in [*sources, *foreign, *headers]:
        digest.update(path.read_bytes())
    made = folder() / f"{name}-{digest.hexdigest()[:16]}.so"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=made.parent) as scratch:
            objects = []
            for i, (path, warnings) in enumerate(
                [*((path, OURS) for path in sources), *((path, ("-w",)) for path in foreign)]
            ):
                objects.append(str(Path(scratch) / f"{i}.o"))
                compile_one = ["gcc", *words, *warnings, "-c", str(path), "-o", objects[-1]]
                subprocess.run([word for word in compile_one if word != "-shared"], check=True)
            whole = Path(scratch) / made.name
            subprocess.run(["gcc", *words, *objects, "-o", str(whole), *_libraries(flags)], check=True)
            whole.replace(made)
    return ctypes.CDLL(str(made))


def _libraries(flags: Sequence[str]) -> list[str]:
    return [flag for flag in flags if flag.startswith("-l")]


Signature = tuple[object, ...]


def declare(lib: ctypes.CDLL, *functions: Signature) -> ctypes.CDLL:
    """(name, result, *arguments) of each function."""
    for name, result, *arguments in functions:
        function = getattr(lib, str(name))
        function.restype, function.argtypes = result, arguments
    return lib
