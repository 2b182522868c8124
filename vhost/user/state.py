# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The back-end's part in migrating the device's own state (vhost-user, "Migrating back-end state").

SET_DEVICE_STATE_FD begins a transfer, the session's loop moves it along, CHECK_DEVICE_STATE tells what came
of it. Knows when a device may be saved or loaded; what its state is, is the device's. How bytes travel is in
state_channel.py.
"""

from __future__ import annotations

import logging
import os
import socket

from vhost.devices.base import Device
from vhost.devices.rings import Ring
from vhost.errors import InvalidMessage, InvalidState, VhostError
from vhost.features import ProtocolF
from vhost.user.handlers import Handlers
from vhost.user.messages import FrontendMsg
from vhost.user.payloads import NOFD, U64, DeviceState
from vhost.user.session import Message
from vhost.user.spec import Answer
from vhost.user.state_channel import Reading, Transfer, Writing, adopt, pair

log = logging.getLogger("vhost.backend")

PHASE_STOPPED = 0
"""The only phase there is: the guest stands still and the device is suspended."""

_DEVICE_STATE = int(ProtocolF.DEVICE_STATE)
_REQUESTS = {FrontendMsg.SET_DEVICE_STATE_FD, FrontendMsg.CHECK_DEVICE_STATE}


class StateHandlers(Handlers):
    """Offered for devices that have a state: those that define ``save`` and ``load``."""

    def __init__(self, device: Device, sock: socket.socket, *, without: int = 0) -> None:
        self._transfer: Transfer | None = None
        self._outcome: VhostError | None = InvalidState("no state was transferred")
        """Why the transfer that was last failed; None: it did not."""
        super().__init__(device, sock, without=without)

    def offered_protocol_features(self) -> int:
        return super().offered_protocol_features() | (_DEVICE_STATE if self.device.has_state else 0)

    def served_requests(self) -> set[int]:
        serves = super().served_requests()
        return serves if self.device.has_state else serves - _REQUESTS

    # -- requests ----------------------------------------------------------------------------------

    def set_device_state_fd(self, message: Message) -> U64 | Answer:
        """The front-end's channel is used if that is possible without ever waiting; else it gets ours."""
        wanted: DeviceState = message.payload
        if wanted.direction not in (DeviceState.SAVE, DeviceState.LOAD):
            raise InvalidMessage(f"direction {wanted.direction}, must be 0 or 1", request=message.name)
        if wanted.phase != PHASE_STOPPED:
            raise InvalidMessage(f"phase {wanted.phase}, must be {PHASE_STOPPED}", request=message.name)
        self._must_be_suspended(message.name)
        self._move()  # the one before may be over, and we did not look yet
        if self._transfer is not None:
            raise InvalidState("a transfer is under way", request=message.name)
        saves = wanted.direction == DeviceState.SAVE
        theirs: int | None = None
        channel = adopt(message.fds[0], writes=saves)
        if channel is None:
            channel, theirs = pair()
        answer = U64(NOFD) if theirs is None else Answer(U64(0), (theirs,))
        try:
            if saves:
                self._transfer = Writing(channel, self.device.save())
            else:
                self._transfer = Reading(channel, self.device.max_state_size)
            self._epoll.register(channel.fileno(), self._transfer.events)
        except BaseException:
            self._transfer = None
            channel.close()
            if theirs is not None:
                os.close(theirs)
            raise
        return answer

    def check_device_state(self, message: Message) -> U64:
        """The front-end has seen the end of the transfer, so nothing that we would have to wait for can be
        missing: it read to our end of file, or closed its own end."""
        while self._transfer is not None and self._move():
            pass
        if self._transfer is not None:
            self._end_transfer(InvalidState("the front-end asks before its end of the channel is closed"))
        if self._outcome is not None:
            raise InvalidState(str(self._outcome), request=message.name) from self._outcome
        return U64(0)

    # -- the transfer ------------------------------------------------------------------------------

    def _happened(self, fd: int, events: int) -> None:
        if self._transfer is not None and fd == self._transfer.fileno():
            self._move()
        else:
            super()._happened(fd, events)

    def start_if_ready(self, ring: Ring) -> None:
        super().start_if_ready(ring)
        if ring.started and self._transfer is not None:
            self._end_transfer(InvalidState(f"ring {ring.index} was started while the state was transferred"))

    def reset(self, what: str) -> None:
        super().reset(what)
        if self._transfer is not None:
            self._end_transfer(InvalidState(f"{what} while the state was transferred"))

    def _must_be_suspended(self, what: str) -> None:
        self.must_be_ours(what)
        for ring in self.rings:
            ring.must_be_stopped(what)

    def _move(self) -> bool:
        """Move what can be moved now. True: there was something."""
        transfer = self._transfer
        if transfer is None:
            return False
        before = transfer.moved
        try:
            if not transfer.step():
                return transfer.moved != before
        except VhostError as error:  # the other side's doing, or the device's
            self._end_transfer(error)
            return True
        self._end_transfer(self._load(transfer.state) if isinstance(transfer, Reading) else None)
        return True

    def _load(self, state: bytearray) -> VhostError | None:
        """Give the device its state. Whatever is wrong with it is told by CHECK_DEVICE_STATE."""
        try:
            self.must_be_ours("device state")
            self.device.load(bytes(state))
        except VhostError as error:
            return error
        except Exception as error:
            # The state comes from outside: a device that cannot read it need not say so in our words.
            log.exception("%s: load", type(self.device).__name__)
            return InvalidState(f"{type(self.device).__name__} cannot load {len(state)} bytes: {error!r}")
        return None

    def _end_transfer(self, outcome: VhostError | None) -> None:
        """Close the channel, which ends the transfer for the other side as well."""
        assert self._transfer is not None
        transfer, self._transfer = self._transfer, None
        # Without the frames that it passed.
        self._outcome = None if outcome is None else outcome.with_traceback(None)
        self._epoll.unregister(transfer.fileno())
        transfer.close()

    def _let_go(self) -> None:
        if self._transfer is not None:
            self._end_transfer(InvalidState("the session ended"))
        super()._let_go()
