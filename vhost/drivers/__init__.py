# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Drivers in user space, for any back-end."""

from vhost.drivers.base import Driver
from vhost.drivers.blk import Blk, BlkError
from vhost.drivers.net import Frame, Net, NetError
from vhost.drivers.rng import Rng
from vhost.drivers.vsock import Vsock

__all__ = ["Blk", "BlkError", "Driver", "Frame", "Net", "NetError", "Rng", "Vsock"]
