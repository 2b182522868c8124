# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The ring under a device's queue: where it lies, what was agreed on it, and whether it still works.

Knows rings and memory, but not the chains that a queue takes from it.
"""

cimport cython
from libc.errno cimport EBADMSG, ENOMEM, ERANGE
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from vhost._core cimport *
from vhost._iotlb cimport Iotlb
from vhost._ring cimport check_num, fault_reason, find_areas, missing_areas, signal
from vhost.chain cimport Origin
from vhost.dirty_log cimport DirtyLog
from vhost.inflight cimport InflightRegion
from vhost.memory cimport GuestMemory, memory_broken

from vhost.errors import InvalidLogAddress, InvalidQueue, QueueBroken


@cython.no_gc
cdef class DeviceRing(Origin):
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

    def __dealloc__(self):
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

    # For what a queue has beside the ring. A ring alone has nothing.

    cdef void settle(self) noexcept:
        pass

    cdef void drop_idle(self) noexcept:
        pass

    # ------------------------------------------------------------------ what it is

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

    # ------------------------------------------------------------------ notifications

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
    def should_notify(self):
        self.must_be_open()
        return virtqueue_should_notify(&self.vq)

    @cython.critical_section
    def notify(self):
        self.must_be_open()
        return bool(self.tell_driver())

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

    @cython.critical_section
    def mark_written(self, uint64_t addr, uint64_t size):
        self.must_be_open()
        virtqueue_log_write(&self.vq, addr, size)
        self.tell_log()

    cdef int tell_log(self) except -1:
        if virtqueue_should_tell_log(&self.vq):
            signal(self.log.fd)
        return 0

    # ------------------------------------------------------------------ memory

    @cython.critical_section
    def set_memory(self, GuestMemory memory not None):
        cdef virtqueue_areas areas
        cdef GuestMemory before = self.memory  # which the ring lies in until it has moved
        self.must_be_open()
        self.settle()
        if self.iotlb is None:
            find_areas(
                self.name, memory, None, self.vq.num, self.vq.is_packed, self.addrs,
                self.user_addresses, &areas,
            )
            virtqueue_set_memory(&self.vq, memory.c, &areas)
            self.areas = areas
        # What is popped from here on lies there, whatever is refused below.
        self.memory = memory
        self.drop_idle()
        if self.iotlb is not None:
            self.find_mapped()
        if self.vq.log != NULL:
            self.apply_log()

    @cython.critical_section
    def translate(self):
        if self.iotlb is None:
            raise InvalidQueue(f"{self.name}: has no IOTLB")
        self.settle()
        return self.find_mapped()

    cdef list find_mapped(self):
        # What the ring itself lacks of mappings; if that is nothing, it is found.
        cdef virtqueue_areas areas
        cdef list missing = missing_areas(self.iotlb, self.vq.num, self.vq.is_packed, self.addrs)
        if missing:
            virtqueue_unmap(&self.vq, missing[0][0], missing[0][1])
            return missing
        try:
            find_areas(
                self.name, self.memory, self.iotlb, self.vq.num, self.vq.is_packed, self.addrs, False, &areas
            )
        except InvalidQueue as error:
            virtqueue_unmap(&self.vq, self.addrs[0], 0)
            self.break_for(str(error))
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

    @property
    @cython.critical_section
    def miss(self):
        if LOAD_ACQUIRE(self.vq.report.fault) == VQ_MISS and virtqueue_is_mapped(&self.vq):
            return self.vq.report.value, self.vq.report.limit
        return None

    # ------------------------------------------------------------------ whether it works

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
        self.break_for(reason)

    cdef int break_for(self, str reason) except -1:
        # The first reason is the one that counts.
        if self.reason is None:
            self.settle()
            self.reason = reason
            signal(self.err)
        return 0

    cdef int check_memory(self) except -1:
        # Memory whose file went away reads as zeros, and an empty ring is what that looks like.
        if memory_broken(self.memory) or self.inflight is not None and self.inflight.broken:
            self.fail()
        return 0

    cdef int look_broken(self) except -1:
        # Engines and the rings leave a report; whoever sees it first makes it public.
        if self.reason is None:
            if memory_broken(self.memory):
                self.break_for("a memory region's file was truncated")
            elif self.inflight is not None and self.inflight.broken:
                self.break_for("the file of the in-flight buffer was truncated")
            elif self.vq.report.fault and self.vq.report.fault != VQ_MISS:
                self.break_for(fault_reason(&self.vq.report))
        return 0

    cdef int fail(self) except -1:
        # Nothing more is processed: says why.
        if self.closed:
            raise InvalidQueue(f"{self.name}: closed")
        self.look_broken()
        raise QueueBroken(self.name, self.reason)

    @cython.critical_section
    def deny(self, str reason not None):
        # Also to an engine that serves the queue.
        if self.vq.report.fault == VQ_MISS:
            self.vq.report.fault = VQ_ACCESS
        self.break_for(reason)

    @cython.critical_section
    def close(self):
        self.settle()
        self.closed = True
        # They are the caller's, who may close them now: a device that kept the queue must not hit others.
        self.kick = self.to_driver.fd = self.err = -1
        self.drop_idle()
