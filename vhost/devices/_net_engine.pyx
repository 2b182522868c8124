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


@cython.final
@cython.no_gc
cdef class NetPair:
    """Refers to no pair but by address: those that are connected to each other are kept by their queues,
    while these are attached."""

    cdef net_pair c
    cdef bint ready
    cdef bytes frame

    def __cinit__(self):
        if net_pair_init(&self.c):
            raise MemoryError()
        self.ready = True
        self.c.wire = &net_wire_drop

    def __dealloc__(self):
        if self.ready:
            net_pair_destroy(&self.c)

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
        if hdr_len not in (NET_HDR_LEGACY, NET_HDR_MAX) or (mergeable and hdr_len != NET_HDR_MAX):
            raise ValueError(f"header of {hdr_len} bytes")
        self.c.rules.hdr_len = self.c.rx.hdr_len = hdr_len
        self.c.rules.longest = self.c.rx.longest = longest
        self.c.rules.offloads.csum = host_csum
        self.c.rules.offloads.gso = host_gso
        self.c.rx.mergeable = mergeable
        self.c.rx.offloads.csum = guest_csum
        self.c.rx.offloads.gso = guest_gso

    def echo(self):
        self.c.peer = &self.c
        self.c.wire = &net_wire_peer

    def repeat(self, bytes frame not None):
        if not NET_ETH_HDR <= len(frame) <= NET_FRAME_MAX:
            raise ValueError(f"frame of {len(frame)} bytes, must be {NET_ETH_HDR} to {NET_FRAME_MAX}")
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
        one.c.pair = &pair.c
        one.ops = &net_transmit_ops if transmit else &net_receive_ops
        self.hand_over(one, worker)


@cython.final
@cython.no_gc
cdef class _NetQueue(EngineQueue):
    cdef net_queue c
    cdef NetPair pair

    def __cinit__(self, DeviceQueue queue):
        self.engine = &self.c.engine
