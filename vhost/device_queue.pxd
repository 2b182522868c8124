# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint32_t

from vhost._chain_pool cimport chain_pool
from vhost._device_ring cimport DeviceRing
from vhost._look_ahead cimport look_ahead
from vhost.chain cimport Chain


cdef class DeviceQueue(DeviceRing):
    cdef chain_pool pool
    cdef look_ahead ahead
    cdef uint32_t most  # chains that one drain serves
    cdef int draining   # loops that go on

    cdef int fetch(self, uint32_t most) except -2
    cdef inline int must_be_ours(self, Chain chain) except -1
    cdef inline void let_go(self, PyObject *chain) noexcept
    cdef inline void keep(self, PyObject *chain) noexcept
    cdef inline int stage(self, Chain chain, int64_t written, bint publish) except -1
    cdef inline int give(self, Chain chain, object written, bint publish) except -1
    cdef Py_ssize_t give_batch(self, list batch, Py_ssize_t start, list lengths) except -1
    cdef inline int published(self) except -1
    cdef int mark(self, Chain chain, uint32_t written) except -1
