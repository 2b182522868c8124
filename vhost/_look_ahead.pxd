# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Chains that a queue popped before anybody asked for them. Knows their objects, not the ring.

A call to the ring costs less if it gives several chains, so it pops more than are asked for. They go to
whoever asks next, and back to the ring (DeviceQueue.settle) before anybody asks for what depends on them:
to the outside, they were never popped.
"""

from cpython.list cimport PyList_New
from cpython.object cimport PyObject
from libc.stdint cimport uint32_t
from libc.string cimport memmove

from vhost._chain_pool cimport chain_pool, pool_find
from vhost._core cimport vhost_chain
from vhost.chain cimport Chain, chain_start
from vhost.memory cimport GuestMemory
from vhost.py_refs cimport Py_DECREF, PyList_SET_ITEM, handed_over, take_references


cdef enum:
    QUEUE_BATCH = 128  # chains that go to the ring or come from it with one call


cdef struct look_ahead:
    (PyObject *)[QUEUE_BATCH] chains
    uint32_t next    # of those that are popped, but seen by nobody yet:
    uint32_t end     # behind the last of them;
    uint32_t room    # and behind the free objects that follow
    uint32_t likely  # chains that the next pop may find: as the last burst, and one more,
    uint32_t burst   # of which there have been this many
    bint found_end   # there were fewer than the last pop had room for


cdef inline void ahead_init(look_ahead *ahead) noexcept:
    ahead.likely = 1


cdef inline bint ahead_any(look_ahead *ahead) noexcept:
    return ahead.end > ahead.next


cdef inline int ahead_make_room(
    look_ahead *ahead, uint32_t most, chain_pool *pool, GuestMemory memory, vhost_chain **room
) except -1:
    # With nothing ahead: makes room for as many as are likely to be there, at most `most`, and says for how
    # many. Objects that are free already come first.
    cdef uint32_t i, n = min(most, ahead.likely)
    ahead.room -= ahead.end
    memmove(ahead.chains, ahead.chains + ahead.end, ahead.room * sizeof(PyObject *))
    ahead.next = ahead.end = 0
    while ahead.room < n:
        ahead.chains[ahead.room] = pool_find(pool, memory)
        ahead.room += 1
    for i in range(n):
        room[i] = &(<Chain>ahead.chains[i]).c
    return n


cdef inline void ahead_found(look_ahead *ahead, uint32_t got, uint32_t room) noexcept:
    # So many were popped into the room that was made.
    ahead.end = got
    ahead.found_end = got < room
    ahead.burst = min(ahead.burst + got, <uint32_t>QUEUE_BATCH - 1)
    ahead.likely = max(ahead.likely, ahead.burst + 1)
    if ahead.found_end:
        ahead.likely = ahead.burst + 1
        ahead.burst = 0


cdef inline Chain ahead_next(look_ahead *ahead, PyObject *queue):
    # The first of them, which `queue` popped.
    cdef PyObject *chain = ahead.chains[ahead.next]
    ahead.next += 1
    take_references(queue, 1)
    chain_start(<Chain>chain, queue)
    return handed_over(chain)


cdef inline list ahead_batch(look_ahead *ahead, PyObject *queue, uint32_t most):
    # Up to `most` of them. Before CPython 3.12, the collector may run when the list is made, and a finalizer use
    # the queue: what is ahead is looked at behind that.
    cdef uint32_t i, n = min(ahead.end - ahead.next, most)
    cdef PyObject *chain
    cdef list batch = PyList_New(n)
    while n > ahead.end - ahead.next:
        n = ahead.end - ahead.next
        batch = PyList_New(n)
    for i in range(n):
        chain = ahead.chains[ahead.next + i]
        chain_start(<Chain>chain, queue)
        PyList_SET_ITEM(<PyObject *>batch, i, chain)
    take_references(queue, n)
    ahead.next += n
    return batch


cdef inline void ahead_empty(look_ahead *ahead) noexcept:
    # Of free objects, and of what is ahead, which the ring then never gets back: who needs it settles first.
    while ahead.room > ahead.next:
        ahead.room -= 1
        Py_DECREF(ahead.chains[ahead.room])
    ahead.end = ahead.next
