# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A virtio-blk driver in user space (VIRTIO 1.2, 5.2), on any VhostOps.

Synchronous calls, and ``submit_*`` with ``poll`` for many requests at a time. Data is copied through
the memory that the driver shares.
"""

from __future__ import annotations

import contextlib
import errno
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

from vhost.driver_queue import DriverQueue
from vhost.drivers.base import Driver
from vhost.errors import InvalidQueue, ReplyTimeout, VhostError
from vhost.features import BlkF
from vhost.ops import VhostOps
from vhost.virtio_blk import HEADER, ID_BYTES, RANGE, RANGE_UNMAP, SECTOR, BlkConfig, BlkStatus, BlkType

_HEAD_ROOM = 64
"""Header and status of a request, on a cache line of their own, before its data."""
_STATUS = 32
_OK = int(BlkStatus.OK)
KICK_EVERY = 8
"""Requests that are submitted behind others share a kick with as many."""
_CONFIG_SIZES = (60, 36, 24, 8)
"""What to ask for, from all fields to the capacity alone: a back-end may refuse more than it has."""


class BlkError(VhostError, OSError):
    """The device failed a request; ``status`` says how (5.2.6)."""

    def __init__(self, request: BlkType, sector: int, count: int, status: int) -> None:
        known = {int(BlkStatus.IOERR): "IOERR", int(BlkStatus.UNSUPP): "UNSUPP"}
        name = known.get(status, f"unknown status {status:#x}")
        number = errno.EOPNOTSUPP if status == BlkStatus.UNSUPP else errno.EIO
        OSError.__init__(self, number, f"{request.name} of {count} sectors at {sector}: {name}")
        self.request = request
        self.sector = sector
        self.count = count
        self.status = status


class Completion(NamedTuple):
    """A request that is done."""

    token: Any
    data: bytes | None
    """What was read; None for requests that read nothing, and for those that failed."""
    error: BlkError | None


@dataclass(slots=True, eq=False)
class _Slot:
    """A request's place in shared memory."""

    addr: int
    view: memoryview
    type: BlkType = BlkType.IN
    sector: int = 0
    count: int = 0
    sent: int = -1
    room: int = -1
    readable: tuple[tuple[int, int], ...] = ()
    writable: tuple[tuple[int, int], ...] = ()
    token: Any = None

    def lay_out(self, sent: int, room: int) -> None:
        """The request's buffers, for so many bytes of data in either direction. Most requests are of the
        same size as the one before, so these are kept."""
        self.sent, self.room = sent, room
        self.readable, self.writable = ((self.addr, HEADER.size),), ((self.addr + _STATUS, 1),)
        if sent:
            self.readable += ((self.addr + _HEAD_ROOM, sent),)
        if room:
            self.writable = ((self.addr + _HEAD_ROOM, room), *self.writable)


class Blk(Driver):
    """``depth`` requests of up to ``max_transfer`` bytes can be in flight on each queue; ``timeout``
    seconds (None: for ever) is what the synchronous calls wait for one."""

    features = int(
        BlkF.SEG_MAX
        | BlkF.RO
        | BlkF.BLK_SIZE
        | BlkF.FLUSH
        | BlkF.TOPOLOGY
        | BlkF.MQ
        | BlkF.DISCARD
        | BlkF.WRITE_ZEROES
    )
    names = BlkF
    tracks = True

    def __init__(
        self,
        ops: VhostOps,
        *,
        packed: bool | None = None,
        num_queues: int = 1,
        queue_size: int = 128,
        depth: int = 32,
        max_transfer: int = 128 << 10,
        timeout: float | None = 30.0,
        without: int | None = None,
    ) -> None:
        if max_transfer < SECTOR or max_transfer % SECTOR:
            raise ValueError(f"max_transfer {max_transfer}, must be a multiple of {SECTOR}")
        self.timeout = timeout
        self.depth = depth
        self._slot_size = -(-(_HEAD_ROOM + max_transfer) // 4096) * 4096
        kwargs = {} if without is None else {"without": without}
        super().__init__(
            ops,
            packed=packed,
            num_queues=num_queues,
            queue_size=queue_size,
            data_size=num_queues * depth * self._slot_size,
            **kwargs,
        )
        self.max_transfer = max_transfer
        self._free: list[list[_Slot]] = []
        # As a set that keeps the order in which they were submitted.
        self._flying: list[dict[_Slot, None]] = [{} for _ in range(num_queues)]
        self._unkicked = [0] * num_queues
        for index in range(num_queues):
            first = self.data_addr + index * depth * self._slot_size
            addrs = range(first, first + depth * self._slot_size, self._slot_size)
            self._free.append([_Slot(addr, self.memory.view(addr, self._slot_size)) for addr in addrs])
        self.config = self.read_config()

    # -- what the device is ------------------------------------------------------------------------

    def read_config(self) -> BlkConfig:
        """The configuration space as it is now; also kept in ``config``."""
        for size in _CONFIG_SIZES[:-1]:
            with contextlib.suppress(VhostError):
                self.config = BlkConfig.unpack(self.ops.get_config(0, size))
                return self.config
        self.config = BlkConfig.unpack(self.ops.get_config(0, _CONFIG_SIZES[-1]))
        return self.config

    @property
    def capacity(self) -> int:
        """Sectors of 512 bytes."""
        return self.config.capacity

    @property
    def block_size(self) -> int:
        return self.config.blk_size if self.negotiated & BlkF.BLK_SIZE else SECTOR

    @property
    def read_only(self) -> bool:
        return bool(self.negotiated & BlkF.RO)

    # -- one request after the other ---------------------------------------------------------------

    def read(self, sector: int, count: int) -> bytes:
        """``count`` sectors from ``sector`` on."""
        step = self.max_transfer // SECTOR
        parts = []
        for start in range(sector, sector + count, step):
            some = min(step, sector + count - start)
            parts.append(self._run(BlkType.IN, start, some, room=some * SECTOR))
        return b"".join(parts)

    def write(self, sector: int, data: bytes | bytearray | memoryview) -> None:
        """Whole sectors from ``sector`` on."""
        view = _sectors(data)
        for start in range(0, len(view), self.max_transfer):
            part = view[start : start + self.max_transfer]
            self._run(BlkType.OUT, sector + start // SECTOR, len(part) // SECTOR, data=part)

    def flush(self) -> None:
        """What was written is on stable storage when this returns; at once if the device says that it
        always is (no FLUSH feature)."""
        if self.negotiated & BlkF.FLUSH:
            self._run(BlkType.FLUSH, 0, 0)

    def discard(self, sector: int, count: int) -> None:
        """These sectors are not needed any more; what they read as from then on is undefined."""
        self._run_ranges(BlkType.DISCARD, sector, count, self.config.max_discard_sectors, 0)

    def write_zeroes(self, sector: int, count: int, *, unmap: bool = False) -> None:
        """Zero sectors; ``unmap`` lets the device free them while it does."""
        flags = RANGE_UNMAP if unmap else 0
        self._run_ranges(BlkType.WRITE_ZEROES, sector, count, self.config.max_write_zeroes_sectors, flags)

    def _run_ranges(self, kind: BlkType, sector: int, count: int, most: int, flags: int) -> None:
        """In segments of what the device takes at most (5.2.6.1), one a request."""
        most = most or count
        for start in range(sector, sector + count, most or 1):
            some = min(most, sector + count - start)
            self._run(kind, start, some, data=RANGE.pack(start, some, flags))

    def get_id(self) -> str:
        """The device's serial number."""
        raw = self._run(BlkType.GET_ID, 0, 0, room=ID_BYTES)
        return raw.split(b"\0", 1)[0].decode(errors="replace")

    def _run(
        self, kind: BlkType, sector: int, count: int, *, data: bytes | memoryview = b"", room: int = 0
    ) -> bytes:
        token = object()
        self._submit(0, kind, sector, count, data, room, token)
        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            for done in self.poll(left):
                if done.token is not token:
                    raise InvalidQueue("a synchronous call while submitted requests are in flight")
                if done.error is not None:
                    raise done.error
                return done.data or b""
            if deadline is not None and time.monotonic() >= deadline:
                what = f"{kind.name} of {count} sectors at {sector}"
                raise ReplyTimeout(f"{what}: no answer in {self.timeout} s")

    # -- many at a time ----------------------------------------------------------------------------

    def submit_read(self, sector: int, count: int, token: Any = None, *, queue: int = 0) -> None:
        """Start a read of up to ``max_transfer`` bytes. BufferError: ``depth`` are in flight.

        The device is told at once if it has nothing else to do, else after a few more, or by ``poll``."""
        self._submit(queue, BlkType.IN, sector, count, b"", count * SECTOR, token)

    def submit_write(
        self, sector: int, data: bytes | bytearray | memoryview, token: Any = None, *, queue: int = 0
    ) -> None:
        """Start a write; the data is copied before this returns."""
        view = _sectors(data)
        self._submit(queue, BlkType.OUT, sector, len(view) // SECTOR, view, 0, token)

    def submit_flush(self, token: Any = None, *, queue: int = 0) -> None:
        self._submit(queue, BlkType.FLUSH, 0, 0, b"", 0, token)

    @property
    def in_flight(self) -> int:
        return sum(len(flying) for flying in self._flying)

    def poll(self, timeout: float | None = 0.0, *, queue: int | None = None) -> list[Completion]:
        """What is done since the last time. Waits up to ``timeout`` seconds (None: for ever) for
        something; with several queues and a timeout, say which ``queue`` to wait for."""
        queues = self.queues if queue is None else [self.queues[queue]]
        for one in queues:
            if self._unkicked[one.index]:
                self._kick(one.index)
        done = [completion for one in queues for completion in self._reap(one)]
        if not done and timeout != 0.0 and queues[0].wait(timeout):
            done = self._reap(queues[0])
        return done

    def _submit(
        self,
        index: int,
        kind: BlkType,
        sector: int,
        count: int,
        data: bytes | memoryview,
        room: int,
        token: Any,
    ) -> None:
        if max(len(data), room) > self.max_transfer:
            raise ValueError(f"{max(len(data), room)} bytes in one request, limit {self.max_transfer}")
        if not self._free[index]:
            raise BufferError(f"{self.depth} requests are in flight on queue {index}")
        slot = self._free[index].pop()
        HEADER.pack_into(slot.view, 0, kind, 0, 0 if kind in _BY_RANGE else sector)
        # A device that answers without writing a status must not be taken for one that did.
        slot.view[_STATUS] = 0xFF
        if data:
            slot.view[_HEAD_ROOM : _HEAD_ROOM + len(data)] = data
        if slot.room != room or slot.sent != len(data):
            slot.lay_out(len(data), room)
        slot.type, slot.sector, slot.count, slot.token = kind, sector, count, token
        try:
            self.queues[index].add(slot.readable, slot.writable, slot)
        except BaseException:
            self._free[index].append(slot)
            raise
        flying = self._flying[index]
        flying[slot] = None
        self._unkicked[index] += 1
        # A kick may cost more than all the rest, so those behind the first share one. They cannot be
        # forgotten: whoever waits for the first one to be done calls poll() then.
        if len(flying) == 1 or self._unkicked[index] >= KICK_EVERY:
            self._kick(index)

    def _kick(self, index: int) -> None:
        self._unkicked[index] = 0
        self.queues[index].kick()

    def _reap(self, queue: DriverQueue) -> list[Completion]:
        done = []
        flying, free = self._flying[queue.index], self._free[queue.index]
        for slot, written in queue.get_used_batch(self.depth):
            del flying[slot]
            room = slot.room
            status = slot.view[_STATUS]
            data, error = None, None
            if status != _OK:
                error = BlkError(slot.type, slot.sector, slot.count, status)
            elif 1 < written < room and slot.type == BlkType.IN:
                # Some devices count no bytes at all; one that counts fewer than it was asked for lies.
                error = BlkError(slot.type, slot.sector, slot.count, BlkStatus.IOERR)
            elif room:
                data = bytes(slot.view[_HEAD_ROOM : _HEAD_ROOM + room])
            done.append(Completion(slot.token, data, error))
            slot.token = None
            free.append(slot)
        return done

    def restart(self, ops: VhostOps) -> bool:
        """Go on with another session after the back-end died. If both sessions can track what is in flight,
        the new back-end goes on with it. If not, all that was not answered is submitted again, in its order,
        and what the dead one did of it may be done twice."""
        resumed = super().restart(ops)
        if resumed:
            self._unkicked = [0] * self.num_queues
        else:
            self._submit_again()
        self.read_config()
        return resumed

    def _submit_again(self) -> None:
        for queue, flying in zip(self.queues, self._flying, strict=True):
            for slot in flying:
                slot.view[_STATUS] = 0xFF
                queue.add(slot.readable, slot.writable, slot)
            if flying:
                self._kick(queue.index)


_BY_RANGE = (BlkType.DISCARD, BlkType.WRITE_ZEROES, BlkType.FLUSH, BlkType.GET_ID)


def _sectors(data: bytes | bytearray | memoryview) -> memoryview:
    view = memoryview(data).cast("B")
    if not len(view) or len(view) % SECTOR:
        raise ValueError(f"{len(view)} bytes, must be a multiple of {SECTOR}")
    return view


__all__ = ["Blk", "BlkConfig", "BlkError", "Completion"]
