# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A virtqueue as the device sees it: the Python face of csrc/device_*.c.

Takes chains off the ring and gives them back. Knows rings and memory; knows neither devices nor how kicks
arrive.
"""

cimport cython
from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint32_t, uint64_t

from vhost._chain_pool cimport pool_destroy, pool_empty, pool_init, pool_keep
from vhost._core cimport *
from vhost._device_ring cimport DeviceRing
from vhost._look_ahead cimport (
    QUEUE_BATCH,
    ahead_any,
    ahead_batch,
    ahead_empty,
    ahead_found,
    ahead_init,
    ahead_make_room,
    ahead_next,
)
from vhost._ring cimport signal
from vhost.chain cimport Chain, length_of, plain_length
from vhost.py_refs cimport FREE_THREADED, PyList_GET_ITEM, drop_references

from vhost.errors import InvalidQueue

__all__ = ["DeviceQueue"]

cdef enum:
    BUDGET = 256     # chains that a loop serves, unless it is told otherwise
    LOOP_AHEAD = 64  # and pops at once: not so many that they leave the cache before their turn


@cython.final
@cython.no_gc
cdef class DeviceQueue(DeviceRing):
    def __cinit__(self):
        # The arguments are the ring's (see DeviceRing), which is set up before.
        self.most = BUDGET
        ahead_init(&self.ahead)
        pool_init(&self.pool, self.vq.num)

    def __dealloc__(self):
        # Also of one whose ring was refused: then this is all zeros.
        ahead_empty(&self.ahead)
        pool_destroy(&self.pool)

    cdef void drop_idle(self) noexcept:
        ahead_empty(&self.ahead)
        pool_empty(&self.pool)

    @property
    def budget(self):
        return self.most

    @budget.setter
    def budget(self, uint32_t chains):
        if not chains:
            raise ValueError("budget 0: a loop serves at least 1 chain")
        self.most = chains

    # ------------------------------------------------------------------ from the driver

    cdef int fetch(self, uint32_t most) except -2:
        # With nothing ahead: pops up to `most` chains, or QUEUE_BATCH. How many, or -1.
        cdef (vhost_chain *)[QUEUE_BATCH] room
        cdef uint32_t n = ahead_make_room(&self.ahead, most, &self.pool, self.memory, room)
        cdef int got = virtqueue_pop_batch(&self.vq, room, n)
        ahead_found(&self.ahead, max(got, 0), n)
        if got > 0:
            # What is wrong with the one behind them is found again by who comes to it.
            self.vq.report.fault = VQ_OK
        return got

    cdef void settle(self) noexcept:
        while ahead_any(&self.ahead):
            self.ahead.end -= 1
            self.ahead.found_end = False
            virtqueue_unpop(&self.vq, &(<Chain>self.ahead.chains[self.ahead.end]).c)

    @cython.critical_section
    def __iter__(self):
        cdef Drain drain
        self.must_work()
        drain = Drain.__new__(Drain)
        drain.queue = self
        drain.going = True
        drain.left = self.most
        drain.rearm = not self.vq.notify_off
        if drain.rearm:
            virtqueue_disable_notification(&self.vq)
        self.draining += 1
        self.ahead.found_end = False
        return drain

    @cython.critical_section
    def pop(self):
        cdef int got
        self.must_work()
        if not ahead_any(&self.ahead):
            got = self.fetch(1)
            if got < 0:
                self.fail()
            if not got:
                self.check_memory()
                return None
        return ahead_next(&self.ahead, <PyObject *>self)

    @cython.critical_section
    def pop_batch(self, uint32_t n=32):
        cdef list more, batch = None
        cdef int got
        while True:
            if batch is None:
                self.must_work()
            elif self.closed or self.reason is not None:
                return batch  # a finalizer did that, see ahead_batch()
            if not ahead_any(&self.ahead):
                got = self.fetch(n)
                if got <= 0:
                    break
            more = ahead_batch(&self.ahead, <PyObject *>self, n)
            batch = more if batch is None else batch + more
            n -= <uint32_t>len(more)
            if not n or self.ahead.found_end:
                return batch
        if batch is not None:
            return batch  # a fault is sticky: the next call says it
        if got < 0:
            self.fail()
        self.check_memory()
        return []

    def unpop(self, Chain chain not None):
        with cython.critical_section(self, chain):
            self.must_be_open()
            self.settle()
            if chain.queue != <PyObject *>self or virtqueue_unpop(&self.vq, &chain.c):
                raise InvalidQueue(f"{self.name}: chain {chain.c.id} is not the one that was popped last")
            if unlikely(self.vq.log != NULL):
                self.mark(chain, 0)
            self.let_go(<PyObject *>chain)

    @cython.critical_section
    def has_work(self):
        if self.closed or self.reason is not None or self.vq.report.fault:
            return False
        return ahead_any(&self.ahead) or virtqueue_has_work(&self.vq)

    # ------------------------------------------------------------------ to the driver

    cdef inline int must_be_ours(self, Chain chain) except -1:
        if unlikely(chain.queue != <PyObject *>self):
            self.must_be_open()
            chain.must_be_out()
            raise InvalidQueue(f"{self.name}: chain {chain.c.id} was popped from another queue")
        return 0

    cdef inline void let_go(self, PyObject *chain) noexcept:
        # It is not out any more. The caller holds another reference to this queue.
        (<Chain>chain).queue = NULL
        drop_references(<PyObject *>self, 1)
        self.keep(chain)

    cdef inline void keep(self, PyObject *chain) noexcept:
        if (<Chain>chain).memory is self.memory:
            pool_keep(&self.pool, chain)

    cdef inline int stage(self, Chain chain, int64_t written, bint publish) except -1:
        cdef int rc
        self.must_be_open()
        if not 0 <= written <= chain.c.in_len:
            raise ValueError(
                f"{self.name}: chain {chain.c.id}: {written} bytes written,"
                f" but only {chain.c.in_len} are writable"
            )
        if unlikely(self.vq.log != NULL):
            self.mark(chain, <uint32_t>written)
        if publish:
            rc = virtqueue_push(&self.vq, chain.c.id, <uint32_t>written)
        else:
            rc = virtqueue_fill(&self.vq, chain.c.id, <uint32_t>written)
        if rc:
            raise InvalidQueue(f"{self.name}: chain {chain.c.id} cannot be given back (error {-rc})")
        self.let_go(<PyObject *>chain)
        if publish:
            self.published()
        return 0

    cdef inline int give(self, Chain chain, object written, bint publish) except -1:
        # The length may be an object whose __index__ does anything: before the look at whose the chain is.
        cdef int64_t length = 0 if written is None else length_of(written)
        with cython.critical_section(self, chain):
            self.must_be_ours(chain)
            self.stage(chain, chain.use.written if written is None else length, publish)
        return 0

    cdef Py_ssize_t give_batch(self, list batch, Py_ssize_t start, list lengths) except -1:
        # Chains from `start` on, at most QUEUE_BATCH. How many were staged before the first that is not as
        # most are.
        cdef virtqueue_used[QUEUE_BATCH] used
        cdef int64_t n_written
        cdef Py_ssize_t i, n = min(<Py_ssize_t>QUEUE_BATCH, len(batch) - start)
        cdef PyObject *chain
        if FREE_THREADED or self.closed or self.vq.log != NULL:
            return 0  # where no lock is everybody's, each chain has its own to be taken: see give()
        for i in range(n):
            chain = PyList_GET_ITEM(<PyObject *>batch, start + i)
            if type(<object>chain) is not Chain or (<Chain>chain).queue != <PyObject *>self:
                break
            n_written = (<Chain>chain).use.written
            if lengths is not None:
                n_written = plain_length(PyList_GET_ITEM(<PyObject *>lengths, start + i))
                if <uint64_t>n_written > <uint64_t>0xffffffff:
                    break
            used[i].id = (<Chain>chain).c.id
            used[i].written = <uint32_t>n_written
        else:
            i = n
        n = virtqueue_fill_batch(&self.vq, used, <unsigned int>i)
        for i in range(n):
            chain = PyList_GET_ITEM(<PyObject *>batch, start + i)
            (<Chain>chain).queue = NULL
            self.keep(chain)
        drop_references(<PyObject *>self, n)
        return n

    cdef inline int published(self) except -1:
        # A loop tells the driver at its end.
        if not self.draining:
            self.tell_driver()
        return 0

    cdef int take_back(self, Chain chain, uint32_t written) except -1:
        # As push, for the chain itself, which knew that it was out before it let others in.
        with cython.critical_section(self, chain):
            self.must_be_ours(chain)
            self.stage(chain, written, True)
        return 0

    def push(self, Chain chain not None, written=None):
        self.give(chain, written, True)

    def push_batch(self, chains, written=None):
        cdef list batch = chains if type(chains) is list else list(chains)
        cdef Py_ssize_t staged, i = 0
        cdef list lengths = None
        if written is not None:
            lengths = written if type(written) is list else list(written)
            if len(lengths) != len(batch):
                raise ValueError(f"{self.name}: {len(batch)} chains, but {len(lengths)} lengths")
        try:
            while i < len(batch):
                staged = self.give_batch(batch, i, lengths)
                if not staged:
                    self.give(<Chain?>batch[i], None if lengths is None else lengths[i], False)
                    staged = 1
                i += staged
        finally:
            # Those before one that was refused are given back.
            with cython.critical_section(self):
                if not self.closed:
                    virtqueue_flush(&self.vq)
                    self.published()

    def fill(self, Chain chain not None, written=None):
        self.give(chain, written, False)

    @cython.critical_section
    def flush(self):
        self.must_be_open()
        virtqueue_flush(&self.vq)
        self.tell_log()

    cdef int mark(self, Chain chain, uint32_t written) except -1:
        # What a view was made of may have been written by anybody.
        virtqueue_log_chain(
            &self.vq, chain.memory.c, &chain.c, max(written, chain.use.written, chain.use.touched)
        )
        return 0

    cdef int refuse(self, Chain chain, virtqueue_fault fault, uint32_t value, uint32_t limit) except -1:
        # As an engine would: no request that could even be answered.
        self.must_work()
        self.settle()
        self.vq.report.fault = fault
        self.vq.report.head = chain.c.id
        self.vq.report.value = value
        self.vq.report.limit = limit
        self.fail()

    def __repr__(self):
        kind = "packed" if self.vq.is_packed else "split"
        return f"<DeviceQueue {self.name} ({self.index}): {kind}, {self.vq.num} slots>"


@cython.final
@cython.no_gc
@cython.auto_pickle(False)
@cython.freelist(8)
cdef class Drain:
    """One run of ``for chain in queue``. However the loop ends, the end of this object ends the drain."""

    cdef DeviceQueue queue
    cdef uint32_t left
    cdef bint rearm  # kicks were asked for before, and are not now
    cdef bint going  # and `queue` counts it among its loops

    def __iter__(self):
        return self

    def __next__(self):
        cdef Chain chain = None
        with cython.critical_section(self.queue):
            # Nothing is ahead of a queue that is closed or broken.
            if self.going and (ahead_any(&self.queue.ahead) and self.left or self.look()):
                self.left -= 1
                chain = ahead_next(&self.queue.ahead, <PyObject *>self.queue)
        if chain is None:
            raise StopIteration  # out here, it makes no exception object
        return chain

    cdef bint look(self) except -1:
        # Chains are ahead, or the drain is at its end.
        cdef DeviceQueue queue = self.queue
        cdef uint32_t most = LOOP_AHEAD
        cdef int got
        queue.must_work()
        if queue.iotlb is not None or queue.inflight is not None:
            most = 1  # where a mapping can be lost, or each pop is written down, none comes before its turn
        while self.left:
            if not queue.ahead.found_end or not self.rearm:
                got = queue.fetch(min(self.left, most))
                if got > 0:
                    return True
                if got < 0:
                    queue.fail()
                queue.check_memory()
            # Empty, but what comes between that look and the re-arming makes no kick: look again. That
            # counts as a chain, lest an index that flickers keep us here.
            self.left -= 1
            if not self.rearm:
                break
            if not virtqueue_enable_notification(&queue.vq):
                self.rearm = False
                break
            virtqueue_disable_notification(&queue.vq)
            queue.ahead.found_end = False
        self.finish(True)
        return False

    cdef int finish(self, bint again) except -1:
        cdef DeviceQueue queue = self.queue
        self.going = False
        queue.draining -= 1
        queue.settle()
        if queue.closed:
            return 0
        if self.rearm and queue.reason is None and virtqueue_enable_notification(&queue.vq) and again:
            # The budget is spent, and for what is left no kick will come.
            signal(queue.kick)
        if not queue.draining:
            queue.tell_driver()
        return 0

    cdef void abandon(self) noexcept:
        with cython.critical_section(self.queue):
            self.finish(False)

    def __dealloc__(self):
        if self.going:
            self.abandon()
