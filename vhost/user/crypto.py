# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Sessions of a crypto device (CREATE_CRYPTO_SESSION, CLOSE_CRYPTO_SESSION), the back-end's side.

Keeps which ones this front-end has, so that it can close no other's and leaves none behind. What a session
is, is the device's.
"""

from __future__ import annotations

import functools
import socket

from vhost.devices.base import Device
from vhost.errors import InvalidMessage, InvalidState
from vhost.features import DeviceId, ProtocolF
from vhost.user.handlers import Handlers
from vhost.user.messages import FrontendMsg
from vhost.user.payloads import CryptoSession
from vhost.user.session import Message

MAX_SESSIONS = 1024
"""That a front-end may have open at a time."""

_CRYPTO = int(ProtocolF.CRYPTO_SESSION)
_REQUESTS = {FrontendMsg.CREATE_CRYPTO_SESSION, FrontendMsg.CLOSE_CRYPTO_SESSION}


class CryptoHandlers(Handlers):
    """Offered for crypto devices, which must have it."""

    def __init__(self, device: Device, sock: socket.socket, *, without: int = 0) -> None:
        self._crypto_sessions: set[int] = set()
        super().__init__(device, sock, without=without)

    @property
    def _is_crypto(self) -> bool:
        return self.device.device_id == DeviceId.CRYPTO

    def offered_protocol_features(self) -> int:
        return super().offered_protocol_features() | (_CRYPTO if self._is_crypto else 0)

    def served_requests(self) -> set[int]:
        serves = super().served_requests()
        return serves if self._is_crypto else serves - _REQUESTS

    def create_crypto_session(self, message: Message) -> CryptoSession:
        asked: CryptoSession = message.payload
        self.must_be_ours(message.name)
        if len(self._crypto_sessions) >= MAX_SESSIONS:
            raise InvalidState(f"{MAX_SESSIONS} sessions are open, which is the limit", request=message.name)
        number = self.device.create_crypto_session(asked.op_code, asked.setup)
        if not 0 <= number < 1 << 63 or number in self._crypto_sessions:
            kind = type(self.device).__name__
            raise ValueError(f"{kind}.create_crypto_session: id {number} is negative, too large or in use")
        self._crypto_sessions.add(number)
        return CryptoSession(asked.op_code, b"", number)  # the keys need not travel once more

    def close_crypto_session(self, message: Message) -> None:
        number = message.payload.value
        if number not in self._crypto_sessions:
            raise InvalidMessage(f"session {number} is none of this front-end's", request=message.name)
        self._crypto_sessions.remove(number)
        self.device.close_crypto_session(number)

    def reset(self, what: str) -> None:
        self.must_be_ours(what)
        self._close_crypto_sessions()
        super().reset(what)

    def _let_go(self) -> None:
        self._close_crypto_sessions()
        super()._let_go()

    def _close_crypto_sessions(self) -> None:
        sessions, self._crypto_sessions = self._crypto_sessions, set()
        for number in sorted(sessions):
            self._call_device(functools.partial(self.device.close_crypto_session, number))
