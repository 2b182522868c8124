# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Backend: one vhost-user session that serves a Device.

Turns what arrives on its socket into calls of the handlers in handlers.py. What a session is, its loop and
its rings, is in vhost.devices.session.
"""

from __future__ import annotations

import logging
import select
import socket

from vhost.devices.base import Device
from vhost.errors import ProtocolError, VhostError
from vhost.user.channel import BackendChannel
from vhost.user.crypto import CryptoHandlers
from vhost.user.gpu_socket import GpuSocketHandlers
from vhost.user.inband import InbandHandlers
from vhost.user.inflight import InflightHandlers
from vhost.user.iotlb import IotlbHandlers
from vhost.user.legacy import LegacyHandlers
from vhost.user.log import LogHandlers
from vhost.user.objects import ObjectHandlers
from vhost.user.postcopy import PostcopyHandlers
from vhost.user.session import Message
from vhost.user.spec import Answer, close_fds
from vhost.user.state import StateHandlers

log = logging.getLogger("vhost.backend")

MESSAGES_PER_STEP = 16
"""So that a front-end that talks without end does not keep the rings waiting, nor the reverse."""


class Backend(
    IotlbHandlers,
    LogHandlers,
    StateHandlers,
    PostcopyHandlers,
    InbandHandlers,
    InflightHandlers,
    ObjectHandlers,
    GpuSocketHandlers,
    CryptoHandlers,
    LegacyHandlers,
):
    """A session on a connected socket, which it owns from here on. ``without``: protocol features (a mask
    of ProtocolF) that it does not offer; ``without_features``: feature bits."""

    def __init__(
        self, device: Device, sock: socket.socket, *, without: int = 0, without_features: int = 0
    ) -> None:
        self.without_features = int(without_features)
        super().__init__(device, sock, without=without)
        self._writes = False
        self._channel_writes = False
        try:
            self._epoll.register(self.transport.fileno(), select.EPOLLIN)
        except BaseException:
            self._close_events()
            raise
        device.attach(self)

    def offered_features(self) -> int:
        return super().offered_features() & ~self.without_features

    # -- messages ----------------------------------------------------------------------------------

    def _happened(self, fd: int, events: int) -> None:
        if fd == self.transport.fileno():
            self._talk(events)
        elif self.channel is not None and fd == self.channel.fileno():
            self.channel.step()
        else:
            super()._happened(fd, events)

    def _end_step(self) -> None:
        super()._end_step()
        if self.channel is not None:
            self._look_after_channel(self.channel)

    def _talk(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self.transport.flush()
        for _ in range(MESSAGES_PER_STEP):
            try:
                message = self.transport.receive()
            except ProtocolError as error:
                if error.message is None:
                    raise
                self._refuse(error.message, error)
                continue
            if message is None:
                break
            self._dispatch(message)
            if self.closed:
                return
            if message.answered:
                # The front-end had to wait for that: the next look is hardly ever worth a system call,
                # and the epoll says so when it is.
                break
        self._watch_output()

    def _dispatch(self, message: Message) -> None:
        log.debug("%s", message)
        try:
            answer = getattr(self, message.spec.handler)(message)
        except VhostError as error:
            self._check_memory()  # lost: no refusal but the end
            self._refuse(message, error)
            return
        finally:
            message.close()
        if answer is None:
            self.transport.send(self.session.ack(message, 0))
            return
        payload, fds = Answer.of(answer)
        try:
            self.transport.send(self.session.reply(message, payload, fds))
        finally:
            close_fds(fds)

    def _refuse(self, message: Message, error: VhostError) -> None:
        """Say no where the front-end waits for an answer; where it does not, it would go on as if the
        request had been granted, so the session ends."""
        message.close()
        refusal = self.session.ack(message, 1)
        if refusal is None:
            raise error
        self._complain("refused", error)
        self.transport.send(refusal)

    def _watch_output(self) -> None:
        writes = self.transport.pending > 0
        if writes != self._writes:
            self._writes = writes
            self._epoll.modify(self.transport.fileno(), select.EPOLLIN | (select.EPOLLOUT if writes else 0))

    # -- the channel for our own requests ----------------------------------------------------------

    def set_channel(self, channel: BackendChannel) -> None:
        self._epoll.register(channel.fileno(), select.EPOLLIN)
        self._drop_channel()
        self.channel = channel
        self._channel_writes = False

    def _drop_channel(self) -> None:
        channel, self.channel = self.channel, None
        if channel is not None:
            self._epoll.unregister(channel.fileno())
            channel.close()

    def _look_after_channel(self, channel: BackendChannel) -> None:
        if channel.error is not None:
            log.info("back-end channel ends: %s", str(channel.error))
            self._drop_channel()
            return
        writes = channel.pending
        if writes != self._channel_writes:
            self._channel_writes = writes
            self._epoll.modify(channel.fileno(), select.EPOLLIN | (select.EPOLLOUT if writes else 0))
            if not writes and self._config_changed:
                self.wake()

    def _let_go(self) -> None:
        self._drop_channel()
        super()._let_go()
