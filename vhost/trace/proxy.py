# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Sits between front-ends and a back-end, and tells what passes.

Listens on one path and connects to another for each connection that comes, any number at a time. The
socket by which a back-end sends its requests (SET_BACKEND_REQ_FD), and that of the GPU protocol, is
replaced by one of ours, so that what passes there is seen, too. Knows nothing of what messages mean
beyond these two.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from vhost.trace.records import FdInfo, Happening, Record
from vhost.trace.relay import Observer, Relay, is_stream_socket
from vhost.user.listener import Listener
from vhost.user.messages import FrontendMsg
from vhost.user.spec import Channel, Role

MAX_CHANNELS = 16
"""Of one session; sockets beyond are passed on as they are."""
PAUSE = 0.05
"""Seconds until what could not be done for want of room is tried again."""

_NO_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
_KINDS = {
    int(FrontendMsg.SET_BACKEND_REQ_FD): Channel.BACKEND_REQ,
    int(FrontendMsg.GPU_SET_SOCKET): Channel.GPU,
}


class _Recorder(Observer):
    """Makes records of what a relay passes."""

    def __init__(self, session: _Session, number: int) -> None:
        self._session = session
        self._number = number

    def record(self, happening: Happening, sender: Role | None = None, text: str = "") -> None:
        proxy = self._session.proxy
        record = Record(proxy.now(), self._session.number, self._number, happening, sender, text=text)
        proxy.emit(record)

    def passed(
        self, sender: Role, data: bytes, skipped: int, fds: tuple[FdInfo, ...], delivered: bool
    ) -> None:
        proxy = self._session.proxy
        proxy.emit(
            Record(
                proxy.now(),
                self._session.number,
                self._number,
                Happening.DATA,
                sender,
                data,
                skipped,
                fds,
                delivered=delivered,
            )
        )

    def ended(self, sender: Role, why: str) -> None:
        self.record(Happening.EOF, sender, why)

    def remark(self, sender: Role, text: str) -> None:
        self.record(Happening.REMARK, sender, text)


class _Session:
    """One connection and the channels that it made."""

    def __init__(self, proxy: Proxy, number: int) -> None:
        self.proxy = proxy
        self.number = number
        self.relays: dict[Relay, _Recorder] = {}
        self._channels = 0

    def open(self, kind: Channel, front: socket.socket, back: socket.socket) -> Relay:
        channel = _Recorder(self, self._channels)
        self._channels += 1
        channel.record(Happening.OPEN, text=kind.value)
        relay = Relay(front, back, channel, self._intercept if kind is Channel.MAIN else None)
        self.relays[relay] = channel
        self.proxy.watch(self, relay)
        return relay

    def _intercept(self, request: int, fds: list[int]) -> list[int]:
        kind = _KINDS.get(request)
        if kind is None or len(fds) != 1 or not is_stream_socket(fds[0]):
            return fds
        channel = next(iter(self.relays.values()))
        if len(self.relays) >= MAX_CHANNELS:
            text = f"passed on unseen: {MAX_CHANNELS} channels are open already"
            channel.remark(Role.FRONTEND, text)
            return fds
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            channel.remark(Role.FRONTEND, f"passed on unseen: {error.strerror}")
            return fds
        self.open(kind, socket.socket(fileno=fds[0]), ours)
        return [theirs.detach()]


class Proxy:
    """Between whoever connects to ``listen`` and whoever listens on ``connect``.

    ``emit`` is given each record. ``reverse``: it is the back-end that connects, and the front-end that
    listens. ``once``: end with the first session.
    """

    def __init__(
        self,
        listen: str | os.PathLike[str],
        connect: str | os.PathLike[str],
        emit: Callable[[Record], None],
        *,
        reverse: bool = False,
        once: bool = False,
    ) -> None:
        self.connect_path = os.fspath(connect)
        self.emit = emit
        self.reverse = reverse
        self.once = once
        self.sessions = 0
        """How many there were."""
        self.closed = False
        self.draining = False
        """No new sessions; close when those that are there have ended."""
        self._began = time.monotonic_ns()
        self._readers: dict[int, Callable[[], None]] = {}
        self._watched: dict[int, tuple[_Session, Relay, socket.socket]] = {}
        self._masks: dict[int, int] = {}
        self._waiting: dict[int, tuple[_Session, socket.socket]] = {}
        """Who came while the other side's backlog was full, or no descriptor left, by descriptor."""
        self._starved = False
        self._stuck: dict[Relay, _Session] = {}
        """Those with descriptors that the kernel has no room for."""
        self._next_try = 0.0
        self._listener = Listener(listen)
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._accepting = True

    def now(self) -> int:
        """Nanoseconds since the trace began."""
        return time.monotonic_ns() - self._began

    def fileno(self) -> int:
        return self._epoll.fileno()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def timeout(self) -> float | None:
        """Seconds after which ``step()`` is due even if ``fileno()`` is not readable; None: never."""
        if self.closed or not (self._starved or self._waiting or self._stuck):
            return None
        return max(0.0, self._next_try - time.monotonic())

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        """Have ``step()`` call this, too, when the descriptor is readable."""
        self._readers[fd] = callback
        self._epoll.register(fd, select.EPOLLIN)

    def step(self, timeout: float | None = 0.0) -> None:
        """Do what there is to do now, without blocking; or wait up to ``timeout`` seconds for something
        first (None: for ever)."""
        if self.closed:
            return
        if self.timeout == 0.0:
            self._try_again()
        # Who is meant is settled before anything is closed, after which numbers may be used again.
        events = [(fd, mask, self._watched.get(fd)) for fd, mask in self._epoll.poll(timeout)]
        for fd, mask, watched in events:
            if watched is not None:
                session, relay, sock = watched
                if not relay.closed:
                    relay.ready(sock, mask)
                    self._update(session, relay)
            elif fd in self._readers:
                self._readers[fd]()
            elif fd in self._waiting:
                self._give_up(fd)
            elif fd == self._listener.socket.fileno():
                self._accept()
            if self.closed:
                return
        self._accept_more()
        if (self.draining or (self.once and self.sessions)) and not self._watched and not self._waiting:
            self.close()

    def run(self) -> None:
        """Until ``close()``."""
        while not self.closed:
            self.step(self.timeout)

    def close(self) -> None:
        """End all sessions; remove the socket, if it is still ours. Idempotent."""
        if self.closed:
            return
        self.closed = True
        for session, relay, _ in list(self._watched.values()):
            if not relay.closed:
                relay.close()
                session.relays[relay].record(Happening.CLOSE, text="the trace ended")
        self._watched.clear()
        for _, sock in self._waiting.values():
            sock.close()
        self._waiting.clear()
        self._listener.close()
        self._epoll.close()

    # -- sessions ----------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.socket.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError:
            self._starve()  # out of descriptors: who is there goes on, the next one waits
            return
        self.sessions += 1
        self._connect(_Session(self, self.sessions), sock)

    def _connect(self, session: _Session, came: socket.socket) -> None:
        other: socket.socket | None = None
        try:
            other = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            other.setblocking(False)
            other.connect(self.connect_path)
        except OSError as error:
            if other is not None:
                other.close()
            if isinstance(error, BlockingIOError) or error.errno in _NO_ROOM:
                self._wait_for_room(session, came)
                return
            text = f"{self.connect_path}: {error.strerror}"
            remark = Record(self.now(), session.number, 0, Happening.REMARK, None, text=text)
            self.emit(remark)
            came.close()
            return
        front, back = (other, came) if self.reverse else (came, other)
        session.open(Channel.MAIN, front, back)

    def _wait_for_room(self, session: _Session, came: socket.socket) -> None:
        fd = came.fileno()
        if fd not in self._waiting:
            self._waiting[fd] = (session, came)
            self._epoll.register(fd, 0)  # to hear if it is closed
        self._next_try = time.monotonic() + PAUSE

    def _give_up(self, fd: int) -> None:
        _, sock = self._waiting.pop(fd)
        self._epoll.unregister(fd)
        sock.close()

    def _starve(self) -> None:
        self._starved = True
        self._next_try = time.monotonic() + PAUSE

    def _try_again(self) -> None:
        self._starved = False
        self._next_try = time.monotonic() + PAUSE
        for fd, (session, sock) in list(self._waiting.items()):
            del self._waiting[fd]
            self._epoll.unregister(fd)
            self._connect(session, sock)
        for relay, session in list(self._stuck.items()):
            if not relay.closed:
                relay.retry()
                self._update(session, relay)

    def _accept_more(self) -> None:
        more = not (self._starved or self.draining or (self.once and self.sessions))
        if more and not self._accepting:
            self._epoll.register(self._listener, select.EPOLLIN)
        elif self._accepting and not more:
            self._epoll.unregister(self._listener)
        self._accepting = more

    # -- polling -----------------------------------------------------------------------------------

    def watch(self, session: _Session, relay: Relay) -> None:
        for sock in relay.sockets:
            self._watched[sock.fileno()] = (session, relay, sock)
        self._update(session, relay)

    def _update(self, session: _Session, relay: Relay) -> None:
        if relay.closed:
            self._forget(session, relay)
            return
        if not relay.starved:
            self._stuck.pop(relay, None)
        elif relay not in self._stuck:
            self._stuck[relay] = session
            self._next_try = time.monotonic() + PAUSE
        for sock in relay.sockets:
            self._poll_for(sock.fileno(), relay.interest(sock))

    def _poll_for(self, fd: int, mask: int | None) -> None:
        before = self._masks.get(fd)
        if mask == before:
            return
        if mask is None:
            self._epoll.unregister(fd)
            del self._masks[fd]
        elif before is None:
            self._epoll.register(fd, mask)
            self._masks[fd] = mask
        else:
            self._epoll.modify(fd, mask)
            self._masks[fd] = mask

    def _forget(self, session: _Session, relay: Relay) -> None:
        self._stuck.pop(relay, None)
        # The kernel has taken closed sockets out of the epoll set.
        for fd in [fd for fd, (_, other, _) in self._watched.items() if other is relay]:
            del self._watched[fd]
            self._masks.pop(fd, None)
        session.relays.pop(relay).record(Happening.CLOSE)
