# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vhost._core cimport driver_config, driver_queue, virtqueue_buf
from vhost.memory cimport GuestMemory


cdef class DriverQueue:
    cdef driver_queue dq
    cdef readonly GuestMemory memory
    cdef readonly str name
    cdef readonly uint32_t index
    cdef public int kick_fd
    cdef public int call_fd
    cdef bint ready
    # The C core's token is a place in this list; the free places are stacked up.
    cdef list tokens
    cdef uint16_t *free_places
    cdef uint32_t nfree
    cdef virtqueue_buf *bufs  # of the request, or requests, being added
    cdef size_t bufs_cap

    cdef int place_tables(self, driver_config *cfg, indirect_addr) except -1
    cdef Py_ssize_t parse(self, size_t at, buffers) except -1
    cdef int refuse(self, int rc, request) except -1
    cdef object take(self, uint64_t place, uint32_t written)
    cdef int wait_for_call(self, bint forever, double seconds) except -1
    cdef int check_broken(self) except -1
