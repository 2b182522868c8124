# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a device takes off a queue: a chain of buffers in guest memory.

Knows memory, not rings: addresses were checked and translated when the chain was popped. The guest
may write to what is read here at any time, so every byte is copied once.
"""

cimport cython
from cpython.buffer cimport (
    PyBUF_SIMPLE,
    PyBUF_WRITABLE,
    PyBuffer_FillInfo,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from cpython.tuple cimport PyTuple_New, PyTuple_SET_ITEM
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memmove

from vhost._core cimport (
    VQ_REQUEST_HEADER,
    VQ_REQUEST_STATUS,
    iovec,
    unlikely,
    vhost_chain_destroy,
    vhost_chain_init,
    virtqueue_fault,
)
from vhost.memory cimport GuestMemory
from vhost.py_refs cimport py_unique
from vhost.wire cimport WIRE_SIZE_MAX, Struct

from vhost.errors import InvalidQueue

__all__ = ["Buffer", "Chain"]

cdef extern from "Python.h":
    void Py_XDECREF(PyObject *)
    Py_ssize_t PyTuple_GET_SIZE(PyObject *)
    PyObject *PyTuple_GET_ITEM(PyObject *, Py_ssize_t)  # borrowed


cdef void copy(iovec *iov, cursor *at, char *ours, size_t left, bint to_chain) noexcept nogil:
    # Moves the cursor over `left` bytes, which the caller knows to be there, and copies them. `ours`
    # may be the same guest memory: a handler can copy from one view to another.
    cdef size_t n
    cdef char *theirs
    while left:
        n = min(left, iov[at.piece].iov_len - at.offset)
        theirs = <char *>iov[at.piece].iov_base + at.offset
        if to_chain:
            memmove(theirs, ours, n)
        else:
            memmove(ours, theirs, n)
        ours += n
        left -= n
        at.offset += <uint32_t>n
        if at.offset == iov[at.piece].iov_len:
            at.offset = 0
            at.piece += 1


cdef cursor seek(iovec *iov, size_t offset) noexcept nogil:
    # To `offset`, which the caller knows to be inside, or at the end of, the pieces.
    cdef cursor at
    at.piece = 0
    while offset and offset >= iov[at.piece].iov_len:
        offset -= iov[at.piece].iov_len
        at.piece += 1
    at.offset = <uint32_t>offset
    return at


cdef class Origin:
    cdef int take_back(self, Chain chain, uint32_t written) except -1:
        raise NotImplementedError

    cdef int refuse(self, Chain chain, virtqueue_fault fault, uint32_t value, uint32_t limit) except -1:
        raise NotImplementedError


@cython.final
@cython.no_gc
@cython.freelist(64)
cdef class Buffer:
    def __init__(self):
        raise TypeError("buffers come from a Chain")

    @property
    def readonly(self):
        return self.is_readonly

    @property
    def address(self):
        return <uint64_t>self.data

    def __len__(self):
        return self.size

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.data, self.size, self.is_readonly, flags)

    def __repr__(self):
        return f"<Buffer of {self.size} {'readable' if self.is_readonly else 'writable'} bytes>"


cdef Buffer new_buffer(Chain chain, iovec *piece, size_t offset, size_t size, bint writable):
    cdef Buffer buffer = Buffer.__new__(Buffer)
    buffer.data = <char *>piece.iov_base + offset
    buffer.size = size
    buffer.is_readonly = not writable
    buffer.memory = chain.memory
    return buffer


@cython.final
@cython.no_gc
@cython.freelist(8)
cdef class Chain:
    def __cinit__(self):
        vhost_chain_init(&self.c)

    def __init__(self):
        raise TypeError("chains come from a DeviceQueue")

    def __dealloc__(self):
        vhost_chain_destroy(&self.c)
        Py_XDECREF(self.queue)

    @property
    def id(self):
        return self.c.id

    @property
    def readable_len(self):
        return self.c.out_len

    @property
    def writable_len(self):
        return self.c.in_len

    @property
    def written(self):
        return self.use.written

    @property
    @cython.critical_section
    def data_room(self):
        self.must_be_out()
        if unlikely(not self.c.in_len):
            (<Origin>self.queue).refuse(self, VQ_REQUEST_STATUS, 0, 1)
        return self.c.in_len - 1

    @property
    @cython.critical_section
    def readable(self):
        if not self.use.readable_made:
            if not self.renew(<PyObject *>self.readable_buffers, self.c.iov, self.c.out_num):
                self.readable_buffers = self.buffers(False, 0, -1)
            self.use.readable_made = True
        return self.readable_buffers

    @property
    @cython.critical_section
    def writable(self):
        if not self.use.writable_made:
            self.use.touched = self.c.in_len
            if not self.renew(<PyObject *>self.writable_buffers, self.c.iov + self.c.out_num, self.c.in_num):
                self.writable_buffers = self.buffers(True, 0, -1)
            self.use.writable_made = True
        return self.writable_buffers

    cdef bint renew(self, PyObject *old, iovec *iov, Py_ssize_t n) noexcept:
        # An earlier chain's tuple serves again if nobody else has it, nor any buffer of it; every view
        # has its buffer. (None belongs to many.)
        cdef Buffer buffer
        cdef Py_ssize_t i
        if not py_unique(old) or PyTuple_GET_SIZE(old) != n:
            return False
        for i in range(n):
            if not py_unique(PyTuple_GET_ITEM(old, i)):
                return False
        for i in range(n):
            buffer = <Buffer>PyTuple_GET_ITEM(old, i)
            buffer.data = <char *>iov[i].iov_base
            buffer.size = iov[i].iov_len
        return True

    @cython.critical_section
    def readable_part(self, Py_ssize_t offset, Py_ssize_t size=-1):
        return self.buffers(False, offset, size)

    @cython.critical_section
    def writable_part(self, Py_ssize_t offset, Py_ssize_t size=-1):
        return self.buffers(True, offset, size)

    cdef tuple buffers(self, bint writable, Py_ssize_t offset, Py_ssize_t size):
        cdef Py_ssize_t total = self.c.in_len if writable else self.c.out_len
        cdef iovec *iov = self.c.iov + (self.c.out_num if writable else 0)
        cdef cursor at
        cdef uint32_t i, count = 0
        cdef size_t left, n, first
        cdef Buffer buffer
        cdef tuple result

        if size == -1 and 0 <= offset <= total:
            size = total - offset
        self.check(writable, offset, size)
        if writable:
            self.use.touched = max(self.use.touched, <uint32_t>(offset + size))
        at = seek(iov, offset)
        left = size
        first = at.offset
        while left:
            n = min(left, iov[at.piece + count].iov_len - first)
            left -= n
            first = 0
            count += 1
        result = PyTuple_New(count)
        left = size
        first = at.offset
        for i in range(count):
            n = min(left, iov[at.piece + i].iov_len - first)
            buffer = new_buffer(self, &iov[at.piece + i], first, n, writable)
            Py_INCREF(buffer)  # SET_ITEM takes one over
            PyTuple_SET_ITEM(result, i, buffer)
            left -= n
            first = 0
        return result

    cdef int check(self, bint writable, Py_ssize_t offset, Py_ssize_t size) except -1:
        cdef Py_ssize_t total = self.c.in_len if writable else self.c.out_len
        if not 0 <= offset <= total or not 0 <= size <= total - offset:
            kind = "writable" if writable else "readable"
            raise ValueError(
                f"chain {self.c.id}: {size} bytes at {offset} are not within its {total} {kind} bytes"
            )
        return 0

    cdef int must_be_out(self) except -1:
        if unlikely(self.queue == NULL):
            raise InvalidQueue(f"chain {self.c.id} was given back to its queue")
        return 0

    @cython.critical_section
    def read(self, Py_ssize_t n=-1):
        cdef size_t left = self.c.out_len - self.use.consumed
        if n < 0 or <size_t>n > left:
            n = left
        data = PyBytes_FromStringAndSize(NULL, n)
        copy(self.c.iov, &self.use.reader, PyBytes_AS_STRING(data), n, False)
        self.use.consumed += <uint32_t>n
        return data

    @cython.critical_section
    def unpack(self, Struct struct not None):
        cdef uint8_t[WIRE_SIZE_MAX] whole
        cdef iovec *piece = self.c.iov + self.use.reader.piece
        cdef uint32_t left = self.c.out_len - self.use.consumed
        cdef char *at
        self.must_be_out()
        if unlikely(left < struct.size):
            (<Origin>self.queue).refuse(self, VQ_REQUEST_HEADER, left, struct.size)
        self.use.consumed += struct.size
        if unlikely(piece.iov_len - self.use.reader.offset < struct.size):
            copy(self.c.iov, &self.use.reader, <char *>whole, struct.size, False)
            return struct.load(whole)
        at = <char *>piece.iov_base + self.use.reader.offset
        self.use.reader.offset += struct.size
        if self.use.reader.offset == piece.iov_len:
            self.use.reader.offset = 0
            self.use.reader.piece += 1
        return struct.load(at)

    @cython.critical_section
    def readinto(self, buffer):
        cdef Py_buffer view
        cdef size_t n
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            n = min(<size_t>view.len, self.c.out_len - self.use.consumed)
            copy(self.c.iov, &self.use.reader, <char *>view.buf, n, False)
            self.use.consumed += <uint32_t>n
        finally:
            PyBuffer_Release(&view)
        return n

    def write(self, data):
        cdef Py_buffer view
        if type(data) is bytes:
            return self.append(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            return self.append(<char *>view.buf, view.len)
        finally:
            PyBuffer_Release(&view)

    @cython.critical_section
    cdef Py_ssize_t append(self, char *data, Py_ssize_t size) except -1:
        self.must_be_out()
        if <size_t>size > self.c.in_len - self.use.written:
            raise ValueError(
                f"chain {self.c.id}: {size} bytes do not fit into the"
                f" {self.c.in_len - self.use.written} that are left of {self.c.in_len}"
            )
        copy(self.c.iov + self.c.out_num, &self.use.writer, data, size, True)
        self.use.written += <uint32_t>size
        return size

    @cython.critical_section
    def finish(self, status, data_written=None):
        cdef Origin queue
        cdef iovec *last
        cdef int64_t n = 0, byte = length_of(status)
        if data_written is not None:
            n = length_of(data_written)
        self.must_be_out()
        queue = <Origin>self.queue  # which may have no other reference than the one that is given up
        if unlikely(not self.c.in_len):
            queue.refuse(self, VQ_REQUEST_STATUS, 0, 1)
        if data_written is None:
            n = self.use.written
        if not 0 <= byte <= 0xff:
            raise ValueError(f"chain {self.c.id}: status {status} is no byte")
        if not 0 <= n < self.c.in_len:
            raise ValueError(
                f"chain {self.c.id}: {n} bytes of data written, but only {self.c.in_len - 1} are writable"
                " before the status"
            )
        # The last byte, wherever the data ends.
        last = self.c.iov + (self.c.out_num + self.c.in_num - 1)
        (<uint8_t *>last.iov_base)[last.iov_len - 1] = <uint8_t>byte
        self.use.touched = self.c.in_len
        queue.take_back(self, <uint32_t>n + 1)

    @cython.critical_section
    def read_at(self, Py_ssize_t offset, Py_ssize_t n):
        cdef cursor at
        self.check(False, offset, n)
        data = PyBytes_FromStringAndSize(NULL, n)
        at = seek(self.c.iov, offset)
        copy(self.c.iov, &at, PyBytes_AS_STRING(data), n, False)
        return data

    def write_at(self, Py_ssize_t offset, data):
        cdef Py_buffer view
        if type(data) is bytes:
            self.put(offset, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
            return
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            self.put(offset, <char *>view.buf, view.len)
        finally:
            PyBuffer_Release(&view)

    @cython.critical_section
    cdef int put(self, Py_ssize_t offset, char *data, Py_ssize_t size) except -1:
        cdef iovec *iov = self.c.iov + self.c.out_num
        cdef cursor at
        self.must_be_out()
        self.check(True, offset, size)
        self.use.touched = max(self.use.touched, <uint32_t>(offset + size))
        at = seek(iov, offset)
        copy(iov, &at, data, size, True)
        return 0

    def __repr__(self):
        return (
            f"<Chain {self.c.id}: {self.c.out_len} readable bytes in {self.c.out_num} pieces,"
            f" {self.c.in_len} writable in {self.c.in_num}>"
        )
