# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The Linux kernel's own back-ends: vhost-net, vhost-vsock, vhost-scsi and vDPA, as VhostOps."""

from vhost.kernel.base import KernelVhost
from vhost.kernel.iotlb import Access, IotlbMessage, IotlbType
from vhost.kernel.net import VhostNet
from vhost.kernel.scsi import VhostScsi
from vhost.kernel.vdpa import VhostVdpa
from vhost.kernel.vsock import VhostVsock

__all__ = [
    "Access",
    "IotlbMessage",
    "IotlbType",
    "KernelVhost",
    "VhostNet",
    "VhostScsi",
    "VhostVdpa",
    "VhostVsock",
]
