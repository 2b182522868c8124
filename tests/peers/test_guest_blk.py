# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""`vhost serve blk` with a Linux guest: QEMU is the front-end, Linux's virtio_blk the driver.

Each configuration boots once; its tests use their own part of the disk, and reset comes last.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from guest.machine import Guest, vhost_user_blk
from peers.conftest import Boot
from peers.support import Serve, make_disk, run
from vhost.features import BlkF, VirtioF

pytestmark = pytest.mark.guest

MIB = 1 << 20
SIZE = 160 * MIB
IO_BYTES = 64 * MIB  # [0, 64 MiB): mixed I/O. The rest: a MiB or more for each other test
DISCARD, ZEROES, PARALLEL, AFTER_RESET = 64 * MIB, 80 * MIB, 96 * MIB, 128 * MIB


@dataclass
class Setup:
    guest: Guest
    disk: Path
    serve: Serve
    packed: bool
    queues: int


def serve_disk(disk: Path, socket: Path, queues: int) -> Serve:
    options = ("--blk-file", str(disk), "--num-queues", str(queues), "--serial", "pyvhost-test")
    return Serve("blk", socket, *options)


@pytest.fixture(
    scope="module",
    params=[(False, 1), (True, 1), (False, 2), (True, 2)],
    ids=["split-1", "packed-1", "split-2", "packed-2"],
)
def setup(
    request: pytest.FixtureRequest, boot: Boot, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Setup]:
    packed, queues = request.param
    folder = tmp_path_factory.mktemp("blk")
    disk = make_disk(folder / "disk.raw", SIZE)
    with ExitStack() as stack:
        serve = stack.enter_context(serve_disk(disk, folder / "s", queues))
        devices = vhost_user_blk(folder / "s", queues=queues, packed=packed)
        guest = stack.enter_context(boot(devices, cpus=queues))
        yield Setup(guest, disk, serve, packed, queues)


def test_negotiated(setup: Setup) -> None:
    features = setup.guest.features()
    wanted = VirtioF.VERSION_1 | VirtioF.RING_INDIRECT_DESC | VirtioF.RING_EVENT_IDX
    wanted |= VirtioF.RING_PACKED if setup.packed else VirtioF(0)
    assert features & wanted == wanted
    assert bool(features & VirtioF.RING_PACKED) == setup.packed
    wanted_blk = BlkF.FLUSH | BlkF.DISCARD | BlkF.WRITE_ZEROES | BlkF.BLK_SIZE
    wanted_blk |= BlkF.MQ if setup.queues > 1 else BlkF(0)
    assert features & wanted_blk == wanted_blk
    guest = setup.guest
    assert int(guest.read("/sys/block/vda/size")) == SIZE // 512
    assert guest.read("/sys/block/vda/serial") == "pyvhost-test"
    assert guest.read("/sys/block/vda/ro") == "0"
    assert guest.read("/sys/block/vda/queue/write_cache") == "write back"
    assert int(guest.read("/sys/block/vda/queue/discard_max_bytes")) >= MIB
    assert int(guest.read("/sys/block/vda/queue/write_zeroes_max_bytes")) >= MIB
    assert len(guest.run("ls /sys/block/vda/mq").text.split()) == setup.queues


def test_mixed_io(setup: Setup, iocheck: Path) -> None:
    seed = 11 + setup.packed * 2 + setup.queues
    setup.guest.run(f"iocheck write /dev/vda {seed} 0 {IO_BYTES}")
    # The guest has flushed: what it wrote is in the file, for any reader.
    run(iocheck, "verify", setup.disk, str(seed), "0", str(IO_BYTES))
    # And the other way round: what the host writes, the guest reads.
    run(iocheck, "write", setup.disk, "99", "0", str(4 * MIB))
    setup.guest.run(f"iocheck verify /dev/vda 99 0 {4 * MIB}")


def test_parallel_writers_use_all_queues(setup: Setup, iocheck: Path) -> None:
    jobs = []
    for cpu in range(setup.queues):
        offset = PARALLEL + cpu * 8 * MIB
        command = f"taskset -p {1 << cpu} $$ >/dev/null; iocheck write /dev/vda {cpu} {offset} {8 * MIB}"
        jobs.append(setup.guest.start(command))
    for job in jobs:
        job.wait()
    for cpu in range(setup.queues):
        run(iocheck, "verify", setup.disk, str(cpu), str(PARALLEL + cpu * 8 * MIB), str(8 * MIB))
    lines = setup.guest.run("grep 'virtio.*-req' /proc/interrupts").text.splitlines()
    counts = [sum(int(word) for word in line.split()[1 : 1 + setup.queues]) for line in lines]
    assert len(counts) == setup.queues
    assert all(counts), lines


def test_flush(setup: Setup, iocheck: Path) -> None:
    # Field 16 of /sys/block/*/stat counts flush requests (Documentation/block/stat.rst).
    flushes = "awk '{print $16}' /sys/block/vda/stat"
    before = int(setup.guest.run(flushes).text)
    setup.guest.run(f"iocheck write /dev/vda 5 {DISCARD} {MIB}")  # ends with fsync
    assert int(setup.guest.run(flushes).text) > before
    run(iocheck, "verify", setup.disk, "5", str(DISCARD), str(MIB))


def test_discard(setup: Setup, iocheck: Path) -> None:
    setup.guest.run(f"iocheck write /dev/vda 6 {DISCARD} {8 * MIB}")
    blocks = setup.disk.stat().st_blocks
    setup.guest.run(f"iocheck discard /dev/vda {DISCARD + MIB} {4 * MIB}")
    # The host's file gave them back, but for what its file system notes down about the hole.
    assert blocks - setup.disk.stat().st_blocks > 3 * MIB // 512
    setup.guest.run(f"iocheck zero /dev/vda {DISCARD + MIB} {4 * MIB}")
    run(iocheck, "zero", setup.disk, str(DISCARD + MIB), str(4 * MIB))
    for neighbour, length in ((DISCARD, MIB), (DISCARD + 5 * MIB, 3 * MIB)):
        run(iocheck, "verify", setup.disk, "6", str(neighbour), str(length))


def test_write_zeroes(setup: Setup, iocheck: Path) -> None:
    setup.guest.run(f"iocheck write /dev/vda 7 {ZEROES} {4 * MIB}")
    # Odd in sectors: no page and no block of the host's file system.
    hole, length = ZEROES + MIB + 512, MIB + 1536
    setup.guest.run(f"iocheck zeroout /dev/vda {hole} {length}")
    setup.guest.run(f"iocheck zero /dev/vda {hole} {length}")
    run(iocheck, "zero", setup.disk, str(hole), str(length))
    run(iocheck, "verify", setup.disk, "7", str(ZEROES), str(MIB + 512))
    run(iocheck, "verify", setup.disk, "7", str(hole + length), str(ZEROES + 4 * MIB - hole - length))


def test_resize(setup: Setup, iocheck: Path) -> None:
    grown = SIZE + 32 * MIB
    with setup.disk.open("r+b") as file:
        file.truncate(grown)
    setup.serve.reload()
    # The guest's shell waits for what its kernel saw; the deadline is that of the command.
    seen = f"[ $(cat /sys/block/vda/size) = {grown // 512} ]"
    setup.guest.run(f"until {seen}; do usleep 10000; done", timeout=30)
    setup.guest.run(f"iocheck write /dev/vda 8 {SIZE} {32 * MIB}")
    run(iocheck, "verify", setup.disk, "8", str(SIZE), str(32 * MIB))


def test_reset(setup: Setup, iocheck: Path) -> None:
    """The guest's reset button, with requests in flight, then all over again."""
    setup.guest.run("rm -f /tmp/stop")
    setup.guest.start(f"iocheck churn /dev/vda 1 {AFTER_RESET} {8 * MIB} 4 /tmp/stop")
    setup.guest.run("until [ $(awk '{print $9}' /sys/block/vda/stat) -gt 0 ]; do :; done", timeout=30)
    setup.guest.reset()
    features = setup.guest.features()
    assert bool(features & VirtioF.RING_PACKED) == setup.packed
    setup.guest.run(f"iocheck write /dev/vda 9 {AFTER_RESET} {8 * MIB}")
    run(iocheck, "verify", setup.disk, "9", str(AFTER_RESET), str(8 * MIB))


def test_read_only(boot: Boot, iocheck: Path, tmp_path: Path) -> None:
    """With the longest ring that QEMU makes."""
    disk = make_disk(tmp_path / "disk.raw", 16 * MIB)
    run(iocheck, "write", disk, "3", "0", str(16 * MIB))
    with (
        Serve("blk", tmp_path / "s", "--blk-file", str(disk), "--read-only") as serve,
        boot(vhost_user_blk(serve.path, queue_size=1024, packed=True)) as guest,
    ):
        assert guest.features() & BlkF.RO
        assert guest.read("/sys/block/vda/ro") == "1"
        guest.run(f"iocheck verify /dev/vda 3 0 {16 * MIB}")
        assert guest.run("dd if=/dev/zero of=/dev/vda bs=4096 count=1 conv=notrunc", check=False).code != 0
        run(iocheck, "verify", disk, "3", "0", str(16 * MIB))
