# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memset

from vhost._core cimport iovec, vhost_chain, virtqueue_fault
from vhost.memory cimport GuestMemory


cdef extern from *:
    """
    /* Most lengths are small integers; -1: not one of these. */
    static inline int64_t plain_length(PyObject *number)
    {
    #if PY_VERSION_HEX >= 0x030c0000
            if (likely(PyLong_CheckExact(number) && PyUnstable_Long_IsCompact((PyLongObject *)number)))
                    return PyUnstable_Long_CompactValue((PyLongObject *)number);
    #else
            if (likely(PyLong_CheckExact(number) && (size_t)Py_SIZE(number) <= 1))
                    return Py_SIZE(number) ? ((PyLongObject *)number)->ob_digit[0] : 0;
    #endif
            return -1;
    }

    /* Any integer; -2 for what does not fit 64 bits. */
    static inline int64_t length_of(PyObject *number)
    {
            int64_t n = plain_length(number);
            int beyond = 0;

            if (likely(n >= 0))
                    return n;
            n = PyLong_AsLongLongAndOverflow(number, &beyond);
            return beyond ? -2 : n;
    }
    """
    int64_t plain_length(PyObject *) noexcept
    int64_t length_of(object) except? -1


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
    uint32_t piece   # of the iovecs of its kind
    uint32_t offset  # in that piece


cdef struct chain_use:
    # What a chain object knows of one chain beside what the ring says. Zeros at first.
    cursor reader
    cursor writer
    uint32_t consumed  # bytes behind `reader`
    uint32_t written   # and behind `writer`
    uint32_t touched   # end of what may have been written otherwise, for the dirty log
    uint16_t found_busy     # see _chain_pool.pxd
    uint8_t readable_made   # readable_buffers are of this chain
    uint8_t writable_made


cdef class Chain:
    # In the order of use: what a queue changes is in a cache line or two.
    cdef PyObject *queue     # the Origin that popped it and has not got it back, owned; else NULL
    cdef chain_use use
    cdef GuestMemory memory  # keeps what c.iov points at mapped
    cdef vhost_chain c
    cdef tuple readable_buffers  # as last asked for, perhaps of an earlier chain, or None
    cdef tuple writable_buffers

    cdef int must_be_out(self) except -1
    cdef Py_ssize_t append(self, char *data, Py_ssize_t size) except -1
    cdef int put(self, Py_ssize_t offset, char *data, Py_ssize_t size) except -1
    cdef int check(self, bint writable, Py_ssize_t offset, Py_ssize_t size) except -1
    cdef bint renew(self, PyObject *old, iovec *iov, Py_ssize_t n) noexcept
    cdef tuple buffers(self, bint writable, Py_ssize_t offset, Py_ssize_t size)


cdef inline void chain_start(Chain chain, PyObject *queue) noexcept:
    # A chain was just popped into chain.c, which may have held an earlier one. Takes a reference over.
    chain.queue = queue
    memset(&chain.use, 0, sizeof(chain.use))
