# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
from libc.stdint cimport uint8_t, uint64_t

from vhost._core cimport LOAD_ACQUIRE, guest_memory

# The process has one handler of SIGBUS, and this module's copy of the C core has it.
cdef const int *sigbus_count() noexcept
cdef int sigbus_watch(void *base, size_t size, int *broken) noexcept
cdef void sigbus_unwatch(int handle) noexcept


cdef class Region:
    cdef readonly uint64_t guest_addr
    cdef readonly uint64_t user_addr
    cdef readonly uint64_t size
    cdef readonly uint64_t mmap_offset
    cdef readonly int fd
    cdef uint8_t *host  # of the first byte; `map` is where its page begins
    cdef void *map
    cdef size_t map_size
    cdef int sigbus_handle
    cdef int is_broken  # written by the SIGBUS handler

    cdef int map_fd(self, int fd, uint64_t size, uint64_t offset, uint64_t page, int sharing) except -1
    cdef int watch(self) except -1


cdef class GuestMemory:
    cdef readonly tuple regions
    cdef tuple by_guest  # as in `c`
    cdef guest_memory *c  # for whoever holds this object; valid as long as it lives
    cdef guest_memory table
    cdef const int *repairs   # SIGBUS repairs in the process ...
    cdef int looked_at        # ... and how many there were when our regions were last looked at
    cdef bint is_broken

    cdef bint look_broken(self) noexcept
    cdef int require(self, uint64_t addr, uint64_t size) except -1


cdef inline bint memory_broken(GuestMemory memory) noexcept:
    # Asked once a batch: one number instead of a flag for each region. Pairs with the handler's release.
    if LOAD_ACQUIRE(memory.repairs[0]) == memory.looked_at:
        return memory.is_broken
    return memory.look_broken()
