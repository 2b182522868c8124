# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The network engine for Python: csrc/engine_net.h. Knows queues and wires, no device and no session."""

cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vhost._core cimport *
from vhost.device_queue cimport DeviceQueue
from vhost.devices._engine cimport Engine, EngineQueue

__all__ = ["DROPS", "FRAME_MAX", "VLAN_TAG", "NetEngine", "NetPair"]

FRAME_MAX = NET_FRAME_MAX
VLAN_TAG = NET_VLAN_TAG
DROPS = tuple((<bytes> net_drop_names[i]).decode() for i in range(1, NET_DROPS))


cdef int check_size(size_t size) except -1:
    if not NET_ETH_HDR <= size <= NET_FRAME_MAX:
        raise ValueError(f"frame of {size} bytes, must be {NET_ETH_HDR} to {NET_FRAME_MAX}")
    return 0


@cython.final
cdef class NetPair:
    """The collector's, unlike all else here: pairs refer to each other. While a queue is attached, that one
    keeps its pair, and so all that this leads to."""

    cdef net_pair c
    cdef bint ready
    cdef int users
    cdef bytes frame
    cdef NetPair peer
    cdef NetPair next
    cdef int fd

    def __cinit__(self):
        if net_pair_init(&self.c):
            raise MemoryError()
        self.ready = True
        self.fd = -1
        self.c.wire = &net_wire_drop

    def __dealloc__(self):
        if self.ready:
            net_pair_destroy(&self.c)

    cdef int must_be_idle(self) except -1:
        if self.users:
            raise ValueError(f"{self.users} queue(s) of the pair are attached")
        return 0

    def configure(
        self,
        *,
        uint32_t hdr_len,
        bint mergeable,
        uint32_t longest,
        bint host_csum,
        uint8_t host_gso,
        bint guest_csum,
        uint8_t guest_gso,
    ):
        self.must_be_idle()
        if hdr_len not in (NET_HDR_LEGACY, NET_HDR_MAX) or (mergeable and hdr_len != NET_HDR_MAX):
            raise ValueError(f"header of {hdr_len} bytes")
        self.c.rules.hdr_len = self.c.rx.hdr_len = hdr_len
        self.c.rules.longest = self.c.rx.longest = longest
        self.c.rules.offloads.csum = host_csum
        self.c.rules.offloads.gso = host_gso
        self.c.rx.mergeable = mergeable
        self.c.rx.offloads.csum = guest_csum
        self.c.rx.offloads.gso = guest_gso

    def connect(self, NetPair peer not None):
        self.must_be_idle()
        self.peer = peer if peer is not self else None
        self.c.peer = &peer.c
        self.c.wire = &net_wire_peer

    def join(self, NetPair next not None):
        self.must_be_idle()
        self.next = next if next is not self else None
        self.c.next = &next.c

    def disconnect(self):
        self.must_be_idle()
        self.c.wire = &net_wire_drop
        self.c.peer = self.c.next = NULL
        self.peer = self.next = None

    def open(self, int fd, bint socket):
        self.must_be_idle()
        if net_fd_connect(&self.c, fd, socket):
            raise MemoryError()
        self.fd = fd

    def repeat(self, bytes frame not None):
        check_size(len(frame))
        self.must_be_idle()
        self.frame = frame
        self.c.source = <const uint8_t *> <const char *> frame
        self.c.source_len = len(frame)
        self.c.wire = &net_wire_source

    def drop_disabled(self, uint64_t frames):
        self.c.counters.dropped[NET_DROP_DISABLED] += frames

    def counters(self):
        cdef net_counters *c = &self.c.counters
        found = {
            "tx_frames": c.tx_frames,
            "tx_bytes": c.tx_bytes,
            "rx_frames": c.rx_frames,
            "rx_bytes": c.rx_bytes,
        }
        for i, name in enumerate(DROPS, 1):
            found[f"dropped_{name}"] = c.dropped[i]
        return found


@cython.final
@cython.no_gc
cdef class NetEngine(Engine):
    def attach(self, DeviceQueue queue not None, NetPair pair not None, unsigned int worker, bint transmit):
        cdef _NetQueue one = _NetQueue(queue)
        one.pair = pair
        pair.users += 1
        one.c.pair = &pair.c
        if transmit:
            one.ops = &net_transmit_ops
        else:
            one.ops = &net_receive_ops
            one.source = pair.fd
        self.hand_over(one, worker)

    def deliver(self, DeviceQueue queue not None, bytes frame not None):
        cdef _NetQueue one = self.attached.get(queue)
        cdef const char *data = frame
        cdef uint32_t size = len(frame)
        if one is None or one.ops != &net_receive_ops:
            raise ValueError(f"{queue.name} is no receive queue that is attached")
        check_size(size)
        with nogil:
            net_queue_deliver(&one.c, data, size)


@cython.final
@cython.no_gc
cdef class _NetQueue(EngineQueue):
    cdef net_queue c
    cdef NetPair pair

    def __cinit__(self, DeviceQueue queue):
        self.engine = &self.c.engine

    def __dealloc__(self):
        if self.pair is not None:
            self.pair.users -= 1
