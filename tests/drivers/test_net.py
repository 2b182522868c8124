# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The network driver, on a device that echoes and on one that lies; in one process and over vhost-user."""

from __future__ import annotations

import contextlib
import os
import select
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.disks import serving
from drivers.net_device import MAC, OFFLOADS, EchoNet, frame
from vhost.drivers import Net, NetError
from vhost.drivers.net_control import NetControlError
from vhost.errors import InactiveFeature, ReplyTimeout
from vhost.features import NetF, VirtioF
from vhost.inprocess import InProcess
from vhost.user.frontend import Frontend
from vhost.virtio_net import NetGso, NetHdrF, NetHeader

pytestmark = pytest.mark.usefixtures("no_leaks")
BOTH = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


@contextlib.contextmanager
def nic_on(device: EchoNet, **options: Any) -> Iterator[Net]:
    with InProcess(device) as ops, Net(ops, timeout=10, **options) as nic:
        yield nic


def recv_all(nic: Net, count: int) -> list[bytes]:
    got: list[bytes] = []
    while len(got) < count:
        frames = nic.recv_batch(count - len(got), 10)
        assert frames, f"{len(got)} of {count} frames came"
        got += frames
    return got


@BOTH
@pytest.mark.parametrize("mergeable", [False, True])
def test_frames_come_back_as_they_were(packed: bool, mergeable: bool) -> None:
    device = EchoNet(features=int(NetF.MRG_RXBUF) if mergeable else 0, mtu=9000)
    with nic_on(device, packed=packed, mtu=9000) as nic:
        assert (nic.packed, nic.mergeable, nic.mtu, nic.mac) == (packed, mergeable, 9000, MAC)
        assert nic.link_up
        for size in (14, 15, 60, 64, 1514, 2036, 2037, 4084, 9014, 9018):
            sent = frame(size)
            nic.send(sent)
            assert nic.recv(10) == sent, size
        assert [len(data) for _, _, data in device.seen][-1] == 9018
        assert all(header == bytes(12) for _, header, _ in device.seen)
        assert nic.recv(0) is None
        for size in (0, 13, nic.longest + 1):
            with pytest.raises(ValueError, match="must be 14 to"):
                nic.send(bytes(size))


@BOTH
def test_over_vhost_user(tmp_path: Path, packed: bool) -> None:
    with (
        serving(EchoNet(), tmp_path / "s"),
        Frontend.connect(tmp_path / "s") as frontend,
        Net(frontend, packed=packed, timeout=10) as nic,
    ):
        for start in range(0, 2000, 100):
            sent = [frame(60 + i, i) for i in range(start, start + 100)]
            assert nic.send_batch(sent) == 100
            assert recv_all(nic, 100) == sent


@BOTH
def test_nothing_is_lost_over_many_laps(packed: bool) -> None:
    """Bursts of odd sizes through a small ring; send_batch says how many it took, and exactly those come."""
    device = EchoNet()
    with nic_on(device, packed=packed, queue_size=16) as nic:
        number = 0
        for burst in (1, 3, 7, 16, 15, 2) * 40:
            sent = [frame(60 + number % 1000, number + i) for i in range(burst)]
            taken = nic.send_batch(sent)
            assert taken > 0
            assert recv_all(nic, taken) == sent[:taken]
            number += taken
        assert device.lost == 0
        nic.flush(10)


def test_a_full_ring_waits_and_says_so() -> None:
    device = EchoNet()
    device.paused = True
    with InProcess(device) as ops, Net(ops, timeout=0.05, queue_size=8) as nic:
        assert nic.send_batch([frame(60)] * 20) == 8
        assert nic.send_batch([frame(60)]) == 0
        with pytest.raises(ReplyTimeout, match=r"net\[1\]: the device took no frame within 0.05 s"):
            nic.send(frame(60))
        with pytest.raises(ReplyTimeout, match="8 frames not taken"):
            nic.flush(0.05)


def test_a_waiting_receiver_is_woken() -> None:
    with nic_on(EchoNet()) as nic:
        assert nic.recv(0.01) is None
        assert nic.recv_batch(4, 0.01) == []
        got: list[bytes | None] = []
        thread = threading.Thread(target=lambda: got.append(nic.recv(10)))
        thread.start()
        nic.send(frame(99))
        thread.join()
        assert got[0] is not None
        assert len(got[0]) == 99


def test_fileno_says_when_to_look() -> None:
    with nic_on(EchoNet()) as nic:
        for _ in range(3):
            while nic.recv_batch():
                pass
            assert not select.select([nic], [], [], 0)[0]
            nic.send(frame(60))
            assert select.select([nic], [], [], 10)[0]
            assert nic.recv(0) is not None


@BOTH
def test_segments_and_checksums_are_left_to_the_other_side(packed: bool) -> None:
    device = EchoNet()
    with nic_on(device, packed=packed) as nic:
        sent = frame(65550)
        header = NetHeader(NetHdrF.NEEDS_CSUM, NetGso.TCPV4, 54, 1448, 34, 16)
        nic.send(sent, header)
        (got,) = nic.recv_frames(1, 10)
        assert got.data == sent
        assert got.header.num_buffers == -(-(65550 + 12) // 2048)
        assert got.header.pack()[:10] == header.pack()[:10] == device.seen[0][1][:10]
        assert device.seen[0][1][10:] == b"\0\0"


@pytest.mark.parametrize("size", [100, 101])
def test_an_open_checksum_is_filled_in(size: int) -> None:
    with nic_on(EchoNet()) as nic:
        sent = bytearray(frame(size))
        sent[40:42] = b"\x12\x34"
        nic.send(sent, NetHeader(NetHdrF.NEEDS_CSUM, csum_start=34, csum_offset=6))
        got = nic.recv(10)
        assert got is not None
        # 5.1.6: the ones' complement of the ones' complement sum, in which the field itself takes part.
        part = bytes(sent[34:]) + b"\0" * (size % 2)
        total = sum(struct.unpack(f">{len(part) // 2}H", part))
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        assert got[40:42] == struct.pack(">H", ~total & 0xFFFF)
        assert got[:40] + got[42:] == bytes(sent[:40] + sent[42:])


@pytest.mark.parametrize(
    ("features", "header", "error"),
    [
        (OFFLOADS, NetHeader(gso_type=NetGso.TCPV4), ValueError),
        (OFFLOADS, NetHeader(NetHdrF.NEEDS_CSUM, NetGso.UDP), InactiveFeature),
        (OFFLOADS, NetHeader(NetHdrF.NEEDS_CSUM, NetGso.TCPV4 | NetGso.ECN), InactiveFeature),
        (0, NetHeader(NetHdrF.NEEDS_CSUM), InactiveFeature),
        (int(NetF.HOST_TSO4), NetHeader(NetHdrF.NEEDS_CSUM, NetGso.TCPV4), InactiveFeature),
    ],
)
def test_headers_that_were_not_negotiated(features: int, header: NetHeader, error: type[Exception]) -> None:
    with nic_on(EchoNet(features=features)) as nic:
        with pytest.raises(error):
            nic.send(frame(60), header)
        with pytest.raises(error):
            nic.send_batch([frame(60)], [header])


def test_features_without_what_they_need_are_not_taken() -> None:
    device = EchoNet(features=int(NetF.HOST_TSO4 | NetF.HOST_ECN | NetF.GUEST_TSO6 | NetF.GUEST_ECN))
    with nic_on(device) as nic:
        assert nic.negotiated & OFFLOADS == 0
    device = EchoNet(features=OFFLOADS)
    with nic_on(device, offloads=False) as nic:
        assert nic.negotiated & OFFLOADS == 0


def test_big_buffers_without_mergeable_ones() -> None:
    with nic_on(EchoNet(features=OFFLOADS), queue_size=16) as nic:
        assert not nic.mergeable
        sent = frame(65550)
        nic.send(sent)
        assert nic.recv(10) == sent


def test_a_legacy_header_has_10_bytes() -> None:
    device = EchoNet(features=0, rings=0)
    with nic_on(device) as nic:
        assert not nic.negotiated & VirtioF.VERSION_1
        sent = frame(77)
        nic.send(sent)
        assert nic.recv(10) == sent
        assert device.seen == [(1, bytes(10), sent)]


# -- a device that lies ----------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("count", "first", "what"),
    [
        (2, None, "num_buffers beyond the buffers that were used with it: 2, limit 1"),
        (17, None, "num_buffers beyond the buffers that were used with it: 17, limit 16"),
        (0xFFFF, None, "num_buffers .*: 65535, limit 16"),
        (None, 0, "fewer bytes than a frame with its header has: 0, limit 26"),
        (None, 11, "fewer bytes .*: 11, limit 26"),
        (None, 25, "fewer bytes .*: 25, limit 26"),
    ],
)
def test_spoiled_frames_are_dropped_and_the_next_one_comes(
    packed: bool, count: int | None, first: int | None, what: str
) -> None:
    device = EchoNet()
    with nic_on(device, packed=packed, queue_size=16) as nic:
        for lap in range(40):  # more than twice the ring: no buffer is lost by it
            good, bad, after = (frame(60 + lap, i) for i in range(3))
            device.spoil = lambda header, data, bad=bad: (count, first) if data == bad else (None, None)  # type: ignore[misc]
            nic.send_batch([good])
            assert recv_all(nic, 1) == [good]
            nic.send(bad)
            with pytest.raises(NetError, match=what):
                nic.recv(10)
            nic.send(after)
            assert nic.recv(10) == after
        assert nic.dropped == 40


def test_frames_before_a_spoiled_one_come_first() -> None:
    device = EchoNet()
    device.spoil = lambda header, data: (None, 5 if data[14] == 2 else None)
    with nic_on(device) as nic:
        sent = [frame(60, i) for i in range(4)]
        nic.send_batch(sent)
        nic.flush(10)
        assert nic.recv_batch() == sent[:2]
        with pytest.raises(NetError):
            nic.recv_batch()
        assert nic.recv_batch() == sent[3:]


def test_num_buffers_of_0_is_one() -> None:
    """As some devices write it when a frame is in one buffer."""
    device = EchoNet()
    device.spoil = lambda header, data: (0, None)
    with nic_on(device) as nic:
        nic.send(frame(60))
        assert nic.recv(10) is not None


def test_a_checksum_outside_the_frame() -> None:
    with nic_on(EchoNet()) as nic:
        nic.send(frame(60), NetHeader(NetHdrF.NEEDS_CSUM, csum_start=50, csum_offset=8))
        assert nic.recv(10) is not None
        nic.send(frame(60), NetHeader(NetHdrF.NEEDS_CSUM, csum_start=50, csum_offset=9))
        with pytest.raises(NetError, match="outside the frame: 61, limit 60"):
            nic.recv(10)
        nic.send(frame(60), NetHeader(NetHdrF.NEEDS_CSUM, csum_start=0xFFFF, csum_offset=0xFFFF))
        with pytest.raises(NetError, match="outside the frame: 131072"):
            nic.recv(10)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(14, 9018), st.sampled_from([None, 0, 1, 2, 300]), st.integers(0, 40)),
        max_size=20,
    ),
    st.booleans(),
)
def test_whatever_it_says_good_frames_come_through(
    script: list[tuple[int, int | None, int]], packed: bool
) -> None:
    """Truth and lies in any order: what is not spoiled arrives whole, in order, and the ring stays whole."""
    device = EchoNet(mtu=9000)
    lies = iter(script)

    def spoil(header: bytes, data: bytes) -> tuple[int | None, int | None]:
        _, count, first = next(lies, (0, None, 40))
        return count, first if first < 26 else None

    device.spoil = spoil
    with nic_on(device, packed=packed, mtu=9000, queue_size=16) as nic:
        for number, (size, count, first) in enumerate(script):
            sent = frame(size, number)
            nic.send(sent)
            true_count = -(-(size + 12) // 2048)
            said = 1 if count == 0 else true_count if count is None else count
            if first < 26 or said != true_count:
                with pytest.raises(NetError):
                    while (got := nic.recv(10)) is not None:
                        assert len(got) < size, "a frame cut short is what too few buffers make of it"
            else:
                assert nic.recv(10) == sent
            while True:  # buffers that no frame claims look like frames of their own
                try:
                    if nic.recv(0) is None:
                        break
                except NetError:
                    continue
        device.spoil = None
        for _ in range(40):
            sent = frame(100)
            nic.send(sent)
            assert nic.recv(10) == sent


# -- pairs and the control queue -------------------------------------------------------------------


def test_pairs_and_commands() -> None:
    device = EchoNet(pairs=4, control=True)
    with nic_on(device, queue_pairs=2) as nic:
        assert [queue.index for queue in nic.queues] == [0, 1, 2, 3, 8]
        assert device.commands == [(4, 0, b"\x02\0")]
        sent = [frame(60, i) for i in range(20)]
        for i, one in enumerate(sent):
            nic.send(one, pair=i % 2)
        got: list[bytes] = []
        while len(got) < 20:
            one = nic.recv(10)
            assert one is not None
            got.append(one)
        assert sorted(got) == sorted(sent)
        assert [index for index, _, _ in device.seen].count(3) == 10
        nic.send(sent[0], pair=1)
        assert nic.recv(0.05, pair=0) is None
        assert nic.recv(10, pair=1) == sent[0]
        assert nic.recv_batch(5, 0.01) == []
        nic.set_promiscuous(True)
        nic.set_allmulti(False)
        nic.set_mac(b"\x02abcde")
        assert nic.mac == b"\x02abcde"
        assert device.commands[1:] == [(0, 0, b"\1"), (0, 1, b"\0"), (1, 1, b"\x02abcde")]
        device.refuse = True
        with pytest.raises(NetControlError, match=r"net\[8\]: RX command 0 \(00\): refused"):
            nic.set_promiscuous(False)


def test_more_pairs_than_there_are() -> None:
    with pytest.raises(InactiveFeature, match="1 pairs of queues, not 2"), nic_on(EchoNet(), queue_pairs=2):
        pass
    with nic_on(EchoNet()) as nic, pytest.raises(InactiveFeature, match="does not offer CTRL_RX"):
        nic.set_promiscuous(True)


def test_a_backend_for_an_ops_that_takes_none() -> None:
    with InProcess(EchoNet()) as ops, pytest.raises(TypeError, match="InProcess takes no backend"):
        Net(ops, backend=3)


# -- pumps -----------------------------------------------------------------------------------------


@BOTH
def test_pumps_count_every_frame(packed: bool) -> None:
    with nic_on(EchoNet(), packed=packed) as nic:
        sent = frame(100)
        for first in range(0, 5000, 100):  # fewer than the rings have: the device drops what does not fit
            assert nic.pump_send(sent, 100, 10, seq_at=20, seq=first) == 100
            assert nic.pump_recv(sent, 100, 10, seq_at=20, seq=first) == (100, 0, 0, 0)


def test_pumps_see_what_is_wrong() -> None:
    with nic_on(EchoNet(), rx_buffer=64) as nic:  # the frame lies in four buffers
        sent = bytearray(frame(200))
        for seq in (0, 1, 5, 5, 3, 6):
            sent[52:60] = struct.pack("<Q", seq)  # across a border
            nic.send(sent)
        sent[199] ^= 1
        nic.send(sent)
        sent[199] ^= 1
        nic.send(sent[:199])
        nic.flush(10)
        assert nic.pump_recv(sent, None, 0.2, seq_at=52) == (6, 3, 2, 2)


def test_pumps_end() -> None:
    device = EchoNet()
    device.paused = True
    with nic_on(device, queue_size=8) as nic:
        assert nic.pump_send(frame(60), 100, 0.05) == 8
        assert nic.pump_recv(frame(60), 1, 0.05).frames == 0
        for seq_at in (53, -1):
            with pytest.raises(ValueError, match="sequence number"):
                nic.pump_send(frame(60), 1, seq_at=seq_at)
        with pytest.raises(ValueError, match="must be 14 to"):
            nic.pump_send(bytes(nic.longest + 1), 1)


def test_one_thread_at_a_time() -> None:
    sent = frame(60)
    with nic_on(EchoNet()) as nic:
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(nic.pump_recv(sent, 1, 10)))
        thread.start()
        with pytest.raises(RuntimeError, match=r"net\[0\]: another thread receives"):
            while thread.is_alive():
                assert nic.recv(0) is None
        for call in (nic._rx[0].fill, lambda: nic.recv_frames(1), lambda: nic.pump_recv(sent, 1, 0)):
            with pytest.raises(RuntimeError, match=r"net\[0\]: another thread receives"):
                call()
        nic.send(sent)
        thread.join()
        assert results == [(1, 0, 0, 0)]
        assert nic.recv(0) is None
        assert nic.queues[0].broken is None


def test_a_ring_is_filled_once() -> None:
    with nic_on(EchoNet(), queue_size=8) as nic:
        for _ in range(3):
            with pytest.raises(OSError, match=r"net\[0\]: .*busy"):
                nic._rx[0].fill()
        for number in range(20):
            sent = [frame(60, number)] * 8
            assert nic.send_batch(sent) == 8
            assert recv_all(nic, 8) == sent


def test_one_thread_at_a_time_sends() -> None:
    device = EchoNet()
    device.paused = True
    with nic_on(device, queue_size=8) as nic:
        results: list[int] = []
        thread = threading.Thread(target=lambda: results.append(nic.pump_send(frame(60), 9, 10)))
        thread.start()
        while nic._tx[0].free:
            pass
        one = [frame(60)]
        for call in (nic.flush, nic._tx[0].reap, lambda: nic.send(*one), lambda: nic.send_batch(one)):
            with pytest.raises(RuntimeError, match=r"net\[1\]: another thread sends"):
                call()
        device.paused = False
        os.eventfd_write(nic.queues[1].kick_fd, 1)
        thread.join()
        assert results == [9]
        nic.flush(10)
