# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The buffer of in-flight tracking, as a device has it (vhost-user, "Inflight I/O tracking")."""

from typing import Final

from vhost.memory import Region

__all__ = ["QUEUE_SIZE_MAX", "InflightRegion", "inflight_size"]

QUEUE_SIZE_MAX: Final = 32768

def inflight_size(num_queues: int, queue_size: int, *, packed: bool) -> int:
    """Bytes of the buffer. InvalidQueue if it cannot be for so many."""

class InflightRegion:
    """The buffer for ``num_queues`` queues of up to ``queue_size`` descriptors: of our own, in a sealed memfd
    (``region.fd``), or somebody else's, of whom nothing is believed but that it is there.

    A device that dies leaves in it what it had popped and not used; the next one pops that first."""

    @classmethod
    def allocate(cls, num_queues: int, queue_size: int, *, packed: bool = True) -> InflightRegion:
        """``packed``: with room for either format, which is what packed rings need."""

    @classmethod
    def from_fd(
        cls, fd: int, size: int, *, num_queues: int, queue_size: int, offset: int = 0
    ) -> InflightRegion:
        """What is in a file, ``size`` bytes at ``offset``. The caller keeps ``fd``, and may close it at once.
        Raises InvalidQueue, InvalidGuestMemory if the file is smaller, IncorrectFds if it is none."""

    @property
    def region(self) -> Region: ...
    @property
    def num_queues(self) -> int: ...
    @property
    def queue_size(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def broken(self) -> bool:
        """Its file shrank under us: what was noted since then is lost."""
