# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A virtqueue as the device sees it: the Python face of csrc/device_*.c.

Knows rings and memory; knows neither devices nor how kicks arrive.
"""

cimport cython
from cpython.list cimport PyList_New
from cpython.object cimport PyObject
from libc.errno cimport EBADMSG, ENOMEM, ERANGE
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memmove, memset

from vhost._core cimport *
from vhost._iotlb cimport Iotlb
from vhost._ring cimport check_num, fault_reason, find_areas, missing_areas, signal, tell
from vhost.chain cimport Chain, Origin, chain_start, length_of, plain_length
from vhost.dirty_log cimport DirtyLog
from vhost.inflight cimport InflightRegion
from vhost.memory cimport GuestMemory, memory_broken
from vhost.py_unique cimport FREE_THREADED, py_unique

from vhost.errors import InvalidLogAddress, InvalidQueue, QueueBroken

__all__ = ["DeviceQueue"]

cdef enum:
    POOL_MAX = 256  # chain objects kept; a handler has no more at a time, unless it waits for a disk
    BUDGET = 256
    LOOP_AHEAD = 64  # chains that a loop pops at once: not so many that they leave the cache before their turn

cdef extern from *:
    """
    /* n references at once. */
    static CYTHON_INLINE void take_references(PyObject *object, Py_ssize_t n)
    {
    #if defined(Py_GIL_DISABLED) || defined(Py_REF_DEBUG)
            while (n--)
                    Py_INCREF(object);
    #else
            Py_SET_REFCNT(object, Py_REFCNT(object) + n);
    #endif
    }

    /* The caller holds another one. */
    static CYTHON_INLINE void drop_references(PyObject *object, Py_ssize_t n)
    {
    #if defined(Py_GIL_DISABLED) || defined(Py_REF_DEBUG)
            while (n--)
                    Py_DECREF(object);
    #else
            Py_SET_REFCNT(object, Py_REFCNT(object) - n);
    #endif
    }

    #define handed_over(object) (object)
    """
    void take_references(PyObject *, Py_ssize_t) noexcept
    void drop_references(PyObject *, Py_ssize_t) noexcept
    object handed_over(PyObject *)  # a reference that was ours

cdef extern from "Python.h":
    # As they are, so that each reference is counted here and nowhere else.
    void Py_INCREF(PyObject *)
    void Py_DECREF(PyObject *)
    void PyList_SET_ITEM(PyObject *, Py_ssize_t, PyObject *)
    PyObject *PyList_GET_ITEM(PyObject *, Py_ssize_t)


@cython.final
@cython.no_gc
cdef class DeviceQueue(Origin):
    def __cinit__(
        self,
        GuestMemory memory not None,
        int64_t num,
        uint64_t desc,
        uint64_t avail,
        uint64_t used,
        *,
        bint packed=False,
        bint indirect=True,
        bint event_idx=False,
        bint in_order=False,
        bint big_endian=False,
        base=None,
        bint user_addresses=False,
        Iotlb iotlb=None,
        int kick=-1,
        int call=-1,
        call_vq=None,
        int err=-1,
        InflightRegion inflight=None,
        uint32_t index=0,
        str name not None="queue",
    ):
        cdef virtqueue_config cfg
        cdef uint32_t slots = 2

        memset(&cfg, 0, sizeof(cfg))
        self.memory = memory
        self.iotlb = iotlb
        self.name = name
        self.index = index
        self.kick = kick
        self.to_driver.fd = call
        self.to_driver.vduse = call_vq is not None
        self.to_driver.vq = call_vq or 0
        self.err = err
        self.most = BUDGET
        self.likely = 1
        self.addrs[0] = desc
        self.addrs[1] = avail
        self.addrs[2] = used
        self.user_addresses = user_addresses

        check_num(name, num, packed)
        if packed and big_endian:
            raise InvalidQueue(f"{name}: a packed ring is little-endian")  # no legacy driver has one
        find_areas(name, memory, iotlb, num, packed, self.addrs, user_addresses, &cfg.areas)
        self.areas = cfg.areas
        cfg.mem = memory.c if iotlb is None else &iotlb.c.view
        cfg.iotlb = NULL if iotlb is None else &iotlb.c
        cfg.num = num
        cfg.packed = packed
        cfg.indirect = indirect
        cfg.event_idx = event_idx
        cfg.in_order = in_order
        cfg.swapped = big_endian
        cfg.base = self.choose_base(base, packed, big_endian, <vring_used *>cfg.areas.used)
        cfg.inflight = NULL
        if inflight is not None:
            cfg.inflight = inflight.of_queue(name, index, packed)
            cfg.inflight_num = inflight.queue_size
        self.inflight = inflight
        rc = virtqueue_init(&self.vq, &cfg)
        if rc == -ENOMEM:
            raise MemoryError
        if rc == -EBADMSG:
            raise InvalidQueue(f"{name}: {fault_reason(&self.vq.report)}")
        if rc:
            raise InvalidQueue(f"{name}: base {cfg.base:#x} is none for a ring of {num}")
        self.ready = True

        # Room for one more than a batch that is out, rounded up.
        while slots < min(num, POOL_MAX) + 1:
            slots *= 2
        self.pool = <PyObject **>calloc(slots, sizeof(PyObject *))
        if self.pool == NULL:
            raise MemoryError
        self.pool_mask = slots - 1

    def __dealloc__(self):
        if self.pool != NULL:
            self.empty_pool()
            free(self.pool)
        if self.ready:
            virtqueue_destroy(&self.vq)

    cdef uint32_t choose_base(
        self, base, bint packed, bint big_endian, vring_used *used
    ) except? 0xffffffff:
        cdef uint16_t idx
        if base is None:
            # Nobody said, as old front-ends do: what was published is where it goes on.
            if packed:
                return 0x80008000
            idx = READ_ONCE(used.idx)
            return <uint16_t>(idx << 8 | idx >> 8) if big_endian else idx
        if not 0 <= base <= (0xffffffff if packed else 0xffff):
            raise InvalidQueue(f"{self.name}: base {base:#x} does not fit its {32 if packed else 16} bits")
        if packed and base <= 0xffff:
            # Some front-ends know one position only, which then is both of them. (As a pair of
            # positions it would be a full ring in flight at best.)
            return base | base << 16
        return base

    @property
    def num(self):
        return self.vq.num

    @property
    def packed(self):
        return self.vq.is_packed

    @property
    def indirect(self):
        return self.vq.indirect

    @property
    def event_idx(self):
        return self.vq.event_idx

    @property
    def in_order(self):
        return self.vq.in_order

    @property
    def big_endian(self):
        return self.vq.swapped

    @property
    @cython.critical_section
    def read_only(self):
        return self.vq.read_only

    @read_only.setter
    @cython.critical_section
    def read_only(self, bint value):
        self.vq.read_only = value

    @property
    @cython.critical_section
    def base(self):
        self.settle()
        return virtqueue_base(&self.vq)

    @property
    def device_area_size(self):
        return vring_device_size(self.vq.num, self.vq.is_packed)

    @property
    @cython.critical_section
    def in_flight(self):
        self.settle()
        return self.vq.inuse

    @property
    @cython.critical_section
    def resubmits(self):
        if self.vq.inflight == NULL:
            return 0
        return self.vq.inflight.old_num - self.vq.inflight.old_popped

    @property
    def call(self):
        return self.to_driver.fd

    @call.setter
    def call(self, int fd):
        self.to_driver.fd = fd

    @property
    def call_vq(self):
        return self.to_driver.vq if self.to_driver.vduse else None

    @property
    def budget(self):
        return self.most

    @budget.setter
    def budget(self, uint32_t chains):
        if not chains:
            raise ValueError("budget 0: a loop serves at least 1 chain")
        self.most = chains

    # ------------------------------------------------------------------ chain objects

    # A chain object is used again once nobody else holds it. Given-back ones queue up, so that the
    # oldest, which is the likeliest to be free, comes first: a loop needs two objects beside those that it
    # looks ahead, a loop over batches two batches of them. All of them hold self.memory.

    cdef PyObject *find(self) except NULL:
        # A free one, which is the caller's.
        cdef PyObject *chain
        cdef Chain new
        cdef int tries = 2
        while self.pool_count and tries:
            chain = self.take()
            if py_unique(chain):
                return chain
            # One that is found busy again and again was taken for good.
            (<Chain>chain).use.found_busy += 1
            if (<Chain>chain).use.found_busy < 4:
                self.keep(chain)
            Py_DECREF(chain)
            tries -= 1
        new = Chain.__new__(Chain)
        new.memory = self.memory
        Py_INCREF(<PyObject *>new)
        return <PyObject *>new

    cdef PyObject *take(self) noexcept:
        # The first one, which is not the pool's any more.
        cdef PyObject *chain = self.pool[self.pool_head & self.pool_mask]
        self.pool_head += 1
        self.pool_count -= 1
        return chain

    cdef void keep(self, PyObject *chain) noexcept:
        if (<Chain>chain).memory is self.memory and self.pool_count <= self.pool_mask:
            Py_INCREF(chain)
            self.pool[(self.pool_head + self.pool_count) & self.pool_mask] = chain
            self.pool_count += 1

    cdef void empty_pool(self) noexcept:
        # And what is ahead.
        while self.ahead_room > self.ahead_next:
            self.ahead_room -= 1
            Py_DECREF(self.ahead[self.ahead_room])
        self.ahead_end = self.ahead_next
        while self.pool_count:
            Py_DECREF(self.take())

    # A call to the ring costs less if it gives several chains: it pops some that nobody has asked for yet. They
    # go to whoever asks next, and back to the ring (settle) before anybody asks for what depends on them: to
    # the outside, they were never popped.

    cdef int fetch(self, uint32_t most) except -2:
        # With nothing ahead: pops up to `most` chains, or QUEUE_BATCH. How many, or -1. It makes room for as many
        # as are likely to be there, after what was there before.
        cdef (vhost_chain *)[QUEUE_BATCH] room
        cdef uint32_t i, n = min(most, self.likely)
        cdef int got
        self.ahead_room -= self.ahead_end
        memmove(self.ahead, self.ahead + self.ahead_end, self.ahead_room * sizeof(PyObject *))
        self.ahead_next = self.ahead_end = 0
        while self.ahead_room < n:
            self.ahead[self.ahead_room] = self.find()
            self.ahead_room += 1
        for i in range(n):
            room[i] = &(<Chain>self.ahead[i]).c
        got = virtqueue_pop_batch(&self.vq, room, n)
        self.ahead_end = max(got, 0)
        self.found_end = self.ahead_end < n
        self.burst = min(self.burst + self.ahead_end, <uint32_t>QUEUE_BATCH - 1)
        self.likely = max(self.likely, self.burst + 1)
        if self.found_end:
            self.likely = self.burst + 1
            self.burst = 0
        if got > 0:
            # What is wrong with the one behind them is found again by who comes to it.
            self.vq.report.fault = VQ_OK
        return got

    cdef inline Chain next_ahead(self):
        # The first of those that are ahead.
        cdef PyObject *chain = self.ahead[self.ahead_next]
        self.ahead_next += 1
        take_references(<PyObject *>self, 1)
        chain_start(<Chain>chain, <PyObject *>self)
        return handed_over(chain)

    cdef list all_ahead(self, uint32_t most):
        # Up to `most` of them.
        cdef uint32_t i, n = min(self.ahead_end - self.ahead_next, most)
        cdef PyObject **chains = self.ahead + self.ahead_next
        cdef list batch = PyList_New(n)
        for i in range(n):
            chain_start(<Chain>chains[i], <PyObject *>self)
            PyList_SET_ITEM(<PyObject *>batch, i, chains[i])
        take_references(<PyObject *>self, n)
        self.ahead_next += n
        return batch

    cdef void settle(self) noexcept:
        while self.ahead_end > self.ahead_next:
            self.ahead_end -= 1
            virtqueue_unpop(&self.vq, &(<Chain>self.ahead[self.ahead_end]).c)

    # ------------------------------------------------------------------ from the driver

    @cython.critical_section
    def __iter__(self):
        cdef Drain drain
        self.must_work()
        drain = Drain.__new__(Drain)
        drain.queue = self
        drain.left = self.most
        drain.rearm = not self.vq.notify_off
        if drain.rearm:
            virtqueue_disable_notification(&self.vq)
        self.draining += 1
        self.found_end = False
        return drain

    @cython.critical_section
    def pop(self):
        cdef int got
        self.must_work()
        if self.ahead_end == self.ahead_next:
            got = self.fetch(1)
            if got < 0:
                self.fail()
            if not got:
                self.check_memory()
                return None
        return self.next_ahead()

    @cython.critical_section
    def pop_batch(self, uint32_t n=32):
        cdef list more, batch = None
        cdef int got
        self.must_work()
        while True:
            if self.ahead_end == self.ahead_next:
                got = self.fetch(n)
                if got <= 0:
                    break
            more = self.all_ahead(n)
            batch = more if batch is None else batch + more
            n -= <uint32_t>len(more)
            if not n or self.found_end:
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

    cdef inline int stage(self, Chain chain, int64_t written) except -1:
        cdef int rc
        if unlikely(self.closed):
            self.must_be_open()
        if not 0 <= written <= chain.c.in_len:
            raise ValueError(
                f"{self.name}: chain {chain.c.id}: {written} bytes written, but only {chain.c.in_len} are writable"
            )
        if unlikely(self.vq.log != NULL):
            self.mark(chain, <uint32_t>written)
        rc = virtqueue_fill(&self.vq, chain.c.id, <uint32_t>written)
        if rc:
            raise InvalidQueue(f"{self.name}: chain {chain.c.id} cannot be given back (error {-rc})")
        self.let_go(<PyObject *>chain)
        return 0

    cdef inline int give(self, Chain chain, object written, bint publish) except -1:
        # The length may be an object whose __index__ does anything: before the look at whose the chain is.
        cdef int64_t length = 0 if written is None else length_of(written)
        with cython.critical_section(self, chain):
            self.must_be_ours(chain)
            self.stage(chain, chain.use.written if written is None else length)
            if publish:
                self.publish()
        return 0

    cdef Py_ssize_t give_batch(self, list batch, Py_ssize_t start, list lengths) except -1:
        # Chains from `start` on, at most QUEUE_BATCH: how many were staged before the first that is not as most are.
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

    cdef int take_back(self, Chain chain, uint32_t written) except -1:
        # As push, for the chain itself, which knew that it was out before it let others in.
        with cython.critical_section(self, chain):
            self.must_be_ours(chain)
            self.stage(chain, written)
            self.publish()
        return 0

    cdef inline int publish(self) except -1:
        virtqueue_flush(&self.vq)
        if not self.draining:
            self.tell_driver()
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
                    self.publish()

    def fill(self, Chain chain not None, written=None):
        self.give(chain, written, False)

    @cython.critical_section
    def flush(self):
        self.must_be_open()
        virtqueue_flush(&self.vq)
        self.tell_log()

    @cython.critical_section
    def should_notify(self):
        self.must_be_open()
        return virtqueue_should_notify(&self.vq)

    @cython.critical_section
    def notify(self):
        self.must_be_open()
        return bool(self.tell_driver())

    cdef int tell_driver(self) except -1:
        if unlikely(self.vq.log != NULL):
            self.tell_log()
        if not virtqueue_should_notify(&self.vq):
            return 0
        tell(&self.to_driver)
        return 1

    # ------------------------------------------------------------------ dirty log

    @cython.critical_section
    def set_log(self, DirtyLog log, *, bint ring=False, used=None, int fd=-1):
        self.must_be_open()
        if used is not None and not 0 <= used < 1 << 64:
            raise InvalidLogAddress(f"{self.name}: used ring at {used:#x} does not fit 64 bits")
        virtqueue_set_log(&self.vq, NULL)
        self.dirty_log = log
        if log is None:
            return
        self.log.map = log.c
        self.log.ring = ring
        self.log.used_given = used is not None
        if used is not None:
            self.log.used = used
        self.log.fd = fd
        self.log.changed = False
        self.apply_log()
        self.tell_log()

    cdef int apply_log(self) except -1:
        cdef int rc = virtqueue_set_log(&self.vq, &self.log)
        if rc:
            self.dirty_log = None
            why = f"beyond the dirty log, which ends at {dirty_log_limit(&self.log.map):#x}"
            if rc != -ERANGE:
                why = "in no memory region"
            where = f"its used ring at {self.log.used:#x}" if self.log.used_given else "it"
            raise InvalidLogAddress(f"{self.name}: {where} is {why}")
        return 0

    cdef int mark(self, Chain chain, uint32_t written) except -1:
        # What a view was made of may have been written by anybody.
        virtqueue_log_chain(
            &self.vq, chain.memory.c, &chain.c, max(written, chain.use.written, chain.use.touched)
        )
        return 0

    @cython.critical_section
    def mark_written(self, uint64_t addr, uint64_t size):
        self.must_be_open()
        virtqueue_log_write(&self.vq, addr, size)
        self.tell_log()

    cdef int tell_log(self) except -1:
        if virtqueue_should_tell_log(&self.vq):
            signal(self.log.fd)
        return 0

    # ------------------------------------------------------------------ kicks

    @cython.critical_section
    def enable_notification(self):
        self.must_be_open()
        self.settle()
        return virtqueue_enable_notification(&self.vq)

    @cython.critical_section
    def disable_notification(self):
        self.must_be_open()
        virtqueue_disable_notification(&self.vq)

    @cython.critical_section
    def has_work(self):
        if self.closed or self.reason is not None or self.vq.report.fault:
            return False
        return self.ahead_end > self.ahead_next or virtqueue_has_work(&self.vq)

    # ------------------------------------------------------------------ the queue's life

    @cython.critical_section
    def set_memory(self, GuestMemory memory not None):
        cdef virtqueue_areas areas
        cdef GuestMemory before = self.memory  # which the ring lies in until it has moved
        self.must_be_open()
        self.settle()
        if self.iotlb is None:
            find_areas(
                self.name, memory, None, self.vq.num, self.vq.is_packed, self.addrs, self.user_addresses, &areas
            )
            virtqueue_set_memory(&self.vq, memory.c, &areas)
            self.areas = areas
        # What is popped from here on lies there, whatever is refused below.
        self.memory = memory
        self.empty_pool()
        if self.iotlb is not None:
            self.translate()
        if self.vq.log != NULL:
            self.apply_log()

    @cython.critical_section
    def translate(self):
        cdef virtqueue_areas areas
        cdef list missing
        if self.iotlb is None:
            raise InvalidQueue(f"{self.name}: has no IOTLB")
        self.settle()
        missing = missing_areas(self.iotlb, self.vq.num, self.vq.is_packed, self.addrs)
        if missing:
            virtqueue_unmap(&self.vq, missing[0][0], missing[0][1])
            return missing
        try:
            find_areas(
                self.name, self.memory, self.iotlb, self.vq.num, self.vq.is_packed, self.addrs, False, &areas
            )
        except InvalidQueue as error:
            virtqueue_unmap(&self.vq, self.addrs[0], 0)
            self.mark_broken(str(error))
            return missing
        if not virtqueue_is_mapped(&self.vq) or (
            areas.desc != self.areas.desc or areas.avail != self.areas.avail or areas.used != self.areas.used
        ):
            virtqueue_map(&self.vq, &areas)
            self.areas = areas
            if self.dirty_log is not None and self.vq.log == NULL:
                self.apply_log()  # which says why not
            self.tell_driver()
        return missing

    @cython.critical_section
    def retry(self):
        virtqueue_retry(&self.vq)

    @cython.critical_section
    def deny(self, str reason not None):
        # Also to an engine that serves the queue.
        if self.vq.report.fault == VQ_MISS:
            self.vq.report.fault = VQ_ACCESS
        self.mark_broken(reason)

    @property
    @cython.critical_section
    def miss(self):
        if LOAD_ACQUIRE(self.vq.report.fault) == VQ_MISS and virtqueue_is_mapped(&self.vq):
            return self.vq.report.value, self.vq.report.limit
        return None

    @cython.critical_section
    def close(self):
        self.settle()
        self.closed = True
        # They are the caller's, who may close them now: a device that kept the queue must not hit others.
        self.kick = self.to_driver.fd = self.err = -1
        self.empty_pool()

    cdef int must_be_open(self) except -1:
        if self.closed:
            raise InvalidQueue(f"{self.name}: closed")
        return 0

    cdef int must_work(self) except -1:
        self.must_be_open()
        if self.reason is not None:
            raise QueueBroken(self.name, self.reason)
        return 0

    @property
    @cython.critical_section
    def broken(self):
        self.look_broken()
        return self.reason

    @property
    def missed(self):
        return self.vq.report.fault == VQ_ADDRESS

    @cython.critical_section
    def mark_broken(self, str reason not None):
        if self.reason is None:
            self.settle()
            self.reason = reason
            signal(self.err)

    cdef int check_memory(self) except -1:
        # Memory whose file went away reads as zeros, and an empty ring is what that looks like.
        if memory_broken(self.memory) or self.inflight is not None and self.inflight.broken:
            self.fail()
        return 0

    cdef int look_broken(self) except -1:
        # Engines and the rings leave a report; whoever sees it first makes it public.
        if self.reason is None:
            if memory_broken(self.memory):
                self.mark_broken("a memory region's file was truncated")
            elif self.inflight is not None and self.inflight.broken:
                self.mark_broken("the file of the in-flight buffer was truncated")
            elif self.vq.report.fault and self.vq.report.fault != VQ_MISS:
                self.settle()
                self.reason = fault_reason(&self.vq.report)
                signal(self.err)
        return 0

    cdef int fail(self) except -1:
        self.look_broken()
        raise QueueBroken(self.name, self.reason)

    def __repr__(self):
        kind = "packed" if self.vq.is_packed else "split"
        return f"<DeviceQueue {self.name} ({self.index}): {kind}, {self.vq.num} slots>"


@cython.final
@cython.no_gc
@cython.freelist(8)
cdef class Drain:
    """One run of ``for chain in queue``. However the loop ends, the end of this object ends the drain."""

    cdef DeviceQueue queue
    cdef uint32_t left
    cdef bint rearm
    cdef bint over  # `queue` has been told

    def __iter__(self):
        return self

    def __next__(self):
        cdef Chain chain = None
        with cython.critical_section(self.queue):
            # Nothing is ahead of a queue that is closed or broken.
            if not self.over and (self.queue.ahead_end > self.queue.ahead_next and self.left or self.look()):
                self.left -= 1
                chain = self.queue.next_ahead()
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
            if not queue.found_end or not self.rearm:
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
            queue.found_end = False
        self.finish(True)
        return False

    cdef int finish(self, bint again) except -1:
        cdef DeviceQueue queue = self.queue
        self.over = True
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
        if self.queue is not None and not self.over:
            self.abandon()
