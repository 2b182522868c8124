# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a program has of a vsock driver: ``Stream`` and ``Listener``, whose methods are named, and behave,
as those of Python's sockets do.

They know timeouts and errors. How packets travel is the ``Vsock``'s business, what they mean the
``Connection``'s. Any thread may call them.
"""

from __future__ import annotations

import errno
import io
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from vhost.drivers.vsock_connection import Address, Connection, State, VsockBroken
from vhost.errors import ReplyTimeout
from vhost.virtio_vsock import SeqF, ShutdownF, VsockType

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from vhost.drivers.vsock import Vsock

_HOW = {
    socket.SHUT_RD: int(ShutdownF.RECEIVE),
    socket.SHUT_WR: int(ShutdownF.SEND),
    socket.SHUT_RDWR: int(ShutdownF.RECEIVE | ShutdownF.SEND),
}


class _Endpoint:
    """Timeouts, and the end."""

    def __init__(self, vsock: Vsock, kind: int, timeout: float | None) -> None:
        self._vsock = vsock
        self._kind = kind
        self._closed = False
        self.settimeout(timeout)

    def settimeout(self, timeout: float | None) -> None:
        """Seconds that a call waits; None: for ever; 0: it does not, and raises BlockingIOError."""
        if timeout is not None and timeout < 0:
            raise ValueError(f"timeout {timeout}: must not be negative")
        self._timeout = timeout

    def gettimeout(self) -> float | None:
        return self._timeout

    def setblocking(self, flag: bool) -> None:
        self.settimeout(None if flag else 0)

    @property
    def kind(self) -> VsockType:
        """Of bytes, or of messages."""
        return VsockType(self._kind)

    @property
    def closed(self) -> bool:
        return self._closed

    def _wait(self, ready: Callable[[], bool], what: str, deadline: float | None = None) -> None:
        """Until ``ready``; the lock is held, and let go of meanwhile."""
        timeout = self._timeout if deadline is None else max(deadline - time.monotonic(), 0.0)
        if self._vsock._wait(lambda: self._closed or ready(), timeout):
            self._check_open()
        elif self._timeout == 0:
            raise BlockingIOError(errno.EAGAIN, f"{self}: {what}: {os.strerror(errno.EAGAIN)}")
        else:
            raise ReplyTimeout(f"{self}: {what}: not within {self._timeout} s")

    def _check_open(self) -> None:
        if self._closed:
            raise OSError(errno.EBADF, f"{self}: is closed")

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Stream(_Endpoint):
    """A connection: of bytes, or of messages (seqpacket). To be closed, for its flow occupies the ports
    until then.

    Errors are those of sockets, and VhostErrors as well: ``VsockReset`` (a ConnectionResetError),
    ``VsockRefused``, ``VsockBroken`` (a BrokenPipeError), ``ReplyTimeout`` (a TimeoutError).
    """

    def __init__(self, vsock: Vsock, connection: Connection, timeout: float | None) -> None:
        super().__init__(vsock, connection.kind, timeout)
        self._connection = connection

    def getsockname(self) -> Address:
        """(CID, port) of ours."""
        return self._connection.local

    def getpeername(self) -> Address:
        return self._connection.remote

    # ------------------------------------------------------------------ from the peer

    def recv(self, bufsize: int) -> bytes:
        """Up to ``bufsize`` bytes, as soon as there are any; ``b""`` at the end. Seqpacket: one message,
        whose bytes behind ``bufsize`` are lost."""
        return self.recvmsg(bufsize)[0]

    def recvmsg(self, bufsize: int) -> tuple[bytes, list[Any], int, Address]:
        """The same with flags, which are the third: MSG_EOR, and MSG_TRUNC if bytes were lost."""
        if bufsize < 0:
            raise ValueError(f"{self}: recv of {bufsize} bytes")
        with self._vsock._lock:
            connection = self._await_data()
            flags = 0
            if self._kind == VsockType.SEQPACKET:
                flags = socket.MSG_EOR if connection.ends_record else 0
                flags |= socket.MSG_TRUNC if connection.available > bufsize else 0
            data = connection.take(bufsize)
            if connection.wants:
                self._vsock._changed(connection)
            return data, [], flags, connection.remote

    def recv_into(self, buffer: Buffer, nbytes: int = 0) -> int:
        """As recv, into a buffer (0: as much as it takes); returns how many bytes."""
        with memoryview(buffer) as whole, whole.cast("B") as view, self._vsock._lock:
            if not 0 <= nbytes <= len(view):
                raise ValueError(f"{self}: recv of {nbytes} bytes into a buffer of {len(view)}")
            connection = self._await_data()
            size = connection.take_into(view[: nbytes or len(view)])
            if connection.wants:
                self._vsock._changed(connection)
            return size

    def _await_data(self) -> Connection:
        connection = self._connection
        self._check_open()
        if not connection.readable:
            self._wait(lambda: connection.readable or connection.state is State.CLOSED, "recv")
            if not connection.readable and connection.error is not None:
                raise _again(connection.error)
        return connection

    # ------------------------------------------------------------------ to the peer

    def send(self, data: Buffer, flags: int = 0) -> int:
        """Send as much as the peer has room for now, and wait for room if there is none: how many bytes.

        Seqpacket: the whole message, which may not be longer than the peer's buffer (EMSGSIZE); MSG_EOR
        ends a record."""
        with memoryview(data) as whole, whole.cast("B") as view, self._vsock._lock:
            return self._send(view, flags, None)

    def sendall(self, data: Buffer, flags: int = 0) -> None:
        """Send all of it, within the timeout."""
        deadline = None if not self._timeout else time.monotonic() + self._timeout
        with memoryview(data) as whole, whole.cast("B") as view, self._vsock._lock:
            at = self._send(view, flags, deadline)
            while at < len(view):
                at += self._send(view[at:], flags, deadline)

    def _send(self, view: memoryview, flags: int, deadline: float | None) -> int:
        if flags & ~socket.MSG_EOR:
            raise ValueError(f"{self}: flags {flags:#x}: MSG_EOR alone is known")
        self._check_open()
        connection, vsock = self._connection, self._vsock
        if not view:
            return 0
        marks, least = 0, 1
        if self._kind == VsockType.SEQPACKET:
            least = len(view)
            marks = int(SeqF.EOM | SeqF.EOR) if flags else int(SeqF.EOM)

        def ready() -> bool:
            if connection.state is State.CONNECTING:
                return False
            return self._send_error(least) is not None or vsock._can_send(connection, least)

        if not ready():
            if connection.credit < least:
                connection.ask_credit()
                vsock._changed(connection)
            self._wait(ready, "send", deadline)
        error = self._send_error(least)
        if error is not None:
            raise error
        return vsock._transmit(connection, view, marks)

    def _send_error(self, size: int) -> OSError | None:
        connection = self._connection
        if connection.error is not None:
            return _again(connection.error)
        if connection.local_shut & ShutdownF.SEND:
            return VsockBroken(errno.EPIPE, f"{self}: sending was shut down")
        if connection.peer_shut & ShutdownF.RECEIVE:
            return VsockBroken(errno.EPIPE, f"{self}: the peer has shut down receiving")
        if self._kind == VsockType.SEQPACKET and connection.state is State.ESTABLISHED:
            limit = min(connection.peer_buf_alloc, self._vsock.max_message)
            if size > limit:
                return OSError(errno.EMSGSIZE, f"{self}: a message of {size} bytes, limit {limit}")
        return None

    # ------------------------------------------------------------------ state, and the end

    @property
    def connected(self) -> bool:
        """Has the peer answered, and is the connection not over?"""
        return self._connection.state is State.ESTABLISHED

    @property
    def readable(self) -> bool:
        """Would recv return or raise at once?"""
        return self._closed or self._connection.readable or self._connection.state is State.CLOSED

    @property
    def writable(self) -> bool:
        """Would send return or raise at once?"""
        if self._closed or self._connection.state is State.CLOSED:
            return True
        return self._send_error(0) is not None or self._vsock._can_send(self._connection, 1)

    def shutdown(self, how: int) -> None:
        """SHUT_RD, SHUT_WR or SHUT_RDWR, for good. After SHUT_WR the peer reads all that was sent, and
        then the end."""
        flags = _HOW.get(how)
        if flags is None:
            raise ValueError(f"{self}: shutdown({how}): must be SHUT_RD, SHUT_WR or SHUT_RDWR")
        with self._vsock._lock:
            self._check_open()
            if self._connection.state is State.CONNECTING:
                raise OSError(errno.ENOTCONN, f"{self}: is not connected yet")
            self._connection.shutdown(flags)
            self._vsock._changed(self._connection)

    def close(self) -> None:
        """End the connection; what was sent before still arrives. Never waits. Idempotent."""
        with self._vsock._lock:
            if self._closed:
                return
            self._closed = True
            self._vsock._close_connection(self._connection)

    def makefile(self, mode: str = "r", buffering: int = -1, **text: Any) -> IO[Any]:
        """A file object on it, as sockets have; closing it leaves the connection open."""
        if set(mode) - set("rwb") or not set(mode) & set("rw"):
            raise ValueError(f"{self}: mode {mode!r}: must be of r, w and b")
        raw = _File(self, "r" in mode, "w" in mode)
        size = io.DEFAULT_BUFFER_SIZE if buffering < 0 else buffering
        if not size:
            if "b" not in mode:
                raise ValueError(f"{self}: unbuffered files are of bytes")
            return raw  # type: ignore[return-value]
        buffered: Any
        if raw.readable() and raw.writable():
            buffered = io.BufferedRWPair(raw, raw, size)
        else:
            buffered = io.BufferedReader(raw, size) if raw.readable() else io.BufferedWriter(raw, size)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, **text)

    def __str__(self) -> str:
        return str(self._connection)

    def __repr__(self) -> str:
        state = "closed" if self._closed else self._connection.state.value
        return f"<Stream {self}: {state}>"


class Listener(_Endpoint):
    """A port of ours that peers may connect to; ``backlog`` of them before the first is accepted."""

    def __init__(self, vsock: Vsock, port: int, kind: int, backlog: int, timeout: float | None) -> None:
        super().__init__(vsock, kind, timeout)
        self.port = port
        self.backlog = backlog
        self._waiting: deque[Connection] = deque()

    def getsockname(self) -> Address:
        return self._vsock.guest_cid, self.port

    def accept(self) -> tuple[Stream, Address]:
        """The next connection, and who is at its other end. It has the driver's timeout."""
        with self._vsock._lock:
            self._check_open()
            self._wait(lambda: bool(self._waiting), "accept")
            connection = self._waiting.popleft()
            return Stream(self._vsock, connection, self._vsock.timeout), connection.remote

    @property
    def readable(self) -> bool:
        """Would accept return or raise at once?"""
        return self._closed or bool(self._waiting)

    def close(self) -> None:
        """Listen no more; who was not accepted is reset. Idempotent."""
        with self._vsock._lock:
            if self._closed:
                return
            self._closed = True
            self._vsock._close_listener(self)

    def __str__(self) -> str:
        return f"vsock {self._vsock.guest_cid}:{self.port}"

    def __repr__(self) -> str:
        return f"<Listener {self}{': closed' if self._closed else ''}>"


class _File(io.RawIOBase):
    def __init__(self, stream: Stream, reads: bool, writes: bool) -> None:
        self._stream, self._reads, self._writes = stream, reads, writes

    def readable(self) -> bool:
        return self._reads

    def writable(self) -> bool:
        return self._writes

    def readinto(self, buffer: Any) -> int | None:
        try:
            return self._stream.recv_into(buffer)
        except BlockingIOError:
            return None

    def write(self, data: Any) -> int | None:
        try:
            return self._stream.send(data)
        except BlockingIOError:
            return None


def _again(error: Any) -> OSError:
    """Each call raises an exception of its own: one that is kept would collect tracebacks."""
    fresh: OSError = type(error)(*error.args)
    return fresh
