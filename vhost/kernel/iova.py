# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What the kernel has mapped for a VDUSE device: ranges of IOVAs, each in some file.

The kernel's own driver has its rings and its bounce buffer in a file that only the kernel knows; one behind
vhost-vdpa has what its process mapped. Knows the ioctl that tells, and regions; no rings.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from vhost.errors import InvalidGuestMemory, IoctlError
from vhost.kernel import ioctls as k
from vhost.kernel.iotlb import Access
from vhost.memory import MAX_REGIONS, GuestMemory, Region

LAST = (1 << 64) - 1


class _Range(NamedTuple):
    start: int
    last: int
    offset: int
    access: int


class IovaTable:
    """What is mapped, as last seen."""

    def __init__(self) -> None:
        self._ranges: list[_Range] | None = None
        self._fd = -1

    def forget(self) -> None:
        """The next look finds something new, whatever it is: a range may be another file by now."""
        self._ranges = None

    def look(self, fd: int) -> bool:
        """Ask the kernel. Is it something else than last time?"""
        ranges = []
        for file, found in _each(fd):
            os.close(file)
            ranges.append(found)
        changed = ranges != self._ranges
        self._ranges = ranges
        self._fd = fd
        return changed

    def map(self, complain: Callable[[str, object], None]) -> GuestMemory:
        """All of it. What cannot be mapped is left out, and breaks the ring that needs it."""
        regions = []
        for file, found in _each(self._fd):
            try:
                region = Region.from_iotlb(
                    file,
                    found.last - found.start + 1,
                    iova=found.start,
                    offset=found.offset,
                    writable=bool(found.access & Access.WO),
                )
            except InvalidGuestMemory as error:
                complain(f"IOVA {found.start:#x} to {found.last:#x} left out", error)
                continue
            finally:
                os.close(file)
            regions.append(region)
        return GuestMemory(regions)


def _each(fd: int) -> Iterator[tuple[int, _Range]]:
    """Each mapping with a descriptor of its file, which is the caller's to close."""
    start = count = 0
    while start <= LAST:
        try:
            file, offset, first, last, access = k.VDUSE_IOTLB_GET_FD(fd, start, LAST)
        except IoctlError as error:
            if error.errno == errno.EINVAL:
                return
            raise
        if count == MAX_REGIONS:
            os.close(file)
            raise InvalidGuestMemory(f"more than {MAX_REGIONS} mappings, which is as many as there can be")
        count += 1
        yield file, _Range(first, last, offset, access)
        start = last + 1
