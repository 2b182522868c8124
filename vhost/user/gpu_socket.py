# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""GPU_SET_SOCKET, the back-end's side: the socket goes to the device, and what the device makes of it is
polled with the session. What travels on it is in gpu.py."""

from __future__ import annotations

import functools
import logging
import select
import socket

from vhost.devices.base import Device, Stepped
from vhost.errors import IncorrectFds, InvalidState
from vhost.features import DeviceId
from vhost.user.handlers import Handlers
from vhost.user.messages import FrontendMsg
from vhost.user.session import Message
from vhost.user.transport import socket_of

log = logging.getLogger("vhost.backend")


class GpuSocketHandlers(Handlers):
    """Served for GPU devices: no feature says who has it."""

    def __init__(self, device: Device, sock: socket.socket, *, without: int = 0) -> None:
        self._gpu: Stepped | None = None
        self._gpu_events = select.EPOLLIN
        super().__init__(device, sock, without=without)

    def served_requests(self) -> set[int]:
        serves = super().served_requests()
        return serves if self.device.device_id == DeviceId.GPU else serves - {FrontendMsg.GPU_SET_SOCKET}

    def gpu_set_socket(self, message: Message) -> None:
        if self._gpu is not None:
            raise InvalidState("the session has a GPU socket already", request=message.name)
        self.must_be_ours(message.name)
        sock = socket_of(message.take_fds()[0], request=message.name)
        try:
            self._gpu = self.device.set_gpu_socket(sock)
        except ValueError as error:  # of some other kind than a Unix stream
            sock.close()
            raise IncorrectFds(str(error), request=message.name) from error
        except BaseException:
            sock.close()
            raise
        if self._gpu is not None:
            self._gpu_events = select.EPOLLIN
            self._epoll.register(self._gpu.fileno(), self._gpu_events)

    def _end_step(self) -> None:
        super()._end_step()
        if self._gpu is not None:
            events = select.EPOLLIN | (select.EPOLLOUT if self._gpu.pending else 0)
            if events != self._gpu_events:
                self._gpu_events = events
                self._epoll.modify(self._gpu.fileno(), events)

    def _happened(self, fd: int, events: int) -> None:
        if self._gpu is None or fd != self._gpu.fileno():
            super()._happened(fd, events)
        elif not self._gpu.step():
            log.info("GPU socket ends")
            self._close_gpu()

    def _close_gpu(self) -> None:
        gpu, self._gpu = self._gpu, None
        if gpu is not None:
            self._epoll.unregister(gpu.fileno())
            self._call_device(functools.partial(gpu.close))

    def _let_go(self) -> None:
        self._close_gpu()
        super()._let_go()
