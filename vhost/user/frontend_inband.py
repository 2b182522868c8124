# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Notifications as messages (vhost-user, "In-band notifications"), the front-end's side.

Once they are negotiated, a driver's eventfds stay here: its kicks become VRING_KICK in ``step()``, and
BACKEND_VRING_CALL and _ERR signal its call and error. So a driver needs to know nothing of it, but somebody
has to call ``step()`` when ``fileno()`` is readable, where otherwise nobody would have to.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable

from vhost.errors import InvalidMessage
from vhost.features import ProtocolF
from vhost.user.frontend_base import FrontendBase
from vhost.user.messages import FrontendMsg as F
from vhost.user.payloads import VringState
from vhost.user.session import Message


class FrontendInband(FrontendBase):
    """Not wanted by default: the specification advises against it where eventfds will do. Ask for
    ``protocol_features=WANTED | ProtocolF.INBAND_NOTIFICATIONS``."""

    on_vring_call: Callable[[int], None] | None = None
    """Called with the ring, for calls of one whose driver gave no eventfd: when ``on_config_change`` is."""
    on_vring_err: Callable[[int], None] | None = None

    _epoll: select.epoll | None = None

    def _open_channel(self) -> None:
        if self._has(ProtocolF.INBAND_NOTIFICATIONS):
            self._epoll = select.epoll()
            self._kicks: dict[int, int] = {}
            self._events: dict[tuple[str, int], int] = {}
        super()._open_channel()
        if self._epoll is not None and self.channel is not None:
            self._epoll.register(self.channel.fileno(), select.EPOLLIN)

    def vring_kick(self, index: int) -> None:
        """Kick a ring with a message: returns when the back-end has processed it."""
        self._send(F.VRING_KICK, VringState(index))

    def _set_event_in_band(self, kind: str, index: int, fd: int) -> bool:
        """Keep a driver's eventfd, if messages go instead of it."""
        if self._epoll is None:
            return False
        self._forget_event(kind, index)
        ours = self._events[kind, index] = os.dup(fd)
        if kind == "kick":
            self._kicks[ours] = index
            # Edge-triggered, so nobody has to read it.
            self._epoll.register(ours, select.EPOLLIN | select.EPOLLET)
        return True

    def _forget_event(self, kind: str, index: int) -> None:
        if self._epoll is None:
            return
        fd = self._events.pop((kind, index), None)
        if fd is not None:
            if self._kicks.pop(fd, None) is not None:
                self._epoll.unregister(fd)
            os.close(fd)

    def fileno(self) -> int:
        return super().fileno() if self._epoll is None else self._epoll.fileno()

    def step(self) -> bool:
        going_on = super().step()
        if self._epoll is not None and going_on:
            for fd, _ in self._epoll.poll(0):
                index = self._kicks.get(fd)
                if index is not None:
                    self.vring_kick(index)
        return going_on

    def _serve_vring_call(self, message: Message) -> None:
        self._signal(message, "call", self._tell_vring_call)

    def _serve_vring_err(self, message: Message) -> None:
        self._signal(message, "err", self._tell_vring_err)

    def _signal(self, message: Message, kind: str, tell: Callable[[int], None]) -> None:
        state: VringState = message.payload
        self._known_ring(state.index, message.name)
        if state.num:
            raise InvalidMessage(
                f"ring {state.index}: num {state.num} is reserved, must be 0", request=message.name
            )
        fd = self._events.get((kind, state.index))
        if fd is None:
            self._tell(f"{kind} {state.index}", lambda: tell(state.index))
        else:
            with contextlib.suppress(BlockingIOError):  # full: it is signalled
                os.eventfd_write(fd, 1)

    def _tell_vring_call(self, index: int) -> None:
        if self.on_vring_call is not None:
            self.on_vring_call(index)

    def _tell_vring_err(self, index: int) -> None:
        if self.on_vring_err is not None:
            self.on_vring_err(index)

    def close(self) -> None:
        super().close()
        epoll, self._epoll = self._epoll, None
        if epoll is not None:
            epoll.close()
            for fd in self._events.values():
                os.close(fd)
