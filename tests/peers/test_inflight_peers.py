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
from peers.support import DEADLINE, make_disk, require, run
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


LAYOUT = """
#include <stddef.h>
#include "inflight.h"
#define _LINUX_VIRTIO_RING_H /* the structs of rings are ours */
#include <rte_vhost.h>
#define SAME(ours, field, theirs, their_field) \\
    _Static_assert(offsetof(struct ours, field) == offsetof(struct theirs, their_field) && \\
                   sizeof(((struct ours *)0)->field) == sizeof(((struct theirs *)0)->their_field), #field)
#define SPLIT(ours, theirs) SAME(inflight_split_region, ours, rte_vhost_inflight_info_split, theirs)
#define PACKED(ours, theirs) SAME(inflight_packed_region, ours, rte_vhost_inflight_info_packed, theirs)
#define SPLIT_ENTRY(field) SAME(inflight_split_desc, field, rte_vhost_inflight_desc_split, field)
#define PACKED_ENTRY(field) SAME(inflight_packed_desc, field, rte_vhost_inflight_desc_packed, field)
SPLIT(features, features); SPLIT(version, version); SPLIT(desc_num, desc_num);
SPLIT(last_batch_head, last_inflight_io); SPLIT(used_idx, used_idx);
SPLIT_ENTRY(inflight); SPLIT_ENTRY(next); SPLIT_ENTRY(counter);
PACKED(features, features); PACKED(version, version); PACKED(desc_num, desc_num);
PACKED(free.free_head, free_head); PACKED(free.old_free_head, old_free_head);
PACKED(used.used_idx, used_idx); PACKED(used.old_used_idx, old_used_idx);
PACKED(used.used_wrap_counter, used_wrap_counter); PACKED(used.old_used_wrap_counter, old_used_wrap_counter);
PACKED_ENTRY(inflight); PACKED_ENTRY(next); PACKED_ENTRY(last); PACKED_ENTRY(num); PACKED_ENTRY(counter);
PACKED_ENTRY(id); PACKED_ENTRY(flags); PACKED_ENTRY(len); PACKED_ENTRY(addr);
_Static_assert(offsetof(struct inflight_split_region, desc) ==
               offsetof(struct rte_vhost_inflight_info_split, desc), "desc");
_Static_assert(offsetof(struct inflight_packed_region, desc) ==
               offsetof(struct rte_vhost_inflight_info_packed, desc), "desc");
_Static_assert(sizeof(struct inflight_split_desc) == sizeof(struct rte_vhost_inflight_desc_split), "entry");
_Static_assert(sizeof(struct inflight_packed_desc) == sizeof(struct rte_vhost_inflight_desc_packed), "entry");
"""


def test_layout_is_that_of_dpdk(tmp_path: Path) -> None:
    """Of both formats; nobody else has a packed one."""
    require("gcc", "dpdk")
    source = tmp_path / "layout.c"
    source.write_text(LAYOUT)
    csrc = Path(__file__).parents[2] / "csrc"
    folders = ["/usr/include/dpdk", *map(str, Path("/usr/include").glob("*/dpdk"))]
    includes = [f"-I{folder}" for folder in folders]
    run(
        "gcc", "-fsyntax-only", "-w", "-std=gnu11", f"-I{csrc}", *includes, "-include", "rte_config.h", source
    )
