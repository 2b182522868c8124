# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Build the kernel's simulated vDPA devices, which Debian leaves out, from Debian's kernel source.

Knows Debian's source, headers and kbuild packages, and how modules are built out of tree. Unpacks
them below the cache only, and leaves nothing behind but the modules. Standard library only.
"""

from __future__ import annotations

import os
import re
import shutil
import tarfile
from pathlib import Path

from peers.apt import Apt, run, say

_SOURCES = (
    "drivers/vhost/vringh.c",
    *(
        f"drivers/vdpa/vdpa_sim/{name}"
        for name in ("vdpa_sim.h", "vdpa_sim.c", "vdpa_sim_net.c", "vdpa_sim_blk.c")
    ),
)


def build_vdpa_sim(apt: Apt, suite: str, release: str, into: Path) -> None:
    """Puts vringh.ko and vdpa_sim*.ko for a kernel release into a folder."""
    packages = [f"linux-headers-{release}"]
    packages += apt.depends(packages[0], suite, r"linux-(headers|kbuild)-.*")
    version = ".".join(release.split(".")[:2])
    say(f"vdpa_sim for {release}: download headers and source, and build")
    root = into.parent / "vdpa_sim.build"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    apt.unpack([*packages, f"linux-source-{version}"], suite, root)
    folder = root / "build"
    folder.mkdir()
    _extract(root / f"usr/src/linux-source-{version}.tar.xz", folder)
    names = [Path(source).stem for source in _SOURCES if source.endswith(".c")]
    (folder / "Kbuild").write_text(f"obj-m := {' '.join(f'{name}.o' for name in names)}\n")
    headers = root / "usr/src" / packages[0]
    # The one absolute path in the package; the others are relative links.
    makefile = headers / "Makefile"
    makefile.write_text(makefile.read_text().replace(" /usr/src/", f" {root}/usr/src/"))
    run(
        *("make", f"-j{os.cpu_count() or 1}", "-C", headers, f"M={folder}", "CC=gcc"),
        # The kernel's own BTF is needed to make that of modules, and is not in the package.
        "CONFIG_DEBUG_INFO_BTF_MODULES=",
        "modules",
        env={name: value for name, value in os.environ.items() if not re.match("MAKE|MFLAGS", name)},
    )
    for name in names:
        run("strip", "--strip-debug", "-o", into / f"{name}.ko", folder / f"{name}.ko")
    shutil.rmtree(root)


def _extract(tarball: Path, folder: Path) -> None:
    """Of the tree, the few files that are wanted, flat."""
    wanted = set(_SOURCES)
    with tarfile.open(tarball, "r|xz") as archive:
        for member in archive:
            name = member.name.split("/", 1)[-1]
            if name in wanted:
                data = archive.extractfile(member)
                assert data is not None, name
                (folder / Path(name).name).write_bytes(data.read())
                wanted.remove(name)
                if not wanted:
                    return
    raise SystemExit(f"peers: {tarball} has no {', '.join(sorted(wanted))}")
