# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""For the engines of the devices, which derive from these two."""

from vhost._core cimport *
from vhost.device_queue cimport DeviceQueue


cdef class Engine:
    cdef engine c
    cdef Engine of  # whose workers they are; None: its own
    cdef engine *serving  # of these
    cdef bint ready
    cdef dict attached  # DeviceQueue: EngineQueue

    cdef int hand_over(self, EngineQueue one, unsigned int worker) except -1
    cdef int take_back(self, EngineQueue one) except -1


cdef class EngineQueue:
    cdef engine_queue *engine  # within what the deriving class has
    cdef const engine_ops *ops
    cdef int source
    cdef DeviceQueue queue
