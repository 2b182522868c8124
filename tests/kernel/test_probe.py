# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vhost probe`` on the kernel's nodes, and ``vhost ioctls``, as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kernel.vdpa_bus import vhost_vdpa


def vhost(*words: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "vhost", *words], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout or done.stderr


@pytest.mark.kernel("net", "vsock", "scsi")
def test_vhost_nodes() -> None:
    report = json.loads(vhost("probe", "/dev/vhost-net", "--json"))
    assert report["device"] == "net"
    assert report["queues"] == 2
    assert {"VERSION_1", "ACCESS_PLATFORM", "MRG_RXBUF"} <= set(report["feature_names"])
    assert "IOTLB_MSG_V2" in report["backend_feature_names"]
    assert "VERSION_1" in vhost("probe", "/dev/vhost-vsock")
    assert "queues                  3" in vhost("probe", "/dev/vhost-scsi")
    assert "no vhost device that this package knows" in vhost("probe", "/dev/null", code=1)


@pytest.mark.kernel("vdpa", "vdpa_sim")
def test_vdpa_node() -> None:
    with vhost_vdpa("probed", "vdpasim_net") as path:
        report = json.loads(vhost("probe", path, "--json"))
        assert report["device"] == "net"
        assert report["queues"] == 3
        assert report["groups"] == [0, 0, 1]
        assert report["address_spaces"] == 2
        assert "MAC" in report["feature_names"]
        assert "iova range" in vhost("probe", path)
