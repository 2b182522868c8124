# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""DeviceSession: one session of a Device, whatever brings its requests.

What vhost-user, VDUSE and a driver in the same process have in common: features, memory and rings, in the
words of vhost; kicks that become ``device.handle(queue)``; what happens when a ring, its memory or the
device breaks. It owns no thread and no loop: ``fileno()`` is readable when ``step()`` has something to do,
and ``step()`` never blocks, unless for a handler that runs on one of the device's workers (workers.py): the
only thing here that those do is ``_serve_on_worker``. Knows no messages; what a ring is, is in rings.py.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import select
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from vhost._iotlb import Iotlb
from vhost.device_queue import DeviceQueue
from vhost.devices.base import Device
from vhost.devices.rings import Areas, Ring
from vhost.errors import (
    DeviceBusy,
    Disconnected,
    InvalidGuestMemory,
    InvalidMessage,
    InvalidQueue,
    QueueBroken,
    VhostError,
)
from vhost.features import VirtioF, feature_names
from vhost.inflight import InflightRegion
from vhost.memory import GuestMemory

log = logging.getLogger("vhost.backend")

LOUD_COMPLAINTS = 10
"""How many refused messages and broken rings of a session are warned of."""
PACKED_START = 0x8000_8000
"""Both positions of a new packed ring, each with its wrap counter."""

# A plain integer: an operation on an IntFlag costs as much as a system call.
_RING_PACKED = int(VirtioF.RING_PACKED)


class DeviceSession(ABC):
    """A session that serves ``device``. ``user_addresses``: rings are placed by addresses in the
    front-end's process."""

    live_features = 0
    """Feature bits that may change while rings run: those that have nothing to do with rings."""

    def __init__(self, device: Device, *, user_addresses: bool) -> None:
        self.device = device
        self.no_memory = GuestMemory()
        self.memory = self.no_memory
        self.iotlb: Iotlb | None = None
        """The driver's side speaks in IOVAs, and this is what it has mapped. Changed only while all rings are
        ``held`` or ``paused``."""
        self.rings = [
            Ring(i, device.queue_name(i), user_addresses=user_addresses) for i in range(device.num_queues)
        ]
        self.features = 0
        """What the driver acknowledged."""
        self.status = 0
        self.error: Exception | None = None
        """Why the session ended; None while it runs, and after a close by either side."""
        self.closed = False
        self._claimed = False
        self._events: list[int] = []
        # Whoever wakes us must not write to a descriptor that is somebody else's by now.
        self._events_lock = threading.Lock()
        self._watches_busy = False
        self._complaints = 0
        self._kicks: dict[int, Ring] = {}
        self._config_changed = False
        self._posted: deque[Callable[[], None]] = deque()
        # Polling a disabled ring of a device that leaves such rings alone would only cost.
        self._drops = type(device).handle_disabled is not Device.handle_disabled
        self._epoll = select.epoll()
        try:
            self._wakeup = self._eventfd(0)
            # Always readable, and only watched while a ring without a kick has to be polled.
            self._busy = self._eventfd(1)
            self._epoll.register(self._wakeup, select.EPOLLIN)
            if device.notice >= 0:
                self._epoll.register(device.notice, select.EPOLLIN | select.EPOLLET)
        except BaseException:
            self._close_events()
            raise

    def _eventfd(self, value: int) -> int:
        self._events.append(os.eventfd(value, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        return self._events[-1]

    def _close_events(self) -> None:
        self._epoll.close()
        with self._events_lock:
            events, self._events = self._events, []
            for fd in events:
                os.close(fd)

    # -- what a transport adds ---------------------------------------------------------------------

    @abstractmethod
    def _happened(self, fd: int, events: int) -> None:
        """A descriptor that the transport put into ``_epoll`` has something."""

    @abstractmethod
    def _tell_config_change(self) -> None:
        """Tell the driver's side that the configuration space changed."""

    def _may_tell(self) -> bool:
        """Can ``_tell_config_change`` be called now? If not, ``wake()`` when it can."""
        return True

    @abstractmethod
    def _let_go(self) -> None:
        """The session is over, its rings are stopped: close what the transport has."""

    def _end_step(self) -> None:  # noqa: B027 (most sessions have nothing to do there)
        """What happened was dealt with: do what has to wait for that."""

    def _memory_lost(self) -> None:
        """A file behind the memory was truncated."""
        raise InvalidGuestMemory("the front-end truncated the file behind its memory")

    def _ring_broken(self, ring: Ring, why: str) -> None:
        """The ring stays as it is: nothing more is processed on it."""
        self._complain("ring broken", why)

    def offered_features(self) -> int:
        return self.device.offered_features()

    # -- from any thread ---------------------------------------------------------------------------

    def config_changed(self) -> None:
        """Tell the driver's side, with the next step, that the configuration space changed."""
        self._config_changed = True
        self.wake()

    def post(self, call: Callable[[], None]) -> None:
        """Have the next step call this."""
        self._posted.append(call)
        self.wake()

    def wake(self) -> None:
        """Make ``fileno()`` readable, and have the next step look at rings and memory."""
        with self._events_lock:
            if self._events:
                with contextlib.suppress(BlockingIOError):  # full: it is awake
                    os.eventfd_write(self._wakeup, 1)

    # -- the loop ----------------------------------------------------------------------------------

    def fileno(self) -> int:
        return self._epoll.fileno()

    def step(self) -> bool:
        """Do what there is to do now. False once the session is over, see ``error``."""
        if self.closed:
            return False
        try:
            for fd, events in self._epoll.poll(0):
                if fd in self._kicks:
                    self._kicked(self._kicks[fd])
                elif fd == self._wakeup:
                    os.eventfd_read(self._wakeup)
                    self._woken()
                elif fd == self.device.notice:
                    self._woken()
                elif fd == self._busy:
                    for ring in self.rings:
                        if self._is_polled(ring):
                            self._serve(ring)
                else:
                    self._happened(fd, events)
            if not self.closed:
                self._end_step()
        except Disconnected as gone:
            # The protocol's session remembers it: without the frames, which would keep this one alive.
            gone.__traceback__ = None
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
        # Without the frames that it passed, which would keep the driver's memory mapped.
        self.error = error.with_traceback(None)
        self.close()

    def _complain(self, what: str, why: object) -> None:
        """Neither a peer nor its guest may fill anybody's log."""
        self._complaints += 1
        level = logging.WARNING if self._complaints <= LOUD_COMPLAINTS else logging.INFO
        log.log(level, "%s: %s", what, str(why))

    def _woken(self) -> None:
        while self._posted and not self.closed:
            self._posted.popleft()()
        if self._config_changed and self._may_tell():
            self._config_changed = False
            self._tell_config_change()
        for ring in self.rings:
            if ring.queue is not None and ring.queue.broken:
                self._ring_broken(ring, ring.queue.broken)
        self._check_memory()

    def _kicked(self, ring: Ring) -> None:
        # Edge-triggered: an eventfd needs no reading, and so nobody can make us wait for one.
        ring.seen = True
        if ring.started:
            self._serve(ring)
        else:
            self._unwatch_kick(ring)
            self.start_if_ready(ring)

    def _serve(self, ring: Ring) -> None:
        """Look at a ring that is not stopped; disabled, it is processed without effects."""
        if ring.queue is None:
            return
        if not ring.queue.broken:  # which it also is when its memory broke while it was made
            try:
                if ring.enabled:
                    self.device.handle(ring.queue)
                else:
                    self.device.handle_disabled(ring.queue)
            except QueueBroken as error:
                self._ring_broken(ring, str(error))
        self._check_memory()
        self._update_polling()

    def _serve_on_worker(self, ring: Ring) -> bool:
        """What a worker does for ``_serve``: whatever comes of it is for who steps us. False: the ring is not
        to be polled any more."""
        queue = ring.queue
        if queue is None or queue.broken:
            return False
        try:
            self.device.handle(queue)
        except QueueBroken as error:
            if not queue.broken:  # one that is says so itself
                self.post(functools.partial(self._ring_broken, ring, str(error)))
                return False
        except BaseException as error:
            self.post(functools.partial(_raise, error))
            return False
        if queue.broken or self._wants_look(ring):
            self.wake()
        return not queue.broken

    def _wants_look(self, ring: Ring) -> bool:
        """After its handler ran: ``_woken`` has something to do. On any thread."""
        return self.memory.broken

    def _check_memory(self) -> None:
        if self.memory.broken:
            self._memory_lost()

    # -- the device --------------------------------------------------------------------------------

    def must_be_ours(self, what: str) -> None:
        """Another session's driver has the device: what changes the device is for that one to say."""
        if self.device.is_busy(self) and not self.device.share:
            raise DeviceBusy(f"{what}: another session runs this device's rings")

    def acknowledge(self, features: int, what: str) -> None:
        """The driver wants these, of those that are offered."""
        foreign = features & ~self.offered_features()
        if foreign:
            names = " ".join(feature_names(foreign))
            raise InvalidMessage(f"features {foreign:#x} ({names}) were not offered", request=what)
        if (features ^ self.features) & ~self.live_features:
            with self._told_anew(f"{what} with other features", *self.rings):
                self._use_features(features)
                if self._claimed:  # for rings that did nothing
                    self._tell_device()
        else:
            self._use_features(features)

    def _use_features(self, features: int) -> None:
        """They count from now on, with all that follows from them; rings that they matter to are stopped."""
        self.features = features

    def _status_resets(self) -> bool:
        """Does status 0 reset what the device itself knows? Rings stop in any case."""
        return True

    def change_status(self, status: int, what: str) -> None:
        """The driver set the device status; 0 stops the rings, and resets the device."""
        if not 0 <= status <= 0xFF:
            raise InvalidMessage(f"status {status:#x}, limit 0xff", request=what)
        self.must_be_ours(what)
        self.status = status
        if status:
            self.device.set_status(status)
        else:
            self.stop_all_rings()
            for ring in self.rings:
                ring.forget_position()
            if self._status_resets():
                self.device.reset()

    def reset(self, what: str) -> None:
        """As if nothing had ever been said of the rings."""
        self.must_be_ours(what)
        self.stop_all_rings()
        for ring in self.rings:
            ring.reset()
        self.status = 0
        self.device.reset()

    def read_config(self, offset: int, size: int) -> bytes:
        """Drivers ask for the structure that they know, which may be longer than ours."""
        config = self.device.config
        if offset >= len(config) and size:
            raise InvalidMessage(f"offset {offset} in a configuration space of {len(config)} bytes")
        return config[offset : offset + size].ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes, what: str) -> None:
        self.must_be_ours(what)
        self.device.write_config(offset, data)

    def check_config_range(self, offset: int, end: int, what: str) -> None:
        size = len(self.device.config)
        if end > size:
            raise InvalidMessage(f"bytes {offset} to {end} of a configuration space of {size}", request=what)

    # -- memory ------------------------------------------------------------------------------------

    def replace_memory(self, memory: GuestMemory) -> None:
        """Rings that run go on with it; InvalidGuestMemory, and nothing changes, if one cannot."""
        with self.paused(*self.rings):
            if self.iotlb is not None:
                self.iotlb.set_memory(memory)
            moved: list[DeviceQueue] = []
            for ring in self.rings:
                if ring.queue is None:
                    continue
                try:
                    ring.queue.set_memory(memory)
                except InvalidQueue as error:
                    for queue in moved:
                        queue.set_memory(self.memory)
                    raise InvalidGuestMemory(f"a live ring would lose its memory: {error}") from error
                moved.append(ring.queue)
            self.memory = memory

    # -- rings -------------------------------------------------------------------------------------

    @property
    def suspended(self) -> bool:
        """All rings are stopped."""
        return not any(ring.started for ring in self.rings)

    def ring_at(self, index: int | None, what: str) -> Ring:
        if index is None or not 0 <= index < len(self.rings):
            raise InvalidMessage(f"ring {index}, must be below {len(self.rings)}", request=what)
        return self.rings[index]

    def size_ring(self, ring: Ring, num: int, what: str) -> None:
        if not 0 < num <= self.device.max_queue_size:
            raise InvalidMessage(
                f"ring {ring.index}: size {num}, must be 1 to {self.device.max_queue_size}", request=what
            )
        with self._told_anew(what, ring):
            ring.num = num

    def place_ring(self, ring: Ring, areas: Areas, what: str) -> None:
        # QEMU repeats it to switch the dirty log; moving a live ring is another matter.
        if not ring.started or areas != ring.areas:
            with self._told_anew(what, ring):
                ring.place(areas)

    def begin_ring(self, ring: Ring, base: int, what: str) -> None:
        """Where it shall start."""
        with self._told_anew(what, ring):
            ring.base = base

    @contextlib.contextmanager
    def _told_anew(self, what: str, *rings: Ring) -> Iterator[None]:
        """Inside the block none of the rings is started; InvalidState if one has been processed. Of a ring
        whose kick is known we cannot tell what else will be said, so it waits for the first kick proper, as
        the specification has it."""
        begun = [ring for ring in rings if ring.started]
        with self.paused(*begun):
            for ring in begun:
                if not ring.untouched:
                    ring.must_be_stopped(what)
            for ring in begun:
                ring.unstart()
        try:
            yield
        finally:
            for ring in rings:
                if ring.kick < 0 or ring.seen:
                    self.start_if_ready(ring)
                elif ring.can_start():
                    self._watch_kick(ring)

    def give_event(self, ring: Ring, kind: str, take: Callable[[], int | None]) -> None:
        """The ring's "kick", "call" or "err". ``take`` gives a descriptor that is the ring's from then on,
        None if there is none; it is called when nothing uses the one before."""
        with self.paused(ring):
            fd = take()
            if kind == "kick":
                self._unwatch_kick(ring)
            ring.set_fd(kind, -1 if fd is None else fd)
        if kind == "kick":
            ring.kick_known = True
            self.start_if_ready(ring)

    def enable_ring(self, ring: Ring, enabled: bool) -> None:
        if enabled == ring.enabled:
            return
        with self.paused(ring):
            ring.enabled = enabled

    def start_if_ready(self, ring: Ring) -> None:
        if not ring.can_start():
            return
        if not self._claimed:
            self.device.claim(self)
            self._claimed = True
            self._tell_device()
        try:
            ring.start(self.memory, self._ring_features(), self.iotlb, self._inflight_of(ring))
            self._run(ring)
        except BaseException:
            if ring.started:
                self._pause(ring)
            ring.stop()
            self._release_if_idle()
            raise
        if self._config_changed:
            self.wake()  # it may have had to wait for this

    def _tell_device(self) -> None:
        """What was negotiated, before any of its rings starts."""
        negotiated = self._device_features()
        if self.device.is_busy(self):
            # A shared device can rely on what all of its drivers know: one without FLUSH needs
            # writes to be stable, whatever the others do.
            negotiated &= self.device.negotiated
        self.device.negotiated = negotiated

    def _device_features(self) -> int:
        """What was acknowledged, without the bits that are the transport's."""
        return self.features

    def _ring_features(self) -> int:
        """What rings are made with."""
        return self.features

    def _inflight_of(self, ring: Ring) -> InflightRegion | None:
        """Where the ring is to note what is in flight."""
        return None

    def stop_ring(self, ring: Ring) -> int:
        """Where a successor goes on."""
        self._halt(ring, self._stopping(ring))
        base = ring.stop()
        if base is None:  # it never ran; for a packed ring 0 would be another place than that (2.8.1)
            base = PACKED_START if self.features & _RING_PACKED else 0
        self._release_if_idle()
        return base

    def stop_all_rings(self) -> None:
        for ring in self.rings:
            self._halt(ring)
            ring.stop()
        self._release_if_idle()

    def _release_if_idle(self) -> None:
        if self._claimed and self.suspended:
            self._claimed = False
            self.device.release(self)

    @contextlib.contextmanager
    def paused(self, *rings: Ring) -> Iterator[None]:
        """Nothing uses these rings' queues inside the block; those that ran go on after it."""
        with contextlib.ExitStack() as resume:  # all of them, also if a handler fails in between
            for ring in rings:
                if ring.started:
                    resume.callback(self._resume, ring)
                    self._pause(ring)
            yield

    @contextlib.contextmanager
    def held(self, *, look: bool) -> Iterator[None]:
        """As ``paused`` for all rings, for a change of what they translate with and of nothing else.
        ``look``: there may be work afterwards that no kick tells of."""
        with contextlib.ExitStack() as resume:
            for ring in self.rings:
                if ring.queue is None:
                    continue
                if ring.by_device and self.device.hold_queue(ring.queue):
                    resume.callback(self.device.release_queue, ring.queue, look)
                else:
                    resume.callback(self._resume, ring)
                    self._pause(ring)
            yield

    def _resume(self, ring: Ring) -> None:
        if ring.started:  # it may have been stopped in the meantime
            self._run(ring)

    def _run(self, ring: Ring) -> None:
        """The ring is started, or may go on after a pause: process it."""
        assert ring.queue is not None
        ring.by_device = ring.enabled and self.device.start_queue(ring.queue)
        ring.seen |= ring.enabled
        if ring.enabled and not ring.by_device:
            serve = functools.partial(self._serve_on_worker, ring)
            ring.watch = self.device.watch(ring.index, ring.kick, serve, look=True)
        if not ring.elsewhere:
            self._watch_kick(ring)
            if ring.seen:
                self._serve(ring)
        self._update_polling()

    def _stopping(self, ring: Ring) -> Callable[[DeviceQueue], None]:
        """How the device ends its use of a ring that stops for good."""
        return self.device.stop_queue

    def _halt(self, ring: Ring, stop: Callable[[DeviceQueue], None] | None = None) -> None:
        if ring.started:
            self._pause(ring, stop)
        else:
            self._unwatch_kick(ring)

    def _pause(self, ring: Ring, stop: Callable[[DeviceQueue], None] | None = None) -> None:
        """Return when nothing uses the ring's queue any more."""
        assert ring.queue is not None
        self._unwatch_kick(ring)
        if ring.watch is not None:
            ring.watch.end()
            ring.watch = None
        if ring.enabled:
            (stop or self.device.stop_queue)(ring.queue)
        ring.by_device = False

    def _watch_kick(self, ring: Ring) -> None:
        if ring.kick >= 0 and ring.kick not in self._kicks:
            self._epoll.register(ring.kick, select.EPOLLIN | select.EPOLLET)
            self._kicks[ring.kick] = ring

    def _unwatch_kick(self, ring: Ring) -> None:
        if self._kicks.pop(ring.kick, None) is not None:
            self._epoll.unregister(ring.kick)

    def _is_polled(self, ring: Ring) -> bool:
        return (ring.enabled or (ring.seen and self._drops)) and ring.polled

    def _update_polling(self) -> None:
        wanted = any(self._is_polled(ring) for ring in self.rings)
        if wanted and not self._watches_busy:
            self._epoll.register(self._busy, select.EPOLLIN)
        elif self._watches_busy and not wanted:
            self._epoll.unregister(self._busy)
        self._watches_busy = wanted

    # -- the end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """End the session: rings are stopped, everything of the driver's is let go. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self.device.detach(self)
        for ring in self.rings:
            self._call_device(functools.partial(self._halt, ring))
            ring.close()
        self._call_device(self._release_if_idle)
        self._posted.clear()
        self.memory = self.no_memory
        self._let_go()
        self._close_events()

    def _call_device(self, call: Callable[[], None]) -> None:
        """A hook that fails must neither keep anything of this session nor end the others."""
        try:
            call()
        except Exception:
            log.exception("%s: end of a session", type(self.device).__name__)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _raise(error: BaseException) -> None:
    raise error
