# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The dirty log of a migration: a bit for each page of guest memory, which devices set."""

from typing import Final

from vhost.memory import GuestMemory, Region

__all__ = ["PAGE", "DirtyLog"]

PAGE: Final = 4096

class DirtyLog:
    """A log of guest memory below the guest address ``limit``, in a memfd (``region.fd``)."""

    def __init__(self, limit: int) -> None: ...
    @classmethod
    def for_memory(cls, memory: GuestMemory) -> DirtyLog: ...
    @property
    def limit(self) -> int:
        """The first guest address that it does not cover."""

    @property
    def region(self) -> Region: ...
    @property
    def addr(self) -> int:
        """Where it is in this process."""

    @property
    def size(self) -> int:
        """Bytes of the log itself."""

    def take(self) -> list[int]:
        """Guest addresses of the pages that were written since the last time, in order. Each is told once:
        a device that writes to it again marks it again."""
