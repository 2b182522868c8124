# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a block device serves: a file or a block device of this machine, opened as it is to be served.

Knows files and what the kernel says of them; nothing of virtio, rings or requests.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from typing import NamedTuple

from vhost.errors import DeviceBusy

SECTOR = 512
CACHES = ("writeback", "writethrough")
"""As QEMU names them: with the second a write is on stable storage when it is completed."""

_BLKSSZGET, _BLKPBSZGET, _BLKIOMIN, _BLKIOOPT = 0x1268, 0x127B, 0x1278, 0x1279
_FLOCK = struct.Struct("hhqqi4x")


class Topology(NamedTuple):
    """Bytes, powers of two of these, and in such blocks the others (VIRTIO 1.2, 5.2.4)."""

    block: int
    physical_exponent: int
    min_io: int
    opt_io: int


class Image:
    """The file or block device at ``path``, open until ``close``. OSError: it is neither, or cannot be opened
    like this."""

    def __init__(self, path: str, *, read_only: bool = False, cache: str = "writeback") -> None:
        if cache not in CACHES:
            raise ValueError(f"cache {cache!r}, must be one of {', '.join(CACHES)}")
        self.path = path
        self.read_only = read_only
        self.stable = cache == "writethrough"
        """Each write is to be on stable storage when it is completed."""
        self.fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        try:
            found = os.fstat(self.fd)
            self.block_device = stat.S_ISBLK(found.st_mode)
            if not self.block_device and not stat.S_ISREG(found.st_mode):
                raise OSError(errno.ENOTBLK, f"{path} is neither a file nor a block device")
            self.topology = self._look_at_topology()
        except BaseException:
            self.close()
            raise

    def size(self) -> int:
        """Bytes, as it is now."""
        return os.lseek(self.fd, 0, os.SEEK_END)

    def _look_at_topology(self) -> Topology:
        if not self.block_device:
            return Topology(SECTOR, 3, 8, 0)  # pages of 4 KiB below sectors of 512 bytes

        def ask(request: int) -> int:
            return int(struct.unpack("I", fcntl.ioctl(self.fd, request, bytes(4)))[0])

        logical, physical = ask(_BLKSSZGET), ask(_BLKPBSZGET)
        exponent = (physical // logical).bit_length() - 1
        return Topology(logical, exponent, min(ask(_BLKIOMIN) // logical, 0xFFFF), ask(_BLKIOOPT) // logical)

    def lock(self) -> int:
        """A descriptor that holds the file against other writers, in this process and elsewhere, until it
        is closed; DeviceBusy if there are some. It is an open file of its own, for that is what such locks
        belong to. Block devices have their own way: O_EXCL holds them against mounts, too."""
        flags = (os.O_RDONLY if self.read_only else os.O_RDWR) | os.O_CLOEXEC
        if self.block_device and not self.read_only:
            flags |= os.O_EXCL
        fd = -1
        try:
            fd = os.open(self.path, flags)
            kind = fcntl.F_RDLCK if self.read_only else fcntl.F_WRLCK
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EBUSY):
                busy = f"{self.path} is in use by another session (--share allows that)"
                raise DeviceBusy(busy) from None
            raise
        return fd

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
