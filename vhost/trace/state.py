# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What an onlooker knows of a session: what was negotiated, the memory table, the rings.

Both channels of a session share it. Kicks are out of sight, so a ring counts as started once it has a
kick descriptor (or is polled), until it is stopped. Judges nothing, and holds no more than a session
may have, whatever is sent.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vhost.features import ProtocolF, VhostF, VirtioF
from vhost.user.payloads import Inflight, MemoryRegion, MMap, VringAddr

MAX_RINGS = 1024
"""Rings that are remembered; more has no device."""
MAX_REGIONS = 1024
MAX_MAPS = 1024


@dataclass(slots=True)
class RingSeen:
    """One ring. None: never told."""

    num: int | None = None
    addr: VringAddr | None = None
    enabled: bool | None = None
    started: bool = False


@dataclass(slots=True)
class SessionSeen:
    """One session. None: never asked or told."""

    offered: int | None = None
    features: int | None = None
    offered_protocol: int | None = None
    protocol: int | None = None
    owned: bool = False
    owner_missed: bool = False
    queue_num: int | None = None
    max_slots: int | None = None
    regions: list[MemoryRegion] | None = None
    rings: dict[int, RingSeen] = field(default_factory=dict)
    ever_started: bool = False
    log_bytes: int | None = None
    inflight: Inflight | None = None
    advised: bool = False
    postcopy: bool = False
    table_answers: int = 0
    """Postcopy: tables whose addresses the back-end told, and that the front-end has to confirm."""
    transferring: bool = False
    shmem: tuple[int, ...] | None = None
    gpu: int = 0
    """Features of the GPU protocol."""
    maps: list[MMap] = field(default_factory=list)

    def has(self, feature: VirtioF | VhostF) -> bool:
        return bool((self.features or 0) & int(feature))

    def has_protocol(self, feature: ProtocolF) -> bool:
        return bool((self.protocol or 0) & int(feature))

    def ring(self, index: int) -> RingSeen:
        """The ring of that index; one that is soon forgotten if there cannot be such a ring."""
        if index >= MAX_RINGS:
            return RingSeen()
        return self.rings.setdefault(index, RingSeen())

    @property
    def running(self) -> bool:
        return any(ring.started for ring in self.rings.values())

    def stop_all(self) -> None:
        for ring in self.rings.values():
            ring.started = False

    def covers(self, address: int, size: int) -> bool:
        """Whether one region, or regions that follow each other, hold this range of user addresses."""
        end = address + size
        for region in sorted(self.regions or (), key=lambda region: region.user_addr):
            if region.user_addr <= address < region.user_addr + region.size:
                address = region.user_addr + region.size
                if address >= end:
                    return True
        return False
