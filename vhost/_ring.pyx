# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What the device's and the driver's queue share: where a ring lies, faults in words, eventfds.

Knows the layout of rings, not their contents.
"""

import os

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from vhost._core cimport (
    IOTLB_READ,
    IOTLB_WRITE,
    VRING_DESC_ALIGN,
    VRING_PACKED_EVENT_ALIGN,
    VRING_PACKED_NUM_MAX,
    VRING_SPLIT_AVAIL_ALIGN,
    VRING_SPLIT_NUM_MAX,
    VRING_SPLIT_USED_ALIGN,
    call_driver,
    eventfd_signal,
    guest_memory_area,
    guest_memory_user_area,
    iotlb_area,
    iotlb_miss,
    iotlb_missing,
    virtqueue_areas,
    virtqueue_call,
    virtqueue_fault_report,
    virtqueue_fault_text,
    vring_desc_size,
    vring_device_size,
    vring_driver_size,
)
from vhost._iotlb cimport Iotlb
from vhost.memory cimport GuestMemory

from vhost.errors import InvalidQueue


cdef int check_num(str name, int64_t num, bint packed) except -1:
    # 2.7 and 2.8: only the split ring needs a power of two.
    if packed:
        if not 0 < num <= VRING_PACKED_NUM_MAX:
            raise InvalidQueue(f"{name}: num {num}: a packed ring has 1 to {VRING_PACKED_NUM_MAX} slots")
    elif not 0 < num <= VRING_SPLIT_NUM_MAX or num & (num - 1):
        raise InvalidQueue(
            f"{name}: num {num}: a split ring has a power of two of slots, at most {VRING_SPLIT_NUM_MAX}"
        )
    return 0


cdef void ring_sizes(uint32_t num, bint packed, uint64_t *sizes) noexcept:
    sizes[0] = vring_desc_size(num)
    sizes[1] = vring_driver_size(num, packed)
    sizes[2] = vring_device_size(num, packed)


cdef void ring_access(bint packed, uint32_t *access) noexcept:
    # What a device does with each area. A split used ring is read once, for the index to go on from.
    access[0] = IOTLB_READ | IOTLB_WRITE if packed else IOTLB_READ
    access[1] = IOTLB_READ
    access[2] = IOTLB_READ | IOTLB_WRITE


cdef int find_areas(
    str name, GuestMemory memory, Iotlb iotlb, uint32_t num, bint packed, const uint64_t *addrs,
    bint user_addresses, virtqueue_areas *areas,
) except -1:
    cdef uint64_t[3] sizes
    cdef uint64_t[3] aligns
    cdef uint32_t[3] access
    cdef (uint8_t *)[3] hosts
    cdef Py_ssize_t i, j
    cdef str kind = "IOVA" if iotlb is not None else "user address" if user_addresses else "guest address"
    cdef tuple what = (
        ("descriptor ring", "driver event area", "device event area")
        if packed
        else ("descriptor table", "avail ring", "used ring")
    )

    ring_sizes(num, packed, sizes)
    ring_access(packed, access)
    aligns[0] = VRING_DESC_ALIGN
    aligns[1] = VRING_PACKED_EVENT_ALIGN if packed else VRING_SPLIT_AVAIL_ALIGN
    aligns[2] = VRING_PACKED_EVENT_ALIGN if packed else VRING_SPLIT_USED_ALIGN
    for i in range(3):
        if addrs[i] % aligns[i]:
            raise InvalidQueue(f"{name}: {what[i]} at {addrs[i]:#x}: no multiple of {aligns[i]}")
        if iotlb is not None:
            hosts[i] = iotlb_area(&iotlb.c, addrs[i], sizes[i], access[i])
        elif user_addresses:
            hosts[i] = guest_memory_user_area(memory.c, addrs[i], sizes[i])
        else:
            hosts[i] = guest_memory_area(memory.c, addrs[i], sizes[i])
        if hosts[i] == NULL:
            raise InvalidQueue(
                f"{name}: {what[i]} at {kind} {addrs[i]:#x}, size {sizes[i]:#x}:"
                f" not wholly within one of {len(memory.regions)} memory regions"
            )
        # A region may be mapped from any offset of its file.
        if <uint64_t>hosts[i] % aligns[i]:
            raise InvalidQueue(
                f"{name}: {what[i]} at {kind} {addrs[i]:#x}: its region's mmap offset"
                f" is no multiple of {aligns[i]}"
            )
        # They lie in memory, so no sum wraps.
        for j in range(i):
            if addrs[i] < addrs[j] + sizes[j] and addrs[j] < addrs[i] + sizes[i]:
                raise InvalidQueue(
                    f"{name}: {what[i]} at {addrs[i]:#x}, size {sizes[i]:#x} overlaps"
                    f" the {what[j]} at {addrs[j]:#x}, size {sizes[j]:#x}"
                )
    areas.desc = hosts[0]
    areas.avail = hosts[1]
    areas.used = hosts[2]
    return 0


cdef list missing_areas(Iotlb iotlb, uint32_t num, bint packed, const uint64_t *addrs):
    cdef uint64_t[3] sizes
    cdef uint32_t[3] access
    cdef iotlb_miss miss
    cdef list found = []

    ring_sizes(num, packed, sizes)
    ring_access(packed, access)
    for i in range(3):
        miss = iotlb_missing(&iotlb.c, addrs[i], sizes[i], access[i])
        if miss.access:
            found.append((miss.iova, miss.access))
    return found


def ring_misses(Iotlb iotlb not None, uint32_t num, bint packed, desc, avail, used):
    cdef uint64_t[3] addrs
    addrs[0] = desc
    addrs[1] = avail
    addrs[2] = used
    return missing_areas(iotlb, num, packed, addrs)


def ring_areas(str name not None, GuestMemory memory not None, int64_t num, bint packed, desc, avail, used):
    cdef virtqueue_areas areas
    cdef uint64_t[3] addrs
    check_num(name, num, packed)
    addrs[0] = desc
    addrs[1] = avail
    addrs[2] = used
    find_areas(name, memory, None, num, packed, addrs, False, &areas)
    return <uint64_t>areas.desc, <uint64_t>areas.avail, <uint64_t>areas.used


cdef str fault_reason(const virtqueue_fault_report *report):
    text = virtqueue_fault_text(report.fault).decode()
    limit = f", limit {report.limit:#x}" if report.limit else ""
    return f"{text} (chain {report.head}, value {report.value:#x}{limit})"


cdef int signal(int fd) except -1:
    cdef int rc
    # Without the GIL: should the peer find a way to make us wait, it is for this thread alone.
    with nogil:
        rc = eventfd_signal(fd)
    if rc:
        raise OSError(-rc, f"eventfd {fd}: {os.strerror(-rc)}")
    return 0


def signal_eventfd(int fd):
    signal(fd)


cdef int tell(const virtqueue_call *call) except -1:
    cdef int rc
    with nogil:
        rc = call_driver(call)
    if rc:
        kind = f"VDUSE interrupt of ring {call.vq}, descriptor" if call.vduse else "eventfd"
        raise OSError(-rc, f"{kind} {call.fd}: {os.strerror(-rc)}")
    return 0
