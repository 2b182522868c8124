# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A network device for tests: sends back what it is sent, or says about a frame what is not true."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

from vhost.devices.base import Device
from vhost.errors import VhostError
from vhost.features import DeviceId, NetF
from vhost.virtio_net import CTRL_ERR, CTRL_OK, NetConfig, NetCtrl, NetCtrlMac, NetStatus, header_size
from vhost.virtqueue import Chain, DeviceQueue

MAC = bytes.fromhex("020000000001")
OFFLOADS = int(
    NetF.CSUM
    | NetF.GUEST_CSUM
    | NetF.HOST_TSO4
    | NetF.HOST_TSO6
    | NetF.GUEST_TSO4
    | NetF.GUEST_TSO6
    | NetF.GUEST_ECN
    | NetF.HOST_USO
)


class EchoNet(Device):
    """``spoil``: called with the header and the frame of what is to be delivered; gives num_buffers and how
    many bytes of the first buffer are said to be used (None: the truth)."""

    device_id = DeviceId.NET
    max_queue_size = 1024

    def __init__(
        self,
        *,
        pairs: int = 1,
        used_pairs: int = 1,
        features: int = int(NetF.MRG_RXBUF) | OFFLOADS,
        control: bool = False,
        mtu: int = 1500,
        rings: int | None = None,
    ) -> None:
        self.features = features | int(NetF.MAC | NetF.STATUS | NetF.MTU)
        if control:
            self.features |= int(NetF.CTRL_VQ | NetF.CTRL_RX | NetF.CTRL_MAC_ADDR)
        if pairs > 1:
            self.features |= int(NetF.MQ)
        self.rings = rings
        self.pairs = pairs
        self.queues = ("rx", "tx") * pairs + (("ctrl",) if control else ())
        self.mtu = mtu
        self.echo = True
        self.paused = False
        self.seen: list[tuple[int, bytes, bytes]] = []
        """Queue, header and data of each frame that was sent."""
        self.commands: list[tuple[int, int, bytes]] = []
        self.refuse = False
        self.spoil: Callable[[bytes, bytes], tuple[int | None, int | None]] | None = None
        self.lost = 0
        self._rx: dict[int, DeviceQueue] = {}

    @property
    def config(self) -> bytes:
        return NetConfig(
            MAC, status=int(NetStatus.LINK_UP), max_virtqueue_pairs=self.pairs, mtu=self.mtu
        ).pack()

    def offered_features(self) -> int:
        if self.rings is None:
            return super().offered_features()
        return self.rings | self.features

    def start_queue(self, queue: DeviceQueue) -> bool:
        if self.queue_name(queue.index) == "rx":
            self._rx[queue.index] = queue
        return False

    def stop_queue(self, queue: DeviceQueue) -> None:
        self._rx.pop(queue.index, None)

    def rx(self, queue: DeviceQueue) -> None:
        """Buffers wait until there is something for them."""

    def tx(self, queue: DeviceQueue) -> None:
        if self.paused:
            return
        size = header_size(self.negotiated)
        for chain in queue:
            data = chain.read()
            queue.push(chain, 0)
            self.seen.append((queue.index, data[:size], data[size:]))
            if self.echo and queue.index - 1 in self._rx:
                self.deliver(self._rx[queue.index - 1], data[:size], data[size:])

    def deliver(self, queue: DeviceQueue, header: bytes, frame: bytes) -> None:
        chains: list[Chain] = []
        room = 0
        while room < len(header) + len(frame):
            chain = queue.pop()
            if chain is None or (chains and not self.negotiated & NetF.MRG_RXBUF):
                for one in reversed([*chains, chain] if chain else chains):
                    queue.unpop(one)
                self.lost += 1
                return
            chains.append(chain)
            room += chain.writable_len
        count: int | None = None
        first: int | None = None
        if self.spoil is not None:
            count, first = self.spoil(header, frame)
        if len(header) == 12:
            header = header[:10] + struct.pack("<H", len(chains) if count is None else count)
        data = header + frame
        for chain in chains:
            chain.write(data[: chain.writable_len])
            data = data[chain.writable_len :]
        for chain in chains:
            queue.fill(chain, first if first is not None and chain is chains[0] else None)
        queue.flush()
        queue.notify()

    def ctrl(self, queue: DeviceQueue) -> None:
        for chain in queue:
            data = chain.read()
            self.commands.append((data[0], data[1], data[2:]))
            known = (data[0], data[1]) == (NetCtrl.MAC, NetCtrlMac.ADDR_SET) or data[0] in (
                NetCtrl.MQ,
                NetCtrl.RX,
            )
            chain.write(bytes([CTRL_OK if known and not self.refuse else CTRL_ERR]))
            queue.push(chain)

    def write_config(self, offset: int, data: bytes) -> None:
        raise VhostError(f"{len(data)} bytes at {offset}: read-only")


def frame(size: int, seed: int = 0) -> bytes:
    """Random but for a type that nobody speaks."""
    return (MAC + b"\x02\0\0\0\0\x02\x88\xb5" + struct.pack("<Q", seed) + os.urandom(size))[:size]
