# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Driver: brings a device up on any VhostOps, and takes it down again (VIRTIO 1.2, 3.1).

Owns the memory that it shares, the rings in it and their eventfds. Knows no particular device.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from types import TracebackType
from typing import Self

from vhost.driver_queue import DriverQueue, Layout
from vhost.errors import InactiveFeature, VhostError
from vhost.features import Status, VirtioF, feature_names
from vhost.memory import GuestMemory, Region
from vhost.ops import InflightBuffer, VhostOps

GUEST_ADDR = 1 << 32
"""Where the shared region is said to be: high, so that an address cut to 32 bits shows."""
PAGE = 4096

RING_FEATURES = VirtioF.RING_INDIRECT_DESC | VirtioF.RING_EVENT_IDX | VirtioF.RING_PACKED | VirtioF.IN_ORDER


@dataclass(frozen=True, slots=True)
class QueuePlan:
    """One ring to set up: the device's number for it, and its size."""

    index: int
    size: int
    indirect_max: int = 8
    """Buffers of a chain that fit into an indirect table, if the device takes such; 0: none are made."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a ring is: its guest address, and what lies where from there."""

    addr: int
    size: int
    layout: Layout
    indirect_max: int


class Driver:
    """A device's driver in user space.

    ``packed``: True insists on packed rings, False on split ones, None takes what there is.
    ``without``: feature bits to leave alone even if they are offered.
    """

    features: int = 0
    """Bits of this device type that the driver can use."""
    names: type[IntFlag] = VirtioF
    """What these bits are called."""
    legacy: bool = False
    """Can the driver do without VERSION_1?"""
    tracks: bool = False
    """Have the back-end note what is in flight, if it can: ``restart`` then goes on with the same rings."""

    def __init__(
        self,
        ops: VhostOps,
        *,
        packed: bool | None = None,
        num_queues: int = 1,
        queue_size: int = 128,
        indirect_max: int = 8,
        data_size: int = 0,
        without: int = int(VirtioF.IN_ORDER),
    ) -> None:
        self.ops = ops
        self.queue_size = queue_size
        self.num_queues = num_queues
        self._indirect_max = indirect_max
        self._data_size = data_size
        self.negotiated = self._choose(packed, without)
        self.packed = bool(self.negotiated & VirtioF.RING_PACKED)
        plans, data_size = self._plan()
        self._places: dict[int, _Place] = {}
        end = GUEST_ADDR
        for plan in plans:
            place = self._places[plan.index] = self._place(end, plan)
            end += -(-place.layout.size // PAGE) * PAGE
        self.data_addr = end
        """Guest address of the ``data_size`` bytes that are the subclass's."""
        self.region = Region.allocate(end - GUEST_ADDR + data_size, guest_addr=GUEST_ADDR)
        self.memory = GuestMemory([self.region])
        self._inflight: InflightBuffer | None = None
        self.queues: list[DriverQueue] = []
        """In the order of the plan; ``index`` is the device's number."""
        self._events: list[int] = []
        try:
            for index in self._places:
                self.queues.append(self._make_queue(index))
            self._start()
        except BaseException:
            self._close_events()
            self._drop_inflight()
            raise

    # -- what a subclass may say -------------------------------------------------------------------

    def _agree(self, features: int) -> int:
        """Of what both sides can do, that which goes together; by default all of it."""
        return features

    def _plan(self) -> tuple[Sequence[QueuePlan], int]:
        """The rings, and the bytes of memory for data. Asked once, when ``negotiated`` is known."""
        plans = [QueuePlan(i, self.queue_size, self._indirect_max) for i in range(self.num_queues)]
        return plans, self._data_size

    def _fill(self) -> None:
        """Add the buffers that the device shall find when it starts, without a kick: the rings are new and
        the device was told of them, but does not look yet. Again at each ``restart``."""

    # -- coming up ---------------------------------------------------------------------------------

    def _choose(self, packed: bool | None, without: int) -> int:
        offered = self.ops.get_features() & ~without
        if not offered & VirtioF.VERSION_1 and not self.legacy:
            raise VhostError("the device is a legacy one: it does not offer VERSION_1")
        if packed and not offered & VirtioF.RING_PACKED:
            names = " ".join(feature_names(offered, self.names, VirtioF))
            raise InactiveFeature(f"the device offers no packed rings (RING_PACKED), only {names}")
        wanted = int(VirtioF.VERSION_1 | RING_FEATURES) | self.features | self.ops.transport_features
        if packed is False:
            wanted &= ~int(VirtioF.RING_PACKED)
        return self._agree(offered & wanted)

    def _place(self, addr: int, plan: QueuePlan) -> _Place:
        most = plan.indirect_max if self.negotiated & VirtioF.RING_INDIRECT_DESC else 0
        layout = DriverQueue.layout(plan.size, packed=self.packed, indirect_max=most)
        return _Place(addr, plan.size, layout, most)

    def _make_queue(self, index: int) -> DriverQueue:
        kick, call = (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2))
        self._events += [kick, call]
        return self._queue_on(index, kick, call)

    def _queue_on(self, index: int, kick: int, call: int) -> DriverQueue:
        place = self._places[index]
        start, layout = place.addr, place.layout
        return DriverQueue(
            self.memory,
            place.size,
            desc=start + layout.desc,
            avail=start + layout.avail,
            used=start + layout.used,
            packed=self.packed,
            event_idx=bool(self.negotiated & VirtioF.RING_EVENT_IDX),
            in_order=bool(self.negotiated & VirtioF.IN_ORDER),
            indirect_addr=start + layout.indirect if place.indirect_max else None,
            indirect_max=place.indirect_max,
            kick=kick,
            call=call,
            index=index,
            name=f"{type(self).__name__.lower()}[{index}]",
        )

    def _start(self, *, resume: bool = False) -> None:
        """``resume``: the rings are as the device before this one left them."""
        ops = self.ops
        status = Status.ACKNOWLEDGE | Status.DRIVER
        ops.set_status(0)
        ops.set_status(int(status))
        ops.set_features(self.negotiated)
        status |= Status.FEATURES_OK
        ops.set_status(int(status))
        if not ops.get_status() & Status.FEATURES_OK:
            raise InactiveFeature(f"the device refused the features {self.negotiated:#x}")
        ops.set_mem_table(self.memory)
        self._track()
        for queue in self.queues:
            index, place = queue.index, self._places[queue.index]
            start, layout = place.addr, place.layout
            ops.set_vring_num(index, queue.num)
            ops.set_vring_base(index, queue.resume_base if resume else queue.base)
            ops.set_vring_addr(index, start + layout.desc, start + layout.avail, start + layout.used)
            ops.set_vring_call(index, queue.call_fd)
            ops.set_vring_kick(index, queue.kick_fd)
        if not resume:
            self._fill()
        for queue in self.queues:
            ops.set_vring_enable(queue.index, True)
        ops.set_status(int(status | Status.DRIVER_OK))
        # Not before DRIVER_OK (3.1.1). A ring without buffers of _fill() asks for none.
        for queue in self.queues:
            if resume:
                os.eventfd_write(queue.kick_fd, 1)  # whether the dead one wanted to be kicked means nothing
            else:
                queue.kick()

    def _track(self) -> None:
        """Give the back-end the notes of the one before it, or have it begin some."""
        if self._inflight is None and self.tracks:
            size = max(place.size for place in self._places.values())
            self._inflight = self.ops.get_inflight_fd(max(self._places) + 1, size)
        if self._inflight is not None:
            self.ops.set_inflight_fd(self._inflight)

    def _drop_inflight(self) -> None:
        if self._inflight is not None:
            self._inflight.close()
            self._inflight = None

    def restart(self, ops: VhostOps) -> bool:
        """Go on with another session, after the back-end died. The device has to offer what was negotiated.

        True: the rings are the same, and the new back-end goes on with what was in flight. False: one of the
        two does not track that, the rings were made anew, and what was in flight is the subclass's to
        submit again."""
        missing = self.negotiated & ~ops.get_features()
        if missing:
            names = " ".join(feature_names(missing, self.names, VirtioF))
            raise InactiveFeature(f"the back-end that came back no longer offers {names}")
        self.ops = ops
        resume = self._inflight is not None and ops.tracks_inflight
        if not resume:
            self._drop_inflight()
            self.queues = [self._queue_on(queue.index, queue.kick_fd, queue.call_fd) for queue in self.queues]
        self._start(resume=resume)
        return resume

    # -- the end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop the rings and reset the device, in that order, as far as the back-end is still there.
        The session stays its owner's. Idempotent."""
        if not self._events:
            return
        try:
            for queue in self.queues:
                self.ops.get_vring_base(queue.index)
            self.ops.set_status(0)
        finally:
            self._close_events()
            self._drop_inflight()

    def _close_events(self) -> None:
        events, self._events = self._events, []
        for fd in events:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except VhostError:
            if error is None:  # a second error would hide the first
                raise
