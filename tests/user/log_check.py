# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A disk that is read while its back-end logs: are the pages that it wrote in the log, and no others?"""

from __future__ import annotations

from vhost.dirty_log import PAGE, DirtyLog
from vhost.drivers import Blk
from vhost.memory import GuestMemory
from vhost.user.frontend import Frontend
from vhost.virtio_blk import SECTOR


def contents(memory: GuestMemory) -> dict[int, bytes]:
    """By page."""
    return {
        addr: memory.read(addr, PAGE)
        for region in memory
        for addr in range(region.guest_addr, region.guest_addr + region.size, PAGE)
    }


def ring_pages(frontend: Frontend, disk: Blk) -> set[int]:
    """What the device writes of the first ring: its used area; packed, the descriptors and its event area."""
    desc, _, used = frontend._areas[0]
    num = disk.queues[0].num
    areas = [(desc, num * 16), (used, 4)] if disk.packed else [(used, 6 + num * 8)]
    return {page for addr, size in areas for page in range(addr // PAGE * PAGE, addr + size, PAGE)}


def check_read(frontend: Frontend, disk: Blk, log: DirtyLog | None, sector: int, expected: bytes) -> None:
    """``log`` None: nothing must be marked in any."""
    before = contents(disk.memory)
    assert bytes(disk.read(sector, len(expected) // SECTOR)) == expected
    marked = set(log.take()) if log is not None else set()
    after = contents(disk.memory)
    changed = {page for page, data in after.items() if data != before[page]}
    parts = [expected[at : at + SECTOR] for at in range(0, len(expected), SECTOR)]
    written = {page for page, data in after.items() if any(part in data for part in parts)}
    assert written
    if log is None:
        return
    rings = ring_pages(frontend, disk)
    assert written <= marked, "data that the log does not know of"
    assert marked & rings, "nor of the ring"
    assert marked <= changed | written | rings, "pages that nobody wrote"


def check_migration(frontend: Frontend, disk: Blk, content: bytes) -> None:
    """Read before, while and after the back-end logs."""
    log = DirtyLog.for_memory(disk.memory)
    step = 24 * SECTOR
    check_read(frontend, disk, None, 0, content[:step])
    frontend.start_log(log)
    log.take()  # what a device writes when it is told: which kicks it wants
    for i in range(1, 20):
        check_read(frontend, disk, log, i * 24, content[i * step : (i + 1) * step])
    larger = DirtyLog(log.limit * 2)
    frontend.set_log_base(larger)
    larger.take()
    log.take()  # a device may still have armed its ring after we saw its answer, but not after this one
    check_read(frontend, disk, larger, 48, content[2 * step : 3 * step])
    assert log.take() == [], "replaced"
    frontend.stop_log()
    log.take()
    larger.take()
    check_read(frontend, disk, None, 72, content[3 * step : 4 * step])
    assert log.take() == larger.take() == []
