# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Guests that reboot, lose their disk and get it back, are paused, and gain and lose memory, all with
verified I/O running on `vhost serve blk`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest.hotplug import (
    PORT,
    PORT_NAME,
    ROOM,
    plug_disk,
    plug_memory,
    prefer_plugged_memory,
    unplug_disk,
    unplug_memory,
)
from guest.machine import Guest, Job, vhost_user_blk
from peers.conftest import Boot
from peers.support import DEADLINE, Serve, make_disk, run
from vhost.features import VirtioF

pytestmark = pytest.mark.guest

MIB = 1 << 20
SIZE = 48 * MIB
KEPT = 8 * MIB
"""[0, KEPT): written once, and verified at the end. The rest is churn's."""
REBOOTS, PLUGS, DIMMS = 3, 3, 8
REQUESTS = "awk '{print $1 + $5}' /sys/block/vda/stat"  # completed reads and writes, in the guest

PACKED = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.raw", SIZE)


@pytest.fixture(params=["c", "python"])
def serve(request: pytest.FixtureRequest, disk: Path) -> Iterator[Serve]:
    """Its messages are in its log."""
    variant = [str(Path(__file__).with_name("variant.py")), "python"]
    program = variant if request.param == "python" else ["-m", "vhost"]
    options = ("--blk-file", str(disk), "--num-queues", "2")
    with Serve("blk", disk.with_name("s"), *options, program=[*program, "-vv"]) as process:
        yield process


def churn(guest: Guest, writers: int = 8) -> Job:
    """Returns when every writer is at work, more or less: so many requests were completed."""
    guest.run("rm -f /tmp/stop")
    before = int(guest.run(REQUESTS).text)
    job = guest.start(f"iocheck churn /dev/vda 1 {KEPT} {SIZE - KEPT} {writers} /tmp/stop")
    wait_for_requests(guest, before + 20 * writers)
    return job


def wait_for_requests(guest: Guest, count: int) -> None:
    guest.run(f"until [ $({REQUESTS}) -ge {count} ]; do usleep 5000; done")


def go_on(guest: Guest, requests: int = 100) -> None:
    """Until as many more requests were completed."""
    wait_for_requests(guest, int(guest.run(REQUESTS).text) + requests)


def stop(guest: Guest, job: Job) -> str:
    guest.run("touch /tmp/stop")
    return job.wait().text


def holdings(serve: Serve) -> tuple[int, int]:
    """How many descriptors it has, and how many mappings of guest memory."""
    folder = Path(f"/proc/{serve.process.pid}")
    return len(os.listdir(folder / "fd")), (folder / "maps").read_text().count("memfd:")


def wait_until_it_holds(serve: Serve, wanted: tuple[int, int]) -> None:
    deadline = time.monotonic() + DEADLINE
    while holdings(serve) != wanted:
        assert time.monotonic() < deadline, f"{holdings(serve)}, before {wanted}"
        time.sleep(0.01)


@PACKED
def test_reboots_under_load(boot: Boot, serve: Serve, disk: Path, iocheck: Path, packed: bool) -> None:
    with boot(vhost_user_blk(serve.path, queues=2, packed=packed), cpus=2) as guest:
        guest.run(f"iocheck write /dev/vda 2 0 {KEPT}")
        held = holdings(serve)
        for _ in range(REBOOTS):
            churn(guest)
            guest.reset()
            assert bool(guest.features() & VirtioF.RING_PACKED) == packed
            assert holdings(serve) == held
        stop(guest, churn(guest))
        guest.run(f"iocheck verify /dev/vda 2 0 {KEPT}")
    run(iocheck, "verify", disk, "2", "0", str(KEPT))
    run(iocheck, "verify", disk, "1", str(KEPT), str(SIZE - KEPT))


def test_disk_is_unplugged_under_load_and_plugged_again(
    boot: Boot, serve: Serve, disk: Path, iocheck: Path
) -> None:
    """Split and packed by turns. What was written before stays, and nothing of a session that ended does."""
    with boot([*PORT, *vhost_user_blk(serve.path, queues=2, bus=PORT_NAME)], cpus=2) as guest:
        guest.run(f"iocheck write /dev/vda 2 0 {KEPT}")
        held = holdings(serve)
        for plug in range(PLUGS):
            job = churn(guest)
            unplug_disk(guest)
            lost = job.wait(check=False)
            assert lost.code == 1, lost
            assert "FAIL byte" not in lost.text, "it found no disk, not other data"
            guest.run("[ ! -e /sys/block/vda ]")
            packed = plug % 2 == 0
            plug_disk(guest, serve.path, queues=2, packed=packed)
            assert bool(guest.features() & VirtioF.RING_PACKED) == packed
            guest.run(f"iocheck verify /dev/vda 2 0 {KEPT}")
            wait_until_it_holds(serve, held)
        stop(guest, churn(guest))
    run(iocheck, "verify", disk, "2", "0", str(KEPT))
    run(iocheck, "verify", disk, "1", str(KEPT), str(SIZE - KEPT))


@PACKED
def test_paused_under_load(boot: Boot, serve: Serve, disk: Path, iocheck: Path, packed: bool) -> None:
    """QEMU stops the rings, sets the status to 0, and starts them where they were."""
    with boot(vhost_user_blk(serve.path, queues=2, packed=packed), cpus=2) as guest:
        job = churn(guest)
        for _ in range(5):
            go_on(guest)
            guest.qmp.command("stop")
            guest.qmp.command("cont")
        stop(guest, job)
    run(iocheck, "verify", disk, "1", str(KEPT), str(SIZE - KEPT))
    assert serve.errors().count("GET_VRING_BASE") >= 10


@PACKED
def test_memory_comes_and_goes_under_load(
    boot: Boot, serve: Serve, disk: Path, iocheck: Path, packed: bool
) -> None:
    """More regions than one SET_MEM_TABLE could tell of; QEMU adds and removes them one by one while rings
    run. The buffers of the second load lie in the memory that came, and have to move when it goes."""
    devices = [*ROOM, *vhost_user_blk(serve.path, queues=2, packed=packed)]
    with boot(devices, cpus=2) as guest:
        prefer_plugged_memory(guest)
        first = churn(guest, 4)
        held = holdings(serve)
        for dimm in range(DIMMS):
            plug_memory(guest, f"dimm{dimm}")
            go_on(guest)
        assert holdings(serve) == (held[0], held[1] + DIMMS)
        stop(guest, first)
        text = stop(guest, churn(guest, 16))
        above = [int(count) for count in re.findall(r"(\d+) pages above 4 GiB", text)]
        assert len(above) == 16, text
        assert sum(above) > 64, text
        second = churn(guest, 4)
        for dimm in range(DIMMS):
            unplug_memory(guest, f"dimm{dimm}")
            go_on(guest)
        stop(guest, second)
        assert holdings(serve) == held
    run(iocheck, "verify", disk, "1", str(KEPT), str(SIZE - KEPT))
    log = serve.errors()
    for message in ("ADD_MEM_REG", "REM_MEM_REG"):
        assert log.count(f"{message} ") >= DIMMS, message
    assert "SET_MEM_TABLE" not in log
