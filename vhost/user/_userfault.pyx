# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""userfaultfd, for post-copy. Knows mapped regions and the kernel's interface, no messages."""

import errno
import os

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stddef cimport size_t
from libc.stdint cimport uint64_t

from vhost.errors import InvalidGuestMemory, InvalidState
from vhost.memory cimport Region

__all__ = ["PageFaults", "place", "wake"]


cdef extern from "userfault.h" nogil:
    struct userfault:
        int fd
    int userfault_open(userfault *)
    void userfault_close(userfault *)
    int userfault_register(userfault *, void *, size_t)
    int userfault_end(userfault *)
    void userfault_abandon(userfault *)
    int userfault_guard(userfault *, int)
    int userfault_copy(int, uint64_t, const void *, size_t)
    int userfault_wake(int, uint64_t, uint64_t)


cdef object failed(int rc, str what, str hint=""):
    return OSError(-rc, f"{what}: {os.strerror(-rc)}{': ' + hint if hint else ''}")


@cython.final
cdef class PageFaults:
    cdef userfault u
    cdef bint is_open
    cdef list regions

    @cython.critical_section
    def __init__(self):
        if self.is_open:
            raise ValueError("opened before")
        cdef int rc = userfault_open(&self.u)
        if rc:
            hint = "needs CAP_SYS_PTRACE, vm.unprivileged_userfaultfd=1 or access to /dev/userfaultfd"
            raise failed(rc, "userfaultfd", hint if rc == -errno.EPERM else "")
        self.is_open = True
        self.regions = []

    def __dealloc__(self):
        self.close()

    cdef int check_open(self) except -1:
        if not self.is_open:
            raise ValueError("closed")
        return 0

    @cython.critical_section
    def fileno(self):
        self.check_open()
        return self.u.fd

    @cython.critical_section
    def guard(self, int peer):
        self.check_open()
        cdef int rc = userfault_guard(&self.u, peer)
        if rc:
            raise failed(rc, "guard of the front-end's end")

    @cython.critical_section
    def register(self, Region region not None):
        self.check_open()
        cdef int rc = userfault_register(&self.u, region.map, region.map_size)
        if rc == -errno.EPIPE:
            raise InvalidState("the front-end is gone")
        if rc:
            raise InvalidGuestMemory(
                f"{region!r}: userfaultfd: {os.strerror(-rc)}: only memory of tmpfs, memfd and hugetlbfs can come later"
            )
        # What is registered must stay what it is, whoever else lets it go.
        self.regions.append(region)

    @cython.critical_section
    def end(self):
        self.check_open()
        cdef int rc
        with nogil:
            rc = userfault_end(&self.u)
        self.regions.clear()
        if rc:
            raise failed(rc, "userfaultfd: end")

    @cython.critical_section
    def abandon(self):
        self.check_open()
        with nogil:
            userfault_abandon(&self.u)

    @cython.critical_section
    def close(self):
        if self.is_open:
            self.is_open = False
            with nogil:
                userfault_close(&self.u)
            self.regions.clear()


def place(int fd, uint64_t addr, data):
    cdef Py_buffer buffer
    cdef int rc
    PyObject_GetBuffer(data, &buffer, PyBUF_SIMPLE)
    try:
        with nogil:
            rc = userfault_copy(fd, addr, buffer.buf, buffer.len)
    finally:
        PyBuffer_Release(&buffer)
    if rc and rc != -errno.EEXIST:
        raise failed(rc, f"UFFDIO_COPY to {addr:#x}")
    return rc == 0


def wake(int fd, uint64_t addr, uint64_t size):
    cdef int rc = userfault_wake(fd, addr, size)
    if rc:
        raise failed(rc, f"UFFDIO_WAKE of {addr:#x}, {size:#x} bytes")
