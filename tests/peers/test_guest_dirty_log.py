# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A guest migrates from one of our back-ends to another and back, on one file, while it works.

What the back-end writes, QEMU cannot see: it copies the pages that the dirty log names. ``pagecheck`` in the
guest has memory that only the device writes, so that a page which was not named is a wrong one; ``iocheck
churn`` verifies that no request is lost, or done twice. Each test with a fault built in shows that they
would notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from guest.machine import Guest, GuestError, Job, vhost_user_blk
from guest.migration import migrate
from peers.conftest import Boot
from peers.support import Serve, make_disk, run
from vhost.features import VirtioF

pytestmark = pytest.mark.guest

MIB = 1 << 20
PAGES, READERS = 256, 3
CHURN = 64 * MIB
"""Where churn's part of the disk begins; before it is pagecheck's, with 8 MiB a reader."""
CHURN_BYTES = 8 * MIB
JOURNEYS = 20
COMPLETED = "awk '{print $1 + $5}' /sys/block/vda/stat"  # reads and writes, in the guest

Start = Callable[..., Serve]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Back-ends on one file, as two hosts would have them: each takes the file when its rings start, and
    gives it back when they stop, so nobody has to say --share."""
    disk = make_disk(tmp_path / "disk.raw", CHURN + CHURN_BYTES)
    with ExitStack() as stack:

        def serve(name: str, *, variant: str = "") -> Serve:
            program = [str(Path(__file__).with_name("variant.py")), variant] if variant else ["-m", "vhost"]
            options = ("--blk-file", str(disk), "--num-queues", "2")
            return stack.enter_context(Serve("blk", tmp_path / name, *options, program=program))

        yield serve


class Load:
    """pagecheck in a guest, and churn."""

    def __init__(self, guest: Guest, *, churn: bool = True) -> None:
        self.guest = guest
        self.jobs: list[Job] = []
        self.jobs.append(guest.start(f"pagecheck /dev/vda 5 0 {PAGES} {READERS} /tmp/stop"))
        if churn:
            self.jobs.append(guest.start(f"iocheck churn /dev/vda 21 {CHURN} {CHURN_BYTES} 4 /tmp/stop"))

    def progress(self, requests: int = 1000) -> None:
        """Wait until that many more requests were completed."""
        enough = f"[ $({COMPLETED}) -ge $((begin + {requests})) ]"
        self.guest.run(f"begin=$({COMPLETED}); until {enough}; do usleep 20000; done", timeout=60)

    def move(self, guest: Guest) -> None:
        self.guest = guest
        for job in self.jobs:
            job.move(guest)

    def end(self) -> str:
        self.guest.run("touch /tmp/stop")
        return "".join(job.wait().text for job in self.jobs)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("variant", ["", "python"], ids=["c", "python"])
def test_there_and_back(
    boot: Boot, start: Start, tmp_path: Path, iocheck: Path, packed: bool, variant: str
) -> None:
    here, there = start("a", variant=variant), start("b", variant=variant)

    def machine(serve: Serve, **more: bool) -> Guest:
        return boot(vhost_user_blk(serve.path, queues=2, packed=packed, queue_size=256), cpus=2, **more)

    guest = machine(here)
    assert bool(guest.features() & VirtioF.RING_PACKED) == packed
    load = Load(guest)
    for journey in range(JOURNEYS):
        load.progress()
        here, there = there, here
        target = machine(here, incoming=True)
        outcome = migrate(guest, target, tmp_path / f"migration{journey}")
        assert outcome["status"] == "completed"
        guest.close()
        guest = target
        load.move(guest)
    load.progress()
    assert load.end().count("OK") == READERS + 1
    guest.close()
    run(iocheck, "verify", tmp_path / "disk.raw", "21", str(CHURN), str(CHURN_BYTES))


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_pages_that_are_not_logged_are_noticed(boot: Boot, start: Start, tmp_path: Path, packed: bool) -> None:
    here, there = start("a", variant="unlogged"), start("b")
    guest = boot(vhost_user_blk(here.path, queues=2, packed=packed), cpus=2)
    target = boot(vhost_user_blk(there.path, queues=2, packed=packed), cpus=2, incoming=True)
    load = Load(guest, churn=False)
    load.progress()
    migrate(guest, target, tmp_path / "migration")
    load.move(target)
    with pytest.raises(GuestError, match="exited with 1: FAIL byte"):
        load.end()
