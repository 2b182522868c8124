# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The kernel's own vhost: what each ioctl costs, and packets through vhost-net.

Needs a kernel with these devices, so on the host this boots one under QEMU (TCG: everything is 15 to 40
times slower there, only ratios mean something) and runs itself inside.
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

# The tests know how to boot a kernel and how to make its devices.
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
PARTS = ("kernel_ioctl", "kernel_net")
KERNEL = "6.12"
MARK = "figures: "


def run(*, quick: bool) -> dict[str, Any]:
    if "PYVHOST_GUEST" in os.environ:
        figures = {part: importlib.import_module(f"benchmarks.{part}").run(quick=quick) for part in PARTS}
        print(f"\n{MARK}{json.dumps(figures)}")
        return figures
    return _in_guest(quick)


def _in_guest(quick: bool) -> dict[str, Any]:
    from guest.kernel import find, run_in_kernel

    kernel = find(KERNEL)
    if kernel.missing():
        print(f"left out: kernel {kernel.name}: {kernel.missing()} (make peers)")
        return {"missing": kernel.missing()}
    command = [sys.executable, "-m", "benchmarks", "kernel", *(["--quick"] if quick else [])]

    shown = ""

    def live(text: str) -> None:
        nonlocal shown  # whole lines, up to the one that is not for people
        *lines, shown = (shown + text).split("\n")
        for line in lines:
            if not line.startswith(MARK):
                print(line, flush=True)

    outcome = run_in_kernel(kernel, shlex.join(command), timeout=1200, live=live)
    if outcome.code != 0:
        raise SystemExit(
            f"kernel {kernel.release}: {outcome.problem or f'exit {outcome.code}'}\n{outcome.output}"
        )
    _, _, figures = outcome.output.partition(MARK)
    return {"kernel": kernel.release, **json.JSONDecoder().raw_decode(figures)[0]}
