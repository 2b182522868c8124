# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "wire.h" nogil:
    enum:
        WIRE_FIELDS_MAX
        WIRE_SIZE_MAX

    struct wire_field:
        uint16_t offset
        uint8_t size
        bint swapped

    uint64_t wire_load(const void *, wire_field)
    void wire_store(void *, wire_field, uint64_t)


cdef class Struct:
    cdef wire_field[WIRE_FIELDS_MAX] layout
    cdef uint32_t count
    cdef readonly uint32_t size
    cdef readonly tuple fields
    cdef str text
    cdef tuple last  # what load() gave, to be filled again once it is free

    cdef tuple load(self, const void *at)
    cdef int store(self, uint8_t *to, tuple values) except -1
