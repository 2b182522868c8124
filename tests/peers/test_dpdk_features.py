# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Each feature that DPDK's net_vhost offers, exercised by our front-end and network driver: testpmd sends
every frame back that it gets, and each is compared.

An offered bit that no row has fails ``test_each_bit_has_an_exercise``. Where a bit has no effect that could
be seen, the row says why; that it can be acknowledged, and frames then pass, is tested for all.
"""

from __future__ import annotations

import functools
import os
import random
import re
import select
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from peers.dpdk import Testpmd
from peers.offered import Exercise, Table
from peers.support import DEADLINE, require, wait_until
from vhost import Frontend, drivers
from vhost.dirty_log import DirtyLog
from vhost.drivers.base import RING_FEATURES, Driver
from vhost.features import NetF, ProtocolF, Status, VhostF, VirtioF, bits
from vhost.user.frontend_base import WANTED
from vhost.virtio_net import NetGso, NetHdrF, NetHeader

pytestmark = pytest.mark.peer

FEATURES = Table(NetF, VirtioF, VhostF)
PROTOCOL = Table(ProtocolF)
OFFLOADS = "tso=1,legacy-ol-flags=1"
"""What makes testpmd offer segmentation, and leave to us what was left to it."""
IOMMU, POSTCOPY = "iommu-support=1", "postcopy-support=1"
"""What makes it offer these."""
THEIRS, OURS = bytes.fromhex("020000000002"), bytes.fromhex("020000000001")


class AckMore(Frontend):
    """Acknowledges ``more`` than the driver knows."""

    more = 0

    def set_features(self, features: int) -> None:
        super().set_features(features | self.more)


class ExactNet(drivers.Net):
    """Acknowledges VERSION_1 and these features, which have to be offered, and nothing else."""

    def __init__(self, ops: Frontend, features: int, **options: Any) -> None:
        self._exact = features | int(VirtioF.VERSION_1)
        super().__init__(ops, without=0, mac=OURS, **options)

    def _agree(self, features: int) -> int:
        assert not self._exact & ~self.ops.get_features()
        return self._exact


class Plain(Driver):
    """A pair of rings, of which the caller says what lies in them."""

    names = NetF

    def __init__(self, ops: Frontend, features: int, *, queue_size: int = 16) -> None:
        super().__init__(
            ops,
            packed=bool(features & VirtioF.RING_PACKED),
            num_queues=2,
            queue_size=queue_size,
            indirect_max=32,
            data_size=1 << 16,
            without=int(RING_FEATURES) & ~features,
        )
        self.view = self.memory.view(self.data_addr, 1 << 16)

    def exchange(self, frame: bytes, pieces: Sequence[int] = (), *, count: int = 1) -> None:
        """Send a frame ``count`` times at once, each in descriptors of so many bytes and one for the rest,
        header included; it has to come back as often."""
        rx, tx = self.queues
        whole = bytes(NetHeader.SIZE) + frame
        self.view[: len(whole)] = whole
        at, chain = 0, []
        for piece in (*pieces, len(whole) - sum(pieces)):
            chain.append((self.data_addr + at, piece))
            at += piece
        for i in range(1, count + 1):
            rx.add([], [(self.data_addr + i * 4096, 4096)], i)
            tx.add(chain, [], None)
        rx.kick()
        tx.kick()
        for i in range(1, count + 1):
            wait_until(lambda: rx.has_used() and tx.has_used())
            assert rx.get_used() == (i, len(whole))
            assert tx.get_used() is not None
            assert self.view[i * 4096 + NetHeader.SIZE : i * 4096 + len(whole)] == frame


@dataclass
class Peer:
    """testpmd, what it offers, and a session with it."""

    back: Testpmd
    path: Path
    session: ExitStack = field(default_factory=ExitStack)
    serial: int = 0

    def connect(self, *, more: int = 0, **options: Any) -> AckMore:
        """It has one session at a time, so this ends the one before."""
        self.session.close()
        frontend = AckMore.connect(self.path, retry=DEADLINE, timeout=DEADLINE, **options)
        assert isinstance(frontend, AckMore)
        frontend.more = more
        return self.session.enter_context(frontend)

    def net(self, *features: int, frontend: Frontend | None = None, **options: Any) -> ExactNet:
        nic = ExactNet(frontend or self.connect(), union(features), **options)
        self.session.enter_context(nic)
        for pair in range(nic.queue_pairs):
            self.wait_ready(nic, pair)
        return nic

    def plain(self, *features: int, frontend: Frontend | None = None) -> Plain:
        return self.session.enter_context(Plain(frontend or self.connect(), union(features)))

    def wait_ready(self, nic: drivers.Net, pair: int) -> None:
        """Until a frame comes back, and what was sent before it, too; what is sent early may be lost."""
        deadline = time.monotonic() + DEADLINE
        came = None
        while came is None:
            assert time.monotonic() < deadline, self.back.log()
            last = self.frame(nic)
            nic.send(last, pair=pair)
            came = nic.recv(0.2, pair=pair)
        while came != last:
            came = nic.recv(DEADLINE, pair=pair)
            assert came is not None

    def frame(self, nic: drivers.Net, size: int = 60) -> bytes:
        self.serial += 1
        return THEIRS + nic.mac + b"\x88\xb5" + random.Random(self.serial).randbytes(size - 14)

    def check(self, nic: drivers.Net) -> None:
        """Frames of all sizes, in bursts, on all pairs."""
        rng = random.Random(self.serial)
        for pair in range(nic.queue_pairs):
            for burst in (1, 7, 32):
                frames = [self.frame(nic, rng.randrange(60, 1515)) for _ in range(burst)]
                for frame in frames:
                    nic.send(frame, pair=pair)
                for frame in frames:
                    assert nic.recv(DEADLINE, pair=pair) == frame


def union(features: Sequence[int]) -> int:
    mask = 0
    for feature in features:
        mask |= int(feature)
    return mask


Peers = Callable[[str], Peer]
"""Of some options, each started once."""


def start(stack: ExitStack, path: Path, vdev: str = "") -> Peer:
    require("dpdk")
    # It would have all memory that it is given brought in at once.
    back = stack.enter_context(Testpmd.backend(path, queues=2, vdev=vdev, options=("--no-mlockall",)))
    back.command("set fwd io")
    back.command("start")
    peer = Peer(back, path)
    stack.callback(peer.session.close)
    return peer


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peers]:
    with ExitStack() as stack:
        yield functools.cache(lambda vdev: start(stack, tmp_path_factory.mktemp("dpdk") / "s", vdev))


@pytest.fixture
def peer(peers: Peers) -> Peer:
    return peers(OFFLOADS)


# -- frames ------------------------------------------------------------------------------------------


@FEATURES.of(VirtioF.VERSION_1)
def version_1(peer: Peer) -> None:
    """Nothing but it."""
    peer.check(peer.net())


@FEATURES.of(NetF.MRG_RXBUF)
def mergeable(peer: Peer) -> None:
    nic = peer.net(NetF.MRG_RXBUF, rx_buffer=256)
    frame = peer.frame(nic, 1514)
    nic.send(frame)
    (came,) = nic.recv_frames(1, DEADLINE)
    assert came.data == frame
    assert came.header.num_buffers == 6
    peer.check(nic)


@FEATURES.of(NetF.MQ)
@PROTOCOL.of(ProtocolF.MQ)
def pairs(peer: Peer) -> None:
    frontend = peer.connect()
    assert frontend.get_queue_num() >= 4
    nic = peer.net(NetF.MQ, frontend=frontend, queue_pairs=2)
    frame = peer.frame(nic)
    nic.send(frame, pair=1)
    assert nic.recv(DEADLINE, pair=1) == frame
    assert nic.recv(0, pair=0) is None
    peer.check(nic)


@FEATURES.of(NetF.CTRL_VQ, NetF.CTRL_RX, NetF.GUEST_ANNOUNCE)
def control(peer: Peer) -> None:
    """Of the control queue and of the announcements the front-end makes what it likes, with the guest's
    driver: the back-end has neither such a queue nor a configuration space. It takes the bits."""
    more = int(NetF.CTRL_VQ | NetF.CTRL_RX | NetF.GUEST_ANNOUNCE)
    peer.check(peer.net(frontend=peer.connect(more=more)))


# -- work that is left to the other side -------------------------------------------------------------


def ip(protocol: int, size: int, *, six: bool = False) -> bytes:
    """An IPv4 header with its checksum, or an IPv6 header; of ``size`` bytes of payload."""
    if six:
        return struct.pack("!IHBB", 6 << 28, size, protocol, 64) + bytes(15) + b"\1" + bytes(15) + b"\2"
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + size, 1, 0, 64, protocol, 0, b"\n\0\0\1", b"\n\0\0\2")
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:]


def fold(data: bytes) -> int:
    total = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def checksum(data: bytes) -> int:
    return fold(data) ^ 0xFFFF


def pseudo(head: bytes, protocol: int, size: int) -> bytes:
    addresses = head[12:20] if len(head) == 20 else head[8:40]
    return addresses + struct.pack("!II", size, protocol)


def segment(nic: drivers.Net, protocol: int, payload: bytes, *, six: bool = False) -> tuple[bytes, int, int]:
    """A frame whose checksum is left open, as the kernel leaves it; where the checksum starts and is."""
    if protocol == 17:
        upper, at = struct.pack("!HHHH", 9, 9, 8 + len(payload), 0), 6
    else:
        upper, at = struct.pack("!HHIIBBHHH", 9, 9, 1, 1, 5 << 4, 0x18, 1000, 0, 0), 16
    size = len(upper) + len(payload)
    head = ip(protocol, size, six=six)
    opened = struct.pack("!H", fold(pseudo(head, protocol, size)))
    ether = THEIRS + nic.mac + (b"\x86\xdd" if six else b"\x08\x00")
    return ether + head + upper[:at] + opened + upper[at + 2 :] + payload, 14 + len(head), at


def is_right(frame: bytes, start: int, protocol: int) -> bool:
    return fold(pseudo(frame[14:start], protocol, len(frame) - start) + frame[start:]) == 0xFFFF


@FEATURES.of(NetF.CSUM, NetF.GUEST_CSUM)
def open_checksums(peer: Peer) -> None:
    """Left open on the way there, and on the way back for one that takes them so; filled in for one that
    does not."""
    for features in (NetF.CSUM | NetF.GUEST_CSUM, NetF.CSUM):
        nic = peer.net(features)
        for protocol in (6, 17):
            frame, start, at = segment(nic, protocol, b"payload" * 20)
            nic.send(frame, NetHeader(NetHdrF.NEEDS_CSUM, csum_start=start, csum_offset=at))
            came = nic.recv(DEADLINE)
            assert came is not None
            assert is_right(came, start, protocol)
            assert (
                came[: start + at] + came[start + at + 2 :] == frame[: start + at] + frame[start + at + 2 :]
            )


SEGMENTS = {
    NetF.HOST_TSO4: (NetF.GUEST_TSO4, NetGso.TCPV4, 6, False),
    NetF.HOST_TSO6: (NetF.GUEST_TSO6, NetGso.TCPV6, 6, True),
    NetF.HOST_UFO: (NetF.GUEST_UFO, NetGso.UDP, 17, False),
}


def segmented(peer: Peer, host: NetF, *more: NetF, ecn: bool = False) -> None:
    """A frame that was not segmented comes back as one, and says how it would have to be. Its open checksum
    is another: DPDK prepares it as network cards want it, without the length."""
    guest, gso, protocol, six = SEGMENTS[host]
    nic = peer.net(NetF.CSUM, NetF.GUEST_CSUM, NetF.MRG_RXBUF, host, guest, *more)
    payload = random.Random(1).randbytes(9000)
    frame, start, at = segment(nic, protocol, payload, six=six)
    kind = int(gso) | (int(NetGso.ECN) if ecn else 0)
    length = start + (8 if protocol == 17 else 20)
    header = NetHeader(NetHdrF.NEEDS_CSUM, kind, length, 1400, start, at)
    nic.send(frame, header)
    (came,) = nic.recv_frames(1, DEADLINE)
    at += start
    assert came.data[:at] + came.data[at + 2 :] == frame[:at] + frame[at + 2 :]
    assert came.header.gso_type & ~NetGso.ECN == gso
    assert came.header.gso_size == 1400
    assert came.header.flags & NetHdrF.NEEDS_CSUM
    peer.check(nic)


@FEATURES.of(NetF.HOST_TSO4, NetF.GUEST_TSO4)
def tcp_over_4(peer: Peer) -> None:
    segmented(peer, NetF.HOST_TSO4)


@FEATURES.of(NetF.HOST_TSO6, NetF.GUEST_TSO6)
def tcp_over_6(peer: Peer) -> None:
    segmented(peer, NetF.HOST_TSO6)


@FEATURES.of(NetF.HOST_UFO, NetF.GUEST_UFO)
def udp(peer: Peer) -> None:
    segmented(peer, NetF.HOST_UFO)


@FEATURES.of(NetF.HOST_ECN, NetF.GUEST_ECN)
def ecn(peer: Peer) -> None:
    """It takes such segments; that they were of ECN it forgets."""
    segmented(peer, NetF.HOST_TSO4, NetF.HOST_ECN, NetF.GUEST_ECN, ecn=True)


@FEATURES.of(NetF.GSO)
def gso(peer: Peer) -> None:
    """A legacy bit that stands for those of the protocols, and that drivers of today do not know."""
    peer.check(peer.net(NetF.GSO, NetF.CSUM))


# -- rings -------------------------------------------------------------------------------------------


@FEATURES.of(VirtioF.RING_PACKED)
def packed(peer: Peer) -> None:
    peer.check(peer.net(VirtioF.RING_PACKED))
    peer.check(peer.net(VirtioF.RING_PACKED, NetF.MRG_RXBUF, queue_size=33))


@FEATURES.of(VirtioF.IN_ORDER)
def in_order(peer: Peer) -> None:
    for more in (0, int(VirtioF.RING_PACKED)):
        nic = peer.net(VirtioF.IN_ORDER, more)
        assert nic.queues[0].in_order
        peer.check(nic)


@FEATURES.of(VirtioF.ANY_LAYOUT)
def any_layout(peer: Peer) -> None:
    """The header in pieces, and with the frame's beginning."""
    nic = peer.plain()
    for pieces in ((12,), (5, 7), (1, 1, 30), (20, 3, 9)):
        frame = THEIRS + OURS + b"\x88\xb5" + random.Random(len(pieces)).randbytes(100)
        nic.exchange(frame, pieces)


@FEATURES.of(VirtioF.RING_INDIRECT_DESC)
def indirect(peer: Peer) -> None:
    """More descriptors than the ring has."""
    frame = THEIRS + OURS + b"\x88\xb5" + random.Random(1).randbytes(400)
    pieces = (12, *range(5, 15))
    with pytest.raises(BufferError):
        peer.plain().exchange(frame, pieces, count=2)
    for features in (VirtioF(0), VirtioF.RING_PACKED):
        nic = peer.plain(VirtioF.RING_INDIRECT_DESC, features)
        for _ in range(20):
            nic.exchange(frame, pieces, count=14)


@FEATURES.of(VirtioF.RING_EVENT_IDX)
def event_idx(peer: Peer) -> None:
    """It calls when it has used as many as used_event, behind the available ring, says; not before."""
    nic = peer.plain(VirtioF.RING_EVENT_IDX)
    rx = nic.queues[0]
    frame = THEIRS + OURS + b"\x88\xb5" + bytes(46)
    nic.exchange(frame)
    place = nic._places[0]
    used_event = nic.memory.view(place.addr + place.layout.avail + 4 + 2 * place.size, 2)
    rx.disable_callbacks()
    used_event[:] = struct.pack("<H", 3)  # tell of the fourth
    called = []
    for _ in range(2, 6):
        with suppress(BlockingIOError):
            os.eventfd_read(rx.call_fd)
        nic.exchange(frame)
        nic.ops.get_status()  # it had its turn
        called.append(bool(select.select([rx.call_fd], [], [], 0.05)[0]))
    assert called == [False, False, True, False]


@FEATURES.of(VhostF.PROTOCOL_FEATURES)
def rings_wait_for_enable(peer: Peer) -> None:
    frontend = peer.connect()
    nic = peer.net(frontend=frontend)
    for queue in nic.queues:
        frontend.set_vring_enable(queue.index, False)
    nic.send(peer.frame(nic))
    assert nic.recv(0.2) is None
    for queue in nic.queues:
        frontend.set_vring_enable(queue.index, True)
    peer.wait_ready(nic, 0)
    peer.check(nic)


@FEATURES.of(VhostF.LOG_ALL)
@PROTOCOL.of(ProtocolF.LOG_SHMFD)
def dirty_log(peer: Peer) -> None:
    """The page that a frame was written to is in the log, and that of the used ring."""
    for features in (VirtioF(0), VirtioF.RING_PACKED):
        nic = peer.plain(features)
        frontend = nic.ops
        assert isinstance(frontend, Frontend)
        frame = THEIRS + OURS + b"\x88\xb5" + bytes(46)
        nic.exchange(frame)
        log = DirtyLog.for_memory(nic.memory)
        frontend.start_log(log)
        log.take()
        nic.exchange(frame)
        frontend.get_status()
        place = nic._places[0]
        ring = place.addr + (place.layout.desc if features else place.layout.used)
        assert {nic.data_addr + 4096, ring // 4096 * 4096} <= set(log.take())
        frontend.stop_log()


# -- the protocol ------------------------------------------------------------------------------------


@PROTOCOL.of(ProtocolF.REPLY_ACK)
def acks(peer: Peer) -> None:
    for features, wanted in ((~0, True), (~int(ProtocolF.REPLY_ACK), False)):
        frontend = peer.connect(protocol_features=features)
        seen: list[str] = []
        frontend.session.trace = lambda way, message, seen=seen: seen.append(f"{way} {message.name}")
        peer.check(peer.net(frontend=frontend))
        assert ("recv SET_VRING_KICK" in seen) == wanted
        assert "send SET_VRING_KICK" in seen


@PROTOCOL.of(ProtocolF.STATUS)
def status(peer: Peer) -> None:
    frontend = peer.connect()
    nic = peer.net(frontend=frontend)
    wanted = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
    assert frontend.get_status() == wanted
    peer.check(nic)


@PROTOCOL.of(ProtocolF.RARP)
def rarp(peer: Peer) -> None:
    """It puts the announcement among the frames that it received from us, so it comes back like those."""
    frontend = peer.connect()
    nic = peer.net(frontend=frontend)
    mac = bytes.fromhex("525400123456")
    frontend.send_rarp(mac)
    nic.send(trailer := peer.frame(nic))
    came = [nic.recv(DEADLINE) for _ in range(2)]
    assert trailer in came
    (announced,) = (frame for frame in came if frame != trailer)
    assert announced is not None
    assert announced[:14] == b"\xff" * 6 + mac + b"\x80\x35"
    assert mac in announced[14:]


@FEATURES.of(NetF.MTU)
@PROTOCOL.of(ProtocolF.MTU)
def mtu(peer: Peer) -> None:
    """testpmd's port has it then."""
    for size in (1400, 1500):
        frontend = peer.connect(more=int(NetF.MTU))
        frontend.set_features(int(VirtioF.VERSION_1))
        frontend.net_set_mtu(size)
        nic = peer.net(frontend=frontend)
        peer.check(nic)
        assert re.search(rf"MTU: {size}\b", peer.back.command("show port info 0"))


@PROTOCOL.of(ProtocolF.BACKEND_REQ)
def backend_requests(peer: Peer) -> None:
    """Without a virtual IOMMU it has nothing to request. It takes the channel, and does without."""
    frontend = peer.connect()
    assert frontend.channel is not None
    peer.check(peer.net(frontend=frontend))
    frontend = peer.connect(protocol_features=~int(ProtocolF.BACKEND_REQ))
    assert frontend.channel is None
    peer.check(peer.net(frontend=frontend))


@FEATURES.of(VirtioF.ACCESS_PLATFORM)
def iommu(peer: Peer) -> None:
    """What is said of rings and buffers has to be looked up; page by page: test_dpdk_iommu.py. (When a ring
    is unmapped under it, 22.11 now and then stops and misses nothing, so that is not done.)"""
    for ring in (VirtioF(0), VirtioF.RING_PACKED):
        frontend = peer.connect()
        frontend.behind_iommu = True
        nic = peer.net(VirtioF.ACCESS_PLATFORM, ring, frontend=frontend)
        peer.check(nic)


@PROTOCOL.of(ProtocolF.PAGEFAULT)
def postcopy(peer: Peer) -> None:
    """Pages that nobody touched yet come when it needs them. Memory has to be told with a table."""
    frontend = peer.connect(protocol_features=int(WANTED & ~ProtocolF.CONFIGURE_MEM_SLOTS))
    pages = frontend.postcopy_advise()
    frontend.postcopy_listen()
    placed: list[int] = []
    ends = threading.Event()

    def serve() -> None:
        while not ends.is_set():
            select.select([pages], [], [], 0.01)
            for missing in pages.faults():
                if pages.place(missing.region, missing.offset, bytes(4096)):
                    placed.append(missing.offset)

    server = threading.Thread(target=serve)
    server.start()
    try:
        nic = peer.plain(frontend=frontend)
        frame = THEIRS + OURS + b"\x88\xb5" + bytes(46)
        nic.exchange(frame, count=8)
    finally:
        ends.set()
        server.join()
    first = nic.data_addr - nic.region.guest_addr
    assert set(placed) == {first + 4096 * i for i in range(1, 9)}
    frontend.postcopy_end()
    nic.exchange(frame)


@PROTOCOL.of(ProtocolF.CRYPTO_SESSION, ProtocolF.HOST_NOTIFIER, ProtocolF.BACKEND_SEND_FD)
def of_the_library_alone(peer: Peer) -> None:
    """Its library offers them for every device. A network device has no crypto sessions, and doorbells are
    those of vDPA hardware below it. They are negotiated, and nothing comes."""
    wanted = ProtocolF.CRYPTO_SESSION | ProtocolF.HOST_NOTIFIER | ProtocolF.BACKEND_SEND_FD
    frontend = peer.connect()
    assert frontend.protocol_features & wanted == wanted
    peer.check(peer.net(frontend=frontend))
    assert frontend.host_notifiers == {}


# -- the tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("vdev", ["", OFFLOADS, IOMMU, POSTCOPY])
def test_each_bit_has_an_exercise(peers: Peers, vdev: str) -> None:
    frontend = peers(vdev).connect()
    assert FEATURES.missing(frontend.offered_features) == []
    assert PROTOCOL.missing(frontend.offered_protocol_features) == []


@FEATURES.parametrize()
def test_feature(peers: Peers, bit: int, exercise: Exercise) -> None:
    peer = peers(IOMMU if exercise is iommu else OFFLOADS)
    FEATURES.run(bit, exercise, peer.connect().offered_features, peer)


@PROTOCOL.parametrize()
def test_protocol_feature(peers: Peers, bit: int, exercise: Exercise) -> None:
    peer = peers(POSTCOPY if exercise is postcopy else OFFLOADS)
    PROTOCOL.run(bit, exercise, peer.connect().offered_protocol_features, peer)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_each_feature_alone(peer: Peer, packed: bool) -> None:
    """And all of them together."""
    ring = int(VirtioF.RING_PACKED) if packed else 0
    not_alone = int(VirtioF.VERSION_1 | VhostF.LOG_ALL | VirtioF.RING_PACKED | NetF.CTRL_VQ)
    offered = peer.connect().get_features() & ~not_alone
    for mask in (*(1 << bit for bit in bits(offered)), offered):
        peer.check(peer.net(mask, ring))
