# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Commands to a network device that are none: each class and command with data of any length, chains of any
shape. Each comes back, with an answer where there is room for one; the device works on. What is granted, and
each reason to refuse, is test_net_control.py's."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Iterator

import pytest

from devices.nets import Raw
from drivers.net_device import frame
from vhost.devices.net import Net
from vhost.devices.net_control import FEATURES, LONGEST
from vhost.devices.net_wires import Echo
from vhost.drivers import Net as NetDriver
from vhost.drivers.base import QueuePlan
from vhost.features import NetF
from vhost.inprocess import InProcess
from vhost.virtio_net import CTRL_ERR, CTRL_OK, NetCtrl, NetCtrlMac, NetCtrlMq, NetCtrlVlan

pytestmark = pytest.mark.usefixtures("no_leaks")
MAC = bytes.fromhex("525400123456")
PAIRS = 3
CLASSES = (*range(10), 127, 255)
COMMANDS = (*range(8), 127, 255)
UNANSWERED = 0xEE


class Commander(Raw):
    """With the control queue, behind all pairs."""

    def _plan(self) -> tuple[list[QueuePlan], int]:
        return [QueuePlan(0, 64), QueuePlan(1, 64), QueuePlan(2 * PAIRS, 64, 40)], 0x200000

    def command(
        self, kind: int, command: int, data: bytes, *, room: int = 1, cuts: tuple[int, ...] = ()
    ) -> int:
        """The answer, and not a byte more."""
        whole = bytes([kind, command]) + data
        self.put(whole)
        ends = [0, *cuts, len(whole)]
        readable = [(self.at + a, b - a) for a, b in itertools.pairwise(ends)]
        return self.chain(readable, [(self.extra, room)] if room else [])

    def chain(self, readable: list[tuple[int, int]], writable: list[tuple[int, int]]) -> int:
        at = self.extra - self.data_addr
        self.put(bytes([UNANSWERED]) * 64, at)
        written = self.give_back(2, readable, writable)
        assert written == bool(writable)
        assert self.view[at + 1 : at + 64] == bytes([UNANSWERED]) * 63
        return self.view[at]


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def device_and_commander(request: pytest.FixtureRequest) -> Iterator[tuple[Net, Commander]]:
    """After each test, frames pass as before, and so they do for another driver."""
    device = Net(Echo(), mac=MAC, queue_pairs=PAIRS)
    features = FEATURES | int(NetF.MQ | NetF.MRG_RXBUF)
    with InProcess(device) as ops:
        with Commander(ops, packed=request.param, features=features) as raw:
            assert raw.negotiated & features == features
            yield device, raw
            raw.post(2000)
            raw.send(sent := frame(60))
            came = raw.recv()
            assert came is not None
            assert came[1] == sent
            assert all(queue.broken is None for queue in raw.queues)
        with NetDriver(ops, timeout=10, queue_pairs=PAIRS) as nic:
            nic.set_promiscuous(True)
            for pair in range(PAIRS):
                nic.send(sent := frame(60), pair=pair)
                assert nic.recv(10) == sent
    device.close()
    raw.__dict__.clear()  # pytest keeps a fixture's value beyond the look for leaks


def right_lengths(kind: int, command: int) -> tuple[int, ...]:
    """Bytes of data with which a command of zeroes is one."""
    if kind == NetCtrl.RX and command < 6:
        return (1,)
    if kind == NetCtrl.MAC:
        return {int(NetCtrlMac.ADDR_SET): (6,), int(NetCtrlMac.TABLE_SET): (8,)}.get(command, ())
    if kind == NetCtrl.VLAN and command < 2:
        return (2,)
    return (0,) if (kind, command) == (NetCtrl.ANNOUNCE, 0) else ()


def test_each_class_and_command_with_each_length(device_and_commander: tuple[Net, Commander]) -> None:
    device, raw = device_and_commander
    for kind, command in itertools.product(CLASSES, COMMANDS):
        good = right_lengths(kind, command)
        for length in (*range(14), 100, 4096):
            before = vars(device.control).copy()
            answer = raw.command(kind, command, bytes(length))
            assert answer == (CTRL_OK if length in good else CTRL_ERR), (kind, command, length)
            if answer == CTRL_ERR:
                assert vars(device.control) == before, (kind, command, length)


def test_random_data(device_and_commander: tuple[Net, Commander]) -> None:
    device, raw = device_and_commander
    pick = random.Random(3)
    for _ in range(3000):
        data = pick.randbytes(pick.choice((0, 1, 2, 6, 8, 14, 20, 300)))
        answer = raw.command(pick.choice(CLASSES), pick.choice(COMMANDS), data)
        assert answer in (CTRL_OK, CTRL_ERR)
        assert 1 <= device.control.pairs <= PAIRS
        assert len(device.control.mac) == 6
        assert not device.control.mac[0] & 1
        assert all(vlan < 4096 for vlan in device.control.vlans)


def test_pairs(device_and_commander: tuple[Net, Commander]) -> None:
    """Also as many as there are, of which most have no ring."""
    device, raw = device_and_commander
    for pairs in (0, 1, 2, PAIRS, PAIRS + 1, 0x8000, 0x8001, 0xFFFF):
        good = 1 <= pairs <= PAIRS
        answer = raw.command(NetCtrl.MQ, NetCtrlMq.VQ_PAIRS_SET, struct.pack("<H", pairs))
        assert answer == (CTRL_OK if good else CTRL_ERR), pairs
        if good:
            assert device.control.pairs == pairs
        raw.post(2000)
        raw.send(sent := frame(60))
        came = raw.recv()
        assert came is not None
        assert came[1] == sent


@pytest.mark.parametrize(
    "count", [0, 1, 64, 1000, 10_000, 10_922, 10_923, 1 << 16, 0x2AAAAAAA, 0x2AAAAAAB, 0xFFFFFFFF]
)
def test_huge_tables(device_and_commander: tuple[Net, Commander], count: int) -> None:
    """A count that is more than what follows, or that wraps in 32 bits when it is multiplied."""
    device, raw = device_and_commander
    there = min(count, 20_000)
    addresses = b"\x02\0\0\0\0\x09" * there
    whole = struct.pack("<I", count) + addresses + bytes(4)
    fits = there == count and len(whole) + 2 <= LONGEST
    answer = raw.command(NetCtrl.MAC, NetCtrlMac.TABLE_SET, whole)
    assert answer == (CTRL_OK if fits else CTRL_ERR)
    assert len(device.control.unicast) == (count if fits else 0)
    second = bytes(4) + struct.pack("<I", count) + addresses
    assert raw.command(NetCtrl.MAC, NetCtrlMac.TABLE_SET, second) == answer
    assert len(device.control.multicast) == (count if fits else 0)
    few = struct.pack("<I", count) + addresses[:18]  # as many as it says, or three
    for tables in (few + bytes(4), bytes(4) + few):
        answer = raw.command(NetCtrl.MAC, NetCtrlMac.TABLE_SET, tables)
        assert answer == (CTRL_OK if count <= 3 else CTRL_ERR)


def test_vlans(device_and_commander: tuple[Net, Commander]) -> None:
    device, raw = device_and_commander
    for command, vlan in itertools.product(NetCtrlVlan, (0, 1, 4094, 4095, 4096, 0x8000, 0xFFFF)):
        answer = raw.command(NetCtrl.VLAN, command, struct.pack("<H", vlan))
        assert answer == (CTRL_OK if vlan < 4096 else CTRL_ERR)
    assert not device.control.vlans
    for vlan in range(4097):  # all of them, and one that is none
        raw.command(NetCtrl.VLAN, NetCtrlVlan.ADD, struct.pack("<H", vlan))
    assert len(device.control.vlans) == 4096


def test_commands_in_pieces(device_and_commander: tuple[Net, Commander]) -> None:
    _, raw = device_and_commander
    other = bytes.fromhex("525400abcdef")
    for cuts in ((1,), (2,), (3,), (1, 2), tuple(range(1, 8))):
        assert raw.command(NetCtrl.MAC, NetCtrlMac.ADDR_SET, other, cuts=cuts) == CTRL_OK


def test_chains_of_any_shape(device_and_commander: tuple[Net, Commander]) -> None:
    """Nothing to read, no room for an answer, much room, and more to read than any command has."""
    _, raw = device_and_commander
    raw.put(bytes(64))
    for readable in (
        [],
        [(raw.at, 1)],
        [(raw.at, 1)] * 2,
        [(raw.at, 1)] * 39,
        [(raw.at, LONGEST + 1)],
        [(raw.at, 0xF0000)] * 30,
    ):
        length = sum(size for _, size in readable)
        for writable in ([], [(raw.extra, 1)], [(raw.extra, 64)], [(raw.extra, 1), (raw.extra + 1, 1)]):
            if not readable and not writable:
                continue
            if len(readable) + len(writable) > 40:
                continue
            answer = raw.chain(readable, writable)
            if writable:
                # Two zeroes and a third: do not receive everything.
                assert answer == (CTRL_OK if length == 3 else CTRL_ERR)
            else:
                assert answer == UNANSWERED
