# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""vhost for Python: a virtio device's data plane in any process."""

from __future__ import annotations

from vhost import devices, drivers, kernel
from vhost.chain import Chain
from vhost.device_queue import DeviceQueue
from vhost.devices.base import Device
from vhost.dirty_log import DirtyLog
from vhost.driver_queue import DriverQueue
from vhost.errors import (
    DeviceBusy,
    InvalidGuestMemory,
    InvalidQueue,
    IoctlError,
    ProtocolError,
    QueueBroken,
    VhostError,
)
from vhost.features import DeviceId, ProtocolF, Status, VirtioF
from vhost.inprocess import InProcess
from vhost.memory import GuestMemory, Region
from vhost.ops import VhostOps
from vhost.user.backend import Backend
from vhost.user.frontend import Frontend
from vhost.user.server import Server, serve
from vhost.wire import Struct

__all__ = [
    "Backend",
    "Chain",
    "Device",
    "DeviceBusy",
    "DeviceId",
    "DeviceQueue",
    "DirtyLog",
    "DriverQueue",
    "Frontend",
    "GuestMemory",
    "InProcess",
    "InvalidGuestMemory",
    "InvalidQueue",
    "IoctlError",
    "ProtocolError",
    "ProtocolF",
    "QueueBroken",
    "Region",
    "Server",
    "Status",
    "Struct",
    "VhostError",
    "VhostOps",
    "VirtioF",
    "devices",
    "drivers",
    "kernel",
    "serve",
]
