# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A shared memory region of a device (VIRTIO 2.10), as the front-end has it."""

from typing import Final, final

from typing_extensions import Buffer

__all__ = ["MAX_MAPPINGS", "ShmemRegion", "unit_of"]

MAX_MAPPINGS: Final = 4096
"""Of one region."""

def unit_of(fd: int) -> int:
    """In multiples of how many bytes the file is mapped; the kernel rounds up what is not."""

@final
class ShmemRegion:
    """Reserved addresses, where nothing is until a file is mapped; let go by ``close`` or with the last
    reference. All errors are InvalidGuestMemory or IncorrectFds, and then nothing has changed."""

    def __init__(self, shmid: int, size: int) -> None:
        """``size``: bytes, a multiple of the page size."""

    @property
    def shmid(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def host_addr(self) -> int:
        """Where it is in this process: for a VMM that shows it to its guest. Who reads there without a
        mapping, or past the end of a file that was shortened, is killed; ``read`` raises instead."""

    @property
    def mappings(self) -> tuple[tuple[int, int, bool], ...]:
        """Offset, size and whether it may be written, of each, in the order of offsets."""

    def map(self, offset: int, length: int, fd: int, fd_offset: int = 0, *, writable: bool = False) -> None:
        """Map a part of a file where nothing is mapped yet. All but ``fd`` in multiples of the page size;
        the descriptor stays the caller's and may be closed at once."""

    def unmap(self, offset: int, length: int) -> None:
        """Take away one mapping, all of it."""

    def unmap_all(self) -> None: ...
    def read(self, offset: int, length: int) -> bytes: ...
    def write(self, offset: int, data: Buffer) -> None: ...
    def close(self) -> None:
        """Idempotent."""
