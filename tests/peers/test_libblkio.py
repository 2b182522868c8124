# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""libblkio on `vhost serve blk`: a front-end and a driver that nobody here wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from peers.support import Serve, make_disk, run

pytestmark = pytest.mark.peer

MIB = 1 << 20
SIZE = 64 * MIB


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_disk(tmp_path_factory.mktemp("libblkio") / "disk.raw", SIZE)


@pytest.fixture(scope="module")
def serve(disk: Path) -> Iterator[Serve]:
    """One back-end for all: each test is a session of its own after another one's end."""
    with Serve("blk", disk.with_name("s"), "--blk-file", str(disk), "--num-queues", "2") as server:
        yield server


@pytest.mark.parametrize("wait", ["poll", "event"])
@pytest.mark.parametrize("depth", [1, 32, 128])
def test_verified(serve: Serve, disk: Path, blkio_verify: Path, iocheck: Path, depth: int, wait: str) -> None:
    seed = depth * 2 + (wait == "poll")
    size = 16 * MIB
    run(blkio_verify, serve.path, "1024", "1", str(depth), wait, str(seed), str(size))
    run(iocheck, "verify", disk, str(seed), "0", str(size))


@pytest.mark.parametrize("wait", ["poll", "event"])
def test_verified_on_two_queues(
    serve: Serve, disk: Path, blkio_verify: Path, iocheck: Path, wait: str
) -> None:
    run(blkio_verify, serve.path, "256", "2", "16", wait, "7", str(SIZE))
    run(iocheck, "verify", disk, "7", "0", str(SIZE))


@pytest.mark.parametrize("access", ["randread", "randwrite"])
@pytest.mark.parametrize("wait", ["poll", "event"])
@pytest.mark.parametrize("depth", [1, 32, 128])
def test_example_client(serve: Serve, blkio_bench: Path, depth: int, wait: str, access: str) -> None:
    options = ["--runtime=3", f"--iodepth={depth}", f"--readwrite={access}"]
    options += ["--poll"] if wait == "poll" else []
    output = run(
        blkio_bench, *options, "virtio-blk-vhost-user", f"path={serve.path}", env={"BLKIO_QUEUE_SIZE": "1024"}
    )
    assert json.loads(output)["aggregate"]["kiops"] > 0
