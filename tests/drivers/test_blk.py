# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The block driver: its data is that of the plain file, whatever was negotiated; errors say what failed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest

from devices.disks import pattern, serving
from devices.load import Load
from vhost.devices.blk import Blk as Device
from vhost.drivers import Blk, BlkError
from vhost.errors import InactiveFeature, InvalidQueue, ReplyTimeout, VhostError
from vhost.features import BlkF, ProtocolF, VirtioF
from vhost.user.frontend import WANTED, Frontend
from vhost.virtio_blk import BlkConfig, BlkStatus, BlkType

SECTORS = 4096
SIZE = SECTORS * 512
CONTENT = pattern(SIZE)
RINGS = [(packed, in_order) for packed in (False, True) for in_order in (False, True)]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def path(image: Path, tmp_path: Path, no_leaks: None) -> Iterator[Path]:
    with serving(Device(image, num_queues=4, threads=2, serial="plain file"), tmp_path / "s"):
        yield tmp_path / "s"


def connect(path: Path) -> Frontend:
    return Frontend.connect(path, timeout=10)


# -- data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("packed", "indirect", "event_idx", "in_order"), list(product((False, True), repeat=4))
)
@pytest.mark.parametrize(("depth", "queues"), [(1, 1), (17, 3), (128, 2)])
def test_load(
    image: Path,
    path: Path,
    packed: bool,
    indirect: bool,
    event_idx: bool,
    in_order: bool,
    depth: int,
    queues: int,
) -> None:
    flags = {
        VirtioF.RING_INDIRECT_DESC: indirect,
        VirtioF.RING_EVENT_IDX: event_idx,
        VirtioF.IN_ORDER: in_order,
    }
    without = sum(int(bit) for bit, wanted in flags.items() if not wanted)
    with (
        connect(path) as frontend,
        # Without indirect tables, a request takes three slots of its ring.
        Blk(
            frontend, packed=packed, num_queues=queues, depth=depth, queue_size=512, max_transfer=4096,
            without=without,
        ) as disk,
    ):  # fmt: skip
        assert disk.packed is packed
        for bit, wanted in flags.items():
            assert bool(disk.negotiated & bit) is wanted
        load = Load(disk)
        for _ in range(60 if depth == 1 else 12):
            load.fill()
            load.reap(wait=True)
        load.check(image)
        assert not disk.in_flight


@pytest.mark.parametrize(("packed", "in_order"), RINGS)
@pytest.mark.parametrize("size", [3, 5, 7, 100], ids=lambda size: f"ring of {size}")
def test_a_packed_ring_of_any_size(image: Path, path: Path, packed: bool, in_order: bool, size: int) -> None:
    if not packed:
        size = 1 << size.bit_length()
    without = 0 if in_order else int(VirtioF.IN_ORDER)
    with (
        connect(path) as frontend,
        Blk(frontend, packed=packed, queue_size=size, depth=size, without=without) as disk,
    ):
        load = Load(disk)
        for _ in range(40):
            load.fill()
            load.reap(wait=True)
        load.check(image)


@pytest.mark.parametrize("packed", [False, True])
def test_synchronous_calls(image: Path, path: Path, packed: bool) -> None:
    with connect(path) as frontend, Blk(frontend, packed=packed, max_transfer=8192) as disk:
        assert disk.capacity == SECTORS
        assert disk.block_size == 512
        assert not disk.read_only
        assert disk.get_id() == "plain file"
        assert disk.read(0, SECTORS) == CONTENT  # by many requests
        new = bytearray(pattern(37 * 512, seed=9))
        disk.write(100, new)
        disk.write(200, memoryview(new)[: 2 * 512])
        disk.flush()
        disk.write_zeroes(300, 10)
        disk.write_zeroes(310, 1, unmap=True)
        disk.discard(320, 8)
        want = bytearray(CONTENT)
        want[100 * 512 : 137 * 512] = new
        want[200 * 512 : 202 * 512] = new[:1024]
        want[300 * 512 : 311 * 512] = bytes(11 * 512)
        want[320 * 512 : 328 * 512] = bytes(8 * 512)
        assert disk.read(0, SECTORS) == want == image.read_bytes()
        assert disk.read(7, 0) == b""


def test_completions(path: Path) -> None:
    with connect(path) as frontend, Blk(frontend, num_queues=2, depth=4) as disk:
        disk.submit_write(0, CONTENT[512:1024], "write", queue=1)
        disk.submit_flush("flush", queue=1)
        disk.submit_read(5, 2, "read", queue=0)
        found = {}
        while disk.in_flight:
            for queue in (0, 1):
                found |= {
                    one.token: one for one in disk.poll(1.0 if disk._flying[queue] else 0.0, queue=queue)
                }
        assert {token: (one.data, one.error) for token, one in found.items()} == {
            "write": (None, None),
            "flush": (None, None),
            "read": (CONTENT[5 * 512 : 7 * 512], None),
        }
        assert disk.poll() == []
        assert disk.poll(0.01) == []


@pytest.mark.parametrize("packed", [False, True])
def test_requests_share_kicks(path: Path, packed: bool) -> None:
    """The first one of all is told of at once; those behind it together, at the latest by poll()."""
    without = int(VirtioF.IN_ORDER | VirtioF.RING_EVENT_IDX)
    with connect(path) as frontend, Blk(frontend, packed=packed, without=without) as disk:
        (queue,) = disk.queues
        frontend.set_vring_enable(0, False)
        os.eventfd_write(queue.kick_fd, 1)
        counts = []
        for token in range(20):
            os.eventfd_read(queue.kick_fd)
            disk.submit_read(token, 1, token)
            os.eventfd_write(queue.kick_fd, 1)
            counts.append(os.eventfd_read(queue.kick_fd) - 1)
            os.eventfd_write(queue.kick_fd, 1)
        assert counts == [int(i in (0, 8, 16)) for i in range(20)]
        os.eventfd_read(queue.kick_fd)
        assert disk.poll() == []
        assert os.eventfd_read(queue.kick_fd) == 1
        frontend.set_vring_enable(0, True)
        found = []
        while disk.in_flight:
            found += disk.poll(10.0)
        assert [one.token for one in found] == list(range(20))


# -- errors ----------------------------------------------------------------------------------------


def test_errors(path: Path) -> None:
    with connect(path) as frontend, Blk(frontend) as disk:
        with pytest.raises(BlkError, match="IN of 2 sectors at 4095: IOERR") as caught:
            disk.read(SECTORS - 1, 2)
        error = caught.value
        assert (error.request, error.sector, error.count) == (BlkType.IN, SECTORS - 1, 2)
        assert (error.status, error.errno) == (BlkStatus.IOERR, errno.EIO)
        assert isinstance(error, VhostError)
        with pytest.raises(OSError, match="WRITE_ZEROES of 2 sectors at 4095"):
            disk.write_zeroes(SECTORS - 1, 2)
        disk.submit_write(SECTORS, b"x" * 512, "far")
        disk.submit_read(0, 1, "near")
        done = {}
        while disk.in_flight:
            done |= {one.token: one for one in disk.poll(10.0)}
        assert isinstance(done["far"].error, BlkError)
        assert done["far"].data is None
        assert (done["near"].error, done["near"].data) == (None, CONTENT[:512])
        assert disk.read(0, 1) == CONTENT[:512]  # a failed request ends nothing


def test_unsupported(path: Path) -> None:
    with connect(path) as frontend, Blk(frontend) as disk:
        with pytest.raises(BlkError, match="UNSUPP") as caught:
            disk._run(BlkType.DISCARD, 0, 8, data=bytes(12) + b"\x40\0\0\0")
        assert (caught.value.status, caught.value.errno) == (BlkStatus.UNSUPP, errno.EOPNOTSUPP)


def test_read_only(image: Path, tmp_path: Path, no_leaks: None) -> None:
    with (
        serving(Device(image, read_only=True), tmp_path / "ro"),
        connect(tmp_path / "ro") as frontend,
        Blk(frontend) as disk,
    ):
        assert disk.read_only
        with pytest.raises(BlkError, match="OUT of 1 sectors at 0: IOERR"):
            disk.write(0, b"x" * 512)
        disk.flush()
        assert disk.read(0, 8) == CONTENT[:4096]


def test_wrong_arguments(path: Path) -> None:
    with connect(path) as frontend, Blk(frontend, depth=2, max_transfer=4096) as disk:
        for data in (b"", b"x", b"x" * 511):
            with pytest.raises(ValueError, match="multiple of 512"):
                disk.write(0, data)
        with pytest.raises(ValueError, match="limit 4096"):
            disk.submit_read(0, 9)
        with pytest.raises(ValueError, match="limit 4096"):
            disk.submit_write(0, bytes(4608))
        disk.submit_read(0, 1)
        disk.submit_read(1, 1)
        with pytest.raises(BufferError, match="2 requests are in flight"):
            disk.submit_read(2, 1)
        while disk.in_flight:
            assert disk.poll(10.0)
        disk.submit_read(0, 1)
        with pytest.raises(InvalidQueue, match="while submitted requests are in flight"):
            disk.read(1, 1)
        assert disk.poll(0.0, queue=0) is not None
    with connect(path) as frontend, pytest.raises(ValueError, match="multiple of 512"):
        Blk(frontend, max_transfer=1000)


def test_a_full_ring_leaves_the_rest_for_later(path: Path) -> None:
    """More depth than the ring has room for, without indirect tables."""
    without = int(VirtioF.IN_ORDER | VirtioF.RING_INDIRECT_DESC)
    with connect(path) as frontend, Blk(frontend, queue_size=8, depth=8, without=without) as disk:
        frontend.set_vring_enable(0, False)
        for token in range(2):
            disk.submit_read(token, 1, token)
        with pytest.raises(BufferError, match="descriptors free"):
            disk.submit_read(2, 1, 2)
        frontend.set_vring_enable(0, True)
        found = []
        while disk.in_flight:
            found += disk.poll(10.0)
        assert sorted(one.token for one in found) == [0, 1]
        for token in range(20):
            disk.submit_read(token, 1, token)
            (one,) = disk.poll(10.0)
            assert one.data == CONTENT[token * 512 :][:512]


def test_timeout(path: Path) -> None:
    with connect(path) as frontend, Blk(frontend, timeout=0.05) as disk:
        frontend.set_vring_enable(0, False)
        with pytest.raises(ReplyTimeout, match=r"IN of 1 sectors at 3: no answer in 0\.05 s"):
            disk.read(3, 1)
        frontend.set_vring_enable(0, True)
        while disk.in_flight:
            disk.poll(10.0)
        disk.timeout = 10.0
        assert disk.read(3, 1) == CONTENT[3 * 512 : 4 * 512]


def test_close(path: Path) -> None:
    with connect(path) as frontend:
        for _ in range(50):  # one session, many drivers
            disk = Blk(frontend)
            assert disk.read(0, 1) == CONTENT[:512]
            disk.close()
            disk.close()


# -- the back-end dies -----------------------------------------------------------------------------


@contextmanager
def program(path: Path, image: Path, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "vhost", "serve", "blk", "--socket-path", str(path)]
    server = subprocess.Popen([*command, "--blk-file", str(image), *more], stderr=subprocess.DEVNULL)
    try:
        yield server
    finally:
        server.terminate()
        server.wait(20)


@pytest.mark.parametrize(("packed", "in_order"), RINGS)
@pytest.mark.parametrize("tracked", [False, True])
def test_killed_with_requests_in_flight(
    image: Path, tmp_path: Path, packed: bool, in_order: bool, tracked: bool, no_leaks: None
) -> None:
    """The next one goes on with the rings as they are, or gets all again in new ones."""
    path = tmp_path / "s"
    wanted = int(WANTED if tracked else WANTED & ~ProtocolF.INFLIGHT_SHMFD)
    load: Load | None = None
    without = 0 if in_order else int(VirtioF.IN_ORDER)
    for life in range(3):
        with program(path, image, "--num-queues", "2") as server:
            frontend = Frontend.connect(path, retry=20, protocol_features=wanted)
            if load is None:
                disk = Blk(frontend, num_queues=2, packed=packed, depth=24, without=without)
                load = Load(disk)
            else:
                assert disk.in_flight
                rings = disk.queues
                assert disk.restart(frontend) == tracked
                assert (disk.queues is rings) == tracked
            for _ in range(30):
                load.fill()
                load.reap(wait=True)
            if life < 2:
                load.fill()
                os.kill(server.pid, signal.SIGKILL)
                server.wait()
                load.fill()
                frontend.close()
                continue
            load.check(image)
            disk.close()
            frontend.close()
    del disk, load, frontend


def test_a_back_end_that_tracks_comes_back_without(image: Path, tmp_path: Path, no_leaks: None) -> None:
    """And the other way round: what was negotiated first does not bind."""
    path = tmp_path / "s"
    load: Load | None = None
    for life, (more, goes_on) in enumerate(
        [((), None), (("--without", "inflight-shmfd"), False), ((), False)]
    ):
        with program(path, image, *more) as server, Frontend.connect(path, retry=20) as frontend:
            if load is None:
                disk = Blk(frontend)
                load = Load(disk)
            else:
                assert disk.restart(frontend) is goes_on
            for _ in range(10):
                load.fill()
                load.reap(wait=True)
            if life < 2:
                load.fill()
                os.kill(server.pid, signal.SIGKILL)
                server.wait()
                continue
            load.check(image)
            disk.close()
    del disk, load, frontend


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("drains", [False, True])
def test_from_one_back_end_to_the_other(
    image: Path, tmp_path: Path, packed: bool, drains: bool, no_leaks: None
) -> None:
    """The first one is not killed but told to stop its rings, and may leave what is in flight in the buffer
    (GET_VRING_BASE_INFLIGHT)."""
    hand_over = ProtocolF(0) if drains else ProtocolF.GET_VRING_BASE_INFLIGHT
    wanted = int(WANTED | hand_over)
    load: Load | None = None
    with program(tmp_path / "s0", image, "--share"), program(tmp_path / "s1", image, "--share"):
        for life in range(6):
            frontend = Frontend.connect(tmp_path / f"s{life % 2}", retry=20, protocol_features=wanted)
            assert frontend.protocol_features & hand_over == hand_over
            if load is None:
                disk = Blk(frontend, packed=packed, depth=24)
                load = Load(disk)
            else:
                assert disk.restart(frontend)
            for _ in range(10):
                load.fill()
                load.reap(wait=True)
            load.fill()
            if life < 5:
                frontend.get_vring_base(0)
                frontend.close()
                continue
            load.check(image)
            disk.close()
            frontend.close()
    del disk, load, frontend


def test_another_device_comes_back(image: Path, tmp_path: Path) -> None:
    """What was negotiated is not there any more: that is said, and nothing is started."""
    with program(tmp_path / "a", image) as server:
        frontend = Frontend.connect(tmp_path / "a", retry=20)
        disk = Blk(frontend)
        server.kill()
        server.wait()
        frontend.close()
    with program(tmp_path / "b", image, "--read-only"), Frontend.connect(tmp_path / "b", retry=20) as again:
        with pytest.raises(InactiveFeature, match="DISCARD"):
            disk.restart(again)
        assert BlkConfig.unpack(again.get_config(0, 60)).capacity == SECTORS
    disk._close_events()


def test_a_device_that_came_back_larger(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with program(path, image) as server:
        frontend = Frontend.connect(path, retry=20)
        disk = Blk(frontend)
        server.kill()
        server.wait()
        frontend.close()
    os.truncate(image, SIZE * 2)
    with program(path, image), Frontend.connect(path, retry=20) as again:
        disk.restart(again)
        assert disk.capacity == SECTORS * 2
        disk.write(SECTORS * 2 - 1, CONTENT[:512])
        assert disk.negotiated & BlkF.FLUSH
        disk.close()
    assert image.read_bytes()[-512:] == CONTENT[:512]


def test_ranges_beyond_what_one_segment_takes(tmp_path: Path) -> None:
    """5.2.6.1: a driver keeps to the device's limits."""
    large = tmp_path / "large.raw"
    large.write_bytes(b"\x5a" * (10 << 20))
    count = (9 << 20) // 512
    with serving(Device(large), tmp_path / "large.sock"), connect(tmp_path / "large.sock") as frontend:
        with Blk(frontend) as disk:
            assert disk.config.max_write_zeroes_sectors < count
            disk.write_zeroes(1, count)
    assert large.read_bytes() == b"\x5a" * 512 + bytes(count * 512) + b"\x5a" * ((1 << 20) - 512)
