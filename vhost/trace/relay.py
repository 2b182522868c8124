# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Passes streams on as they are: bytes, descriptors with the bytes that they came with, and the end.

Knows sockets and where a message ends. A header is read by itself and sent on together with as much of
its payload as is there already, so that a message arrives as it was sent: in one piece, and with its
descriptors. Nothing waits but a header that is not whole, since only then it is known whether its
descriptors are ours to replace.

One direction never waits for the other. Behind a reader that does not read there is at most one piece of
a message; then the writer is not read any more, as if it wrote to the reader itself.
"""

from __future__ import annotations

import array
import contextlib
import errno
import select
import socket
from collections import deque
from collections.abc import Callable, Sequence

from vhost.trace.descriptors import describe
from vhost.trace.frames import Boundary
from vhost.trace.records import KEPT, FdInfo
from vhost.user.spec import HEADER_SIZE, Role, close_fds

SCM_MAX_FD = 253
"""Descriptors that Linux takes along with one write."""
PIECE = 64 * 1024
_BURST = 32
"""Pieces of one direction before others have their turn."""
_ANCILLARY = socket.CMSG_SPACE(SCM_MAX_FD * 4)
_SEND_FLAGS = int(socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
_RECEIVE_FLAGS = int(socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
_GONE = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN})

Intercept = Callable[[int, list[int]], list[int]]
"""Given the request and the descriptors of a message, gives those to send instead; owns them all."""


class Observer:
    """Told what passes; the times are the observer's business."""

    def passed(
        self, sender: Role, data: bytes, skipped: int, fds: tuple[FdInfo, ...], delivered: bool
    ) -> None:
        raise NotImplementedError

    def ended(self, sender: Role, why: str) -> None:
        raise NotImplementedError

    def remark(self, sender: Role, text: str) -> None:
        raise NotImplementedError


class Pipe:
    """One direction, from ``source`` to ``sink``."""

    def __init__(
        self,
        sender: Role,
        source: socket.socket,
        sink: socket.socket,
        observer: Observer,
        intercept: Intercept | None = None,
    ) -> None:
        self.sender = sender
        self.source = source
        self.sink = sink
        self.eof = False
        """The source will send no more."""
        self.broken = False
        """The sink takes no more."""
        self.starved = False
        """The kernel will take no more descriptors for now; it does not say when it will."""
        self._observer = observer
        self._intercept = intercept
        self._boundary = Boundary()
        self._in_message = 0
        self._header: tuple[int, int, int] | None = None
        self._data = bytearray()
        self._fds: list[int] = []
        self._pending: deque[tuple[memoryview, list[int]]] = deque()
        self._shut = False

    @property
    def pending(self) -> bool:
        return bool(self._pending)

    @property
    def done(self) -> bool:
        """Nothing more will pass."""
        return self.broken or (self.eof and not self._pending)

    @property
    def wants_read(self) -> bool:
        return not (self.eof or self.broken or self._pending)

    def close(self) -> None:
        """Close the descriptors that are still here. The sockets are the relay's."""
        fds, self._fds = self._fds, []
        pending, self._pending = self._pending, deque()
        close_fds(fds)
        for _, more in pending:
            close_fds(more)

    # -- reading -----------------------------------------------------------------------------------

    def read(self) -> None:
        """Pass on what is there, until there is no more, the sink is full, or others had better have their
        turn."""
        for _ in range(_BURST):
            if not self.wants_read or not self._read_piece():
                return

    def give_up(self) -> None:
        """The sink is gone: nothing more is sent."""
        lost = sum(len(data) for data, _ in self._pending)
        if lost:
            text = f"{lost} bytes were not passed on: the other side is gone"
            self._observer.remark(self.sender, text)
        self.broken = True
        self.close()

    def _show_rest(self) -> None:
        """Behind a sink that is gone, show what was on its way to it."""
        for _ in range(_BURST):
            if self.eof or not self._read_piece():
                break
        self._emit()

    def _read_piece(self) -> bool:
        """Up to the end of a message, or as much as is there; False if there is no more now."""
        while True:
            received = self._receive(min(self._boundary.wanted, PIECE - len(self._data)))
            if received is None:
                if not self._boundary.in_header:
                    self._emit()
                return False
            data, fds = received
            if not data:
                self._emit()
                self.eof = True
                return False
            if fds and self._data and (len(self._data) >= HEADER_SIZE or self._too_many(fds)):
                self._emit()  # these came later, so they go later
            self._fds += fds
            header = self._boundary.advance(data)
            self._data += data
            self._in_message += len(data)
            if header is not None:
                self._header = header
            whole = self._boundary.between
            if whole or len(self._data) >= PIECE:
                self._emit()
                if whole:
                    self._in_message = 0
                    self._header = None
                return True

    def _too_many(self, fds: Sequence[int]) -> bool:
        return len(self._fds) + len(fds) > SCM_MAX_FD

    def _receive(self, count: int) -> tuple[bytes, list[int]] | None:
        try:
            data, ancillary, flags, _ = self.source.recvmsg(count, _ANCILLARY, _RECEIVE_FLAGS)
        except BlockingIOError:
            return None
        except OSError as error:
            # A reset comes when the other end closes without having read everything.
            self._observer.remark(self.sender, f"reading: {error.strerror}")
            return b"", []
        fds = _descriptors(ancillary)
        if flags & socket.MSG_CTRUNC:
            # What the receiver would do without them, nobody knows: it is better told that this is the end.
            close_fds(fds)
            self._observer.remark(self.sender, "ended here: descriptors were lost, no room for them is left")
            return b"", []
        return data, fds

    # -- writing -----------------------------------------------------------------------------------

    def _emit(self) -> None:
        """Send what is gathered."""
        if not self._data:
            return
        data, fds = bytes(self._data), self._fds
        self._data.clear()
        self._fds = []
        infos = tuple(describe(fd) for fd in fds)
        kept = max(0, min(len(data), HEADER_SIZE + KEPT - (self._in_message - len(data))))
        self._observer.passed(self.sender, data[:kept], len(data) - kept, infos, not self.broken)
        if self.broken:
            close_fds(fds)
            return
        if fds and self._header is not None and self._intercept is not None:
            fds = self._intercept(self._header[0], fds)
        self._pending.append((memoryview(data), fds))
        self.flush()

    def flush(self) -> None:
        """Send what waits, as much as the sink takes."""
        self.starved = False
        while self._pending and not self.broken:
            data, fds = self._pending[0]
            try:
                sent = self._send(data, fds)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ETOOMANYREFS:
                    self.starved = True
                    return
                if error.errno not in _GONE:
                    self._observer.remark(self.sender, f"writing: {error.strerror}")
                self.give_up()
                return
            close_fds(fds)
            if sent == len(data):
                self._pending.popleft()
            else:
                self._pending[0] = (data[sent:], [])

    def _send(self, data: memoryview, fds: list[int]) -> int:
        if not fds:
            return self.sink.send(data, _SEND_FLAGS)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        return self.sink.sendmsg([data], ancillary, _SEND_FLAGS)

    def shut(self) -> bool:
        """Tell both ends what this direction has come to; True the first time that there is something."""
        if self._shut or not self.done:
            return False
        self._shut = True
        if self.broken:
            self._show_rest()
        with contextlib.suppress(OSError):  # it may be gone already
            if self.broken:
                self.source.shutdown(socket.SHUT_RD)
            else:
                self.sink.shutdown(socket.SHUT_WR)
        return True


class Relay:
    """Both directions between the front-end's socket and the back-end's. Owns the sockets."""

    def __init__(
        self,
        front: socket.socket,
        back: socket.socket,
        observer: Observer,
        intercept: Intercept | None = None,
    ) -> None:
        self.sockets = (front, back)
        self._observer = observer
        to_back = Pipe(Role.FRONTEND, front, back, observer, intercept)
        to_front = Pipe(Role.BACKEND, back, front, observer)
        self._from = {front: to_back, back: to_front}
        self._to = {back: to_back, front: to_front}
        self.closed = False

    def interest(self, sock: socket.socket) -> int | None:
        """What to poll the socket for; None: for nothing, not even that it was closed, for there is
        something that has to be passed on before."""
        reads, writes = self._from[sock], self._to[sock]
        mask = select.EPOLLIN if reads.wants_read else 0
        if writes.pending and not writes.starved:
            mask |= select.EPOLLOUT
        return None if not mask and reads.pending else mask

    @property
    def starved(self) -> bool:
        return any(pipe.starved for pipe in self._from.values())

    def retry(self) -> None:
        """Try again what the kernel had no room for."""
        for pipe in self._from.values():
            if pipe.starved:
                pipe.flush()
        self._settle()

    def ready(self, sock: socket.socket, events: int) -> None:
        """The socket has something to do."""
        reads, writes = self._from[sock], self._to[sock]
        if writes.pending:
            writes.flush()
        if reads.wants_read:
            reads.read()
        hung_up = events & (select.EPOLLHUP | select.EPOLLERR)
        if hung_up and (reads.eof or reads.broken) and not writes.done:
            writes.give_up()  # it is closed and not only shut down: nobody is there to get anything
        self._settle()

    def _settle(self) -> None:
        pipes = self._from.values()
        for pipe in pipes:
            if pipe.shut() and not pipe.broken:
                self._observer.ended(pipe.sender, "")
        if all(pipe.done for pipe in pipes):
            self.close()

    def close(self) -> None:
        """End both directions now. Idempotent."""
        if self.closed:
            return
        self.closed = True
        for pipe in self._from.values():
            pipe.close()
        for sock in self.sockets:
            sock.close()


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds.tolist()


def is_stream_socket(fd: int) -> bool:
    """Whether it can be spoken to as to a vhost-user peer."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        return False
    stream = sock.family == socket.AF_UNIX and sock.type == socket.SOCK_STREAM
    sock.detach()  # it is only looked at
    return stream
