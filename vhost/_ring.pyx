# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What the device's and the driver's queue share: where a ring lies, faults in words, eventfds.

Knows the layout of rings, not their contents.
"""

import os

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from vhost._core cimport (
    VRING_DESC_ALIGN,
    VRING_PACKED_EVENT_ALIGN,
    VRING_PACKED_NUM_MAX,
    VRING_SPLIT_AVAIL_ALIGN,
    VRING_SPLIT_NUM_MAX,
    VRING_SPLIT_USED_ALIGN,
    eventfd_signal,
    guest_memory_area,
    guest_memory_user_area,
    virtqueue_areas,
    virtqueue_fault_report,
    virtqueue_fault_text,
    vring_desc_size,
    vring_device_size,
    vring_driver_size,
)
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


cdef int find_areas(
    str name, GuestMemory memory, uint32_t num, bint packed, const uint64_t *addrs,
    bint user_addresses, virtqueue_areas *areas,
) except -1:
    cdef uint64_t[3] sizes
    cdef uint64_t[3] aligns
    cdef (uint8_t *)[3] hosts
    cdef Py_ssize_t i, j
    cdef str kind = "user" if user_addresses else "guest"
    cdef tuple what = (
        ("descriptor ring", "driver event area", "device event area")
        if packed
        else ("descriptor table", "avail ring", "used ring")
    )

    sizes[0] = vring_desc_size(num)
    sizes[1] = vring_driver_size(num, packed)
    sizes[2] = vring_device_size(num, packed)
    aligns[0] = VRING_DESC_ALIGN
    aligns[1] = VRING_PACKED_EVENT_ALIGN if packed else VRING_SPLIT_AVAIL_ALIGN
    aligns[2] = VRING_PACKED_EVENT_ALIGN if packed else VRING_SPLIT_USED_ALIGN
    for i in range(3):
        if addrs[i] % aligns[i]:
            raise InvalidQueue(f"{name}: {what[i]} at {addrs[i]:#x}: no multiple of {aligns[i]}")
        if user_addresses:
            hosts[i] = guest_memory_user_area(memory.c, addrs[i], sizes[i])
        else:
            hosts[i] = guest_memory_area(memory.c, addrs[i], sizes[i])
        if hosts[i] == NULL:
            raise InvalidQueue(
                f"{name}: {what[i]} at {kind} address {addrs[i]:#x}, size {sizes[i]:#x}:"
                f" not wholly within one of {len(memory.regions)} memory regions"
            )
        # A region may be mapped from any offset of its file.
        if <uint64_t>hosts[i] % aligns[i]:
            raise InvalidQueue(
                f"{name}: {what[i]} at {kind} address {addrs[i]:#x}: its region's mmap offset"
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


def ring_areas(str name not None, GuestMemory memory not None, int64_t num, bint packed, desc, avail, used):
    cdef virtqueue_areas areas
    cdef uint64_t[3] addrs
    check_num(name, num, packed)
    addrs[0] = desc
    addrs[1] = avail
    addrs[2] = used
    find_areas(name, memory, num, packed, addrs, False, &areas)
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
