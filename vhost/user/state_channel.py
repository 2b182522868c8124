# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The channel through which a device's state travels (vhost-user, "Migrating back-end state").

A pipe, or a stream socket: the writing end writes all it has and closes, the reading end reads up to the end
of file. Neither end here ever waits, whatever the other side does to its descriptors, and no SIGPIPE comes
of it. Knows nothing of messages, nor of what the bytes mean; serves the back-end and the front-end alike.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

from vhost.errors import IncorrectFds, ProtocolError
from vhost.user.transport import socket_of

CHUNK = 1 << 16
CHUNKS_PER_STEP = 16
"""So that a long state does not keep everything else that the thread does waiting."""

State = bytes | bytearray | memoryview
_NOW = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


class StateChannel(ABC):
    """One end."""

    @abstractmethod
    def fileno(self) -> int: ...

    @abstractmethod
    def read(self) -> bytes | None:
        """What is there, up to CHUNK bytes; empty at the end of file; None: nothing yet. Raises OSError."""

    @abstractmethod
    def write(self, data: memoryview) -> int:
        """How many bytes of it were taken; 0: none for now. BrokenPipeError: nobody reads any more."""

    @abstractmethod
    def close(self) -> None: ...


class PipeChannel(StateChannel):
    """An end of a pipe that is ours alone: nobody else can make it wait."""

    def __init__(self, fd: int) -> None:
        """The descriptor is this object's from now on."""
        self._fd = fd
        os.set_blocking(fd, False)

    def fileno(self) -> int:
        return self._fd

    def read(self) -> bytes | None:
        try:
            return os.read(self._fd, CHUNK)
        except BlockingIOError:
            return None

    def write(self, data: memoryview) -> int:
        pending = signal.SIGPIPE in signal.sigpending()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGPIPE,))
        try:
            return os.write(self._fd, data[:CHUNK])
        except BlockingIOError:
            return 0
        except BrokenPipeError:
            # A library cannot know what the signal does to the process: take back what that raised.
            if not pending:
                signal.sigtimedwait((signal.SIGPIPE,), 0)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class SocketChannel(StateChannel):
    def __init__(self, sock: socket.socket) -> None:
        """The socket is this object's from now on."""
        sock.setblocking(False)
        self._socket = sock

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self) -> bytes | None:
        try:
            return self._socket.recv(CHUNK, _NOW)
        except BlockingIOError:
            return None

    def write(self, data: memoryview) -> int:
        try:
            return self._socket.send(data[:CHUNK], _NOW)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        self._socket.close()


def adopt(fd: int, *, writes: bool) -> StateChannel | None:
    """An end on a descriptor of the other side's, which stays the caller's. IncorrectFds if it was opened
    for the other direction; None if there is no way to use it without ever waiting."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISSOCK(mode):
        try:
            sock = socket_of(os.dup(fd))
        except IncorrectFds:
            return None
        if sock.type == socket.SOCK_STREAM:
            return SocketChannel(sock)
        sock.close()
        return None
    if not stat.S_ISFIFO(mode):
        return None
    opened = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    if opened == (os.O_RDONLY if writes else os.O_WRONLY):
        raise IncorrectFds(f"the pipe's end is for {'reading' if writes else 'writing'}")
    # Whether a descriptor waits is a property of the open file, which the other side shares and can change
    # at any time. So it is opened again: another open file on the same pipe.
    try:
        again = os.open(f"/proc/self/fd/{fd}", (os.O_WRONLY if writes else os.O_RDONLY) | os.O_NONBLOCK)
    except OSError:
        return None  # another user's pipe, or nobody reads it
    return PipeChannel(again)


def pair() -> tuple[StateChannel, int]:
    """A channel of our own: this side's end, and a descriptor for the other side."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return SocketChannel(ours), theirs.detach()


class Transfer(ABC):
    """Moves a state through a channel, as far as it goes now with each step."""

    events: int
    """What to poll the channel for."""

    def __init__(self, channel: StateChannel) -> None:
        self.channel = channel
        self.moved = 0
        """Bytes so far."""

    def fileno(self) -> int:
        return self.channel.fileno()

    @abstractmethod
    def step(self) -> bool:
        """True: all of it is through, and the channel can be closed. ProtocolError: it never will be."""

    def close(self) -> None:
        self.channel.close()


class Writing(Transfer):
    """Sends a state, or its pieces one after the other as the channel takes them."""

    events = select.POLLOUT

    def __init__(self, channel: StateChannel, state: State | Iterable[State]) -> None:
        super().__init__(channel)
        whole = isinstance(state, (bytes, bytearray, memoryview))
        self._pieces: Iterator[State] = iter((state,) if whole else state)  # type: ignore[arg-type]
        self._rest = memoryview(b"")

    def step(self) -> bool:
        for _ in range(CHUNKS_PER_STEP):
            while not self._rest:
                piece = next(self._pieces, None)
                if piece is None:
                    return True
                self._rest = memoryview(piece).cast("B")
            try:
                taken = self.channel.write(self._rest)
            except OSError as error:
                raise ProtocolError(
                    f"device state: the other side stopped to read after {self.moved} bytes"
                    f" ({error.strerror or error})"
                ) from error
            if not taken:
                return False
            self.moved += taken
            self._rest = self._rest[taken:]
        return False


class Reading(Transfer):
    """Receives a state of at most ``limit`` bytes."""

    events = select.POLLIN

    def __init__(self, channel: StateChannel, limit: int) -> None:
        super().__init__(channel)
        self.limit = limit
        self.state = bytearray()

    def step(self) -> bool:
        for _ in range(CHUNKS_PER_STEP):
            try:
                piece = self.channel.read()
            except OSError as error:
                raise ProtocolError(
                    f"device state: lost after {self.moved} bytes ({error.strerror or error})"
                ) from error
            if piece is None:
                return False
            if not piece:
                return True
            self.state += piece
            self.moved += len(piece)
            if self.moved > self.limit:
                raise ProtocolError(f"device state: longer than {self.limit} bytes")
        return False
