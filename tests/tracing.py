# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A session as the tracer sees it, written down message by message.

seen = Seen()
seen.front(FrontendMsg.GET_FEATURES)
seen.back(FrontendMsg.GET_FEATURES, U64(5))
assert seen.rules() == []
"""

from __future__ import annotations

from collections.abc import Sequence

from vhost.features import ProtocolF, VhostF
from vhost.trace.events import Event
from vhost.trace.records import FdInfo, Happening, Record
from vhost.trace.tracer import Tracer
from vhost.user.messages import FrontendMsg, frame
from vhost.user.payloads import EMPTY, U64, Payload
from vhost.user.spec import Channel, Role

EVENTFD = FdInfo("eventfd")
MEMFD = FdInfo("memfd", "ram", 1 << 40)
SOCKET = FdInfo("socket")
ALL_FEATURES = (1 << 64) - 1
ALL_PROTOCOL = (1 << 24) - 1
MICROSECOND = 1000


class Seen:
    """One session, fed to a tracer record by record; the clock advances 1 us a record."""

    def __init__(self) -> None:
        self.tracer = Tracer()
        self.now = 0
        self.events: list[Event] = []
        self.record(Happening.OPEN, text=Channel.MAIN.value)

    def record(
        self,
        happening: Happening,
        sender: Role | None = None,
        data: bytes = b"",
        fds: Sequence[FdInfo] = (),
        *,
        channel: int = 0,
        skipped: int = 0,
        text: str = "",
        delivered: bool = True,
    ) -> list[Event]:
        self.now += MICROSECOND
        record = Record(self.now, 1, channel, happening, sender, data, skipped, tuple(fds), text, delivered)
        new = list(self.tracer.feed(record))
        self.events += new
        return new

    def front(
        self,
        number: int,
        payload: Payload | bytes = EMPTY,
        fds: Sequence[FdInfo] = (),
        *,
        need_reply: bool = False,
        channel: int = 0,
    ) -> Event:
        """The front-end sends a message; on channel 1 it is a reply."""
        data = payload if isinstance(payload, bytes) else payload.pack()
        whole = frame(number, data, need_reply=need_reply, reply=channel == 1)
        return self.record(Happening.DATA, Role.FRONTEND, whole, fds, channel=channel)[-1]

    def back(
        self,
        number: int,
        payload: Payload | bytes = EMPTY,
        fds: Sequence[FdInfo] = (),
        *,
        need_reply: bool = False,
        channel: int = 0,
    ) -> Event:
        """The back-end sends a message; on channel 0 it is a reply."""
        data = payload if isinstance(payload, bytes) else payload.pack()
        whole = frame(number, data, need_reply=need_reply, reply=channel == 0)
        return self.record(Happening.DATA, Role.BACKEND, whole, fds, channel=channel)[-1]

    def raw(self, sender: Role, data: bytes, fds: Sequence[FdInfo] = ()) -> list[Event]:
        return self.record(Happening.DATA, sender, data, fds)

    def open_channel(self) -> None:
        """The back-end's channel, as number 1."""
        self.front(FrontendMsg.SET_BACKEND_REQ_FD, fds=[SOCKET])
        self.record(Happening.OPEN, channel=1, text=Channel.BACKEND_REQ.value)

    def negotiate(
        self,
        features: int = int(VhostF.PROTOCOL_FEATURES),
        protocol: int = int(ProtocolF.REPLY_ACK),
        *,
        offered: int = ALL_FEATURES,
        offered_protocol: int = ALL_PROTOCOL,
    ) -> Seen:
        self.front(FrontendMsg.SET_OWNER)
        self.front(FrontendMsg.GET_FEATURES)
        self.back(FrontendMsg.GET_FEATURES, U64(offered))
        self.front(FrontendMsg.GET_PROTOCOL_FEATURES)
        self.back(FrontendMsg.GET_PROTOCOL_FEATURES, U64(offered_protocol))
        self.front(FrontendMsg.SET_PROTOCOL_FEATURES, U64(protocol))
        self.front(FrontendMsg.SET_FEATURES, U64(features))
        return self

    def rules(self) -> list[str]:
        """The names of the rules that were broken so far, in order."""
        return [finding.rule.name for event in self.events for finding in event.findings]

    def text(self) -> str:
        return "\n".join(line for event in self.events for line in event.lines())
