# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The rings of a socket device (VIRTIO 1.2, 5.10): packets in shared memory, what is owed, and events.

Knows slots, batches and notifications. Whose a packet is that came in, and who may use this and when, is
the subclass's business. Not thread-safe.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from dataclasses import dataclass
from typing import Any

from vhost.driver_queue import DriverQueue
from vhost.drivers.base import Driver
from vhost.drivers.vsock_connection import Connection
from vhost.errors import InactiveFeature, VhostError
from vhost.features import VsockF
from vhost.ops import VhostOps
from vhost.virtio_vsock import EVENT, EVENT_QUEUE, HEADER, MAX_PAYLOAD, RX, TX, VsockEvent, VsockOp

DATA = 64
"""Where the payload is in its slot, on cache lines of its own."""
HEAD = DATA - HEADER.size
"""Where the header is: just before."""
_RW = int(VsockOp.RW)
_EVENTS = 8
_BATCH = 64
_AT_ONCE = 256
"""Packets that one step takes before others get their turn."""
_OWED = 64
"""RST that the device does not take: so many stop the receiving, so that it cannot make them pile up. These
are the additional resources of 5.10.6.1; what connections owe is bounded by their number."""


@dataclass(slots=True, eq=False)
class _Slot:
    """A packet's place in shared memory; ``home`` is where it waits when it is free."""

    addr: int
    view: memoryview
    home: list[_Slot]
    request: Any = None
    """What is added to the rx ring, always the same."""


class VsockRings(Driver):
    """``rx_buffers`` of ``payload`` bytes take what the device sends, as many of the same size are for data
    that is sent, and ``queue_size`` less those for control packets."""

    features = int(VsockF.STREAM | VsockF.SEQPACKET | VsockF.NO_IMPLIED_STREAM)
    names = VsockF

    def __init__(
        self,
        ops: VhostOps,
        *,
        packed: bool | None,
        queue_size: int,
        rx_buffers: int,
        payload: int,
        without: int | None,
    ) -> None:
        if not 0 < payload <= MAX_PAYLOAD:
            raise ValueError(f"payload {payload}: must be 1 to {MAX_PAYLOAD}")
        if not 0 < rx_buffers < queue_size:
            raise ValueError(f"rx_buffers {rx_buffers}: must be 1 to {queue_size - 1}, the queue less one")
        self.payload = payload
        self.rx_buffers = rx_buffers
        queues = EVENT_QUEUE
        with contextlib.suppress(InactiveFeature):  # it does not say, and can do without an event queue
            queues = ops.get_queue_num()
        if queues <= TX:
            raise VhostError(f"a socket device has 2 or 3 queues, this one {queues}")
        self._stride = -(-(DATA + payload) // 64) * 64
        super().__init__(
            ops,
            packed=packed,
            num_queues=min(queues, EVENT_QUEUE + 1),
            queue_size=queue_size,
            indirect_max=0,
            data_size=2 * rx_buffers * self._stride + (queue_size - rx_buffers + _EVENTS) * 64,
            **({} if without is None else {"without": without}),
        )

    def _packet(self, view: memoryview, written: int) -> None:
        """A packet came: its header is at ``HEAD``, its payload at ``DATA``, and the device says that it
        wrote so many bytes, no more than there is room for."""
        raise NotImplementedError

    def _transport_reset(self) -> None:
        """The device is somewhere else now, and its peers are others."""
        raise NotImplementedError

    @property
    def max_message(self) -> int:
        """The longest seqpacket message that can be sent, if the peer's buffer takes it."""
        return self.rx_buffers * self.payload

    def fileno(self) -> int:
        """An eventfd, readable when ``step()`` has something to do."""
        return self._call

    # ------------------------------------------------------------------ setting up

    def _make_queue(self, index: int) -> DriverQueue:
        # One call eventfd for all, so that one descriptor says that there is something to do.
        if index == 0:
            self._call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._events.append(self._call)
        kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._events.append(kick)
        return self._queue_on(index, kick, self._call)

    def _populate(self) -> None:
        """The rings are fresh: post what the device may write to. Nothing is owed to anybody."""
        at = self.data_addr

        def slots(count: int, size: int) -> list[_Slot]:
            nonlocal at
            made: list[_Slot] = []
            for _ in range(count):
                made.append(_Slot(at, self.memory.view(at, size), made))
                at += size
            return made

        received = slots(self.rx_buffers, self._stride)
        self._tx_data = slots(self.rx_buffers, self._stride)
        self._tx_control = slots(self.queue_size - self.rx_buffers, 64)
        events = slots(_EVENTS if len(self.queues) > EVENT_QUEUE else 0, 64)
        self._owing: dict[Connection, None] = {}
        """Connections whose ``wants`` is not 0; a set that keeps the order."""
        self._resets: deque[bytes] = deque()
        """Headers of RST for flows that are no more, or never were."""
        self._starved = False
        """Something waits for a slot, so that the device has to say when it is done with one."""
        for slot in received:
            slot.request = ((), ((slot.addr + HEAD, HEADER.size + self.payload),), slot)
        for slot in events:
            self.queues[EVENT_QUEUE].add((), ((slot.addr, EVENT.size),), slot)
            self.queues[EVENT_QUEUE].kick()
        self._post(received)

    def _post(self, slots: list[_Slot]) -> None:
        self.queues[RX].add_batch([slot.request for slot in slots])
        self.queues[RX].kick()

    # ------------------------------------------------------------------ from the device

    def _poll_rings(self) -> bool:
        """One look at everything; was there anything?"""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._call)
        done = self._reap()
        done |= self._receive()
        if len(self.queues) > EVENT_QUEUE:
            done |= self._take_events()
        return done

    def _reap(self) -> bool:
        """Slots of packets that were sent are free again."""
        done = False
        while batch := self.queues[TX].get_used_batch(_BATCH):
            done, self._starved = True, False
            for slot, _ in batch:
                slot.home.append(slot)
        return done

    def _receive(self) -> bool:
        queue, taken = self.queues[RX], 0
        while taken < _AT_ONCE:
            room = min(_OWED - len(self._resets), _BATCH)
            if room <= 0:
                return taken > 0  # until the device has taken some, see _flush()
            batch = queue.get_used_batch(room)
            if batch:
                taken += len(batch)
                for slot, written in batch:
                    self._packet(slot.view, written)
                self._post([slot for slot, _ in batch])
            elif not queue.enable_callbacks():
                return taken > 0
        os.eventfd_write(self._call, 1)  # there may be more
        return True

    def _take_events(self) -> bool:
        queue, done = self.queues[EVENT_QUEUE], False
        for slot, written in queue.get_used_batch(_EVENTS):
            (event,) = EVENT.unpack_from(slot.view)
            queue.add((), ((slot.addr, EVENT.size),), slot)
            queue.kick()
            done = True
            if written >= EVENT.size and event == VsockEvent.TRANSPORT_RESET:
                self._transport_reset()
        if queue.enable_callbacks():
            os.eventfd_write(self._call, 1)
        return done

    # ------------------------------------------------------------------ to the device

    def _can_send(self, connection: Connection, size: int) -> bool:
        """Is there credit for ``size`` bytes, and place for them?"""
        if connection.credit < max(size, 1):
            return False
        if len(self._tx_data) * self.payload >= max(size, 1):
            return True
        self._starved = True
        return False

    def _transmit(self, connection: Connection, data: memoryview, marks: int) -> int:
        """Send as much of ``data`` as there is credit and place for; ``marks`` go with its last byte."""
        free, queue, total = self._tx_data, self.queues[TX], len(data)
        sent = 0
        while sent < total and free:
            size = min(total - sent, connection.credit, self.payload)
            if size <= 0:
                break
            slot = free.pop()
            slot.view[DATA : DATA + size] = data[sent : sent + size]
            sent += size
            connection.pack_into(slot.view, HEAD, _RW, size, marks if sent == total else 0)
            queue.add(((slot.addr + HEAD, HEADER.size + size),), (), slot)
        if sent:
            queue.kick()
        return sent

    def _flush(self) -> None:
        """Send what is owed, as far as there is place."""
        queue, free = self.queues[TX], self._tx_control
        sent = False
        while free and self._resets:
            slot = free.pop()
            slot.view[HEAD:DATA] = self._resets.popleft()
            queue.add(((slot.addr + HEAD, HEADER.size),), (), slot)
            sent = True
        while free and self._owing:
            connection = next(iter(self._owing))
            control = connection.next_control()
            if control is None:
                del self._owing[connection]
                continue
            slot = free.pop()
            connection.pack_into(slot.view, HEAD, control[0], 0, control[1])
            queue.add(((slot.addr + HEAD, HEADER.size),), (), slot)
            sent = True
        if sent:
            queue.kick()
        # The device's word for each packet that it took is of no use unless somebody waits for it.
        if not (self._starved or self._resets or self._owing):
            queue.disable_callbacks()
        elif queue.enable_callbacks():
            os.eventfd_write(self._call, 1)
