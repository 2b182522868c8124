# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint32_t, uint64_t

from vhost._core cimport virtqueue, virtqueue_areas, virtqueue_call, virtqueue_log, vring_used
from vhost._iotlb cimport Iotlb
from vhost.chain cimport Chain, Origin
from vhost.dirty_log cimport DirtyLog
from vhost.inflight cimport InflightRegion
from vhost.memory cimport GuestMemory


cdef enum:
    QUEUE_BATCH = 128  # chains that go to the ring or come from it with one call


cdef class DeviceQueue(Origin):
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
    cdef uint32_t most  # chains that one drain serves
    cdef uint64_t[3] addrs
    cdef virtqueue_areas areas  # where they were found last
    cdef bint user_addresses
    cdef bint ready
    cdef int draining
    cdef str reason  # why it is broken, once somebody has asked
    cdef readonly DirtyLog dirty_log  # keeps log.map mapped
    cdef virtqueue_log log

    # Chain objects to be used again, the oldest first: see find().
    cdef PyObject **pool
    cdef uint32_t pool_mask
    cdef uint32_t pool_head
    cdef uint32_t pool_count

    # Chains that are popped, but seen by nobody yet: see fetch(). Up to `ahead_room` follow free objects.
    cdef (PyObject *)[QUEUE_BATCH] ahead
    cdef uint32_t ahead_next
    cdef uint32_t ahead_end
    cdef uint32_t ahead_room
    cdef uint32_t likely   # chains that the next pop may find: as the last burst, and one more,
    cdef uint32_t burst    # of which there have been this many
    cdef bint found_end    # there were fewer than the last pop had room for

    cdef PyObject *find(self) except NULL
    cdef PyObject *take(self) noexcept
    cdef void keep(self, PyObject *chain) noexcept
    cdef void empty_pool(self) noexcept
    cdef int fetch(self, uint32_t most) except -2
    cdef Chain next_ahead(self)
    cdef list all_ahead(self, uint32_t most)
    cdef void settle(self) noexcept
    cdef int must_be_open(self) except -1
    cdef int must_work(self) except -1
    cdef int check_memory(self) except -1
    cdef int fail(self) except -1
    cdef int look_broken(self) except -1
    cdef inline int must_be_ours(self, Chain chain) except -1
    cdef inline void let_go(self, PyObject *chain) noexcept
    cdef Py_ssize_t give_batch(self, list batch, Py_ssize_t start, list lengths) except -1
    cdef inline int stage(self, Chain chain, int64_t written) except -1
    cdef inline int give(self, Chain chain, object written, bint publish) except -1
    cdef int mark(self, Chain chain, uint32_t written) except -1
    cdef int tell_log(self) except -1
    cdef int apply_log(self) except -1
    cdef uint32_t choose_base(
        self, base, bint packed, bint big_endian, vring_used *used
    ) except? 0xffffffff
    cdef int tell_driver(self) except -1
    cdef inline int publish(self) except -1
