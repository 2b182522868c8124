# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A guest migrates from one of our back-ends to another and back, on one file, while it works.

What the back-end writes, QEMU cannot see: it copies the pages that the dirty log names. ``pagecheck`` in the
guest has memory that only the device writes, so that a page which was not named is a wrong one; ``iocheck
churn`` verifies that no request is lost, or done twice. Each test with a fault built in shows that they
would notice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from guest.machine import Guest, GuestError, Job, vhost_user_blk
from guest.migration import migrate
from guest.qmp import QmpError
from peers.conftest import Boot
from peers.support import Process, Serve, make_disk, run
from vhost.features import VirtioF

pytestmark = pytest.mark.guest

MIB = 1 << 20
PAGES, READERS = 256, 3
CHURN = 64 * MIB
"""Where churn's part of the disk begins; before it is pagecheck's, with 8 MiB a reader."""
CHURN_BYTES = 8 * MIB
JOURNEYS = 20
LATE_SECTOR = 1 << 16  # of variant.py
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
def test_lost_pages_are_noticed(boot: Boot, start: Start, tmp_path: Path, packed: bool) -> None:
    here, there = start("a", variant="unlogged"), start("b")
    guest = boot(vhost_user_blk(here.path, queues=2, packed=packed), cpus=2)
    target = boot(vhost_user_blk(there.path, queues=2, packed=packed), cpus=2, incoming=True)
    load = Load(guest, churn=False)
    load.progress()
    migrate(guest, target, tmp_path / "migration")
    load.move(target)
    with pytest.raises(GuestError, match="exited with 1: FAIL byte"):
        load.end()


def migrate_with_a_late_answer(boot: Boot, start: Start, folder: Path, variant: str, packed: bool) -> Job:
    """A read is answered when the guest does not run any more: its buffer, and the place in the ring that
    says so, come with the log or not at all. Returns what waits for it, in the target."""
    here, there = start("a", variant=f"python,late,{variant}".rstrip(",")), start("b")
    late = LATE_SECTOR // 8
    with (folder / "disk.raw").open("r+b") as disk:
        disk.seek(late * 4096)
        disk.write(b"late" * 1024)

    def machine(serve: Serve, **more: bool) -> Guest:
        return boot(vhost_user_blk(serve.path, packed=packed), **more)

    guest, target = machine(here), machine(there, incoming=True)
    job = guest.start(f"dd if=/dev/vda bs=4096 skip={late} count=1 iflag=direct status=none")
    here.wait_line("held")
    migrate(guest, target, folder / "migration")
    job.move(target)
    return job


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_late_answers_arrive(boot: Boot, start: Start, tmp_path: Path, packed: bool) -> None:
    job = migrate_with_a_late_answer(boot, start, tmp_path, "", packed)
    assert job.wait(timeout=30).text == "late" * 1024


def test_lost_ring_pages_are_noticed(boot: Boot, start: Start, tmp_path: Path) -> None:
    """Packed: a split ring's used area is copied by QEMU in any case, when it stops the ring."""
    job = migrate_with_a_late_answer(boot, start, tmp_path, "unlogged-rings", True)
    with pytest.raises(GuestError, match="did not end"):
        job.wait(timeout=10)


def test_what_qemu_says(boot: Boot, start: Start, tmp_path: Path) -> None:
    """The log on the wire, as `vhost trace` sees it pass."""
    here, there = start("a"), start("b")
    middle, record = tmp_path / "t", tmp_path / "record"
    trace = [sys.executable, "-m", "vhost", "trace"]
    tracer = Process([*trace, "--write", str(record), str(middle), str(here.path)], ready="tracing")
    guest = boot(vhost_user_blk(middle))
    target = boot(vhost_user_blk(there.path), incoming=True)
    migrate(guest, target, tmp_path / "migration")
    guest.close()
    tracer.terminate()
    lines = run(*trace, "--read", str(record)).splitlines()
    sent = [" ".join(line.split()[3:]) for line in lines if "front>back" in line]
    (base,) = [i for i, line in enumerate(sent) if line.startswith("SET_LOG_BASE size=")]
    assert "fds=[memfd vhost-log" in sent[base]
    (features,) = [i for i, line in enumerate(sent) if "LOG_ALL" in line and line.startswith("SET_FEATURES")]
    (address,) = [i for i, line in enumerate(sent) if line.startswith("SET_VRING_ADDR index=0 flags=1")]
    stopped = max(i for i, line in enumerate(sent) if line.startswith("GET_VRING_BASE index=0"))
    assert base < features < address < stopped
    assert any("SET_LOG_BASE reply" in line for line in lines)


def test_without_a_log_qemu_does_not_migrate(boot: Boot, tmp_path: Path) -> None:
    options = ("--blk-file", str(make_disk(tmp_path / "disk.raw", MIB)), "--without", "log-shmfd")
    with Serve("blk", tmp_path / "s", *options) as serve:
        guest = boot(vhost_user_blk(serve.path))
        target = boot([], incoming=True)
        with pytest.raises(QmpError, match="LOG_SHMFD"):
            migrate(guest, target, tmp_path / "migration")
        guest.close()
