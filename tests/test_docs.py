# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The examples of README.md and docs/ are run as they stand there."""

from __future__ import annotations

import re
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import vhost
from vhost.trace.recording import dump, header
from vhost.trace.records import Happening, Record
from vhost.user.backend import Backend
from vhost.user.messages import FrontendMsg, frame
from vhost.user.spec import Role

ROOT = Path(__file__).resolve().parent.parent
SIZE = 1 << 20


def examples(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


@contextmanager
def stepped(*backends: Backend) -> Iterator[None]:
    """Sessions in a thread, until they are over."""

    def run() -> None:
        with select.epoll() as poll:
            for backend in backends:
                poll.register(backend.fileno(), select.EPOLLIN)
            while not all(backend.closed for backend in backends):
                poll.poll(0.02)
                for backend in backends:
                    backend.step()

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join(20)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(SIZE))
    return path


def test_entropy_source_and_frontend_of_the_readme(tmp_path: Path, image: Path) -> None:
    entropy, client, nic = examples("README.md")
    compile(nic, "README.md", "exec")  # run in a guest, by tests/kernel/test_docs.py
    assert len(entropy.strip().splitlines()) <= 15
    path = tmp_path / "rng.sock"
    server = subprocess.Popen([sys.executable, "-c", entropy.replace("/tmp/rng.sock", str(path))])
    try:
        with vhost.Frontend.connect(path, retry=20) as frontend, vhost.drivers.Rng(frontend) as rng:
            first, second = rng.read(64), rng.read(64)
        assert len(first) == len(second) == 64
        assert first != second
    finally:
        server.terminate()
        server.wait()

    path = tmp_path / "disk.sock"
    command = [sys.executable, "-m", "vhost", "serve", "blk", "--socket-path", str(path)]
    server = subprocess.Popen([*command, "--blk-file", str(image)])
    try:
        vhost.Frontend.connect(path, retry=20).close()
        code = "import vhost\n" + client.replace("/tmp/disk.sock", str(path))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{SIZE // 512} b'")
    finally:
        server.terminate()
        assert server.wait() == 0


def test_own_loop(image: Path) -> None:
    code = examples("docs/embedding.md")[0]
    ours, theirs = socket.socketpair()
    with theirs:
        server = subprocess.Popen(
            [sys.executable, "-c", code, str(image), str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
    with vhost.Frontend(ours) as frontend, vhost.drivers.Blk(frontend) as disk:
        disk.write(3, b"\xa5" * 512)
        assert disk.read(2, 3) == bytes(512) + b"\xa5" * 512 + bytes(512)
    assert server.wait() == 0
    assert image.read_bytes()[1536:2048] == b"\xa5" * 512


def test_disk_in_memory() -> None:
    names: dict[str, Callable[[int], vhost.Device]] = {}
    exec(examples("docs/devices.md")[0], names)
    ours, theirs = socket.socketpair()
    with (
        stepped(Backend(names["RamDisk"](SIZE), theirs)),
        vhost.Frontend(ours) as frontend,
        vhost.drivers.Blk(frontend) as disk,
    ):
        assert disk.capacity == SIZE // 512
        disk.write(3, b"\xa5" * 512)
        assert disk.read(2, 3) == bytes(512) + b"\xa5" * 512 + bytes(512)
        with pytest.raises(OSError, match="IOERR"):
            disk.read(SIZE // 512 - 1, 2)


def test_state_of_a_device() -> None:
    names: dict[str, type[vhost.Device]] = {}
    exec("import vhost\n" + examples("docs/migration.md")[1], names)
    source, target = names["Counter"](), names["Counter"]()
    source.count = 42  # type: ignore[attr-defined]
    (first, to_source), (second, to_target) = socket.socketpair(), socket.socketpair()
    with (
        stepped(Backend(source, to_source), Backend(target, to_target)),
        vhost.Frontend(first) as a,
        vhost.Frontend(second) as b,
    ):
        b.load_device_state(a.save_device_state())
        with pytest.raises(vhost.errors.RequestFailed):
            b.load_device_state(b"short")
    assert target.count == 42  # type: ignore[attr-defined]


def test_dirty_log(tmp_path: Path, image: Path) -> None:
    code = examples("docs/migration.md")[0]
    path = tmp_path / "s"
    with vhost.Server(vhost.devices.Blk(image), path) as server:
        command = [sys.executable, "-c", code, str(path)]
        client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while client.poll() is None:
            select.select([server.fileno()], [], [], 0.02)
            server.step()
        out, errors = client.communicate()
    assert client.returncode == 0, errors
    assert len(out.split()) >= 2, "the data, and the ring"


def test_asyncio(tmp_path: Path, image: Path) -> None:
    code = examples("docs/embedding.md")[1]
    command = [sys.executable, "-c", code, str(image), str(tmp_path / "disk.sock")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "read back 4096 bytes {90}\n"
    assert image.read_bytes()[:4096] == b"\x5a" * 4096


def test_recording(tmp_path: Path) -> None:
    (code,) = examples("docs/trace.md")
    lines = [header()]
    for number in (FrontendMsg.SET_OWNER, FrontendMsg.GET_FEATURES, FrontendMsg.GET_FEATURES):
        lines.append(dump(Record(0, 1, 0, Happening.DATA, Role.FRONTEND, frame(number))))
    (tmp_path / "recording").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-c", code, str(tmp_path / "recording")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "     2 GET_FEATURES\n     1 SET_OWNER\n"


def test_workers() -> None:
    names: dict[str, object] = {}
    exec(examples("docs/threads.md")[0], names)
    device = names["Entropy"]()  # type: ignore[operator]
    with vhost.InProcess(device) as ops, vhost.drivers.Rng(ops) as rng:
        assert len(set(rng.read(4096))) > 100


def test_block_device(capsys: pytest.CaptureFixture[str]) -> None:
    exec(examples("docs/blk.md")[0], {})
    assert capsys.readouterr().out == "b'hello' threads\n"


def test_network_device(capsys: pytest.CaptureFixture[str]) -> None:
    exec(examples("docs/net.md")[0], {})
    assert capsys.readouterr().out == "b'hello' 1\n"
