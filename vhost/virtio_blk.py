# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a block device and its driver put on the wire (VIRTIO 1.2, 5.2): layouts and numbers only."""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Self

from vhost.wire import Struct

SECTOR = 512
"""The unit of capacity, of request offsets and of data lengths, whatever ``blk_size`` says."""
ID_BYTES = 20

HEADER = Struct("le32 type; le32 reserved; le64 sector")
RANGE = Struct("le64 sector; le32 num_sectors; le32 flags")
"""One segment of a discard or write-zeroes."""
RANGE_UNMAP = 1


class BlkType(IntEnum):
    """Request types (5.2.6)."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


class BlkStatus(IntEnum):
    """The last byte of a request."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


_CONFIG = struct.Struct("<QIIHBBIBBHIBxHIIIIIB3xIII")


@dataclass(frozen=True, slots=True)
class BlkConfig:
    """The configuration space (5.2.4) as far as zoned devices. A field counts only if its feature was
    negotiated; what a shorter space does not have reads as 0."""

    capacity: int
    """In sectors of 512 bytes."""
    size_max: int = 0
    seg_max: int = 0
    cylinders: int = 0
    heads: int = 0
    sectors: int = 0
    blk_size: int = 0
    physical_block_exp: int = 0
    alignment_offset: int = 0
    min_io_size: int = 0
    opt_io_size: int = 0
    writeback: int = 0
    num_queues: int = 0
    max_discard_sectors: int = 0
    max_discard_seg: int = 0
    discard_sector_alignment: int = 0
    max_write_zeroes_sectors: int = 0
    max_write_zeroes_seg: int = 0
    write_zeroes_may_unmap: int = 0
    max_secure_erase_sectors: int = 0
    max_secure_erase_seg: int = 0
    secure_erase_sector_alignment: int = 0

    SIZE = _CONFIG.size

    def pack(self) -> bytes:
        return _CONFIG.pack(*(getattr(self, field.name) for field in fields(self)))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """From a space that may be shorter or longer than this structure."""
        return cls(*_CONFIG.unpack(data[: _CONFIG.size].ljust(_CONFIG.size, b"\0")))
