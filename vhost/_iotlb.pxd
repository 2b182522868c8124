# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
from vhost._core cimport iotlb
from vhost.memory cimport GuestMemory


cdef class Iotlb:
    cdef iotlb c  # for queues, which hold this object
    cdef readonly GuestMemory memory
    cdef bint ready
