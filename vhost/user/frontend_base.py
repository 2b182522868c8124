# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""FrontendBase: a vhost-user session as the front-end has it, before any particular request.

Connects, negotiates, sends requests and waits for their answers, and serves what the back-end asks on the
channel of SET_BACKEND_REQ_FD. What the requests are: frontend.py, and the files of the areas that stand
apart, each a class on top of this one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

from vhost.errors import Disconnected, InvalidMessage, PartialMessage, ProtocolError, ReplyTimeout, VhostError
from vhost.features import ProtocolF, VhostF, missing_companions
from vhost.ops import VhostOps
from vhost.user.messages import FrontendMsg as F
from vhost.user.payloads import EMPTY, U64, Payload
from vhost.user.session import Channel, Message, Outgoing, Role, Session
from vhost.user.spec import Answer, close_fds
from vhost.user.transport import Transport, naming

log = logging.getLogger("vhost.frontend")

WANTED = (
    ProtocolF.MQ
    | ProtocolF.REPLY_ACK
    | ProtocolF.BACKEND_REQ
    | ProtocolF.CONFIG
    | ProtocolF.RESET_DEVICE
    | ProtocolF.CONFIGURE_MEM_SLOTS
    | ProtocolF.STATUS
    | ProtocolF.MTU
    | ProtocolF.RARP
    | ProtocolF.LOG_SHMFD
    | ProtocolF.INFLIGHT_SHMFD
    | ProtocolF.DEVICE_STATE
    | ProtocolF.PAGEFAULT
    | ProtocolF.CROSS_ENDIAN
    | ProtocolF.CRYPTO_SESSION
    | ProtocolF.BACKEND_SEND_FD
    | ProtocolF.HOST_NOTIFIER
    | ProtocolF.SHARED_OBJECT
    | ProtocolF.SHMEM_MAP
    | ProtocolF.GPA_ADDRESSES
)
RETRY_PAUSE = 0.05
MESSAGES_PER_LOOK = 16
"""So that a back-end that asks without end does not keep us from our own timeouts."""

# Plain integers: an operation on an IntFlag costs as much as a system call.
_PROTOCOL_FEATURES = int(VhostF.PROTOCOL_FEATURES)


class FrontendBase(VhostOps):
    """Requests for subclasses to make: ``_send``, ``_get``, ``_call``. What the back-end requests goes to
    the method ``_serve_`` plus the row's handler, with the same rules as a back-end's handlers: it returns
    the reply's payload, an Answer, or None, and raises VhostError to refuse."""

    def __init__(
        self, sock: socket.socket, *, timeout: float | None = 10.0, protocol_features: int = int(WANTED)
    ) -> None:
        """Begins the session on a connected socket, which is this object's from now on."""
        self.timeout = timeout
        self.session = Session(Role.FRONTEND)
        self.transport = Transport(sock, self.session)
        self.channel: Transport | None = None
        self.offered_features = 0
        self.protocol_features = 0
        self.offered_protocol_features = 0
        self._channel_open = False
        self._serves = False
        """We are about to answer a request of the back-end's; that may take requests of ours."""
        self._rings: set[int] = set()
        self._news: dict[str, Callable[[], None]] = {}
        try:
            self._negotiate(protocol_features)
        except BaseException:
            self.close()
            raise

    @classmethod
    def connect(
        cls,
        path: str | os.PathLike[str],
        *,
        retry: float | None = None,
        timeout: float | None = 10.0,
        protocol_features: int = int(WANTED),
    ) -> Self:
        """Connect to a listening back-end. With ``retry``, a socket that is not there yet, refuses, has a
        full backlog, or dies during the handshake is tried again, all of it, for that many seconds."""
        deadline = None if retry is None else time.monotonic() + retry
        while True:
            try:
                return cls._connect_once(path, timeout, protocol_features)
            except (ConnectionError, FileNotFoundError, BlockingIOError, Disconnected, PartialMessage):
                if deadline is None or time.monotonic() >= deadline:
                    raise
                time.sleep(RETRY_PAUSE)

    @classmethod
    def _connect_once(
        cls, path: str | os.PathLike[str], timeout: float | None, protocol_features: int
    ) -> Self:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            with naming(path):
                sock.connect(os.fspath(path))
        except BaseException:
            sock.close()
            raise
        return cls(sock, timeout=timeout, protocol_features=protocol_features)

    @classmethod
    def listen(
        cls,
        path: str | os.PathLike[str],
        *,
        timeout: float | None = 10.0,
        protocol_features: int = int(WANTED),
    ) -> Self:
        """Wait for one back-end that connects to us (a back-end in client mode). The socket is removed
        once it has."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.settimeout(timeout)
            with naming(path):
                listener.bind(os.fspath(path))
            try:
                listener.listen(1)
                try:
                    sock, _ = listener.accept()
                except TimeoutError:
                    raise ReplyTimeout(f"no back-end connected to {path} within {timeout} s") from None
            finally:
                os.unlink(path)
        return cls(sock, timeout=timeout, protocol_features=protocol_features)

    def _negotiate(self, wanted: int) -> None:
        self.offered_features = self._get(F.GET_FEATURES).value
        if self.offered_features & _PROTOCOL_FEATURES:
            self.offered_protocol_features = self._get(F.GET_PROTOCOL_FEATURES).value
            chosen = self.offered_protocol_features & wanted
            for lonely in missing_companions(chosen):
                chosen &= ~lonely
            self._send(F.SET_PROTOCOL_FEATURES, U64(chosen))
            self.protocol_features = self.session.protocol_features = chosen
        self._send(F.SET_OWNER)
        if self._has(ProtocolF.BACKEND_REQ):
            self._open_channel()

    def _open_channel(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        session = Session(Role.FRONTEND, Channel.BACKEND_REQ)
        session.protocol_features = self.protocol_features
        self.channel = Transport(ours, session)
        self._channel_open = True
        self.transport.serve_meanwhile(ours.fileno(), self._serve_channel)
        with theirs:
            self._send(F.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])

    # -- requests ----------------------------------------------------------------------------------

    def _has(self, feature: ProtocolF) -> bool:
        return bool(self.protocol_features & int(feature))

    def _send(self, number: F, payload: Payload = EMPTY, fds: Sequence[int] = ()) -> None:
        """A request without a reply of its own; waits for the ack where REPLY_ACK was negotiated."""
        message = self._call(self.session.request(number, payload, fds))
        if message is not None:
            message.close()

    def _get(self, number: F, payload: Payload = EMPTY) -> Any:
        """A request with a reply: its payload."""
        message = self._call(self.session.request(number, payload))
        if message is None:
            raise ProtocolError("the message table knows no reply", request=number.name)
        message.close()
        return message.payload

    def _call(self, outgoing: Outgoing) -> Message | None:
        reply = self.transport.call(outgoing, self.timeout)
        if self._serves:
            return reply  # another request may wait, and will deliver
        try:
            self._deliver()
        except BaseException:
            if reply is not None:
                reply.close()
            raise
        return reply

    # -- events, and the end -----------------------------------------------------------------------

    def fileno(self) -> int:
        """The back-end's channel if there is one; else the session's own socket, which becomes
        readable when the back-end goes away."""
        return (self.channel or self.transport).fileno()

    def step(self) -> bool:
        if self.channel is None:
            return not self._peer_gone()
        self._serve_channel()
        self._deliver()
        return self._channel_open

    def _serve_channel(self) -> None:
        """Answer what the back-end asks; what came of it is told by ``_deliver``, for this may run in
        the middle of a request of ours."""
        assert self.channel is not None
        # The next one waits until this one has its answer: a back-end that asks without end would have us
        # answer it deeper and deeper within each other.
        self._serves = True
        self.transport.serve_meanwhile(self.channel.fileno(), None)
        try:
            self._serve_some(self.channel)
        finally:
            self._serves = False
            if self._channel_open:
                self.transport.serve_meanwhile(self.channel.fileno(), self._serve_channel)

    def _serve_some(self, channel: Transport) -> None:
        for _ in range(MESSAGES_PER_LOOK):
            if not self._channel_open:
                return
            try:
                message = channel.receive()
                if message is None:
                    channel.flush()
                    break
                with contextlib.closing(message):
                    self._serve(channel, message)
            except ProtocolError as error:
                self._refuse_on_channel(error)

    def _serve(self, channel: Transport, message: Message) -> None:
        try:
            answer = getattr(self, f"_serve_{message.spec.handler}")(message)
        except VhostError as error:
            log.warning("refused: %s", str(error))
            channel.send(channel.session.ack(message, 1))
            return
        if answer is None:
            channel.send(channel.session.ack(message, 0))
            return
        payload, fds = Answer.of(answer)
        try:
            channel.send(channel.session.reply(message, payload, fds))
        finally:
            close_fds(fds)

    def _refuse_on_channel(self, error: ProtocolError) -> None:
        assert self.channel is not None
        try:
            if error.message is None:
                raise error
            self.channel.send(self.channel.session.ack(error.message, 1))
        except ProtocolError as fatal:
            # The session itself can go on without it.
            log.info("back-end channel ends: %s", str(fatal))
            self._channel_open = False
            self.transport.serve_meanwhile(self.channel.fileno(), None)

    def _known_ring(self, index: int, what: str) -> None:
        """InvalidMessage if the ring is none that was set up."""
        if index not in self._rings:
            raise InvalidMessage(f"ring {index} was not set up", request=what)

    def _device_was_reset(self) -> None:
        """What the back-end told of its device is no longer so."""

    def _serve_config_change_msg(self, message: Message) -> None:
        self._tell("config", self._tell_config_change)

    def _tell_config_change(self) -> None:
        if self.on_config_change is not None:
            self.on_config_change()

    def _tell(self, what: str, callback: Callable[[], None]) -> None:
        """Call this when no request of ours waits; once, however often the same news comes until then."""
        self._news[what] = callback

    def _deliver(self) -> None:
        while self._news:  # a callback may make requests, and so more of them
            self._news.pop(next(iter(self._news)))()

    def _peer_gone(self) -> bool:
        try:
            return not self.transport.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        if self.channel is not None:
            self.channel.close()
        self.transport.close()
