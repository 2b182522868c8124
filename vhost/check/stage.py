# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The front-end under test on a stage: a back-end of ours that serves a real device, everything that passes
written down by the tracer in between.

One thread, one loop. Knows no rule; what was seen is in ``events``.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vhost.check.net_sink import NetSink
from vhost.check.peer import Peer
from vhost.devices.base import Device
from vhost.devices.blk import Blk
from vhost.devices.rng import Rng
from vhost.errors import InvalidState, VhostError
from vhost.trace.events import Event
from vhost.trace.proxy import Proxy
from vhost.trace.records import Record
from vhost.trace.tracer import Tracer
from vhost.user.backend import Backend
from vhost.user.channel import BackendChannel
from vhost.user.listener import Listener
from vhost.user.messages import Channel
from vhost.user.session import Message
from vhost.user.spec import Role

DISK = 64 << 20
DEVICES: dict[str, Callable[[], Device]] = {
    "blk": lambda: Blk(null_size=DISK, num_queues=2),
    "rng": Rng,
    "net": NetSink,
}
"""What can be served to a front-end."""
_TICK = 0.02


class Actor(Backend):
    """A back-end that does what one does, but leaves the channel for its own requests to us, and can be told
    to refuse."""

    def __init__(self, stage: Stage, device: Device, sock: socket.socket) -> None:
        self.raw: Peer | None = None
        """The channel, at the level of bytes."""
        self._stage = stage
        super().__init__(device, sock)

    def set_channel(self, channel: BackendChannel) -> None:
        self._close_raw()
        sock = socket.socket(fileno=os.dup(channel.fileno()))
        channel.close()
        self.raw = Peer(sock, self._stage.timeout, channel=Channel.BACKEND_REQ)
        self.raw.protocol = self.session.protocol_features

    def _dispatch(self, message: Message) -> None:
        if message.name in self._stage.refuses:
            message.close()
            self._refuse(message, InvalidState("refused to see what happens", request=message.name))
            return
        super()._dispatch(message)

    def _close_raw(self) -> None:
        if self.raw is not None:
            self.raw.close()
            self.raw = None

    def _let_go(self) -> None:
        self._close_raw()
        super()._let_go()


class Stage:
    """Listens on ``path`` for the front-end."""

    def __init__(self, path: str, device: str, *, timeout: float = 5.0, settle: float = 0.2) -> None:
        self.path = path
        self.device = device
        self.timeout = timeout
        self.settle = settle
        self.refuses: frozenset[str] = frozenset()
        """Names of requests that are refused."""
        self.events: list[Event] = []
        self.actors: list[Actor] = []
        self.ended: list[str] = []
        """How our back-ends' sessions ended."""
        self._tracer = Tracer()
        self._stack = contextlib.ExitStack()
        try:
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="vhost-check-"))
            inner = Path(folder) / "backend.sock"
            self._listener = self._stack.enter_context(contextlib.closing(Listener(inner)))
            self._proxy = self._stack.enter_context(Proxy(path, inner, self._emit))
        except BaseException:
            self._stack.close()
            raise

    def _emit(self, record: Record) -> None:
        self.events += self._tracer.feed(record)

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: Any) -> None:
        for actor in self.actors:
            actor.close()
            actor.device.close()
        self._stack.close()

    # -- the loop ----------------------------------------------------------------------------------

    def step(self, timeout: float) -> None:
        """Wait so long for something, and do it."""
        poll = select.poll()
        for fd in (self._proxy.fileno(), self._listener.fileno(), *(actor.fileno() for actor in self.actors)):
            poll.register(fd, select.POLLIN)
        limits = [timeout] if self._proxy.timeout is None else [timeout, self._proxy.timeout]
        poll.poll(min(limits) * 1000)
        self._proxy.step()
        with contextlib.suppress(BlockingIOError):
            sock, _ = self._listener.socket.accept()
            self.actors.append(Actor(self, DEVICES[self.device](), sock))
        for actor in list(self.actors):
            if not actor.step():
                self.ended.append(str(actor.error) if isinstance(actor.error, VhostError) else "")
                self.actors.remove(actor)
                actor.device.close()

    def until(self, happened: Callable[[], object], timeout: float) -> bool:
        """Go on until it happened; False after ``timeout`` seconds without."""
        deadline = time.monotonic() + timeout
        while not happened():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self.step(min(left, _TICK))
        return True

    def pause(self, seconds: float) -> None:
        """Go on for so long."""
        self.until(lambda: False, seconds)

    # -- what was seen -----------------------------------------------------------------------------

    def messages(
        self,
        *names: str,
        sender: Role | None = Role.FRONTEND,
        reply: bool = False,
        session: int | None = None,
    ) -> list[Event]:
        """Messages by these names, in their order."""
        return [
            event
            for event in self.events
            if event.what == "message"
            and (not names or event.detail["name"] in names)
            and (sender is None or event.sender is sender)
            and bool(event.detail["reply"]) is reply
            and (session is None or event.session == session)
        ]

    @property
    def sessions(self) -> list[int]:
        """Numbers of those on which something was said."""
        return sorted({event.session for event in self.events if event.what == "message"})

    def over(self, session: int) -> bool:
        """It has ended."""
        return any(
            event.session == session and event.what == "closed" and event.channel is Channel.MAIN
            for event in self.events
        )

    def started_rings(self, session: int) -> set[int]:
        """Rings that were given a kick, or kicked in band."""
        events = self.messages("SET_VRING_KICK", "VRING_KICK", session=session)
        return {_ring(event) for event in events}


def _ring(event: Event) -> int:
    index: int = event.detail["payload"]["index"]
    return index


def shown(events: Iterable[Event]) -> list[str]:
    """Events as evidence."""
    return [text for event in events for text in event.lines()]
