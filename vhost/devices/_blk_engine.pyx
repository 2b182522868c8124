# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The block engine for Python: csrc/engine_blk.h. Knows queues and disks, no device and no session."""

import os

cimport cython
from libc.errno cimport ESRCH
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from vhost._core cimport *
from vhost.device_queue cimport DeviceQueue
from vhost.memory cimport sigbus_count

__all__ = ["MAX_RANGES", "Disk", "Engine"]

MAX_RANGES = BLK_RANGES_MAX


@cython.final
cdef class Disk:
    cdef blk_disk c

    def __cinit__(
        self,
        *,
        int fd,
        uint64_t capacity,
        bint read_only,
        bint block_device,
        uint32_t max_sectors,
        uint32_t max_zeroes,
        uint32_t max_ranges,
        bytes serial not None,
    ):
        if len(serial) > BLK_ID_BYTES:
            raise ValueError(f"serial of {len(serial)} bytes, limit {BLK_ID_BYTES}")
        self.c.fd = fd
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


# Not the collector's, like the queues: it would clear `attached`, and free what is in it, under the feet of
# the threads. Nothing below refers back to a device, so that no cycle is lost by it.
@cython.final
@cython.no_gc
cdef class Engine:
    cdef blk_engine c
    cdef bint ready
    cdef dict attached  # queue: _Attached

    def __cinit__(self, unsigned int workers, str name not None):
        cdef int rc = blk_engine_init(&self.c, workers, name.encode(), sigbus_count())
        if rc:
            raise OSError(-rc, "cannot set up the block engine")
        self.ready = True
        self.attached = {}

    def __dealloc__(self):
        cdef _Attached one
        if not self.ready:
            return
        if self.attached is not None:
            for one in self.attached.values():
                self.take_back(one)
        blk_engine_destroy(&self.c)

    @property
    def notice(self):
        return blk_engine_notice(&self.c)

    def attach(self, DeviceQueue queue not None, Disk disk not None, unsigned int worker, bint writethrough):
        cdef _Attached one
        cdef blk_queue_config cfg
        cdef int rc
        if queue in self.attached:
            raise ValueError(f"{queue.name} is attached already")
        if worker >= self.c.nworkers:
            raise ValueError(f"worker {worker}, must be below {self.c.nworkers}")
        one = _Attached(queue, disk)
        cfg.vq = &queue.vq
        cfg.disk = &disk.c
        cfg.writethrough = writethrough
        cfg.kick = queue.kick
        cfg.call = queue.to_driver
        with nogil:
            rc = blk_engine_attach(&self.c, worker, &one.c, &cfg)
        if rc:
            why = "it belongs to the process that this one was forked from" if rc == -ESRCH else os.strerror(-rc)
            raise OSError(-rc, f"{queue.name}: cannot be attached to the block engine: {why}")
        self.attached[queue] = one

    def detach(self, DeviceQueue queue not None):
        cdef _Attached one = self.attached.pop(queue, None)
        if one is not None:
            self.take_back(one)

    def hold(self, DeviceQueue queue not None):
        cdef _Attached one = self.attached.get(queue)
        if one is not None:
            with nogil:
                blk_engine_hold(&one.c)

    def release(self, DeviceQueue queue not None, bint look):
        cdef _Attached one = self.attached.get(queue)
        if one is not None:
            with nogil:
                blk_engine_release(&one.c, look)

    cdef int take_back(self, _Attached one) except -1:
        with nogil:
            blk_engine_detach(&self.c, &one.c)
        return 0


@cython.final
@cython.no_gc
cdef class _Attached:
    """Keeps alive what a worker uses."""

    cdef blk_queue c
    cdef DeviceQueue queue
    cdef Disk disk

    def __cinit__(self, DeviceQueue queue, Disk disk):
        memset(&self.c, 0, sizeof(self.c))
        self.queue = queue
        self.disk = disk
