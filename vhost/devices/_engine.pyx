# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Worker threads for Python: csrc/engine.h. Knows queues, but not what is done with them: a device's engine
derives from ``Engine``, and has what it keeps of a queue in a class that derives from ``EngineQueue``."""

import os

cimport cython
from libc.errno cimport ESRCH
from libc.stdlib cimport calloc, free

from vhost._core cimport *
from vhost.device_queue cimport DeviceQueue
from vhost.memory cimport sigbus_count

__all__ = ["Engine"]


# Not the collector's, like the queues: it would clear `attached`, and free what is in it, under the feet of
# the threads. Nothing below refers back to a device, so that no cycle is lost by it.
@cython.no_gc
cdef class Engine:
    def __cinit__(self, unsigned int workers, str name not None, cpus=(), Engine of=None):
        cdef int *where = NULL
        cdef int rc
        if of is not None and (workers or cpus or of.of is not None):
            raise ValueError("of: an engine that has workers, for one that has none")
        if cpus:
            where = <int *> calloc(workers, sizeof(int))
            if where == NULL:
                raise MemoryError()
        try:
            if cpus:
                for i in range(workers):
                    where[i] = cpus[i % len(cpus)]
            rc = engine_init(&self.c, workers, name.encode(), sigbus_count(), where)
        finally:
            free(where)
        if rc:
            raise OSError(-rc, f"{name}: cannot set up the engine")
        self.ready = True
        self.of = of
        self.serving = &self.c if of is None else &of.c
        self.attached = {}

    def __dealloc__(self):
        cdef EngineQueue one
        if not self.ready:
            return
        if self.attached is not None:
            for one in self.attached.values():
                self.take_back(one)
        engine_destroy(&self.c)

    @property
    def notice(self):
        return engine_notice(&self.c)

    @property
    def workers(self):
        return self.serving.nworkers

    @property
    def idlest(self):
        return engine_idlest(self.serving)

    cdef int hand_over(self, EngineQueue one, unsigned int worker) except -1:
        cdef DeviceQueue queue = one.queue
        cdef engine_queue_config cfg
        cdef int rc
        if worker >= self.workers:
            raise ValueError(f"worker {worker}, must be below {self.workers}")
        # First: from then on the worker has it.
        if self.attached.setdefault(queue, one) is not one:
            raise ValueError(f"{queue.name} is attached already")
        with cython.critical_section(queue):
            queue.settle()
        cfg.vq = &queue.vq
        cfg.ops = one.ops
        cfg.kick = queue.kick
        cfg.source = one.source
        cfg.call = queue.to_driver
        cfg.owner = &self.c
        with nogil:
            rc = engine_attach(self.serving, worker, one.engine, &cfg)
        if rc:
            del self.attached[queue]
            why = "it belongs to the process that this one was forked from" if rc == -ESRCH else os.strerror(-rc)
            raise OSError(-rc, f"{queue.name}: cannot be attached to the engine: {why}")
        return 0

    def detach(self, DeviceQueue queue not None):
        cdef EngineQueue one = self.attached.pop(queue, None)
        if one is not None:
            self.take_back(one)

    def hold(self, DeviceQueue queue not None):
        cdef EngineQueue one = self.attached.get(queue)
        if one is not None:
            with nogil:
                engine_hold(one.engine)

    def release(self, DeviceQueue queue not None, bint look):
        cdef EngineQueue one = self.attached.get(queue)
        if one is not None:
            with nogil:
                engine_release(one.engine, look)

    cdef int take_back(self, EngineQueue one) except -1:
        with nogil:
            engine_detach(self.serving, one.engine)
        return 0


@cython.no_gc
cdef class EngineQueue:
    """A queue that a worker has; keeps alive what the worker uses. Who derives sets `engine` and `ops`."""

    def __cinit__(self, DeviceQueue queue not None, *args):
        self.queue = queue
        self.source = -1
