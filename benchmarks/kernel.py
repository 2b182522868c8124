# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The kernel's own vhost: what each ioctl costs, and packets through vhost-net.

Needs a kernel with these devices, so on the host this boots one under QEMU (TCG: everything is 15 to 40
times slower there, only ratios mean something) and runs itself inside.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shlex
import sys
from pathlib import Path

from benchmarks import harness, limits
from benchmarks.harness import KPPS, NS, US, Suite, Table
from benchmarks.suite import MARK

# The tests know how to boot a kernel and how to make its devices.
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
PARTS = ("kernel_ioctl", "kernel_net")
KERNEL = "6.12"

TITLE = (
    "Inside a guest (TCG, so ratios only): each ioctl through its row of the table and through the method "
    "over it, beside fcntl.ioctl with a buffer packed before; frames through vhost-net beside a tap."
)
TABLES = (
    Table("ioctls", US, rows=("ioctl",), columns=("subject",)),
    Table("frames of 64 bytes", KPPS, rows=("direction", "subject")),
)


def run(suite: Suite) -> None:
    if "PYVHOST_GUEST" not in os.environ:
        _in_guest(suite)
        return
    for part in PARTS:
        importlib.import_module(f"benchmarks.{part}").run(suite)
    with harness.pinned_to(harness.cores()[0]), contextlib.ExitStack() as stack:
        suite.interleave(harness.limit_cases(stack, limits.SYSCALL), NS, 9, calibrate=False)


def _in_guest(suite: Suite) -> None:
    guest = importlib.import_module("guest.kernel")
    kernel = guest.find(KERNEL)
    if kernel.missing():
        suite.skip(f"kernel {kernel.name}: {kernel.missing()} (make peers)")
        return
    command = [sys.executable, "-m", "benchmarks", "kernel", "--raw", *(["--quick"] if suite.quick else [])]
    suite.progress(0, 1, f"in a guest with kernel {kernel.release}")
    outcome = guest.run_in_kernel(kernel, shlex.join(command), timeout=1200, live=lambda text: None)
    if outcome.code != 0:
        raise RuntimeError(
            f"kernel {kernel.release}: {outcome.problem or f'exit {outcome.code}'}\n{outcome.output}"
        )
    _, _, figures = outcome.output.partition(MARK)
    suite.load(json.JSONDecoder().raw_decode(figures)[0]["kernel"])
    suite.note(f"kernel {kernel.release}")
