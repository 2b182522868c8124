# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A network driver's rings for Python: csrc/driver_net.h. Knows frames and slots, no features.

The GIL is released for bursts and pumps; single frames are quicker with it. A lock of its own kind keeps a
second thread out meanwhile: the ring would not survive it.
"""

import os
import time

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EBADMSG, EINTR, EIO, EMSGSIZE, ENOMEM
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from vhost._core cimport *
from vhost._ring cimport fault_reason
from vhost.driver_queue cimport DriverQueue

from vhost.errors import InvalidQueue, QueueBroken, VhostError

__all__ = ["SEQ_BYTES", "SLOT_ALIGN", "NetError", "NetRx", "NetTx"]

SEQ_BYTES = NET_SEQ
SLOT_ALIGN = NET_SLOT_ALIGN
cdef int64_t SLICE = 50_000_000  # ns between two looks at signals


class NetError(VhostError):
    """The device spoiled a received frame, which was dropped: its length, its header or its number of
    buffers cannot be. Its buffers are back in the ring, and the next call goes on behind it."""


cdef int find_slots(DriverQueue queue, uint64_t addr, uint32_t size, uint32_t num, net_slots *slots) except -1:
    slots.addr = addr
    slots.size = size
    slots.num = num
    slots.host = guest_memory_area(queue.memory.c, addr, <uint64_t>size * num)
    if slots.host == NULL:
        raise InvalidQueue(
            f"{queue.name}: {num} slots of {size} bytes at {addr:#x}: not wholly within one of"
            f" {len(queue.memory.regions)} memory regions"
        )
    return 0


cdef int refuse(DriverQueue queue, int rc, uint32_t size, uint32_t num, uint32_t hdr_len) except -1:
    if rc == -ENOMEM:
        raise MemoryError
    if rc:
        raise InvalidQueue(
            f"{queue.name}: {num} slots of {size} bytes, header of {hdr_len}: needs 1 to {queue.dq.num} slots,"
            f" at and of a multiple of {NET_SLOT_ALIGN} bytes, and a header of 12 bytes, or 10 if not mergeable"
        )
    return 0


cdef int failed(DriverQueue queue, int rc) except -1:
    if queue.dq.report.fault:
        raise QueueBroken(queue.name, fault_reason(&queue.dq.report))
    raise OSError(-rc, f"{queue.name}: {os.strerror(-rc)}")


cdef int set_pump(net_pump *p, DriverQueue queue, frame, Py_buffer *view, seq_at, uint64_t seq, count) except -1:
    PyObject_GetBuffer(frame, view, PyBUF_SIMPLE)
    memset(p, 0, sizeof(p[0]))
    p.frame = <const uint8_t *>view.buf
    p.len = <uint32_t>view.len
    p.seq_at = -1 if seq_at is None else seq_at
    p.seq = seq
    p.count = 0xffffffffffffffff if count is None else count
    if view.len < NET_ETH_HDR or view.len > 0x7fffffff or (seq_at is not None and not 0 <= seq_at <= view.len - NET_SEQ):
        PyBuffer_Release(view)
        raise ValueError(f"{queue.name}: frame of {view.len} bytes, sequence number of {NET_SEQ} bytes at {seq_at}")
    return 0


cdef int64_t next_look(int64_t deadline):
    return min(deadline, <int64_t>time.monotonic_ns() + SLICE)


@cython.final
cdef class NetTx:
    cdef net_tx c
    cdef readonly DriverQueue queue
    cdef bint busy

    def __cinit__(self, DriverQueue queue not None, *, uint64_t addr, uint32_t size, uint32_t num, uint32_t hdr_len):
        cdef net_slots slots
        find_slots(queue, addr, size, num, &slots)
        refuse(queue, net_tx_init(&self.c, &queue.dq, &slots, hdr_len, queue.kick_fd), size, num, hdr_len)
        self.queue = queue

    def __dealloc__(self):
        net_tx_destroy(&self.c)

    @property
    def longest(self):
        return net_tx_longest(&self.c)

    @property
    def free(self):
        return self.c.nfree

    cdef int enter(self) except -1:
        if self.busy:
            raise RuntimeError(f"{self.queue.name}: another thread sends")
        self.busy = True
        return 0

    cdef int check_len(self, Py_ssize_t size) except -1:
        if not NET_ETH_HDR <= size <= <Py_ssize_t>net_tx_longest(&self.c):
            raise ValueError(
                f"{self.queue.name}: frame of {size} bytes, must be {NET_ETH_HDR} to {net_tx_longest(&self.c)}"
            )
        return 0

    def reap(self):
        if self.busy:
            raise RuntimeError(f"{self.queue.name}: another thread sends")
        cdef int rc = net_tx_reap(&self.c)
        if rc:
            failed(self.queue, rc)
        return self.c.nfree

    def send(self, frame, header=None):
        cdef Py_buffer view
        cdef const uint8_t[::1] head
        cdef net_out out
        cdef int rc
        self.enter()
        try:
            out.header = NULL
            if header is not None:
                head = header
                out.header = as_header(head)
            PyObject_GetBuffer(frame, &view, PyBUF_SIMPLE)
            try:
                self.check_len(view.len)
                out.data = view.buf
                out.len = <uint32_t>view.len
                rc = net_tx_send(&self.c, &out, 1)
            finally:
                PyBuffer_Release(&view)
        finally:
            self.busy = False
        if rc < 0:
            failed(self.queue, rc)
        return rc == 1

    def send_batch(self, frames, headers=None):
        cdef Py_ssize_t done = 0, n, total = len(frames)
        cdef int rc
        if headers is not None and len(headers) != total:
            raise ValueError(f"{self.queue.name}: {total} frames, {len(headers)} headers")
        self.enter()
        try:
            while done < total:
                n = min(total - done, <Py_ssize_t>NET_BURST)
                rc = self.send_some(frames, headers, done, n)
                done += rc
                if rc < n:
                    break
        finally:
            self.busy = False
        return done

    cdef int send_some(self, frames, headers, Py_ssize_t at, Py_ssize_t n) except -1:
        cdef Py_buffer[NET_BURST] views
        cdef net_out[NET_BURST] outs
        cdef const uint8_t[::1] header
        cdef Py_ssize_t got = 0, i
        cdef int rc
        cdef list kept = []
        try:
            for i in range(n):
                PyObject_GetBuffer(frames[at + i], &views[i], PyBUF_SIMPLE)
                got += 1
                self.check_len(views[i].len)
                outs[i].data = views[i].buf
                outs[i].len = <uint32_t>views[i].len
                outs[i].header = NULL
                if headers is not None and headers[at + i] is not None:
                    header = headers[at + i]
                    kept.append(header)
                    outs[i].header = as_header(header)
            with nogil:
                rc = net_tx_send(&self.c, outs, <unsigned int>n)
        finally:
            for i in range(got):
                PyBuffer_Release(&views[i])
        if rc < 0:
            failed(self.queue, rc)
        return rc

    def pump(self, frame, count=None, timeout=None, *, seq_at=None, uint64_t seq=0):
        cdef net_pump p
        cdef Py_buffer view
        cdef int64_t deadline = 0x7fffffffffffffff, until
        cdef int rc = 0, call = self.queue.call_fd
        if timeout is not None:
            deadline = time.monotonic_ns() + <int64_t>(timeout * 1e9)
        self.enter()
        try:
            set_pump(&p, self.queue, frame, &view, seq_at, seq, count)
            try:
                self.check_len(view.len)
                while True:
                    until = next_look(deadline)
                    with nogil:
                        rc = net_tx_pump(&self.c, &p, call, until)
                    PyErr_CheckSignals()
                    if (rc and rc != -EINTR) or not p.count or time.monotonic_ns() >= deadline:
                        break
            finally:
                PyBuffer_Release(&view)
        finally:
            self.busy = False
        if rc and rc != -EINTR:
            failed(self.queue, rc)
        return p.frames


cdef const net_header *as_header(const uint8_t[::1] header) except? NULL:
    if len(header) != NET_HDR_MAX:
        raise ValueError(f"header of {len(header)} bytes, must be {NET_HDR_MAX}")
    return <const net_header *>&header[0]


@cython.final
cdef class NetRx:
    cdef net_rx c
    cdef readonly DriverQueue queue
    cdef bint busy
    cdef net_in[NET_BURST] frames

    def __cinit__(
        self, DriverQueue queue not None, *, uint64_t addr, uint32_t size, uint32_t num, uint32_t hdr_len, bint mergeable
    ):
        cdef net_slots slots
        find_slots(queue, addr, size, num, &slots)
        refuse(
            queue, net_rx_init(&self.c, &queue.dq, &slots, hdr_len, mergeable, queue.kick_fd), size, num, hdr_len
        )
        self.queue = queue

    def __dealloc__(self):
        net_rx_destroy(&self.c)

    @property
    def dropped(self):
        return self.c.dropped

    cdef int enter(self) except -1:
        if self.busy:
            raise RuntimeError(f"{self.queue.name}: another thread receives")
        self.busy = True
        return 0

    cdef int spoiled(self, int rc) except -1:
        if rc == -EBADMSG:
            text = net_fault_text(self.c.fault).decode()
            raise NetError(f"{self.queue.name}: frame dropped: {text}: {self.c.value}, limit {self.c.limit}")
        failed(self.queue, rc)

    def fill(self):
        cdef int rc
        self.enter()  # not into a ring that a pump uses
        try:
            rc = net_rx_fill(&self.c)
        finally:
            self.busy = False
        if rc:
            failed(self.queue, rc)

    def recv(self, bint finish=True):
        cdef list got
        self.enter()
        try:
            got = self.take(1, finish, False)
        finally:
            self.busy = False
        return got[0] if got else None

    def recv_batch(self, Py_ssize_t n=32, bint finish=True, bint headers=False):
        cdef list got = [], some
        cdef Py_ssize_t most
        self.enter()
        try:
            while n > 0:
                most = min(n, <Py_ssize_t>NET_BURST)
                try:
                    some = self.take(<unsigned int>most, finish, headers)
                except NetError:
                    if not got:
                        raise
                    self.c.pending = True  # these first
                    break
                got += some
                n -= len(some)
                if len(some) < most:
                    break
        finally:
            self.busy = False
        return got

    cdef list take(self, unsigned int most, bint finish, bint headers):
        # The GIL is let go for what may be long: many frames, or much to copy.
        cdef (uint8_t *)[NET_BURST] to
        cdef net_in *f
        cdef uint64_t total = 0
        cdef int n, i, rc
        cdef bint burst = most > 1
        cdef list got = []
        if burst:
            with nogil:
                n = net_rx_take(&self.c, self.frames, most)
        else:
            n = net_rx_take(&self.c, self.frames, 1)
        if n > 0:
            try:
                for i in range(n):
                    f = &self.frames[i]
                    data = PyBytes_FromStringAndSize(NULL, f.len)
                    to[i] = <uint8_t *>PyBytes_AS_STRING(data)
                    total += f.len
                    got.append((data, (<char *>&f.header)[:NET_HDR_MAX]) if headers else data)
            except BaseException:
                net_rx_release(&self.c)
                raise
        if burst or total > 16384:
            with nogil:
                rc = self.copy(to, n, finish)
        else:
            rc = self.copy(to, n, finish)
        if n < 0:
            self.spoiled(n)
        if rc < 0:
            failed(self.queue, rc)
        return got

    cdef int copy(self, uint8_t **to, int n, bint finish) noexcept nogil:
        cdef int i
        cdef net_in *f
        for i in range(n):
            f = &self.frames[i]
            net_rx_copy(&self.c, f, to[i])
            if finish and f.header.flags & NET_HDR_F_NEEDS_CSUM:
                net_finish_csum(to[i], f.len, &f.header)
        return net_rx_release(&self.c)

    def pump(self, frame, count=None, timeout=None, *, seq_at=None, uint64_t seq=0):
        cdef net_pump p
        cdef Py_buffer view
        cdef int64_t deadline = 0x7fffffffffffffff, until
        cdef int rc = 0, call = self.queue.call_fd
        if timeout is not None:
            deadline = time.monotonic_ns() + <int64_t>(timeout * 1e9)
        self.enter()
        try:
            set_pump(&p, self.queue, frame, &view, seq_at, seq, count)
            try:
                while True:
                    until = next_look(deadline)
                    with nogil:
                        rc = net_rx_pump(&self.c, &p, call, until)
                    PyErr_CheckSignals()
                    if (rc and rc != -EINTR) or not p.count or time.monotonic_ns() >= deadline:
                        break
            finally:
                PyBuffer_Release(&view)
        finally:
            self.busy = False
        if rc and rc != -EINTR:
            self.spoiled(rc)
        return (p.frames, p.lost, p.repeated, p.others)
