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
from vhost.virtio_blk import HEADER, ID_BYTES, RANGE, RANGE_UNMAP, SECTOR, BlkStatus, BlkType

MAX_DISCARD_SECTORS = 1 << 22
MAX_ZEROES_SECTORS = 1 << 13
"""2 GiB and 4 MiB a segment, so that no request holds a worker, and who waits for it, for long: holes are
cheap, but a file system that cannot zero a range has it written."""

_IOV_MAX = 1024  # UIO_MAXIOV: what one system call takes


class Served(Protocol):
    """What a request needs to know of the device."""

    read_only: bool
    serial: bytes
    disk: Disk

    @property
    def fd(self) -> int: ...

    @property
    def capacity(self) -> int: ...

    @property
    def writethrough(self) -> bool: ...


class _Refused(Exception):
    """Ends a request with this status."""

    def __init__(self, status: BlkStatus) -> None:
        self.status = status


def run_request(disk: Served, chain: Chain) -> tuple[int, int]:
    """Run it: what its status is, and how many bytes of data were written. QueueBroken: it cannot be
    answered, and nothing was done."""
    kind, _, sector = chain.unpack(HEADER)
    room = chain.data_room
    serve = _SERVE.get(kind)
    if serve is None:
        return _UNSUPP, 0
    try:
        return _OK, serve(disk, chain, sector, room)
    except _Refused as refusal:
        return refusal.status, 0
    except OSError as error:
        return _UNSUPP if error.errno == errno.EOPNOTSUPP else _IOERR, 0


def _check_writable(disk: Served) -> None:
    if disk.read_only:
        raise _Refused(BlkStatus.IOERR)


def _check_range(disk: Served, sector: int, count: int) -> None:
    if sector + count > disk.capacity:
        raise _Refused(BlkStatus.IOERR)


def _read(disk: Served, chain: Chain, sector: int, room: int) -> int:
    _transfer(disk, os.preadv, lambda done: chain.writable_part(done, room - done), sector, room)
    return room


def _write(disk: Served, chain: Chain, sector: int, room: int) -> int:
    _check_writable(disk)
    length = chain.readable_len - HEADER.size
    _transfer(disk, os.pwritev, lambda done: chain.readable_part(HEADER.size + done), sector, length)
    if disk.writethrough:
        _flush(disk)
    return 0


def _transfer(
    disk: Served,
    call: Callable[[int, Sequence[Buffer], int], int],
    rest: Callable[[int], Sequence[Buffer]],
    sector: int,
    length: int,
) -> None:
    """``rest`` gives the buffers from an offset on: the file may take or give less than is asked for."""
    if length % SECTOR:
        raise _Refused(BlkStatus.IOERR)
    _check_range(disk, sector, length // SECTOR)
    done = 0 if disk.fd >= 0 else length
    while done < length:
        n = call(disk.fd, rest(done)[:_IOV_MAX], sector * SECTOR + done)
        if n == 0:
            raise _Refused(BlkStatus.IOERR)  # the file ends below the capacity that was announced
        done += n


def _get_id(disk: Served, chain: Chain, sector: int, room: int) -> int:
    return chain.write(disk.serial.ljust(ID_BYTES, b"\0")[:room])


def _flush(disk: Served) -> int:
    if disk.fd >= 0:
        os.fdatasync(disk.fd)
    return 0


def _ranges(disk: Served, chain: Chain, discard: bool) -> int:
    length = chain.readable_len - HEADER.size
    if not length or length % RANGE.size or length > MAX_RANGES * RANGE.size:
        raise _Refused(BlkStatus.IOERR)
    ranges = [chain.unpack(RANGE) for _ in range(length // RANGE.size)]
    if any(flags & ~(0 if discard else RANGE_UNMAP) for _, _, flags in ranges):
        raise _Refused(BlkStatus.UNSUPP)
    _check_writable(disk)
    most = MAX_DISCARD_SECTORS if discard else MAX_ZEROES_SECTORS
    for sector, count, _ in ranges:
        if count > most:
            raise _Refused(BlkStatus.IOERR)
        _check_range(disk, sector, count)
    for sector, count, flags in ranges if disk.fd >= 0 else ():
        if not count:
            continue
        if discard:
            disk.disk.discard(sector * SECTOR, count * SECTOR)
        else:
            disk.disk.write_zeroes(sector * SECTOR, count * SECTOR, bool(flags & RANGE_UNMAP))
    if disk.writethrough and not discard:
        _flush(disk)
    return 0


_OK, _IOERR, _UNSUPP = int(BlkStatus.OK), int(BlkStatus.IOERR), int(BlkStatus.UNSUPP)
_SERVE: dict[int, Callable[[Served, Chain, int, int], int]] = {
    BlkType.IN: _read,
    BlkType.OUT: _write,
    BlkType.FLUSH: lambda disk, chain, sector, room: _flush(disk),
    BlkType.GET_ID: _get_id,
    BlkType.DISCARD: lambda disk, chain, sector, room: _ranges(disk, chain, True),
    BlkType.WRITE_ZEROES: lambda disk, chain, sector, room: _ranges(disk, chain, False),
}
