# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Our front-end on QEMU's contrib/vhost-user-blk, that is on libvhost-user: what it logs, by its own lights.

It has split rings only, and serves one session, on a socket that it listens on or inherits.
"""

from __future__ import annotations

import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from devices.disks import pattern
from peers.catalogue import CONTRIB_BLK
from peers.support import DEADLINE, require
from user.log_check import check_migration
from vhost import Frontend, drivers
from vhost.features import ProtocolF

pytestmark = pytest.mark.peer

CONTENT = pattern(1 << 20)


@pytest.fixture
def frontend(tmp_path: Path) -> Iterator[Frontend]:
    require("contrib-vhost-user-blk")
    path = str(tmp_path / "s")
    # It insists on O_DIRECT, which on tmpfs needs no buffers that are aligned.
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as image, socket.socket(socket.AF_UNIX) as listener:
        image.write(CONTENT)
        image.flush()
        listener.bind(path)
        listener.listen()
        fd = listener.fileno()
        process = subprocess.Popen([CONTRIB_BLK, f"--fd={fd}", "-b", image.name], pass_fds=[fd])
        try:
            with Frontend.connect(path, timeout=DEADLINE) as session:
                yield session
        finally:
            process.kill()
            process.wait(DEADLINE)


def test_the_pages_that_it_writes_are_in_our_log(frontend: Frontend) -> None:
    assert frontend.protocol_features & ProtocolF.LOG_SHMFD
    with drivers.Blk(frontend) as disk:
        check_migration(frontend, disk, CONTENT)
