# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Driver: brings a device up on any VhostOps, and takes it down again (VIRTIO 1.2, 3.1).

Owns the memory that it shares, the rings in it and their eventfds. Knows no particular device.
"""

from __future__ import annotations

import os
from enum import IntFlag
from types import TracebackType
from typing import Self

from vhost.driver_queue import DriverQueue, Layout
from vhost.errors import InactiveFeature, VhostError
from vhost.features import Status, VirtioF, feature_names
from vhost.memory import GuestMemory, Region
from vhost.ops import VhostOps

GUEST_ADDR = 1 << 32
"""Where the shared region is said to be: high, so that an address cut to 32 bits shows."""
PAGE = 4096

RING_FEATURES = VirtioF.RING_INDIRECT_DESC | VirtioF.RING_EVENT_IDX | VirtioF.RING_PACKED | VirtioF.IN_ORDER


class Driver:
    """A device's driver in user space.

    ``packed``: True insists on packed rings, False on split ones, None takes what there is.
    ``without``: feature bits to leave alone even if they are offered.
    """

    features: int = 0
    """Bits of this device type that the driver can use."""
    names: type[IntFlag] = VirtioF
    """What these bits are called."""

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
        self.negotiated = self._choose(packed, without)
        self.packed = bool(self.negotiated & VirtioF.RING_PACKED)
        has_tables = bool(self.negotiated & VirtioF.RING_INDIRECT_DESC)
        self._indirect_max = indirect_max if has_tables else 0
        self._layout: Layout = DriverQueue.layout(
            queue_size, packed=self.packed, indirect_max=self._indirect_max
        )
        self._ring_room = -(-self._layout.size // PAGE) * PAGE
        self.region = Region.allocate(num_queues * self._ring_room + data_size, guest_addr=GUEST_ADDR)
        self.memory = GuestMemory([self.region])
        self.data_addr = GUEST_ADDR + num_queues * self._ring_room
        """Guest address of the ``data_size`` bytes that are the subclass's."""
        self.queues: list[DriverQueue] = []
        self._events: list[int] = []
        try:
            for index in range(num_queues):
                self.queues.append(self._make_queue(index))
            self._start()
        except BaseException:
            self._close_events()
            raise

    def _choose(self, packed: bool | None, without: int) -> int:
        offered = self.ops.get_features()
        if not offered & VirtioF.VERSION_1:
            raise VhostError("the device is a legacy one: it does not offer VERSION_1")
        if packed and not offered & VirtioF.RING_PACKED:
            names = " ".join(feature_names(offered, self.names, VirtioF))
            raise InactiveFeature(f"the device offers no packed rings (RING_PACKED), only {names}")
        wanted = int(VirtioF.VERSION_1 | RING_FEATURES) | self.features | self.ops.transport_features
        if packed is False:
            wanted &= ~int(VirtioF.RING_PACKED)
        return offered & wanted & ~without

    def _make_queue(self, index: int) -> DriverQueue:
        kick, call = (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2))
        self._events += [kick, call]
        return self._queue_on(index, kick, call)

    def _queue_on(self, index: int, kick: int, call: int) -> DriverQueue:
        start = GUEST_ADDR + index * self._ring_room
        return DriverQueue(
            self.memory,
            self.queue_size,
            desc=start + self._layout.desc,
            avail=start + self._layout.avail,
            used=start + self._layout.used,
            packed=self.packed,
            event_idx=bool(self.negotiated & VirtioF.RING_EVENT_IDX),
            in_order=bool(self.negotiated & VirtioF.IN_ORDER),
            indirect_addr=start + self._layout.indirect if self._indirect_max else None,
            indirect_max=self._indirect_max,
            kick=kick,
            call=call,
            index=index,
            name=f"{type(self).__name__.lower()}[{index}]",
        )

    def _start(self) -> None:
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
        for index, queue in enumerate(self.queues):
            start = GUEST_ADDR + index * self._ring_room
            ops.set_vring_num(index, self.queue_size)
            ops.set_vring_base(index, queue.base)
            ops.set_vring_addr(
                index, start + self._layout.desc, start + self._layout.avail, start + self._layout.used
            )
            ops.set_vring_call(index, queue.call_fd)
            ops.set_vring_kick(index, queue.kick_fd)
            ops.set_vring_enable(index, True)
        ops.set_status(int(status | Status.DRIVER_OK))

    def restart(self, ops: VhostOps) -> None:
        """Go on with another session, after the back-end died: the rings are made anew. The device has
        to offer what was negotiated. What was in flight is the subclass's to submit again."""
        missing = self.negotiated & ~ops.get_features()
        if missing:
            names = " ".join(feature_names(missing, self.names, VirtioF))
            raise InactiveFeature(f"the back-end that came back no longer offers {names}")
        self.ops = ops
        self.queues = [self._queue_on(queue.index, queue.kick_fd, queue.call_fd) for queue in self.queues]
        self._start()

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
