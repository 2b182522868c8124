# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint32_t

from vhost._core cimport iovec, vhost_chain, virtqueue_fault
from vhost.memory cimport GuestMemory


cdef extern from "Python.h":
    int64_t PyLong_AsLongLongAndOverflow(object, int *) except? -1


cdef inline int64_t length_of(number) except? -1:
    cdef int beyond = 0
    cdef int64_t n = PyLong_AsLongLongAndOverflow(number, &beyond)
    return -2 if beyond else n  # whatever it is, no chain has that many bytes


cdef class Chain


cdef class Origin:
    # What chains are popped from, and given back to: a queue. `refuse` breaks it and raises.
    cdef int take_back(self, Chain chain, uint32_t written) except -1
    cdef int refuse(self, Chain chain, virtqueue_fault fault, uint32_t value, uint32_t limit) except -1


cdef class Buffer:
    cdef char *data
    cdef Py_ssize_t size
    cdef bint is_readonly
    cdef GuestMemory memory  # keeps `data` mapped


cdef struct cursor:
    uint32_t piece  # of the iovecs of its kind
    size_t offset   # in that piece


cdef class Chain:
    cdef vhost_chain c
    cdef GuestMemory memory  # keeps what c.iov points at mapped
    cdef Origin queue        # that popped it and has not got it back; else None
    cdef int found_busy      # see DeviceQueue's pool
    cdef readonly uint32_t written
    cdef uint32_t touched    # end of what may have been written otherwise, for the dirty log
    cdef uint32_t consumed   # bytes behind `reader`
    cdef cursor reader
    cdef cursor writer
    cdef tuple readable_buffers  # as last asked for, perhaps of an earlier chain, or None
    cdef tuple writable_buffers
    cdef bint readable_made      # readable_buffers are of this chain
    cdef bint writable_made

    cdef int must_be_out(self) except -1
    cdef Py_ssize_t append(self, char *data, Py_ssize_t size) except -1
    cdef int put(self, Py_ssize_t offset, char *data, Py_ssize_t size) except -1
    cdef int check(self, bint writable, Py_ssize_t offset, Py_ssize_t size) except -1
    cdef bint renew(self, PyObject *old, iovec *iov, Py_ssize_t n) noexcept
    cdef tuple buffers(self, bint writable, Py_ssize_t offset, Py_ssize_t size)


cdef inline void chain_start(Chain chain, Origin queue) noexcept:
    # A chain was just popped into chain.c, which may have held an earlier one.
    chain.queue = queue
    chain.written = chain.consumed = chain.touched = 0
    chain.reader.piece = chain.writer.piece = 0
    chain.reader.offset = chain.writer.offset = 0
    chain.found_busy = 0
    chain.readable_made = chain.writable_made = False
