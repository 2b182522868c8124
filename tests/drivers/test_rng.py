# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The entropy driver, on our device and on one that gives little at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from devices.disks import serving
from vhost.devices.base import Device
from vhost.devices.rng import Rng as RngDevice
from vhost.drivers import Rng
from vhost.errors import InactiveFeature, ReplyTimeout
from vhost.features import DeviceId, VirtioF
from vhost.user.frontend import Frontend
from vhost.virtqueue import DeviceQueue


@pytest.mark.parametrize("packed", [False, True])
def test_read(tmp_path: Path, packed: bool, no_leaks: None) -> None:
    with (
        serving(RngDevice(), tmp_path / "s"),
        Frontend.connect(tmp_path / "s") as frontend,
        Rng(frontend, packed=packed) as rng,
    ):
        assert rng.packed is packed
        assert rng.read(0) == b""
        seen = set()
        for size in (1, 16, 4095, 4096, 4097, 100_000):
            data = rng.read(size)
            assert len(data) == size
            seen.add(data[:16])
        assert len(seen) == 6
        assert len(set(data)) == 256


class Counter(Device):
    """Gives the numbers from 0 on, three bytes at a time, of which the last buffer has fewer."""

    device_id = DeviceId.RNG
    queues = ("requestq",)

    def __init__(self) -> None:
        self.next = 0

    def offered_features(self) -> int:
        return int(VirtioF.VERSION_1)

    def requestq(self, queue: DeviceQueue) -> None:
        for chain in queue:
            size = min(3, chain.writable_len)
            queue.push(chain, chain.write(bytes((self.next + i) % 256 for i in range(size))))
            self.next += size


def test_short_answers_are_put_together(tmp_path: Path, no_leaks: None) -> None:
    with (
        serving(Counter(), tmp_path / "s"),
        Frontend.connect(tmp_path / "s") as frontend,
        Rng(frontend) as rng,
    ):
        assert not rng.packed
        assert rng.read(200) == bytes(range(200))
        assert rng.read(2) == bytes([200, 201])


def test_what_is_not_offered(tmp_path: Path, no_leaks: None) -> None:
    with (
        serving(Counter(), tmp_path / "s"),
        Frontend.connect(tmp_path / "s") as frontend,
        pytest.raises(InactiveFeature, match="offers no packed rings"),
    ):
        Rng(frontend, packed=True)


def test_timeout(tmp_path: Path, no_leaks: None) -> None:
    with (
        serving(RngDevice(), tmp_path / "s"),
        Frontend.connect(tmp_path / "s") as frontend,
        Rng(frontend, timeout=0.05) as rng,
    ):
        frontend.set_vring_enable(0, False)
        with pytest.raises(ReplyTimeout, match="16 random bytes"):
            rng.read(16)
