# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The command line as a user and as a management program meet it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import vhost

VHOST = [sys.executable, "-m", "vhost"]
SIZE = 1 << 20


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [*VHOST, *(str(argument) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(SIZE))
    return path


@contextmanager
def serving(
    *arguments: object,
    end: signal.Signals = signal.SIGTERM,
    program: list[str] = VHOST,
    pass_fds: tuple[int, ...] = (),
) -> Iterator[subprocess.Popen[str]]:
    command = [*program, "serve", *(str(argument) for argument in arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, pass_fds=pass_fds) as server:
        assert server.stderr is not None
        try:
            line = server.stderr.readline()
            assert line.startswith("vhost: serving"), line + server.stderr.read()
            yield server
        finally:
            server.send_signal(end)
            server.stderr.read()
            assert server.wait(20) == 0


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_serve_blk(tmp_path: Path, image: Path, end: signal.Signals) -> None:
    path = tmp_path / "s"
    options = ("--num-queues", 2, "--serial", "SN1")
    with serving("blk", "--socket-path", path, "--blk-file", image, *options, end=end):
        with vhost.Frontend.connect(path) as frontend, vhost.drivers.Blk(frontend, num_queues=2) as disk:
            assert disk.capacity == SIZE // 512
            assert disk.get_id() == "SN1"
            disk.write(0, b"\x77" * 512)
            # While it is in use: a second user is refused, a look is not.
            assert json.loads(run("probe", path, "--json").stdout)["queues"] == 2
            with vhost.Frontend.connect(path) as second, pytest.raises(vhost.ProtocolError):
                vhost.drivers.Blk(second)
            assert disk.read(0, 1) == b"\x77" * 512
    assert not path.exists()


VARIANT = [sys.executable, str(Path(__file__).parent / "peers" / "variant.py")]


@pytest.mark.parametrize(
    ("program", "options", "handler"),
    [(VHOST, (), "c"), (VHOST, ("--python",), "python"), ([*VARIANT, "python"], (), "python")],
    ids=["c", "python", "variant"],
)
def test_who_runs_requests(
    tmp_path: Path, image: Path, program: list[str], options: tuple[str, ...], handler: str
) -> None:
    path = tmp_path / "s"
    with (
        serving("blk", "--socket-path", path, "--blk-file", image, *options, program=program) as server,
        vhost.Frontend.connect(path) as frontend,
        vhost.drivers.Blk(frontend) as disk,
    ):
        disk.write(0, b"\x77" * 512)
        assert disk.read(0, 1) == b"\x77" * 512
        names = [task.read_text() for task in Path(f"/proc/{server.pid}/task").glob("*/comm")]
        assert any(name.startswith("vhost-blk") for name in names) == (handler == "c"), names


def test_share(tmp_path: Path, image: Path) -> None:
    path = tmp_path / "s"
    with (
        serving("blk", "--socket-path", path, "--blk-file", image, "--share"),
        vhost.Frontend.connect(path) as first,
        vhost.Frontend.connect(path) as second,
        vhost.drivers.Blk(first) as one,
        vhost.drivers.Blk(second) as other,
    ):
        one.write(5, b"\x42" * 512)
        assert other.read(5, 1) == b"\x42" * 512


def test_read_only(tmp_path: Path, image: Path) -> None:
    path = tmp_path / "s"
    image.chmod(0o444)
    with (
        serving("blk", "--socket-path", path, "--blk-file", image, "--read-only"),
        vhost.Frontend.connect(path) as frontend,
        vhost.drivers.Blk(frontend) as disk,
    ):
        assert disk.read_only
        with pytest.raises(vhost.drivers.BlkError):
            disk.write(0, bytes(512))


def test_null_device(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with (
        serving("blk", "--socket-path", path, "--null-size", "1G"),
        vhost.Frontend.connect(path) as frontend,
        vhost.drivers.Blk(frontend) as disk,
    ):
        assert disk.capacity == (1 << 30) // 512
        disk.write(0, bytes(512))


def test_serve_net(tmp_path: Path) -> None:
    path = tmp_path / "s"
    options = ("--echo", "--mac", "52:54:00:12:34:56", "--mtu", 9000)
    with (
        serving("net", "--socket-path", path, *options) as server,
        vhost.Frontend.connect(path) as frontend,
        vhost.drivers.Net(frontend, mtu=9000) as nic,
    ):
        assert (nic.mac.hex(), nic.mtu, nic.link_up) == ("525400123456", 9000, True)
        nic.send(bytes(9000))
        assert nic.recv(10) == bytes(9000)
        server.send_signal(signal.SIGUSR1)
        assert server.stderr is not None
        counters = json.loads(server.stderr.readline())
        assert (counters["tx_frames"], counters["rx_bytes"], counters["dropped_long"]) == (1, 9000, 0)


def test_counters_are_those_of_whom_it_serves(tmp_path: Path) -> None:
    """Devices of sessions that ended have nothing more to say."""
    path = tmp_path / "s"
    with serving("net", "--socket-path", path, "--drop") as server:
        assert server.stderr is not None
        for session in (1, 2, 3):
            with vhost.Frontend.connect(path) as frontend, vhost.drivers.Net(frontend) as nic:
                for _ in range(session):
                    nic.send(bytes(64))
                nic.flush(10)
                for _ in range(2):
                    server.send_signal(signal.SIGUSR1)
                    assert json.loads(server.stderr.readline())["tx_frames"] == session


def test_a_guest_comes_back_to_the_same_address(tmp_path: Path) -> None:
    path = tmp_path / "s"
    macs = set()
    with serving("net", "--socket-path", path, "--source", 100):
        for _ in range(3):
            with vhost.Frontend.connect(path) as frontend, vhost.drivers.Net(frontend) as nic:
                macs.add(nic.mac)
                frame = nic.recv(10)
                assert frame is not None
                assert (len(frame), frame[:6]) == (100, nic.mac)
    assert len(macs) == 1


def test_serve_net_on_a_socket(tmp_path: Path) -> None:
    """One device for all sessions: the socket is there once."""
    path = tmp_path / "s"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        options = ("--socket-path", path, "--socket-pair", theirs.fileno())
        with serving("net", *options, pass_fds=(theirs.fileno(),)):
            for number in range(2):
                with vhost.Frontend.connect(path) as frontend, vhost.drivers.Net(frontend) as nic:
                    sent = bytes([2, 0, 0, 0, 0, 1] * 2) + b"\x88\xb5" + bytes([number] * 50)
                    nic.send(sent)
                    assert ours.recv(2000) == sent
                    ours.send(sent)
                    assert nic.recv(10) == sent


def test_serve_net_bridge(tmp_path: Path) -> None:
    paths = (tmp_path / "a", tmp_path / "b")
    with serving("net", "--bridge", *paths) as process:
        for number in range(2):
            with (
                vhost.Frontend.connect(paths[0]) as first,
                vhost.Frontend.connect(paths[1]) as second,
                vhost.drivers.Net(first) as a,
                vhost.drivers.Net(second, packed=bool(number)) as b,
            ):
                assert a.mac != b.mac
                sent = b.mac + a.mac + b"\x88\xb5" + bytes([number] * 50)
                for here, there in ((a, b), (b, a)):
                    here.send(sent)
                    assert there.recv(10) == sent
        process.send_signal(signal.SIGUSR1)
        assert process.stderr is not None
        for _ in paths:
            said = json.loads(process.stderr.readline())
            assert (said["tx_frames"], said["rx_frames"]) == (2, 2)
    assert not any(path.exists() for path in paths)


def test_serve_net_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "s"
    assert "--echo" in run("serve", "net", "--socket-path", path, code=1).stderr
    run("serve", "net", "--socket-path", path, "--echo", "--drop", code=2)
    for wrong in (("--mac", "52:54"), ("--mac", "x"), ("--source", "0"), ("--source", "no")):
        run("serve", "net", "--socket-path", path, *wrong, code=2)
    for wrong in (
        ("--mac", "01:00:5e:00:00:01"),
        ("--mtu", 67),
        ("--queue-pairs", 0),
        ("--queue-size", 0),
        ("--threads", 0),
    ):
        said = run("serve", "net", "--socket-path", path, "--drop", *wrong, code=1).stderr
        assert said.startswith("vhost serve net: "), said
    bridge = ("--bridge", tmp_path / "a", tmp_path / "b")
    for wrong, what in (
        (("--socket-path", path, *bridge), "one of --socket-path"),
        ((*bridge, "--mac", "52:54:00:12:34:56"), "--bridge has two"),
        ((*bridge, "--threads", 0), "threads 0"),
        ((*bridge, "--queue-pairs", 0), "queue_pairs 0"),
        (("--socket-path", path, "--socket-pair", 99), "fd 99: Bad file descriptor"),
        (("--socket-path", path, "--tap", "x" * 16), "limit 15"),
    ):
        said = run("serve", "net", *wrong, code=1).stderr
        assert what in said, said
    assert "must be 14" in run("serve", "net", "--socket-path", path, "--source", 13, code=1).stderr


def test_sighup_after_a_resize(tmp_path: Path, image: Path) -> None:
    path = tmp_path / "s"
    with (
        serving("blk", "--socket-path", path, "--blk-file", image) as server,
        vhost.Frontend.connect(path) as frontend,
        vhost.drivers.Blk(frontend) as disk,
    ):
        changed = threading.Event()
        frontend.on_config_change = changed.set
        os.truncate(image, 2 * SIZE)
        server.send_signal(signal.SIGHUP)
        while not changed.is_set():
            assert frontend.step()
        assert disk.read_config().capacity == 2 * SIZE // 512
        assert disk.read(disk.capacity - 1, 1) == bytes(512)


def test_inherited_connection(image: Path) -> None:
    ours, theirs = socket.socketpair()
    command = [*VHOST, "serve", "blk", "--fd", str(theirs.fileno()), "--blk-file", str(image)]
    with subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL) as server:
        theirs.close()
        with vhost.Frontend(ours) as frontend, vhost.drivers.Blk(frontend) as disk:
            assert disk.read(0, 1) == bytes(512)
        assert server.wait(20) == 0, "it ends with its session"


def test_inherited_listener(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen()
        command = [*VHOST, "serve", "rng", "--fd", str(listener.fileno())]
        with subprocess.Popen(command, pass_fds=[listener.fileno()], stderr=subprocess.DEVNULL) as server:
            for _ in range(2):
                with vhost.Frontend.connect(path, retry=20) as frontend, vhost.drivers.Rng(frontend) as rng:
                    assert len(rng.read(10)) == 10
            server.terminate()
            assert server.wait(20) == 0
    assert Path(path).exists(), "a socket that it did not make is not its to remove"


@pytest.mark.parametrize("device, kind", [("blk", "block"), ("rng", "rng")])
def test_print_capabilities(device: str, kind: str) -> None:
    """Whatever else is said, and however wrong that is (backend program conventions)."""
    wrong = ("--socket-path", "s", "--fd", "three", "--num-queues", "many", "--virgl", "word")
    for words in ((), wrong[:2], wrong, (*wrong, "--blk-file")):
        for order in (("--print-capabilities", *words), (*words, "--print-capabilities")):
            assert json.loads(run("serve", device, *order).stdout)["type"] == kind


def test_wrong_arguments(tmp_path: Path, image: Path) -> None:
    path = tmp_path / "s"
    assert "--socket-path" in run("serve", "rng", code=1).stderr
    assert "--blk-file" in run("serve", "blk", "--socket-path", path, code=1).stderr
    run("serve", "rng", "--socket-path", path, "--fd", 3, code=2)
    missing = run("serve", "blk", "--socket-path", path, "--blk-file", tmp_path / "none", code=1).stderr
    assert "none" in missing
    assert "Traceback" not in missing
    run("serve", "blk", "--socket-path", path, "--blk-file", tmp_path, code=1)
    run("serve", "blk", "--socket-path", path, "--blk-file", "/dev/zero", code=1)
    for wrong in ("--num-queues", "--queue-size", "--threads"):
        said = run("serve", "blk", "--socket-path", path, "--blk-file", image, wrong, 0, code=1).stderr
        assert wrong[2:].replace("-", "_") in said
        assert "Traceback" not in said
    assert not path.exists()
    for nowhere in (tmp_path / ("x" * 120), tmp_path / "none" / "s"):
        for command in (
            ("serve", "rng", "--socket-path", nowhere),
            ("probe", nowhere),
            ("trace", nowhere, path),
        ):
            said = run(*command, code=1).stderr
            assert str(nowhere) in said, "whoever reads that has to know what is wrong"
            assert "Traceback" not in said
    assert str(path) in run("probe", path, code=1).stderr
    assert "fd 77" in run("serve", "rng", "--fd", 77, code=1).stderr
    assert "fd 1" in run("serve", "rng", "--fd", 1, code=1).stderr
    assert "fd -1" in run("serve", "rng", "--fd", -1, code=1).stderr


@pytest.mark.parametrize(
    ("family", "kind"), [(socket.AF_INET, socket.SOCK_STREAM), (socket.AF_UNIX, socket.SOCK_DGRAM)]
)
@pytest.mark.parametrize("listens", [False, True])
def test_inherited_socket_of_another_kind(family: int, kind: int, listens: bool) -> None:
    with socket.socket(family, kind) as sock:
        if listens and kind == socket.SOCK_STREAM:
            sock.bind(("127.0.0.1", 0))
            sock.listen()
        command = [*VHOST, "serve", "rng", "--fd", str(sock.fileno())]
        done = subprocess.run(
            command, pass_fds=[sock.fileno()], stderr=subprocess.PIPE, text=True, check=False, timeout=20
        )
        assert done.returncode == 1
        assert done.stderr == f"vhost: fd {sock.fileno()} is no Unix stream socket\n"


def test_out_of_descriptors(tmp_path: Path) -> None:
    """Who came when there were none left is served once there are, though nobody else stirs by then."""
    path = tmp_path / "s"
    with serving("rng", "--socket-path", path) as server:
        _, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (40, hard))
        with contextlib.ExitStack() as stack:
            crowd = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(30)]
            for one in crowd:
                one.connect(str(path))
            assert server.stderr is not None
            assert "no new session" in server.stderr.readline()
        with vhost.Frontend.connect(path, timeout=20) as frontend:
            assert frontend.get_features()


def test_socket_that_is_in_use(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with serving("rng", "--socket-path", path):
        assert "in use" in run("serve", "rng", "--socket-path", path, code=1).stderr
        assert path.exists()
    path.write_text("precious")
    run("serve", "rng", "--socket-path", path, code=1)
    assert path.read_text() == "precious", "not a socket: not ours to remove"


def test_probe(tmp_path: Path, image: Path) -> None:
    path = tmp_path / "s"
    with serving("blk", "--socket-path", path, "--blk-file", image, "--num-queues", 3):
        report = json.loads(run("probe", path, "--json").stdout)
        assert report["device"] == "block"
        assert report["queues"] == 3
        assert report["memory_slots"] == 509
        assert report["config"]["capacity"] == SIZE // 512
        assert report["config"]["bytes"] == SIZE
        assert {"RING_PACKED", "FLUSH", "VERSION_1"} <= set(report["feature_names"])
        assert {"MQ", "CONFIG", "REPLY_ACK"} <= set(report["protocol_feature_names"])
        text = run("probe", path).stdout
        assert "RING_PACKED" in text
        assert f"capacity {SIZE // 512}" in text
    with serving("rng", "--socket-path", path):
        report = json.loads(run("probe", path, "--json").stdout)
        assert report["device"] is None
        assert report["config"] is None
        assert report["queues"] == 1


def test_without_a_protocol_feature(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with serving("rng", "--socket-path", path, "--without", "reset-device,mq"):
        offered = set(json.loads(run("probe", path, "--json").stdout)["protocol_feature_names"])
    assert {"REPLY_ACK", "STATUS"} <= offered
    with serving("rng", "--socket-path", path, "--without", "ring-packed,access-platform"):
        features = set(json.loads(run("probe", path, "--json").stdout)["feature_names"])
    assert "RING_INDIRECT_DESC" in features
    assert not {"RING_PACKED", "ACCESS_PLATFORM"} & features
    assert not {"RESET_DEVICE", "MQ"} & offered
    assert "reply-ack" in run("serve", "rng", "--socket-path", path, "--without", "magic", code=2).stderr


def test_messages() -> None:
    rows = json.loads(run("messages", "--json").stdout)
    assert [row["id"] for row in rows] == [*range(1, 46), *range(1, 11), *range(1, 13)]
    lines = run("messages").stdout.splitlines()
    assert len(lines) == 1 + 45 + 10 + 12
    done = subprocess.run([*VHOST, "messages"], capture_output=True, check=True)
    assert not done.stderr
    with subprocess.Popen([*VHOST, "messages"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as early:
        assert early.stdout is not None
        early.stdout.close()
        assert early.stderr is not None
        assert not early.stderr.read()
        assert early.wait(20) == 0


def test_without_a_standard_output() -> None:
    """As some start their daemons."""
    for arguments in ("messages", "serve rng --print-capabilities"):
        command = f"{' '.join(VHOST)} {arguments} >&-"
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")


def test_demo() -> None:
    out = run("demo", "--size", "4M", "--seconds", "0.1").stdout
    assert "ring: packed" in out
    assert "RING_PACKED" in out
    assert "verified: wrote and read 4 MiB" in out
    assert "depth  1:" in out
    assert "p99" in out
    assert "vhost-user-blk-pci" in out
