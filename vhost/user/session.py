# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The state of one vhost-user channel, without I/O: bytes and descriptors in, messages out.

Knows the message table, what was negotiated and which replies are outstanding. Knows no socket, no
thread and no device; it touches descriptors only to close those that it rejects.

    session = Session(Role.BACKEND)
    while True:
        message = session.receive(*read(session.wanted))     # never more than ``wanted`` bytes
        if message is not None:
            write(session.reply(message, U64(features)))

Errors: what leaves the stream in step (one message was refused) carries ``error.message``, which can
be answered by ``ack(error.message, 1)``; any other error is the end of the session.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence

from vhost.errors import (
    Disconnected,
    InactiveFeature,
    IncorrectFds,
    InvalidMessage,
    InvalidState,
    OversizedMessage,
    PartialMessage,
    ProtocolError,
    UnsupportedRequest,
)
from vhost.features import ProtocolF
from vhost.user.messages import FrontendMsg, frame, table, unknown
from vhost.user.payloads import EMPTY, U64, Opaque, Payload
from vhost.user.spec import (
    HEADER,
    HEADER_SIZE,
    MAX_FDS,
    NEED_REPLY_FLAG,
    NO_FDS,
    POSTCOPY_ACK_SIZE,
    REPLY_FLAG,
    VERSION,
    VERSION_MASK,
    Channel,
    Message,
    Outgoing,
    Policy,
    Role,
    Spec,
    close_fds,
)

_XEN_MMAP = int(ProtocolF.XEN_MMAP)
_REPLY_ACK = int(ProtocolF.REPLY_ACK)
POSTCOPY_ACK = int(FrontendMsg.SET_MEM_TABLE)

Trace = Callable[[str, Message | Outgoing], None]
"""Called with "recv" or "send" and the message."""


class Session:
    """One channel of a vhost-user connection, seen from one side."""

    def __init__(
        self,
        role: Role,
        channel: Channel = Channel.MAIN,
        *,
        serves: Collection[int] | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.role = role
        self.channel = channel
        self.requester = (role is Role.FRONTEND) == (channel is Channel.MAIN)
        """This side sends the requests of the channel; the other side answers."""
        self.table = table(channel)
        # The GPU protocol knows neither versions nor acks.
        self._version = 0 if channel is Channel.GPU else VERSION
        self._acks = 0 if channel is Channel.GPU else _REPLY_ACK
        self.serves: frozenset[int] = frozenset(self.table if serves is None else serves)
        """The requests that this side answers; the others are refused as UnsupportedRequest."""
        self.trace = trace
        self.features = 0
        """Set by the owner of the session when negotiated, as are the protocol features."""
        self._protocol_features = 0
        self._xen = False
        self.offered_protocol_features = 0
        """Taken from the reply to GET_PROTOCOL_FEATURES as it passes."""
        self.postcopy = False
        """From POSTCOPY_LISTEN to POSTCOPY_END; set by the owner of the session."""
        self.closed = False
        # Why it ended, in words: an error keeps its frames, and with them all that the caller has.
        self._failed: str | None = None
        # The replies that the peer owes, and whether they have the row's payload.
        self._outstanding: deque[tuple[Spec, bool]] = deque()
        self._answers = 0
        self._data = bytearray()
        self._fds: list[int] = []
        self._target = HEADER_SIZE
        self._header: tuple[Spec, int, bool, bool] | None = None  # row, flags, own reply, known

    @property
    def protocol_features(self) -> int:
        return self._protocol_features

    @protocol_features.setter
    def protocol_features(self, value: int) -> None:
        # A plain integer: IntFlag remembers every combination that it ever saw, here the peer's.
        self._protocol_features = int(value)
        self._xen = bool(self._protocol_features & _XEN_MMAP)

    # -- receiving ---------------------------------------------------------------------------------

    @property
    def wanted(self) -> int:
        """How many bytes to read next: the rest of a header, or of its payload. Reading more could
        merge this message with the next one and its descriptors."""
        return self._target - len(self._data)

    @property
    def outstanding(self) -> int:
        """How many replies the peer owes."""
        return len(self._outstanding)

    @property
    def in_message(self) -> bool:
        """Part of a message was received."""
        return bool(self._data) or self._header is not None

    def receive(self, data: bytes, fds: Sequence[int] = (), truncated: bool = False) -> Message | None:
        """Take what was read, at most ``wanted`` bytes. The descriptors are the session's from here on,
        whatever happens. None: more is needed."""
        if fds:
            self._fds += fds
        try:
            message = self._receive(data, truncated)
        except ProtocolError as error:
            self._drop_fds()
            if error.message is None:
                self._failed = str(error)
            elif self.trace is not None:
                self.trace("recv", error.message)
            raise
        except BaseException:
            self._drop_fds()
            raise
        if message is not None and self.trace is not None:
            self.trace("recv", message)
        return message

    def receive_eof(self, reason: str = "connection closed by the peer") -> None:
        """The peer closed the stream: raises Disconnected, or PartialMessage inside a message."""
        self._drop_fds()
        self._check_open()
        self._failed = str(self._end(reason))
        raise self._end(reason)

    def _end(self, reason: str) -> ProtocolError:
        if self.in_message:
            where = f"{reason} after {len(self._data)} of {self._target} bytes of the "
            if self._header is None:
                return PartialMessage(f"{where}header")
            return PartialMessage(f"{where}payload", request=self._header[0].name)
        if self._outstanding:
            spec = self._outstanding[0][0]
            return Disconnected(f"{reason} before the reply", request=spec.name)
        return Disconnected(reason)

    def close(self) -> None:
        """Close the descriptors of a message that never became whole. Idempotent."""
        self.closed = True
        self._drop_fds()

    def _check_open(self) -> None:
        if self.closed:
            raise InvalidState("session was closed")
        if self._failed is not None:
            raise InvalidState(f"session ended before: {self._failed}")

    def _drop_fds(self) -> None:
        fds, self._fds = self._fds, []
        close_fds(fds)

    def _receive(self, data: bytes, truncated: bool) -> Message | None:
        if self.closed or self._failed is not None:
            self._check_open()
        if truncated:
            raise IncorrectFds("more descriptors than can be received (ancillary data truncated)")
        if len(self._fds) > MAX_FDS:
            # One for each fragment of a long message would exhaust the process.
            raise IncorrectFds(f"{len(self._fds)} file descriptors with one message, limit {MAX_FDS}")
        if self._data or len(data) != self._target:
            if len(data) > self.wanted:
                raise ValueError(f"{len(data)} bytes received, wanted at most {self.wanted}")
            self._data += data
            if len(self._data) < self._target:
                return None
            data = bytes(self._data)
            self._data.clear()
        if self._header is None:
            self._header = self._read_header(data)
            # _target is the payload's size now; without one the message is whole.
            if self._target:
                return None
            data = b""
        spec, flags, own_reply, known = self._header
        self._header = None
        self._target = HEADER_SIZE
        if self.requester:
            return self._read_reply(spec, own_reply, data)
        return self._read_request(spec, flags, own_reply, known, data)

    def _read_header(self, data: bytes) -> tuple[Spec, int, bool, bool]:
        number, flags, size = HEADER.unpack(data)
        if number == 0 and size == POSTCOPY_ACK_SIZE and self.postcopy:
            # QEMU repeats its last request as the acknowledgement, which is none if no region changed.
            number = POSTCOPY_ACK
        row = self.table.get(number)
        known = row is not None
        spec = row if row is not None else unknown(number, Role.BACKEND if self.requester else Role.FRONTEND)
        if flags & VERSION_MASK != VERSION and self._version:
            text = f"header flags {flags:#x}: version {flags & VERSION_MASK}, must be {VERSION}"
            raise InvalidMessage(text, request=spec.name)
        if self.requester:
            if not flags & REPLY_FLAG:
                raise InvalidMessage(
                    f"header flags {flags:#x}: a request where a reply was due", request=spec.name
                )
            if not self._outstanding:
                raise InvalidMessage("a reply to nothing: no request is outstanding", request=spec.name)
            expected, own_reply = self._outstanding[0]
            if expected.id != number:
                raise InvalidMessage(f"reply to {spec.name}, expected one to {expected.name}")
            limit = spec.max_size(True, xen=self._xen) if own_reply else U64.MAX_SIZE
        else:
            if flags & REPLY_FLAG and self._version:
                raise InvalidMessage(f"header flags {flags:#x}: REPLY on a request", request=spec.name)
            own_reply = spec.replies(self.protocol_features, self.postcopy, size)
            limit = spec.max_size(False, xen=self._xen) if known else Opaque.MAX_SIZE
        if size > limit:
            raise OversizedMessage(f"payload size {size}, limit {limit}", request=spec.name)
        self._target = size
        return spec, flags, own_reply, known

    def _read_reply(self, spec: Spec, own_reply: bool, data: bytes) -> Message:
        self._outstanding.popleft()
        self._answers += 1
        payload: Payload
        try:
            payload = spec.decode(data, reply=True, xen=self._xen) if own_reply else U64.unpack(data)
        except InvalidMessage as error:
            raise InvalidMessage(f"reply: {error.text}", request=spec.name) from None
        rule = spec.reply_fds if own_reply else NO_FDS
        if self._fds or rule is not NO_FDS:
            complaint = rule.complaint(len(self._fds), payload)
            if complaint:
                raise IncorrectFds(f"reply: {complaint}", request=spec.name)
        if own_reply and spec.name.endswith("GET_PROTOCOL_FEATURES") and isinstance(payload, U64):
            self.offered_protocol_features = payload.value
        fds, self._fds = self._fds, []
        return Message(spec, payload, fds, is_reply=True, is_ack=not own_reply, number=self._answers)

    def _read_request(self, spec: Spec, flags: int, own_reply: bool, known: bool, data: bytes) -> Message:
        # From here on the stream is in step: what is wrong with the message is wrong with it alone.
        need_reply = bool(flags & NEED_REPLY_FLAG) and self.channel is not Channel.GPU
        message = Message(spec, EMPTY, [], need_reply, own_reply=own_reply)
        payload: Payload
        if not known:
            message.payload = Opaque(data)
            raise UnsupportedRequest("unknown request", request=spec.name, message=message)
        if spec.id not in self.serves:
            message.payload = Opaque(data)
            raise UnsupportedRequest("request is not supported here", request=spec.name, message=message)
        if not spec.active(self.features, self.protocol_features, self.offered_protocol_features):
            message.payload = Opaque(data)
            raise InactiveFeature(
                f"{spec.feature_name} was not negotiated", request=spec.name, message=message
            )
        try:
            if spec.acks_postcopy(self.postcopy, len(data)):
                message.payload = payload = U64.unpack(data)
            else:
                message.payload = payload = spec.decode(data, xen=self._xen)
        except InvalidMessage as error:
            message.payload = Opaque(data)
            raise InvalidMessage(error.text, request=spec.name, message=message) from None
        if self._fds or spec.fds is not NO_FDS:
            complaint = spec.fds.complaint(len(self._fds), payload)
            if complaint:
                raise IncorrectFds(complaint, request=spec.name, message=message)
            if spec.fds.discard:
                self._drop_fds()
            message.fds, self._fds = self._fds, []
        return message

    # -- sending -----------------------------------------------------------------------------------

    def request(
        self,
        number: int,
        payload: Payload = EMPTY,
        fds: Sequence[int] = (),
        *,
        need_reply: bool | None = None,
    ) -> Outgoing:
        """A request to send now: its reply is expected from here on, in the order of the requests.
        ``need_reply`` None asks for an ack wherever REPLY_ACK was negotiated."""
        self._check_open()
        if not self.requester:
            raise ValueError(f"the {self.role.value} sends no requests on the channel {self.channel.value!r}")
        spec = self.table.get(number)
        if spec is None:
            raise ValueError(f"message {number} is unknown")
        if not spec.active(self.features, self.protocol_features, self.offered_protocol_features):
            raise InactiveFeature(f"{spec.feature_name} was not negotiated", request=spec.name)
        packed = payload.pack()
        if not (isinstance(payload, U64) and spec.acks_postcopy(self.postcopy, len(packed))):
            self._check_outgoing(spec, payload, fds, reply=False)
        own_reply = spec.replies(self.protocol_features, self.postcopy, len(packed))
        if need_reply is None:
            # In postcopy the table's own reply is the answer (vhost-user, SET_MEM_TABLE).
            need_reply = not own_reply and bool(self._protocol_features & self._acks)
        elif need_reply and not self._acks:
            raise ValueError(f"{spec.name}: there are no acks on the channel {self.channel.value!r}")
        data = frame(spec.id, packed, need_reply=need_reply, version=self._version)
        expects = own_reply or need_reply
        outgoing = Outgoing(data, tuple(fds), expects, spec, payload, need_reply)
        if expects:
            self._outstanding.append((spec, own_reply))
            outgoing.number = self._answers + len(self._outstanding)
        return self._traced(outgoing)

    def reply(self, message: Message, payload: Payload, fds: Sequence[int] = ()) -> Outgoing:
        """The reply that the message's row asks for."""
        self._check_open()
        spec = message.spec
        if message.is_reply or not message.own_reply:
            raise ValueError(f"{spec.name} has no reply payload here, use ack()")
        if message.answered:
            raise ValueError(f"{spec.name} was answered before")
        self._check_outgoing(spec, payload, fds, reply=True)
        outgoing = self._answer(spec, payload, fds)
        message.answered = True
        if spec.name.endswith("GET_PROTOCOL_FEATURES") and isinstance(payload, U64):
            self.offered_protocol_features = payload.value
        return self._traced(outgoing)

    def ack(self, message: Message, status: int = 0) -> Outgoing | None:
        """The status that the sender asked for with need_reply, negotiated or not; None if no answer is
        due or it was given. A failure of a request with a reply of its own is the row's refusal; None
        while ``message.waits`` means that the specification has none, and the session has to end."""
        self._check_open()
        if not message.waits:
            return None
        spec = message.spec
        if message.own_reply:
            if status == 0 or spec.refusal is None:
                return None
            payload: Payload = spec.refusal
        else:
            payload = U64(status)
        message.answered = True
        return self._traced(self._answer(spec, payload))

    def _answer(self, spec: Spec, payload: Payload, fds: Sequence[int] = ()) -> Outgoing:
        data = frame(spec.id, payload.pack(), reply=True, version=self._version)
        return Outgoing(data, tuple(fds), False, spec, payload, is_reply=True)

    def _traced(self, outgoing: Outgoing) -> Outgoing:
        if self.trace is not None:
            self.trace("send", outgoing)
        return outgoing

    def _check_outgoing(self, spec: Spec, payload: Payload, fds: Sequence[int], *, reply: bool) -> None:
        types = spec.payload_types(reply, xen=self._xen)
        if not isinstance(payload, types):
            names = " or ".join(kind.__name__ for kind in types)
            raise ValueError(f"{spec.name}: payload {type(payload).__name__}, must be {names}")
        rule = spec.reply_fds if reply else spec.fds
        if rule is NO_FDS and not fds:
            return
        complaint = rule.complaint(len(fds), payload)
        if complaint:
            raise ValueError(f"{spec.name}: {complaint}")


__all__ = ["Channel", "Message", "Outgoing", "Policy", "Role", "Session", "Trace"]
