# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a network device and its driver put on the wire (VIRTIO 1.2, 5.1): layouts and numbers only."""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from enum import IntEnum, IntFlag
from typing import Self

from vhost.features import NetF, VirtioF

ETH_HEADER = 14
"""The shortest frame that there is: two addresses and a type."""
ETH_MIN_FRAME = 60
"""Shorter ones are padded on a real wire."""
ETH_MIN_MTU = 68
BIG_BUFFER = 65562
"""A receive buffer that holds any segmented packet, header included (5.1.6.3.1)."""
SMALL_BUFFER = 1526
"""One for a device that segments nothing."""
LEGACY_HEADER = 10

_HEADER = struct.Struct("<BBHHHHH")


class NetHdrF(IntFlag):
    """Header flags."""

    NEEDS_CSUM = 1
    """The checksum is to be filled in at csum_start + csum_offset."""
    DATA_VALID = 2
    RSC_INFO = 4


class NetGso(IntEnum):
    """Segmentation offloads of a frame."""

    NONE = 0
    TCPV4 = 1
    UDP = 3
    TCPV6 = 4
    UDP_L4 = 5
    ECN = 0x80
    """A bit on top of the TCP ones."""


@dataclass(frozen=True, slots=True)
class NetHeader:
    """struct virtio_net_hdr_v1 (5.1.6), which is before each frame."""

    flags: int = 0
    gso_type: int = NetGso.NONE
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0
    num_buffers: int = 0
    """Receive buffers that the frame was spread over; what a driver sends has 0. Not in a legacy header."""

    SIZE = _HEADER.size

    def pack(self) -> bytes:
        return _HEADER.pack(*(getattr(self, field.name) for field in fields(self)))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """From 12 bytes, or from the 10 of a legacy header."""
        return cls(*_HEADER.unpack(data[: _HEADER.size].ljust(_HEADER.size, b"\0")))


def header_size(features: int) -> int:
    """Bytes of the header after these features were negotiated (5.1.6.1)."""
    return NetHeader.SIZE if features & (VirtioF.VERSION_1 | NetF.MRG_RXBUF) else LEGACY_HEADER


def rarp_request(mac: bytes) -> bytes:
    """A frame that says where an address is, and asks for nothing that anybody would answer (RFC 903)."""
    arp = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 3) + (mac + bytes(4)) * 2
    return (b"\xff" * 6 + mac + b"\x80\x35" + arp).ljust(ETH_MIN_FRAME, b"\0")


class NetStatus(IntFlag):
    """The configuration space's ``status``, which a device with the STATUS feature has."""

    LINK_UP = 1
    ANNOUNCE = 2


_CONFIG = struct.Struct("<6sHHHIBBHI")


@dataclass(frozen=True, slots=True)
class NetConfig:
    """The configuration space (5.1.4). A field counts only if its feature was negotiated; what a shorter
    space does not have reads as 0."""

    mac: bytes
    status: int = 0
    max_virtqueue_pairs: int = 0
    mtu: int = 0
    speed: int = 0
    """Mbit/s; 0xffffffff: unknown."""
    duplex: int = 0
    rss_max_key_size: int = 0
    rss_max_indirection_table_length: int = 0
    supported_hash_types: int = 0

    SIZE = _CONFIG.size

    def pack(self) -> bytes:
        return _CONFIG.pack(*(getattr(self, field.name) for field in fields(self)))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """From a space that may be shorter or longer than this structure."""
        return cls(*_CONFIG.unpack(data[: _CONFIG.size].ljust(_CONFIG.size, b"\0")))


# --------------------------------------------------------------------------- the control queue (5.1.6.5)

CTRL_HEADER = struct.Struct("<BB")
"""class, command; then the command's data, then a byte that the device writes: an acknowledgement"""
CTRL_OK = 0
CTRL_ERR = 1

MQ_PAIRS_MIN = 1
MQ_PAIRS_MAX = 0x8000


class NetCtrl(IntEnum):
    """Classes of commands."""

    RX = 0
    MAC = 1
    VLAN = 2
    ANNOUNCE = 3
    MQ = 4
    GUEST_OFFLOADS = 5
    NOTF_COAL = 6
    STATS = 8


class NetCtrlRx(IntEnum):
    """What to receive: one byte, 0 or 1. The last four need CTRL_RX_EXTRA."""

    PROMISC = 0
    ALLMULTI = 1
    ALLUNI = 2
    NOMULTI = 3
    NOUNI = 4
    NOBCAST = 5


class NetCtrlMac(IntEnum):
    """TABLE_SET: two lists, each a 32-bit count and as many addresses: unicast, multicast.
    ADDR_SET: six bytes."""

    TABLE_SET = 0
    ADDR_SET = 1


class NetCtrlVlan(IntEnum):
    """A VLAN id: 16 bits."""

    ADD = 0
    DEL = 1


class NetCtrlAnnounce(IntEnum):
    """No data."""

    ACK = 0


class NetCtrlMq(IntEnum):
    """VQ_PAIRS_SET: the number of pairs to use, 16 bits."""

    VQ_PAIRS_SET = 0
    RSS_CONFIG = 1
    HASH_CONFIG = 2


class NetCtrlGuestOffloads(IntEnum):
    """Feature bits of GUEST_*, 64 bits."""

    SET = 0
