# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A virtio block device (VIRTIO 1.2, 5.2) on a file, a block device, or nothing.

Knows what is served and what the driver is told about it. Requests are run by the C engine
(_blk_engine), or one by one in Python (blk_python.py).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from vhost.device_queue import DeviceQueue
from vhost.devices._blk_engine import AIO, MAX_RANGES, BlkEngine, Disk, probe_io_uring
from vhost.devices.base import Attached, Device
from vhost.devices.blk_python import MAX_DISCARD_SECTORS, MAX_ZEROES_SECTORS, run_request
from vhost.devices.image import SECTOR, Image, Topology
from vhost.features import BlkF, DeviceId
from vhost.virtio_blk import ID_BYTES, BlkConfig

SEG_MAX = 126
"""Data segments of a request: what fits, with header and status, into the common ring of 128; fewer
if rings cannot be as large."""

_NULL_TOPOLOGY = Topology(SECTOR, 3, 8, 0)


class Blk(Device):
    """Serves the file or block device at ``path``, or a null device of ``null_size`` bytes, which drops
    what is written and leaves a reader's memory as it was.

    ``handler``: "c" runs requests in ``threads`` workers without the GIL (default: one a queue, up to
    the number of ``cpus``), which are this process's: a fork makes a device of its own. Devices that are
    given the same ``engine`` have its workers, instead of their own. "python" runs requests in the session's
    thread, or in as many ``threads`` as are asked for (``Device.workers``), and waits itself.
    ``cpus``: where the workers run, one after the other and from the first again; default: anywhere.
    ``aio``: who waits for what the page cache does not have: "io_uring", a pool of "threads", the worker
    itself ("sync"), or the first of these that the kernel allows ("auto").
    ``cache``: "writeback", or "writethrough": each write is on stable storage when it is completed.
    ``share``: do not claim the file; by default only one session at a time, of all processes, may
    write it, or several may read it.
    """

    device_id = DeviceId.BLOCK
    _pace: str | None = None  # see Disk

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        null_size: int | None = None,
        read_only: bool = False,
        num_queues: int = 1,
        queue_size: int = 1024,
        threads: int | None = None,
        cpus: Sequence[int] = (),
        aio: str = "auto",
        cache: str = "writeback",
        serial: str = "",
        share: bool = False,
        handler: str = "c",
        engine: BlkEngine | None = None,
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
        if handler == "python" and (cpus or aio != "auto"):
            raise ValueError("cpus and aio are for handler 'c'")
        if engine is not None and (threads is not None or cpus or handler != "c"):
            raise ValueError("threads, cpus and handler 'python' are for a device that is given no engine")
        if absent := set(cpus) - os.sched_getaffinity(0):
            raise ValueError(f"cpus {sorted(absent)}, must be among those that this process may use")
        id_bytes = serial.encode()
        if len(id_bytes) > ID_BYTES:
            raise ValueError(f"serial of {len(id_bytes)} bytes, limit {ID_BYTES}")
        self.queues = ("requestq",) * num_queues
        self.max_queue_size = queue_size
        self.path = None if path is None else os.fspath(path)
        self.read_only = read_only
        self.share = share or read_only  # sessions of this device; files are _lock's matter
        self._locks = not share
        self.serial = id_bytes
        self._files: dict[Attached, int] = {}
        self._config_lock = threading.Lock()
        self.image: Image | None = None
        self.engine: BlkEngine | None = None
        self.aio = _choose_aio(aio)
        if self.path is not None:
            self.image = Image(self.path, read_only=read_only, cache=cache)
        try:
            size = self.image.size() if self.image else null_size or 0
            self.disk = Disk(
                fd=self.fd,
                capacity=size // SECTOR,
                read_only=read_only,
                block_device=self.image is not None and self.image.block_device,
                pace=self._pace,
                max_sectors=MAX_DISCARD_SECTORS,
                max_zeroes=MAX_ZEROES_SECTORS,
                max_ranges=MAX_RANGES,
                serial=id_bytes,
            )
            workers = min(num_queues, threads or len(cpus or os.sched_getaffinity(0)))
            if engine is not None:
                self.engine = BlkEngine(0, "vhost-blk", of=engine)
                workers = engine.workers
            elif handler == "c":
                self.engine = BlkEngine(workers, "vhost-blk", cpus)
            else:
                self.workers = threads or 0
            self._workers = workers
            self._first = 0  # of these: queue 0's
        except BaseException:
            self.close()
            raise
        if self.engine is not None:
            self.notice = self.engine.notice
        self.features = int(BlkF.SEG_MAX | BlkF.BLK_SIZE | BlkF.TOPOLOGY | BlkF.FLUSH | BlkF.MQ)
        self.features |= int(BlkF.RO if read_only else BlkF.DISCARD | BlkF.WRITE_ZEROES)

    # -- what is served ----------------------------------------------------------------------------

    @property
    def fd(self) -> int:
        """Of what is served; -1: nothing is."""
        return self.image.fd if self.image else -1

    @property
    def capacity(self) -> int:
        """Sectors of 512 bytes."""
        return self.disk.capacity

    @property
    def config(self) -> bytes:
        blk_size, exponent, min_io, opt_io = self.image.topology if self.image else _NULL_TOPOLOGY
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
        if self.image:
            if self.image.block_device:
                raise ValueError("a block device is resized from outside; call refresh() then")
            os.ftruncate(self.fd, size)
            self.refresh()
        else:
            self._set_capacity(size // SECTOR)

    def refresh(self) -> None:
        """Somebody else may have resized what is served: look, and tell the drivers."""
        if self.image:
            self._set_capacity(self.image.size() // SECTOR)

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
        return not self.negotiated & BlkF.FLUSH or (self.image is not None and self.image.stable)

    def start_queue(self, queue: DeviceQueue) -> bool:
        if self.engine is None:
            return False
        worker = (self._first + queue.index) % self._workers
        self.engine.attach(queue, self.disk, worker, writethrough=self.writethrough, aio=self.aio)
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
        if self.engine is not None:
            self._first = self.engine.idlest
        if self.image is None or not self._locks:
            return
        try:
            self._files[session] = self.image.lock()
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
        if self.image is not None:
            self.image.close()


def _choose_aio(wanted: str) -> str:
    """What the engine is to use. OSError: the kernel does not allow what was asked for by name."""
    if wanted not in ("auto", *AIO):
        raise ValueError(f"aio {wanted!r}, must be one of auto, {', '.join(AIO)}")
    if wanted not in ("auto", "io_uring"):
        return wanted
    why = probe_io_uring()
    if why and wanted == "io_uring":
        raise OSError(why, f"io_uring cannot be used here: {os.strerror(why)}")
    return "threads" if why else "io_uring"
