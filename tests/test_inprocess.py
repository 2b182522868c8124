# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""InProcess: a device and its driver in one process, with and without a thread of its own."""

from __future__ import annotations

import os
import select
import threading
from pathlib import Path

import pytest

import vhost
from fds import no_leaks
from vhost.errors import Disconnected, InvalidMessage, InvalidState, UnsupportedRequest

SIZE = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("handler", ["c", "python"])
def test_blk(disk: Path, handler: str, packed: bool) -> None:
    data = os.urandom(128 << 10)

    def use() -> None:
        device = vhost.devices.Blk(disk, handler=handler, num_queues=2)
        with vhost.InProcess(device) as ops:
            with vhost.drivers.Blk(ops, packed=packed, num_queues=2) as driver:
                driver.write(16, data)
                driver.flush()
                assert driver.read(16, len(data) // 512) == data
                assert driver.packed == packed
            with vhost.drivers.Blk(ops, packed=not packed) as driver:  # after the first one's reset
                assert driver.read(16, 8) == data[:4096]
        device.close()

    with no_leaks():
        use()
    assert disk.read_bytes()[16 * 512 : 16 * 512 + len(data)] == data


def test_rng() -> None:
    with vhost.InProcess(vhost.devices.Rng()) as ops, vhost.drivers.Rng(ops) as driver:
        assert len(set(driver.read(4096))) > 100
        with pytest.raises(UnsupportedRequest, match="no configuration space"):
            ops.get_config(0, 4)


def test_the_caller_steps(disk: Path) -> None:
    """Without a thread, nothing happens but by ``step()``, and ``fileno()`` says when."""
    before = threading.active_count()
    device = vhost.devices.Blk(disk, handler="python")
    with vhost.InProcess(device, thread=False) as ops, vhost.drivers.Blk(ops) as driver:
        assert threading.active_count() == before
        while select.select([ops], [], [], 0)[0]:
            ops.step()
        driver.submit_write(0, b"x" * 512, token="w")
        assert not driver.poll()
        assert select.select([ops], [], [], 10)[0]
        assert ops.step()
        assert [done.token for done in driver.poll()] == ["w"]
    device.close()


@pytest.mark.parametrize("thread", [True, False])
def test_config_change(disk: Path, thread: bool) -> None:
    device = vhost.devices.Blk(disk)
    with vhost.InProcess(device, thread=thread) as ops, vhost.drivers.Blk(ops) as driver:
        seen: list[int] = []
        ops.on_config_change = lambda: seen.append(driver.read_config().capacity)
        device.resize(2 * SIZE)
        while not seen:
            assert select.select([ops], [], [], 10)[0]
            assert ops.step()
        assert seen == [2 * SIZE // 512]
    device.close()


@pytest.mark.filterwarnings("default")
def test_a_handler_that_fails_ends_the_session() -> None:
    class Bad(vhost.Device):
        device_id = vhost.DeviceId.RNG
        queues = ("requestq",)

        def requestq(self, queue: vhost.DeviceQueue) -> None:
            if queue.has_work():
                raise RuntimeError("no entropy today")

    before = threading.active_count()
    with vhost.InProcess(Bad()) as ops:
        driver = vhost.drivers.Rng(ops)
        driver.queues[0].add([], [(driver.data_addr, 16)], "t")
        driver.queues[0].kick()
        while ops.step():
            assert select.select([ops], [], [], 10)[0]
        assert str(ops.error) == "no entropy today"
        with pytest.raises(Disconnected, match="no entropy today"):
            ops.get_features()
        with pytest.raises(Disconnected):
            driver.close()
    assert threading.active_count() == before


def test_requests_that_are_refused(disk: Path) -> None:
    device = vhost.devices.Blk(disk)
    with vhost.InProcess(device) as ops, vhost.InProcess(device) as other:
        with vhost.drivers.Blk(ops) as driver:
            with pytest.raises(vhost.DeviceBusy):
                vhost.drivers.Blk(other)
            driver.read(0, 1)  # until then it could be told anew
            with pytest.raises(InvalidState, match="ring 0: SET_VRING_NUM while the ring is started"):
                ops.set_vring_num(0, 64)
            assert len(driver.read(0, 1)) == 512
        with pytest.raises(InvalidMessage, match="ring 7, must be below 1"):
            ops.set_vring_num(7, 64)
        with pytest.raises(InvalidMessage, match="not offered"):
            ops.set_features(1 << 63)
    device.close()
    ops.close()
    with pytest.raises(Disconnected):
        ops.get_features()
    assert not ops.step()


def test_read_only_mapping_is_never_written(tmp_path: Path) -> None:
    """What a driver lets a device only read, a device that is made to write copies."""
    fd = os.memfd_create("ro", os.MFD_CLOEXEC)
    os.write(fd, b"driver's" + bytes(8184))
    readable = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    region = vhost.Region.from_iotlb(readable, 4096, iova=0x10000, offset=0, writable=False)
    memory = vhost.GuestMemory([region])
    memory.write(0x10000, b"device's")
    assert os.pread(fd, 8, 0) == b"driver's"
    with pytest.raises(vhost.InvalidGuestMemory, match="Permission denied"):
        vhost.Region.from_iotlb(readable, 4096, iova=0x10000, offset=0, writable=True)
    os.close(fd)
    os.close(readable)


def test_a_vduse_interrupt_that_is_none() -> None:
    from rig import Rig, eventfds

    with eventfds(1) as (fd,):
        rig = Rig(16)
        driver, queue = rig.model_driver(), rig.device(call=fd, call_vq=3)
        assert queue.call_vq == 3
        driver.add([], [(rig.data, 8)])
        chain = queue.pop()
        assert chain is not None
        with pytest.raises(OSError, match=r"VDUSE interrupt of ring 3.*Inappropriate ioctl"):
            queue.push(chain)


def test_a_missed_address() -> None:
    from rig import Rig

    rig = Rig(16)
    driver, queue = rig.model_driver(), rig.device()
    driver.add([], [(rig.end + 4096, 8)])
    assert not queue.missed
    with pytest.raises(vhost.QueueBroken, match="outside guest memory"):
        queue.pop()
    assert queue.missed
    assert queue.base == 0
