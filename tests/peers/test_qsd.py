# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Our front-end and virtio-blk driver on qemu-storage-daemon's vhost-user-blk export.

The daemon serves a plain file, so each side's writes are checked by other means: ours in the file,
the file's through ours. It has split rings only.
"""

from __future__ import annotations

import random
import select
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from peers.support import DEADLINE, StorageDaemon, make_disk, require, run
from vhost import Frontend, drivers
from vhost.errors import InactiveFeature
from vhost.features import BlkF, ProtocolF, VirtioF

pytestmark = pytest.mark.peer

MIB = 1 << 20
SIZE = 32 * MIB
SECTORS = SIZE // 512


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.raw", SIZE)


@pytest.fixture
def daemon(disk: Path) -> Iterator[StorageDaemon]:
    require("qsd")
    with StorageDaemon(disk, disk.with_name("s")) as qsd:
        yield qsd


@pytest.fixture
def frontend(daemon: StorageDaemon) -> Iterator[Frontend]:
    with Frontend.connect(daemon.path) as session:
        yield session


def contents(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def test_what_it_offers(frontend: Frontend) -> None:
    wanted = ProtocolF.MQ | ProtocolF.CONFIG | ProtocolF.BACKEND_REQ | ProtocolF.REPLY_ACK
    assert frontend.protocol_features & wanted == wanted
    assert frontend.get_queue_num() >= 2
    with drivers.Blk(frontend) as blk:
        assert not blk.packed
        wanted_blk = VirtioF.VERSION_1 | VirtioF.RING_INDIRECT_DESC | VirtioF.RING_EVENT_IDX
        assert blk.negotiated & (int(wanted_blk) | int(BlkF.FLUSH)) == int(wanted_blk) | int(BlkF.FLUSH)
        assert blk.capacity == SECTORS
        assert blk.block_size == 512


def test_packed_is_refused_by_name(frontend: Frontend) -> None:
    with pytest.raises(InactiveFeature, match="RING_PACKED"):
        drivers.Blk(frontend, packed=True)
    with drivers.Blk(frontend) as blk:  # and the session is as good as before
        assert blk.read(0, 1) == bytes(512)


def test_data_goes_both_ways(frontend: Frontend, disk: Path) -> None:
    with drivers.Blk(frontend) as blk:
        ours = contents(1, MIB)
        blk.write(2048, ours)
        blk.flush()
        assert disk.read_bytes()[MIB : 2 * MIB] == ours
        theirs = contents(2, MIB)
        with disk.open("r+b") as file:
            file.seek(4 * MIB)
            file.write(theirs)
        assert blk.read(8192, 2048) == theirs
        assert blk.read(SECTORS - 1, 1) == bytes(512)


def test_a_session_sees_what_the_one_before_wrote(daemon: StorageDaemon) -> None:
    data = contents(3, 4096)
    with Frontend.connect(daemon.path) as first, drivers.Blk(first) as blk:
        blk.write(0, data)
    with Frontend.connect(daemon.path, retry=DEADLINE) as second, drivers.Blk(second) as blk:
        assert blk.read(0, 8) == data


def test_discard_and_write_zeroes(frontend: Frontend, disk: Path) -> None:
    with drivers.Blk(frontend) as blk:
        data = contents(4, MIB)
        blk.write(0, data)
        blk.write_zeroes(7, 9)
        blk.write_zeroes(64, 128, unmap=True)
        blk.discard(512, 256)
        blk.flush()
        image = bytearray(data)
        image[7 * 512 : 16 * 512] = bytes(9 * 512)
        image[64 * 512 : 192 * 512] = bytes(128 * 512)
        image[512 * 512 : 768 * 512] = bytes(256 * 512)
        assert disk.read_bytes()[:MIB] == image
        assert blk.read(0, 2048) == image


@pytest.mark.parametrize("depth", [1, 8, 64])
@pytest.mark.parametrize("queues", [1, 2])
def test_many_in_flight(frontend: Frontend, disk: Path, queues: int, depth: int) -> None:
    """Mixed sizes in random order on all queues; every byte is checked in the file and by reading."""
    rng = random.Random(depth * 10 + queues)
    data = contents(5, 8 * MIB)
    pieces = []
    start = 0
    while start < len(data):
        size = min(rng.choice((512, 1024, 4096, 12288, 65536, 131072)), len(data) - start)
        pieces.append((start, size))
        start += size
    with drivers.Blk(frontend, num_queues=queues, depth=depth, queue_size=256) as blk:
        for write in (True, False):
            rng.shuffle(pieces)
            todo = list(pieces)
            deadline = time.monotonic() + DEADLINE
            while todo or blk.in_flight:
                assert time.monotonic() < deadline, f"{blk.in_flight} requests do not end"
                for queue in range(queues):
                    try:
                        while todo:
                            start, size = todo[-1]
                            if write:
                                blk.submit_write(
                                    start // 512, data[start : start + size], todo[-1], queue=queue
                                )
                            else:
                                blk.submit_read(start // 512, size // 512, todo[-1], queue=queue)
                            todo.pop()
                    except BufferError:
                        pass  # that many are in flight
                for queue in range(queues):
                    for done in blk.poll(0.0, queue=queue):
                        assert done.error is None
                        start, size = done.token
                        assert write or done.data == data[start : start + size]
            if write:
                blk.flush()
                assert disk.read_bytes()[: len(data)] == data


def test_resize(frontend: Frontend, daemon: StorageDaemon, disk: Path) -> None:
    with drivers.Blk(frontend) as blk:
        seen: list[int] = []
        frontend.on_config_change = lambda: seen.append(blk.read_config().capacity)
        daemon.resize(2 * SIZE)
        deadline = time.monotonic() + DEADLINE
        while not seen and time.monotonic() < deadline:
            readable, _, _ = select.select([frontend.fileno()], [], [], DEADLINE)
            assert readable, "no news of the new size"
            assert frontend.step()
        assert seen == [2 * SECTORS]
        assert blk.capacity == 2 * SECTORS
        data = contents(6, 4096)
        blk.write(2 * SECTORS - 8, data)
        blk.flush()
        assert disk.stat().st_size == 2 * SIZE
        assert disk.read_bytes()[-4096:] == data


def test_killed_and_restarted(disk: Path, tmp_path: Path) -> None:
    """The driver goes on with the daemon's successor; what was in flight is done by that one."""
    require("qsd")
    data = contents(7, 64 << 10)
    with StorageDaemon(disk, tmp_path / "s1") as first:
        frontend = Frontend.connect(first.path)
        blk = drivers.Blk(frontend, depth=16)
        blk.write(0, data)
    blk.submit_write(1024, data, "after the end")
    frontend.close()
    with (
        StorageDaemon(disk, tmp_path / "s2") as second,
        Frontend.connect(second.path, retry=DEADLINE) as successor,
    ):
        blk.restart(successor)
        (done,) = blk.poll(DEADLINE)
        assert (done.token, done.error) == ("after the end", None)
        assert blk.read(0, 128) == blk.read(1024, 128) == data
        blk.close()


def test_iocheck_agrees(frontend: Frontend, disk: Path, iocheck: Path) -> None:
    """A program on the host writes the file; each of its bytes comes through the daemon and our driver."""
    run(iocheck, "write", disk, "31", "0", str(8 * MIB))
    with drivers.Blk(frontend) as blk:
        image = blk.read(0, 8 * MIB // 512)
        assert image == disk.read_bytes()[: 8 * MIB]
        blk.write(16 * MIB // 512, image)
        blk.flush()
    assert disk.read_bytes()[16 * MIB : 24 * MIB] == image
