# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The control queue of the network device: what it grants, and everything that it refuses."""

from __future__ import annotations

import contextlib
import itertools
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from devices.disks import serving
from drivers.net_device import frame
from vhost.devices.net import Net
from vhost.devices.net_control import FEATURES, LONGEST
from vhost.devices.net_wires import Bridge, Echo, Source
from vhost.drivers import Net as Driver
from vhost.drivers.net_control import NetControl, NetControlError
from vhost.features import NetF
from vhost.inprocess import InProcess
from vhost.virtio_net import (
    CTRL_ERR,
    NetConfig,
    NetCtrl,
    NetCtrlMac,
    NetCtrlMq,
    NetCtrlRx,
    NetCtrlVlan,
    NetStatus,
)

pytestmark = pytest.mark.usefixtures("no_leaks")
MAC = bytes.fromhex("525400123456")
OTHER = bytes.fromhex("525400abcdef")
COMMANDS = int(NetF.CTRL_RX | NetF.CTRL_RX_EXTRA | NetF.CTRL_VLAN | NetF.CTRL_MAC_ADDR | NetF.GUEST_ANNOUNCE)


class Unknown(int):
    """A class of commands that nobody has."""

    name = "UNKNOWN"


class Commander(Driver):
    """Knows all commands."""

    def __init__(self, ops: Any, *, features: int = COMMANDS, **options: Any) -> None:
        self._more = features
        super().__init__(ops, timeout=10, **options)

    @property
    def features(self) -> int:
        return self._features | self._more

    @features.setter
    def features(self, features: int) -> None:
        self._features = features


@contextlib.contextmanager
def commander(device: Net, **options: Any) -> Iterator[tuple[Commander, NetControl]]:
    try:
        with InProcess(device) as ops, Commander(ops, **options) as nic:
            assert nic.control is not None
            yield nic, nic.control
    finally:
        device.close()


def table(*addresses: bytes) -> bytes:
    return struct.pack("<I", len(addresses)) + b"".join(addresses)


def test_features() -> None:
    device = Net(Echo())
    assert device.offered_features() & FEATURES == FEATURES
    device.close()


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_what_is_granted(packed: bool) -> None:
    device = Net(Echo(), mac=MAC)
    with commander(device, packed=packed) as (nic, control):
        assert nic.negotiated & FEATURES == FEATURES
        nic.set_mac(OTHER)
        assert device.control.mac == OTHER
        config = nic.read_config()
        assert config is not None
        assert config.mac == OTHER
        for what in NetCtrlRx:
            control.set_rx(what, True)
        assert device.control.rx == set(NetCtrlRx)
        control.set_rx(NetCtrlRx.PROMISC, False)
        assert device.control.rx == set(NetCtrlRx) - {NetCtrlRx.PROMISC}
        for vlan in (0, 7, 4095, 7):
            control.command(NetCtrl.VLAN, NetCtrlVlan.ADD, struct.pack("<H", vlan))
        control.command(NetCtrl.VLAN, NetCtrlVlan.DEL, struct.pack("<H", 7))
        control.command(NetCtrl.VLAN, NetCtrlVlan.DEL, struct.pack("<H", 8))
        assert device.control.vlans == {0, 4095}
        many = [b"\x01" + random.randbytes(5) for _ in range(600)]
        control.command(NetCtrl.MAC, NetCtrlMac.TABLE_SET, table(MAC, OTHER) + table(*many))
        assert device.control.unicast == (MAC, OTHER)
        assert device.control.multicast == tuple(many)
        control.command(NetCtrl.MAC, NetCtrlMac.TABLE_SET, table() + table())
        assert device.control.unicast == device.control.multicast == ()
        nic.send(frame(60))
        assert nic.recv(10)


def test_the_next_session_finds_a_new_device() -> None:
    device = Net(Echo(), mac=MAC)
    with InProcess(device) as ops, Commander(ops) as nic:
        nic.set_mac(OTHER)
        assert nic.control is not None
        nic.control.set_rx(NetCtrlRx.ALLMULTI, True)
    with commander(device) as (nic, _):
        assert nic.mac == MAC
        assert device.control.mac == MAC
        assert not device.control.rx


@pytest.mark.parametrize(
    ("kind", "command", "data"),
    [
        (NetCtrl.MQ, NetCtrlMq.VQ_PAIRS_SET, b""),
        (NetCtrl.MQ, NetCtrlMq.VQ_PAIRS_SET, b"\x01"),
        (NetCtrl.MQ, NetCtrlMq.VQ_PAIRS_SET, bytes(2)),
        (NetCtrl.MQ, NetCtrlMq.VQ_PAIRS_SET, b"\x04\0"),
        (NetCtrl.MQ, NetCtrlMq.VQ_PAIRS_SET, b"\xff\xff"),
        (NetCtrl.MQ, NetCtrlMq.VQ_PAIRS_SET, b"\x01\0\0"),
        (NetCtrl.MQ, NetCtrlMq.RSS_CONFIG, bytes(100)),
        (NetCtrl.MAC, NetCtrlMac.ADDR_SET, b""),
        (NetCtrl.MAC, NetCtrlMac.ADDR_SET, bytes(5)),
        (NetCtrl.MAC, NetCtrlMac.ADDR_SET, bytes(7)),
        (NetCtrl.MAC, NetCtrlMac.ADDR_SET, b"\x01" + bytes(5)),
        (NetCtrl.MAC, NetCtrlMac.TABLE_SET, b""),
        (NetCtrl.MAC, NetCtrlMac.TABLE_SET, table()),
        (NetCtrl.MAC, NetCtrlMac.TABLE_SET, table() + b"\0\0\0"),
        (NetCtrl.MAC, NetCtrlMac.TABLE_SET, table() + table() + b"\0"),
        (NetCtrl.MAC, NetCtrlMac.TABLE_SET, b"\xff" * 4 + table()),
        (NetCtrl.MAC, NetCtrlMac.TABLE_SET, table(MAC) + struct.pack("<I", 0x2AAAAAAB) + bytes(6)),
        (NetCtrl.MAC, 2, bytes(6)),
        (NetCtrl.RX, NetCtrlRx.PROMISC, b""),
        (NetCtrl.RX, NetCtrlRx.PROMISC, b"\x02"),
        (NetCtrl.RX, NetCtrlRx.PROMISC, b"\0\0"),
        (NetCtrl.RX, 6, b"\0"),
        (NetCtrl.VLAN, NetCtrlVlan.ADD, b"\x01"),
        (NetCtrl.VLAN, NetCtrlVlan.ADD, b"\0\x10"),
        (NetCtrl.VLAN, 2, bytes(2)),
        (NetCtrl.ANNOUNCE, 0, b"\0"),
        (NetCtrl.ANNOUNCE, 1, b""),
        (NetCtrl.GUEST_OFFLOADS, 0, bytes(8)),
        (NetCtrl.NOTF_COAL, 0, bytes(8)),
        (Unknown(7), 0, b""),
        (Unknown(255), 255, bytes(4000)),
    ],
)
def test_what_is_refused(kind: int, command: int, data: bytes) -> None:
    """And nothing is changed by it, nor is the next command hurt."""
    device = Net(Echo(), mac=MAC, queue_pairs=3)
    with commander(device, queue_pairs=2) as (nic, control):
        before = vars(device.control).copy()
        with pytest.raises(NetControlError, match="refused"):
            control.command(kind, command, data)  # type: ignore[arg-type]
        assert vars(device.control) == before
        nic.set_mac(OTHER)
        assert device.control.mac == OTHER


def test_what_was_not_negotiated_is_refused() -> None:
    with commander(Net(Echo()), features=0, without=COMMANDS | int(NetF.MQ)) as (_, control):
        for kind, command, data in (
            (NetCtrl.MQ, 0, b"\x01\0"),
            (NetCtrl.MAC, NetCtrlMac.ADDR_SET, MAC),
            (NetCtrl.MAC, NetCtrlMac.TABLE_SET, table() + table()),
            (NetCtrl.RX, NetCtrlRx.PROMISC, b"\x01"),
            (NetCtrl.RX, NetCtrlRx.NOUNI, b"\x01"),
            (NetCtrl.VLAN, NetCtrlVlan.ADD, bytes(2)),
            (NetCtrl.ANNOUNCE, 0, b""),
        ):
            with pytest.raises(NetControlError, match="refused"):
                control.command(kind, command, data)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_chains_that_are_no_commands(packed: bool) -> None:
    """Each head comes back; where there is room for an answer, it is an error."""
    device = Net(Echo())
    with commander(device, packed=packed) as (nic, control):
        queue, at = control.queue, control._addr
        memory = queue.memory
        memory.write(at, bytes(64))
        for readable, writable, answer in (
            ([], [(at + 100, 1)], CTRL_ERR),
            ([(at, 1)], [(at + 100, 1)], CTRL_ERR),
            ([(at, 3)], [], None),
            ([(at, 2), (at, 1)], [(at + 100, 1), (at + 101, 5)], 0),  # PROMISC, in pieces
            ([(nic.data_addr, 1 << 16), (nic.data_addr, 1)], [(at + 100, 1)], CTRL_ERR),
        ):
            memory.write(at + 100, b"\xee" * 6)
            queue.add(readable, writable, None)
            queue.kick()
            assert queue.wait(10)
            ((_, written),) = queue.get_used_batch(1)
            assert written == (answer is not None)
            assert memory.read(at + 100, 1)[0] == (0xEE if answer is None else answer)
            assert memory.read(at + 101, 5) == b"\xee" * 5
        assert LONGEST == 1 << 16
        nic.set_mac(OTHER)


# -- pairs -----------------------------------------------------------------------------------------


def test_unused_pairs_receive_nothing() -> None:
    device = Net(Source(60), queue_pairs=3)

    def received() -> list[int]:
        return [pair.counters()["rx_frames"] for pair in device.pairs]

    with commander(device, queue_pairs=3) as (nic, control):
        for pairs in (3, 1, 2, 3):
            control.set_pairs(pairs)
            before = received()
            for count in itertools.count():
                assert nic.recv_batch(100, 10)
                after = received()
                grew = [b < a for b, a in zip(before, after, strict=True)]
                if count > 50 and all(grew[:pairs]):
                    break
            assert not any(grew[pairs:])


def test_without_mq_the_queue_for_commands_is_the_third(tmp_path: Path) -> None:
    with serving(Net(Echo(), queue_pairs=4), tmp_path / "s") as server, server.connect() as frontend:
        with Driver(frontend, timeout=10) as nic:
            assert not nic.negotiated & NetF.MQ
            assert nic.control is not None
            assert nic.control.queue.index == 2
            nic.set_mac(OTHER)
            for _ in range(10):
                nic.send(frame(60))
                assert nic.recv(10)


# -- announcing ------------------------------------------------------------------------------------


def test_the_driver_announces_itself() -> None:
    device = Net(Echo(), mac=MAC)
    with commander(device) as (nic, control):
        told: list[bool] = []
        nic.ops.on_config_change = lambda: told.append(True)  # type: ignore[attr-defined]
        device.announce()
        config = nic.read_config()
        assert config is not None
        assert config.status == NetStatus.LINK_UP | NetStatus.ANNOUNCE
        control.command(NetCtrl.ANNOUNCE, 0, b"")
        config = nic.read_config()
        assert config is not None
        assert config.status == NetStatus.LINK_UP


def test_one_that_cannot_is_announced() -> None:
    ends = Bridge().ends
    one, other = Net(ends[0], mac=MAC), Net(ends[1])
    with InProcess(one) as here, InProcess(other) as there, Driver(here), Driver(there) as nic:
        one.announce()
        got = nic.recv(10)
        assert got is not None
        assert got[6:14] == MAC + b"\x80\x35"
    one.close()
    other.close()
    assert NetConfig.unpack(one.config).status == NetStatus.LINK_UP
