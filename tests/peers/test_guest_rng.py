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


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_serve_rng(boot: Boot, tmp_path: Path, packed: bool) -> None:
    with Serve("rng", tmp_path / "s"), boot(vhost_user_rng(tmp_path / "s", packed=packed)) as guest:
        assert bool(guest.features() & VirtioF.RING_PACKED) == packed
        assert guest.read(f"{RNG}/rng_current").startswith("virtio_rng")
        guest.run("dd if=/dev/hwrng of=/tmp/data bs=1024 count=4 iflag=fullblock")
        data = bytes.fromhex(guest.run("hexdump -ve '1/1 \"%02x\"' /tmp/data").text)
        assert len(data) == 4096
        # 4096 random bytes miss about 16 * e^-16 of the 256 values; 200 is beyond any doubt.
        assert len(set(data)) > 200
        guest.reset()
        assert guest.read(f"{RNG}/rng_current").startswith("virtio_rng")
        guest.run("dd if=/dev/hwrng of=/dev/null bs=1024 count=1 iflag=fullblock")


# The class of the README, but with bytes that can be recognised.
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

print("ready", file=sys.stderr, flush=True)
vhost.serve(Entropy(), sys.argv[1])
"""


def test_device_of_one_class(boot: Boot, tmp_path: Path) -> None:
    script = tmp_path / "entropy.py"
    script.write_text(DEVICE)
    process = Process([sys.executable, str(script), str(tmp_path / "s")], ready="ready")
    try:
        with boot(vhost_user_rng(tmp_path / "s")) as guest:
            # The kernel takes bytes for its own pool at any time, so a read may begin anywhere in
            # the pattern, and anywhere again with each buffer of the driver.
            guest.run("dd if=/dev/hwrng of=/tmp/data bs=64 count=4 iflag=fullblock")
            text = guest.run("tr -c 'a-z!' '?' </tmp/data").text
            assert len(text) == 256
            assert set(text) == set("pyvhost!")
            assert text.count("pyvhost!") >= 16
    finally:
        process.kill()
