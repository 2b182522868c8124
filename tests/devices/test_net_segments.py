# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A bridge cuts what its receiver has not agreed to take whole: each piece is a packet as it would have been
on a wire, with checksums that are computed here in another way than there."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, replace

import pytest

from vhost.devices.net import Net
from vhost.devices.net_wires import Bridge
from vhost.drivers import Net as Driver
from vhost.inprocess import InProcess
from vhost.virtio_net import NetGso, NetHdrF, NetHeader

pytestmark = pytest.mark.usefixtures("no_leaks")
ADDRESSES = bytes(range(1, 13))
FIN, PSH, ACK, CWR = 1, 8, 16, 0x80


def checksum(data: bytes) -> int:
    """RFC 1071's; 0 if the data have theirs, and it is right."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@dataclass(frozen=True)
class Packet:
    v6: bool
    tcp: bool
    tags: bytes = b""
    ip_options: bytes = b""
    tcp_options: bytes = b""
    flags: int = ACK | PSH | FIN

    @property
    def l3(self) -> int:
        return 14 + len(self.tags)

    @property
    def l4(self) -> int:
        return self.l3 + (40 if self.v6 else 20) + len(self.ip_options)

    @property
    def payload(self) -> int:
        return self.l4 + (20 + len(self.tcp_options) if self.tcp else 8)

    @property
    def addresses(self) -> slice:
        return slice(self.l3 + 8, self.l3 + 40) if self.v6 else slice(self.l3 + 12, self.l3 + 20)

    def build(self, data: bytes) -> bytes:
        """As a driver leaves it: checksums open."""
        proto = 6 if self.tcp else 17
        if self.tcp:
            offset = (20 + len(self.tcp_options)) // 4 << 4
            l4 = struct.pack(">HHIIBBHHH", 1, 2, 0xFFFFFF00, 7, offset, self.flags, 500, 0, 0)
            l4 += self.tcp_options
        else:
            l4 = struct.pack(">HHHH", 1, 2, 8 + len(data), 0)
        if self.v6:
            kind = 0x86DD
            ip = struct.pack(">IHBB", 6 << 28, len(l4) + len(data), proto, 64) + bytes(range(32))
        else:
            size = 20 + len(self.ip_options)
            kind, total = 0x0800, size + len(l4) + len(data)
            ip = struct.pack(">BBHHHBBH", 0x40 | size // 4, 0, total, 0xFFFE, 0, 64, proto, 0)
            ip += bytes(range(8)) + self.ip_options
        return ADDRESSES + self.tags + kind.to_bytes(2, "big") + ip + l4 + data

    def check(self, packet: bytes, index: int, at: int, last: bool) -> bytes:
        """It is the one that begins at this byte of the data; its own data."""
        l3, l4 = self.l3, self.l4
        data = packet[self.payload :]
        model = self.build(data)
        assert len(packet) == len(model)
        changed = [slice(self.addresses.start, self.addresses.start)]
        proto = 6 if self.tcp else 17
        pseudo = packet[self.addresses] + struct.pack(">IHBB", len(packet) - l4, 0, 0, proto)
        assert checksum(pseudo + packet[l4:]) == 0
        if not self.v6:
            assert checksum(packet[l3:l4]) == 0
            assert int.from_bytes(packet[l3 + 4 : l3 + 6], "big") == (0xFFFE + index) & 0xFFFF
            changed += [slice(l3 + 4, l3 + 6), slice(l3 + 10, l3 + 12)]
        if self.tcp:
            assert int.from_bytes(packet[l4 + 4 : l4 + 8], "big") == (0xFFFFFF00 + at) & 0xFFFFFFFF
            want = self.flags
            want &= ~(0 if last else FIN | PSH)
            want &= ~(CWR if index else 0)
            assert packet[l4 + 13] == want
            changed += [slice(l4 + 4, l4 + 8), slice(l4 + 13, l4 + 14), slice(l4 + 16, l4 + 18)]
        else:
            changed.append(slice(l4 + 6, l4 + 8))
        one, other = bytearray(packet), bytearray(model)
        for part in changed:
            one[part] = other[part] = bytes(part.stop - part.start)
        assert one == other
        return data


TCP4, TCP6 = Packet(False, True), Packet(True, True)
UDP4, UDP6 = Packet(False, False), Packet(True, False)
TAG = struct.pack(">HH", 0x8100, 7)
CASES = {
    "tcp4": (TCP4, NetGso.TCPV4),
    "tcp6": (TCP6, NetGso.TCPV6),
    "udp4": (UDP4, NetGso.UDP_L4),
    "udp6": (UDP6, NetGso.UDP_L4),
    "tag": (replace(TCP4, tags=TAG), NetGso.TCPV4),
    "two tags": (replace(TCP6, tags=struct.pack(">HH", 0x88A8, 9) + TAG), NetGso.TCPV6),
    "options": (replace(TCP4, ip_options=bytes(40), tcp_options=bytes(40)), NetGso.TCPV4),
    "ecn": (replace(TCP4, flags=ACK | CWR | FIN), NetGso.TCPV4 | NetGso.ECN),
}


@pytest.mark.parametrize("name", CASES)
def test_segments(name: str) -> None:
    packet, gso = CASES[name]
    bridge = Bridge()
    one, other = Net(bridge.ends[0]), Net(bridge.ends[1])
    with InProcess(one) as here, InProcess(other) as there:
        with Driver(here, timeout=10) as a, Driver(there, offloads=False, timeout=10) as b:
            sizes = ((1400, 1), (1400, 1400), (1400, 1401), (101, 6000), (64, 2000), (1400, 64000))
            for size, length in sizes:
                data = os.urandom(length)
                csum_offset = 16 if packet.tcp else 6
                header = NetHeader(
                    NetHdrF.NEEDS_CSUM, int(gso), packet.payload, size, packet.l4, csum_offset
                )
                a.send(packet.build(data), header)
                got, count = b"", 0
                while len(got) < length:
                    (frame,) = b.recv_frames(1, 10)
                    assert (frame.header.flags, frame.header.gso_type) == (0, 0)
                    end = len(got) + len(frame.data) - packet.payload
                    got += packet.check(frame.data, count, len(got), end == length)
                    count += 1
                assert got == data
                assert count == -(-length // size)
            assert other.dropped == 0
    one.close()
    other.close()


def test_what_cannot_be_cut() -> None:
    """What is said of a packet is not what it is."""
    bridge = Bridge()
    one, other = Net(bridge.ends[0]), Net(bridge.ends[1])
    right = NetHeader(NetHdrF.NEEDS_CSUM, NetGso.TCPV4, TCP4.payload, 1000, TCP4.l4, 16)
    data = bytes(5000)
    four = TCP4.build(data)
    with InProcess(one) as here, InProcess(other) as there:
        with Driver(here, timeout=10) as a, Driver(there, offloads=False, timeout=10) as b:
            wrong = [
                (four, replace(right, gso_type=NetGso.TCPV6)),
                (four, replace(right, gso_size=63)),
                (four, replace(right, csum_start=TCP4.l4 - 1)),
                (four, replace(right, csum_start=TCP4.l4 + 4)),
                (four, replace(right, csum_start=13)),
                (four, replace(right, csum_start=len(four) - 18)),
                (four[: TCP4.payload], right),
                (four[:12] + b"\x08\x06" + four[14:], right),
                (four[:12] + b"\x81\x00" * 2500, right),
                (four[:14] + b"\x4f" + four[15:], right),
                (four[: TCP4.l4 + 12] + b"\x40" + four[TCP4.l4 + 13 :], right),
                (TCP6.build(data), right),
                (TCP6.build(data), replace(right, gso_type=NetGso.TCPV6)),
            ]
            for number, (frame, header) in enumerate(wrong, 1):
                a.send(frame, header)
                a.flush(10)
                assert other.counters()["dropped_gso"] == other.dropped == number, header
            a.send(four, right)
            assert len(b.recv_batch(1, 10)) == 1
    one.close()
    other.close()
