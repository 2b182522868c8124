# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A network device that takes every frame and sends none: something to drive for a front-end under test."""

from __future__ import annotations

from vhost.device_queue import DeviceQueue
from vhost.devices.base import Device
from vhost.features import DeviceId, NetF
from vhost.virtio_net import NetConfig, NetStatus

MAC = bytes.fromhex("020000000001")


class NetSink(Device):
    """One pair of queues."""

    device_id = DeviceId.NET
    queues = ("rx", "tx")
    max_queue_size = 1024
    features = int(NetF.MAC | NetF.STATUS | NetF.MTU | NetF.MRG_RXBUF)
    config = NetConfig(MAC, status=int(NetStatus.LINK_UP), max_virtqueue_pairs=1, mtu=1500).pack()

    def __init__(self) -> None:
        self.frames = 0

    def rx(self, queue: DeviceQueue) -> None:
        """Buffers stay where they are: there is nothing to receive."""

    def tx(self, queue: DeviceQueue) -> None:
        for chain in queue:
            queue.push(chain, 0)
            self.frames += 1
