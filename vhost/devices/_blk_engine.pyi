# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Block queues served by threads that never take the GIL."""

from typing import Final, final

from vhost.device_queue import DeviceQueue
from vhost.devices._engine import Engine

__all__ = ["MAX_RANGES", "BlkEngine", "Disk"]

MAX_RANGES: Final[int]

@final
class Disk:
    """What requests are run on: ``fd`` (-1: null) with ``capacity`` sectors of 512 bytes. The descriptor
    stays the caller's, and open as long as a queue is attached."""

    def __init__(
        self,
        *,
        fd: int,
        capacity: int,
        read_only: bool,
        block_device: bool,
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
    def attach(self, queue: DeviceQueue, disk: Disk, worker: int, writethrough: bool) -> None:
        """Hand the queue, with the descriptors that it has now, to a worker. Until ``detach`` nothing
        else may use it."""
