# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a driver asked for through its network device's control queue (VIRTIO 1.2, 5.1.6.5).

Knows the commands and what they change; knows no queue and no wire. What to receive is noted, and nothing is
filtered by it: a driver gets more than it asked for, as it may (5.1.6.5.1), but never less.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum

from vhost.features import NetF
from vhost.virtio_net import (
    CTRL_HEADER,
    NetCtrl,
    NetCtrlAnnounce,
    NetCtrlMac,
    NetCtrlMq,
    NetCtrlRx,
    NetCtrlVlan,
)

LONGEST = 1 << 16
"""Bytes of a command. Most have a few; the longest has some thousand addresses."""
FEATURES = int(
    NetF.CTRL_VQ
    | NetF.CTRL_RX
    | NetF.CTRL_RX_EXTRA
    | NetF.CTRL_VLAN
    | NetF.CTRL_MAC_ADDR
    | NetF.GUEST_ANNOUNCE
)
_VLANS = 4096
_COUNT, _U16 = struct.Struct("<I"), struct.Struct("<H")
_RX = (NetCtrlRx.PROMISC, NetCtrlRx.ALLMULTI)
_RX_EXTRA = (NetCtrlRx.ALLUNI, NetCtrlRx.NOMULTI, NetCtrlRx.NOUNI, NetCtrlRx.NOBCAST)


class ControlError(ValueError):
    """A command is none, or says what cannot be."""


class NetControl:
    """``pairs``: as many may be used. ``mac``: the address to begin with."""

    def __init__(self, pairs: int, mac: bytes) -> None:
        self._most = pairs
        self._first_mac = mac
        commands: list[tuple[NetF, NetCtrl, IntEnum, Callable[[int, bytes], None]]] = [
            (NetF.MQ, NetCtrl.MQ, NetCtrlMq.VQ_PAIRS_SET, self._set_pairs),
            (NetF.CTRL_MAC_ADDR, NetCtrl.MAC, NetCtrlMac.ADDR_SET, self._set_mac),
            (NetF.CTRL_RX, NetCtrl.MAC, NetCtrlMac.TABLE_SET, self._set_tables),
            (NetF.GUEST_ANNOUNCE, NetCtrl.ANNOUNCE, NetCtrlAnnounce.ACK, self._announced),
            *((NetF.CTRL_RX, NetCtrl.RX, command, self._set_rx) for command in _RX),
            *((NetF.CTRL_RX_EXTRA, NetCtrl.RX, command, self._set_rx) for command in _RX_EXTRA),
            *((NetF.CTRL_VLAN, NetCtrl.VLAN, command, self._set_vlan) for command in NetCtrlVlan),
        ]
        self._commands = {(int(kind), int(command)): (int(f), do) for f, kind, command, do in commands}
        self.reset()

    def reset(self) -> None:
        """As a driver finds it."""
        self.pairs = 1
        """How many the driver uses."""
        self.mac = self._first_mac
        self.unicast: tuple[bytes, ...] = ()
        self.multicast: tuple[bytes, ...] = ()
        """Addresses to receive, besides ``mac``."""
        self.rx: set[NetCtrlRx] = set()
        """What is switched on of these."""
        self.vlans: set[int] = set()
        self.announce = False
        """The driver is asked to announce itself, and has not yet said that it did."""

    def run(self, command: bytes, negotiated: int) -> None:
        """ControlError, and nothing is changed, if it is to be refused."""
        if len(command) < CTRL_HEADER.size:
            raise ControlError(f"command of {len(command)} bytes")
        kind, number = CTRL_HEADER.unpack_from(command)
        feature, do = self._commands.get((kind, number), (0, None))
        if do is None or not negotiated & feature:
            raise ControlError(f"class {kind}, command {number}: unknown, or not negotiated")
        do(number, command[CTRL_HEADER.size :])

    def _set_pairs(self, number: int, data: bytes) -> None:
        pairs = _number(_U16, data)
        if not 1 <= pairs <= self._most:
            raise ControlError(f"{pairs} pairs of queues, must be 1 to {self._most}")
        self.pairs = pairs

    def _set_mac(self, number: int, data: bytes) -> None:
        if len(data) != 6 or data[0] & 1:
            raise ControlError(f"address {data[:16].hex(':')}")
        self.mac = data

    def _set_tables(self, number: int, data: bytes) -> None:
        unicast, data = _table(data)
        multicast, data = _table(data)
        if data:
            raise ControlError(f"{len(data)} bytes after two tables")
        self.unicast, self.multicast = unicast, multicast

    def _set_rx(self, number: int, data: bytes) -> None:
        if data not in (b"\0", b"\1"):
            raise ControlError(f"switched to {data[:16].hex(' ')}")
        (self.rx.add if data[0] else self.rx.discard)(NetCtrlRx(number))

    def _set_vlan(self, number: int, data: bytes) -> None:
        vlan = _number(_U16, data)
        if vlan >= _VLANS:
            raise ControlError(f"VLAN {vlan}, limit {_VLANS - 1}")
        (self.vlans.add if number == NetCtrlVlan.ADD else self.vlans.discard)(vlan)

    def _announced(self, number: int, data: bytes) -> None:
        if data:
            raise ControlError(f"{len(data)} bytes after a command that has none")
        self.announce = False


def _number(layout: struct.Struct, data: bytes) -> int:
    if len(data) != layout.size:
        raise ControlError(f"{len(data)} bytes where {layout.size} belong")
    return int(layout.unpack(data)[0])


def _table(data: bytes) -> tuple[tuple[bytes, ...], bytes]:
    """A count and as many addresses; and what follows."""
    if len(data) < _COUNT.size:
        raise ControlError("a table that ends before its count")
    (count,) = _COUNT.unpack_from(data)
    end = _COUNT.size + 6 * count
    if end > len(data):
        raise ControlError(f"a table of {count} addresses in {len(data)} bytes")
    return tuple(data[at : at + 6] for at in range(_COUNT.size, end, 6)), data[end:]
