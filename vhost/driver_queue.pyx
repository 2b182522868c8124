# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A virtqueue as the driver sees it: the Python face of csrc/driver_*.c.

Knows rings and memory; knows neither requests of any device type nor how the device was told of the
ring.
"""

import os
import time
from collections import namedtuple

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, EINTR, ENOMEM, ENOSPC, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memset
from posix.time cimport timespec
from posix.unistd cimport read

from vhost._core cimport *
from vhost._ring cimport check_num, fault_reason, find_areas, signal
from vhost.memory cimport GuestMemory

from vhost.errors import InvalidQueue, QueueBroken

__all__ = ["DriverQueue", "Layout"]

Layout = namedtuple("Layout", "desc avail used indirect size")

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    enum:
        POLLIN
    int ppoll(pollfd *, unsigned long, const timespec *, const void *)


@cython.final
cdef class DriverQueue:
    def __cinit__(
        self,
        GuestMemory memory not None,
        int64_t num,
        *,
        uint64_t desc,
        uint64_t avail,
        uint64_t used,
        bint packed=False,
        bint event_idx=False,
        bint in_order=False,
        base=None,
        indirect_addr=None,
        uint32_t indirect_max=0,
        int kick=-1,
        int call=-1,
        uint32_t index=0,
        str name not None="queue",
    ):
        cdef driver_config cfg
        cdef uint64_t[3] addrs
        cdef uint32_t i

        self.memory = memory
        self.name = name
        self.index = index
        self.kick_fd = kick
        self.call_fd = call
        check_num(name, num, packed)
        addrs[0] = desc
        addrs[1] = avail
        addrs[2] = used
        find_areas(name, memory, None, num, packed, addrs, False, &cfg.areas)
        cfg.num = num
        cfg.packed = packed
        cfg.event_idx = event_idx
        cfg.in_order = in_order
        if base is None:
            base = 0x80008000 if packed else 0
        if not 0 <= base <= 0xffffffff:
            raise InvalidQueue(f"{name}: base {base:#x} does not fit 32 bits")
        cfg.base = base
        cfg.indirect = NULL
        cfg.indirect_addr = 0
        cfg.indirect_max = indirect_max
        if indirect_max:
            self.place_tables(&cfg, indirect_addr)
        rc = driver_queue_init(&self.dq, &cfg)
        if rc == -ENOMEM:
            raise MemoryError
        if rc:
            raise InvalidQueue(f"{name}: base {cfg.base:#x} is none for a ring of {num}")
        self.ready = True

        self.tokens = [None] * num
        self.free_places = <uint16_t *>malloc(num * sizeof(uint16_t))
        if self.free_places == NULL:
            raise MemoryError
        for i in range(num):
            self.free_places[i] = num - 1 - i
        self.nfree = num

    def __dealloc__(self):
        free(self.bufs.first)
        free(self.free_places)
        if self.ready:
            driver_queue_destroy(&self.dq)

    cdef int place_tables(self, driver_config *cfg, indirect_addr) except -1:
        cdef uint64_t addr, size
        if indirect_addr is None:
            raise InvalidQueue(f"{self.name}: indirect_max {cfg.indirect_max}, but no indirect_addr")
        addr = indirect_addr
        size = <uint64_t>cfg.num * cfg.indirect_max * 16
        cfg.indirect_addr = addr
        cfg.indirect = <vring_desc *>guest_memory_area(self.memory.c, addr, size)
        if addr % 16 or cfg.indirect == NULL or <uint64_t>cfg.indirect % 16:
            raise InvalidQueue(
                f"{self.name}: indirect tables at {addr:#x}, size {size:#x}: not aligned to 16, or not"
                f" wholly within one of {len(self.memory.regions)} memory regions"
            )
        return 0

    @staticmethod
    def layout(int64_t num, *, bint packed, uint32_t indirect_max=0):
        # Each area has cache lines of its own: they have different writers.
        cdef uint64_t avail, used, indirect
        check_num("layout", num, packed)
        avail = (vring_desc_size(num) + 63) & ~<uint64_t>63
        used = (avail + vring_driver_size(num, packed) + 63) & ~<uint64_t>63
        indirect = (used + vring_device_size(num, packed) + 63) & ~<uint64_t>63
        return Layout(0, avail, used, indirect, indirect + <uint64_t>num * indirect_max * 16)

    @property
    def num(self):
        return self.dq.num

    @property
    def packed(self):
        return self.dq.is_packed

    @property
    def event_idx(self):
        return self.dq.event_idx

    @property
    def in_order(self):
        return self.dq.in_order

    @property
    @cython.critical_section
    def base(self):
        return driver_queue_base(&self.dq)

    @property
    @cython.critical_section
    def resume_base(self):
        return driver_queue_resume_base(&self.dq)

    @property
    @cython.critical_section
    def free(self):
        return self.dq.num_free

    @property
    @cython.critical_section
    def in_flight(self):
        return self.dq.num - self.nfree

    # ------------------------------------------------------------------ to the device

    # What is added may be any Python, which may come back here, and another thread may be here beside it: what
    # they say is collected in a list of the call's own, and the ring is looked at behind that.

    def add(self, readable, writable, token):
        cdef buf_list bufs
        cdef Py_ssize_t out, n
        cdef uint32_t place
        cdef int rc
        self.take_list(&bufs)
        try:
            out = self.parse(&bufs, 0, readable)
            n = self.parse(&bufs, out, writable)
            with cython.critical_section(self):
                # Every chain takes a descriptor at least, so a ring without places has no room either.
                place = self.free_places[self.nfree - 1] if self.nfree else 0
                rc = virtqueue_add(&self.dq, bufs.first, out, n, place)
                if rc >= 0:
                    self.nfree -= 1
                    self.tokens[place] = token
        finally:
            self.keep_list(&bufs)
        if rc == -ENOSPC:
            raise BufferError(f"{self.name}: {self.dq.num_free} descriptors free, too few for {out + n} buffers")
        if rc < 0:
            self.refuse(rc, (readable, writable))
        return rc

    def add_batch(self, requests):
        cdef buf_list bufs
        cdef Py_ssize_t i, count = min(<Py_ssize_t>len(requests), <Py_ssize_t>self.nfree)
        cdef virtqueue_request *reqs
        cdef size_t at = 0
        cdef int rc
        if not count:
            return 0
        reqs = <virtqueue_request *>malloc(count * sizeof(virtqueue_request))
        if reqs == NULL:
            raise MemoryError
        tokens = []
        self.take_list(&bufs)
        try:
            for i in range(count):
                readable, writable, token = requests[i]
                reqs[i].out_ = self.parse(&bufs, at, readable)
                at += reqs[i].out_
                reqs[i].in_ = self.parse(&bufs, at, writable)
                at += reqs[i].in_
                tokens.append(token)
            with cython.critical_section(self):
                rc = self.add_all(reqs, min(count, <Py_ssize_t>self.nfree), bufs.first, tokens)
        finally:
            self.keep_list(&bufs)
            free(reqs)
        if rc == -ENOSPC:
            return 0
        if rc < 0:
            self.refuse(rc, requests[0])
        return rc

    cdef int add_all(self, virtqueue_request *reqs, Py_ssize_t count, virtqueue_buf *first, list tokens) except? -1:
        cdef Py_ssize_t i
        cdef int rc
        for i in range(count):
            reqs[i].bufs = first
            first += reqs[i].out_ + reqs[i].in_
            reqs[i].token = self.free_places[self.nfree - 1 - i]
        rc = virtqueue_add_batch(&self.dq, reqs, count) if count else 0
        for i in range(rc):
            self.tokens[reqs[i].token] = tokens[i]
        self.nfree -= max(rc, 0)
        return rc

    @cython.critical_section
    cdef void take_list(self, buf_list *bufs) noexcept:
        bufs[0] = self.bufs
        memset(&self.bufs, 0, sizeof(self.bufs))

    @cython.critical_section
    cdef void keep_list(self, buf_list *bufs) noexcept:
        # The larger one.
        if bufs.room > self.bufs.room:
            self.bufs, bufs[0] = bufs[0], self.bufs
        free(bufs.first)

    cdef Py_ssize_t parse(self, buf_list *bufs, size_t at, buffers) except -1:
        cdef Py_ssize_t n = len(buffers), i
        cdef virtqueue_buf *grown
        cdef uint64_t length
        if at + n > bufs.room:
            grown = <virtqueue_buf *>realloc(bufs.first, (at + n) * 2 * sizeof(virtqueue_buf))
            if grown == NULL:
                raise MemoryError
            bufs.first = grown
            bufs.room = (at + n) * 2
        i = 0
        for address, size in buffers:
            if i == n:
                raise ValueError(f"{self.name}: the buffers changed while they were added")
            length = size
            if length > 0xffffffff:
                raise ValueError(f"{self.name}: buffer of {length:#x} bytes: a length has 32 bits")
            bufs.first[at + i].addr = address
            bufs.first[at + i].len = <uint32_t>length
            i += 1
        return i

    cdef int refuse(self, int rc, request) except -1:
        self.check_broken()
        readable, writable = request[:2]
        raise ValueError(
            f"{self.name}: {len(readable)} readable and {len(writable)} writable buffers ({os.strerror(-rc)}):"
            f" needs 1 to {self.dq.num}, none of length 0, less than 4 GiB together"
        )

    @cython.critical_section
    def kick_prepare(self):
        return virtqueue_kick_prepare(&self.dq)

    @cython.critical_section
    def kick(self):
        if not virtqueue_kick_prepare(&self.dq):
            return False
        signal(self.kick_fd)
        return True

    # ------------------------------------------------------------------ from the device

    cdef object take(self, uint64_t place, uint32_t written):
        token = self.tokens[place]
        self.tokens[place] = None
        self.free_places[self.nfree] = <uint16_t>place
        self.nfree += 1
        return (token, written)

    @cython.critical_section
    def get_used(self):
        cdef uint64_t place = 0
        cdef uint32_t written = 0
        cdef int rc = virtqueue_get_buf(&self.dq, &place, &written)
        if rc > 0:
            return self.take(place, written)
        if rc < 0:
            self.check_broken()
        return None

    @cython.critical_section
    def get_used_batch(self, uint32_t n=32):
        cdef uint64_t place = 0
        cdef uint32_t written = 0
        cdef int rc
        cdef list batch = []
        while n:
            rc = virtqueue_get_buf(&self.dq, &place, &written)
            if rc <= 0:
                if rc < 0 and not batch:
                    self.check_broken()
                break  # a fault is sticky: those before it first
            batch.append(self.take(place, written))
            n -= 1
        return batch

    @cython.critical_section
    def has_used(self):
        return virtqueue_more_used(&self.dq)

    @cython.critical_section
    def disable_callbacks(self):
        virtqueue_disable_cb(&self.dq)

    @cython.critical_section
    def enable_callbacks(self):
        return virtqueue_enable_cb(&self.dq)

    def wait(self, timeout=None):
        # Callbacks are left as they were found.
        cdef bint was_off = self.dq.cb_off
        cdef double deadline = 0, left = 0
        cdef bint forever = timeout is None
        if self.call_fd < 0:
            raise ValueError(f"{self.name}: no call eventfd to wait on")
        if not forever:
            deadline = time.monotonic() + timeout
        try:
            while not self.enable_callbacks():
                if not forever:
                    # By the clock alone: a device can call without end, and for nothing.
                    if left < 0:
                        return False
                    left = deadline - time.monotonic()
                self.wait_for_call(forever, max(left, 0.0))
            self.check_broken()
            return True
        finally:
            if was_off:
                self.disable_callbacks()

    cdef int wait_for_call(self, bint forever, double seconds) except -1:
        cdef timespec ts
        cdef pollfd pfd
        cdef uint64_t count
        cdef int rc
        ts.tv_sec = <long>min(seconds, 1e9)
        ts.tv_nsec = <long>((min(seconds, 1e9) - ts.tv_sec) * 1e9)
        pfd.fd = self.call_fd
        pfd.events = POLLIN
        pfd.revents = 0
        with nogil:
            rc = ppoll(&pfd, 1, NULL if forever else &ts, NULL)
        if rc < 0:
            if errno != EINTR:
                raise OSError(errno, f"{self.name}: waiting for a call: {os.strerror(errno)}")
            PyErr_CheckSignals()
            return False
        if rc and not pfd.revents & POLLIN:
            raise OSError(f"{self.name}: call eventfd {self.call_fd} cannot be waited for ({pfd.revents:#x})")
        if rc and read(self.call_fd, &count, sizeof(count)) < 0 and errno != EAGAIN:
            raise OSError(errno, f"{self.name}: call eventfd: {os.strerror(errno)}")
        return rc != 0

    @property
    @cython.critical_section
    def broken(self):
        return fault_reason(&self.dq.report) if self.dq.report.fault else None

    cdef int check_broken(self) except -1:
        if self.dq.report.fault:
            raise QueueBroken(self.name, fault_reason(&self.dq.report))
        return 0

    def __repr__(self):
        kind = "packed" if self.dq.is_packed else "split"
        return f"<DriverQueue {self.name} ({self.index}): {kind}, {self.dq.num} slots>"
