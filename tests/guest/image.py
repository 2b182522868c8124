# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The guest's initramfs: busybox, the kernel's boot modules, our init and small C programs.

Knows what goes into the archive. Does not know QEMU.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from peers.catalogue import BUSYBOX
from peers.kernels import CLOUD, Kernel

HERE = Path(__file__).resolve().parent


def build_initramfs(
    target: Path, programs: list[Path], *, kernel: Kernel = CLOUD, init: Path = HERE / "init"
) -> Path:
    """An uncompressed newc archive: reading it is cheaper for TCG than unpacking it."""
    root = target.with_suffix(".root")
    for folder in ("bin", "modules"):
        (root / folder).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin" / "busybox")
    for program in programs:
        shutil.copy(program, root / "bin" / program.name)
    shutil.copy(init, root / "init")
    (root / "init").chmod(0o755)
    modules = kernel.modules("boot")
    for module in modules:
        shutil.copy(module, root / "modules" / module.name)
    (root / "modules" / "order").write_text("".join(f"{module.stem}\n" for module in modules))
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    with target.open("wb") as archive:
        subprocess.run(
            ["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0"],
            input=names.encode(),
            stdout=archive,
            cwd=root,
            check=True,
        )
    shutil.rmtree(root)
    return target
