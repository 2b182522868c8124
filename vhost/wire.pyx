# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Structures as the VIRTIO specification writes them, compiled: csrc/wire.h for Python.

Knows integers and bytes, neither chains nor devices.
"""

import re
import sys

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from cpython.tuple cimport PyTuple_New, PyTuple_SET_ITEM
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vhost.py_refs cimport FREE_THREADED, py_unique_tuple

__all__ = ["Struct"]

cdef extern from "Python.h":
    object PyNumber_Index(object)
    void Py_XDECREF(PyObject *)
    PyObject *PyTuple_GET_ITEM(PyObject *, Py_ssize_t)  # borrowed
    uint64_t PyLong_AsUnsignedLongLong(object) except? <uint64_t>-1

cdef object MEMBER = re.compile(r"(?:(le|be)(16|32|64)|u8)\s+([A-Za-z_]\w*)")
cdef bint little = sys.byteorder == "little"


@cython.final
@cython.no_gc
cdef class Struct:
    def __cinit__(self, str members not None):
        cdef list names = []
        for member in members.split(";"):
            member = member.strip()
            if not member:
                continue
            match = MEMBER.fullmatch(member)
            if match is None:
                raise ValueError(f"{member!r} is no member: u8, le16, le32, le64, be16, be32 or be64, and a name")
            order, bits, name = match.groups()
            if name in names:
                raise ValueError(f"{name!r} is there twice")
            if self.count == WIRE_FIELDS_MAX:
                raise ValueError(f"more than {WIRE_FIELDS_MAX} members")
            self.layout[self.count].offset = self.size
            self.layout[self.count].size = int(bits or 8) // 8
            self.layout[self.count].swapped = order is not None and (order == "le") != little
            self.size += self.layout[self.count].size
            self.count += 1
            names.append(name)
        if not names:
            raise ValueError("a structure without members")
        self.fields = tuple(names)
        self.text = members

    cdef tuple load(self, const void *at):
        # `at` may be guest memory: nothing is looked at twice. The last tuple is free again as a rule: what is
        # unpacked is mostly given names at once.
        cdef tuple values
        cdef PyObject *old
        cdef uint32_t i
        cdef object value
        if py_unique_tuple(<PyObject *>self.last):
            values = self.last
        else:
            values = PyTuple_New(self.count)
        for i in range(self.count):
            value = wire_load(at, self.layout[i])
            old = PyTuple_GET_ITEM(<PyObject *>values, i)
            Py_INCREF(value)  # SET_ITEM takes one over
            PyTuple_SET_ITEM(values, i, value)
            Py_XDECREF(old)
        if not FREE_THREADED:  # where nobody else can be here with the same one
            self.last = values
        return values

    cdef int store(self, uint8_t *to, tuple values) except -1:
        # All or nothing.
        cdef uint64_t[WIRE_FIELDS_MAX] checked
        cdef uint32_t i
        if len(values) != self.count:
            raise ValueError(f"{len(values)} values for the {self.count} members of {self!r}")
        for i in range(self.count):
            value = PyNumber_Index(values[i])
            try:
                checked[i] = PyLong_AsUnsignedLongLong(value)
                fits = checked[i] <= <uint64_t>-1 >> (64 - 8 * self.layout[i].size)
            except OverflowError:
                fits = False
            if not fits:
                raise ValueError(f"{self.fields[i]} is {value:#x}, which does not fit its {self.layout[i].size} bytes")
        for i in range(self.count):
            wire_store(to, self.layout[i], checked[i])
        return 0

    def unpack(self, data):
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            if view.len != self.size:
                raise ValueError(f"{view.len} bytes for the {self.size} of {self!r}")
            return self.load(view.buf)
        finally:
            PyBuffer_Release(&view)

    def pack(self, *values):
        cdef object data = PyBytes_FromStringAndSize(NULL, self.size)
        self.store(<uint8_t *>PyBytes_AS_STRING(data), values)
        return data

    def pack_into(self, buffer, Py_ssize_t offset, *values):
        cdef Py_buffer view
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            if not 0 <= offset <= view.len - <Py_ssize_t>self.size:
                raise ValueError(f"{self.size} bytes at {offset} are not within {view.len}")
            self.store(<uint8_t *>view.buf + offset, values)
        finally:
            PyBuffer_Release(&view)

    def __repr__(self):
        return f"Struct({self.text!r})"
