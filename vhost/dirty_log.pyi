# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The dirty log of a migration: a bit for each page of guest memory, which devices set."""

from typing import Final

from vhost.memory import GuestMemory, Region

__all__ = ["PAGE", "DirtyLog"]

PAGE: Final = 4096

class DirtyLog:
    """A log of guest memory below the guest address ``limit``: of our own, in a memfd (``region.fd``), or
    somebody else's, of whom nothing is believed but that it is there."""

    def __init__(self, limit: int) -> None: ...
    @classmethod
    def for_memory(cls, memory: GuestMemory) -> DirtyLog: ...
    @classmethod
    def from_fd(cls, fd: int, size: int, *, offset: int = 0) -> DirtyLog:
        """The log that somebody has in a file: ``size`` bytes at any ``offset``. The caller keeps ``fd``, and
        may close it at once. Raises InvalidLogAddress, or IncorrectFds if it is no file."""

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

    @property
    def broken(self) -> bool:
        """Its file shrank under us: what was marked since then is lost."""

    def covers(self, addr: int, size: int) -> bool: ...
    def must_cover(self, memory: GuestMemory) -> None:
        """InvalidLogAddress if some of the memory has no bit."""

    def mark(self, addr: int, size: int) -> None:
        """Mark the pages of ``size`` bytes that were written at a guest address. From any thread.
        InvalidLogAddress, and nothing is marked, if the log does not cover all of them."""

    def take(self) -> list[int]:
        """Guest addresses of the pages that were written since the last time, in order. Each is told once:
        a device that writes to it again marks it again. A log of ours, or one that lies on a multiple of
        8 bytes and has as many."""
