# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The block engine for Python: csrc/engine_blk.h. Knows queues and disks, no device and no session."""

import os
from weakref import WeakValueDictionary

cimport cython
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from vhost._core cimport *
from vhost.device_queue cimport DeviceQueue
from vhost.devices._engine cimport Engine, EngineQueue
from vhost.memory cimport sigbus_unwatch, sigbus_watch

__all__ = ["AIO", "MAX_RANGES", "BlkEngine", "Disk", "probe_io_uring"]

MAX_RANGES = BLK_RANGES_MAX
AIO = {"sync": BLK_AIO_SYNC, "threads": BLK_AIO_THREADS, "io_uring": BLK_AIO_URING}
_PACES = {"waits": BLK_WAITS, "cached": BLK_CACHED, "memory": BLK_MEMORY}


def probe_io_uring():
    return -blk_uring_probe()


@cython.final
@cython.no_gc
cdef class _Map:
    """A file as memory, of use if it has a handle: then whoever truncates it does not end this process."""
    cdef object __weakref__
    cdef blk_map *c
    cdef int handle

    def __cinit__(self, int fd, bint read_only):
        self.handle = -1
        self.c = blk_map_new(fd, read_only)
        if self.c:
            self.handle = sigbus_watch(self.c.base, self.c.size, &self.c.broken)

    def __dealloc__(self):
        if self.handle >= 0:
            sigbus_unwatch(self.handle)
        blk_map_free(self.c)


# One for a file, and not one for each session that shares it: page tables grow with maps.
_maps = WeakValueDictionary()


cdef _Map map_of(int fd, bint read_only):
    """None: it cannot be mapped."""
    cdef _Map found
    file = os.fstat(fd)
    key = file.st_dev, file.st_ino, file.st_size, read_only
    found = _maps.get(key)
    if found is None or blk_map_broken(found.c):
        found = _Map(fd, read_only)
        if found.handle < 0:
            return None
        _maps[key] = found
    return found


@cython.final
cdef class Disk:
    cdef blk_disk c
    cdef _Map map

    def __cinit__(
        self,
        *,
        int fd,
        uint64_t capacity,
        bint read_only,
        bint block_device,
        str pace=None,
        uint32_t max_sectors,
        uint32_t max_zeroes,
        uint32_t max_ranges,
        bytes serial not None,
    ):
        if len(serial) > BLK_ID_BYTES:
            raise ValueError(f"serial of {len(serial)} bytes, limit {BLK_ID_BYTES}")
        self.c.fd = fd
        self.c.pace = blk_disk_pace(fd) if pace is None else _PACES[pace]
        if fd >= 0 and self.c.pace == BLK_MEMORY:
            self.map = map_of(fd, read_only)
            if self.map is not None:
                self.c.map = self.map.c
        self.c.read_only = read_only
        self.c.block_device = block_device
        self.c.capacity = capacity
        self.c.max_discard_sectors = max_sectors
        self.c.max_write_zeroes_sectors = max_zeroes
        self.c.max_discard_seg = self.c.max_write_zeroes_seg = max_ranges
        memcpy(self.c.serial, <const char *> serial, len(serial))

    @property
    def capacity(self):
        return self.c.capacity

    @capacity.setter
    def capacity(self, uint64_t sectors):
        self.c.capacity = sectors

    def discard(self, uint64_t offset, uint64_t length):
        cdef int rc
        with nogil:
            rc = blk_disk_discard(&self.c, offset, length)
        if rc:
            raise OSError(-rc, os.strerror(-rc))

    def write_zeroes(self, uint64_t offset, uint64_t length, bint unmap):
        cdef int rc
        with nogil:
            rc = blk_disk_zero(&self.c, offset, length, unmap)
        if rc:
            raise OSError(-rc, os.strerror(-rc))


@cython.final
@cython.no_gc
cdef class _Pool:
    """Outlives the engine for as long as a queue has it."""
    cdef blk_pool c

    def __cinit__(self, str name not None):
        blk_pool_init(&self.c, name.encode())

    def __dealloc__(self):
        blk_pool_destroy(&self.c)


@cython.final
@cython.no_gc
cdef class BlkEngine(Engine):
    cdef _Pool pool

    def __cinit__(self, unsigned int workers, str name not None, cpus=(), BlkEngine of=None):
        self.pool = _Pool(name) if of is None else of.pool

    def attach(self, DeviceQueue queue not None, Disk disk not None, unsigned int worker, *, bint writethrough,
               str aio not None):
        self.hand_over(_BlkQueue(queue, disk, self.pool, AIO[aio], writethrough), worker)


@cython.final
@cython.no_gc
cdef class _BlkQueue(EngineQueue):
    cdef blk_queue c
    cdef Disk disk
    cdef _Pool pool

    def __cinit__(self, DeviceQueue queue, Disk disk, _Pool pool, blk_aio aio, bint writethrough):
        cdef int rc
        self.disk = disk
        self.pool = pool
        rc = blk_queue_init(&self.c, &disk.c, aio, &pool.c, writethrough)
        if rc:
            raise OSError(-rc, f"{queue.name}: {os.strerror(-rc)}")
        self.engine = &self.c.engine
        self.ops = &blk_engine_ops
        self.source = self.c.wake

    def __dealloc__(self):
        with nogil:  # the last one waits for the pool's threads
            blk_queue_destroy(&self.c)
