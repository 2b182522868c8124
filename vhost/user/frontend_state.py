# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The front-end's part in migrating the device's own state (vhost-user, "Migrating back-end state").

Knows which requests make a transfer, and waits for it; how bytes travel is in state_channel.py.
"""

from __future__ import annotations

import contextlib
import os
import select
import time

from vhost.errors import IncorrectFds, ProtocolError, ReplyTimeout, RequestFailed
from vhost.user.frontend_base import FrontendBase
from vhost.user.messages import FrontendMsg as F
from vhost.user.payloads import DeviceState
from vhost.user.state_channel import PipeChannel, Reading, StateChannel, Transfer, Writing, adopt

STATE_LIMIT = 1 << 30
PHASE_STOPPED = 0


class FrontendState(FrontendBase):
    """Needs protocol feature DEVICE_STATE, and all rings stopped. ``timeout`` is for the whole transfer,
    in seconds; the session's own if it is not given."""

    def save_device_state(self, *, timeout: float | None = None, limit: int = STATE_LIMIT) -> bytes:
        """The state of the back-end's device, for ``load_device_state`` of the one that takes its place.
        ProtocolError if it is longer than ``limit`` bytes, RequestFailed if the back-end could not."""
        deadline = self._deadline(timeout)
        with contextlib.closing(Reading(self._open_channel_for(DeviceState.SAVE), limit)) as transfer:
            self._finish(transfer, deadline)
        self._check_device_state()
        return bytes(transfer.state)

    def load_device_state(self, state: bytes, *, timeout: float | None = None) -> None:
        """Have the back-end's device become what another one was. RequestFailed if it refuses."""
        deadline = self._deadline(timeout)
        broken: ProtocolError | None = None
        with contextlib.closing(Writing(self._open_channel_for(DeviceState.LOAD), state)) as transfer:
            try:
                self._finish(transfer, deadline)
            except ReplyTimeout:
                raise
            except ProtocolError as error:
                broken = error  # the back-end says why
        self._check_device_state()
        if broken is not None:
            raise broken

    def _deadline(self, timeout: float | None) -> float | None:
        seconds = self.timeout if timeout is None else timeout
        return None if seconds is None else time.monotonic() + seconds

    def _open_channel_for(self, direction: int) -> StateChannel:
        name = F.SET_DEVICE_STATE_FD.name
        read, write = os.pipe2(os.O_CLOEXEC)
        saves = direction == DeviceState.SAVE
        ours, theirs = (read, write) if saves else (write, read)
        pipe = PipeChannel(ours)
        try:
            request = self.session.request(
                F.SET_DEVICE_STATE_FD, DeviceState(direction, PHASE_STOPPED), [theirs]
            )
            reply = self._call(request)
            if reply is None:
                raise ProtocolError("the message table knows no reply", request=name)
            with contextlib.closing(reply):
                status = reply.payload.value & 0xFF
                if status:
                    raise RequestFailed(
                        f"the peer answered with failure: status {status:#x}", request=name, status=status
                    )
                if not reply.fds:
                    return pipe
                channel = adopt(reply.fds[0], writes=not saves)
                if channel is None:
                    raise IncorrectFds("the back-end's channel is neither pipe nor stream", request=name)
        except BaseException:
            pipe.close()
            raise
        finally:
            os.close(theirs)
        pipe.close()
        return channel

    def _finish(self, transfer: Transfer, deadline: float | None) -> None:
        poll = select.poll()
        poll.register(transfer.fileno(), transfer.events)
        if self.channel is not None and self._channel_open:
            poll.register(self.channel.fileno(), select.POLLIN)
        while not transfer.step():
            left = None if deadline is None else (deadline - time.monotonic()) * 1000
            if left is not None and left <= 0:
                raise ReplyTimeout(f"device state: not through in time, {transfer.moved} bytes were")
            for fd, _ in poll.poll(left):
                if fd == transfer.fileno():
                    continue
                self._serve_channel()
                if not self._channel_open:
                    poll.unregister(fd)

    def _check_device_state(self) -> None:
        status = self._get(F.CHECK_DEVICE_STATE).value
        if status:
            raise RequestFailed(
                f"the back-end could not transfer its state: status {status:#x}",
                request=F.CHECK_DEVICE_STATE.name,
                status=status,
            )
