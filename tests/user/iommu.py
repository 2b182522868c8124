# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A front-end that is an IOMMU, by hand: it maps what it is told to, and shows what it is asked."""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from user import hostile as h
from user.hostile import RawFrontend

IOTLB_MSG, BACKEND_IOTLB_MSG = 22, 1
MISS, UPDATE, INVALIDATE, ACCESS_FAIL = 1, 2, 3, 4
RO, WO, RW = 1, 2, 3
ACCESS_PLATFORM = 1 << 33

IOVA = 0xABC_0000_0000
"""Of the first byte of memory; nothing else has this address."""
PAGE = 0x1000
AVAIL, USED, DATA = IOVA + PAGE, IOVA + 2 * PAGE, IOVA + 4 * PAGE
RING = ((IOVA, RO), (AVAIL, RO), (USED, RW))
"""What a split ring lacks of itself when nothing is mapped, in the order in which it is asked for."""


class Asked(NamedTuple):
    kind: int
    iova: int
    access: int


class Iommu(RawFrontend):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.channel, self._theirs = socket.socketpair()
        self.channel.settimeout(20)
        self.map = mmap.mmap(self.memfd, h.SIZE)
        self.idx = 0

    def close(self) -> None:
        self.map.close()
        self.channel.close()
        self._theirs.close()
        super().close()

    # -- the session -------------------------------------------------------------------------------

    def negotiate(
        self,
        features: int = ACCESS_PLATFORM,
        *,
        without: int = h.GPA_ADDRESSES,
        channel: bool = True,
    ) -> None:
        assert self.ask(h.GET_FEATURES).u64 & ACCESS_PLATFORM
        protocol = self.ask(h.GET_PROTOCOL_FEATURES).u64
        self.send(h.SET_PROTOCOL_FEATURES, h.u64(protocol & ~without))
        assert self.status(h.SET_OWNER) == 0
        if channel:
            self.give_channel()
        assert self.status(h.SET_FEATURES, h.u64(h.VERSION_1 | h.PROTOCOL_FEATURES | features)) == 0

    def give_channel(self) -> None:
        assert self.status(h.SET_BACKEND_REQ_FD, b"", [self._theirs.fileno()]) == 0
        self._theirs.close()

    def set_ring(self, index: int = 0) -> None:
        assert self.status(h.SET_VRING_NUM, h.state(index, h.NUM)) == 0
        assert self.status(h.SET_VRING_BASE, h.state(index, self.idx)) == 0
        assert self.status(h.SET_VRING_ADDR, h.address(index, IOVA, AVAIL, USED)) == 0
        assert self.status(h.SET_VRING_CALL, h.u64(index), [self.call]) == 0
        assert self.status(h.SET_VRING_ERR, h.u64(index), [self.err]) == 0

    def started(self) -> None:
        """With a ring that is mapped, and no buffer."""
        self.start()
        for _ in RING:
            self.serve_miss()

    # -- the IOTLB ---------------------------------------------------------------------------------

    def iotlb(self, kind: int, iova: int, size: int, user: int = 0, access: int = 0) -> int:
        return self.ask(IOTLB_MSG, struct.pack("=QQQBB6x", iova, size, user, access, kind)).u64

    def update(self, iova: int, size: int = PAGE, access: int = RW, user: int | None = None) -> int:
        return self.iotlb(UPDATE, iova, size, iova - IOVA + h.USER if user is None else user, access)

    def invalidate(self, iova: int = 0, size: int = 0) -> int:
        return self.iotlb(INVALIDATE, iova, size)

    def asked(self) -> Asked:
        """The next request on the channel. It wants an answer, which is not given yet."""
        data = self._channel_bytes(12)
        number, flags, size = h.HEADER.unpack(data)
        assert (number, size) == (BACKEND_IOTLB_MSG, 32)
        iova, length, user, access, kind = struct.unpack("=QQQBB6x", self._channel_bytes(size))
        assert not length
        assert not user
        assert bool(flags & h.NEED_REPLY) == (kind == MISS)
        return Asked(kind, iova, access)

    def answer(self, status: int = 0) -> None:
        self.channel.sendall(h.HEADER.pack(BACKEND_IOTLB_MSG, h.VERSION | h.REPLY, 8) + h.u64(status))

    def serve_miss(self, access: int | None = None) -> Asked:
        """Map the page that is missed."""
        asked = self.asked()
        assert asked.kind == MISS
        assert self.update(asked.iova & -PAGE, access=asked.access if access is None else access) == 0
        self.answer()
        return asked

    def asks_nothing(self) -> bool:
        """Now that it has dealt with all that it was sent."""
        for _ in range(2):
            self.ask(h.GET_FEATURES)
        return not select.select([self.channel], [], [], 0)[0]

    def _channel_bytes(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.channel.recv(size - len(data))
            assert part, "the back-end closed the channel"
            data += part
        return data

    # -- the driver --------------------------------------------------------------------------------

    def offer(self, *addresses: int, length: int = 64) -> None:
        """A chain of writable buffers."""
        first = self.idx % h.NUM
        for i, address in enumerate(addresses):
            more = i + 1 < len(addresses)
            slot = (first + i) % h.NUM
            struct.pack_into("<QIHH", self.map, slot * 16, address, length, 2 | more, (slot + 1) % h.NUM)
        struct.pack_into("<H", self.map, AVAIL - IOVA + 4 + self.idx % h.NUM * 2, first)
        self.idx += 1
        struct.pack_into("<H", self.map, AVAIL - IOVA + 2, self.idx & 0xFFFF)
        os.eventfd_write(self.kick, 1)

    @property
    def used(self) -> int:
        return int(struct.unpack_from("<H", self.map, USED - IOVA + 2)[0])

    def wait_used(self, count: int) -> None:
        deadline = time.monotonic() + 20
        while self.used < count:
            ready, _, _ = select.select([self.call], [], [], deadline - time.monotonic())
            assert ready, f"{self.used} of {count} chains came back"
            os.eventfd_read(self.call)

    def broken(self) -> bool:
        """Now that it has dealt with all that it was sent."""
        self.asks_nothing()
        return bool(select.select([self.err], [], [], 0)[0])

    def wait_err(self) -> None:
        assert select.select([self.err], [], [], 20)[0], "the ring did not break"


@contextmanager
def iommu_of(path: Path) -> Iterator[Iommu]:
    iommu = Iommu(path)
    try:
        yield iommu
    finally:
        iommu.close()
