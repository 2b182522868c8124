# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The dirty log of a migration. Knows its bits; knows neither memory tables nor who writes to it."""

from libc.stdint cimport uint64_t

from vhost.memory cimport GuestMemory, Region

from vhost.errors import InvalidLogAddress

__all__ = ["PAGE", "DirtyLog"]

cdef extern from "dirty_log.h" nogil:
    enum:
        DIRTY_LOG_PAGE
    uint64_t dirty_log_take(uint64_t *)
    int trailing_zeroes "__builtin_ctzll" (uint64_t)

PAGE = DIRTY_LOG_PAGE


cdef class DirtyLog:
    cdef readonly Region region

    def __init__(self, limit):
        if not 0 < limit < 1 << 63:
            raise InvalidLogAddress(f"dirty log of {limit:#x} bytes of guest memory, must be 1 to {(1 << 63) - 1:#x}")
        # In words of 64 pages.
        self.region = Region.allocate(-(-limit // (64 * DIRTY_LOG_PAGE)) * 8, name="vhost-log")

    @classmethod
    def for_memory(cls, GuestMemory memory not None):
        return cls(max([region.guest_addr + region.size for region in memory.regions], default=1))

    @property
    def limit(self):
        return self.region.size * 8 * DIRTY_LOG_PAGE

    @property
    def addr(self):
        return self.region.host_addr

    @property
    def size(self):
        return self.region.size

    def take(self):
        cdef uint64_t *words = <uint64_t *>self.region.host
        cdef uint64_t bits, i
        cdef list pages = []
        for i in range(self.region.size // 8):
            bits = dirty_log_take(&words[i])
            while bits:
                pages.append((i * 64 + <uint64_t>trailing_zeroes(bits)) * DIRTY_LOG_PAGE)
                bits &= bits - 1
        return pages

    def __repr__(self):
        return f"<DirtyLog of {self.limit:#x} bytes of guest memory>"
