# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause


cdef class Ioctl:
    cdef readonly str name
    cdef readonly unsigned int number
    cdef readonly object devices
    cdef readonly str doc
    cdef readonly str feature
    cdef readonly object errors

    cdef int call(self, int fd, void *arg) except? -4096
    cdef int fail(self, int rc, str detail) except -1


cdef class Plain(Ioctl):
    pass


cdef class Scalar(Ioctl):
    cdef bint gives
    cdef unsigned int bytes


cdef class VringState(Ioctl):
    cdef bint gives
    cdef str what
    cdef str value


cdef class VringFile(Ioctl):
    pass


cdef class VringAddr(Ioctl):
    pass


cdef class MemTable(Ioctl):
    pass


cdef class Features(Ioctl):
    pass


cdef class ScsiTarget(Ioctl):
    pass


cdef class ConfigRange(Ioctl):
    pass


cdef class IovaRange(Ioctl):
    pass
