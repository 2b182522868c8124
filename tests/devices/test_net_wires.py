# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a network device is connected to: sockets, taps, another device. With the driver of ours at the
guest's end, so that what a kernel makes of a frame is not what is looked at; tests/peers has real guests."""

from __future__ import annotations

import contextlib
import os
import random
import select
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from devices.disks import serving
from devices.nets import Beyond, beyond_a_tap
from drivers.net_device import frame
from vhost.devices.net import Net
from vhost.devices.net_wires import Bridge, Drop, Echo, Packets, Source, TapWire, Wire
from vhost.drivers import Net as Driver
from vhost.features import NetF
from vhost.inprocess import InProcess
from vhost.kernel.tap import Tap
from vhost.user.frontend import Frontend
from vhost.virtio_net import NetGso, NetHdrF, NetHeader, rarp_request

pytestmark = pytest.mark.usefixtures("no_leaks")
BOTH = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
ETHERTYPE = 0x88B5
SOCKETS = {"dgram": socket.SOCK_DGRAM, "seqpacket": socket.SOCK_SEQPACKET}
KINDS = pytest.mark.parametrize("kind", SOCKETS.values(), ids=SOCKETS)

@contextlib.contextmanager
def packets(kind: int = socket.SOCK_SEQPACKET, **options: Any) -> Iterator[tuple[Net, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with ours:
        ours.settimeout(10)
        device = Net(Packets(theirs), **options)
        try:
            yield device, ours
        finally:
            device.close()


@contextlib.contextmanager
def nic_on(device: Net, **options: Any) -> Iterator[Driver]:
    with InProcess(device) as ops, Driver(ops, timeout=10, **options) as nic:
        yield nic


def recv_all(nic: Driver, count: int) -> list[bytes]:
    got: list[bytes] = []
    while len(got) < count:
        frames = nic.recv_batch(count - len(got), 10)
        assert frames, f"{len(got)} of {count} frames came"
        got += frames
    return got


# -- a socket --------------------------------------------------------------------------------------


@KINDS
@BOTH
def test_a_message_is_a_frame(kind: int, packed: bool) -> None:
    with packets(kind, mtu=9000) as (device, far), InProcess(device) as ops:
        with Driver(ops, packed=packed, mtu=9000, timeout=10) as nic:
            for size in (14, 60, 1514, 9018):
                sent = frame(size)
                nic.send(sent)
                assert far.recv(1 << 17) == sent
                far.send(sent)
                assert nic.recv(10) == sent
            assert device.dropped == 0


@KINDS
def test_bursts(kind: int) -> None:
    """More than there are buffers, or than one read brings: what is too much waits in the socket, or its
    sender does."""
    pick = random.Random(1)
    with packets(kind) as (device, far), InProcess(device) as ops:
        with Driver(ops, queue_size=32, timeout=10) as nic:
            burst = 8 if kind == socket.SOCK_DGRAM else 60  # of the former few wait
            far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            for number in range(100):
                sent = [frame(pick.randrange(14, 1515), number) for _ in range(burst)]
                for one in sent:
                    far.send(one)
                assert recv_all(nic, len(sent)) == sent
                taken = nic.send_batch(sent[:8])
                assert [far.recv(2000) for _ in range(taken)] == sent[:taken]
            assert device.dropped == 0


def test_frames_wait_while_there_is_no_driver() -> None:
    with packets() as (device, far):
        first, second = frame(100, 1), frame(100, 2)
        far.send(first)
        for sent in (first, second):
            with InProcess(device) as ops, Driver(ops, timeout=10) as nic:
                assert nic.recv(10) == sent
            far.send(second)


def test_checksums_are_finished() -> None:
    """Whoever reads a socket is not told of what is left to do; and there is nothing to segment."""
    with packets() as (device, far), InProcess(device) as ops, Driver(ops, timeout=10) as nic:
        assert nic.negotiated & NetF.CSUM
        assert not nic.negotiated & (NetF.HOST_TSO4 | NetF.GUEST_TSO4)
        sent = frame(100)
        nic.send(sent, NetHeader(NetHdrF.NEEDS_CSUM, csum_start=34, csum_offset=6))
        got = far.recv(2000)
        assert (got[:40] + got[42:], len(got)) == (sent[:40] + sent[42:], 100)
        assert got[40:42] == checksum(sent[34:]).to_bytes(2, "big")


def checksum(data: bytes) -> int:
    """RFC 1071's."""
    total = sum(int.from_bytes(data[i : i + 2].ljust(2, b"\0"), "big") for i in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF or 0xFFFF


@KINDS
def test_messages_that_are_no_frames(kind: int) -> None:
    with packets(kind, mtu=1500) as (device, far), InProcess(device) as ops:
        with Driver(ops, mtu=9000, timeout=10) as nic:
            far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            for junk in (b"", b"x", bytes(13), bytes(1519), bytes(65555), bytes(100000)):
                far.send(junk)
            sent = frame(60)
            far.send(sent)
            assert nic.recv(10) == sent
            counters = device.counters()
            assert (counters["dropped_short"], counters["dropped_mtu"], counters["dropped_long"]) == (3, 1, 2)
            assert device.dropped == 6


def test_nobody_reads() -> None:
    """What the socket has no room for is dropped: the driver is not kept waiting."""
    with packets() as (device, far), InProcess(device) as ops, Driver(ops, timeout=10) as nic:
        for _ in range(30):
            nic.send_batch([frame(1514)] * 200)
            nic.flush(10)
        sent = device.counters()["tx_frames"]
        assert sent > 1000
        assert 0 < device.counters()["dropped_wire"] == device.dropped < sent
        far.setblocking(False)
        came = 0
        with contextlib.suppress(BlockingIOError):
            while far.recv(2000):
                came += 1
        assert came == sent - device.dropped
        nic.send(frame(60))
        assert select.select([far], [], [], 10)[0]


@KINDS
def test_the_other_end_is_gone(kind: int) -> None:
    with packets(kind) as (device, far), InProcess(device) as ops, Driver(ops, timeout=10) as nic:
        sent = frame(60)
        far.send(sent)
        assert nic.recv(10) == sent
        far.close()
        for _ in range(10):
            nic.send(frame(60))
        nic.flush(10)
        assert device.counters()["dropped_wire"] == device.dropped == 10
        before = os.times()
        assert nic.recv(0.3) is None
        after = os.times()
        assert after.user + after.system - before.user - before.system < 0.2  # nobody looks without end


def test_which_sockets() -> None:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with a, b, pytest.raises(ValueError, match="SOCK_STREAM: must"):
        Packets(a)
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with a, b, pytest.raises(ValueError, match="2 pairs"):
        Net(Packets(a), queue_pairs=2)


# -- a tap -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def tap(**options: Any) -> Iterator[tuple[Tap, Beyond]]:
    """And what is beyond it: all that it sends is received there, and the other way."""
    with beyond_a_tap(**options) as far:
        yield far.tap, far


@BOTH
@pytest.mark.parametrize("mergeable", [False, True], ids=["one buffer", "mergeable"])
def test_a_tap(packed: bool, mergeable: bool) -> None:
    with tap() as (it, far):
        device = Net(TapWire(it), mtu=9000)
        without = 0 if mergeable else int(NetF.MRG_RXBUF)
        with nic_on(device, packed=packed, mtu=9000, without=without) as nic:
            assert nic.negotiated & NetF.HOST_TSO4
            for number in range(20):
                for size in (60, 1514, 9014):
                    sent = frame(size, number)
                    nic.send(sent)
                    assert far.recv(1 << 16) == sent
                    far.send(sent)
                    assert nic.recv(10) == sent
            assert device.dropped == 0
        device.close()


def test_an_interface_that_is_down() -> None:
    with tap() as (it, far):
        device = Net(TapWire(it))
        with InProcess(device) as ops, Driver(ops, timeout=10) as nic:
            it.down()
            nic.send(frame(60))
            nic.flush(10)
            assert device.counters()["dropped_wire"] == device.dropped == 1
            it.up()
            with pytest.raises(OSError, match="down"):
                far.recv(2000)  # says so once
            sent = frame(60)
            nic.send(sent)
            assert far.recv(2000) == sent
        device.close()


def test_several_queues_of_a_tap() -> None:
    """Only those take part that have a receive queue; so nothing is sent to where nobody looks."""
    with tap(queue_pairs=3) as (it, far):
        device = Net(TapWire(it), queue_pairs=3)
        for pairs in (3, 1, 2):
            with InProcess(device) as ops, Driver(ops, queue_pairs=pairs, timeout=10) as nic:
                for number in range(100):
                    sent = frame(60, number)
                    nic.send(sent, pair=number % pairs)
                    assert far.recv(2000) == sent
                    far.send(sent)
                    assert nic.recv(10) == sent
        assert device.dropped == 0
        device.close()


def test_a_tap_that_is_deleted() -> None:
    """While its rings run: they stop all the same, and whoever comes next is told."""
    if shutil.which("ip") is None:
        pytest.skip("needs ip (package iproute2)")
    with tap(queue_pairs=3) as (it, far):
        device = Net(TapWire(it), queue_pairs=3)
        with InProcess(device) as ops, Driver(ops, queue_pairs=3, timeout=10) as nic:
            sent = frame(60)
            nic.send(sent)
            assert far.recv(2000) == sent
            subprocess.run(["ip", "link", "delete", it.name], check=True)
            for pair in range(3):
                nic.send(sent, pair=pair)
            nic.flush(10)
            assert device.counters()["dropped_wire"] == device.dropped == 3
            before = os.times()
            assert nic.recv(0.3) is None
            after = os.times()
            assert after.user + after.system - before.user - before.system < 0.2
        with InProcess(device) as ops, pytest.raises(OSError, match=it.name), Driver(ops, queue_pairs=3):
            pass
        assert not device._served
        device.close()


def test_taps_that_do_not_fit() -> None:
    with tap() as (it, _), pytest.raises(ValueError, match="2 pairs of queues, and a tap with 1"):
        Net(TapWire(it), queue_pairs=2)
    with tap(vnet_hdr=False) as (it, _), pytest.raises(ValueError, match="no virtio-net header"):
        TapWire(it)


# -- two devices -----------------------------------------------------------------------------------


@contextlib.contextmanager
def bridged(*, threads: int = 1, **options: Any) -> Iterator[tuple[Net, Net]]:
    bridge = Bridge(threads=threads)
    devices = (Net(bridge.ends[0], **options), Net(bridge.ends[1], **options))
    try:
        yield devices
    finally:
        for device in devices:
            device.close()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("packed", [(False, False), (True, True), (False, True)])
def test_bridge(packed: tuple[bool, bool], threads: int) -> None:
    with (
        bridged(threads=threads, queue_pairs=threads) as devices,
        nic_on(devices[0], packed=packed[0], queue_pairs=threads) as a,
        nic_on(devices[1], packed=packed[1], queue_pairs=threads) as b,
    ):
        for number in range(100):
            sent = [frame(random.randrange(14, 1515), number) for _ in range(50)]
            back = [frame(random.randrange(14, 1515), number) for _ in range(50)]
            for pair in range(threads):
                assert a.send_batch(sent, pair=pair) == b.send_batch(back, pair=pair) == 50
                assert recv_all(b, 50) == sent
                assert recv_all(a, 50) == back
        assert [device.dropped for device in devices] == [0, 0]


def test_bridge_to_nobody() -> None:
    """Counted where it would have been received; the sender is not kept waiting."""
    with bridged() as (one, other), nic_on(one) as a:
        for number in range(3):
            before = other.dropped
            for _ in range(20):
                a.send(frame(60))
            a.flush(10)
            assert other.counters()["dropped_stopped"] == other.dropped == before + 20
            with nic_on(other, packed=bool(number % 2)) as b:
                sent = frame(60)
                a.send(sent)
                assert b.recv(10) == sent
                b.send(sent)
                assert a.recv(10) == sent


def test_bridge_to_one_who_does_not_read() -> None:
    with bridged() as (one, other), nic_on(one) as a, nic_on(other, queue_size=16) as b:
        for _ in range(20):
            for _ in range(10):
                a.send(frame(60))
            a.flush(10)
        counters = other.counters()
        assert counters["rx_frames"] == 16
        assert counters["dropped_no_buffer"] == other.dropped == 200 - 16
        assert len(recv_all(b, 16)) == 16
        sent = frame(61)
        a.send(sent)
        assert b.recv(10) == sent


@pytest.mark.parametrize("used", [(1, 3), (3, 1), (2, 3)])
def test_bridge_of_drivers_that_use_not_all_pairs(used: tuple[int, int]) -> None:
    with (
        bridged(queue_pairs=3) as devices,
        nic_on(devices[0], queue_pairs=used[0]) as a,
        nic_on(devices[1], queue_pairs=used[1]) as b,
    ):
        for here, there, pairs in ((a, b, used[0]), (b, a, used[1])):
            for number in range(30):
                sent = frame(60, number)
                here.send(sent, pair=number % pairs)
                assert there.recv(10) == sent
        assert [device.dropped for device in devices] == [0, 0]


def test_what_bridged_drivers_leave_to_each_other() -> None:
    open_csum = NetHeader(NetHdrF.NEEDS_CSUM, csum_start=34, csum_offset=16)
    big = frame(30000)
    segments = NetHeader(
        NetHdrF.NEEDS_CSUM, NetGso.TCPV4, hdr_len=54, gso_size=1448, csum_start=34, csum_offset=16
    )
    with bridged() as (one, other), nic_on(one) as a:
        with nic_on(other) as b:
            for sent, header in ((frame(100), open_csum), (big, segments)):
                a.send(sent, header)
                (got,) = b.recv_frames(1, 10)
                assert got.data == sent
                assert (got.header.flags, got.header.gso_type) == (header.flags, header.gso_type)
                assert (got.header.gso_size, got.header.csum_start) == (header.gso_size, 34)
        with nic_on(other, offloads=False) as b:
            sent = frame(100)
            a.send(sent, open_csum)
            (got,) = b.recv_frames(1, 10)
            assert got.header.flags == 0
            assert got.data[50:52] == checksum(sent[34:]).to_bytes(2, "big")


def test_bridge_over_sockets_while_one_comes_and_goes(tmp_path: Path) -> None:
    """What a driver negotiates anew is no business of the other's, whose frames go on."""
    with (
        bridged() as (one, other),
        serving(one, tmp_path / "a"),
        serving(other, tmp_path / "b") as server,
        Frontend.connect(tmp_path / "a") as frontend,
        Driver(frontend, timeout=10) as a,
    ):
        for number in range(40):
            a.send_batch([frame(60)] * 100)  # some are on their way when the other begins
            with server.connect() as far, Driver(far, packed=bool(number % 2), timeout=10) as b:
                sent = frame(100, number)
                a.send(sent)
                while (got := b.recv(10)) != sent:
                    assert got is not None and len(got) == 60
                b.send(sent)
                assert a.recv(10) == sent


def test_bridges_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="threads 0"):
        Bridge(threads=0)
    bridge = Bridge()
    Net(bridge.ends[0], queue_pairs=2)
    with pytest.raises(ValueError, match="has, or had, a device"):
        Net(bridge.ends[0], queue_pairs=2)
    with pytest.raises(ValueError, match="the bridge's other device has 2"):
        Net(bridge.ends[1])
    with pytest.raises(ValueError, match="a bridge has its own"):
        Net(bridge.ends[1], queue_pairs=2, threads=2)


# -- what a device says in its driver's name -------------------------------------------------------


def test_rarp_over_each_wire(tmp_path: Path) -> None:
    mac = bytes.fromhex("525400abcdef")
    with packets() as (device, far), serving(device, tmp_path / "s") as server, server.connect() as frontend:
        frontend.send_rarp(mac)
        assert far.recv(2000) == rarp_request(mac)
    with tap() as (it, far):
        device = Net(TapWire(it))
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x8035)) as listener:
            listener.bind((it.name, 0x8035))
            listener.settimeout(10)
            device.send_rarp(mac)
            assert listener.recv(2000) == rarp_request(mac)
        device.close()
    with bridged() as (one, other):
        one.send_rarp(mac)  # there is nobody
        with nic_on(other) as nic:
            for _ in range(100):
                one.send_rarp(mac)
                assert nic.recv(10) == rarp_request(mac)
    for wire in (Drop(), Echo(), Source(60)):
        device = Net(wire)
        device.send_rarp(mac)
        device.close()


def test_rarp_is_one() -> None:
    mac = bytes.fromhex("525400abcdef")
    arp = bytes.fromhex("000108000604 0003") + mac + bytes(4) + mac + bytes(4)
    assert rarp_request(mac) == b"\xff" * 6 + mac + b"\x80\x35" + arp + bytes(18)


@BOTH
def test_frames_from_elsewhere_under_load(packed: bool) -> None:
    """Another thread gives the driver frames, into buffers that the worker uses at the same time."""
    with bridged() as (one, other), nic_on(one) as a, nic_on(other, packed=packed, queue_size=1024) as b:
        extra = [b"\xff" * 6 + frame(60, number)[6:] for number in range(300)]
        thread = threading.Thread(target=lambda: [other.deliver(one) for one in extra])
        thread.start()
        sent, got = [], []
        for number in range(300):
            burst = [frame(100, number)] * 10
            sent += burst[: a.send_batch(burst)]
            while len(got) < len(sent):
                got += b.recv_batch(64, 10)
        thread.join()
        while len(got) < len(sent) + len(extra):
            got += b.recv_batch(64, 10)
        assert [one for one in got if one[0] != 0xFF] == sent
        assert [one for one in got if one[0] == 0xFF] == extra
        assert other.dropped == 0


def test_frames_from_elsewhere_keep_off_a_queue_that_is_held() -> None:
    """Whoever holds it changes what it translates with, in the session's thread."""
    with bridged() as (_, other), nic_on(other) as nic:
        (queue,) = (queue for queue in other._served if not queue.index % 2)
        for number in range(5):
            assert other.hold_queue(queue)
            assert other.hold_queue(queue)
            sent = frame(60, number)
            thread = threading.Thread(target=other.deliver, args=(sent,))
            thread.start()
            thread.join(0.1)
            other.release_queue(queue, False)
            assert thread.is_alive()
            assert nic.recv(0) is None
            other.release_queue(queue, False)
            thread.join(10)
            assert nic.recv(10) == sent


def test_frames_from_elsewhere_that_nobody_takes() -> None:
    with bridged() as (one, _):
        assert not one.deliver(bytes(60))
        with nic_on(one, queue_size=2) as nic:
            for size in (13, 65555):
                with pytest.raises(ValueError, match=f"frame of {size} bytes"):
                    one.deliver(bytes(size))
            for _ in range(5):
                assert one.deliver(bytes(60))
            assert one.counters()["dropped_no_buffer"] == 3
            assert recv_all(nic, 2) == [bytes(60)] * 2
            assert one.deliver(bytes(61))
            assert nic.recv(10) == bytes(61)


def test_a_wire_is_connected_before_it_is_served() -> None:
    with bridged() as (one, _), nic_on(one):
        pair = one.pairs[0]
        for change in (lambda: pair.connect(pair), pair.disconnect, lambda: pair.repeat(bytes(60))):
            with pytest.raises(ValueError, match="attached"):
                change()
    assert isinstance(one.wire, Wire)
