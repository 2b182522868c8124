# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A ring in guest memory for tests: the areas, room for buffers, and both sides of ours or of the model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import model
from vhost.memory import GuestMemory, Region
from vhost.virtqueue import DeviceQueue, DriverQueue

BASE = 0x10_0000  # guest address of the first region
USER = 0x7F00_0000_0000  # user address of it

DEVICE_FEATURES = ("indirect", "event_idx", "in_order", "big_endian")


class Rig:
    """Guest memory whose first bytes are a ring, whose last are free for buffers and indirect tables."""

    def __init__(
        self, num: int = 16, *, packed: bool = False, sizes: Sequence[int] = (1 << 18,), **features: bool
    ) -> None:
        regions = []
        at = BASE
        for size in sizes:
            regions.append(Region.allocate(size, guest_addr=at, user_addr=at - BASE + USER))
            at += size
        self.memory = GuestMemory(regions)
        order = ">" if features.get("big_endian") else "<"
        self.ram = model.Ram([(r.guest_addr, memoryview(r)) for r in regions], order)
        self.num, self.packed, self.features = num, packed, features
        self.areas, end = model.areas_at(BASE, num, packed)
        self.data = (end + 0xFFF) // 0x1000 * 0x1000  # guest address of the free part
        self.end = at

    def device(self, **more: Any) -> DeviceQueue:
        features = {k: v for k, v in self.features.items() if k in DEVICE_FEATURES}
        return DeviceQueue(
            self.memory,
            self.num,
            self.areas.desc,
            self.areas.avail,
            self.areas.used,
            **{"packed": self.packed, **features, **more},
        )

    def driver(self, **more: Any) -> DriverQueue:
        features = {k: v for k, v in self.features.items() if k in ("event_idx", "in_order")}
        return DriverQueue(
            self.memory,
            self.num,
            desc=self.areas.desc,
            avail=self.areas.avail,
            used=self.areas.used,
            **{"packed": self.packed, **features, **more},
        )

    def model_driver(self, start: Any = None) -> model.SplitDriver | model.PackedDriver:
        features = {k: v for k, v in self.features.items() if k in ("event_idx", "in_order")}
        if self.packed:
            return model.PackedDriver(self.ram, self.num, self.areas, start=start or (0, True), **features)
        return model.SplitDriver(self.ram, self.num, self.areas, start=start or 0, **features)

    def model_device(self, start: Any = None) -> model.SplitDevice | model.PackedDevice:
        features = {k: v for k, v in self.features.items() if k == "event_idx"}
        if self.packed:
            return model.PackedDevice(self.ram, self.num, self.areas, start=start or (0, True), **features)
        return model.SplitDevice(self.ram, self.num, self.areas, start=start or 0, **features)

    def start(self, index: int) -> tuple[Any, int]:
        """Where a ring is after ``index`` slots (of chains of one): for the model, and as a base."""
        if not self.packed:
            return index % 65536, index % 65536
        slot, wrap = index % self.num, index // self.num % 2 == 0
        half = slot | wrap << 15
        return (slot, wrap), half | half << 16


@contextmanager
def eventfds(count: int) -> Iterator[list[int]]:
    fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(count)]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


@contextmanager
def error_event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def signals(fd: int) -> int:
    """How often the eventfd was signalled since the last look."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0
