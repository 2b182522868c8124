# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The dirty log, as a back-end serves it (vhost-user, "Migration").

Knows the front-end's log, when it is written to, and which rings log their used areas. What is marked and
when is the queues' business (csrc/virtqueue_log.h). All of it changes while rings run: migrations begin and
end under a guest that works.

A log that does not cover the memory table, or the used area of a ring that logs it, is refused: whatever
could not be marked would be lost. A page that it has no bit for in spite of that breaks its ring.
"""

from __future__ import annotations

import os
import socket

from vhost.devices.base import Device
from vhost.devices.rings import Ring, check_event_fd
from vhost.dirty_log import DirtyLog
from vhost.errors import IncorrectFds, InvalidLogAddress
from vhost.features import ProtocolF, VhostF, VirtioF, VringF
from vhost.memory import GuestMemory
from vhost.user.handlers import Handlers
from vhost.user.payloads import U64, Log, VringAddr
from vhost.user.session import Message

# Plain integers: an operation on an IntFlag costs as much as a system call.
_LOG_ALL = int(VhostF.LOG_ALL)
_LOG_SHMFD = int(ProtocolF.LOG_SHMFD)
_ACCESS_PLATFORM = int(VirtioF.ACCESS_PLATFORM)
_VRING_LOG = int(VringF.LOG)


class LogHandlers(Handlers):
    live_features = Handlers.live_features | _LOG_ALL

    def __init__(self, device: Device, sock: socket.socket, *, without: int = 0) -> None:
        self._log: DirtyLog | None = None
        self._log_fd = -1
        self._unlogged = False
        """A ring ran with LOG_ALL and nowhere to log to: QEMU starts devices so while it migrates."""
        super().__init__(device, sock, without=without)

    # -- what is offered ---------------------------------------------------------------------------

    def offered_features(self) -> int:
        # Without a log in shared memory there is none that we could reach.
        return super().offered_features() | (0 if self.without & _LOG_SHMFD else _LOG_ALL)

    def _device_features(self) -> int:
        return super()._device_features() & ~_LOG_ALL

    def offered_protocol_features(self) -> int:
        return super().offered_protocol_features() | _LOG_SHMFD

    # -- requests ----------------------------------------------------------------------------------

    def set_features(self, message: Message) -> None:
        logged = self.features & _LOG_ALL
        super().set_features(message)
        if self.features & _LOG_ALL == logged:
            return
        if logged:
            self._unlogged = False  # that migration is over
        elif self._log is not None:
            try:
                self._check_log(self._log, self.memory)
            except InvalidLogAddress as error:
                # An earlier migration's. Nobody needs to have told us a new one yet.
                self._complain("dirty log dropped", error)
                self._log = None
        self._apply_log()

    def set_log_base(self, message: Message) -> U64 | None:
        if not message.fds:
            # As it was before LOG_SHMFD: an address in the front-end's process.
            raise IncorrectFds("no descriptor: the log has to be in shared memory", request=message.name)
        where = message.payload
        if not isinstance(where, Log):
            raise IncorrectFds("a descriptor, but no size of the log", request=message.name)
        log = DirtyLog.from_fd(message.fds[0], where.size, offset=where.offset)
        self._check_log(log, self.memory)
        if self._unlogged:
            for region in self.memory:
                log.mark(region.guest_addr, region.size)
            self._unlogged = False
        self._log = log
        self._apply_log()
        return U64(0) if self.session.protocol_features & _LOG_SHMFD else None

    def set_log_fd(self, message: Message) -> None:
        (fd,) = message.fds
        check_event_fd(fd)
        message.take_fd()
        old, self._log_fd = self._log_fd, fd
        try:
            self._apply_log()
        finally:
            # Not before each ring has the new one: what goes on first may use those that have the old one.
            if old >= 0:
                os.close(old)

    def set_vring_addr(self, message: Message) -> None:
        ring = self._ring(message)
        addr: VringAddr = message.payload
        started = ring.started
        old = ring.log_used
        ring.log_used = addr.log if addr.flags & _VRING_LOG else None
        try:
            if self._log is not None and self._logs:
                self._check_ring(ring, self._log)
            super().set_vring_addr(message)
        except BaseException:
            ring.log_used = old
            raise
        if started and ring.log_used != old:
            self._apply_log(ring)

    # -- what follows from it ----------------------------------------------------------------------

    @property
    def _logs(self) -> bool:
        return bool(self.features & _LOG_ALL)

    def _check_log(self, log: DirtyLog, memory: GuestMemory) -> None:
        log.must_cover(memory)
        for ring in self.rings:
            self._check_ring(ring, log)

    def _check_ring(self, ring: Ring, log: DirtyLog) -> None:
        """Before anything is changed; of a ring that is not started, its start says it."""
        if ring.queue is None or ring.log_used is None or self._translates:
            return
        size = ring.queue.device_area_size
        if not log.covers(ring.log_used, size):
            raise InvalidLogAddress(
                f"{ring.queue.name}: used area at {ring.log_used:#x}, size {size:#x}:"
                f" beyond the dirty log, which ends at {log.limit:#x}"
            )

    @property
    def _translates(self) -> bool:
        """log_guest_addr is an IOVA then, and the used area is found by where it is mapped."""
        return bool(self.features & _ACCESS_PLATFORM)

    def _apply_log(self, *rings: Ring) -> None:
        with self.paused(*(rings or self.rings)):
            pass  # they go on as _run lets them

    def _run(self, ring: Ring) -> None:
        self._tell_log(ring)
        self._check_log_file()  # what was just marked may have shown it
        super()._run(ring)

    def _tell_log(self, ring: Ring) -> None:
        assert ring.queue is not None
        log = self._log if self._logs else None
        self._unlogged |= self._logs and log is None and ring.enabled
        used = None if self._translates else ring.log_used
        ring.queue.set_log(log, ring=ring.log_used is not None, used=used, fd=self._log_fd)

    def replace_memory(self, memory: GuestMemory) -> None:
        if self._log is not None and self._logs:
            self._log.must_cover(memory)
        super().replace_memory(memory)

    def _check_memory(self) -> None:
        super()._check_memory()
        self._check_log_file()

    def _check_log_file(self) -> None:
        if self._log is not None and self._log.broken:
            raise InvalidLogAddress("the front-end truncated the file behind the dirty log")

    def _wants_look(self, ring: Ring) -> bool:
        return super()._wants_look(ring) or (self._log is not None and self._log.broken)

    def _let_go(self) -> None:
        super()._let_go()
        self._log = None
        fd, self._log_fd = self._log_fd, -1
        if fd >= 0:
            os.close(fd)
