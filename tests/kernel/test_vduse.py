# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Our block device, served to this kernel by VDUSE: /dev/vdX through virtio_vdpa, and vhost-vdpa."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import vhost
from kernel import vdpa_bus
from peers import programs

pytestmark = pytest.mark.kernel("vduse")

MIB = 1 << 20
SIZE = 64 * MIB
NAME = "vd0"
KILLS = 4


def wait_for(what: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


class Daemon:
    """``vhost serve blk --vduse``, in a process of its own."""

    def __init__(self, disk: Path, *options: str) -> None:
        command = [sys.executable, "-m", "vhost", "-v", "serve", "blk", "--blk-file", str(disk)]
        self.log = disk.with_suffix(".log").open("a+")
        self.process = subprocess.Popen([*command, "--vduse", NAME, *options], stderr=self.log)
        self._told = self.text().count("vhost: serving")
        wait_for(self._serves)

    def _serves(self) -> bool:
        assert self.process.poll() is None, self.text()
        return self.text().count("vhost: serving") > self._told

    def text(self) -> str:
        return Path(self.log.name).read_text()

    def kill(self, number: int = signal.SIGKILL) -> int:
        self.process.send_signal(number)
        code = self.process.wait(30)
        self.log.close()
        return code


@pytest.fixture(scope="module")
def iocheck(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return programs.iocheck(tmp_path_factory.mktemp("bin"))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


@contextmanager
def block_device() -> Iterator[Path]:
    """The node, once the kernel has looked for partitions."""
    with vdpa_bus.device(NAME, "vduse", driver="virtio_vdpa") as folder:
        wait_for(lambda: list(folder.glob("virtio*/block/vd*")))
        (found,) = folder.glob("virtio*/block/vd*")
        wait_for(Path("/dev", found.name).exists)
        yield Path("/dev", found.name)


def run(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def sysfs(node: Path, name: str) -> str:
    return Path("/sys/block", node.name, name).read_text().strip()


@pytest.mark.parametrize("queues", [1, 2])
def test_disk(disk: Path, iocheck: Path, queues: int) -> None:
    daemon = Daemon(disk, "--serial", "vduse-42", "--num-queues", str(queues))
    with block_device() as node:
        assert int(sysfs(node, "size")) * 512 == SIZE
        assert sysfs(node, "serial") == "vduse-42"
        assert len(list(Path("/sys/block", node.name, "mq").iterdir())) == queues
        run(iocheck, "write", node, 5, 0, 32 * MIB)
        run(iocheck, "verify", disk, 5, 0, 32 * MIB)
        run(iocheck, "discard", node, 0, MIB)
        run(iocheck, "zero", disk, 0, MIB)
        os.truncate(disk, 2 * SIZE)
        daemon.process.send_signal(signal.SIGHUP)
        wait_for(lambda: int(sysfs(node, "size")) * 512 == 2 * SIZE)
        data = os.urandom(MIB)
        with node.open("r+b") as file:  # through the page cache
            file.seek(SIZE + MIB)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with disk.open("rb") as file:
            file.seek(SIZE + MIB)
            assert file.read(MIB) == data
    assert daemon.kill(signal.SIGTERM) == 0
    assert not Path("/dev/vduse", NAME).exists()
    assert "ring broken" not in daemon.text()


@pytest.mark.parametrize("queues", [1, 2])
def test_killed_and_restarted_under_load(disk: Path, iocheck: Path, tmp_path: Path, queues: int) -> None:
    options = ("--num-queues", str(queues))
    daemon = Daemon(disk, *options)
    stop = tmp_path / "stop"
    with block_device() as node:
        churn = subprocess.Popen(
            [iocheck, "churn", node, "21", "0", str(16 * MIB), "16", stop],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

        def completed() -> int:
            fields = sysfs(node, "stat").split()
            return int(fields[0]) + int(fields[4])

        for _ in range(KILLS):
            enough = completed() + 300
            wait_for(lambda enough=enough: completed() >= enough, 60)  # type: ignore[misc]
            daemon.kill()
            daemon = Daemon(disk, *options)
        assert daemon.text().count("going on where a predecessor stopped") >= KILLS
        enough = completed() + 300
        wait_for(lambda: completed() >= enough, 60)
        stop.touch()
        output, _ = churn.communicate(timeout=120)
        assert churn.returncode == 0, output
        run(iocheck, "verify", disk, 21, 0, 16 * MIB)
    assert daemon.kill(signal.SIGTERM) == 0


def test_a_device_in_use_is_left_and_taken_over(disk: Path) -> None:
    daemon = Daemon(disk)
    with block_device() as node:
        assert daemon.kill(signal.SIGTERM) == 0
        assert "is in use: serve it again" in daemon.text()
        daemon = Daemon(disk)
        with node.open("rb") as file:
            assert file.read(4096) == bytes(4096)
    assert daemon.kill(signal.SIGTERM) == 0
    assert not Path("/dev/vduse", NAME).exists()


def test_a_device_that_the_kernel_does_not_take() -> None:
    with pytest.raises(vhost.IoctlError, match=r"VDUSE_CREATE_DEV.*device id 4"):
        vhost.kernel.VduseBackend(vhost.devices.Rng(), "rng0")
    assert not Path("/dev/vduse/rng0").exists()


def test_through_vhost_vdpa(disk: Path) -> None:
    daemon = Daemon(disk)
    with vdpa_bus.vhost_vdpa(NAME, "vduse") as path, vhost.kernel.VhostVdpa(path) as ops:
        with vhost.drivers.Blk(ops) as driver:
            data = os.urandom(256 << 10)
            driver.write(8, data)
            driver.flush()
            assert driver.read(8, len(data) // 512) == data
    assert disk.read_bytes()[4096 : 4096 + len(data)] == data
    assert daemon.kill(signal.SIGTERM) == 0


def test_memory_that_goes_under_a_ring(disk: Path) -> None:
    """Any process behind vhost-vdpa can do that: the ring stops, the daemon answers, a reset begins anew."""
    daemon = Daemon(disk)
    with vdpa_bus.vhost_vdpa(NAME, "vduse") as path, vhost.kernel.VhostVdpa(path) as ops:
        driver = vhost.drivers.Blk(ops)
        driver.write(8, b"\x5a" * 512)
        start = time.monotonic()
        ops.set_mem_table(vhost.GuestMemory())
        assert time.monotonic() - start < 20, "the kernel waited for an answer that did not come"
        ops.set_status(0)
        assert ops.get_status() == 0
        driver.queues.clear()
        driver.close()
        with vhost.drivers.Blk(ops) as again:
            assert again.read(8, 1) == b"\x5a" * 512
    assert daemon.kill(signal.SIGTERM) == 0


def test_a_new_size_reaches_vhost_vdpa(disk: Path) -> None:
    daemon = Daemon(disk)
    seen: list[int] = []
    with vdpa_bus.vhost_vdpa(NAME, "vduse") as path, vhost.kernel.VhostVdpa(path) as ops:
        with vhost.drivers.Blk(ops) as driver:
            ops.on_config_change = lambda: seen.append(driver.read_config().capacity)
            assert ops.get_config_size() >= 60
            os.truncate(disk, 2 * SIZE)
            daemon.process.send_signal(signal.SIGHUP)
            while not seen:
                assert select.select([ops], [], [], 20)[0], "no news"
                ops.step()
            assert seen[-1] == driver.capacity == 2 * SIZE // 512
            driver.write(SIZE // 512, b"\x11" * 512)
            assert driver.read(SIZE // 512, 1) == b"\x11" * 512
    assert daemon.kill(signal.SIGTERM) == 0


@contextmanager
def served(disk: Path, **options: Any) -> Iterator[vhost.kernel.VduseBackend]:
    """By a thread of this process: what waits for the daemon does so without the GIL."""
    device = vhost.devices.Blk(disk, handler="python")
    with vhost.kernel.VduseBackend(device, NAME, **options) as backend:
        ends = threading.Event()

        def serve() -> None:
            while not ends.is_set():
                select.select([backend], [], [], 0.2)
                backend.step()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield backend
        finally:
            ends.set()
            thread.join()
    device.close()


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_python_handler_and_both_rings(disk: Path, packed: bool, kernel_release: str) -> None:
    with served(disk, packed=packed) as backend:
        with vdpa_bus.vhost_vdpa(NAME, "vduse") as path, vhost.kernel.VhostVdpa(path) as ops:
            assert bool(ops.get_features() & vhost.VirtioF.RING_PACKED) == packed
            with vhost.drivers.Blk(ops, packed=packed, queue_size=64) as driver:
                if int(kernel_release.split(".")[0]) >= 7:
                    assert ops.get_vring_size(0) == 64
                data = os.urandom(64 << 10)
                driver.write(8, data)
                assert driver.read(8, len(data) // 512) == data
        assert backend.error is None
    assert disk.read_bytes()[4096 : 4096 + len(data)] == data
    assert not Path("/dev/vduse", NAME).exists()


def test_packed_rings_are_not_taken_over(disk: Path) -> None:
    with served(disk, packed=True):
        with vdpa_bus.vhost_vdpa(NAME, "vduse") as path, vhost.kernel.VhostVdpa(path) as ops:
            with vhost.drivers.Blk(ops, packed=True) as driver:
                driver.read(0, 1)
                second = vhost.devices.Blk(null_size=SIZE)
                with pytest.raises((vhost.InvalidQueue, vhost.IoctlError)):
                    vhost.kernel.VduseBackend(second, NAME, packed=True)
                second.close()
                assert driver.read(0, 1) == bytes(512)
