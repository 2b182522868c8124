# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
cimport cython
from libc.stdint cimport uint32_t, uint64_t

from vhost._core cimport (
    unlikely,
    virtqueue,
    virtqueue_areas,
    virtqueue_call,
    virtqueue_log,
    virtqueue_should_notify,
    vring_used,
)
from vhost._iotlb cimport Iotlb
from vhost._ring cimport tell
from vhost.chain cimport Origin
from vhost.dirty_log cimport DirtyLog
from vhost.inflight cimport InflightRegion
from vhost.memory cimport GuestMemory


# Said here, too: who derives from it would else believe that the collector has it.
@cython.no_gc
cdef class DeviceRing(Origin):
    # For engines that serve a queue without the GIL: while one does, nothing else may use the queue.
    cdef virtqueue vq

    cdef readonly GuestMemory memory
    cdef readonly InflightRegion inflight
    cdef readonly Iotlb iotlb  # None: without an IOMMU
    cdef readonly str name
    cdef readonly uint32_t index
    cdef readonly bint closed
    cdef public int kick
    cdef virtqueue_call to_driver  # `call`, and `call_vq` if there is one
    cdef public int err
    cdef uint64_t[3] addrs
    cdef virtqueue_areas areas  # where they were found last
    cdef bint user_addresses
    cdef bint ready
    cdef str reason  # why it is broken, once somebody has asked
    cdef readonly DirtyLog dirty_log  # keeps log.map mapped
    cdef virtqueue_log log

    # What a queue has beside the ring: chains that nobody knows to be popped go back to it; objects that
    # nobody uses are let go, with the memory that they hold.
    cdef void settle(self) noexcept
    cdef void drop_idle(self) noexcept

    cdef uint32_t choose_base(
        self, base, bint packed, bint big_endian, vring_used *used
    ) except? 0xffffffff
    cdef int apply_log(self) except -1
    cdef int tell_log(self) except -1
    cdef list find_mapped(self)
    cdef int break_for(self, str reason) except -1
    cdef int check_memory(self) except -1
    cdef int look_broken(self) except -1
    cdef int fail(self) except -1

    # On each chain's way, hence in line.

    @cython.final
    cdef inline int must_be_open(self) except -1:
        if unlikely(self.closed):
            self.fail()
        return 0

    @cython.final
    cdef inline int must_work(self) except -1:
        if unlikely(self.closed or self.reason is not None):
            self.fail()
        return 0

    @cython.final
    cdef inline int tell_driver(self) except -1:
        # What was published, if it wants that: was it told?
        if unlikely(self.vq.log != NULL):
            self.tell_log()
        if not virtqueue_should_notify(&self.vq):
            return 0
        tell(&self.to_driver)
        return 1
