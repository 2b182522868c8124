# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""userfaultfd, for post-copy. Knows mapped regions and the kernel's interface, no messages."""

from typing import final

from typing_extensions import Buffer

from vhost.memory import Region

__all__ = ["PageFaults", "place", "wake"]

@final
class PageFaults:
    """A userfaultfd: whoever touches a page of a registered region that its file has not got yet waits in
    the kernel until somebody who has this descriptor, too, wakes it."""

    def __init__(self) -> None:
        """OSError if the kernel has none, or not for us (EPERM)."""

    def fileno(self) -> int:
        """The descriptor; it does not block."""

    def guard(self, peer: int) -> None:
        """Abandon the memory, from a thread without the GIL, when the other end of this socket is closed.
        At most once. The caller keeps the descriptor, and may close it."""

    def register(self, region: Region) -> None:
        """Pages of this region come later. The region is kept until ``end`` or ``close``.
        InvalidGuestMemory if its file is of a kind that cannot do this."""

    def end(self) -> None:
        """Registered regions become ordinary memory, where what is not there is zero. Who waits goes on."""

    def abandon(self) -> None:
        """What is not there will never come: touching a registered region breaks it (``Region.broken``) and
        is EFAULT in system calls. Who waits goes on with that. From any thread."""

    def close(self) -> None:
        """``end``, and let the descriptor and the guard go. Idempotent."""

def place(fd: int, addr: int, data: Buffer) -> bool:
    """Put whole pages where nothing is yet, at an address of ours that is registered with this userfaultfd.
    False: there was something, which stays."""

def wake(fd: int, addr: int, size: int) -> None:
    """Wake who waits for pages at these addresses of the process that opened the userfaultfd."""
