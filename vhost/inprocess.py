# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""InProcess: a Device of this process as the back-end of a driver in it.

A VhostOps without a socket, a message or a mapping: requests are calls, and both sides use the same memory.
Knows the device's session and who steps it; what a request means is in vhost.devices.session.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import select
import threading
from collections.abc import Iterator

from vhost.devices.base import Device
from vhost.devices.rings import Areas, check_event_fd
from vhost.devices.session import DeviceSession
from vhost.errors import Disconnected, UnsupportedRequest
from vhost.memory import GuestMemory
from vhost.ops import VhostOps


class _Session(DeviceSession):
    """Keeps its news for the driver's side to fetch."""

    def __init__(self, device: Device, news: int) -> None:
        self.news = news
        self.config_news = False
        super().__init__(device, user_addresses=False)
        device.attach(self)

    def _happened(self, fd: int, events: int) -> None:
        """Of a ring that another event of the same look stopped."""

    def _tell_config_change(self) -> None:
        self.config_news = True
        self._ring_bell()

    def _let_go(self) -> None:
        self._ring_bell()

    def _ring_bell(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it is readable
            os.eventfd_write(self.news, 1)


def _serve(session: DeviceSession, lock: threading.RLock, ends: threading.Event) -> None:
    """The thread: step the session whenever it has something to do. It does not know the InProcess."""
    waits = select.poll()
    waits.register(session.fileno(), select.POLLIN)
    while not ends.is_set():
        waits.poll()
        with lock:
            if not session.step():
                return


class InProcess(VhostOps):
    """``drivers.Blk(InProcess(device))``: the device stays the caller's, and may have other sessions.

    ``thread``: a thread of ours serves the device's handlers, so that a driver may block in
    ``DriverQueue.wait``. False: the caller does, by calling ``step()`` when ``fileno()`` is readable; a
    device with threads of its own serves its rings even then. Requests may come from any thread, and never
    run at the same time as a handler of the device. ``on_config_change`` is called from ``step()``, or at
    the end of a request, never by the thread.
    """

    def __init__(self, device: Device, *, thread: bool = True) -> None:
        self.device = device
        self._news = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.RLock()
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None
        try:
            self._session = _Session(device, self._news)
        except BaseException:
            os.close(self._news)
            raise
        if thread:
            self._thread = threading.Thread(
                target=_serve,
                args=(self._session, self._lock, self._ends),
                name=f"vhost-{type(device).__name__.lower()}",
                daemon=True,
            )
            self._thread.start()

    @property
    def error(self) -> Exception | None:
        """Why the session ended by itself: a handler of the device failed, or memory broke."""
        return self._session.error

    @contextlib.contextmanager
    def _request(self) -> Iterator[DeviceSession]:
        with self._lock:
            if self._session.closed:
                raise Disconnected(f"the session is over: {self._session.error or 'it was closed'}")
            yield self._session
        self._deliver()

    def _deliver(self) -> None:
        with self._lock:
            if not self._session.config_news:
                return
            self._session.config_news = False
        if self.on_config_change is not None:
            self.on_config_change()

    # -- the device --------------------------------------------------------------------------------

    def get_features(self) -> int:
        with self._request() as session:
            return session.offered_features()

    def set_features(self, features: int) -> None:
        with self._request() as session:
            session.acknowledge(features, "SET_FEATURES")

    def set_owner(self) -> None:
        """There is no other owner than this object's."""

    def reset_owner(self) -> None:
        with self._request() as session:
            for ring in session.rings:
                session.enable_ring(ring, False)

    def get_queue_num(self) -> int:
        return len(self._session.rings)

    def get_config(self, offset: int, size: int) -> bytes:
        with self._request() as session:
            if not self.device.config:
                raise UnsupportedRequest("the device has no configuration space", request="GET_CONFIG")
            return session.read_config(offset, size)

    def set_config(self, offset: int, data: bytes) -> None:
        with self._request() as session:
            session.check_config_range(offset, offset + len(data), "SET_CONFIG")
            session.write_config(offset, bytes(data), "SET_CONFIG")

    def get_status(self) -> int:
        return self._session.status

    def set_status(self, status: int) -> None:
        with self._request() as session:
            session.change_status(status, "SET_STATUS")

    def reset_device(self) -> None:
        with self._request() as session:
            session.reset("RESET_DEVICE")

    # -- memory ------------------------------------------------------------------------------------

    def set_mem_table(self, memory: GuestMemory) -> None:
        with self._request() as session:
            session.replace_memory(memory)

    # -- rings -------------------------------------------------------------------------------------

    def set_vring_num(self, index: int, num: int) -> None:
        with self._request() as session:
            session.size_ring(session.ring_at(index, "SET_VRING_NUM"), num, "SET_VRING_NUM")

    def set_vring_addr(
        self, index: int, desc: int, avail: int, used: int, *, log: int = 0, flags: int = 0
    ) -> None:
        if flags:
            raise UnsupportedRequest(f"ring {index}: there is no dirty log", request="SET_VRING_ADDR")
        with self._request() as session:
            ring = session.ring_at(index, "SET_VRING_ADDR")
            session.place_ring(ring, Areas(desc, avail, used), "SET_VRING_ADDR")

    def set_vring_base(self, index: int, base: int) -> None:
        with self._request() as session:
            ring = session.ring_at(index, "SET_VRING_BASE")
            session.begin_ring(ring, base, "SET_VRING_BASE")

    def get_vring_base(self, index: int) -> int:
        with self._request() as session:
            return session.stop_ring(session.ring_at(index, "GET_VRING_BASE"))

    def set_vring_kick(self, index: int, fd: int | None) -> None:
        self._give("kick", index, fd)

    def set_vring_call(self, index: int, fd: int | None) -> None:
        self._give("call", index, fd)

    def set_vring_err(self, index: int, fd: int | None) -> None:
        self._give("err", index, fd)

    def _give(self, kind: str, index: int, fd: int | None) -> None:
        with self._request() as session:
            ring = session.ring_at(index, f"SET_VRING_{kind.upper()}")
            if fd is not None:
                check_event_fd(fd)
            session.give_event(ring, kind, functools.partial(_copy, fd))

    def set_vring_enable(self, index: int, enable: bool) -> None:
        with self._request() as session:
            session.enable_ring(session.ring_at(index, "SET_VRING_ENABLE"), bool(enable))

    # -- events, and the end -----------------------------------------------------------------------

    def fileno(self) -> int:
        return self._news if self._thread is not None else self._session.fileno()

    def step(self) -> bool:
        if self._session.closed:
            return False
        if self._thread is None:
            with self._lock:
                self._session.step()
        else:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._news)
        self._deliver()
        return not self._session.closed

    def close(self) -> None:
        """End the session, and the thread. The device remains."""
        with self._lock:
            news, self._news = self._news, -1
        if news < 0:
            return
        self._ends.set()
        self._session.wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._lock:
            self._session.close()
        os.close(news)


def _copy(fd: int | None) -> int | None:
    return None if fd is None else int(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0))
