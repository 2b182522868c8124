# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Fixtures of the tests against real programs. Which program a test needs, its fixtures require."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from guest.image import build_initramfs
from guest.machine import Guest, GuestError
from guest.report import Report
from peers import programs
from peers.support import require

Boot = Callable[..., Guest]

# What QEMU 10.0 aborts with now and then, on a busy machine, while a guest of two CPUs sets up its devices.
QEMU_RACE = "msix_table_mmio_write: Assertion"

# What tests/kernel did on each kernel, for the end of the session.
KERNEL_REPORTS: pytest.StashKey[list[Report]] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    config.stash.setdefault(KERNEL_REPORTS, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    reports = config.stash.get(KERNEL_REPORTS, [])
    if reports:
        terminalreporter.section("kernels")
    for report in reports:
        for line in report.lines():
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="session")
def iocheck(build_folder: Path) -> Path:
    require("gcc")
    return programs.iocheck(build_folder)


@pytest.fixture(scope="session")
def blkio_verify(build_folder: Path) -> Path:
    require("gcc", "libblkio")
    return programs.blkio_verify(build_folder)


@pytest.fixture(scope="session")
def blkio_bench(build_folder: Path) -> Path:
    require("gcc", "libblkio")
    return programs.blkio_bench(build_folder)


@pytest.fixture(scope="session")
def initramfs(build_folder: Path, iocheck: Path) -> Path:
    require("busybox", "cpio", "kernel")
    programs_in_guest = [iocheck, programs.pagecheck(build_folder)]
    return build_initramfs(build_folder / "initramfs.cpio", programs_in_guest)


@pytest.fixture(scope="module")
def boot(initramfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Boot]:
    """Boot guests on devices of ``guest.machine``; they are killed at the end of the module."""
    require("qemu")
    with ExitStack() as stack:

        def start(devices: Sequence[str], **options: Any) -> Guest:
            def once() -> Guest:
                folder = tmp_path_factory.mktemp("guest")
                return stack.enter_context(Guest(initramfs, devices, folder, **options))

            try:
                return once()
            except GuestError as error:
                if QEMU_RACE not in str(error):
                    raise
                return once()

        yield start
