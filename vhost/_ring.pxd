# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
from libc.stdint cimport int64_t, uint32_t, uint64_t

from vhost._core cimport virtqueue_areas, virtqueue_call, virtqueue_fault_report
from vhost._iotlb cimport Iotlb
from vhost.memory cimport GuestMemory


cdef int check_num(str name, int64_t num, bint packed) except -1
cdef int find_areas(
    str name, GuestMemory memory, Iotlb iotlb, uint32_t num, bint packed, const uint64_t *addrs,
    bint user_addresses, virtqueue_areas *areas,
) except -1
cdef list missing_areas(Iotlb iotlb, uint32_t num, bint packed, const uint64_t *addrs)
cdef str fault_reason(const virtqueue_fault_report *report)
cdef int signal(int fd) except -1
cdef int tell(const virtqueue_call *call) except -1
