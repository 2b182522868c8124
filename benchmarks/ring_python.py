# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A device side in plain Python over a memoryview: what one writes without a library.

It checks what a device has to check and is written as one would write it, for readers first; it
is the yardstick of the benchmark, used nowhere else.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable

NEXT, WRITE, INDIRECT = 1, 2, 4
AVAIL, USED = 1 << 7, 1 << 15
EVENT_DESC = 2

DESC = struct.Struct("<QIHH")
U16 = struct.Struct("<H")
U32_PAIR = struct.Struct("<II")
U16_PAIR = struct.Struct("<HH")

View = memoryview
# Reads header, data and status of a chain; gives the bytes written.
Handler = Callable[[list[View], list[View]], int]


class BadRing(Exception):
    pass


class Memory:
    def __init__(self, regions: list[tuple[int, View]]) -> None:
        self.regions = sorted(regions, key=lambda region: region[0])
        self.starts = [start for start, _ in self.regions]

    def view(self, addr: int, length: int) -> View:
        index = bisect_right(self.starts, addr) - 1
        if index < 0:
            raise BadRing(f"address {addr:#x} is below guest memory")
        start, view = self.regions[index]
        offset = addr - start
        if offset + length > len(view):
            raise BadRing(f"address {addr:#x} + {length} is outside guest memory")
        return view[offset : offset + length]


def need_event(event: int, new: int, old: int) -> bool:
    return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF


class SplitRing:
    def __init__(self, memory: Memory, num: int, desc: View, avail: View, used: View) -> None:
        self.memory, self.num = memory, num
        self.desc, self.avail, self.used = desc, avail, used
        self.last_avail = self.used_idx = 0

    def walk(self, head: int) -> tuple[list[View], list[View]]:
        readable: list[View] = []
        writable: list[View] = []
        index = head
        for _ in range(self.num):
            if index >= self.num:
                raise BadRing(f"descriptor {index} of {self.num}")
            addr, length, flags, following = DESC.unpack_from(self.desc, index * 16)
            if flags & INDIRECT:
                raise BadRing("indirect descriptors were not negotiated")
            if not length:
                raise BadRing("empty buffer")
            if flags & WRITE:
                writable.append(self.memory.view(addr, length))
            elif writable:
                raise BadRing("device-readable after device-writable buffer")
            else:
                readable.append(self.memory.view(addr, length))
            if not flags & NEXT:
                return readable, writable
            index = following
        raise BadRing("descriptor loop")

    def serve(self, handle: Handler) -> bool:
        old = self.used_idx
        (avail_idx,) = U16.unpack_from(self.avail, 2)
        if (avail_idx - self.last_avail) & 0xFFFF > self.num:
            raise BadRing("the available index ran ahead")
        while self.last_avail != avail_idx:
            (head,) = U16.unpack_from(self.avail, 4 + 2 * (self.last_avail % self.num))
            readable, writable = self.walk(head)
            written = handle(readable, writable)
            U32_PAIR.pack_into(self.used, 4 + 8 * (self.used_idx % self.num), head, written)
            self.last_avail = (self.last_avail + 1) & 0xFFFF
            self.used_idx = (self.used_idx + 1) & 0xFFFF
        U16.pack_into(self.used, 2, self.used_idx)
        (event,) = U16.unpack_from(self.avail, 4 + 2 * self.num)
        return need_event(event, self.used_idx, old)


class PackedRing:
    def __init__(self, memory: Memory, num: int, desc: View, driver: View, device: View) -> None:
        self.memory, self.num = memory, num
        self.desc, self.driver, self.device = desc, driver, device
        self.index, self.wrap = 0, True

    def available(self) -> bool:
        (flags,) = U16.unpack_from(self.desc, self.index * 16 + 14)
        return bool(flags & AVAIL) == self.wrap and bool(flags & USED) != self.wrap

    def walk(self) -> tuple[int, list[View], list[View]]:
        readable: list[View] = []
        writable: list[View] = []
        for _ in range(self.num):
            addr, length, ident, flags = DESC.unpack_from(self.desc, self.index * 16)
            if flags & INDIRECT:
                raise BadRing("indirect descriptors were not negotiated")
            if not length:
                raise BadRing("empty buffer")
            if flags & WRITE:
                writable.append(self.memory.view(addr, length))
            elif writable:
                raise BadRing("device-readable after device-writable buffer")
            else:
                readable.append(self.memory.view(addr, length))
            self.index += 1
            if self.index == self.num:
                self.index, self.wrap = 0, not self.wrap
            if not flags & NEXT:
                if ident >= self.num:
                    raise BadRing(f"buffer id {ident} of {self.num}")
                return ident, readable, writable
            if not self.available():
                raise BadRing("the chain is not complete")
        raise BadRing("chain longer than the ring")

    def serve(self, handle: Handler) -> bool:
        old = self.index
        while self.available():
            index, wrap = self.index, self.wrap
            ident, readable, writable = self.walk()
            written = handle(readable, writable)
            at = index * 16
            U32_PAIR.pack_into(self.desc, at + 8, written, ident | (0 if not wrap else (AVAIL | USED) << 16))
        event, mode = U16_PAIR.unpack_from(self.driver, 0)
        if mode != EVENT_DESC:
            return bool(mode == 0)
        offset = event & 0x7FFF
        if bool(event >> 15) != self.wrap:
            offset -= self.num
        if old > self.index:
            old -= self.num
        return need_event(offset, self.index, old)
