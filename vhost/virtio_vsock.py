# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a socket device and its driver put on the wire (VIRTIO 1.2, 5.10): layouts and numbers only."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Self

RX, TX, EVENT_QUEUE = range(3)
"""The virtqueues (5.10.2). The kernel's vhost-vsock serves the first two."""

HEADER = struct.Struct("<QQIIIHHIII")
"""src_cid, dst_cid, src_port, dst_port, len, type, op, flags, buf_alloc, fwd_cnt (5.10.6)"""
EVENT = struct.Struct("<I")
"""id"""

MAX_PAYLOAD = 64 << 10
"""Linux refuses a packet with more than this; the specification names no limit."""
PORT_ANY = 0xFFFF_FFFF
"""No port: Linux takes it for "any" when it binds."""


class Cid(IntEnum):
    """Context ids that are nobody's own (5.10.4). The upper 32 bits of a CID are zero."""

    HYPERVISOR = 0
    LOCAL = 1
    HOST = 2
    ANY = 0xFFFF_FFFF


def is_guest_cid(cid: int) -> bool:
    """May a guest have this CID?"""
    return Cid.HOST < cid < Cid.ANY


class VsockType(IntEnum):
    """Kinds of sockets (5.10.6.2)."""

    STREAM = 1
    SEQPACKET = 2


class VsockOp(IntEnum):
    """What a packet is for (5.10.6)."""

    INVALID = 0
    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


class ShutdownF(IntFlag):
    """Flags of SHUTDOWN: what its sender will not do any more (5.10.6.5)."""

    RECEIVE = 1 << 0
    SEND = 1 << 1


class SeqF(IntFlag):
    """Flags of a seqpacket's RW: the last packet of a message, of a record (5.10.6.6.1)."""

    EOM = 1 << 0
    EOR = 1 << 1


class VsockEvent(IntEnum):
    """Device events (5.10.6.7)."""

    TRANSPORT_RESET = 0


_CONFIG = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class VsockConfig:
    """The configuration space (5.10.4)."""

    guest_cid: int

    SIZE = _CONFIG.size

    def pack(self) -> bytes:
        return _CONFIG.pack(self.guest_cid)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*_CONFIG.unpack(data))
