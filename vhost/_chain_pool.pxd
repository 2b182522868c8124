# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Chain objects to be used again. Knows neither rings nor queues."""

from cpython.object cimport PyObject
from libc.stdint cimport uint32_t
from libc.stdlib cimport calloc, free

from vhost.chain cimport Chain
from vhost.memory cimport GuestMemory
from vhost.py_refs cimport Py_DECREF, Py_INCREF, py_unique


cdef enum:
    POOL_MAX = 256  # chain objects kept; a handler has no more at a time, unless it waits for a disk
    POOL_TRIES = 2  # of them looked at for one that is free
    POOL_BUSY = 4   # times that one is found busy until it counts as taken for good


cdef struct chain_pool:
    # A chain object is used again once nobody else holds it. Given-back ones queue up, so that the oldest,
    # which is the likeliest to be free, comes first: a loop needs two objects beside those that it looks
    # ahead, a loop over batches two batches of them. All are of one memory.
    PyObject **slots
    uint32_t mask
    uint32_t head
    uint32_t count


cdef inline int pool_init(chain_pool *pool, uint32_t num) except -1:
    # Room for one more than a batch that is out, rounded up.
    cdef uint32_t slots = 2
    while slots < min(num, <uint32_t>POOL_MAX) + 1:
        slots *= 2
    pool.slots = <PyObject **>calloc(slots, sizeof(PyObject *))
    if pool.slots == NULL:
        raise MemoryError
    pool.mask = slots - 1
    return 0


cdef inline void pool_keep(chain_pool *pool, PyObject *chain) noexcept:
    if pool.count <= pool.mask:
        Py_INCREF(chain)
        pool.slots[(pool.head + pool.count) & pool.mask] = chain
        pool.count += 1


cdef inline PyObject *pool_take(chain_pool *pool) noexcept:
    # The first one, which is not the pool's any more.
    cdef PyObject *chain = pool.slots[pool.head & pool.mask]
    pool.head += 1
    pool.count -= 1
    return chain


cdef inline PyObject *pool_find(chain_pool *pool, GuestMemory memory) except NULL:
    # A free one, or else a new one, which is the caller's.
    cdef PyObject *chain
    cdef Chain new
    cdef int tries = POOL_TRIES
    while pool.count and tries:
        chain = pool_take(pool)
        if py_unique(chain):
            return chain
        (<Chain>chain).use.found_busy += 1
        if (<Chain>chain).use.found_busy < POOL_BUSY:
            pool_keep(pool, chain)
        Py_DECREF(chain)
        tries -= 1
    new = Chain.__new__(Chain)
    new.memory = memory
    Py_INCREF(<PyObject *>new)
    return <PyObject *>new


cdef inline void pool_empty(chain_pool *pool) noexcept:
    while pool.count:
        Py_DECREF(pool_take(pool))


cdef inline void pool_destroy(chain_pool *pool) noexcept:
    pool_empty(pool)
    free(pool.slots)
