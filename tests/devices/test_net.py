# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The network device, with the driver of ours at its other end: what it says of itself, what passes, what is
dropped, and how it counts. Chains that no honest driver makes are tests/c/test_net.c's."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fds
from devices.disks import serving, wait_for
from drivers.net_device import frame
from rig import error_event
from vhost.devices.net import Net, random_mac
from vhost.devices.net_wires import Drop, Echo, Source, Wire
from vhost.drivers import Net as Driver
from vhost.errors import VhostError
from vhost.features import NetF, VirtioF
from vhost.inprocess import InProcess
from vhost.user.frontend import Frontend
from vhost.virtio_net import NetConfig, NetHdrF, NetHeader, NetStatus

pytestmark = pytest.mark.usefixtures("no_leaks")
BOTH = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
MAC = bytes.fromhex("525400123456")


@contextlib.contextmanager
def nic_on(device: Net, **options: Any) -> Iterator[Driver]:
    try:
        with InProcess(device) as ops, Driver(ops, timeout=10, **options) as nic:
            yield nic
    finally:
        device.close()


def recv_all(nic: Driver, count: int) -> list[bytes]:
    got: list[bytes] = []
    while len(got) < count:
        frames = nic.recv_batch(count - len(got), 10)
        assert frames, f"{len(got)} of {count} frames came"
        got += frames
    return got


# -- what it says of itself ------------------------------------------------------------------------


def test_config_and_features() -> None:
    for wire, mtu, pairs in itertools.product((Drop(), Echo(), Source(60)), (None, 9000), (1, 3)):
        device = Net(wire, mac=MAC, mtu=mtu, queue_pairs=pairs)
        config = NetConfig.unpack(device.config)
        want = NetConfig(MAC, status=int(NetStatus.LINK_UP), max_virtqueue_pairs=pairs, mtu=mtu or 65535)
        assert config == want
        offered = device.offered_features()
        for feature, there in (
            (NetF.MAC | NetF.STATUS | NetF.MRG_RXBUF | NetF.CSUM | NetF.GUEST_CSUM, True),
            (VirtioF.VERSION_1 | VirtioF.RING_PACKED | VirtioF.RING_INDIRECT_DESC | VirtioF.IN_ORDER, True),
            (NetF.MTU, mtu is not None),
            (NetF.MQ, pairs > 1),
        ):
            assert offered & feature == (feature if there else 0), feature
        device.close()


def test_addresses_are_random() -> None:
    macs = {random_mac() for _ in range(20)}
    assert len(macs) == 20
    assert all(mac[0] & 3 == 2 for mac in macs)


def test_over_vhost_user_it_counts_pairs(tmp_path: Path) -> None:
    """As QEMU and DPDK do: queues=N is compared with what GET_QUEUE_NUM says."""
    with serving(Net(Echo(), queue_pairs=3), tmp_path / "s") as server, server.connect() as frontend:
        assert frontend.get_queue_num() == 3


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"queue_pairs": 0}, "queue_pairs 0"),
        ({"queue_pairs": 129}, "queue_pairs 129"),
        ({"queue_size": 0}, "queue_size 0"),
        ({"queue_size": 1 << 16}, "queue_size 65536"),
        ({"mac": bytes(5)}, "mac"),
        ({"mac": b"\x01" + bytes(5)}, "mac 01:"),
        ({"mtu": 67}, "mtu 67"),
        ({"mtu": 65536}, "mtu 65536"),
        ({"threads": 0}, "threads 0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Net(Drop(), **options)


@pytest.mark.parametrize("size", [13, 65555])
def test_a_source_of_no_frames(size: int) -> None:
    with pytest.raises(ValueError, match=f"{size} bytes"):
        Source(size)


def test_close_waits_for_no_collector() -> None:
    """A device that a cycle keeps alive holds neither descriptors nor threads once it was closed: a server
    makes one for each connection."""
    Net(Drop()).close()  # what the process opens once
    before = fds.holdings()
    device = Net(Echo(), queue_pairs=4, threads=4)
    device.cycle = device  # type: ignore[attr-defined]
    device.close()
    assert not fds.holdings() - before


# -- what passes -----------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("mergeable", [False, True], ids=["one buffer", "mergeable"])
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
def test_echo(packed: bool, mergeable: bool, event_idx: bool) -> None:
    without = int(VirtioF.IN_ORDER) | (0 if mergeable else int(NetF.MRG_RXBUF))
    without |= 0 if event_idx else int(VirtioF.RING_EVENT_IDX)
    device = Net(Echo(), mac=MAC, mtu=9000)
    with nic_on(device, packed=packed, mtu=9000, without=without) as nic:
        assert (nic.packed, nic.mergeable, nic.mtu, nic.mac) == (packed, mergeable, 9000, MAC)
        sizes = (14, 15, 60, 64, 1514, 2036, 2037, 4084, 9014, 9018)
        for size in sizes:
            sent = frame(size)
            nic.send(sent)
            assert nic.recv(10) == sent, size
        counters = device.counters()
        assert counters["tx_frames"] == counters["rx_frames"] == len(sizes)
        assert counters["tx_bytes"] == counters["rx_bytes"] == sum(sizes)
        assert device.dropped == 0


@BOTH
def test_bursts_come_back_in_their_order(tmp_path: Path, packed: bool) -> None:
    """Over a socket, through rings that wrap, as many at a time as there are buffers."""
    device = Net(Echo())
    pick = random.Random(3)
    with (
        serving(device, tmp_path / "s"),
        Frontend.connect(tmp_path / "s") as frontend,
        Driver(frontend, packed=packed, timeout=10, queue_size=64) as nic,
    ):
        for number in range(300):
            sent = [frame(pick.randrange(14, 1515), number) for _ in range(pick.randrange(1, 65))]
            taken = nic.send_batch(sent)
            assert taken > 0
            assert recv_all(nic, taken) == sent[:taken]
        assert device.dropped == 0


@BOTH
def test_drop(packed: bool) -> None:
    device = Net(Drop())
    with nic_on(device, packed=packed) as nic:
        for _ in range(100):
            nic.send(frame(100))
        nic.flush(10)
        assert nic.recv(0) is None
        counters = device.counters()
        assert (counters["tx_frames"], counters["tx_bytes"], device.dropped) == (100, 10000, 0)


@BOTH
@pytest.mark.parametrize("size", [14, 60, 1514, 9014])
def test_source(packed: bool, size: int) -> None:
    device = Net(Source(size), mac=MAC, mtu=9000)
    with nic_on(device, packed=packed, mtu=9000) as nic:
        got = recv_all(nic, 3000)
        assert set(map(len, got)) == {size}
        assert len(set(got)) == 1
        assert got[0][:14] == MAC + bytes.fromhex("020000000001") + b"\x88\xb5"
        nic.send(frame(60))  # goes nowhere
        nic.flush(10)
    assert device.counters()["rx_frames"] >= 3000
    assert device.dropped == 0


@pytest.mark.parametrize(
    "rings", [VirtioF.RING_PACKED, VirtioF.RING_PACKED | VirtioF.IN_ORDER, VirtioF.IN_ORDER]
)
def test_in_order(rings: int) -> None:
    with nic_on(Net(Echo()), packed=bool(rings & VirtioF.RING_PACKED), without=0) as nic:
        assert nic.negotiated & VirtioF.IN_ORDER
        for number in range(50):
            sent = [frame(60 + number, number)] * 50
            taken = nic.send_batch(sent)
            assert recv_all(nic, taken) == sent[:taken]


class LateFeatures(Driver):
    """Says what it has agreed to when the rings are there and enabled, before it kicks."""

    def _start(self, *, resume: bool = False) -> None:
        ops = self.ops
        ops.set_features(0)
        ops.set_mem_table(self.memory)
        for queue in self.queues:
            index, place = queue.index, self._places[queue.index]
            areas = (place.layout.desc, place.layout.avail, place.layout.used)
            ops.set_vring_num(index, queue.num)
            ops.set_vring_addr(index, *(place.addr + area for area in areas))
            ops.set_vring_call(index, queue.call_fd)
            ops.set_vring_kick(index, queue.kick_fd)
            ops.set_vring_enable(index, True)
        ops.set_features(self.negotiated)
        self._fill()
        for queue in self.queues:
            queue.kick()


def test_features_that_come_last() -> None:
    """The rings were there with others, and nothing was processed: it is these that count, also for the
    device, whose header would be a shorter one."""
    device = Net(Echo())
    with InProcess(device) as ops, LateFeatures(ops, packed=False, timeout=10) as nic:
        for number in range(20):
            nic.send(sent := frame(60, number), NetHeader(NetHdrF.NEEDS_CSUM, csum_start=34, csum_offset=6))
            (got,) = nic.recv_frames(1, 10)
            assert (got.data, got.header.num_buffers) == (sent, 1)
        assert device.negotiated == nic.negotiated
    device.close()


# -- what is left to the other side ----------------------------------------------------------------


@BOTH
def test_an_open_checksum_stays_open_for_who_fills_it_in(packed: bool) -> None:
    header = NetHeader(NetHdrF.NEEDS_CSUM, csum_start=34, csum_offset=6)
    sent = frame(100)
    with nic_on(Net(Echo()), packed=packed) as nic:
        nic.send(sent, header)
        (got,) = nic.recv_frames(1, 10)
        assert (got.data, got.header) == (sent, NetHeader(1, csum_start=34, csum_offset=6, num_buffers=1))
    with nic_on(Net(Echo()), packed=packed, without=int(NetF.GUEST_CSUM)) as nic:
        assert nic.negotiated & NetF.CSUM
        nic.send(sent, header)
        (got,) = nic.recv_frames(1, 10)
        assert got.header == NetHeader(num_buffers=1)
        assert got.data != sent
        assert got.data[:40] + got.data[42:] == sent[:40] + sent[42:]


# -- MTU -------------------------------------------------------------------------------------------


def test_longer_frames_than_the_mtu_are_dropped(tmp_path: Path) -> None:
    """The device's own, or what the front-end says of the guest's interface (NET_SET_MTU). With a VLAN tag, a
    frame may have four bytes more."""
    device = Net(Echo(), mtu=9000)
    with serving(device, tmp_path / "s") as server:
        for mtu in (9000, 1000):
            with server.connect() as frontend:
                if mtu != 9000:
                    frontend.net_set_mtu(mtu)
                with Driver(frontend, mtu=10000, timeout=10, without=int(NetF.MTU)) as nic:
                    before = device.dropped
                    longest = frame(mtu + 18)
                    nic.send(frame(mtu + 19))
                    nic.send(longest)
                    assert nic.recv(10) == longest
                    assert device.counters()["dropped_long"] == device.dropped == before + 1


def test_the_driver_is_told_the_front_ends_mtu(tmp_path: Path) -> None:
    with serving(Net(Echo(), mtu=9000), tmp_path / "s") as server, server.connect() as frontend:
        frontend.net_set_mtu(1000)
        with Driver(frontend, mtu=9000, timeout=10) as nic:
            assert nic.mtu == 1000


def test_an_mtu_that_the_wire_has_not() -> None:
    class Short(Wire):
        max_mtu = 1500

    device = Net(Short())
    assert device.mtu == 1500
    with pytest.raises(VhostError, match="mtu 1501: the wire has 1500"):
        device.set_mtu(1501)
    with pytest.raises(ValueError, match="mtu 1501, must be 68 to 1500"):
        Net(Short(), mtu=1501)
    device.close()


# -- rings that are not enabled, break, or stop ----------------------------------------------------


@BOTH
def test_what_is_sent_to_a_disabled_ring_goes_nowhere(packed: bool) -> None:
    device = Net(Echo())
    with nic_on(device, packed=packed) as nic:
        nic.ops.set_vring_enable(1, False)
        for _ in range(7):
            nic.send(frame(60))
        nic.flush(10)
        assert device.counters()["dropped_disabled"] == device.dropped == 7
        nic.ops.set_vring_enable(1, True)
        nic.send(frame(60))
        assert nic.recv(10)
        for number in range(1, 20):
            nic.ops.set_vring_enable(0, False)
            nic.send(frame(60))
            nic.flush(10)
            assert device.counters()["dropped_stopped"] == number
            nic.ops.set_vring_enable(0, True)
            sent = frame(61)
            nic.send(sent)
            assert nic.recv(10) == sent


@BOTH
def test_memory_that_is_replaced_under_load(tmp_path: Path, packed: bool) -> None:
    """Rings are paused for that, and buffers that were taken ahead given back: nothing is lost."""
    device = Net(Echo())
    with (
        serving(device, tmp_path / "s"),
        Frontend.connect(tmp_path / "s") as frontend,
        Driver(frontend, packed=packed, timeout=10, queue_size=64) as nic,
    ):
        for number in range(60):
            sent = [frame(100, number)] * 30
            taken = nic.send_batch(sent)
            if number % 2:
                frontend.set_mem_table(nic.memory)
            else:
                for index in (1, 0, 0, 1):
                    frontend.set_vring_call(index, nic.queues[index].call_fd)
            assert recv_all(nic, taken) == sent[:taken]
        assert device.dropped == 0


@BOTH
def test_a_broken_ring_is_reported(tmp_path: Path, packed: bool) -> None:
    device = Net(Echo())
    with serving(device, tmp_path / "s") as server, error_event() as error:
        with server.connect() as frontend, Driver(frontend, packed=packed, timeout=10) as nic:
            frontend.set_vring_err(1, error)
            nic.send(frame(60))
            assert nic.recv(10)
            nic.queues[1].add([(0xFFFF_FFFF_0000, 100)], [], None)
            nic.queues[1].kick()
            wait_for(error)
        with server.connect() as frontend, Driver(frontend, packed=packed, timeout=10) as nic:
            nic.send(frame(60))
            assert nic.recv(10)
        assert device.dropped == 0
