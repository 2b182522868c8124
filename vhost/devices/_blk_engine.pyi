# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Block queues served by threads that never take the GIL."""

from typing import Final, final

from vhost.device_queue import DeviceQueue
from vhost.devices._engine import Engine

__all__ = ["AIO", "MAX_RANGES", "BlkEngine", "Disk", "probe_io_uring"]

MAX_RANGES: Final[int]
AIO: Final[dict[str, int]]
"""What may do that which has to be waited for: "sync" the worker itself, "threads" or "io_uring"."""

def probe_io_uring() -> int:
    """0: this process may use io_uring; otherwise an errno (ENOTSUP: built without liburing)."""

@final
class Disk:
    """What requests are run on: ``fd`` (-1: null) with ``capacity`` sectors of 512 bytes. The descriptor
    stays the caller's, and open as long as a queue is attached. ``pace``: "memory" if nobody ever waits for
    it, "cached" if the kernel can say (RWF_NOWAIT), otherwise "waits"; None: as the file system is.
    With "memory" what is in the file is copied without a system call, if this program survives that
    others truncate it (``vhost.memory.install_sigbus_handler``)."""

    def __init__(
        self,
        *,
        fd: int,
        capacity: int,
        read_only: bool,
        block_device: bool,
        pace: str | None = None,
        max_sectors: int,
        max_zeroes: int,
        max_ranges: int,
        serial: bytes,
    ) -> None: ...
    @property
    def capacity(self) -> int: ...
    @capacity.setter
    def capacity(self, sectors: int) -> None: ...
    def discard(self, offset: int, length: int) -> None:
        """Make a hole; bytes. Like ``write_zeroes``, it does not look whether they are on the disk."""

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Zero bytes; with ``unmap`` by a hole, where that does it."""

@final
class BlkEngine(Engine):
    def attach(
        self, queue: DeviceQueue, disk: Disk, worker: int, *, writethrough: bool, aio: str
    ) -> None:
        """Hand the queue, with the descriptors that it has now, to a worker. Until ``detach`` nothing
        else may use it. OSError: it cannot be had."""
