# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Backend: one vhost-user session that serves a Device.

Turns the front-end's requests into calls of the device, and kicks into ``device.handle(queue)``. It
owns no thread and no loop: ``fileno()`` is readable when ``step()`` has something to do, and ``step()``
never blocks. What a request means is in handlers.py, what a ring is in rings.py.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import select
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from vhost.devices.base import Device
from vhost.errors import Disconnected, InvalidGuestMemory, ProtocolError, QueueBroken, VhostError
from vhost.user.handlers import Handlers
from vhost.user.rings import Ring
from vhost.user.session import Message
from vhost.user.transport import Transport

log = logging.getLogger("vhost.backend")

LOUD_COMPLAINTS = 10
"""How many refused messages and broken rings of a session are warned of."""
MESSAGES_PER_STEP = 16
"""So that a front-end that talks without end does not keep the rings waiting, nor the reverse."""


class Backend(Handlers):
    """A session on a connected socket, which it owns from here on."""

    def __init__(self, device: Device, sock: socket.socket) -> None:
        super().__init__(device, sock)
        self.error: Exception | None = None
        """Why the session ended; None while it runs, and after a close by either side."""
        self.closed = False
        self._events: list[int] = []
        # Whoever wakes us must not write to a descriptor that is somebody else's by now.
        self._events_lock = threading.Lock()
        self._watches_busy = False
        self._complaints = 0
        self._kicks: dict[int, Ring] = {}
        self._config_changed = False
        self._writes = False
        self._epoll = select.epoll()
        try:
            self._wakeup = self._eventfd(0)
            # Always readable, and only watched while a ring without a kick has to be polled.
            self._busy = self._eventfd(1)
            self._epoll.register(self.transport.fileno(), select.EPOLLIN)
            self._epoll.register(self._wakeup, select.EPOLLIN)
            if device.notice >= 0:
                self._epoll.register(device.notice, select.EPOLLIN | select.EPOLLET)
        except BaseException:
            self._close_events()
            raise
        device.attach(self)

    def _eventfd(self, value: int) -> int:
        self._events.append(os.eventfd(value, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        return self._events[-1]

    def _close_events(self) -> None:
        self._epoll.close()
        with self._events_lock:
            events, self._events = self._events, []
            for fd in events:
                os.close(fd)

    def fileno(self) -> int:
        return self._epoll.fileno()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- from any thread ---------------------------------------------------------------------------

    def config_changed(self) -> None:
        """Tell the front-end, with the next step, that the configuration space changed."""
        self._config_changed = True
        self.wake()

    def wake(self) -> None:
        """Make ``fileno()`` readable, and have the next step look at rings and memory."""
        with self._events_lock:
            if self._events:
                with contextlib.suppress(BlockingIOError):  # full: it is awake
                    os.eventfd_write(self._wakeup, 1)

    # -- the loop ----------------------------------------------------------------------------------

    def step(self) -> bool:
        """Do what there is to do now. False once the session is over, see ``error``."""
        if self.closed:
            return False
        try:
            for fd, events in self._epoll.poll(0):
                if fd == self.transport.fileno():
                    self._talk(events)
                elif fd == self._wakeup:
                    os.eventfd_read(self._wakeup)
                    self._woken()
                elif fd == self.device.notice:
                    self._woken()
                elif fd == self._busy:
                    for ring in self.rings:
                        if ring.polled:
                            self._serve(ring)
                elif self.channel is not None and fd == self.channel.fileno():
                    self._listen_to_channel()
                elif fd in self._kicks:
                    self._kicked(self._kicks[fd])
        except Disconnected:
            self.close()
        except VhostError as error:
            self._fail(error)
        except Exception as error:
            # A handler of the device, or a bug of ours: this session ends, the others live.
            log.exception("session of %s ends", type(self.device).__name__)
            self._fail(error)
        return not self.closed

    def _fail(self, error: Exception) -> None:
        log.warning("session of %s ends: %s", type(self.device).__name__, str(error))
        # Without the frames that it passed, which would keep the front-end's memory mapped.
        self.error = error.with_traceback(None)
        self.close()

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
        if answer is not None:
            self.transport.send(self.session.reply(message, answer))
        else:
            self.transport.send(self.session.ack(message, 0))

    def _refuse(self, message: Message, error: VhostError) -> None:
        """Say no where the front-end waits for an answer; where it does not, it would go on as if the
        request had been granted, so the session ends."""
        message.close()
        refusal = self.session.ack(message, 1)
        if refusal is None:
            raise error
        self._complain("refused", error)
        self.transport.send(refusal)

    def _complain(self, what: str, why: object) -> None:
        """Neither a peer nor its guest may fill anybody's log."""
        self._complaints += 1
        level = logging.WARNING if self._complaints <= LOUD_COMPLAINTS else logging.INFO
        log.log(level, "%s: %s", what, str(why))

    def _watch_output(self) -> None:
        writes = self.transport.pending > 0
        if writes != self._writes:
            self._writes = writes
            self._epoll.modify(self.transport.fileno(), select.EPOLLIN | (select.EPOLLOUT if writes else 0))

    def _woken(self) -> None:
        if self._config_changed:
            self._config_changed = False
            try:
                self._tell_config_change()
            except ProtocolError as error:
                log.info("back-end channel ends: %s", str(error))
                self._drop_channel()
        for ring in self.rings:
            if ring.queue is not None and ring.queue.broken:
                self._complain("ring broken", ring.queue.broken)
        self._check_memory()

    # -- rings -------------------------------------------------------------------------------------

    def _kicked(self, ring: Ring) -> None:
        # Edge-triggered: an eventfd needs no reading, and so nobody can make us wait for one.
        if ring.enabled:
            self._serve(ring)
        elif ring.queue is not None:
            self.device.handle_disabled(ring.queue)

    def _serve(self, ring: Ring) -> None:
        if ring.queue is None:
            return
        if not ring.queue.broken:  # which it also is when its memory broke while it was made
            try:
                self.device.handle(ring.queue)
            except QueueBroken as error:
                self._complain("ring broken", error)
        self._check_memory()
        self._update_polling()

    def _check_memory(self) -> None:
        if self.memory.broken:
            raise InvalidGuestMemory("the front-end truncated the file behind its memory")

    def run_ring(self, ring: Ring) -> None:
        assert ring.queue is not None
        ring.by_device = ring.enabled and self.device.start_queue(ring.queue)
        if not ring.by_device:
            self._watch_kick(ring)
            if ring.enabled:
                self._serve(ring)
        self._update_polling()

    def pause_ring(self, ring: Ring) -> None:
        assert ring.queue is not None
        self._unwatch_kick(ring)
        if ring.enabled:
            self.device.stop_queue(ring.queue)
        ring.by_device = False

    def _watch_kick(self, ring: Ring) -> None:
        if ring.kick >= 0 and ring.kick not in self._kicks:
            self._epoll.register(ring.kick, select.EPOLLIN | select.EPOLLET)
            self._kicks[ring.kick] = ring

    def _unwatch_kick(self, ring: Ring) -> None:
        if self._kicks.pop(ring.kick, None) is not None:
            self._epoll.unregister(ring.kick)

    def _update_polling(self) -> None:
        wanted = any(ring.polled for ring in self.rings)
        if wanted and not self._watches_busy:
            self._epoll.register(self._busy, select.EPOLLIN)
        elif self._watches_busy and not wanted:
            self._epoll.unregister(self._busy)
        self._watches_busy = wanted

    # -- the channel for our own requests ----------------------------------------------------------

    def set_channel(self, transport: Transport) -> None:
        self._epoll.register(transport.fileno(), select.EPOLLIN)
        self._drop_channel()
        self.channel = transport

    def _drop_channel(self) -> None:
        if self.channel is not None:
            self._epoll.unregister(self.channel.fileno())
            self.channel.close()
            self.channel = None

    def _listen_to_channel(self) -> None:
        assert self.channel is not None
        try:
            while (message := self.channel.receive()) is not None:
                message.close()
        except ProtocolError as error:
            log.info("back-end channel ends: %s", str(error))
            self._drop_channel()

    # -- the end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """End the session: rings are stopped, everything of the front-end's is let go. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self.device.detach(self)
        for ring in self.rings:
            if ring.started:
                self._call_device(functools.partial(self.pause_ring, ring))
            ring.close()
        self._call_device(self._release_if_idle)
        self.memory = self.no_memory
        self._drop_channel()
        self.transport.close()
        self._close_events()

    def _call_device(self, call: Callable[[], None]) -> None:
        """A hook that fails must neither keep anything of this session nor end the others."""
        try:
            call()
        except Exception:
            log.exception("%s: end of a session", type(self.device).__name__)
