# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A shared memory region (VIRTIO 2.10): addresses that are reserved, and files that a device maps into them.

Knows mappings; knows neither messages nor who asks for one. Its bytes belong to somebody who may take them
away, or shorten the file behind them, at any moment: they are copied by the kernel, which says so where a
pointer would kill the process.
"""

import errno as _errno
import fcntl
import mmap as _mmap
import os
import stat
import threading
from bisect import bisect_left, bisect_right

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint64_t
from posix.mman cimport (
    MAP_ANONYMOUS,
    MAP_FAILED,
    MAP_FIXED,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    mmap,
    munmap,
)
from posix.types cimport pid_t
from posix.unistd cimport getpid

from vhost._core cimport iovec, mapping_unit

from vhost.errors import IncorrectFds, InvalidGuestMemory

__all__ = ["MAX_MAPPINGS", "ShmemRegion", "unit_of"]

MAX_MAPPINGS = 4096

cdef extern from "<sys/uio.h>" nogil:
    ssize_t process_vm_readv(pid_t, const iovec *, unsigned long, const iovec *, unsigned long, unsigned long)
    ssize_t process_vm_writev(pid_t, const iovec *, unsigned long, const iovec *, unsigned long, unsigned long)


def unit_of(int fd):
    return mapping_unit(fd)


@cython.final
cdef class ShmemRegion:
    cdef readonly int shmid
    cdef readonly uint64_t size
    cdef uint8_t *host
    cdef list starts
    cdef dict ends  # by start: (end, writable)
    cdef object lock  # of threads: a call that maps, copies or closes runs Python, or waits for the kernel

    def __cinit__(self, int shmid, size):
        self.shmid = shmid
        self.starts = []
        self.ends = {}
        self.lock = threading.RLock()
        if not 0 < size < 1 << 63 or size % _mmap.PAGESIZE:
            raise InvalidGuestMemory(f"{self.name()}: size {size:#x}, must be a multiple of {_mmap.PAGESIZE:#x}")
        self.size = size
        cdef void *at = mmap(NULL, self.size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if at == MAP_FAILED:
            raise InvalidGuestMemory(f"{self.name()}: size {size:#x}: {os.strerror(errno)}")
        self.host = <uint8_t *>at

    def __dealloc__(self):
        self.give_up()

    def close(self):
        with self.lock:
            self.starts.clear()
            self.ends.clear()
            self.give_up()

    cdef void give_up(self) noexcept:
        if self.host != NULL:
            munmap(self.host, self.size)
            self.host = NULL

    cdef str name(self):
        return f"shared memory region {self.shmid}"

    @property
    def host_addr(self):
        return <uint64_t>self.host

    @property
    def mappings(self):
        with self.lock:
            return tuple([(start, self.ends[start][0] - start, self.ends[start][1]) for start in self.starts])

    cdef int must_be_open(self) except -1:
        if self.host == NULL:
            raise InvalidGuestMemory(f"{self.name()} was closed")
        return 0

    cdef int check(self, offset, length) except -1:
        # They are any 64 bits of a peer's, so Python's integers do the sum.
        self.must_be_open()
        if not 0 <= offset or not 0 < length or offset + length > self.size:
            raise InvalidGuestMemory(
                f"{self.name()}: offset {offset:#x}, size {length:#x}: must be more than 0 and end within {self.size:#x}"
            )
        return 0

    def map(self, offset, length, int fd, fd_offset=0, *, bint writable=False):
        cdef void *at
        cdef uint64_t start, count
        cdef int prot
        cdef uint64_t unit
        with self.lock:
            prot = PROT_READ | PROT_WRITE if writable else PROT_READ
            self.check(offset, length)
            # With MAP_FIXED, a length that the kernel rounds up takes away what is behind it, ours or not.
            unit = mapping_unit(fd)
            for what, value in (("offset", offset), ("size", length), ("file offset", fd_offset)):
                if value % unit:
                    raise InvalidGuestMemory(f"{self.name()}: {what} {value:#x}: no multiple of {unit:#x}")
            if not 0 <= fd_offset < 1 << 63:
                raise InvalidGuestMemory(f"{self.name()}: file offset {fd_offset:#x}: no file is that large")
            found = bisect_right(self.starts, offset)
            for other in self.starts[max(found - 1, 0):found + 1]:
                if other < offset + length and offset < self.ends[other][0]:
                    raise InvalidGuestMemory(
                        f"{self.name()}: offset {offset:#x}, size {length:#x} overlaps what is mapped at {other:#x}"
                    )
            if len(self.starts) >= MAX_MAPPINGS:
                raise InvalidGuestMemory(f"{self.name()}: {MAX_MAPPINGS} mappings, which is the limit")
            self.check_file(fd, fd_offset + length, writable)
            start, count = offset, length
            at = mmap(self.host + start, count, prot, MAP_SHARED | MAP_FIXED, fd, fd_offset)
            if at == MAP_FAILED:
                # The kernel may have taken the reservation away before it failed.
                error = errno
                self.reserve(start, count)
                raise InvalidGuestMemory(f"{self.name()}: offset {offset:#x}, size {length:#x}: {os.strerror(error)}")
            self.starts.insert(found, offset)
            self.ends[offset] = (offset + length, bool(writable))

    cdef int check_file(self, int fd, end, bint writable) except -1:
        try:
            mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
            status = os.fstat(fd)
        except OSError as error:
            raise IncorrectFds(f"{self.name()}: fd {fd}: {error.strerror}") from error
        if mode == os.O_WRONLY or (writable and mode != os.O_RDWR):
            what = "written" if writable else "read"
            raise IncorrectFds(f"{self.name()}: the file cannot be {what}: its descriptor was not opened for that")
        # What else can be mapped, a device or a dma-buf, has no size or knows better.
        if stat.S_ISREG(status.st_mode) and end > status.st_size:
            raise InvalidGuestMemory(
                f"{self.name()}: up to {end:#x} of a file of {status.st_size:#x} bytes"
            )
        return 0

    cdef int reserve(self, uint64_t start, uint64_t count) except -1:
        cdef void *at = mmap(
            self.host + start, count, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0
        )
        if at == MAP_FAILED:
            raise InvalidGuestMemory(f"{self.name()}: offset {start:#x}: cannot be unmapped: {os.strerror(errno)}")
        return 0

    def unmap(self, offset, length):
        with self.lock:
            self.check(offset, length)
            known = self.ends.get(offset)
            if known is None or known[0] != offset + length:
                raise InvalidGuestMemory(
                    f"{self.name()}: offset {offset:#x}, size {length:#x}: no mapping is exactly that"
                )
            self.reserve(offset, length)
            del self.ends[offset]
            del self.starts[bisect_left(self.starts, offset)]

    def unmap_all(self):
        with self.lock:
            self.must_be_open()
            self.reserve(0, self.size)
            self.starts.clear()
            self.ends.clear()

    def read(self, offset, length):
        cdef iovec ours, theirs
        cdef ssize_t done
        cdef bytes data
        with self.lock:
            self.check(offset, length)
            data = PyBytes_FromStringAndSize(NULL, length)
            ours.iov_base = PyBytes_AS_STRING(data)
            theirs.iov_base = self.host + <uint64_t>offset
            ours.iov_len = theirs.iov_len = length
            with nogil:
                done = process_vm_readv(getpid(), &ours, 1, &theirs, 1, 0)
            self.all_done(done, offset, length)
            return data

    def write(self, offset, const uint8_t[::1] data not None):
        cdef iovec ours, theirs
        cdef ssize_t done
        with self.lock:
            self.check(offset, data.shape[0])
            ours.iov_base = <void *>&data[0]
            theirs.iov_base = self.host + <uint64_t>offset
            ours.iov_len = theirs.iov_len = data.shape[0]
            with nogil:
                done = process_vm_writev(getpid(), &ours, 1, &theirs, 1, 0)
            self.all_done(done, offset, data.shape[0])

    cdef int all_done(self, ssize_t done, offset, length) except -1:
        if done == length:
            return 0
        if done < 0 and errno != _errno.EFAULT:
            raise OSError(errno, f"{self.name()}: {os.strerror(errno)}")
        raise InvalidGuestMemory(
            f"{self.name()}: nothing is mapped, or not for that, at {offset + max(done, 0):#x}"
        )

    def __repr__(self):
        return f"<ShmemRegion {self.shmid}: {len(self.starts)} mappings in {self.size:#x} bytes>"
