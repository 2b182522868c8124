# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The dirty log, as a front-end starts and stops it (vhost-user, "Migration").

Knows which rings were placed where, because a ring that starts to log its used area is placed anew. What
is in the log, and who copies pages, is the user's business: ``DirtyLog.take()``.
"""

from __future__ import annotations

import socket

from vhost.dirty_log import DirtyLog
from vhost.errors import InactiveFeature, UnsupportedRequest
from vhost.features import ProtocolF, VhostF, VringF
from vhost.memory import GuestMemory
from vhost.user.frontend_base import WANTED, FrontendBase
from vhost.user.messages import FrontendMsg as F
from vhost.user.payloads import Log

# Plain integers: an operation on an IntFlag costs as much as a system call.
_LOG_ALL = int(VhostF.LOG_ALL)
_VRING_LOG = int(VringF.LOG)


class FrontendLog(FrontendBase):
    """Switches logging by way of ``set_features`` and ``set_vring_addr``, which come here for what they are
    to add."""

    _guest_memory: GuestMemory

    def __init__(
        self, sock: socket.socket, *, timeout: float | None = 10.0, protocol_features: int = int(WANTED)
    ) -> None:
        self._dirty_log: DirtyLog | None = None
        self._logs = False
        self._acknowledged: int | None = None
        self._areas: dict[int, tuple[int, int, int]] = {}
        """Of the rings, as the back-end has them."""
        super().__init__(sock, timeout=timeout, protocol_features=protocol_features)

    def set_log_base(self, log: DirtyLog) -> None:
        """Where the back-end is to mark pages that it writes, from LOG_ALL on. It has to cover the memory
        table. May be replaced while logging goes on: the old one gets no more marks afterwards."""
        if not self._has(ProtocolF.LOG_SHMFD):
            raise InactiveFeature("the back-end cannot log to shared memory", request=F.SET_LOG_BASE.name)
        log.must_cover(self._guest_memory)
        self._send(F.SET_LOG_BASE, Log(log.size, 0), [log.region.fd])
        self._dirty_log = log

    def set_log_fd(self, fd: int | None) -> None:
        """An eventfd that the back-end signals when the log changed, if it does."""
        if fd is None:
            raise UnsupportedRequest("there is no way to take it back", request=F.SET_LOG_FD.name)
        self._send(F.SET_LOG_FD, fds=[fd])

    def start_log(self, log: DirtyLog) -> None:
        """Log from now on what the back-end writes: buffers, and the used areas of the rings. Stop the rings
        before the last copy; what was written before ``start_log`` is not in it."""
        if not self.offered_features & _LOG_ALL:
            raise InactiveFeature("the back-end does not offer LOG_ALL", request=F.SET_FEATURES.name)
        self.set_log_base(log)
        self._logs = True
        self._switch_log()

    def stop_log(self) -> None:
        self._logs = False
        self._switch_log()

    def _switch_log(self) -> None:
        if self._acknowledged is not None:
            self.set_features(self._acknowledged)
        for index, areas in self._areas.items():
            self.set_vring_addr(index, *areas)

    def _check_log(self, memory: GuestMemory) -> None:
        """The back-end is about to get this memory."""
        if self._logs and self._dirty_log is not None:
            self._dirty_log.must_cover(memory)

    def _features_to_send(self, features: int) -> int:
        self._acknowledged = features
        return features | (_LOG_ALL if self._logs else 0)

    def _address_to_send(self, areas: tuple[int, int, int], log: int, flags: int) -> tuple[int, int]:
        """Log address and flags of SET_VRING_ADDR."""
        return (areas[2], flags | _VRING_LOG) if self._logs else (log, flags)
