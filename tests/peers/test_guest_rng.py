# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Entropy sources under a Linux guest's /dev/hwrng: `vhost serve rng`, and a Device as a user writes it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from guest.machine import vhost_user_rng
from peers.conftest import Boot
from peers.support import Process, Serve
from vhost.features import VirtioF

pytestmark = pytest.mark.guest

RNG = "/sys/class/misc/hw_random"


def test_serve_rng(boot: Boot, tmp_path: Path) -> None:
    with Serve("rng", tmp_path / "s"), boot(vhost_user_rng(tmp_path / "s")) as guest:
        assert guest.features() & VirtioF.VERSION_1
        assert guest.read(f"{RNG}/rng_current").startswith("virtio_rng")
        guest.run("dd if=/dev/hwrng of=/tmp/data bs=1024 count=4 iflag=fullblock")
        data = bytes.fromhex(guest.run("hexdump -ve '1/1 \"%02x\"' /tmp/data").text)
        assert len(data) == 4096
        # 4096 random bytes miss about 256 * e^-16 of the 256 values; 200 is beyond any doubt.
        assert len(set(data)) > 200
        guest.reset()
        assert guest.read(f"{RNG}/rng_current").startswith("virtio_rng")
        guest.run("dd if=/dev/hwrng of=/dev/null bs=1024 count=1 iflag=fullblock")


# The class of the README, but with bytes that can be recognised. QEMU's vhost-user-rng passes on
# whatever ring format the device offers: only the device can choose the split one.
DEVICE = """
import sys
import vhost

class Entropy(vhost.Device):
    device_id = vhost.DeviceId.RNG
    queues = ("requestq",)

    def requestq(self, queue):
        for chain in queue:
            size = chain.writable_len
            queue.push(chain, chain.write((b"pyvhost!" * (size // 8 + 1))[:size]))

class SplitEntropy(Entropy):
    def offered_features(self):
        return super().offered_features() & ~vhost.VirtioF.RING_PACKED

# vhost.serve(), with a word in between.
with vhost.Server(Entropy() if sys.argv[2] == "packed" else SplitEntropy(), sys.argv[1]) as server:
    print("ready", file=sys.stderr, flush=True)
    server.serve_forever()
"""


@pytest.mark.parametrize("ring", ["split", "packed"])
def test_device_of_one_class(boot: Boot, tmp_path: Path, ring: str) -> None:
    process = Process([sys.executable, "-c", DEVICE, str(tmp_path / "s"), ring], ready="ready")
    try:
        with boot(vhost_user_rng(tmp_path / "s")) as guest:
            assert bool(guest.features() & VirtioF.RING_PACKED) == (ring == "packed")
            # The kernel takes bytes for its own pool at any time, so a read may begin anywhere in
            # the pattern, and anywhere again with each buffer of the driver.
            guest.run("dd if=/dev/hwrng of=/tmp/data bs=64 count=4 iflag=fullblock")
            text = guest.run("tr -c 'a-z!' '?' </tmp/data").text
            assert len(text) == 256
            assert set(text) == set("pyvhost!")
            assert text.count("pyvhost!") >= 16
    finally:
        process.kill()
