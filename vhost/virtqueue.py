# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Virtqueues, split and packed, from the device's and from the driver's side.

Only a front door: the sides are in ``device_queue`` and ``driver_queue``, what a device takes off its
queue in ``chain``.
"""

from __future__ import annotations

from vhost.chain import Buffer, Chain
from vhost.device_queue import DeviceQueue
from vhost.driver_queue import DriverQueue, Layout

__all__ = ["Buffer", "Chain", "DeviceQueue", "DriverQueue", "Layout"]
