# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The dirty log of a migration. Knows its bits; knows neither memory tables nor who writes to it."""

from libc.stdint cimport uint64_t

from vhost._core cimport DIRTY_LOG_PAGE as _PAGE, dirty_log_covers, dirty_log_limit, dirty_log_mark, dirty_log_take
from vhost.memory cimport GuestMemory, Region

from vhost.errors import InvalidGuestMemory, InvalidLogAddress

__all__ = ["PAGE", "DirtyLog"]

cdef extern from *:
    int trailing_zeroes "__builtin_ctzll" (uint64_t) nogil

PAGE = _PAGE


cdef class DirtyLog:
    def __init__(self, limit):
        if not 0 < limit < 1 << 63:
            raise InvalidLogAddress(f"dirty log of {limit:#x} bytes of guest memory, must be 1 to {(1 << 63) - 1:#x}")
        # In words of 64 pages.
        self.use(Region.allocate(-(-limit // (64 * _PAGE)) * 8, name="vhost-log"))

    @classmethod
    def for_memory(cls, GuestMemory memory not None):
        return cls(end_of(memory))

    @classmethod
    def from_fd(cls, int fd, size, *, offset=0):
        cdef DirtyLog self = cls.__new__(cls)
        if not size:
            raise InvalidLogAddress("dirty log of size 0")
        try:
            self.use(Region.from_fd(fd, size, guest_addr=0, user_addr=0, mmap_offset=offset, what="dirty log"))
        except InvalidGuestMemory as error:
            raise InvalidLogAddress(f"dirty log: {error}") from error
        return self

    cdef int use(self, Region region) except -1:
        if self.region is not None:  # queues may mark there
            raise RuntimeError("dirty log: it has its memory already")
        self.region = region
        self.c.map = region.host
        self.c.size = region.size
        return 0

    @property
    def limit(self):
        return dirty_log_limit(&self.c)

    @property
    def addr(self):
        return self.region.host_addr

    @property
    def size(self):
        return self.region.size

    @property
    def broken(self):
        return self.region.broken

    def covers(self, uint64_t addr, uint64_t size):
        return dirty_log_covers(&self.c, addr, size)

    def must_cover(self, GuestMemory memory not None):
        end = end_of(memory)
        if end > self.limit:
            raise InvalidLogAddress(
                f"dirty log of {self.limit:#x} bytes of guest memory, which ends at {end:#x}"
            )

    def mark(self, uint64_t addr, uint64_t size):
        if not dirty_log_mark(&self.c, addr, size):
            raise InvalidLogAddress(
                f"guest address {addr:#x}, size {size:#x}: beyond the dirty log, which ends at {self.limit:#x}"
            )

    def take(self):
        cdef uint64_t *words = <uint64_t *>self.c.map
        cdef uint64_t bits, i
        cdef list pages = []
        if <uint64_t>words % 8 or self.c.size % 8:
            raise InvalidLogAddress(f"dirty log at {self.addr:#x}, size {self.size:#x}: not in words of 8 bytes")
        for i in range(self.c.size // 8):
            bits = dirty_log_take(&words[i])
            while bits:
                pages.append((i * 64 + <uint64_t>trailing_zeroes(bits)) * _PAGE)
                bits &= bits - 1
        return pages

    def __repr__(self):
        return f"<DirtyLog of {self.limit:#x} bytes of guest memory>"


cdef end_of(GuestMemory memory):
    return max([region.guest_addr + region.size for region in memory.regions], default=1)
