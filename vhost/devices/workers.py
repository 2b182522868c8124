# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Threads that wait for kicks and run a device's handlers, which are Python: ``Device.workers`` of them.

Knows kicks and what to call for them; what a ring is, and what becomes of errors, is in session.py. (What
runs without the interpreter is csrc/engine.h's.)
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections import deque
from collections.abc import Callable


class Watch:
    """A ring that a worker looks after, until ``end``."""

    __slots__ = ("_serve", "_turn", "_worker", "kick")

    def __init__(self, worker: Worker, kick: int, serve: Callable[[], bool]) -> None:
        self.kick = kick
        self._worker = worker
        self._serve: Callable[[], bool] | None = serve
        self._turn = threading.Lock()

    def serve(self) -> bool:
        """On the worker. False: not again, but for a kick."""
        with self._turn:
            serve = self._serve
            return serve is not None and serve()

    def end(self) -> None:
        """Return when the ring is not being served, and will not be any more. From any thread but the
        worker's."""
        # Before the lock: a worker with much to do would take it again and again.
        self._serve = None
        if self._worker.forked:
            return
        self._worker.forget(self)
        with self._turn:
            pass


class Worker:
    """One thread, from its first ring until ``close``."""

    def __init__(self, name: str) -> None:
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._ends = False
        self._watches: dict[int, Watch] = {}
        self._polled: tuple[Watch, ...] = ()
        self._change = threading.Lock()  # of _polled
        self._due: deque[Watch] = deque()
        self._epoll = select.epoll()
        try:
            self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except BaseException:
            self._epoll.close()
            raise
        self._epoll.register(self._bell, select.EPOLLIN)

    @property
    def forked(self) -> bool:
        """This process has no such thread, only a copy of what it had in hand; and the set that it waits on
        is the parent's, too."""
        return os.getpid() != self._pid

    @property
    def is_this_thread(self) -> bool:
        return self._thread is threading.current_thread()

    def watch(self, kick: int, serve: Callable[[], bool], *, look: bool) -> Watch:
        """Have ``serve``, which does not raise, called for each kick; if ``kick`` is -1 again and again, for
        as long as it says so. ``look``: there may be work that no kick tells of."""
        watch = Watch(self, kick, serve)
        if self._thread.ident is None:
            self._thread.start()
        if kick < 0:
            with self._change:
                self._polled += (watch,)
        else:
            # Edge-triggered: an eventfd needs no reading, and so nobody can make us wait for one. One that
            # is readable counts as an edge.
            self._watches[kick] = watch
            try:
                self._epoll.register(kick, select.EPOLLIN | select.EPOLLET)
            except BaseException:
                del self._watches[kick]
                raise
        if look:
            self._due.append(watch)
        if look or kick < 0:
            self._ring()
        return watch

    def forget(self, watch: Watch) -> None:
        if watch.kick >= 0:
            self._epoll.unregister(watch.kick)
            del self._watches[watch.kick]
        else:
            self._stop_polling(watch)

    def close(self) -> None:
        """It has no ring any more: end the thread."""
        if not self.forked and self._thread.ident is not None:
            self._ends = True
            self._ring()
            self._thread.join()
        self._epoll.close()
        os.close(self._bell)

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it is awake
            os.eventfd_write(self._bell, 1)

    def _stop_polling(self, watch: Watch) -> None:
        with self._change:
            self._polled = tuple(other for other in self._polled if other is not watch)

    # -- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._ends:
            for fd, _ in self._epoll.poll(0 if self._polled else None):
                if fd == self._bell:
                    os.eventfd_read(self._bell)
                else:
                    self._serve_kicked(fd)
            self._serve_due()
            self._poll()

    # Methods, so that no name keeps a watch, and with it a session, while the thread sleeps.

    def _serve_kicked(self, kick: int) -> None:
        watch = self._watches.get(kick)
        if watch is not None:  # it may have ended in the meantime
            watch.serve()

    def _serve_due(self) -> None:
        while self._due:
            self._due.popleft().serve()

    def _poll(self) -> None:
        for watch in self._polled:
            if not watch.serve():
                self._stop_polling(watch)


class Workers:
    """All of a device's, from its first ring that runs until its last one stops."""

    def __init__(self, count: int, name: str) -> None:
        if count < 1:
            raise ValueError(f"{count} workers, must be at least 1")
        self._all: list[Worker] = []
        try:
            for i in range(count):
                self._all.append(Worker(f"{name}-{i}"))
        except BaseException:
            self.close()
            raise

    @property
    def have_this_thread(self) -> bool:
        return any(worker.is_this_thread for worker in self._all)

    def watch(self, index: int, kick: int, serve: Callable[[], bool], *, look: bool) -> Watch:
        """Have ring ``index`` looked after, see ``Worker.watch``."""
        return self._all[index % len(self._all)].watch(kick, serve, look=look)

    def close(self) -> None:
        """No ring is left. Idempotent."""
        while self._all:
            self._all.pop().close()
