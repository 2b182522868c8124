# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Post-copy migration under QEMU: the guest goes on at the destination before its memory is there, and our
back-end works in memory that comes page by page.

Most of the memory is kept back until the guest runs there. What a driver has just touched is there when the
device comes to it, so a load alone meets no page that is missing: the guest takes dirty pages of its cache
along, and writes them back from memory that none of its processors touched there. ``pagecheck`` has memory
that only the device writes; ``iocheck churn`` verifies what it wrote.
"""

from __future__ import annotations

import contextlib
import errno
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from guest.machine import Guest, GuestError, vhost_user_blk
from guest.migration import POSTCOPY, Migration
from guest.qmp import QmpError
from peers.conftest import Boot
from peers.support import Serve, make_disk, run

pytestmark = pytest.mark.guest

MIB = 1 << 20
PAGE = 4096
PAGES, READERS = 256, 2
CHURN, CHURN_BYTES = 64 * MIB, 8 * MIB
"""Where churn's part of the disk begins, after pagecheck's."""
PATTERN, COPY, CACHED = 80 * MIB, 96 * MIB, 16 * MIB
"""What is copied by way of the guest's page cache, and where to."""
SLOW = 4 * MIB
"""Bytes a second that are sent unasked, so that most pages come because somebody waits for them."""
COMPLETED = "awk '{print $1 + $5}' /sys/block/vda/stat"  # reads and writes, in the guest


def progress(guest: Guest, requests: int = 300) -> None:
    enough = f"[ $({COMPLETED}) -ge $((begin + {requests})) ]"
    guest.run(f"begin=$({COMPLETED}); until {enough}; do usleep 20000; done", timeout=120)


class Journey:
    """Two back-ends on one file, and a guest under load that goes from one to the other."""

    def __init__(
        self,
        boot: Boot,
        stack: ExitStack,
        folder: Path,
        *,
        packed: bool,
        without: str = "",
        variant: str = "",
    ) -> None:
        self.disk = make_disk(folder / "disk.raw", COPY + CACHED)
        self.pattern, self.old = os.urandom(CACHED), os.urandom(CACHED)
        with self.disk.open("r+b") as file:
            for at, content in ((PATTERN, self.pattern), (COPY, self.old)):
                file.seek(at)
                file.write(content)
        options = ["--blk-file", str(self.disk), "--num-queues", "2"]
        options += ["--without", without] if without else []
        program = [str(Path(__file__).with_name("variant.py")), variant] if variant else ["-m", "vhost"]
        here = stack.enter_context(Serve("blk", folder / "a", *options))
        there = stack.enter_context(Serve("blk", folder / "b", *options, program=program))
        self.source = boot(vhost_user_blk(here.path, queues=2, packed=packed), cpus=2)
        stack.callback(self.source.close)
        self.target = boot(vhost_user_blk(there.path, queues=2, packed=packed), cpus=2, incoming=True)
        stack.callback(self.target.close)
        self.jobs = [
            self.source.start(f"pagecheck /dev/vda 5 0 {PAGES} {READERS} /tmp/stop"),
            self.source.start(f"iocheck churn /dev/vda 21 {CHURN} {CHURN_BYTES} 4 /tmp/stop"),
        ]
        # Nothing writes it back before it is told to; that the disk is closed would, but the jobs have it.
        self.source.run("cd /proc/sys/vm; echo 0 >dirty_writeback_centisecs; echo 90 >dirty_ratio")
        self.source.run("cd /proc/sys/vm; echo 80 >dirty_background_ratio")
        copy = (
            f"dd if=/dev/vda of=/dev/vda bs=1M skip={PATTERN // MIB} seek={COPY // MIB} count={CACHED // MIB}"
        )
        self.source.run(f"{copy} conv=notrunc 2>&1")
        progress(self.source)
        slow = {"max-bandwidth": SLOW, "max-postcopy-bandwidth": SLOW}
        self.migration = Migration(
            self.source, self.target, folder / "m", capabilities=[POSTCOPY], parameters=slow
        )

    def make(self, *, timeout: float = 120) -> dict[str, Any]:
        """``timeout``: seconds for what the guest writes back when it has just arrived."""
        self.migration.start()
        self.migration.wait_status("active")
        progress(self.source)
        # Reclaim may have written back some of it.
        assert self.pages_like(self.old) > CACHED // PAGE // 2
        self.migration.start_postcopy()
        self.migration.wait_status("postcopy-active")
        self.target.become(self.source)
        self.target.run("sync", timeout=timeout)
        outcome = self.migration.wait()
        for job in self.jobs:
            job.move(self.target)
        return outcome

    def copied(self) -> bytes:
        with self.disk.open("rb") as file:
            file.seek(COPY)
            return file.read(CACHED)

    def pages_like(self, content: bytes) -> int:
        """How many pages of the copy have this content."""
        copied = self.copied()
        return sum(copied[at : at + PAGE] == content[at : at + PAGE] for at in range(0, CACHED, PAGE))

    def end(self) -> str:
        self.target.run("touch /tmp/stop")
        return "".join(job.wait().text for job in self.jobs)


@pytest.mark.parametrize("without", ["", "configure-mem-slots"], ids=["slots", "table"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_disk_in_memory_that_is_still_coming(
    boot: Boot, tmp_path: Path, iocheck: Path, packed: bool, without: str
) -> None:
    with ExitStack() as stack:
        journey = Journey(boot, stack, tmp_path, packed=packed, without=without)
        outcome = journey.make()
        assert outcome["status"] == "completed"
        assert outcome["ram"]["postcopy-requests"] > 0, "pages were asked for"
        assert journey.copied() == journey.pattern
        progress(journey.target)
        assert journey.end().count("OK") == READERS + 1
    run(iocheck, "verify", tmp_path / "disk.raw", "21", str(CHURN), str(CHURN_BYTES))


def test_a_back_end_that_does_not_wait_for_pages_is_noticed(boot: Boot, tmp_path: Path) -> None:
    with ExitStack() as stack:
        journey = Journey(boot, stack, tmp_path, packed=False, variant="hasty")
        with contextlib.suppress(GuestError):  # of a guest that stands still sooner or later
            journey.make(timeout=20)
        # QEMU finds pages where it has to place some.
        journey.target.qmp.wait_event(
            "MIGRATION", timeout=60, matches=lambda event: event["data"]["status"] == "postcopy-paused"
        )
        assert f"errno={errno.EEXIST}" in journey.target.log()


def test_qemu_refuses_without_pagefault(boot: Boot, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.raw", MIB)
    with (
        Serve("blk", tmp_path / "b", "--blk-file", str(disk), "--without", "pagefault") as there,
        boot(vhost_user_blk(there.path), incoming=True) as target,
    ):
        with pytest.raises(QmpError, match="not capable of postcopy"):
            target.qmp.command(
                "migrate-set-capabilities", {"capabilities": [{"capability": POSTCOPY, "state": True}]}
            )
        target.close()
