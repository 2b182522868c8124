# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A vhost-user session on a Unix stream socket, with descriptors in SCM_RIGHTS.

Knows sockets and nothing of what messages mean. Never blocks, except in ``call``, which is for
front-ends that have nothing else to do than wait for their reply.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import socket
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vhost.errors import Disconnected, IncorrectFds, ProtocolError, ReplyTimeout, RequestFailed
from vhost.user.session import Session
from vhost.user.spec import MAX_FDS, Message, Outgoing, close_fds

MAX_PENDING = 64 * 1024
"""Bytes that may wait for a peer that does not read."""
READ_MAX = 1 << 20
"""Bytes read at a time: room for them is made before it is known how many there are."""

_ANCILLARY = socket.CMSG_SPACE(MAX_FDS * 4)
# No SIGPIPE: a library cannot know what it does to the process.
_SEND_FLAGS = int(socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
_RECEIVE_FLAGS = int(socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
_TRUNCATED = int(socket.MSG_CTRUNC)


@dataclass(slots=True)
class _Queued:
    data: memoryview
    fds: tuple[int, ...]  # duplicates, ours to close


class Transport:
    """Owns the socket and the session."""

    def __init__(self, sock: socket.socket, session: Session, *, max_pending: int = MAX_PENDING) -> None:
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            raise ValueError(f"vhost-user needs a Unix stream socket, not {sock!r}")
        sock.setblocking(False)
        self.socket = sock
        self.session = session
        self.max_pending = max_pending
        self.pending = 0
        """Bytes that wait until the socket takes them; poll for POLLOUT while there are any."""
        self._queue: deque[_Queued] = deque()
        self._poll: select.poll | None = None
        self._polled = 0
        self._meanwhile: dict[int, Callable[[], None]] = {}
        # Which requests somebody waits for, and replies that were there before he looked.
        self._waited_for: set[int] = set()
        self._kept: dict[int, Message] = {}

    def fileno(self) -> int:
        return self.socket.fileno()

    def __enter__(self) -> Transport:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket, and all descriptors that neither side took. Idempotent."""
        queue, self._queue = self._queue, deque()
        kept, self._kept = self._kept, {}
        self.pending = 0
        self.session.close()
        self.socket.close()
        self._meanwhile.clear()  # whose owner may be ours: both would wait for the collector
        for queued in queue:
            close_fds(queued.fds)
        for message in kept.values():
            message.close()

    # -- receiving ---------------------------------------------------------------------------------

    def receive(self) -> Message | None:
        """The next message, or None when it is not here yet. Raises what Session.receive raises, and
        Disconnected or PartialMessage when the peer is gone."""
        session = self.session
        while True:
            try:
                wanted = min(session.wanted, READ_MAX)
                data, ancillary, flags, _ = self.socket.recvmsg(wanted, _ANCILLARY, _RECEIVE_FLAGS)
            except BlockingIOError:
                return None
            except ConnectionError as error:
                session.receive_eof(f"connection lost ({_reason(error)})")
                raise
            except OSError as error:
                raise ProtocolError(f"receive: {_reason(error)}") from error
            fds = _descriptors(ancillary) if ancillary else ()
            if not data:
                # A zero-length read can bring no descriptors on a stream; close any all the same.
                close_fds(fds)
                session.receive_eof()
            message = session.receive(data, fds, bool(flags & _TRUNCATED))
            if message is not None:
                return message

    # -- sending -----------------------------------------------------------------------------------

    def send(self, outgoing: Outgoing | None) -> None:
        """Send, and keep what the socket does not take. The caller may close its descriptors at once.
        ProtocolError when the peer lets more than ``max_pending`` bytes pile up."""
        if outgoing is None:
            return
        fds = outgoing.fds
        sent = 0
        if not self._queue:
            sent = self._write(outgoing.data, fds)
            if sent == len(outgoing.data):
                return
            if sent:
                fds = ()  # they went with the first byte
        data = memoryview(outgoing.data)[sent:]
        if self.pending + len(data) > self.max_pending:
            text = f"peer does not read: {self.pending + len(data)} bytes pending, limit {self.max_pending}"
            raise ProtocolError(text, request=outgoing.name)
        try:
            self._queue.append(_Queued(data, _duplicate(fds)))
        except OSError as error:
            raise ProtocolError(f"send: {_reason(error)}", request=outgoing.name) from error
        self.pending += len(data)

    def flush(self) -> bool:
        """Send what is pending; True when nothing is left."""
        while self._queue:
            head = self._queue[0]
            sent = self._write(head.data, head.fds)
            self.pending -= sent
            if sent and head.fds:
                # They went with the first byte.
                fds, head.fds = head.fds, ()
                close_fds(fds)
            if sent < len(head.data):
                head.data = head.data[sent:]
                return False
            self._queue.popleft()
        return True

    def _write(self, data: bytes | memoryview, fds: tuple[int, ...]) -> int:
        try:
            if not fds:
                return self.socket.send(data, _SEND_FLAGS)
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            return self.socket.sendmsg([data], ancillary, _SEND_FLAGS)
        except BlockingIOError:
            return 0
        except ConnectionError as error:
            raise Disconnected(f"connection lost ({_reason(error)})") from error
        except OSError as error:
            raise ProtocolError(f"send: {_reason(error)}") from error

    # -- for front-ends ----------------------------------------------------------------------------

    def call(self, outgoing: Outgoing, timeout: float | None = None) -> Message | None:
        """Send a request and wait for its reply; None if it has none. A non-zero ack raises
        RequestFailed. Replies to requests sent before it, which nobody waits for, are checked likewise and
        dropped.

        What is served meanwhile may make calls of its own. Replies come in the order of the requests, so the
        inner call finds the outer one's first, and keeps it."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self.send(outgoing)
        while self.pending:
            self._wait(select.POLLOUT, deadline, timeout, outgoing)
            self.flush()
        if not outgoing.expects_reply:
            return None
        failed: Message | None = None
        self._waited_for.add(outgoing.number)
        try:
            while (message := self._kept.pop(outgoing.number, None)) is None:
                # The reply is hardly ever there at once: waiting first saves a futile read.
                self._wait(select.POLLIN, deadline, timeout, outgoing)
                other = None if outgoing.number in self._kept else self.receive()
                if other is None:
                    continue
                if other.number in self._waited_for:
                    self._kept[other.number] = other
                    continue
                other.close()
                if other.is_ack and other.status and failed is None:
                    failed = other
        finally:
            self._waited_for.discard(outgoing.number)
        if failed is None and message.is_ack and message.status:
            failed = message
        if failed is not None:
            message.close()
            text = f"the peer answered with failure: status {failed.status:#x}"
            raise RequestFailed(text, request=failed.name, status=failed.status, message=failed)
        return message

    def _wait(self, event: int, deadline: float | None, timeout: float | None, outgoing: Outgoing) -> None:
        poll = self._poll
        if poll is None:
            poll = self._poll = select.poll()
            poll.register(self.socket, event)
            self._polled = event
        left = None
        if deadline is not None:
            left = (deadline - time.monotonic()) * 1000
            if left <= 0:
                what = "no reply" if event == select.POLLIN else "could not be sent"
                raise ReplyTimeout(f"{what} within {timeout} s", request=outgoing.name)
        if event != self._polled:
            poll.modify(self.socket, event)
            self._polled = event
        for fd, _ in poll.poll(left):
            serve = self._meanwhile.get(fd)
            if serve is not None:
                serve()

    def serve_meanwhile(self, fd: int, serve: Callable[[], None] | None) -> None:
        """Call this when the descriptor is readable while ``call`` waits (None: no longer). The peer
        may want an answer on another channel before it gives ours."""
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(self.socket, select.POLLIN)
            self._polled = select.POLLIN
        if serve is not None:
            self._meanwhile[fd] = serve
            self._poll.register(fd, select.POLLIN)
        elif self._meanwhile.pop(fd, None) is not None:
            self._poll.unregister(fd)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Have an OSError of a socket say which path it is about; Python's does for files alone."""
    try:
        yield
    except OSError as error:
        if type(error) is OSError and error.errno is None:  # longer than a sockaddr_un
            raise OSError(errno.ENAMETOOLONG, str(error), os.fspath(path)) from None
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


def readable(fd: int) -> bool:
    """Is there something to read now? (select() cannot be asked of a descriptor of 1024 or more.)"""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def socket_of(fd: int, *, request: str | None = None) -> socket.socket:
    """A socket on a descriptor that a peer gave us, and that is closed if it is none."""
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise IncorrectFds("the descriptor is no socket", request=request)
        return socket.socket(fileno=fd)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError):  # not each kind of socket has a name, which Python asks for
            raise IncorrectFds(f"no socket that can be used: {_reason(error)}", request=request) from error
        raise


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds.tolist()


def _duplicate(fds: tuple[int, ...]) -> tuple[int, ...]:
    with contextlib.ExitStack() as undo:
        copies = []
        for fd in fds:
            copies.append(os.dup(fd))
            undo.callback(os.close, copies[-1])
        undo.pop_all()
        return tuple(copies)
