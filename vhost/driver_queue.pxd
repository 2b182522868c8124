# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vhost._core cimport driver_config, driver_queue, virtqueue_buf, virtqueue_request
from vhost.memory cimport GuestMemory


cdef struct buf_list:
    virtqueue_buf *first
    size_t room


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
    cdef buf_list bufs  # for the next request, or requests, to be added

    cdef int place_tables(self, driver_config *cfg, indirect_addr) except -1
    cdef void take_list(self, buf_list *bufs) noexcept
    cdef void keep_list(self, buf_list *bufs) noexcept
    cdef Py_ssize_t parse(self, buf_list *bufs, size_t at, buffers) except -1
    cdef int add_all(self, virtqueue_request *reqs, Py_ssize_t count, virtqueue_buf *first, list tokens) except? -1
    cdef int refuse(self, int rc, request) except -1
    cdef object take(self, uint64_t place, uint32_t written)
    cdef int wait_for_call(self, bint forever, double seconds) except -1
    cdef int check_broken(self) except -1
