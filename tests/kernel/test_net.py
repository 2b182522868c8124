# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""drivers.Net on the kernel's vhost-net: what it sends leaves the tap, what is sent into the tap arrives."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kernel.wires import ETHERTYPE, packet_socket
from vhost.drivers import Net
from vhost.errors import InactiveFeature
from vhost.features import NetF, VirtioF
from vhost.kernel import Tap, VhostNet
from vhost.virtio_net import NetGso, NetHdrF, NetHeader

pytestmark = [pytest.mark.kernel("net"), pytest.mark.usefixtures("no_leaks")]

HEAD = bytes.fromhex("020000000001 020000000002") + struct.pack(">H", ETHERTYPE)
MERGEABLE = pytest.mark.parametrize("without", [0, int(NetF.MRG_RXBUF)], ids=["mergeable", "big"])


def frame(size: int, number: int = 0) -> bytes:
    return (HEAD + struct.pack("<Q", number) + random.Random(number).randbytes(size))[:size]


@contextlib.contextmanager
def tap_up(*, queue_pairs: int = 1, mtu: int = 1500, **options: Any) -> Iterator[Tap]:
    with Tap(queue_pairs=queue_pairs, **options) as tap:
        # Nobody but us speaks on it.
        Path(f"/proc/sys/net/ipv6/conf/{tap.name}/disable_ipv6").write_text("1")
        tap.mtu = mtu
        tap.up()
        yield tap


@contextlib.contextmanager
def nic_on(tap: Tap, **options: Any) -> Iterator[Net]:
    with VhostNet(queue_pairs=len(tap.fds)) as net:
        with Net(net, backend=tap, queue_pairs=len(tap.fds), timeout=10, **options) as nic:
            yield nic


def recv_frame(nic: Net) -> bytes:
    """The next that is ours: the kernel may have something of its own to say."""
    while True:
        got = nic.recv(10)
        assert got is not None, "nothing came"
        if got[12:14] == HEAD[12:]:
            return got


@MERGEABLE
@pytest.mark.parametrize("mtu", [1500, 9000])
def test_bit_exact_both_ways(mtu: int, without: int) -> None:
    with (
        tap_up(mtu=mtu) as tap,
        nic_on(tap, mtu=mtu, without=without) as nic,
        packet_socket(tap.name) as wire,
    ):
        assert nic.mergeable is not bool(without)
        sizes = [60, 61, 64, 127, 1000, 1513, 1514]
        if mtu > 1500:
            sizes += [2036, 2037, 4084, 4085, 9013, 9014]
        for number, size in enumerate(sizes):
            nic.send(frame(size, number))
            assert wire.recv(65536) == frame(size, number), size
            wire.send(frame(size, number + 100))
            assert recv_frame(nic) == frame(size, number + 100), size
        nic.flush(10)
        assert nic.dropped == 0


def test_batches_in_order() -> None:
    with tap_up() as tap, nic_on(tap) as nic, packet_socket(tap.name) as wire:
        for start in range(0, 3200, 64):
            sent = [frame(60 + i, start + i) for i in range(64)]
            assert nic.send_batch(sent) == 64
            assert [wire.recv(65536) for _ in sent] == sent
            for one in sent:
                wire.send(one)
            got: list[bytes] = []
            while len(got) < 64:
                more = nic.recv_batch(64, 10)
                assert more, f"{len(got)} of 64 came"
                got += [one for one in more if one[12:14] == HEAD[12:]]
            assert got == sent


def test_legacy_header() -> None:
    without = int(VirtioF.VERSION_1 | NetF.MRG_RXBUF)
    with tap_up() as tap, nic_on(tap, without=without) as nic, packet_socket(tap.name) as wire:
        assert tap.vnet_hdr_size == 10
        nic.send(frame(200, 1))
        assert wire.recv(65536) == frame(200, 1)
        wire.send(frame(300, 2))
        assert recv_frame(nic) == frame(300, 2)


# -- segmentation ----------------------------------------------------------------------------------

OURS, THEIRS = bytes([10, 99, 0, 2]), bytes([10, 99, 0, 1])
BEYOND, FAR = bytes([10, 98, 0, 1]), bytes([10, 98, 0, 2])
"""The kernel's address on another interface, and somebody behind it."""
ETH_P_IP = 0x0800
SOL_PACKET, PACKET_VNET_HDR = 263, 15
SIOCSIFADDR, SIOCSIFNETMASK = 0x8916, 0x891C


def checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ipv4(protocol: int, source: bytes, destination: bytes, payload: bytes) -> bytes:
    head = (
        struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0x4000, 64, protocol, 0)
        + source
        + destination
    )
    return head[:10] + struct.pack(">H", checksum(head)) + head[12:] + payload


def super_frame(destination: bytes, to: bytes, data: bytes) -> tuple[bytes, NetHeader]:
    """A TCP segment longer than any MTU, its checksum open: the field has the pseudo-header's sum."""
    length = 20 + len(data)
    pseudo = OURS + to + struct.pack(">BBH", 0, 6, length)
    tcp = struct.pack(">HHIIBBHHH", 1000, 2000, 7, 0, 0x50, 0x18, 1024, ~checksum(pseudo) & 0xFFFF, 0)
    packet = destination + b"\x02\0\0\0\0\x02\x08\0" + ipv4(6, OURS, to, tcp + data)
    return packet, NetHeader(NetHdrF.NEEDS_CSUM, NetGso.TCPV4, 54, 1448, 34, 16)


def test_the_kernel_segments_what_we_send() -> None:
    """Routed out of a second tap, which takes no super frames, so that the kernel has to cut them."""
    data = random.Random(1).randbytes(60_000)
    with tap_up() as tap, tap_up(vnet_hdr=False) as out, nic_on(tap) as nic:
        set_address(tap, THEIRS)
        set_address(out, BEYOND)
        Path(f"/proc/sys/net/ipv4/conf/{tap.name}/forwarding").write_text("1")
        Path(f"/proc/sys/net/ipv4/conf/{out.name}/forwarding").write_text("1")
        assert nic.negotiated & NetF.HOST_TSO4
        packet, header = super_frame(tap.mac, FAR, data)
        nic.send(packet, header)
        got = b""
        while len(got) < len(data):
            segment = read_ip(out)
            tcp = segment[34:]
            assert len(segment) <= 1514
            (sequence,) = struct.unpack(">I", tcp[4:8])
            assert sequence == 7 + len(got)
            assert checksum(segment[14:34]) == 0
            assert checksum(OURS + FAR + struct.pack(">BBH", 0, 6, len(tcp)) + tcp) == 0
            got += tcp[20:]
        assert got == data


@contextlib.contextmanager
def offloading_socket(tap: Tap) -> Iterator[socket.socket]:
    """A packet socket with virtio-net headers of its own."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as wire:
        wire.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        wire.bind((tap.name, ETH_P_IP))
        yield wire


@MERGEABLE
def test_a_super_frame_arrives_whole(without: int) -> None:
    """From the wire side, through a packet socket with headers of its own."""
    data = random.Random(2).randbytes(60_000)
    with tap_up() as tap, nic_on(tap, without=without) as nic, offloading_socket(tap) as wire:
        assert nic.negotiated & NetF.GUEST_TSO4
        packet, header = super_frame(nic.mac, THEIRS, data)
        wire.send(header.pack()[:10] + packet)
        (got,) = nic.recv_frames(1, 10)
        assert got.data == packet
        assert got.header.gso_type == NetGso.TCPV4
        assert got.header.gso_size == 1448
        assert got.header.flags & NetHdrF.NEEDS_CSUM
        assert (got.header.csum_start, got.header.csum_offset) == (34, 16)
        if nic.mergeable:
            assert got.header.num_buffers == -(-(len(packet) + 12) // 2048)


def test_without_offloads_the_kernel_segments_before_us() -> None:
    data = random.Random(3).randbytes(20_000)
    with tap_up() as tap, nic_on(tap, offloads=False) as nic, offloading_socket(tap) as wire:
        packet, header = super_frame(nic.mac, THEIRS, data)
        wire.send(header.pack()[:10] + packet)
        got = b""
        while len(got) < len(data):
            (segment,) = nic.recv_frames(1, 10)
            assert segment.header.gso_type == 0
            assert len(segment.data) <= 1514
            got += segment.data[54:]
        assert got == data


def read_ip(tap: Tap) -> bytes:
    """The next IP packet out of it. Whoever is asked for by ARP is there."""
    while True:
        wait_readable(tap)
        got = os.read(tap.fileno(), 65536)
        if got[12:14] == b"\x08\0":
            return got
        if got[12:14] == b"\x08\x06" and got[20:22] == b"\0\1":
            reply = got[14:20] + b"\0\2" + HEAD[:6] + got[38:42] + got[22:32]
            os.write(tap.fileno(), (got[6:12] + HEAD[:6] + got[12:14] + reply).ljust(60, b"\0"))


def wait_readable(tap: Tap) -> None:
    assert select.select([tap], [], [], 10)[0], "nothing came out"


# -- ping ------------------------------------------------------------------------------------------


def ping(source: bytes, destination: bytes, kind: int, number: int, payload: bytes) -> bytes:
    icmp = struct.pack(">BBHHH", kind, 0, 0, 0x1234, number) + payload
    return ipv4(1, source, destination, icmp[:2] + struct.pack(">H", checksum(icmp)) + icmp[4:])


def set_address(tap: Tap, address: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for ioctl, value in ((SIOCSIFADDR, address), (SIOCSIFNETMASK, bytes([255, 255, 255, 0]))):
            fcntl.ioctl(any_socket, ioctl, struct.pack("16sHH4s8x", tap.name.encode(), 2, 0, value))


def answer(nic: Net, packet: bytes) -> bool:
    """What a host does with ARP requests and pings for its address. True: a ping was answered."""
    kind = packet[12:14]
    if kind == b"\x08\x06" and packet[20:22] == b"\0\1" and packet[38:42] == OURS:
        reply = packet[14:20] + b"\0\2" + nic.mac + OURS + packet[22:32]
        nic.send((packet[6:12] + nic.mac + kind + reply).ljust(60, b"\0"))
    elif kind == b"\x08\0" and packet[23] == 1 and packet[30:34] == OURS and packet[34] == 8:
        (number,) = struct.unpack(">H", packet[40:42])
        end = 14 + struct.unpack(">H", packet[16:18])[0]
        nic.send(packet[6:12] + nic.mac + kind + ping(OURS, THEIRS, 0, number, packet[42:end]))
        return True
    return False


COUNT = 600


def test_the_kernel_pings_us() -> None:
    """As many as a minute of ten a second, each waited for; none may be lost."""
    with tap_up() as tap, nic_on(tap) as nic:
        set_address(tap, THEIRS)
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as prober:
            prober.settimeout(10)
            for number in range(COUNT):
                payload = random.Random(number).randbytes(56 + number % 1400)
                packet = ping(THEIRS, OURS, 8, number, payload)[20:]
                prober.sendto(packet, (socket.inet_ntoa(OURS), 0))
                while not answer(nic, nic.recv(10) or pytest.fail("the kernel's request did not come")):
                    pass
                while True:
                    got = prober.recv(65536)
                    if got[20] == 0 and got[12:16] == OURS:
                        break
                assert got[28:] == payload
                assert struct.unpack(">H", got[26:28])[0] == number
        assert nic.dropped == 0


def test_we_ping_the_kernel() -> None:
    with tap_up() as tap, nic_on(tap) as nic:
        set_address(tap, THEIRS)
        head = tap.mac + nic.mac + b"\x08\0"
        answered = 0
        for start in range(0, COUNT, 20):  # several in flight
            sent = {n: random.Random(n).randbytes(56 + n % 1400) for n in range(start, start + 20)}
            for number, payload in sent.items():
                nic.send(head + ping(OURS, THEIRS, 8, number, payload))
            while sent:
                packet = nic.recv(10)
                assert packet is not None, f"{sorted(sent)} were not answered"
                if packet[12:14] == b"\x08\0" and packet[34] == 0:
                    (number,) = struct.unpack(">H", packet[40:42])
                    assert packet[42 : 42 + len(sent[number])] == sent.pop(number)
                    assert checksum(packet[34 : 14 + struct.unpack(">H", packet[16:18])[0]]) == 0
                    answered += 1
                else:
                    answer(nic, packet)
        assert answered == COUNT


# -- pairs, backends, pumps ------------------------------------------------------------------------


def test_two_pairs_both_carry_traffic() -> None:
    with tap_up(queue_pairs=2) as tap, nic_on(tap) as nic, packet_socket(tap.name) as wire:
        for number in range(200):
            nic.send(frame(100, number), pair=number % 2)
            assert wire.recv(65536) == frame(100, number)
        # The tap chooses the queue by the flow; enough of them take both.
        seen = {0: 0, 1: 0}
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as flows:
            flows.bind((tap.name, 0))
            for port in range(64):
                udp = struct.pack(">HHHH", 1000 + port, 2000, 108, 0) + bytes(100)
                flows.send(b"\x02\0\0\0\0\x01\x02\0\0\0\0\x02\x08\0" + ipv4(17, THEIRS, OURS, udp))
        while sum(seen.values()) < 64:
            assert nic.wait(10), f"{seen} of 64 came"
            for pair in seen:
                seen[pair] += sum(one[12:14] == b"\x08\0" for one in nic.recv_batch(64, pair=pair))
        assert all(seen.values()), seen


def test_another_backend_while_it_runs() -> None:
    with tap_up() as first, tap_up() as second, nic_on(first) as nic:
        for lap, tap in enumerate((first, second, first, second)):
            if lap:
                nic.attach(tap)
            with packet_socket(tap.name) as wire:
                for number in range(100):
                    nic.send(frame(100, number))
                    assert wire.recv(65536) == frame(100, number)
                    wire.send(frame(200, number))
                    assert recv_frame(nic) == frame(200, number)
        with (
            tap_up(vnet_hdr=False) as poor,
            pytest.raises(InactiveFeature, match="does not offer CSUM"),
        ):
            nic.attach(poor)
        with packet_socket(second.name) as wire:  # and so the old one it is
            nic.send(frame(100, 1))
            assert wire.recv(65536) == frame(100, 1)


def test_frames_wait_while_there_is_no_backend() -> None:
    with tap_up() as tap, nic_on(tap) as nic, packet_socket(tap.name) as wire:
        nic.ops.set_vring_enable(1, False)
        sent = [frame(100, number) for number in range(50)]
        assert nic.send_batch(sent) == 50
        wire.settimeout(0.1)
        with pytest.raises(TimeoutError):
            wire.recv(65536)
        wire.settimeout(10)
        nic.ops.set_vring_enable(1, True)
        assert [wire.recv(65536) for _ in sent] == sent


def test_a_packet_socket_as_backend() -> None:
    """No tap and no header on the other side: the kernel takes it off and puts it on."""
    with tap_up(vnet_hdr=False) as tap, packet_socket(tap.name) as inside, VhostNet() as net:
        with Net(net, backend=inside, timeout=10) as nic:
            assert not nic.negotiated & NetF.CSUM
            nic.send(frame(100, 1))
            wait_readable(tap)
            assert os.read(tap.fileno(), 65536) == frame(100, 1)
            os.write(tap.fileno(), frame(300, 2))
            assert recv_frame(nic) == frame(300, 2)


def test_pumps_lose_nothing() -> None:
    """From one vhost-net to another, which is on a packet socket on the first one's tap; and back."""
    sent = frame(100)
    with tap_up() as tap, packet_socket(tap.name) as wire, VhostNet() as other, nic_on(tap) as near:
        with Net(other, backend=wire, timeout=10) as far:
            for source, sink in ((near, far), (far, near)):
                for first in range(0, 20_000, 100):  # as many as fit everywhere on the way
                    assert source.pump_send(sent, 100, 30, seq_at=20, seq=first) == 100
                    counts = sink.pump_recv(sent, 100, 30, seq_at=20, seq=first)
                    assert counts[:3] == (100, 0, 0), f"after {first}"
