# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""In-flight tracking with the implementation that everybody has, libvhost-user: QEMU's contrib/vhost-user-blk
and ours kill each other off, and each goes on with the buffer that the other one left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from devices.load import Load
from peers.catalogue import CONTRIB_BLK, PEERS
from peers.support import DEADLINE, make_disk
from vhost import drivers
from vhost.features import BlkF, VirtioF
from vhost.user.frontend import Frontend

pytestmark = pytest.mark.peer

SIZE = 4 << 20
ROUNDS = 30
OURS_ALONE = int(VirtioF.IN_ORDER) | int(BlkF.MQ)
"""What contrib/vhost-user-blk does not offer."""


Command = Callable[[Path, Path], list[str]]


@pytest.fixture
def shm() -> Iterator[Path]:
    """A file system whose O_DIRECT, which contrib/vhost-user-blk asks for, minds no alignment in memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@contextmanager
def killed_at_the_end(command: list[str]) -> Iterator[None]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(DEADLINE)


def contrib(path: Path, disk: Path) -> list[str]:
    return [str(CONTRIB_BLK), "-s", str(path), "-b", str(disk)]


def ours(path: Path, disk: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "vhost",
        "serve",
        "blk",
        "--socket-path",
        str(path),
        "--blk-file",
        str(disk),
    ]


@pytest.mark.parametrize(
    "lives",
    [[contrib, contrib, contrib, contrib], [contrib, ours, contrib, ours], [ours, contrib, ours, contrib]],
    ids=["theirs alone", "theirs first", "ours first"],
)
def test_each_goes_on_with_the_others_buffer(
    tmp_path: Path, shm: Path, lives: list[Command], no_leaks: None
) -> None:
    if missing := PEERS["contrib-vhost-user-blk"].missing():
        pytest.skip(f"{missing} (tests/install_peers.py --bench)")
    disk = make_disk(shm / "disk.raw", SIZE)
    load: Load | None = None
    again = 0
    for life, command in enumerate(lives):
        path = tmp_path / f"s{life}"
        with killed_at_the_end(command(path, disk)):
            frontend = Frontend.connect(path, retry=DEADLINE)
            assert frontend.tracks_inflight
            if load is None:
                blk = drivers.Blk(frontend, packed=False, depth=24, without=OURS_ALONE)
                load = Load(blk)
            else:
                again += blk.in_flight
                assert blk.restart(frontend)
            for _ in range(ROUNDS):
                load.fill()
                load.reap(wait=True)
            load.fill()
            if life == len(lives) - 1:
                load.check(disk)
        load.reap()
        load.fill()
        frontend.close()
    assert again > len(lives)
    blk._close_events()
    blk._drop_inflight()
    assert os.path.getsize(disk) == SIZE
    del blk, load, frontend
