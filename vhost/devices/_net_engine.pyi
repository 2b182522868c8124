# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Network queues served by threads that never take the GIL."""

from typing import Final, final

from vhost.device_queue import DeviceQueue
from vhost.devices._engine import Engine

__all__ = ["DROPS", "FRAME_MAX", "VLAN_TAG", "NetEngine", "NetPair"]

FRAME_MAX: Final[int]
VLAN_TAG: Final[int]
DROPS: Final[tuple[str, ...]]
"""Why frames are dropped: a word for each reason, see csrc/net_counters.h."""

@final
class NetPair:
    """A receive and a transmit queue, and what they are connected to: nothing, at first, so that what is sent
    is dropped. Changed only while neither queue is attached."""

    def configure(
        self,
        *,
        hdr_len: int,
        mergeable: bool,
        longest: int,
        host_csum: bool,
        host_gso: int,
        guest_csum: bool,
        guest_gso: int,
    ) -> None:
        """What was negotiated. ``longest``: bytes of a frame that is not to be segmented. ``host_*``: what
        the driver may leave to the device, ``guest_*``: the other way; ``*_gso`` has a bit for each type, by
        its number, and ECN's."""

    def connect(self, peer: NetPair) -> None:
        """What is sent goes to that pair's receive queue. To itself: it comes back."""

    def join(self, next: NetPair) -> None:
        """The next of the pairs that may receive in this one's place, in a circle: those of the same device
        that the same worker has."""

    def disconnect(self) -> None:
        """What is sent goes nowhere."""

    def open(self, fd: int, socket: bool) -> None:
        """Frames go to and come from a descriptor that does not block: a socket of messages, or a tap. It
        must stay open while a queue of the pair is attached."""

    def repeat(self, frame: bytes) -> None:
        """This frame comes, as often as there is a buffer for it."""

    def drop_disabled(self, frames: int) -> None:
        """Count what the driver sent to a queue that is disabled."""

    def counters(self) -> dict[str, int]:
        """Frames and bytes in both directions, and ``dropped_*`` for each of ``DROPS``. From any thread."""

@final
class NetEngine(Engine):
    def attach(self, queue: DeviceQueue, pair: NetPair, worker: int, transmit: bool) -> None:
        """Hand a queue, with the descriptors that it has now, to a worker: the same for both queues of the
        pair, and for pairs that are connected. Until ``detach`` nothing else may use it."""

    def deliver(self, queue: DeviceQueue, frame: bytes) -> None:
        """Give the driver of a receive queue that is attached a frame."""
