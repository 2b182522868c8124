# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
from vhost._core cimport dirty_log
from vhost.memory cimport Region


cdef class DirtyLog:
    cdef readonly Region region  # keeps `c` mapped; its addresses mean nothing
    cdef dirty_log c

    cdef int use(self, Region region) except -1
