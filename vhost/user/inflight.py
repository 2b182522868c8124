# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""In-flight tracking, as a back-end serves it (vhost-user, "Inflight I/O tracking").

Knows which buffer the front-end keeps for us, and hands each ring its part when it starts; what is noted
there is the queues' business (csrc/inflight.h).

A reset of the device ends the use of a buffer: the driver makes new rings, of which it knows nothing. A
front-end that only stopped the rings, as QEMU does with a status of 0, too, gives it back.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from vhost.device_queue import DeviceQueue
from vhost.devices.base import Device
from vhost.devices.rings import Ring
from vhost.errors import InvalidMessage, InvalidState
from vhost.features import ProtocolF, VirtioF
from vhost.inflight import QUEUE_SIZE_MAX, InflightRegion
from vhost.user.handlers import Handlers
from vhost.user.payloads import Inflight, VringState
from vhost.user.session import Message
from vhost.user.spec import Answer

# Plain integers: an operation on an IntFlag costs as much as a system call.
_SHMFD = int(ProtocolF.INFLIGHT_SHMFD)
_HAND_OVER = int(ProtocolF.GET_VRING_BASE_INFLIGHT)
_SKIP_DRAIN = int(ProtocolF.GET_VRING_BASE_SKIP_DRAIN)
_RING_PACKED = int(VirtioF.RING_PACKED)


class InflightHandlers(Handlers):
    def __init__(self, device: Device, sock: socket.socket, *, without: int = 0) -> None:
        self._inflight: InflightRegion | None = None
        self._skips_drain = False
        """The ring that stops now leaves what it has in flight to a successor."""
        super().__init__(device, sock, without=without)

    # -- what is offered ---------------------------------------------------------------------------

    def offered_protocol_features(self) -> int:
        offered = super().offered_protocol_features() | _SHMFD
        # Without a buffer there is nothing to hand over.
        if not self.without & _SHMFD:
            offered |= _HAND_OVER
            if not self.without & _HAND_OVER:
                offered |= _SKIP_DRAIN
        return offered

    # -- requests ----------------------------------------------------------------------------------

    def get_inflight_fd(self, message: Message) -> Answer:
        asked: Inflight = message.payload
        if not 0 < asked.num_queues <= len(self.rings):
            raise InvalidMessage(
                f"{asked.num_queues} queues, must be 1 to {len(self.rings)}", request=message.name
            )
        if not 0 < asked.queue_size <= QUEUE_SIZE_MAX:
            raise InvalidMessage(
                f"queue size {asked.queue_size}, must be 1 to {QUEUE_SIZE_MAX}", request=message.name
            )
        # Who asks before the features are known may need the larger format.
        packed = not self.features or bool(self.features & _RING_PACKED)
        made = InflightRegion.allocate(asked.num_queues, asked.queue_size, packed=packed)
        fd = os.dup(made.region.fd)
        # For rings that start from now on, should the front-end not give it back first.
        self._inflight = made
        return Answer(Inflight(made.size, 0, made.num_queues, made.queue_size), [fd])

    def set_inflight_fd(self, message: Message) -> None:
        given: Inflight = message.payload
        for ring in self.rings:
            ring.must_be_stopped(message.name)
        self._inflight = InflightRegion.from_fd(
            message.fds[0],
            given.mmap_size,
            offset=given.mmap_offset,
            num_queues=given.num_queues,
            queue_size=given.queue_size,
        )

    def change_status(self, status: int, what: str) -> None:
        super().change_status(status, what)
        if not status:
            self._inflight = None

    def reset(self, what: str) -> None:
        super().reset(what)
        self._inflight = None

    # -- rings -------------------------------------------------------------------------------------

    def _inflight_of(self, ring: Ring) -> InflightRegion | None:
        if self._inflight is None or ring.index >= self._inflight.num_queues:
            return None
        if self._inflight.broken:
            raise InvalidState("the front-end truncated the file of the in-flight buffer")
        return self._inflight

    def get_vring_base_skip_drain(self, message: Message) -> VringState:
        self._skips_drain = True
        try:
            return self.get_vring_base(message)
        finally:
            self._skips_drain = False

    def stop_ring(self, ring: Ring) -> int:
        if ring.queue is not None and ring.queue.resubmits and not self._hands_over:
            with self.paused(ring):
                self._finish(ring, ring.queue)
        return super().stop_ring(ring)

    def _finish(self, ring: Ring, queue: DeviceQueue) -> None:
        """No index can say that these are left to do: they come from before the place where a successor
        goes on."""
        left = queue.resubmits + 1
        while ring.enabled and not queue.broken and 0 < queue.resubmits < left:
            left = queue.resubmits
            self._serve(ring)

    def _stopping(self, ring: Ring) -> Callable[[DeviceQueue], None]:
        if ring.queue is not None and ring.queue.inflight is not None and self._hands_over:
            return self.device.suspend_queue
        return super()._stopping(ring)

    @property
    def _hands_over(self) -> bool:
        """A ring that stops may leave things in flight: the buffer tells a successor. A front-end that has a
        message for that wants GET_VRING_BASE to wait."""
        by_default = self.session.protocol_features & (_HAND_OVER | _SKIP_DRAIN) == _HAND_OVER
        return self._skips_drain or by_default

    def _check_memory(self) -> None:
        super()._check_memory()
        if self._inflight is not None and self._inflight.broken:
            raise InvalidState("the front-end truncated the file of the in-flight buffer")

    def _wants_look(self, ring: Ring) -> bool:
        return super()._wants_look(ring) or (self._inflight is not None and self._inflight.broken)

    def _let_go(self) -> None:
        super()._let_go()
        self._inflight = None
