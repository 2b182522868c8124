# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Ask a device node of the kernel what it offers: a session without memory or rings, nothing left behind."""

from __future__ import annotations

import os
from enum import IntFlag
from pathlib import Path
from typing import Any

from vhost.errors import VhostError
from vhost.features import DEVICE_FEATURES, BackendF, DeviceId, VhostF, VirtioF, feature_names
from vhost.kernel.base import KernelVhost
from vhost.kernel.net import VhostNet
from vhost.kernel.scsi import VhostScsi
from vhost.kernel.vdpa import VhostVdpa
from vhost.kernel.vsock import VhostVsock

_KINDS: tuple[tuple[type[KernelVhost], DeviceId], ...] = (
    (VhostNet, DeviceId.NET),
    (VhostVsock, DeviceId.VSOCK),
    (VhostScsi, DeviceId.SCSI),
)


def probe_node(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the device at ``path`` (/dev/vhost-net, /dev/vhost-vdpa-0, ...) offers, as plain data. IoctlError
    with EBUSY if it is a vDPA device that another process has open."""
    name = Path(path).name
    if name.startswith("vhost-vdpa"):
        with VhostVdpa(path) as device:
            number = device.get_device_id()
            size = device.get_config_size()
            first, last = device.get_iova_range()
            report = _report(device, number)
            report["ring_size"] = device.get_vring_num_max()
            report["iova_range"] = [first, last]
            report["config_bytes"] = device.get_config(0, size).rstrip(b"\0").hex()
            if device.backend_features & BackendF.IOTLB_ASID:
                report["groups"] = [device.get_vring_group(ring) for ring in range(report["queues"])]
                report["address_spaces"] = device.get_as_num()
            return report
    for kind, number in _KINDS:
        if name == Path(kind.path).name:
            with kind(path=path) as node:
                return _report(node, number)
    raise VhostError(f"{os.fspath(path)} is no vhost device that this package knows")


def _report(device: KernelVhost, number: int) -> dict[str, Any]:
    known = {int(one): one for one in DeviceId}
    kinds: tuple[type[IntFlag], ...] = ()
    if number in known and known[number] in DEVICE_FEATURES:
        kinds = (DEVICE_FEATURES[known[number]],)
    features = device.get_features()
    backend = device.get_backend_features() if device.has_backend_features else 0
    return {
        "node": device.name,
        "device": known[number].name.lower() if number in known else f"device {number}",
        "features": f"{features:#x}",
        "feature_names": feature_names(features, *kinds, VirtioF, VhostF),
        "backend_features": f"{backend:#x}",
        "backend_feature_names": feature_names(backend, BackendF),
        "queues": device.get_queue_num(),
    }


def format_node(report: dict[str, Any]) -> str:
    """For people."""

    def shown(value: Any) -> str:
        if isinstance(value, list):
            return " ".join(f"{one:#x}" if isinstance(one, int) and one > 999 else str(one) for one in value)
        return str(value)

    return "\n".join(f"{key.replace('_', ' '):24}{shown(value) or 'none'}" for key, value in report.items())
