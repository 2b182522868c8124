# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Records to events: each message decoded from the table, each reply with its request, and the linter's
findings.

Sans-IO, and deterministic: the same records give the same events, live or from a file. Unlike a Session
it sees both sides and refuses nothing; what cannot be decoded is shown as bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from enum import IntFlag

from vhost.errors import InvalidMessage
from vhost.features import DEVICE_FEATURES, ProtocolF, VirtioF, guess_device
from vhost.trace import rules
from vhost.trace.events import Event, message_detail, message_text
from vhost.trace.frames import Assembler, Frame
from vhost.trace.lint import Linter, Seen
from vhost.trace.records import Happening, Record
from vhost.user.messages import FRONTEND, FrontendMsg, table, unknown
from vhost.user.payloads import U64, Opaque, Payload
from vhost.user.spec import (
    HEADER_SIZE,
    NEED_REPLY_FLAG,
    REPLY_FLAG,
    VERSION,
    VERSION_MASK,
    Channel,
    Role,
    Spec,
)

MAX_OUTSTANDING = 4096
_CONFIRMED = frozenset({FrontendMsg.SET_MEM_TABLE, FrontendMsg.ADD_MEM_REG})
_OTHER = {Role.FRONTEND: Role.BACKEND, Role.BACKEND: Role.FRONTEND}


class Tracer:
    """All sessions of a trace."""

    def __init__(self) -> None:
        self._linters: dict[int, Linter] = {}
        self._channels: dict[tuple[int, int], _Channel] = {}

    def feed(self, record: Record) -> Iterator[Event]:
        """What is new, now that this happened."""
        key = (record.session, record.channel)
        channel = self._channels.get(key)
        if record.happening is Happening.OPEN or (channel is None and record.happening is Happening.DATA):
            kind = _kind(record.text) if record.happening is Happening.OPEN else Channel.MAIN
            linter = self._linters.setdefault(record.session, Linter())
            channel = self._channels[key] = _Channel(record.session, kind, linter)
        if channel is None:
            # Of what never began, such as a session for which there was no back-end, nothing is kept.
            if record.happening is Happening.REMARK:
                sender, text = record.sender, record.text
                yield Event(record.time, record.session, Channel.MAIN, sender, "remark", text)
        elif record.happening is Happening.OPEN:
            yield channel.event(record, "opened", f"{_NAMES[channel.kind]} opened")
        elif record.happening is Happening.DATA:
            yield from channel.data(record)
        elif record.happening is Happening.EOF:
            yield from channel.eof(record)
        elif record.happening is Happening.REMARK:
            yield channel.event(record, "remark", record.text)
        else:
            yield from channel.close(record)
            del self._channels[key]
            if all(session != record.session for session, _ in self._channels):
                del self._linters[record.session]


_NAMES = {
    Channel.MAIN: "session",
    Channel.BACKEND_REQ: "channel for the back-end's requests",
    Channel.GPU: "GPU channel",
}


def _kind(text: str) -> Channel:
    return next((kind for kind in Channel if kind.value == text), Channel.MAIN)


class _Channel:
    """One channel of a session."""

    def __init__(self, session: int, kind: Channel, linter: Linter) -> None:
        self.session = session
        self.kind = kind
        self._linter = linter
        self._report = linter.report
        self._requester = Role.FRONTEND if kind is Channel.MAIN else Role.BACKEND
        self._table = table(kind)
        # The GPU protocol knows neither versions nor acks.
        self._version = 0 if kind is Channel.GPU else VERSION
        self._flags = REPLY_FLAG if kind is Channel.GPU else VERSION_MASK | REPLY_FLAG | NEED_REPLY_FLAG
        self._assemblers = {Role.FRONTEND: Assembler(), Role.BACKEND: Assembler()}
        self._outstanding: deque[Seen] = deque()

    def event(self, record: Record, what: str, text: str, **detail: object) -> Event:
        findings = self._linter.take_findings()
        return Event(record.time, self.session, self.kind, record.sender, what, text, findings, dict(detail))

    def data(self, record: Record) -> Iterator[Event]:
        assert record.sender is not None
        assembler = self._assemblers[record.sender]
        for frame in assembler.feed(record.time, record.data, record.skipped, record.fds, record.delivered):
            yield self._frame(record, frame)

    def eof(self, record: Record) -> Iterator[Event]:
        assert record.sender is not None
        frame = self._assemblers[record.sender].frame
        if frame is not None:
            size = HEADER_SIZE + frame.size if frame.header else HEADER_SIZE
            what = self._name(frame) if frame.header else "a header"
            self._report(rules.CUT_OFF, f"{frame.received} of {size} bytes of {what}")
        if record.sender is not self._requester:
            self._unanswered()
        text = f"{record.sender.value} closed"
        yield self.event(record, "ended", f"{text} ({record.text})" if record.text else text)

    def close(self, record: Record) -> Iterator[Event]:
        self._unanswered()
        yield self.event(record, "closed", f"{_NAMES[self.kind]} closed")

    def _unanswered(self) -> None:
        waiting = [seen.spec.name for seen in self._outstanding if not seen.optional]
        self._outstanding.clear()
        if waiting:
            self._report(rules.UNANSWERED, f"no reply to {_listed(waiting)}")

    # -- messages ----------------------------------------------------------------------------------

    def _name(self, frame: Frame) -> str:
        assert frame.header is not None
        row = self._table.get(frame.header[0])
        return row.name if row is not None else f"message {frame.header[0]}"

    def _frame(self, record: Record, frame: Frame) -> Event:
        assert frame.header is not None
        assert record.sender is not None
        number, flags, size = frame.header
        is_reply = record.sender is not self._requester
        if frame.announced:
            return self.event(record, "remark", f"{self._name(frame)}: end of its {size} bytes of payload")
        if not frame.delivered:
            self._report(rules.UNDELIVERED, "not passed on: the other side is gone")
        self._header(flags, is_reply)
        request = self._match(number) if is_reply else None
        spec = request.spec if request is not None else self._table.get(number)
        if spec is None:
            spec = unknown(number, self._requester)
            self._report(rules.UNKNOWN, f"{spec.name} is not in the table")
        seen = Seen(spec, frame.time, self.kind, fds=tuple(frame.fds), request=request)
        seen.fd_count = frame.fd_count
        seen.is_reply = is_reply
        seen.is_ack = request is not None and not request.own_reply
        seen.need_reply = bool(flags & self._flags & NEED_REPLY_FLAG)
        if is_reply:
            self._reply(seen, frame)
        else:
            self._request(seen, frame)
        seen.names = self._names(spec)
        return self._shown(record, frame, seen, None if request is None else frame.time - request.time)

    def _names(self, spec: Spec) -> tuple[type[IntFlag], ...]:
        device = guess_device(self._linter.state.offered or 0) if VirtioF in spec.names else None
        return spec.names if device is None else (*spec.names, DEVICE_FEATURES[device])

    def _shown(self, record: Record, frame: Frame, seen: Seen, latency: int | None) -> Event:
        assert frame.header is not None
        flags = f"flags={frame.header[1]:#x}" if frame.header[1] & ~self._flags else ""
        if frame.too_long:
            text = f"{seen.spec.name}: {frame.size} bytes of payload announced, passed on as they come"
        else:
            text = message_text(seen, latency, flags)
        detail = message_detail(seen, latency, frame.header)
        return self.event(record, "message", text, **detail, delivered=frame.delivered)

    def _header(self, flags: int, is_reply: bool) -> None:
        if flags & VERSION_MASK != self._version:
            self._report(rules.VERSION, f"version {flags & VERSION_MASK} in flags {flags:#x}")
        if flags & ~(self._flags | VERSION_MASK):
            self._report(rules.FLAGS, f"flags {flags:#x}")
        if bool(flags & REPLY_FLAG) != is_reply:
            text = f"the {_OTHER[self._requester].value} sends only replies on this channel"
            self._report(rules.REPLY_FLAG, text if is_reply else "REPLY on a request")

    def _payload(self, seen: Seen, frame: Frame) -> bool:
        """Decode it; False if it is not what it should be."""
        data = bytes(frame.data)
        xen = self._linter.state.has_protocol(ProtocolF.XEN_MMAP)
        try:
            if frame.too_long:
                if frame.size > seen.spec.max_size(seen.is_reply, xen=xen):
                    raise InvalidMessage(f"payload size {frame.size}")
                return False  # pixels
            if seen.is_ack:
                seen.payload = U64.unpack(data)
            else:
                seen.payload = seen.spec.decode(data, reply=seen.is_reply, xen=xen)
        except InvalidMessage as error:
            seen.payload = Opaque(data)
            self._report(rules.SIZE, error.text, seen.spec.section)
            return False
        return True

    def _request(self, seen: Seen, frame: Frame) -> None:
        spec, state = seen.spec, self._linter.state
        acks = state.has_protocol(ProtocolF.REPLY_ACK)
        if self._confirms(seen, frame):
            return
        if self._table.get(spec.id) is not spec:
            seen.payload = Opaque(bytes(frame.data))  # unknown, and said so
        elif self._payload(seen, frame):
            self._linter.request(seen)
        else:
            self._linter.gate(spec)
        seen.own_reply = spec.replies(state.protocol or 0, state.postcopy)
        self._expect(seen, acks or state.has_protocol(ProtocolF.REPLY_ACK))

    def _confirms(self, seen: Seen, frame: Frame) -> bool:
        """Postcopy: the front-end's word that it knows the addresses that the back-end told, which has the
        request's number but no table (vhost-user, SET_MEM_TABLE)."""
        state = self._linter.state
        if not state.table_answers or seen.spec.id not in _CONFIRMED or frame.size not in (0, 8):
            return False
        if self._table is not FRONTEND:
            return False
        state.table_answers = 0
        seen.payload = U64.unpack(bytes(frame.data)) if frame.size else seen.payload
        return True

    def _expect(self, seen: Seen, acks: bool) -> None:
        if seen.need_reply and not acks:
            self._need_reply(seen)
        if not seen.own_reply and not seen.need_reply:
            return
        if len(self._outstanding) >= MAX_OUTSTANDING:
            self._outstanding.clear()
            self._report(
                rules.BACKLOG, f"more than {MAX_OUTSTANDING} requests wait; theirs are lost track of"
            )
        self._outstanding.append(seen)

    def _need_reply(self, seen: Seen) -> None:
        if seen.own_reply:
            self._report(
                rules.NEED_REPLY_HABIT, f"need_reply on {seen.spec.name} before REPLY_ACK is negotiated"
            )
        else:
            seen.optional = True
            self._report(rules.NEED_REPLY, "need_reply, but REPLY_ACK was not negotiated")

    def _match(self, number: int) -> Seen | None:
        """The request that a reply answers, and what it passes over."""
        waiting = self._outstanding
        if all(seen.spec.id != number for seen in waiting):
            first = f"; {waiting[0].spec.name} waits for one" if waiting else ""
            row = self._table.get(number)
            name = row.name if row is not None else f"message {number}"
            self._report(rules.REPLY_TO_NOTHING, f"a reply to {name}, which nobody asked for{first}")
            return None
        passed = []
        while waiting[0].spec.id != number:
            passed.append(waiting.popleft())
        for rule, own_reply in ((rules.REPLY_MISSING, True), (rules.ACK_MISSING, False)):
            names = [seen.spec.name for seen in passed if seen.own_reply is own_reply and not seen.optional]
            if names:
                self._report(rule, f"no answer to {_listed(names)}, but to a later request")
        return waiting.popleft()

    def _reply(self, seen: Seen, frame: Frame) -> None:
        if seen.request is None:
            self._guess(seen, frame)
        elif self._payload(seen, frame):
            self._linter.reply(seen)

    def _guess(self, seen: Seen, frame: Frame) -> None:
        """A reply to nothing may still have the look of one."""
        data = bytes(frame.data)
        payload: Payload = Opaque(data)
        if self._table.get(seen.spec.id) is seen.spec:
            try:
                payload = seen.spec.decode(data, reply=True)
            except InvalidMessage:
                payload = Opaque(data)
        seen.payload = payload


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
