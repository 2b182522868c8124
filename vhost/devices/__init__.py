# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Devices, to be served to guests and drivers."""

from vhost.devices.base import Device
from vhost.devices.blk import Blk
from vhost.devices.net import Net
from vhost.devices.rng import Rng

__all__ = ["Blk", "Device", "Net", "Rng"]
