# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Ask a back-end what it offers: one connection, no memory, no rings, nothing left behind."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from vhost.errors import ProtocolError
from vhost.features import DEVICE_FEATURES, ProtocolF, VhostF, VirtioF, feature_names, guess_device
from vhost.user.frontend import Frontend
from vhost.virtio_blk import SECTOR, BlkConfig

CONFIG_SIZES = (256, BlkConfig.SIZE, 60, 57, 36, 24, 12, 8)
"""Sizes to try: back-ends refuse more than they have, and do not say how much that is."""


def probe(path: str | os.PathLike[str], *, timeout: float | None = 5.0) -> dict[str, Any]:
    """What the back-end that listens on ``path`` offers, as plain data.

    vhost-user does not say what kind of device it is: ``device`` is guessed from the feature bits, and
    ``config`` decoded accordingly.
    """
    with Frontend.connect(path, timeout=timeout) as frontend:
        features = frontend.offered_features
        protocol = frontend.offered_protocol_features
        guess = guess_device(features)
        device = None if guess is None else guess.name.lower()
        kinds = () if guess is None else (DEVICE_FEATURES[guess],)
        report: dict[str, Any] = {
            "socket": os.fspath(path),
            "device": device,
            "features": f"{features:#x}",
            "feature_names": feature_names(features, *kinds, VirtioF, VhostF),
            "protocol_features": f"{protocol:#x}",
            "protocol_feature_names": feature_names(protocol, ProtocolF),
            "queues": frontend.get_queue_num() if protocol & ProtocolF.MQ else None,
            "memory_slots": None,
            "config": None,
            "config_bytes": None,
        }
        if frontend.protocol_features & ProtocolF.CONFIGURE_MEM_SLOTS:
            report["memory_slots"] = frontend.get_max_mem_slots()
        if frontend.protocol_features & ProtocolF.CONFIG:
            config = _read_config(frontend)
            report["config_bytes"] = config.hex()
            if device == "block":
                decoded = BlkConfig.unpack(config)
                report["config"] = {**asdict(decoded), "bytes": decoded.capacity * SECTOR}
        return report


def _read_config(frontend: Frontend) -> bytes:
    for size in CONFIG_SIZES:
        try:
            return frontend.get_config(0, size).rstrip(b"\0")
        except ProtocolError as error:
            if frontend.session.closed or size == CONFIG_SIZES[-1]:
                raise
            last = error
    raise last


def format_report(report: dict[str, Any]) -> str:
    """For people."""

    def names(key: str) -> str:
        return " ".join(report[key]) or "none"

    lines = [
        f"socket             {report['socket']}",
        f"device             {report['device'] or 'unknown'} (guessed from the features)",
        f"features           {report['features']}",
        f"                   {names('feature_names')}",
        f"protocol features  {report['protocol_features']}",
        f"                   {names('protocol_feature_names')}",
        f"queues             {_known(report['queues'])}",
        f"memory slots       {_known(report['memory_slots'])}",
    ]
    if report["config"]:
        shown = [f"{name} {value}" for name, value in report["config"].items() if value]
        lines.append("config             " + ", ".join(shown))
    elif report["config_bytes"]:
        lines.append(f"config             {report['config_bytes']}")
    return "\n".join(lines)


def _known(value: int | None) -> str:
    return "not said" if value is None else str(value)
