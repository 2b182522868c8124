# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Notifications as messages (vhost-user, "In-band notifications"), the back-end's side.

A ring without a call or error eventfd of the front-end's gets one of ours, and the session's loop turns it
into BACKEND_VRING_CALL or _ERR: whoever serves the ring, a thread without the GIL too, signals as ever. One
that is kicked by VRING_KICK gets a kick of ours the same way. Knows messages and eventfds, not what is in
rings.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from dataclasses import dataclass

from vhost._ring import signal_eventfd
from vhost.devices.base import Device
from vhost.devices.rings import Ring
from vhost.errors import InvalidMessage
from vhost.features import PROTOCOL_COMPANIONS, ProtocolF, missing_companions
from vhost.user.handlers import Handlers
from vhost.user.messages import BackendMsg
from vhost.user.payloads import VringState
from vhost.user.session import Message

_INBAND = int(ProtocolF.INBAND_NOTIFICATIONS)
COMPANIONS = PROTOCOL_COMPANIONS[_INBAND]
"""What the specification wants negotiated with it: a channel to call on, and answers to wait for."""

KINDS = {"call": BackendMsg.BACKEND_VRING_CALL, "err": BackendMsg.BACKEND_VRING_ERR}


@dataclass(slots=True, eq=False)
class _Bell:
    """An eventfd that becomes a message. One at a time is under way, so that a front-end that does not
    answer gets no more than one for each ring: those that it missed say the same."""

    fd: int
    index: int
    number: BackendMsg
    rung: bool = False
    under_way: bool = False

    def listen(self) -> None:
        with contextlib.suppress(BlockingIOError):  # nothing, or it was heard already in this step
            os.eventfd_read(self.fd)
            self.rung = True


class InbandHandlers(Handlers):
    """A front-end that sets an eventfd of its own gets that one signalled; one that says "no descriptor"
    polls. Who says neither is told by messages."""

    def __init__(self, device: Device, sock: socket.socket, *, without: int = 0) -> None:
        self._bells: dict[int, _Bell] = {}
        self._bell_of: dict[tuple[int, str], _Bell] = {}
        self._told: set[tuple[int, str]] = set()
        """Of which rings the front-end said itself how it wants to be called."""
        super().__init__(device, sock, without=without)

    def offered_protocol_features(self) -> int:
        offered = super().offered_protocol_features()
        return offered if self.without & COMPANIONS else offered | _INBAND

    def set_protocol_features(self, message: Message) -> None:
        if _INBAND in missing_companions(message.payload.value):
            # "The back-end should close the connection": so no refusal, which would keep it.
            message.need_reply = False
        super().set_protocol_features(message)

    # -- kicks -------------------------------------------------------------------------------------

    def vring_kick(self, message: Message) -> None:
        ring = self._ring(message)
        if message.payload.num:
            raise InvalidMessage(
                f"ring {ring.index}: num {message.payload.num} is reserved, must be 0", request=message.name
            )
        if not ring.kick_known:
            self.give_event(ring, "kick", _eventfd)
        if ring.started and not ring.elsewhere:
            # Before the answer, for which a simulation waits.
            self._kicked(ring)
        elif ring.kick >= 0:  # else it polls
            # For another thread; or for later, if not all is known of the ring.
            signal_eventfd(ring.kick)

    # -- calls and errors --------------------------------------------------------------------------

    def _set_event(self, message: Message, kind: str) -> None:
        super()._set_event(message, kind)
        self._told.add((message.payload.index, kind))

    def reset(self, what: str) -> None:
        super().reset(what)
        self._told.clear()

    def start_if_ready(self, ring: Ring) -> None:
        if self.session.protocol_features & _INBAND and ring.can_start():
            for kind in KINDS:
                if getattr(ring, kind) < 0 and (ring.index, kind) not in self._told:
                    ring.set_fd(kind, os.dup(self._bell(ring.index, kind).fd))
        super().start_if_ready(ring)

    def _bell(self, index: int, kind: str) -> _Bell:
        bell = self._bell_of.get((index, kind))
        if bell is None:
            bell = _Bell(_eventfd(), index, KINDS[kind])
            self._bells[bell.fd] = self._bell_of[index, kind] = bell
            self._epoll.register(bell.fd, select.EPOLLIN)
        return bell

    def _happened(self, fd: int, events: int) -> None:
        bell = self._bells.get(fd)
        if bell is None:
            super()._happened(fd, events)
            return
        bell.listen()
        self._pass_on(bell)

    def _release_if_idle(self) -> None:
        super()._release_if_idle()
        if self.suspended and not self.closed:
            # From our answer on we have to be silent ("Suspended device state"): now or never.
            for bell in self._bells.values():
                bell.listen()
                self._send_on(bell)

    def _pass_on(self, bell: _Bell) -> None:
        if not bell.under_way:
            self._send_on(bell)

    def _send_on(self, bell: _Bell) -> None:
        if not bell.rung or self.channel is None:
            return
        bell.rung = False
        bell.under_way = True
        self.channel.request(
            bell.number, VringState(bell.index), then=lambda answer: self._passed_on(bell, answer)
        )

    def _passed_on(self, bell: _Bell, answer: Message | None) -> None:
        bell.under_way = False
        if answer is not None:
            if answer.status:
                self._complain("refused by the front-end", f"{answer.name} of ring {bell.index}")
            self._pass_on(bell)

    def set_backend_req_fd(self, message: Message) -> None:
        super().set_backend_req_fd(message)
        for bell in self._bells.values():
            self._pass_on(bell)

    def _let_go(self) -> None:
        super()._let_go()
        bells, self._bells = self._bells, {}
        self._bell_of.clear()
        for fd in bells:
            os.close(fd)


def _eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
