# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""vhost-scsi on a ramdisk target of the kernel's target core: endpoint, INQUIRY, READ and WRITE, workers."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vhost.drivers.base import Driver
from vhost.errors import IoctlError
from vhost.kernel import VhostScsi
from vhost.kernel import ioctls as k

pytestmark = pytest.mark.kernel("scsi")

TARGET = Path("/sys/kernel/config/target")
WWPN = "naa.6001405aabbccdd0"
SIZE = 4 << 20
BLOCK = 512
TPGT = 1
# struct virtio_scsi_cmd_req and _resp (VIRTIO 1.2, 5.6.6.1) with the sizes that a new device has.
REQUEST = struct.Struct("<8sQBBB32s")
RESPONSE = struct.Struct("<IIHBB96s")
GOOD, CHECK_CONDITION = 0, 2
REQUESTS = 2  # the first ring for requests


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    """A ramdisk as LUN 0 of a vhost target."""
    disk = TARGET / "core" / "rd_mcp_0" / "pyvhost"
    disk.mkdir(parents=True)
    (disk / "control").write_text(f"rd_pages={SIZE // 4096}")
    (disk / "enable").write_text("1")
    group = TARGET / "vhost" / WWPN / f"tpgt_{TPGT}"
    group.mkdir(parents=True)
    (group / "nexus").write_text(WWPN.replace("d0", "d1"))
    lun = group / "lun" / "lun_0"
    lun.mkdir()
    (lun / "pyvhost").symlink_to(disk)
    yield WWPN
    (lun / "pyvhost").unlink()
    lun.rmdir()
    (group / "nexus").write_text("NULL")
    group.rmdir()
    group.parent.rmdir()
    disk.rmdir()


class Disk(Driver):
    """Enough of a SCSI driver to send one command at a time."""

    def __init__(self, ops: VhostScsi) -> None:
        super().__init__(ops, num_queues=3, queue_size=64, data_size=1 << 16, indirect_max=0)
        self.view = self.memory.view(self.data_addr, 1 << 16)

    def command(self, cdb: bytes, *, room: int = 0, data: bytes = b"") -> tuple[int, bytes, bytes]:
        """Status, sense and what was read."""
        at = self.data_addr
        REQUEST.pack_into(self.view, 0, bytes([1, TPGT, 0x40, 0, 0, 0, 0, 0]), 1, 0, 0, 0, cdb)
        self.view[512 : 512 + RESPONSE.size] = b"\xff" * RESPONSE.size
        self.view[4096 : 4096 + len(data)] = data
        readable = [(at, REQUEST.size), *([(at + 4096, len(data))] if data else [])]
        writable = [(at + 512, RESPONSE.size), *([(at + 4096, room)] if room else [])]
        queue = self.queues[REQUESTS]
        queue.add(readable, writable, None)
        queue.kick()
        assert queue.wait(20), "no answer"
        assert len(queue.get_used_batch()) == 1
        sense_len, _, _, status, response, sense = RESPONSE.unpack_from(self.view, 512)
        assert response == 0
        return status, sense[:sense_len], bytes(self.view[4096 : 4096 + room])


@contextmanager
def running(target: str) -> Iterator[tuple[VhostScsi, Disk]]:
    with VhostScsi(target, tpgt=TPGT) as scsi, Disk(scsi) as disk:
        status, sense, _ = disk.command(bytes([0]))  # TEST UNIT READY: the first one tells of a new unit
        assert status == CHECK_CONDITION or (status, sense) == (GOOD, b"")
        assert disk.command(bytes([0]))[0] == GOOD
        yield scsi, disk


def test_inquiry_capacity_read_and_write(target: str) -> None:
    with running(target) as (scsi, disk):
        assert scsi.get_abi_version() == 1
        status, _, found = disk.command(bytes([0x12, 0, 0, 0, 36, 0]), room=36)
        assert status == GOOD
        assert found[8:16] == b"LIO-ORG "
        assert found[16:32].rstrip() == b"RAMDISK-MCP"
        status, _, found = disk.command(bytes([0x25]), room=8)  # READ CAPACITY(10)
        assert status == GOOD
        last, size = struct.unpack(">II", found)
        assert size == BLOCK
        assert (last + 1) * BLOCK == SIZE
        data = os.urandom(8 * BLOCK)
        write = struct.pack(">BBIBHB", 0x2A, 0, 100, 0, 8, 0)
        read = struct.pack(">BBIBHB", 0x28, 0, 100, 0, 8, 0)
        assert disk.command(write, data=data)[0] == GOOD
        assert disk.command(read, room=len(data))[::2] == (GOOD, data)
        beyond = struct.pack(">BBIBHB", 0x28, 0, last + 1, 0, 1, 0)
        status, sense, _ = disk.command(beyond, room=BLOCK)
        assert status == CHECK_CONDITION
        assert sense[2] & 0xF == 5  # ILLEGAL REQUEST


def test_endpoint_is_set_and_cleared(target: str) -> None:
    with VhostScsi(tpgt=TPGT) as scsi, VhostScsi(target, tpgt=TPGT) as second:
        with pytest.raises(IoctlError) as failed:
            scsi.set_endpoint(target, TPGT)
        assert failed.value.errno == errno.EFAULT
        assert "VHOST_SCSI_SET_ENDPOINT" in str(failed.value)
        assert target in str(failed.value)
        assert "the rings are not set up" in str(failed.value)
        with Disk(scsi), Disk(second):
            with pytest.raises(IoctlError) as failed:
                scsi.set_endpoint(target, TPGT)
            assert failed.value.errno == errno.ENODEV
            assert "no such target that is free" in str(failed.value)
            second.clear_endpoint(target, TPGT)
            scsi.set_endpoint(target, TPGT)
            with pytest.raises(IoctlError, match="has the target already"):
                scsi.set_endpoint(target, TPGT)
            with pytest.raises(IoctlError) as failed:
                scsi.clear_endpoint("naa.6001405000000000", TPGT)
            assert failed.value.errno == errno.EINVAL
            scsi.clear_endpoint(target, TPGT)
        with pytest.raises(ValueError, match="limit 223"):
            scsi.set_endpoint("x" * 224)
    with running(target) as (_, disk):  # nothing was left behind
        assert disk.command(bytes([0x25]), room=8)[0] == GOOD


def test_events_missed() -> None:
    with VhostScsi() as scsi:
        assert not scsi.get_events_missed()
        scsi.set_events_missed(True)
        assert scsi.get_events_missed()


def test_workers(target: str, kernel_release: str) -> None:
    with VhostScsi(target, tpgt=TPGT) as scsi:
        if kernel_release.startswith("6.1."):
            with pytest.raises(IoctlError, match="no workers of its own") as failed:
                scsi.new_worker()
            assert failed.value.ioctl == "VHOST_NEW_WORKER"
            return
        worker = scsi.new_worker()
        default = scsi.get_vring_worker(REQUESTS)
        assert worker != default
        scsi.attach_vring_worker(REQUESTS, worker)
        assert scsi.get_vring_worker(REQUESTS) == worker
        with pytest.raises(IoctlError, match="a ring is attached to it"):
            scsi.free_worker(worker)
        with Disk(scsi) as disk:
            disk.command(bytes([0]))
            assert disk.command(bytes([0x25]), room=8)[0] == GOOD
        scsi.attach_vring_worker(REQUESTS, default)
        scsi.free_worker(worker)
        with pytest.raises(IoctlError) as failed:
            scsi.free_worker(worker)
        assert failed.value.ioctl == k.FREE_WORKER.name
