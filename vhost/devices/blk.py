# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A virtio block device (VIRTIO 1.2, 5.2) on a file, a block device, or nothing.

Knows what is served and what the driver is told about it. Requests are run by the C engine
(_blk_engine), or one by one in Python (blk_python.py).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import threading

from vhost.device_queue import DeviceQueue
from vhost.devices._blk_engine import MAX_RANGES, BlkEngine, Disk
from vhost.devices.base import Attached, Device
from vhost.devices.blk_python import MAX_DISCARD_SECTORS, MAX_ZEROES_SECTORS, run_request
from vhost.errors import DeviceBusy
from vhost.features import BlkF, DeviceId
from vhost.virtio_blk import ID_BYTES, SECTOR, BlkConfig

SEG_MAX = 126
"""Data segments of a request: what fits, with header and status, into the common ring of 128; fewer
if rings cannot be as large."""

_BLKSSZGET, _BLKPBSZGET, _BLKIOMIN, _BLKIOOPT = 0x1268, 0x127B, 0x1278, 0x1279
_FLOCK = struct.Struct("hhqqi4x")


class Blk(Device):
    """Serves the file or block device at ``path``, or a null device of ``null_size`` bytes, which drops
    what is written and leaves a reader's memory as it was.

    ``handler``: "c" runs requests in ``threads`` threads without the GIL (default: one a queue, up to
    the number of CPUs), which are this process's: a fork makes a device of its own; "python" runs them in
    the session's thread.
    ``share``: do not claim the file; by default only one session at a time, of all processes, may
    write it, or several may read it.
    """

    device_id = DeviceId.BLOCK

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        null_size: int | None = None,
        read_only: bool = False,
        num_queues: int = 1,
        queue_size: int = 1024,
        threads: int | None = None,
        serial: str = "",
        share: bool = False,
        handler: str = "c",
    ) -> None:
        if (path is None) == (null_size is None):
            raise ValueError("one of path and null_size is needed")
        if not 1 <= num_queues <= 256:
            raise ValueError(f"num_queues {num_queues}, must be 1 to 256")
        if not 1 <= queue_size <= 1 << 15:
            raise ValueError(f"queue_size {queue_size}, must be 1 to {1 << 15}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads {threads}, must be at least 1")
        if handler not in ("c", "python"):
            raise ValueError(f"handler {handler!r}, must be 'c' or 'python'")
        id_bytes = serial.encode()
        if len(id_bytes) > ID_BYTES:
            raise ValueError(f"serial of {len(id_bytes)} bytes, limit {ID_BYTES}")
        self.queues = ("requestq",) * num_queues
        self.max_queue_size = queue_size
        self.path = None if path is None else os.fspath(path)
        self.read_only = read_only
        self.share = share or read_only  # sessions of this device; files are _lock's matter
        self._locks = path is not None and not share
        self.serial = id_bytes
        self._handler = handler
        self._files: dict[Attached, int] = {}
        self._config_lock = threading.Lock()
        self.fd = -1
        self.engine: BlkEngine | None = None
        self._block_device = False
        if self.path is not None:
            self.fd = os.open(self.path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        try:
            size = null_size if null_size is not None else self._measure()
            self.disk = Disk(
                fd=self.fd,
                capacity=size // SECTOR,
                read_only=read_only,
                block_device=self._block_device,
                max_sectors=MAX_DISCARD_SECTORS,
                max_zeroes=MAX_ZEROES_SECTORS,
                max_ranges=MAX_RANGES,
                serial=id_bytes,
            )
            self._topology = self._look_at_topology()
            workers = min(num_queues, threads or len(os.sched_getaffinity(0)))
            if handler == "c":
                self.engine = BlkEngine(workers, "vhost-blk")
            self._workers = workers
        except BaseException:
            self.close()
            raise
        if self.engine is not None:
            self.notice = self.engine.notice
        self.features = int(BlkF.SEG_MAX | BlkF.BLK_SIZE | BlkF.TOPOLOGY | BlkF.FLUSH | BlkF.MQ)
        self.features |= int(BlkF.RO if read_only else BlkF.DISCARD | BlkF.WRITE_ZEROES)

    # -- what is served ----------------------------------------------------------------------------

    def _measure(self) -> int:
        """Bytes, of a file or a block device; anything else is refused."""
        found = os.fstat(self.fd)
        self._block_device = stat.S_ISBLK(found.st_mode)
        if not self._block_device and not stat.S_ISREG(found.st_mode):
            raise OSError(errno.ENOTBLK, f"{self.path} is neither a file nor a block device")
        return os.lseek(self.fd, 0, os.SEEK_END)

    def _look_at_topology(self) -> tuple[int, int, int, int]:
        """blk_size, physical_block_exp, min_io_size and opt_io_size in logical blocks (5.2.4)."""
        if not self._block_device:
            return SECTOR, 3, 8, 0  # pages of 4 KiB below sectors of 512 bytes

        def ask(request: int) -> int:
            return int(struct.unpack("I", fcntl.ioctl(self.fd, request, bytes(4)))[0])

        logical, physical = ask(_BLKSSZGET), ask(_BLKPBSZGET)
        exponent = (physical // logical).bit_length() - 1
        return logical, exponent, min(ask(_BLKIOMIN) // logical, 0xFFFF), ask(_BLKIOOPT) // logical

    @property
    def capacity(self) -> int:
        """Sectors of 512 bytes."""
        return self.disk.capacity

    @property
    def config(self) -> bytes:
        blk_size, exponent, min_io, opt_io = self._topology
        ranges = 0 if self.read_only else MAX_RANGES
        return BlkConfig(
            capacity=self.capacity,
            seg_max=max(1, min(SEG_MAX, self.max_queue_size - 2)),
            blk_size=blk_size,
            physical_block_exp=exponent,
            min_io_size=min_io,
            opt_io_size=opt_io,
            writeback=1,
            num_queues=self.num_queues,
            max_discard_sectors=0 if self.read_only else MAX_DISCARD_SECTORS,
            max_discard_seg=ranges,
            discard_sector_alignment=blk_size // SECTOR,
            max_write_zeroes_sectors=0 if self.read_only else MAX_ZEROES_SECTORS,
            max_write_zeroes_seg=ranges,
            write_zeroes_may_unmap=int(not self.read_only),
        ).pack()

    def resize(self, size: int) -> None:
        """Give a file, or the null device, another size in bytes, and tell the drivers."""
        if self.fd >= 0:
            if self._block_device:
                raise ValueError("a block device is resized from outside; call refresh() then")
            os.ftruncate(self.fd, size)
            self.refresh()
        else:
            self._set_capacity(size // SECTOR)

    def refresh(self) -> None:
        """Somebody else may have resized what is served: look, and tell the drivers."""
        if self.fd >= 0:
            self._set_capacity(self._measure() // SECTOR)

    def _set_capacity(self, sectors: int) -> None:
        with self._config_lock:
            if sectors == self.disk.capacity:
                return
            self.disk.capacity = sectors
        self.config_changed()

    # -- requests ----------------------------------------------------------------------------------

    def requestq(self, queue: DeviceQueue) -> None:
        """Python's way; the C engine does not come here."""
        for chain in queue:
            chain.finish(*run_request(self, chain))

    @property
    def writethrough(self) -> bool:
        """A driver that cannot flush has to find every completed write on stable storage (5.2.6.2)."""
        return not self.negotiated & BlkF.FLUSH

    def start_queue(self, queue: DeviceQueue) -> bool:
        if self.engine is None:
            return False
        self.engine.attach(queue, self.disk, queue.index % self._workers, self.writethrough)
        return True

    def stop_queue(self, queue: DeviceQueue) -> None:
        if self.engine is not None:
            self.engine.detach(queue)

    def hold_queue(self, queue: DeviceQueue) -> bool:
        if self.engine is None:
            return False
        self.engine.hold(queue)
        return True

    def release_queue(self, queue: DeviceQueue, look: bool) -> None:
        if self.engine is not None:
            self.engine.release(queue, look)

    # -- whose it is -------------------------------------------------------------------------------

    def claim(self, session: Attached) -> None:
        super().claim(session)
        if not self._locks:
            return
        assert self.path is not None
        try:
            self._files[session] = _lock(self.path, self.read_only, self._block_device)
        except BaseException:
            super().release(session)
            raise

    def release(self, session: Attached) -> None:
        fd = self._files.pop(session, None)
        if fd is not None:
            os.close(fd)
        super().release(session)

    def close(self) -> None:
        """Close the file, and let the engine's threads and descriptors go. No session may be running."""
        self.engine = None
        self.notice = -1
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _lock(path: str, read_only: bool, block_device: bool) -> int:
    """A descriptor that holds the file against other writers, in this process and elsewhere, until it
    is closed. It is an open file of its own, for that is what such locks belong to. Block devices have
    their own way: O_EXCL holds them against mounts, too."""
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC
    if block_device and not read_only:
        flags |= os.O_EXCL
    fd = -1
    try:
        fd = os.open(path, flags)
        kind = fcntl.F_RDLCK if read_only else fcntl.F_WRLCK
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EBUSY):
            raise DeviceBusy(f"{path} is in use by another session (--share allows that)") from None
        raise
    return fd
