# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""VhostVdpa on the kernel's simulators of a disk and a NIC: everything that the interface has."""

from __future__ import annotations

import errno
import os
import select
import struct
from collections.abc import Iterator

import pytest

from kernel.vdpa_bus import vdpa, vhost_vdpa
from kernel.wires import RX, TX, BareNic, frame
from vhost.drivers import Blk, BlkError
from vhost.errors import InvalidGuestMemory, IoctlError
from vhost.features import BackendF, BlkF, DeviceId, Status, VirtioF
from vhost.kernel import VhostVdpa
from vhost.memory import GuestMemory, Region

pytestmark = pytest.mark.kernel("vdpa", "vdpa_sim")

SECTORS = 0x40000  # what the simulator has
PAGE = 4096


@pytest.fixture(scope="module")
def blk_node() -> Iterator[str]:
    with vhost_vdpa("simblk", "vdpasim_blk") as path:
        yield path


@pytest.fixture(scope="module")
def net_node() -> Iterator[str]:
    with vhost_vdpa("simnet", "vdpasim_net", "mac", "52:54:00:12:34:56", "mtu", "1400") as path:
        yield path


def test_what_a_disk_says(blk_node: str, no_leaks: None) -> None:
    with VhostVdpa(blk_node) as disk:
        assert disk.get_device_id() is DeviceId.BLOCK
        assert disk.get_features() & VirtioF.VERSION_1
        assert disk.get_features() & VirtioF.ACCESS_PLATFORM
        assert disk.get_features() & BlkF.FLUSH
        assert disk.backend_features & BackendF.IOTLB_MSG_V2
        assert disk.get_queue_num() == 1
        assert disk.get_vring_num_max() == 256
        first, last = disk.get_iova_range()
        assert first == 0
        assert last > 1 << 40
        size = disk.get_config_size()
        assert size >= 60
        config = disk.get_config(0, size)
        assert struct.unpack_from("<Q", config)[0] == SECTORS
        assert disk.get_config(20, 4) == config[20:24]
        with pytest.raises(IoctlError) as failed:
            disk.get_config(size - 1, 2)
        assert failed.value.errno == errno.EINVAL
        assert "VHOST_VDPA_GET_CONFIG" in str(failed.value)
        assert f"2 bytes at {size - 1}" in str(failed.value)


def test_second_open(blk_node: str) -> None:
    with VhostVdpa(blk_node):
        with pytest.raises(IoctlError, match="another process has it open") as failed:
            VhostVdpa(blk_node)
        assert failed.value.errno == errno.EBUSY


def test_status_walk(blk_node: str, no_leaks: None) -> None:
    with VhostVdpa(blk_node) as disk:
        disk.set_status(0)
        assert disk.get_status() == 0
        walk = Status(0)
        for step in (Status.ACKNOWLEDGE, Status.DRIVER):
            walk |= step
            disk.set_status(int(walk))
            assert disk.get_status() == walk
        disk.set_features(int(VirtioF.VERSION_1 | VirtioF.ACCESS_PLATFORM))
        disk.set_status(int(walk | Status.FEATURES_OK))
        assert disk.get_status() & Status.FEATURES_OK
        with pytest.raises(IoctlError, match="too late: the driver has acknowledged"):
            disk.set_features(int(VirtioF.VERSION_1))
        with pytest.raises(IoctlError, match="cannot be taken back but by a reset") as failed:
            disk.set_status(int(Status.ACKNOWLEDGE))
        assert failed.value.errno == errno.EINVAL
        disk.set_status(0)
        assert disk.get_status() == 0


def test_disk_reads_and_writes(blk_node: str, no_leaks: None) -> None:
    with VhostVdpa(blk_node) as ops, Blk(ops, depth=8) as disk:
        assert disk.negotiated & VirtioF.ACCESS_PLATFORM
        assert not disk.packed
        assert disk.capacity == SECTORS
        data = os.urandom(256 << 10)
        disk.write(1000, data)
        disk.flush()
        assert disk.read(1000, len(data) // 512) == data
        disk.write_zeroes(1008, 8)
        assert disk.read(1000, 24) == data[:4096] + bytes(4096) + data[8192:12288]
        for n in range(64):
            disk.submit_write(n * 8, bytes([n]) * 4096, n)
            while disk.in_flight == 8:
                assert all(done.error is None for done in disk.poll(20))
        while disk.in_flight:
            assert all(done.error is None for done in disk.poll(20))
        assert disk.read(63 * 8, 8) == bytes([63]) * 4096
        assert disk.get_id().startswith("vdpa_blk_sim")
    with VhostVdpa(blk_node) as ops, Blk(ops) as disk:  # again, in a new session
        assert disk.read(1000, 8) == data[:4096]


def test_memory_is_in_the_range_and_whole_pages(blk_node: str, no_leaks: None) -> None:
    with VhostVdpa(blk_node) as disk:
        _, last = disk.get_iova_range()
        odd = Region.allocate(PAGE, guest_addr=100)
        with pytest.raises(InvalidGuestMemory, match="whole pages"):
            disk.set_mem_table(GuestMemory([odd]))
        low, high = (Region.allocate(PAGE, guest_addr=addr) for addr in (PAGE, 1 << 40))
        disk.set_mem_table(GuestMemory([low, high]))
        with pytest.raises(IoctlError, match="something is mapped there already") as failed:
            disk.dma_map(PAGE, PAGE, low.host_addr)
        assert failed.value.errno == errno.EFAULT
        disk.set_mem_table(GuestMemory([high]))
        disk.dma_map(PAGE, PAGE, low.host_addr, readonly=True)
        disk.dma_unmap(PAGE, PAGE)
        if last < (1 << 64) - PAGE:
            with pytest.raises(IoctlError, match="IOVA range"):
                disk.dma_map(last + 1, PAGE, low.host_addr)
        disk.set_mem_table(GuestMemory())


def test_unmapped_access_fails_and_recovers(blk_node: str, no_leaks: None) -> None:
    with VhostVdpa(blk_node) as ops, Blk(ops, depth=1) as disk:
        disk.write(0, b"\x5a" * 512)
        (region,) = disk.memory
        data = disk.data_addr
        size = region.guest_addr + region.size - data
        with ops.iotlb_batch():  # the whole table but the buffers
            ops.dma_unmap(region.guest_addr, region.size)
            ops.dma_map(region.guest_addr, data - region.guest_addr, region.host_addr)
        disk.timeout = 1.0
        with pytest.raises((BlkError, TimeoutError)):
            disk.read(0, 1)
        ops.dma_map(data, size, region.host_addr + data - region.guest_addr)
        ops.set_status(0)
        disk.timeout = 20.0
        again = Blk(ops, depth=1)
        assert again.read(0, 1) == b"\x5a" * 512
        again.close()
        disk.queues.clear()


def test_suspend_and_resume(blk_node: str, no_leaks: None) -> None:
    with VhostVdpa(blk_node) as ops, Blk(ops) as disk:
        assert ops.backend_features & BackendF.SUSPEND
        disk.write(0, b"\x11" * 512)
        assert ops.get_vring_base(0) == 1
        ops.suspend()
        assert ops.get_vring_base(0) == 1
        disk.submit_read(0, 1, "later")
        assert disk.poll(0.5) == []
        assert ops.backend_features & BackendF.RESUME
        ops.resume()
        (done,) = disk.poll(20)
        assert done.token == "later"
        assert done.data == b"\x11" * 512
        assert ops.get_vring_base(0) == 2


def test_groups_and_address_spaces(net_node: str, no_leaks: None) -> None:
    with VhostVdpa(net_node) as nic:
        assert nic.get_device_id() is DeviceId.NET
        assert nic.get_queue_num() == 3
        assert nic.get_group_num() == 2
        assert nic.get_as_num() == 2
        assert [nic.get_vring_group(ring) for ring in range(3)] == [0, 0, 1]
        nic.set_group_asid(1, 1)
        with pytest.raises(IoctlError, match="group 1, address space 0x2"):
            nic.set_group_asid(1, 2)
        with pytest.raises(IoctlError, match="VHOST_VDPA_GET_VRING_GROUP"):
            nic.get_vring_group(7)
        # The same address may be another page in another space.
        pages = [Region.allocate(PAGE, guest_addr=PAGE) for _ in range(2)]
        for asid, page in enumerate(pages):
            nic.set_mem_table(GuestMemory([page]), asid=asid)
        for asid in range(2):
            nic.set_mem_table(GuestMemory(), asid=asid)
        with pytest.raises(IoctlError, match="address space 2"):
            nic.set_mem_table(GuestMemory([pages[0]]), asid=2)


def test_nic(net_node: str, no_leaks: None) -> None:
    """It is a loop: what is sent comes back, if it is for this address."""
    with VhostVdpa(net_node) as ops, BareNic(ops, without=0) as nic:
        assert ops.get_config(0, 6).hex(":") == "52:54:00:12:34:56"
        for number in range(40):
            nic.post(nic.data_addr + (32 + number % 8) * PAGE)
            sent = ops.get_config(0, 6) + frame(number)[6:]
            nic.send(nic.data_addr, sent)
            got = nic.received()
            assert got is not None
            assert got[1] == sent
            assert nic.queues[TX].wait(10)
            assert nic.queues[TX].get_used() is not None
        assert nic.queues[RX].in_flight == 0


def test_configuration_changes(net_node: str, no_leaks: None) -> None:
    changes = []
    with VhostVdpa(net_node) as nic:
        nic.on_config_change = lambda: changes.append(nic.get_config(0, 6))
        assert nic.step()
        assert not changes
        fd = os.eventfd(0, os.EFD_CLOEXEC)
        nic.set_config_call(fd)  # the caller's own, instead
        nic.set_config_call(None)
        os.close(fd)
        assert not select.select([nic], [], [], 0)[0]


def test_gone_device() -> None:
    with vhost_vdpa("gone", "vdpasim_blk") as path, VhostVdpa(path) as disk:
        assert disk.get_queue_num() == 1
    with pytest.raises(IoctlError, match="modprobe vhost_vdpa"):
        VhostVdpa(path)
    assert "gone" not in vdpa("dev", "show")
