# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""One ring of a device's session: what the driver's side said of it, and whether it runs.

A ring is stopped or started, and apart from that disabled or enabled (vhost-user, "Ring states"). If its kick
comes last, as all front-ends that we know have it, it starts at once, without a kick proper, for which older
texts waited: work that lies in a ring which was restarted may never be kicked for. Until it has processed
something, what was said of it can be said anew. Knows no transport and no event loop; owns the ring's
descriptors.
"""

from __future__ import annotations

import os
import select
from typing import NamedTuple

from vhost._iotlb import Iotlb
from vhost.devices.workers import Watch
from vhost.errors import IncorrectFds, InvalidState
from vhost.features import VirtioF
from vhost.inflight import InflightRegion
from vhost.memory import GuestMemory
from vhost.virtqueue import DeviceQueue


def check_event_fd(fd: int) -> None:
    """Anything but an eventfd could block us, or worse. (vhost-user's pipes are for systems that have no
    eventfds.) It is left in the mode that it has: the other side waits on the same open file."""
    link = os.readlink(f"/proc/self/fd/{fd}")
    if link != "anon_inode:[eventfd]":
        raise IncorrectFds(f"{link} is no eventfd")


class Areas(NamedTuple):
    """Where a ring's areas are, in the addresses that the transport speaks in."""

    desc: int
    avail: int
    used: int


class Ring:
    """The state of one virtqueue. ``user_addresses``: its areas are given as addresses in the front-end's
    process; otherwise as guest addresses."""

    def __init__(self, index: int, name: str, *, user_addresses: bool) -> None:
        self.index = index
        self.name = name
        self.user_addresses = user_addresses
        self.num = 0
        self.areas: Areas | None = None
        self.base: int | None = None
        """Where to start, if somebody said so since the ring stopped last (SET_VRING_BASE)."""
        self.left: int | None = None
        """Where it stopped. If neither is known, the ring's used index says where to start."""
        self.big_endian = False
        """A legacy driver's, in that byte order (SET_VRING_ENDIAN)."""
        self.enabled = False
        self.kick_known = False
        """A kick was given; -1 then means that the device is to poll."""
        self.kick = -1
        self.call = -1
        self.err = -1
        self.call_vq: int | None = None
        """With it, ``call`` is a VDUSE device, and the ring has this number there."""
        self.log_used: int | None = None
        """Guest address of the used area, if what is written there goes into the dirty log."""
        self.queue: DeviceQueue | None = None
        """There while the ring is started."""
        self.by_device = False
        """The device serves it in threads of its own."""
        self.watch: Watch | None = None
        """A worker runs the device's handler for it."""
        self.seen = False
        """Kicked or enabled since it stopped last: disabled, it is to be processed without effects."""
        self._began: int | None = None

    @property
    def started(self) -> bool:
        return self.queue is not None

    @property
    def elsewhere(self) -> bool:
        """Another thread looks after it than the one that steps the session."""
        return self.by_device or self.watch is not None

    @property
    def polled(self) -> bool:
        """Nobody kicks, and no other thread looks after it."""
        if self.queue is None or self.queue.broken:
            return False
        return self.kick < 0 and not self.elsewhere

    @property
    def untouched(self) -> bool:
        """It is started, but where it was when it started. For a ring that is paused."""
        queue = self.queue
        if queue is None or queue.broken or queue.in_flight or queue.base != self._began:
            return False
        # A packed ring is back at its beginning after two laps, but it was kicked then; nobody reads that.
        if self.kick < 0:
            return not self.enabled
        kicked = select.poll()  # of any number, which select() cannot
        kicked.register(self.kick, select.POLLIN)
        return not kicked.poll(0)

    def must_be_stopped(self, what: str) -> None:
        if self.started:
            raise InvalidState(f"ring {self.index}: {what} while the ring is started")

    @property
    def position(self) -> int | None:
        return self.left if self.base is None else self.base

    def place(self, areas: Areas) -> None:
        """The ring is here. A front-end that says so and gives no base, as old ones do, may have made a
        new ring: where the one before it stopped means nothing then."""
        self.areas = areas
        self.left = None

    def forget_position(self) -> None:
        """The driver makes new rings, where nothing was ever used."""
        self.base = self.left = None

    def can_start(self) -> bool:
        return self.queue is None and self.kick_known and self.num > 0 and self.areas is not None

    def start(
        self,
        memory: GuestMemory,
        features: int,
        iotlb: Iotlb | None = None,
        inflight: InflightRegion | None = None,
    ) -> DeviceQueue:
        """Make the queue; InvalidQueue if what was said of the ring is no ring. ``iotlb``: its addresses are
        IOVAs. ``inflight``: where it notes what it has in flight."""
        assert self.areas is not None
        packed = bool(features & int(VirtioF.RING_PACKED))
        base = self.position
        if base is not None and not packed:
            base &= 0xFFFF  # the rest is reserved, and some front-ends leave garbage there
        self.queue = DeviceQueue(
            memory,
            self.num,
            *self.areas,
            packed=packed,
            indirect=bool(features & int(VirtioF.RING_INDIRECT_DESC)),
            event_idx=bool(features & int(VirtioF.RING_EVENT_IDX)),
            in_order=bool(features & int(VirtioF.IN_ORDER)),
            big_endian=self.big_endian and not features & int(VirtioF.VERSION_1 | VirtioF.RING_PACKED),
            base=base,
            user_addresses=self.user_addresses,
            iotlb=iotlb,
            kick=self.kick,
            call=self.call,
            call_vq=self.call_vq,
            err=self.err,
            inflight=inflight,
            index=self.index,
            name=f"{self.name}[{self.index}]",
        )
        self._began = self.queue.base
        return self.queue

    def unstart(self) -> None:
        """As if it had not started yet; for one that is ``untouched``."""
        if self.queue is not None:
            self.queue.close()
            self.queue = None
            self.seen = False

    def renew(self, memory: GuestMemory, features: int) -> DeviceQueue:
        """Go on with a new queue where the old one stands, also if that is broken."""
        assert self.queue is not None
        self._let_go_of_queue()
        return self.start(memory, features)

    def _let_go_of_queue(self) -> None:
        if self.queue is not None:
            self.left = self.queue.base
            self.base = None
            self.queue.close()
            self.queue = None

    def stop(self) -> int | None:
        """Let the queue go. Returns where a successor goes on; the kick has to be given again."""
        self._let_go_of_queue()
        self.by_device = False
        self.seen = False
        self.set_fd("kick", -1)
        self.kick_known = False
        return self.position

    def set_fd(self, kind: str, fd: int) -> None:
        """Replace the kick, call or err descriptor; the old one is closed. The queue may not be in
        use by a thread of the device."""
        old = getattr(self, kind)
        setattr(self, kind, fd)
        if self.queue is not None:
            setattr(self.queue, kind, fd)
        if old >= 0:
            os.close(old)

    def close(self) -> None:
        self.stop()
        self.set_fd("call", -1)
        self.set_fd("err", -1)

    def reset(self) -> None:
        """Back to the initial state, but for ``call`` and ``err``: QEMU gives those when it connects, and a
        device that was reset may have to use them before they are given again."""
        self.stop()
        call, err, call_vq = self.call, self.err, self.call_vq
        self.__init__(self.index, self.name, user_addresses=self.user_addresses)  # type: ignore[misc]
        self.call, self.err, self.call_vq = call, err, call_vq
