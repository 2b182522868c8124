# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The control queue of a network device (VIRTIO 1.2, 5.1.6.5): one command at a time.

Knows the commands and their acknowledgement; whether the device has the queue is the driver's to know.
"""

from __future__ import annotations

import struct
import time

from vhost.driver_queue import DriverQueue
from vhost.errors import ReplyTimeout, VhostError
from vhost.virtio_net import CTRL_ERR, CTRL_HEADER, CTRL_OK, NetCtrl, NetCtrlMac, NetCtrlMq, NetCtrlRx

ROOM = 4096
"""Bytes of shared memory that it needs."""
_ACK = ROOM - 1


class NetControlError(VhostError):
    """The device refused a command."""


class NetControl:
    """Commands through ``queue``, in ``ROOM`` bytes at guest address ``addr``."""

    def __init__(self, queue: DriverQueue, addr: int, timeout: float | None) -> None:
        self.queue = queue
        self.timeout = timeout
        self._addr = addr
        self._view = queue.memory.view(addr, ROOM)
        self._lost = False

    def set_pairs(self, pairs: int) -> None:
        self.command(NetCtrl.MQ, NetCtrlMq.VQ_PAIRS_SET, struct.pack("<H", pairs))

    def set_mac(self, mac: bytes) -> None:
        self.command(NetCtrl.MAC, NetCtrlMac.ADDR_SET, mac)

    def set_rx(self, what: NetCtrlRx, on: bool) -> None:
        self.command(NetCtrl.RX, what, bytes([on]))

    def command(self, kind: NetCtrl, command: int, data: bytes) -> None:
        """NetControlError: refused. ReplyTimeout: no answer, and the queue is of no more use: the device may
        still write where the next command would lie."""
        what = f"{self.queue.name}: {kind.name} command {command} ({data.hex()})"
        if self._lost:
            raise ReplyTimeout(f"{what}: an earlier one was not answered")
        size = CTRL_HEADER.size + len(data)
        if size > _ACK:
            raise ValueError(f"{what}: {size} bytes, limit {_ACK}")
        CTRL_HEADER.pack_into(self._view, 0, kind, command)
        self._view[CTRL_HEADER.size : size] = data
        self._view[_ACK] = 0xFF
        self.queue.add([(self._addr, size)], [(self._addr + _ACK, 1)], None)
        self.queue.kick()
        self._wait(what)
        ack = self._view[_ACK]
        if ack != CTRL_OK:
            how = "refused" if ack == CTRL_ERR else f"acknowledged with {ack:#x}"
            raise NetControlError(f"{what}: {how}")

    def _wait(self, what: str) -> None:
        self._lost = True
        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        while self.queue.get_used() is None:
            left = None if deadline is None else max(deadline - time.monotonic(), 0)
            if not self.queue.wait(left):
                raise ReplyTimeout(f"{what}: no answer within {self.timeout} s")
        self._lost = False
