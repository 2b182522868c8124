# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""In-flight tracking under a guest: the back-end is killed a hundred times while 16 processes write and
verify, QEMU connects again, and nothing is lost or done twice.

The guest's writers (iocheck churn) know the generation of each block that they wrote last. A request that
is lost leaves its writer waiting; one that is done again after it was completed brings an old generation
back, or is a completion that the driver does not know.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from guest.machine import Guest, GuestError, Job, vhost_user_blk
from peers.conftest import Boot
from peers.support import DEADLINE, make_disk, run

pytestmark = pytest.mark.guest

MIB = 1 << 20
SIZE = 16 * MIB
KILLS = 100
WRITERS = 16
SEED = 23
PROGRAM = Path(__file__).with_name("shuffled_blk.py")
BETWEEN = (2, 20)
"""How often the disk is seen changing before the next kill."""


class Lives:
    """The program of shuffled_blk.py. ``pid``: the back-end that lives now. ``again``: what all together had
    to do again."""

    def __init__(self, path: Path, disk: Path, queues: int, kind: str, *without: str) -> None:
        # In a session of its own, so that parent and child end together.
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), str(path), str(disk), str(queues), kind, *without],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.disk = disk
        self.again = 0
        self.pid = self._next()

    def _next(self) -> int:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            what, number = line.split()
            if what == "pid":
                return int(number)
            self.again += int(number)
        raise AssertionError(f"the program ended with {self.process.wait()}")

    def work(self, changes: int, seconds: float = DEADLINE) -> None:
        """Wait until the disk was seen changing that often, whoever writes to it: what the kernel does for an
        io_uring is in no account of the process. A clock tick (4 ms) may have many writes."""
        deadline = time.monotonic() + seconds
        last = self.disk.stat().st_mtime_ns
        while changes:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{changes} more changes of the disk did not come in {seconds} s")
            time.sleep(0.001)
            now = self.disk.stat().st_mtime_ns
            changes -= now != last
            last = now

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.pid = self._next()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(DEADLINE)
        assert self.process.stdout is not None
        self.process.stdout.close()


def start_churn(guest: Guest) -> Job:
    return guest.start(f"iocheck churn /dev/vda {SEED} 0 {SIZE} {WRITERS} /tmp/stop")


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("kind", ["python", "sync", "threads", "io_uring"])
def test_killed_a_hundred_times(boot: Boot, iocheck: Path, tmp_path: Path, kind: str, packed: bool) -> None:
    disk = make_disk(tmp_path / "disk.raw", SIZE)
    path = tmp_path / "s"
    with Lives(path, disk, 2, kind) as lives:
        with boot(vhost_user_blk(path, queues=2, packed=packed, reconnect_ms=10), cpus=2) as guest:
            assert bool(guest.features() >> 34 & 1) == packed
            churn = start_churn(guest)
            # The engine is quick: on a quiet machine a kill hardly ever meets a request in it.
            least, kills = KILLS if kind == "python" else 1, 0
            while kills < KILLS or lives.again < least:
                assert kills < 10 * KILLS, "too little was in flight for this to say anything"
                lives.work(random.randint(*BETWEEN))
                lives.kill()
                kills += 1
            lives.work(BETWEEN[1])
            guest.run("touch /tmp/stop")
            churn.wait()
            assert "not a head" not in guest.run("dmesg").text
            # The last thing that each writer wrote.
            run(iocheck, "verify", disk, str(SEED), "0", str(SIZE))


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_without_tracking_it_fails(boot: Boot, iocheck: Path, tmp_path: Path, packed: bool) -> None:
    """The same without the buffer. QEMU takes the used index of a split ring as the place to go on: what was
    completed out of order is done again, and what was in flight before it is lost. For a packed ring there
    is not even that."""
    disk = make_disk(tmp_path / "disk.raw", SIZE)
    path = tmp_path / "s"
    with Lives(path, disk, 2, "python", "INFLIGHT_SHMFD") as lives:
        with boot(vhost_user_blk(path, queues=2, packed=packed, reconnect_ms=10), cpus=2) as guest:
            churn = start_churn(guest)
            with pytest.raises((TimeoutError, GuestError)):
                for _ in range(KILLS):
                    lives.work(random.randint(*BETWEEN), seconds=10)
                    lives.kill()
                guest.run("touch /tmp/stop")
                churn.wait(timeout=20)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_paused_and_reset_between_kills(boot: Boot, iocheck: Path, tmp_path: Path, packed: bool) -> None:
    """A pause stops the rings and starts them on the same buffer; a reset makes rings that need a new one."""
    disk = make_disk(tmp_path / "disk.raw", SIZE)
    path = tmp_path / "s"
    with Lives(path, disk, 1, "python") as lives:
        with boot(vhost_user_blk(path, packed=packed, reconnect_ms=10)) as guest:
            for _ in range(2):
                churn = start_churn(guest)
                for _ in range(10):
                    lives.work(random.randint(*BETWEEN))
                    guest.qmp.command("stop")
                    guest.qmp.command("cont")
                    lives.work(random.randint(*BETWEEN))
                    lives.kill()
                guest.run("touch /tmp/stop")
                churn.wait()
                run(iocheck, "verify", disk, str(SEED), "0", str(SIZE))
                guest.reset()
            assert lives.again


def test_writers_notice_what_is_done_twice(boot: Boot, iocheck: Path, tmp_path: Path) -> None:
    """No kill at all, but a device that does an old write again."""
    disk = make_disk(tmp_path / "disk.raw", SIZE)
    path = tmp_path / "s"
    with Lives(path, disk, 1, "replay") as lives:
        with boot(vhost_user_blk(path), cpus=1) as guest:
            churn = start_churn(guest)
            lives.work(500)
            guest.run("touch /tmp/stop")
            with pytest.raises(GuestError, match="FAIL byte"):
                churn.wait()
