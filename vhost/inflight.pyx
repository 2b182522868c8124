# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The buffer of in-flight tracking, as a device has it. Knows where each queue's part of it begins; what is
in there is the queues' business (csrc/inflight.h)."""

from libc.stdint cimport uint32_t, uint64_t

from vhost._core cimport INFLIGHT_ALIGN, READ_ONCE, inflight_region_size
from vhost.memory cimport Region

from vhost.errors import InvalidQueue

__all__ = ["QUEUE_SIZE_MAX", "InflightRegion", "inflight_size"]

QUEUE_SIZE_MAX = 32768


cdef int check_counts(num_queues, queue_size) except -1:
    if not 0 < num_queues <= 0xFFFF:
        raise InvalidQueue(f"in-flight buffer of {num_queues} queues, must be 1 to 65535")
    if not 0 < queue_size <= QUEUE_SIZE_MAX:
        raise InvalidQueue(f"in-flight buffer for queues of {queue_size}, must be 1 to {QUEUE_SIZE_MAX}")
    return 0


def inflight_size(num_queues, queue_size, *, bint packed):
    check_counts(num_queues, queue_size)
    return num_queues * inflight_region_size(queue_size, packed)


cdef class InflightRegion:
    def __init__(self):
        raise TypeError("InflightRegion.allocate or from_fd makes one")

    @classmethod
    def allocate(cls, num_queues, queue_size, *, bint packed=True):
        cdef InflightRegion self = cls.__new__(cls)
        self.region = Region.allocate(
            inflight_size(num_queues, queue_size, packed=packed), name="vhost-inflight"
        )
        self.num_queues, self.queue_size = num_queues, queue_size
        return self

    @classmethod
    def from_fd(cls, int fd, size, *, num_queues, queue_size, offset=0):
        cdef InflightRegion self = cls.__new__(cls)
        # The smaller format; which one it is, is said when a ring starts.
        cdef object least = inflight_size(num_queues, queue_size, packed=False)
        if size < least:
            raise InvalidQueue(
                f"in-flight buffer of {size:#x} bytes: {num_queues} queues of {queue_size} need {least:#x}"
            )
        if offset % INFLIGHT_ALIGN:
            raise InvalidQueue(f"in-flight buffer at offset {offset:#x}: no multiple of {INFLIGHT_ALIGN}")
        self.region = Region.from_fd(fd, size, guest_addr=0, user_addr=0, mmap_offset=offset)
        self.num_queues, self.queue_size = num_queues, queue_size
        return self

    @property
    def size(self):
        return self.region.size

    @property
    def broken(self):
        return self.region.broken

    cdef void *of_queue(self, str name, uint32_t index, bint packed) except NULL:
        cdef uint64_t size = inflight_region_size(self.queue_size, packed)
        if index >= self.num_queues:
            raise InvalidQueue(f"{name}: the in-flight buffer is for {self.num_queues} queues only")
        if (index + 1) * size > self.region.size:
            kind = "packed" if packed else "split"
            raise InvalidQueue(
                f"{name}: in-flight buffer of {self.region.size:#x} bytes: {index + 1} {kind} queues of"
                f" {self.queue_size} need {(index + 1) * size:#x}"
            )
        return self.region.host + index * size

    def __repr__(self):
        return f"<InflightRegion of {self.num_queues} queues of {self.queue_size}>"
