# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""User Mode Linux as a front-end: a kernel that kicks and is called by messages alone.

Its virtio_uml takes INBAND_NOTIFICATIONS wherever they are offered, and then has no eventfds. It knows
nothing of packed rings (it would say that they begin at 0, which they do not) nor of IOMMUs, and passes all
bits on to its drivers, so neither is offered.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

import vhost
from peers.catalogue import BUSYBOX, UML
from peers.support import require
from user import hostile as h
from vhost.features import ProtocolF, VirtioF

pytestmark = pytest.mark.guest

SIZE = 16 << 20
INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox insmod /virtio_blk.ko
/bin/busybox dd if=/dev/vda of=/dev/null bs=64k iflag=direct 2>/dev/null && echo "read done"
/bin/busybox md5sum /dev/vda
/bin/busybox dd if=/init of=/dev/vda bs=512 conv=fsync 2>/dev/null && echo "write done"
/bin/busybox poweroff -f
"""


class PythonDisk(vhost.devices.Blk):
    """Served by the session's thread, without the engine."""

    def start_queue(self, queue: vhost.DeviceQueue) -> bool:
        return False


def build_initrd(folder: Path) -> Path:
    root = folder / "root"
    for name in ("bin", "dev", "proc"):
        (root / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin")
    (module,) = UML.glob("usr/lib/uml/modules/*/kernel/drivers/block/virtio_blk.ko")
    shutil.copy(module, root)
    (root / "init").write_text(INIT)
    (root / "init").chmod(0o755)
    archive = folder / "initrd.cpio"
    with archive.open("wb") as file:
        names = "\n".join(str(path.relative_to(root)) for path in root.rglob("*"))
        command = ["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0"]
        subprocess.run(command, input=names.encode(), stdout=file, cwd=root, check=True)
    return archive


def run_uml(folder: Path, *arguments: str) -> str:
    """Until it powers off: what it said. All of its processes end, whatever happens."""
    log = folder / "console"
    command = [UML / "usr/bin/linux.uml", "mem=128M", "con=null", "con0=null,fd:1", "quiet", *arguments]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "TMPDIR": "/dev/shm", "HOME": str(folder)},
        )
        try:
            process.wait(120)
        finally:
            # Its helpers are in the session, too, and would hold the file.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return log.read_text(errors="replace")


@pytest.mark.parametrize("kind", [vhost.devices.Blk, PythonDisk], ids=["engine", "python"])
def test_disk_over_messages(kind: type[vhost.devices.Blk], tmp_path: Path) -> None:
    require("uml", "busybox", "cpio")
    initrd = build_initrd(tmp_path)
    image = tmp_path / "disk.raw"
    image.write_bytes(os.urandom(SIZE))
    digest = hashlib.md5(image.read_bytes()).hexdigest()
    device = kind(image)
    negotiated: list[int] = []
    # It passes whatever is offered to its drivers, and then has no DMA to serve them with.
    refused = int(VirtioF.ACCESS_PLATFORM | VirtioF.RING_PACKED)
    with h.served(device, tmp_path / "s", without_features=refused) as server:
        start = device.claim

        def claim(session: vhost.devices.base.Attached) -> None:
            negotiated.extend(backend.session.protocol_features for backend in server.backends.values())
            start(session)

        device.claim = claim  # type: ignore[method-assign]
        console = run_uml(tmp_path, f"initrd={initrd}", f"virtio_uml.device={tmp_path / 's'}:2")
    device.close()
    assert "read done" in console, console
    assert digest in console, console
    assert "write done" in console, console
    assert image.read_bytes()[: len(INIT)] == INIT.encode()
    assert negotiated
    assert all(mask & ProtocolF.INBAND_NOTIFICATIONS for mask in negotiated)
