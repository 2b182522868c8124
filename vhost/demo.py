# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vhost demo``: a disk served by one process and driven by another through a packed ring. No VM, no
root; the same back-end then waits for a guest's command line, which is printed."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vhost.drivers.blk import Blk
from vhost.errors import VhostError
from vhost.features import BlkF, ProtocolF, VirtioF, feature_names
from vhost.user.frontend import Frontend
from vhost.virtio_blk import SECTOR

BLOCK = 4096
DEPTHS = (1, 32)
CHUNK = 128 << 10
SEED = 20


def demo(*, size: int, seconds: float) -> None:
    """Serve, write, read back, verify, measure; raises VhostError if the data differ."""
    with tempfile.TemporaryDirectory(prefix="vhost-demo-") as folder:
        image, path = Path(folder, "disk.raw"), Path(folder, "disk.sock")
        with image.open("wb") as file:
            file.truncate(size)
        command = [sys.executable, "-m", "vhost", "serve", "blk"]
        command += ["--socket-path", str(path), "--blk-file", str(image), "--serial", "pyvhost-demo"]
        server = subprocess.Popen(command)
        try:
            with (
                Frontend.connect(path, retry=10) as frontend,
                Blk(frontend, packed=True, depth=max(DEPTHS), queue_size=128) as disk,
            ):
                _show(frontend, disk, server.pid)
                _verify(disk, image)
                for depth in DEPTHS:
                    _measure(disk, depth, seconds)
        finally:
            server.terminate()
            server.wait()
    _show_qemu()


def _show(frontend: Frontend, disk: Blk, pid: int) -> None:
    kind = "packed" if disk.packed else "split"
    print(f"front-end: process {os.getpid()}, back-end: process {pid}, ring: {kind} of {disk.queue_size}")
    print(f"features: {' '.join(feature_names(disk.negotiated, BlkF, VirtioF))}")
    print(f"protocol features: {' '.join(feature_names(frontend.protocol_features, ProtocolF))}")
    size, queues = disk.capacity * SECTOR >> 20, disk.config.num_queues
    print(f"disk: {size} MiB, id {disk.get_id()!r}, {queues} queue(s)")


def _verify(disk: Blk, image: Path) -> None:
    """A pattern over the whole disk, in both directions, against the file as well."""
    pattern = random.Random(SEED)
    wrote, read = hashlib.sha256(), hashlib.sha256()
    step = CHUNK // SECTOR
    start = time.monotonic()
    for sector in range(0, disk.capacity, step):
        data = pattern.randbytes(min(step, disk.capacity - sector) * SECTOR)
        wrote.update(data)
        disk.write(sector, data)
    disk.flush()
    for sector in range(0, disk.capacity, step):
        read.update(disk.read(sector, min(step, disk.capacity - sector)))
    took = time.monotonic() - start
    with image.open("rb") as file:
        stored = hashlib.file_digest(file, "sha256")
    if not wrote.digest() == read.digest() == stored.digest():
        raise VhostError(f"data differ: wrote {wrote.hexdigest()}, read {read.hexdigest()}")
    print(f"verified: wrote and read {disk.capacity * SECTOR >> 20} MiB in {took:.1f} s, "
          f"sha256 {read.hexdigest()[:16]}... equals the file's")  # fmt: skip


def _measure(disk: Blk, depth: int, seconds: float) -> None:
    place = random.Random(SEED)
    blocks = disk.capacity * SECTOR // BLOCK
    latencies: list[float] = []

    def submit() -> None:
        disk.submit_read(place.randrange(blocks) * (BLOCK // SECTOR), BLOCK // SECTOR, time.monotonic())

    start = time.monotonic()
    for _ in range(depth):
        submit()
    while disk.in_flight:
        done = disk.poll(10.0)
        now = time.monotonic()
        if not done:
            raise VhostError("the disk did not answer within 10 s")
        for one in done:
            if one.error is not None:
                raise one.error
            latencies.append(now - one.token)
            if now - start < seconds:
                submit()
    took = time.monotonic() - start
    latencies.sort()
    at = {f"p{share:g}": latencies[int(len(latencies) * share / 100)] * 1e6 for share in (50, 90, 99, 99.9)}
    shown = ", ".join(f"{name} {value:.0f}" for name, value in at.items())
    print(f"4 KiB random read, depth {depth:2}: {len(latencies) / took:8.0f} IOPS; latency in us: {shown}")


def _show_qemu() -> None:
    print("""
A guest on the same back-end:
  vhost serve blk --socket-path /tmp/disk.sock --blk-file disk.raw
  qemu-system-x86_64 -M q35 -m 512 \\
    -object memory-backend-memfd,id=mem,size=512M,share=on -numa node,memdev=mem \\
    -chardev socket,id=disk,path=/tmp/disk.sock \\
    -device vhost-user-blk-pci,chardev=disk,packed=on ...""")
