# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a network device is connected to. A wire knows the device's pairs of queues; it knows no session."""

from __future__ import annotations

from collections.abc import Sequence

from vhost.devices._net_engine import FRAME_MAX, NetPair
from vhost.features import NetF
from vhost.virtio_net import ETH_HEADER

SOURCE_TYPE = b"\x88\xb5"
"""The EtherType of a source's frames: IEEE 802's for local experiments."""


class Wire:
    """Drops whatever is sent, and has nothing to receive."""

    features = int(NetF.CSUM | NetF.GUEST_CSUM)
    """What it lets a device offer: checksums and segmentation that may be left open."""
    max_mtu = 65535

    def connect(self, pairs: Sequence[NetPair], mac: bytes) -> None:
        """Called once, by the device that has these pairs, and this address."""

    def close(self) -> None:
        """Let go of what it has."""


class Drop(Wire):
    """Nowhere: counts what is sent."""


class Echo(Wire):
    """Sends back what it is sent, on the same pair."""

    def connect(self, pairs: Sequence[NetPair], mac: bytes) -> None:
        for pair in pairs:
            pair.echo()


class Source(Wire):
    """As many frames of ``size`` bytes as there are buffers for, to the driver; drops what that one sends."""

    def __init__(self, size: int) -> None:
        if not ETH_HEADER <= size <= FRAME_MAX:
            raise ValueError(f"frames of {size} bytes, must be {ETH_HEADER} to {FRAME_MAX}")
        self.size = size

    def connect(self, pairs: Sequence[NetPair], mac: bytes) -> None:
        head = mac + bytes([2, 0, 0, 0, 0, 1]) + SOURCE_TYPE
        frame = head + bytes(i & 0xFF for i in range(self.size - len(head)))
        for pair in pairs:
            pair.repeat(frame)
