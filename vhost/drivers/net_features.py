# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Which features of a network device go together (VIRTIO 1.2, 5.1.3.1), and what follows from them: how long
buffers are, which headers may be sent. Knows no device and no ring."""

from __future__ import annotations

from vhost.errors import InactiveFeature
from vhost.features import NetF
from vhost.virtio_net import (
    BIG_BUFFER,
    ETH_HEADER,
    SMALL_BUFFER,
    NetGso,
    NetHdrF,
    NetHeader,
    header_size,
)

_VLAN_TAG = 4
_HOST_SEGMENTS = int(NetF.HOST_TSO4 | NetF.HOST_TSO6 | NetF.HOST_UFO | NetF.HOST_USO)
_GUEST_SEGMENTS = int(NetF.GUEST_TSO4 | NetF.GUEST_TSO6 | NetF.GUEST_UFO | NetF.GUEST_USO4 | NetF.GUEST_USO6)
OFFLOADS = (
    int(NetF.CSUM | NetF.GUEST_CSUM | NetF.HOST_ECN | NetF.GUEST_ECN) | _HOST_SEGMENTS | _GUEST_SEGMENTS
)
"""Work that one side leaves to the other."""
CONTROL = int(NetF.CTRL_RX | NetF.CTRL_MAC_ADDR)
"""Commands of the control queue."""
DEVICE = int(NetF.MAC | NetF.MTU | NetF.STATUS)
"""Fields of the configuration space."""

_NEEDS: tuple[tuple[int, int], ...] = (
    (_HOST_SEGMENTS, int(NetF.CSUM)),
    (int(NetF.HOST_ECN), int(NetF.HOST_TSO4 | NetF.HOST_TSO6)),
    (_GUEST_SEGMENTS, int(NetF.GUEST_CSUM)),
    (int(NetF.GUEST_ECN), int(NetF.GUEST_TSO4 | NetF.GUEST_TSO6)),
    (CONTROL, int(NetF.CTRL_VQ)),
)
"""Features, and those of which they need one (5.1.3.1)."""

_GSO_NEEDS: dict[int, int] = {
    NetGso.TCPV4: int(NetF.HOST_TSO4),
    NetGso.TCPV6: int(NetF.HOST_TSO6),
    NetGso.UDP: int(NetF.HOST_UFO),
    NetGso.UDP_L4: int(NetF.HOST_USO),
}


def without_unmet(features: int) -> int:
    """These features, less those whose own needs are not among them."""
    for dependent, needed in _NEEDS:
        if not features & needed:
            features &= ~dependent
    return features


def send_size(features: int, mtu: int) -> int:
    """Bytes of the longest frame that may be sent, with its header."""
    whole = _whole(features, mtu)
    return max(whole, BIG_BUFFER) if features & _HOST_SEGMENTS else whole


def receive_size(features: int, mtu: int) -> int:
    """Bytes of a buffer that any received frame fits into (5.1.6.3.1)."""
    return max(_whole(features, mtu), BIG_BUFFER if features & _GUEST_SEGMENTS else SMALL_BUFFER)


def _whole(features: int, mtu: int) -> int:
    return header_size(features) + ETH_HEADER + _VLAN_TAG + mtu


def check_header(header: NetHeader, features: int) -> bytes:
    """The header as it is sent. InactiveFeature: the device does not do that; ValueError: nobody can."""
    if header.gso_type:
        needed = _GSO_NEEDS.get(header.gso_type & ~NetGso.ECN, 0)
        if not features & needed:
            raise InactiveFeature(f"gso_type {header.gso_type}: the device does not segment that")
        if header.gso_type & NetGso.ECN and not features & NetF.HOST_ECN:
            raise InactiveFeature(f"gso_type {header.gso_type}: the device does not know ECN")
        if not header.flags & NetHdrF.NEEDS_CSUM:
            raise ValueError(f"gso_type {header.gso_type} without NEEDS_CSUM (5.1.6.2)")
    if header.flags & NetHdrF.NEEDS_CSUM and not features & NetF.CSUM:
        raise InactiveFeature("NEEDS_CSUM: the device computes no checksums")
    return header.pack()
