# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A connection at the level of bytes, which remembers what was said on it.

Sends what it is told, right or wrong, and judges of an answer only what is true of every answer. The
library's own Session would refuse to send, and to take, most of what has to be tried here. Every wait has
a limit. Knows the message table (for evidence); knows no rule.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import select
import socket
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from vhost.check.rule import Failed, NoReply, PeerClosed
from vhost.errors import InvalidMessage
from vhost.features import ProtocolF
from vhost.user.messages import BackendMsg, Channel, FrontendMsg, frame, table
from vhost.user.payloads import EMPTY, U64, Payload
from vhost.user.spec import HEADER, HEADER_SIZE, NEED_REPLY_FLAG, REPLY_FLAG, VERSION, VERSION_MASK, close_fds

Content = Payload | bytes
"""A payload, or the bytes of something that is none."""
LONGEST_REPLY = 1 << 16
"""Nothing in the specification is longer; a header that says more is garbage."""
_AFTERMATH = 0.2
"""Seconds in which a session ends that a request has ended."""
_MOST_FDS = 253  # SCM_MAX_FD
_ANCILLARY = socket.CMSG_SPACE(_MOST_FDS * 4)
_REPLY_ACK = int(ProtocolF.REPLY_ACK)


@dataclass(frozen=True, slots=True)
class Received:
    """A message that came, with nothing checked. Its descriptors are the connection's to close."""

    number: int
    flags: int
    payload: bytes
    fds: list[int] = field(default_factory=list)

    @property
    def u64(self) -> int:
        """The value of a payload that is a u64; Failed if it is none."""
        if len(self.payload) != 8:
            raise Failed(f"{name_of(self.number)}: a payload of {len(self.payload)} bytes, must be a u64 (8)")
        return U64.unpack(self.payload).value

    @property
    def need_reply(self) -> bool:
        return bool(self.flags & NEED_REPLY_FLAG)


def name_of(number: int, channel: Channel = Channel.MAIN) -> str:
    row = table(channel).get(number)
    return row.name if row is not None else f"message {number}"


class Peer:
    """One connection. ``protocol`` and ``features`` are what was negotiated on it so far."""

    def __init__(self, sock: socket.socket, timeout: float, *, channel: Channel = Channel.MAIN) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.timeout = timeout
        self.channel = channel
        self.protocol = 0
        self.features = 0
        self.closed = False
        self.transcript: list[str] = []
        """What was sent (->) and came (<-), decoded, oldest first."""
        self._fds: list[int] = []

    @property
    def acks(self) -> bool:
        """need_reply was negotiated."""
        return bool(self.protocol & _REPLY_ACK)

    def close(self) -> None:
        """Close the socket and every descriptor that came on it. Idempotent."""
        self.closed = True
        self.socket.close()
        fds, self._fds = self._fds, []
        close_fds(fds)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- sending -----------------------------------------------------------------------------------

    def send(
        self,
        number: int,
        content: Content = EMPTY,
        fds: Sequence[int] = (),
        *,
        need_reply: bool = False,
        reply: bool = False,
        version: int = VERSION,
        size: int | None = None,
    ) -> None:
        """One message, as said. PeerClosed if the connection is gone."""
        payload = content if isinstance(content, bytes) else content.pack()
        data = frame(number, payload, need_reply=need_reply, reply=reply, version=version, size=size)
        notes = [f"{len(fds)} fd"] * bool(fds) + ["need_reply"] * need_reply + ["reply"] * reply
        notes += [f"version {version}"] * (version != VERSION) + [f"size {size}"] * (size is not None)
        self._note("->", number, payload, False, notes)
        self.send_bytes(data, fds, quiet=True)

    def send_bytes(self, data: bytes, fds: Sequence[int] = (), *, quiet: bool = False) -> None:
        """Bytes that may be no message at all."""
        if not quiet:
            self.transcript.append(f"-> {len(data)} bytes {data[:32].hex()}{'...' if len(data) > 32 else ''}")
        deadline = time.monotonic() + self.timeout
        view = memoryview(data)
        while view:
            try:
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                sent = self.socket.sendmsg([view], ancillary, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline, "it does not read what we send")
                continue
            except OSError as error:
                self.transcript.append(f"-- could not be sent: {error.strerror}")
                raise PeerClosed(f"it closed the connection ({error.strerror})") from error
            view = view[sent:]
            fds = ()

    def drained(self, timeout: float) -> bool:
        """The peer has read all that was sent, within the time."""
        deadline = time.monotonic() + timeout
        waiting = bytearray(4)
        while True:
            fcntl.ioctl(self.socket, termios.TIOCOUTQ, waiting)
            if not any(waiting):
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.0005)

    # -- receiving ---------------------------------------------------------------------------------

    def receive(self, timeout: float | None = None) -> Received:
        """The next message. PeerClosed, or NoReply after ``timeout`` (by default the connection's)."""
        limit = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        fds: list[int] = []
        head = self._read(HEADER_SIZE, deadline, f"nothing came within {limit:g} s", fds)
        number, flags, size = HEADER.unpack(head)
        if size > LONGEST_REPLY:
            self.transcript.append(f"<- header {head.hex()}")
            raise Failed(f"a header that announces {size} bytes (request {number}, flags {flags:#x})")
        payload = self._read(size, deadline, f"the rest of a message did not come within {limit:g} s", fds)
        is_reply = bool(flags & REPLY_FLAG)
        notes = [f"{len(fds)} fd"] * bool(fds) + ["need_reply"] * bool(flags & NEED_REPLY_FLAG)
        notes += [f"flags {flags:#x}"] * (flags & VERSION_MASK != VERSION)
        self._note("<-", number, payload, is_reply, notes)
        return Received(number, flags, payload, fds)

    def _read(self, size: int, deadline: float, late: str, fds: list[int]) -> bytes:
        data = b""
        while len(data) < size:
            try:
                part, ancillary, _, _ = self.socket.recvmsg(
                    size - len(data), _ANCILLARY, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                self._wait(select.POLLIN, deadline, late)
                continue
            except OSError as error:
                self.transcript.append(f"<- connection lost: {error.strerror}")
                raise PeerClosed(f"it closed the connection ({error.strerror})") from error
            for level, kind, cmsg in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    got = array.array("i")
                    got.frombytes(cmsg[: len(cmsg) - len(cmsg) % got.itemsize])
                    fds += got
                    self._fds += got
            if not part:
                self.transcript.append("<- end of the connection")
                raise PeerClosed("it closed the connection")
            data += part
        return data

    def _wait(self, event: int, deadline: float, late: str) -> None:
        poll = select.poll()
        poll.register(self.socket, event)
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            self.transcript.append(f"-- {late}")
            raise NoReply(late)

    def quiet(self, seconds: float) -> bool:
        """Nothing comes for so long."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return not poll.poll(seconds * 1000)

    def ended(self, timeout: float | None = None) -> bool:
        """The peer closes the connection within the time; what it says before is dropped."""
        try:
            while True:
                self.receive(timeout)
        except PeerClosed:
            return True
        except NoReply:
            return False

    # -- questions and orders ----------------------------------------------------------------------

    def ask(
        self, number: int, content: Content = EMPTY, fds: Sequence[int] = (), *, need_reply: bool = False
    ) -> Received:
        """A request and its answer, whose header is judged."""
        self.send(number, content, fds, need_reply=need_reply)
        return self.answer(number)

    def answer(self, number: int) -> Received:
        """The answer to this request has to be what comes next."""
        name = name_of(number, self.channel)
        try:
            got = self.receive()
        except (NoReply, PeerClosed) as error:
            raise type(error)(f"{name}: {error}") from None
        if got.flags & VERSION_MASK != VERSION:
            raise Failed(f"{name}: the answer's flags {got.flags:#x} have version {got.flags & VERSION_MASK}")
        if not got.flags & REPLY_FLAG:
            raise Failed(f"{name}: the answer's flags {got.flags:#x} lack the reply flag")
        if got.number != number:
            raise Failed(f"{name}: an answer to {name_of(got.number, self.channel)} came instead")
        return got

    def sync(self) -> None:
        """All that was sent before has been handled, and none of it answered: the next answer is ours."""
        self.ask(FrontendMsg.GET_FEATURES)

    def status(self, number: int, content: Content = EMPTY, fds: Sequence[int] = ()) -> int:
        """The value of the answer to a request with need_reply; 0 is success."""
        return self.ask(number, content, fds, need_reply=True).u64

    def do(self, number: int, content: Content = EMPTY, fds: Sequence[int] = ()) -> None:
        """A request that has to be granted; without REPLY_ACK, one that has to leave the session alive."""
        if self.acks:
            status = self.status(number, content, fds)
            if status:
                raise Failed(f"{name_of(number)}: refused with {status:#x}")
        else:
            self.send(number, content, fds)
            self.sync()

    def refusal(self, number: int, content: Content = EMPTY, fds: Sequence[int] = ()) -> bool:
        """A request that ought to be refused; the peer may say so or close. Whether it did, which nobody
        can know without REPLY_ACK when the session just goes on: then it counts as refused."""
        try:
            if self.acks:
                return self.status(number, content, fds) != 0
            self.send(number, content, fds)
            self.sync()
        except PeerClosed:
            self.closed = True
        return True

    def must_refuse(self, number: int, why: str, content: Content = EMPTY, fds: Sequence[int] = ()) -> None:
        """Failed when the request is granted although it ``why``."""
        if not self.refusal(number, content, fds):
            after = "; then the session ended" if self.ended(_AFTERMATH) else ""
            raise Failed(f"{name_of(number)} was granted, although {why}{after}")

    def survive(self, number: int, content: Content = EMPTY, fds: Sequence[int] = ()) -> None:
        """A request for which any answer will do, but not a hang."""
        self.refusal(number, content, fds)

    # -- evidence ----------------------------------------------------------------------------------

    def _note(self, arrow: str, number: int, payload: bytes, reply: bool, notes: list[str]) -> None:
        row = table(self.channel).get(number)
        words = [name_of(number, self.channel)]
        if reply:
            words.append("reply")
        if payload:
            words.append(self._decoded(number, payload, reply) if row else f"<{payload[:32].hex()}>")
        if notes:
            words.append(f"[{', '.join(notes)}]")
        self.transcript.append(f"{arrow} {' '.join(words)}")

    def _decoded(self, number: int, payload: bytes, reply: bool) -> str:
        row = table(self.channel)[number]
        with contextlib.suppress(InvalidMessage, ValueError):
            if reply and not row.replies(self.protocol):
                return str(U64.unpack(payload))
            return row.show(row.decode(payload, reply=reply))
        return f"<{len(payload)} bytes {payload[:32].hex()}{'...' if len(payload) > 32 else ''}>"


def memfd(size: int, name: str = "vhost-check") -> int:
    """A file in memory, of zeroes; the caller's to close."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


__all__ = ["BackendMsg", "Content", "FrontendMsg", "Peer", "Received", "memfd", "name_of"]
