# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Requests that do no harm, for each kind of device: how one sees that a ring is processed.

Each says which rings a driver of that device sets up, on which one the request goes, what its buffers hold,
and whether what came back is right. Knows VIRTIO's request formats; knows no connection.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vhost.virtio_blk import HEADER, ID_BYTES, SECTOR, BlkType

Judge = Callable[[list[bytes], int], str]
"""(contents of the writable buffers, used length) -> what is wrong with them, or ""."""


@dataclass(frozen=True, slots=True)
class Work:
    """A request: ``readable`` buffers, sizes of the ``writable`` ones, and the judge of the outcome."""

    name: str
    ring: int
    readable: tuple[bytes, ...]
    writable: tuple[int, ...]
    judge: Judge
    rings: int = 1
    """How many rings the driver starts, from 0 on."""
    leaves: bool = False
    """It leaves this machine: only with --write."""


def blk_request(kind: int, sector: int = 0, data: bytes = b"", room: int = 0, *, status: int = 0) -> Work:
    """VIRTIO 5.2.6: a header, data in one direction, a status byte."""

    def judge(came: list[bytes], used: int) -> str:
        if used > room + 1:
            return f"used length {used}, more than the {room + 1} writable bytes"
        if came[-1][0] != status:
            return f"status {came[-1][0]:#x}, must be {status}"
        return ""

    readable = (HEADER.pack(kind, 0, sector), *([data] if data else []))
    names = {int(t): t.name for t in BlkType}
    name = f"blk {names.get(kind, hex(kind))} sector {sector}"
    return Work(name, 0, readable, (*([room] if room else []), 1), judge)


def _rng_judge(came: list[bytes], used: int) -> str:
    if not 1 <= used <= len(came[0]):
        return f"used length {used}, must be 1 to {len(came[0])}"
    if used >= 16 and not any(came[0][:used]):
        return f"{used} bytes of entropy, all of them 0"
    return ""


def _net_judge(came: list[bytes], used: int) -> str:
    return f"used length {used} for a buffer that is only read" if used else ""


# Locally administered addresses, and the EtherType for local experiments (IEEE 802, 0x88b5).
_FRAME = bytes.fromhex("020000000002 020000000001 88b5") + b"vhost check".ljust(46, b"\0")

_FUSE_IN = struct.Struct("<IIQQIIII")
_FUSE_OUT = struct.Struct("<IiQ")
_FUSE_INIT = 26


def _fuse_judge(came: list[bytes], used: int) -> str:
    size, error, unique = _FUSE_OUT.unpack_from(came[0])
    if unique != 7 or error > 0 or not 16 <= size <= used:
        return f"no answer to FUSE_INIT: length {size}, error {error}, unique {unique}, used length {used}"
    return ""


# To target 0, LUN 0: its address, tag and attributes, and a CDB of zeroes.
_TEST_UNIT_READY = bytes([1, 0, 0x40, 0, 0, 0, 0, 0]) + bytes(8 + 3 + 32)


def _scsi_judge(came: list[bytes], used: int) -> str:
    response = came[0][11]
    return "" if used >= 12 and response in (0, 3) else f"response {response}, used length {used}"


# RESOURCE_UNREF of a resource that does not exist. What shows a display waits for GPU_SET_SOCKET first.
_GPU_UNREF = struct.pack("<I20xII", 0x0102, 0x7FFF_FFFF, 0)


def _gpu_judge(came: list[bytes], used: int) -> str:
    (kind,) = struct.unpack_from("<I", came[0])
    return "" if kind == 0x1203 else f"response type {kind:#x}, must be ERR_INVALID_RESOURCE_ID (0x1203)"


WORK: dict[str, Work] = {
    "blk": blk_request(BlkType.GET_ID, room=ID_BYTES),
    "rng": Work("entropy", 0, (), (64,), _rng_judge),
    # An empty network header, then a frame that no station takes.
    "net": Work("a frame", 1, (bytes(12) + _FRAME,), (), _net_judge, rings=2, leaves=True),
    "fs": Work(
        "FUSE_INIT",
        1,
        (_FUSE_IN.pack(56, _FUSE_INIT, 7, 0, 0, 0, 0, 0), struct.pack("<IIII", 7, 31, 65536, 0)),
        (80,),
        _fuse_judge,
        rings=2,
    ),
    "scsi": Work("TEST UNIT READY", 2, (_TEST_UNIT_READY,), (108,), _scsi_judge, rings=3),
    "gpu": Work("RESOURCE_UNREF", 0, (_GPU_UNREF,), (24,), _gpu_judge, rings=2),
}
"""By kind of device, as ``--device`` names it."""

DEVICES: Sequence[str] = tuple(WORK)


def blk_read(sector: int = 0, count: int = 1) -> Work:
    return blk_request(BlkType.IN, sector, room=count * SECTOR)
