# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A virtio entropy source (VIRTIO 5.4), and the smallest complete device there is."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vhost.devices.base import Device
from vhost.features import DeviceId

if TYPE_CHECKING:
    from vhost.virtqueue import DeviceQueue


#: Fewer bytes than asked for are fine (5.4.6.2), and a guest may ask for 4 GiB.
MOST = 1 << 16


class Rng(Device):
    """Fills the driver's buffers with bytes from the kernel's random number generator."""

    device_id = DeviceId.RNG
    queues = ("requestq",)
    cross_endian = True  # there is not one number in its requests

    def requestq(self, queue: DeviceQueue) -> None:
        for chain in queue:
            queue.push(chain, chain.write(os.urandom(min(chain.writable_len, MOST))))
