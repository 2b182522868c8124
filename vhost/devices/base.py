# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Device: what a virtio device is, without the transport that brings it a guest.

A subclass says its id, its queues and its configuration space, and has one method a queue. It knows
nothing of sockets, messages or event loops; sessions (a vhost-user ``Backend``, later a kernel one)
attach to it. One instance may have any number of sessions that look, and one that runs rings.

Threads: a session calls every hook from the thread that steps it, and handlers, too, unless there are
``workers``: those run handlers of different queues at the same time, also beside hooks, but none of a queue
that is being stopped. ``config_changed()``, ``wake()`` and ``post()`` may be called from any thread.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol, Self, cast

from vhost.devices.requests import Requests
from vhost.devices.workers import Watch, Workers
from vhost.errors import DeviceBusy, InvalidState, UnsupportedRequest, VhostError
from vhost.features import DeviceId, VirtioF

if TYPE_CHECKING:
    from vhost.virtqueue import DeviceQueue

# A plain integer: an operation on an IntFlag costs as much as a system call.
_RINGS = int(
    VirtioF.VERSION_1
    | VirtioF.RING_PACKED
    | VirtioF.RING_INDIRECT_DESC
    | VirtioF.RING_EVENT_IDX
    | VirtioF.IN_ORDER
)


class Attached(Protocol):
    """What a device wants of a session. All may be called from any thread."""

    def config_changed(self) -> None:
        """Tell the driver that the configuration space changed."""

    def wake(self) -> None:
        """Look after rings and memory: something may have broken where the session cannot see it."""

    def post(self, call: Callable[[], None]) -> None:
        """Have the thread that steps the session call this."""


class Stepped(Protocol):
    """Something of a device's that waits, for its session to look after."""

    def fileno(self) -> int:
        """Readable when ``step()`` has something to do."""

    @property
    def pending(self) -> bool:
        """It has something to write: ``step()`` is due when ``fileno()`` is writable, too."""

    def step(self) -> bool:
        """Do what there is to do, without blocking; False when it is over."""

    def close(self) -> None: ...


class Device(Requests):
    """A virtio device. Set ``device_id`` and ``queues``, and write one method for each queue::

    class Entropy(Device):
        device_id = DeviceId.RNG
        queues = ("requestq",)

        def requestq(self, queue):
            for chain in queue:
                queue.push(chain, chain.write(os.urandom(min(chain.writable_len, 4096))))
    """

    #: The virtio device id (VIRTIO 5).
    device_id: DeviceId
    #: One name for each virtqueue, in order; each names the method that serves it. A multi-queue
    #: device sets it in ``__init__``: ``self.queues = ("requestq",) * n``.
    queues: tuple[str, ...] = ()
    #: Feature bits of this device type; those of the rings come on top, see ``offered_features()``.
    features: int = 0
    #: The largest ring that a front-end may set up.
    max_queue_size: int = 1024
    #: How many threads run the handlers; queue ``i`` is worker ``i % workers``'s. 0: none but the one that
    #: steps the session. Counts from when rings start next.
    workers: int = 0
    #: Let several sessions run rings at the same time. The driver side must be made for that.
    share: bool = False
    #: Legacy drivers of the other byte order can be served: ``handle`` looks at ``queue.big_endian``, which
    #: is then the order of all numbers in requests, and of those in the configuration space.
    cross_endian: bool = False
    #: An eventfd that threads without the GIL signal when they find a queue or its memory broken; each
    #: session watches it edge-triggered, and does then what ``wake()`` makes it do. -1: none.
    notice: int = -1
    #: What the driver of the session that runs (or last ran) the rings acknowledged.
    negotiated: int = 0

    _lock: threading.Lock
    _attached: set[Attached]
    _running: set[Attached]
    _handler_threads: Workers | None

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        # Not __init__: a subclass need not know of this to be right.
        self = super().__new__(cls)
        self._lock = threading.Lock()
        self._attached = set()
        self._running = set()
        self._handler_threads = None
        return self

    # ------------------------------------------------------------------ what it is

    @property
    def num_queues(self) -> int:
        return len(self.queues)

    @property
    def announced_queues(self) -> int:
        """What a vhost-user front-end is told of them (GET_QUEUE_NUM), which of a network device expects
        pairs, without the control queue."""
        return len(self.queues)

    def queue_name(self, index: int) -> str:
        """The name of a queue, and of the method that serves it."""
        return self.queues[index]

    @property
    def config(self) -> bytes:
        """The configuration space as it is now; empty: the device has none."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes to the configuration space (it lies inside it). Raise VhostError to refuse."""
        kind = type(self).__name__
        raise VhostError(f"{kind}: configuration space is read-only ({len(data)} bytes at {offset})")

    def offered_features(self) -> int:
        """All feature bits that the device offers to a driver."""
        return _RINGS | int(self.features)

    # ------------------------------------------------------------------ serving rings

    def handle(self, queue: DeviceQueue) -> None:
        """Serve what is available: a kick came, or work may be pending. Returns instead of waiting;
        whatever it pops it may push later, until ``stop_queue``. Never called for a queue while it runs
        for that queue."""
        serve = cast("Callable[[DeviceQueue], None]", getattr(self, self.queue_name(queue.index)))
        serve(queue)

    def handle_disabled(self, queue: DeviceQueue) -> None:
        """A kick came for a ring that is started but disabled: it must not have effects outside (a
        network device drops what the guest sends). By default its buffers wait."""

    def start_queue(self, queue: DeviceQueue) -> bool:
        """The ring is started and enabled. Return True if the device serves it by itself, in threads
        of its own: it then waits on ``queue.kick`` itself (-1: it must poll), looks at the ring once
        without a kick, and calls ``wake()`` when it finds the queue or its memory broken."""
        return False

    def stop_queue(self, queue: DeviceQueue) -> None:
        """The ring stops, or pauses to have its memory or eventfds changed. Return only when nothing
        uses the queue any more and what was popped has been pushed."""

    def hold_queue(self, queue: DeviceQueue) -> bool:
        """What an IOMMU maps changes, which with some guests is twice for each request. A device whose own
        threads serve the queue may return True, if nothing uses the queue from then on until
        ``release_queue``, and all that was popped was pushed. By default it is stopped, and started again."""
        return False

    def release_queue(self, queue: DeviceQueue, look: bool) -> None:
        """Go on. ``look``: there may be work that no kick tells of."""

    def suspend_queue(self, queue: DeviceQueue) -> None:
        """The ring stops, and what is in flight is noted for a successor, which will pop it again. As
        ``stop_queue``, but what was popped need not have been pushed: a device that can cancel its
        requests does so here. They must not have effects any more afterwards."""
        self.stop_queue(queue)

    def reset(self) -> None:
        """The driver reset the device; all rings are stopped."""

    def set_status(self, status: int) -> None:
        """The driver set the device status (to something else than 0)."""

    def refresh(self) -> None:
        """Look again at what lies behind the device: a file may have been resized. ``vhost serve`` calls
        it on SIGHUP."""

    def counters(self) -> dict[str, int]:
        """What it has done so far, by name. ``vhost serve`` says it on SIGUSR1. From any thread."""
        return {}

    def close(self) -> None:
        """Let go of what lies behind the device. A server that made the device for a session calls it
        when the session is over."""

    # ------------------------------------------------------------------ migration

    #: The longest state, in bytes, that ``load()`` is ever given; a front-end that sends more is refused.
    max_state_size: int = 64 << 20

    def save(self) -> bytes | Iterable[bytes]:
        """All that the driver may rely on and that is neither in guest memory nor in the configuration
        space, so that another device of this kind can go on in this one's place: whole, or in pieces that
        are taken one by one as the other side reads. All rings are stopped, and stay so until the last
        piece was taken. Afterwards the driver may well go on here. Raise VhostError to refuse."""
        raise UnsupportedRequest(f"{type(self).__name__} has no state to save")

    def load(self, state: bytes) -> None:
        """Become what another device was when it was saved. The bytes come from outside: check them.
        Raise VhostError to refuse, and change nothing then."""
        raise UnsupportedRequest(f"{type(self).__name__} cannot load a state ({len(state)} bytes)")

    @property
    def has_state(self) -> bool:
        """Whether the class defines both ``save`` and ``load``; sessions offer the transfer only then."""
        kind = type(self)
        return kind.save is not Device.save and kind.load is not Device.load

    # ------------------------------------------------------------------ network devices only

    def set_mtu(self, mtu: int) -> None:
        """The guest's interface will have this MTU. Raise VhostError to refuse."""
        raise UnsupportedRequest(f"{type(self).__name__} does not take an MTU ({mtu})")

    def send_rarp(self, mac: bytes) -> None:
        """Announce the guest's address on the network after a migration."""
        raise UnsupportedRequest(f"{type(self).__name__} does not announce ({mac.hex(':')})")

    # ------------------------------------------------------------------ crypto and GPU devices only

    def create_crypto_session(self, op_code: int, setup: bytes) -> int:
        """Make a session for VIRTIO_CRYPTO_* ``op_code``: its id, not negative and not in use. ``setup`` is
        QEMU's struct of parameters and keys, 1056 bytes. Raise VhostError to refuse."""
        raise UnsupportedRequest(f"{type(self).__name__} has no crypto sessions (op_code {op_code:#x})")

    def close_crypto_session(self, session_id: int) -> None:
        """One that the same front-end made; called for all that are left when it goes."""

    def set_gpu_socket(self, sock: socket.socket) -> Stepped | None:
        """The socket of the vhost-user-gpu protocol (``vhost.user.gpu.GpuChannel`` speaks it), which is the
        device's from now on, as it was the session's before. What is returned is stepped by the session
        and closed with it. Raise VhostError to refuse."""
        raise UnsupportedRequest(f"{type(self).__name__} shows nothing on a display")

    # ------------------------------------------------------------------ telling the sessions

    def config_changed(self) -> None:
        """The configuration space is another now: tell the drivers. From any thread."""
        with self._lock:
            sessions = list(self._attached)
        for session in sessions:
            session.config_changed()

    def wake(self) -> None:
        """Have the sessions check their rings and memory. From any thread, e.g. of an engine that
        found its queue broken."""
        with self._lock:
            sessions = list(self._attached)
        for session in sessions:
            session.wake()

    def post(self, call: Callable[[], None]) -> None:
        """Have a thread that steps a session whose rings run call this soon: for what workers may not do
        themselves, such as to ask the front-end. From any thread. InvalidState: no rings run."""
        with self._lock:
            session = next(iter(self._running), None)
        if session is None:
            raise InvalidState(f"no session runs the rings of {type(self).__name__}")
        session.post(call)

    # ------------------------------------------------------------------ called by sessions

    def attach(self, session: Attached) -> None:
        """A session wants to hear of changes."""
        with self._lock:
            self._attached.add(session)

    def detach(self, session: Attached) -> None:
        with self._lock:
            self._attached.discard(session)

    def claim(self, session: Attached) -> None:
        """The session is about to start its first ring. Raise DeviceBusy to refuse."""
        with self._lock:
            if self._running - {session} and not self.share:
                raise DeviceBusy(f"{type(self).__name__}: another session runs this device's rings")
            if self.workers and self._handler_threads is None:
                name = f"vhost-{type(self).__name__.lower()}"
                self._handler_threads = Workers(min(self.workers, self.num_queues), name)
            self._running.add(session)

    def watch(self, index: int, kick: int, serve: Callable[[], bool], *, look: bool) -> Watch | None:
        """Have a worker look after the session's ring, see ``Worker.watch``. None: there are no workers."""
        workers = self._handler_threads
        return None if workers is None else workers.watch(index, kick, serve, look=look)

    def release(self, session: Attached) -> None:
        """The session's last ring has stopped, or the session is over. Once for each claim."""
        ended: Workers | None = None
        with self._lock:
            self._running.discard(session)
            if not self._running:
                ended, self._handler_threads = self._handler_threads, None
        if ended is not None:
            ended.close()

    def _running_sessions(self) -> list[Attached]:
        with self._lock:
            if self._handler_threads is not None and self._handler_threads.have_this_thread:
                raise InvalidState(f"{type(self).__name__}: a worker may not ask; it can post() that")
            return list(self._running)

    def is_busy(self, session: Attached) -> bool:
        """Does a session other than this one run rings?"""
        with self._lock:
            return bool(self._running - {session})
