# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A disk behind a virtual IOMMU: QEMU translates for us, what Linux maps and unmaps around each request.

Linux unmaps either at once (``iommu.strict=1``), which is a miss and an invalidation for each buffer, or many
buffers together and later, in which case they are invalidated by ranges that cover the ring, too.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from guest.machine import Guest, vhost_user_blk
from peers.conftest import Boot
from peers.support import Process, make_disk, run
from vhost.features import VirtioF
from vhost.iotlb import IotlbType

pytestmark = pytest.mark.guest

MIB = 1 << 20
SIZE = 96 * MIB

# `vhost serve blk`, with all messages on standard error.
DISK = """
import logging, sys
import vhost
from vhost.memory import install_sigbus_handler

logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(message)s")
install_sigbus_handler()
path, disk, handler, queues = sys.argv[1:]
with vhost.Server(vhost.devices.Blk(disk, num_queues=int(queues), handler=handler), path) as server:
    print("ready", file=sys.stderr, flush=True)
    server.serve_forever()
"""


@dataclass
class Setup:
    guest: Guest
    disk: Path
    process: Process
    packed: bool

    def messages(self) -> Counter[IotlbType]:
        kinds = re.findall(r"^IOTLB_MSG .* type=(\d+)", self.process.errors(), re.MULTILINE)
        return Counter(IotlbType(int(kind)) for kind in kinds)


@contextmanager
def guest_with_disk(
    boot: Boot, folder: Path, handler: str, *, packed: bool, strict: bool, queues: int = 1
) -> Iterator[Setup]:
    disk = make_disk(folder / "disk.raw", SIZE)
    command = [sys.executable, "-c", DISK, str(folder / "s"), str(disk), handler, str(queues)]
    process = Process(command, ready="ready")
    try:
        devices = vhost_user_blk(folder / "s", queues=queues, packed=packed, iommu=True)
        append = f"intel_iommu=on iommu.strict={int(strict)}"
        with boot(devices, cpus=queues, append=append) as guest:
            yield Setup(guest, disk, process, packed)
        assert "Traceback" not in process.errors()
    finally:
        process.kill()


@pytest.fixture(
    scope="module",
    params=[("c", False, True), ("c", True, False), ("python", False, False), ("python", True, True)],
    ids=["c-split-strict", "c-packed-lazy", "python-split-lazy", "python-packed-strict"],
)
def setup(
    request: pytest.FixtureRequest, boot: Boot, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Setup]:
    handler, packed, strict = request.param
    folder = tmp_path_factory.mktemp("iommu")
    with guest_with_disk(boot, folder, handler, packed=packed, strict=strict) as found:
        yield found


def test_negotiated(setup: Setup) -> None:
    features = setup.guest.features()
    assert features & VirtioF.ACCESS_PLATFORM
    assert bool(features & VirtioF.RING_PACKED) == setup.packed
    # The device has a domain of its own, in which addresses are translated.
    group = "/sys/bus/virtio/devices/virtio0/../iommu_group/type"
    assert setup.guest.read(group) in ("DMA", "DMA-FQ")


def test_io(setup: Setup, iocheck: Path) -> None:
    before = setup.messages()
    setup.guest.run(f"iocheck write /dev/vda 5 0 {16 * MIB}")
    run(iocheck, "verify", setup.disk, "5", "0", str(16 * MIB))
    run(iocheck, "write", setup.disk, "6", str(32 * MIB), str(8 * MIB))
    setup.guest.run(f"iocheck verify /dev/vda 6 {32 * MIB} {8 * MIB}")
    flowed = setup.messages() - before
    assert flowed[IotlbType.UPDATE] > 100, flowed  # the front-end sends none that was not missed
    assert flowed[IotlbType.INVALIDATE] > 3, flowed


def test_reset(setup: Setup, iocheck: Path) -> None:
    """The reset button with requests in flight: firmware and kernel map everything anew."""
    setup.guest.run("rm -f /tmp/stop")
    setup.guest.start(f"iocheck churn /dev/vda 1 {80 * MIB} {4 * MIB} 4 /tmp/stop")
    setup.guest.run("until [ $(awk '{print $9}' /sys/block/vda/stat) -gt 0 ]; do :; done", timeout=30)
    setup.guest.reset()
    assert setup.guest.features() & VirtioF.ACCESS_PLATFORM
    setup.guest.run(f"iocheck write /dev/vda 9 {80 * MIB} {4 * MIB}")
    run(iocheck, "verify", setup.disk, "9", str(80 * MIB), str(4 * MIB))
    setup.guest.run(f"iocheck verify /dev/vda 5 0 {MIB}")


# Without a reset: QEMU remembers where the second queue's used ring was, and gives the device up when the
# firmware, which uses one queue, comes with the IOMMU still off.
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_two_queues(boot: Boot, tmp_path: Path, iocheck: Path, packed: bool) -> None:
    """Misses of one ring while the other is served, and invalidations under both."""
    with guest_with_disk(boot, tmp_path, "c", packed=packed, strict=packed, queues=2) as setup:
        jobs = [setup.guest.start(f"iocheck write /dev/vda {n} {n * 4 * MIB} {4 * MIB}") for n in range(4)]
        for job in jobs:
            job.wait()
        for n in range(4):
            run(iocheck, "verify", setup.disk, str(n), str(n * 4 * MIB), str(4 * MIB))
        setup.guest.run(f"iocheck verify /dev/vda 1 {4 * MIB} {4 * MIB}")
