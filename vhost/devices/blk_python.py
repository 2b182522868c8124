# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""One virtio-blk request in Python (VIRTIO 1.2, 5.2.6): what csrc/blk_request.c does, to be read.

Knows chains and files, no rings and no sessions.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from typing import Protocol

from vhost.chain import Buffer, Chain
from vhost.devices._blk_engine import MAX_RANGES, Disk
from vhost.errors import InvalidQueue
from vhost.virtio_blk import HEADER, ID_BYTES, RANGE, RANGE_UNMAP, SECTOR, BlkStatus, BlkType

MAX_DISCARD_SECTORS = 1 << 22
MAX_ZEROES_SECTORS = 1 << 13
"""2 GiB and 4 MiB a segment, so that no request holds a worker, and who waits for it, for long: holes are
cheap, but a file system that cannot zero a range has it written."""


class Served(Protocol):
    """What a request needs to know of the device."""

    fd: int
    read_only: bool
    serial: bytes
    disk: Disk

    @property
    def capacity(self) -> int: ...

    @property
    def writethrough(self) -> bool: ...


class _Refused(Exception):
    """Ends a request with this status."""

    def __init__(self, status: BlkStatus) -> None:
        self.status = status


def serve_request(disk: Served, chain: Chain) -> int:
    """Run it and write its status: how many bytes were written in all. InvalidQueue: it cannot be
    answered."""
    if chain.readable_len < HEADER.size:
        raise InvalidQueue(
            f"request is shorter than its header (chain {chain.id}, value {chain.readable_len:#x},"
            f" limit {HEADER.size:#x})"
        )
    if not chain.writable_len:
        raise InvalidQueue(f"request has no room for its status (chain {chain.id}, value 0x0, limit 0x1)")
    room = chain.writable_len - 1  # the status is the last byte, wherever the data ends
    kind, _, sector = HEADER.unpack(chain.read_at(0, HEADER.size))
    written = 0
    try:
        if kind == BlkType.IN:
            written = _transfer(disk, os.preadv, chain.writable_part(0, room), sector, room)
        elif kind == BlkType.OUT:
            _check_writable(disk)
            length = chain.readable_len - HEADER.size
            _transfer(disk, os.pwritev, chain.readable_part(HEADER.size), sector, length)
            if disk.writethrough:
                _flush(disk)
        elif kind == BlkType.FLUSH:
            _flush(disk)
        elif kind == BlkType.GET_ID:
            name = disk.serial.ljust(ID_BYTES, b"\0")[:room]
            chain.write_at(0, name)
            written = len(name)
        elif kind in (BlkType.DISCARD, BlkType.WRITE_ZEROES):
            _ranges(disk, kind == BlkType.DISCARD, chain)
        else:
            raise _Refused(BlkStatus.UNSUPP)
        status = BlkStatus.OK
    except _Refused as refusal:
        status = refusal.status
    except OSError as error:
        status = BlkStatus.UNSUPP if error.errno == errno.EOPNOTSUPP else BlkStatus.IOERR
    chain.write_at(room, bytes([status]))
    return written + 1


def _check_writable(disk: Served) -> None:
    if disk.read_only:
        raise _Refused(BlkStatus.IOERR)


def _check_range(disk: Served, sector: int, count: int) -> None:
    if sector + count > disk.capacity:
        raise _Refused(BlkStatus.IOERR)


def _transfer(
    disk: Served,
    call: Callable[[int, Sequence[Buffer], int], int],
    buffers: Sequence[Buffer],
    sector: int,
    length: int,
) -> int:
    if length % SECTOR:
        raise _Refused(BlkStatus.IOERR)
    _check_range(disk, sector, length // SECTOR)
    if disk.fd < 0:
        return length
    done = 0
    views: list[memoryview] = [memoryview(part) for part in buffers]
    while done < length:
        n = call(disk.fd, views[:1024], sector * SECTOR + done)  # type: ignore[arg-type]
        if n == 0:
            raise _Refused(BlkStatus.IOERR)  # the file ends below the capacity that was announced
        done += n
        while views and n >= len(views[0]):
            n -= len(views.pop(0))
        if n:
            views[0] = views[0][n:]
    return done


def _flush(disk: Served) -> None:
    if disk.fd >= 0:
        os.fdatasync(disk.fd)


def _ranges(disk: Served, discard: bool, chain: Chain) -> None:
    length = chain.readable_len - HEADER.size
    if not length or length % RANGE.size or length > MAX_RANGES * RANGE.size:
        raise _Refused(BlkStatus.IOERR)
    ranges = list(RANGE.iter_unpack(chain.read_at(HEADER.size, length)))
    if any(flags & ~(0 if discard else RANGE_UNMAP) for _, _, flags in ranges):
        raise _Refused(BlkStatus.UNSUPP)
    _check_writable(disk)
    most = MAX_DISCARD_SECTORS if discard else MAX_ZEROES_SECTORS
    for sector, count, _ in ranges:
        if count > most:
            raise _Refused(BlkStatus.IOERR)
        _check_range(disk, sector, count)
    if disk.fd < 0:
        return
    for sector, count, flags in ranges:
        if not count:
            continue
        if discard:
            disk.disk.discard(sector * SECTOR, count * SECTOR)
        else:
            disk.disk.write_zeroes(sector * SECTOR, count * SECTOR, bool(flags & RANGE_UNMAP))
    if disk.writethrough and not discard:
        _flush(disk)
