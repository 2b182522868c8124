# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
from libc.stdint cimport uint32_t

from vhost.memory cimport Region


cdef class InflightRegion:
    cdef readonly Region region
    cdef readonly uint32_t num_queues
    cdef readonly uint32_t queue_size

    cdef void *of_queue(self, str name, uint32_t index, bint packed) except NULL
