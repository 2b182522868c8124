# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Post-copy migration under QEMU: the guest goes on at the destination before its memory is there, and our
back-end works in memory that comes page by page.

Most of the memory is kept back until the guest runs there, so that both the guest and the back-end meet
pages that are missing. ``pagecheck`` has memory that only the device writes; ``iocheck churn`` verifies what
it wrote.
"""

from __future__ import annotations

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
PAGES, READERS = 256, 2
CHURN, CHURN_BYTES = 64 * MIB, 8 * MIB
"""Where churn's part of the disk begins, after pagecheck's."""
SLOW = 4 * MIB
"""Bytes a second before the switch: precopy alone would take for ever."""
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
        self.disk = make_disk(folder / "disk.raw", CHURN + CHURN_BYTES)
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
        progress(self.source)
        slow = {"max-bandwidth": SLOW}
        self.migration = Migration(
            self.source, self.target, folder / "m", capabilities=[POSTCOPY], parameters=slow
        )

    def make(self) -> dict[str, Any]:
        self.migration.start()
        self.migration.wait_status("active")
        progress(self.source)
        self.migration.start_postcopy()
        outcome = self.migration.wait()
        for job in self.jobs:
            job.move(self.target)
        return outcome

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
        progress(journey.target)
        assert journey.end().count("OK") == READERS + 1
    run(iocheck, "verify", tmp_path / "disk.raw", "21", str(CHURN), str(CHURN_BYTES))


def test_a_back_end_that_does_not_wait_for_pages_is_noticed(boot: Boot, tmp_path: Path) -> None:
    with ExitStack() as stack:
        journey = Journey(boot, stack, tmp_path, packed=False, variant="hasty")
        # Whatever it is that goes wrong: the ring, the guest's memory, or QEMU when it places a page.
        with pytest.raises((GuestError, TimeoutError)):
            journey.make()
            progress(journey.target)
            journey.end()


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
