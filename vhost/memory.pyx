# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Guest memory: mappings, and immutable tables of them.

Reference counts of Python objects are the reference counts of mappings: only the end of a Region
unmaps, and whoever hands out a pointer into one holds the Region, or the GuestMemory that holds it.
Knows files and addresses; knows neither rings nor where a table came from.
"""

import fcntl
import mmap as _mmap
import os
import stat
from collections.abc import Sequence
from operator import attrgetter

cimport cython
from cpython.buffer cimport (
    PyBUF_SIMPLE,
    PyBuffer_FillInfo,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EEXIST, ENOMEM, EPERM, errno
from libc.stdlib cimport free, malloc
from posix.mman cimport MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport close

from vhost._core cimport *

from vhost.errors import IncorrectFds, InvalidGuestMemory

__all__ = ["MAX_REGIONS", "GuestMemory", "Region", "has_sigbus_handler", "install_sigbus_handler"]

MAX_REGIONS = GUEST_MEMORY_MAX_REGIONS


cdef const int *sigbus_count() noexcept:
    return sigbus_repairs()


cdef int sigbus_watch(void *base, size_t size, int *broken) noexcept:
    """A handle, or a negative errno (-EPERM: this program does not handle SIGBUS)."""
    return sigbus_register(base, size, broken) if sigbus_installed() else -EPERM


cdef void sigbus_unwatch(int handle) noexcept:
    sigbus_unregister(handle)


def has_sigbus_handler():
    return bool(sigbus_installed())


def install_sigbus_handler():
    cdef int rc = sigbus_install()
    if rc:
        raise OSError(-rc, f"cannot handle SIGBUS: {os.strerror(-rc)}")


def check_range(what, addr, size):
    # From a peer they are any 64 bits, so Python's integers do the sum.
    if not 0 <= addr < 1 << 64 or not 0 < size <= (1 << 64) - addr:
        raise InvalidGuestMemory(f"{what} {addr:#x}, size {size:#x}: must be more than 0 and end within 64 bits")


@cython.final
@cython.no_gc
cdef class Region:
    def __cinit__(self):
        self.fd = -1
        self.sigbus_handle = -1

    def __init__(self):
        raise TypeError("Region.allocate, from_fd or from_iotlb makes a region")

    def __dealloc__(self):
        if self.sigbus_handle >= 0:
            sigbus_unregister(self.sigbus_handle)
        if self.map != NULL:
            munmap(self.map, self.map_size)
        if self.fd >= 0:
            close(self.fd)

    @classmethod
    def allocate(cls, size, *, guest_addr=0, user_addr=None, name="vhost"):
        cdef Region self = Region.__new__(Region)
        check_range("guest address", guest_addr, size)
        if size >= 1 << 63:
            raise InvalidGuestMemory(f"size {size:#x}: no file is that large")
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self.map_fd(self.fd, size, 0, _mmap.PAGESIZE, MAP_SHARED)
        if user_addr is None:
            user_addr = <uint64_t>self.host
        check_range("user address", user_addr, size)
        self.guest_addr = guest_addr
        self.user_addr = user_addr
        return self

    @classmethod
    def from_fd(cls, int fd, size, *, guest_addr, user_addr, mmap_offset=0, str what="memory region"):
        cdef Region self = Region.__new__(Region)
        check_range("guest address", guest_addr, size)
        check_range("user address", user_addr, size)
        check_range("mmap offset", mmap_offset, size)
        try:
            status = os.fstat(fd)
        except OSError as error:
            raise IncorrectFds(f"{what}'s fd {fd}: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):
            raise IncorrectFds(f"{what}'s fd {fd} is no file (st_mode {status.st_mode:#o})")
        if mmap_offset + size > status.st_size:
            raise InvalidGuestMemory(
                f"mmap offset {mmap_offset:#x}, size {size:#x}: the file has only {status.st_size:#x} bytes"
            )
        self.map_fd(fd, size, mmap_offset, mapping_unit(fd), MAP_SHARED)
        self.mmap_offset = mmap_offset
        self.guest_addr = guest_addr
        self.user_addr = user_addr
        self.watch()
        return self

    @classmethod
    def from_iotlb(cls, int fd, size, *, iova, offset, bint writable):
        cdef Region self = Region.__new__(Region)
        check_range("IOVA", iova, size)
        check_range("file offset", offset, size)
        # The kernel says what it mapped, and its files need not say their size. Where the driver lets the
        # device only read, a device that is made to write does so to a copy of its own.
        self.map_fd(fd, size, offset, mapping_unit(fd), MAP_SHARED if writable else MAP_PRIVATE)
        self.mmap_offset = offset
        self.guest_addr = self.user_addr = iova
        self.watch()
        return self

    cdef int watch(self) except -1:
        # Seals do not make a peer's file safe: one of huge pages that do not exist cannot shrink, and
        # every access to it faults.
        self.sigbus_handle = sigbus_register(self.map, self.map_size, &self.is_broken)
        if self.sigbus_handle < 0:
            raise OSError(-self.sigbus_handle, "cannot watch the mapping for SIGBUS")
        return 0

    cdef int map_fd(self, int fd, uint64_t size, uint64_t offset, uint64_t page, int sharing) except -1:
        cdef uint64_t slack = offset % page
        cdef uint64_t length = (slack + size + page - 1) // page * page
        cdef void *at = mmap(
            NULL, length, PROT_READ | PROT_WRITE, sharing | MAP_NORESERVE, fd, offset - slack
        )
        if at == MAP_FAILED:
            raise InvalidGuestMemory(
                f"mmap of {length:#x} bytes at offset {offset - slack:#x}: {os.strerror(errno)}"
            )
        self.map = at
        self.map_size = length
        self.host = <uint8_t *>at + slack
        self.size = size
        return 0

    @property
    def host_addr(self):
        return <uint64_t>self.host

    @property
    def broken(self):
        return READ_ONCE(self.is_broken) != 0

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.host, self.size, 0, flags)

    def __repr__(self):
        return f"<Region {self.size:#x} bytes, guest {self.guest_addr:#x}, user {self.user_addr:#x}>"


@cython.final
@cython.no_gc
cdef class GuestMemory:
    def __cinit__(self, regions=()):
        cdef guest_region *rows
        cdef uint32_t bad = 0
        cdef Region region
        cdef int rc
        cdef Py_ssize_t i, n

        self.regions = tuple(regions)
        n = len(self.regions)
        if n > GUEST_MEMORY_MAX_REGIONS:
            raise InvalidGuestMemory(f"{n} regions: at most {GUEST_MEMORY_MAX_REGIONS}")
        rows = <guest_region *>malloc((n + 1) * sizeof(guest_region))
        if rows == NULL:
            raise MemoryError
        try:
            for i in range(n):
                region = <Region?>self.regions[i]
                rows[i].guest_addr = region.guest_addr
                rows[i].user_addr = region.user_addr
                rows[i].size = region.size
                rows[i].host = region.host
            rc = guest_memory_init(&self.table, rows, n, &bad)
        finally:
            free(rows)
        if rc:
            self.refuse(rc, bad)
        self.c = &self.table
        self.by_guest = tuple(sorted(self.regions, key=attrgetter("guest_addr")))
        self.repairs = sigbus_repairs()
        self.look_broken()

    def __dealloc__(self):
        if self.c != NULL:
            guest_memory_destroy(self.c)

    def refuse(self, int rc, uint32_t bad):
        # The C core names one culprit; whom it collides with is found here, off the fast path.
        if rc == -EEXIST:
            region = self.regions[bad]
            for i, other in enumerate(self.regions):
                for field in ("guest_addr", "user_addr"):
                    start, theirs = getattr(region, field), getattr(other, field)
                    if i != bad and start < theirs + other.size and theirs < start + region.size:
                        raise InvalidGuestMemory(
                            f"region {bad}: {field} {start:#x}, size {region.size:#x} overlaps region {i}:"
                            f" {field} {theirs:#x}, size {other.size:#x}"
                        )
        if rc == -ENOMEM:
            raise MemoryError
        raise InvalidGuestMemory(f"region {bad}: {self.regions[bad]!r} cannot be used: {os.strerror(-rc)}")

    def add(self, Region region not None):
        return GuestMemory((*self.regions, region))

    def remove(self, *, uint64_t guest_addr, uint64_t user_addr, uint64_t size):
        cdef Region region
        kept = tuple([
            region
            for region in self.regions
            if (region.guest_addr, region.user_addr, region.size) != (guest_addr, user_addr, size)
        ])
        if len(kept) == len(self.regions):
            raise InvalidGuestMemory(
                f"no region with guest address {guest_addr:#x}, user address {user_addr:#x}, size {size:#x}"
            )
        return GuestMemory(kept)

    cdef bint look_broken(self) noexcept:
        cdef Region region
        # The count first: what is repaired behind it is looked at next time.
        self.looked_at = LOAD_ACQUIRE(self.repairs[0])
        for region in self.regions:
            if READ_ONCE(region.is_broken):
                self.is_broken = True
        return self.is_broken

    @property
    def broken(self):
        return memory_broken(self)

    cdef int require(self, uint64_t addr, uint64_t size) except -1:
        # Is all of it in memory? So that nothing is done by halves, or allocated for nothing.
        cdef uint64_t at = addr, left = size, length
        while left:
            length = left
            if at < addr or guest_memory_at(self.c, at, &length) == NULL:
                raise InvalidGuestMemory(
                    f"guest address {addr:#x}, size {size:#x}: {at:#x} is in none of {len(self.regions)} regions"
                )
            at += length
            left -= length
        return 0

    def view(self, uint64_t addr, uint64_t size):
        views = self.views(addr, size)
        if len(views) != 1:
            raise InvalidGuestMemory(
                f"guest address {addr:#x}, size {size:#x}: in {len(views)} pieces, see views()"
            )
        return views[0]

    def views(self, uint64_t addr, uint64_t size):
        cdef uint64_t length, offset
        cdef const guest_region *row
        self.require(addr, size)
        result = []
        while size:
            row = guest_memory_search(self.c, addr)
            offset = addr - row.guest_addr
            length = min(size, row.size - offset)
            region = self.by_guest[row - self.c.by_guest]
            result.append(memoryview(region)[offset:offset + length])
            addr += length
            size -= length
        return result

    def read(self, uint64_t addr, uint64_t size):
        self.require(addr, size)
        data = PyBytes_FromStringAndSize(NULL, size)
        guest_memory_read(self.c, addr, PyBytes_AS_STRING(data), size)
        return data

    def write(self, uint64_t addr, data):
        cdef Py_buffer buffer
        PyObject_GetBuffer(data, &buffer, PyBUF_SIMPLE)
        try:
            self.require(addr, buffer.len)
            guest_memory_write(self.c, addr, buffer.buf, buffer.len)
        finally:
            PyBuffer_Release(&buffer)

    def user_to_guest(self, uint64_t user_addr):
        cdef uint64_t guest_addr
        if not guest_memory_user_to_guest(self.c, user_addr, &guest_addr):
            raise InvalidGuestMemory(f"user address {user_addr:#x} is in none of {len(self.regions)} regions")
        return guest_addr

    def guest_to_user(self, uint64_t guest_addr):
        cdef const guest_region *region
        self.require(guest_addr, 1)
        region = guest_memory_search(self.c, guest_addr)
        return region.user_addr + (guest_addr - region.guest_addr)

    def __len__(self):
        return len(self.regions)

    def __getitem__(self, index):
        return self.regions[index]

    def __iter__(self):
        return iter(self.regions)

    def __contains__(self, region):
        return region in self.regions

    def __reversed__(self):
        return reversed(self.regions)

    def index(self, value, *bounds):
        return self.regions.index(value, *bounds)

    def count(self, value):
        return self.regions.count(value)

    def __repr__(self):
        return f"<GuestMemory of {len(self.regions)} regions>"


Sequence.register(GuestMemory)
