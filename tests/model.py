# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Virtqueues in plain Python, as VIRTIO 1.2, chapters 2.7 and 2.8 describe them: both sides, both formats.

Slow, small and independent: it shares no code with what it is compared to, trusts the other side, and
says everything the long way (positions are counted one by one instead of with modular tricks).
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

NEXT, WRITE, INDIRECT = 1, 2, 4
AVAIL, USED = 1 << 7, 1 << 15
EVENTS_ENABLE, EVENTS_DISABLE, EVENTS_DESC = 0, 1, 2

Buf = tuple[int, int]  # guest address, length


class Ram:
    """Guest memory as whoever has the bytes sees it: pieces of it at guest addresses. ``order``: of the
    guest's numbers, ">" for a legacy driver on a big-endian machine (2.7.3)."""

    def __init__(self, pieces: Sequence[tuple[int, memoryview]], order: str = "<") -> None:
        self.pieces, self.order = pieces, order

    def _bytes(self, addr: int, size: int) -> Iterator[tuple[memoryview, int]]:
        """Each single piece of [addr, addr + size), and how far into the range it begins."""
        done = 0
        while done < size:
            at = addr + done
            for start, view in self.pieces:
                if start <= at < start + len(view):
                    part = view[at - start : at - start + size - done]
                    break
            else:
                raise AssertionError(f"the test itself uses {at:#x}, which is no memory")
            yield part, done
            done += len(part)

    def read(self, addr: int, size: int) -> bytes:
        return b"".join(bytes(part) for part, _ in self._bytes(addr, size))

    def write(self, addr: int, data: bytes) -> None:
        for part, done in self._bytes(addr, len(data)):
            part[:] = data[done : done + len(part)]

    def get(self, layout: str, addr: int) -> tuple[int, ...]:
        return struct.unpack(self.order + layout, self.read(addr, struct.calcsize("<" + layout)))

    def put(self, layout: str, addr: int, *values: int) -> None:
        self.write(addr, struct.pack(self.order + layout, *values))


@dataclass(frozen=True)
class Areas:
    """Guest addresses of a ring's three areas. Packed: the event suppression structures (2.8.10)."""

    desc: int
    avail: int
    used: int


def areas_at(addr: int, num: int, packed: bool) -> tuple[Areas, int]:
    """Areas placed one behind the other from ``addr`` on, and where they end."""
    if packed:
        return Areas(addr, addr + 16 * num, addr + 16 * num + 4), addr + 16 * num + 8
    avail = addr + 16 * num
    used = (avail + 6 + 2 * num + 3) // 4 * 4
    return Areas(addr, avail, used), used + 6 + 8 * num


@dataclass
class Request:
    """A chain that a device took."""

    id: int
    readable: list[Buf] = field(default_factory=list)
    writable: list[Buf] = field(default_factory=list)
    slots: int = 1

    def append(self, flags: int, buf: Buf) -> None:
        if flags & WRITE:
            self.writable.append(buf)
        else:
            assert not self.writable, "readable after writable"
            self.readable.append(buf)


@dataclass
class Owned:
    """A chain that a driver made available."""

    descriptors: list[int]
    in_len: int


def flagged(readable: Sequence[Buf], writable: Sequence[Buf]) -> list[tuple[int, int, int]]:
    return [(a, n, 0) for a, n in readable] + [(a, n, WRITE) for a, n in writable]


# ---------------------------------------------------------------------- split (2.7)


class SplitRing:
    def __init__(self, ram: Ram, num: int, areas: Areas, *, event_idx: bool = False) -> None:
        self.ram, self.num, self.areas, self.event_idx = ram, num, areas, event_idx

    def avail_idx_addr(self) -> int:
        return self.areas.avail + 2

    def used_idx_addr(self) -> int:
        return self.areas.used + 2

    def avail_slot(self, index: int) -> int:
        return self.areas.avail + 4 + index % self.num * 2

    def used_slot(self, index: int) -> int:
        return self.areas.used + 4 + index % self.num * 8

    def used_event_addr(self) -> int:
        return self.areas.avail + 4 + self.num * 2

    def avail_event_addr(self) -> int:
        return self.areas.used + 4 + self.num * 8

    @staticmethod
    def asked(event: int, old: int, new: int) -> bool:
        """2.7.7.2: is ``event`` one of the indices that went by?"""
        passed = []
        while old != new:
            passed.append(old)
            old = (old + 1) % 65536
        return event in passed


class SplitDriver(SplitRing):
    def __init__(
        self,
        ram: Ram,
        num: int,
        areas: Areas,
        *,
        event_idx: bool = False,
        in_order: bool = False,
        start: int = 0,
    ) -> None:
        super().__init__(ram, num, areas, event_idx=event_idx)
        self.in_order = in_order
        ram.write(areas.desc, bytes(16 * num))
        ram.put("HH", areas.avail, 0, start)
        ram.put("HH", areas.used, 0, start)
        ram.put("H", self.used_event_addr(), start)
        ram.put("H", self.avail_event_addr(), start)
        self.avail = self.used = self.asked_at = start
        self.free = deque(range(num))
        self.out: dict[int, Owned] = {}  # by head, the oldest first

    @property
    def room(self) -> int:
        return len(self.free)

    def add(self, readable: Sequence[Buf], writable: Sequence[Buf], table: int | None = None) -> int:
        """One chain; ``table``: guest address for an indirect descriptor table."""
        parts = flagged(readable, writable)
        if table is None:
            ids = [self.free.popleft() for _ in parts]
            self._link(self.areas.desc, ids, parts)
        else:
            ids = [self.free.popleft()]
            self._link(table, list(range(len(parts))), parts)
            self.ram.put("QIHH", self.areas.desc + 16 * ids[0], table, 16 * len(parts), INDIRECT, 0)
        self.out[ids[0]] = Owned(ids, sum(n for _, n in writable))
        self.ram.put("H", self.avail_slot(self.avail), ids[0])
        self.avail = (self.avail + 1) % 65536
        self.ram.put("H", self.avail_idx_addr(), self.avail)
        return ids[0]

    def _link(self, table: int, ids: list[int], parts: list[tuple[int, int, int]]) -> None:
        for i, (addr, length, flags) in enumerate(parts):
            last = i == len(parts) - 1
            self.ram.put(
                "QIHH",
                table + 16 * ids[i],
                addr,
                length,
                flags | (0 if last else NEXT),
                0 if last else ids[i + 1],
            )

    def need_kick(self) -> bool:
        old, self.asked_at = self.asked_at, self.avail
        if self.event_idx:
            return self.asked(self.ram.get("H", self.avail_event_addr())[0], old, self.avail)
        return old != self.avail and not self.ram.get("H", self.areas.used)[0] & 1

    def get_used(self) -> list[tuple[int, int]]:
        """(head, length) of all that came back; the oldest chains of an in-order batch have no length
        of their own and are counted as full (2.7.9)."""
        done = []
        idx = self.ram.get("H", self.used_idx_addr())[0]
        while self.used != idx:
            head, length = self.ram.get("II", self.used_slot(self.used))
            assert head in self.out, f"chain {head} came back, but is not out"
            while self.in_order and (oldest := next(iter(self.out))) != head:
                done.append((oldest, self.out[oldest].in_len))
                self._take_back(oldest)
                assert self.used != idx, "batch is longer than the index says"
            assert length <= self.out[head].in_len
            done.append((head, length))
            self._take_back(head)
        return done

    def _take_back(self, head: int) -> None:
        self.free.extend(self.out.pop(head).descriptors)
        self.used = (self.used + 1) % 65536

    def suppress_calls(self) -> None:
        if not self.event_idx:
            self.ram.put("H", self.areas.avail, 1)

    def want_call(self, after: int = 0) -> None:
        """Call when ``after`` more than the next chain were used; without event_idx for each."""
        if self.event_idx:
            self.ram.put("H", self.used_event_addr(), (self.used + after) % 65536)
        else:
            self.ram.put("H", self.areas.avail, 0)


class SplitDevice(SplitRing):
    def __init__(self, ram: Ram, num: int, areas: Areas, *, event_idx: bool = False, start: int = 0) -> None:
        super().__init__(ram, num, areas, event_idx=event_idx)
        self.avail = self.used = self.asked_at = start

    def pop(self) -> Request | None:
        if self.avail == self.ram.get("H", self.avail_idx_addr())[0]:
            return None
        head = at = self.ram.get("H", self.avail_slot(self.avail))[0]
        self.avail = (self.avail + 1) % 65536
        request = Request(head)
        table, size = self.areas.desc, self.num
        while True:
            assert at < size
            addr, length, flags, following = self.ram.get("QIHH", table + 16 * at)
            if flags & INDIRECT:
                assert flags == INDIRECT and table == self.areas.desc and length % 16 == 0 and length
                table, size, at = addr, length // 16, 0
                continue
            request.append(flags, (addr, length))
            if not flags & NEXT:
                return request
            at = following

    def push(self, request: Request, written: int) -> None:
        self.ram.put("II", self.used_slot(self.used), request.id, written)
        self.used = (self.used + 1) % 65536
        self.ram.put("H", self.used_idx_addr(), self.used)

    def push_in_order(self, requests: Sequence[Request], written: int) -> None:
        """2.7.9: one element for all of them, with the last one's id and length."""
        self.ram.put("II", self.used_slot(self.used), requests[-1].id, written)
        self.used = (self.used + len(requests)) % 65536
        self.ram.put("H", self.used_idx_addr(), self.used)

    def need_call(self) -> bool:
        old, self.asked_at = self.asked_at, self.used
        if self.event_idx:
            return self.asked(self.ram.get("H", self.used_event_addr())[0], old, self.used)
        return old != self.used and not self.ram.get("H", self.areas.avail)[0] & 1

    def suppress_kicks(self) -> None:
        if not self.event_idx:
            self.ram.put("H", self.areas.used, 1)

    def want_kick(self) -> None:
        if self.event_idx:
            self.ram.put("H", self.avail_event_addr(), self.avail)
        else:
            self.ram.put("H", self.areas.used, 0)


# ---------------------------------------------------------------------- packed (2.8)

Position = tuple[int, bool]  # slot, wrap counter


class PackedRing:
    def __init__(self, ram: Ram, num: int, areas: Areas, *, event_idx: bool = False) -> None:
        self.ram, self.num, self.areas, self.event_idx = ram, num, areas, event_idx

    def slot(self, position: Position) -> int:
        return self.areas.desc + 16 * position[0]

    def step(self, position: Position, count: int = 1) -> Position:
        slot, wrap = position
        for _ in range(count):
            slot += 1
            if slot == self.num:
                slot, wrap = 0, not wrap
        return slot, wrap

    def asked(self, area: int, old: Position, new: Position) -> bool:
        """2.8.10: what the event structure at ``area`` says about the slots that went by."""
        off_wrap, flags = self.ram.get("HH", area)
        if flags == EVENTS_DESC:
            passed = []
            while old != new:
                passed.append(old)
                old = self.step(old)
            return (off_wrap & 0x7FFF, bool(off_wrap >> 15)) in passed
        return old != new and flags == EVENTS_ENABLE

    def ask(self, area: int, position: Position) -> None:
        if self.event_idx:
            self.ram.put("H", area, position[0] | position[1] << 15)
        self.ram.put("H", area + 2, EVENTS_DESC if self.event_idx else EVENTS_ENABLE)

    @staticmethod
    def marks(wrap: bool, used: bool) -> int:
        """2.8.1: AVAIL is the wrap counter; USED its inverse while available, the same when used."""
        return (AVAIL if wrap else 0) | (USED if wrap == used else 0)


class PackedDriver(PackedRing):
    def __init__(
        self,
        ram: Ram,
        num: int,
        areas: Areas,
        *,
        event_idx: bool = False,
        in_order: bool = False,
        start: Position = (0, True),
    ) -> None:
        super().__init__(ram, num, areas, event_idx=event_idx)
        self.in_order = in_order
        # As a ring looks that has come to `start`: everything before it used in this lap, everything
        # from it on in the one before.
        for i in range(num):
            wrap = start[1] if i < start[0] else not start[1]
            ram.put("QIHH", areas.desc + 16 * i, 0, 0, 0, self.marks(wrap, used=True))
        ram.put("HH", areas.avail, 0, 0)
        ram.put("HH", areas.used, 0, 0)
        self.avail = self.used = self.asked_at = start
        self.room = num
        self.ids = deque(range(num))
        self.out: dict[int, Owned] = {}

    def add(self, readable: Sequence[Buf], writable: Sequence[Buf], table: int | None = None) -> int:
        parts = flagged(readable, writable)
        buffer_id = self.ids.popleft()
        if table is not None:
            for i, (addr, length, flags) in enumerate(parts):
                self.ram.put("QIHH", table + 16 * i, addr, length, 0, flags)  # 2.8.19: only WRITE counts
            parts = [(table, 16 * len(parts), INDIRECT)]
        first = self.avail
        for i, (addr, length, flags) in enumerate(parts):
            flags |= self.marks(self.avail[1], used=False) | (NEXT if i < len(parts) - 1 else 0)
            if i:
                self.ram.put("QIHH", self.slot(self.avail), addr, length, buffer_id, flags)
            else:
                head = (addr, length, buffer_id, flags)
            self.avail = self.step(self.avail)
        self.ram.put("QIHH", self.slot(first), *head)  # 2.8.6: the first one last
        self.room -= len(parts)
        self.out[buffer_id] = Owned([0] * len(parts), sum(n for _, n in writable))
        return buffer_id

    def need_kick(self) -> bool:
        old, self.asked_at = self.asked_at, self.avail
        return self.asked(self.areas.used, old, self.avail)

    def get_used(self) -> list[tuple[int, int]]:
        done = []
        while True:
            _, length, buffer_id, flags = self.ram.get("QIHH", self.slot(self.used))
            if flags & (AVAIL | USED) != self.marks(self.used[1], used=True) or not self.out:
                return done
            assert buffer_id in self.out, f"buffer {buffer_id} came back, but is not out"
            while self.in_order and (oldest := next(iter(self.out))) != buffer_id:
                done.append((oldest, self.out[oldest].in_len))
                self._take_back(oldest)
            # 2.8.4: for a chain that the device did not write to, length means nothing.
            done.append((buffer_id, length if flags & WRITE else 0))
            assert done[-1][1] <= self.out[buffer_id].in_len
            self._take_back(buffer_id)

    def _take_back(self, buffer_id: int) -> None:
        slots = len(self.out.pop(buffer_id).descriptors)
        self.used = self.step(self.used, slots)
        self.room += slots
        self.ids.append(buffer_id)

    def suppress_calls(self) -> None:
        self.ram.put("H", self.areas.avail + 2, EVENTS_DISABLE)

    def want_call(self, after: int = 0) -> None:
        self.ask(self.areas.avail, self.step(self.used, after))


class PackedDevice(PackedRing):
    def __init__(
        self, ram: Ram, num: int, areas: Areas, *, event_idx: bool = False, start: Position = (0, True)
    ) -> None:
        super().__init__(ram, num, areas, event_idx=event_idx)
        self.avail = self.used = self.asked_at = start

    def pop(self) -> Request | None:
        if self.ram.get("QIHH", self.slot(self.avail))[3] & (AVAIL | USED) != self.marks(
            self.avail[1], used=False
        ):
            return None
        request = Request(-1, slots=0)
        while True:
            addr, length, buffer_id, flags = self.ram.get("QIHH", self.slot(self.avail))
            assert flags & (AVAIL | USED) == self.marks(self.avail[1], used=False)
            self.avail = self.step(self.avail)
            request.slots += 1
            if flags & INDIRECT:
                assert not flags & (NEXT | WRITE) and length % 16 == 0 and length
                for i in range(length // 16):
                    entry = self.ram.get("QIHH", addr + 16 * i)
                    request.append(entry[3], entry[:2])
            else:
                request.append(flags, (addr, length))
            if not flags & NEXT:
                request.id = buffer_id  # 2.8.6: the last descriptor has it
                return request

    def push(self, request: Request, written: int) -> None:
        self._put_used(request, written)
        self.used = self.step(self.used, request.slots)

    def push_in_order(self, requests: Sequence[Request], written: int) -> None:
        self._put_used(requests[-1], written)
        self.used = self.step(self.used, sum(request.slots for request in requests))

    def _put_used(self, request: Request, written: int) -> None:
        flags = self.marks(self.used[1], used=True) | (WRITE if request.writable else 0)
        # Address and length of a used descriptor's buffer mean nothing (2.8.4): make that seen.
        self.ram.put("QIHH", self.slot(self.used), 0xDEADBEEF, written, request.id, flags)

    def need_call(self) -> bool:
        old, self.asked_at = self.asked_at, self.used
        return self.asked(self.areas.avail, old, self.used)

    def suppress_kicks(self) -> None:
        self.ram.put("H", self.areas.used + 2, EVENTS_DISABLE)

    def want_kick(self) -> None:
        self.ask(self.areas.used, self.avail)
