# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The IOTLB of a device: the Python face of csrc/iotlb.c."""

cimport cython
from libc.errno cimport EFAULT
from libc.stdint cimport uint32_t, uint64_t

from vhost._core cimport (
    IOTLB_ACCESS_MASK,
    IOTLB_MAX_ENTRIES,
    iotlb_at,
    iotlb_clear,
    iotlb_destroy,
    iotlb_init,
    iotlb_invalidate,
    iotlb_miss,
    iotlb_missing,
    iotlb_set_memory,
    iotlb_update,
)
from vhost.memory cimport GuestMemory

from vhost.errors import InvalidGuestMemory

__all__ = ["MAX_ENTRIES", "Iotlb"]

MAX_ENTRIES = IOTLB_MAX_ENTRIES


@cython.final
@cython.no_gc
cdef class Iotlb:
    def __cinit__(self, GuestMemory memory not None):
        self.memory = memory
        if iotlb_init(&self.c, memory.c):
            raise MemoryError
        self.ready = True

    def __dealloc__(self):
        if self.ready:
            iotlb_destroy(&self.c)

    @cython.critical_section
    def update(self, uint64_t iova, uint64_t size, uint64_t user_addr, uint32_t access):
        cdef int rc = iotlb_update(&self.c, iova, size, user_addr, access)
        if not rc:
            return
        what = f"IOVA {iova:#x}, size {size:#x}, user address {user_addr:#x}, access {access:#x}"
        if rc == -EFAULT:
            raise InvalidGuestMemory(f"{what}: not wholly in {len(self.memory.regions)} memory regions")
        raise InvalidGuestMemory(f"{what}: must be more than 0 bytes, end within 64 bits, and access at most 3")

    @cython.critical_section
    def invalidate(self, uint64_t iova, uint64_t size):
        iotlb_invalidate(&self.c, iova, size)

    @cython.critical_section
    def clear(self):
        iotlb_clear(&self.c)

    @cython.critical_section
    def set_memory(self, GuestMemory memory not None):
        iotlb_set_memory(&self.c, memory.c)
        self.memory = memory

    @cython.critical_section
    def missing(self, uint64_t iova, uint64_t size, uint32_t access):
        cdef iotlb_miss miss = iotlb_missing(&self.c, iova, size, access)
        return (miss.iova, miss.access) if miss.access else None

    @cython.critical_section
    def allows(self, uint64_t iova):
        cdef uint64_t length = 1
        if iotlb_at(&self.c, iova, 0, &length) == NULL:
            return None
        return IOTLB_ACCESS_MASK & ~iotlb_missing(&self.c, iova, 1, IOTLB_ACCESS_MASK).access

    def __len__(self):
        return self.c.nentries

    def __repr__(self):
        return f"<Iotlb of {self.c.nentries} entries>"
