# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""`vhost trace` as a user meets it, between our own two sides."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import vhost
from vhost.trace.rules import RULES
from vhost.user.messages import FrontendMsg, frame
from vhost.user.server import Server

VHOST = [sys.executable, "-m", "vhost"]


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [*VHOST, "trace", *(str(argument) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@contextlib.contextmanager
def tracing(
    listen: Path, connect: Path, *options: str, code: int = 0, stdout: int = subprocess.PIPE
) -> Iterator[subprocess.Popen[str]]:
    """A running trace; ended by SIGTERM unless it has ended by itself."""
    command = [*VHOST, "trace", str(listen), str(connect), *options]
    with subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("vhost: tracing"), line + process.stderr.read()
        try:
            yield process
            if "--once" not in options:
                process.terminate()
            assert process.wait(20) == code
        finally:
            process.kill()
    assert not listen.exists()


@pytest.fixture
def rng(tmp_path: Path) -> Iterator[Path]:
    """An entropy source of ours, served by a process."""
    path = tmp_path / "rng"
    command = [*VHOST, "serve", "rng", "--socket-path", str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            assert "serving" in server.stderr.readline()
            yield path
        finally:
            server.terminate()


def use(path: Path) -> None:
    with vhost.Frontend.connect(path) as frontend, vhost.drivers.Rng(frontend) as rng:
        assert len(rng.read(100)) == 100


def test_text_and_json_and_recording_say_the_same(rng: Path, tmp_path: Path) -> None:
    recording = tmp_path / "recording"
    with tracing(tmp_path / "t", rng, "--once", "--write", str(recording)) as process:
        use(tmp_path / "t")
        assert process.stdout is not None
        assert process.stderr is not None
        text, summary = process.stdout.read(), process.stderr.read()
    lines = text.splitlines()
    assert any(line.split()[1:4] == ["#1", "front>back", "GET_FEATURES"] for line in lines)
    assert any("SET_VRING_KICK index=0 nofd=False fds=[eventfd] need_reply" in line for line in lines)
    assert lines[-1].endswith("#1                session closed")
    assert "\x1b" not in text
    assert run("--read", recording).stdout == text
    events = [json.loads(line) for line in run("--read", recording, "--json").stdout.splitlines()]
    assert [event["text"] for event in events if event["text"] not in text] == []
    assert sum(event["event"] == "message" for event in events) == int(summary.split()[1])
    assert "0 violations" in summary
    assert run("--read", recording, "--strict").stderr == summary


def bad_session(path: Path) -> None:
    """What no front-end would do: a message of the wrong size."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.settimeout(20)
        sock.sendall(frame(FrontendMsg.SET_VRING_NUM, b"four", need_reply=True))
        sock.recv(1)  # an answer, or the end


def test_strict_and_findings(rng: Path, tmp_path: Path) -> None:
    recording = tmp_path / "recording"
    options = ("--once", "--strict", "--findings", "--write", str(recording))
    with tracing(tmp_path / "t", rng, *options, code=1) as process:
        bad_session(tmp_path / "t")
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
    assert "SET_VRING_NUM <4 bytes: 666f7572>" in lines[0]
    assert lines[1].split("!! ")[1].startswith("violation: payload size 4, must be 8 [")
    assert lines[2].endswith("; need-reply]")
    assert len(lines) == 3
    assert run("--read", recording, "--findings", "--strict", code=1).stdout.splitlines() == lines
    run("--read", recording)


def test_signals(rng: Path, tmp_path: Path) -> None:
    for end in (signal.SIGTERM, signal.SIGINT):
        with tracing(tmp_path / "t", rng, stdout=subprocess.DEVNULL) as process:
            with vhost.Frontend.connect(tmp_path / "t") as frontend:
                process.send_signal(end)
                assert process.wait(20) == 0
                with pytest.raises(vhost.ProtocolError):
                    frontend.get_queue_num()
        use(rng)


def test_whoever_reads_the_output_goes(rng: Path, tmp_path: Path) -> None:
    """`vhost trace ... | head`: who is connected goes on, and it ends with the last of them."""
    with tracing(tmp_path / "t", rng) as process:
        with vhost.Frontend.connect(tmp_path / "t") as frontend, vhost.drivers.Rng(frontend) as source:
            assert process.stdout is not None
            process.stdout.close()
            frontend.get_queue_num()  # what is printed of this finds nobody
            assert process.stderr is not None
            assert "Broken pipe" in process.stderr.readline()
            assert len(source.read(10)) == 10
            frontend.get_queue_num()
        assert process.wait(20) == 0
        assert "Traceback" not in process.stderr.read()


def test_output_that_nobody_reads_holds_up_nothing(rng: Path, tmp_path: Path) -> None:
    """Neither the traffic nor the end."""
    reader, writer = os.pipe()
    with tracing(tmp_path / "t", rng, stdout=writer):
        os.close(writer)
        for _ in range(30):
            use(tmp_path / "t")  # many times the 64 KiB that a pipe takes
    os.close(reader)


def test_the_backend_is_the_client(tmp_path: Path) -> None:
    """Reverse: it connects to the trace, and that to the front-end, which listens."""
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(str(tmp_path / "front"))
        listener.listen()
        options = ("--reverse", "--json", "--once")
        process = stack.enter_context(tracing(tmp_path / "t", tmp_path / "front", *options))
        server = Server(vhost.devices.Rng(), tmp_path / "t", client=True, reconnect=0.2)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        sock, _ = listener.accept()
        with vhost.Frontend(sock) as frontend, vhost.drivers.Rng(frontend) as source:
            assert len(source.read(100)) == 100
            frontend.get_queue_num()
        assert process.stdout is not None
        events = [json.loads(line) for line in process.stdout]
        server.close()
        thread.join()
    requests = [event for event in events if event.get("name") == "SET_OWNER" and not event["reply"]]
    assert [event["sender"] for event in requests] == ["front-end"]


def test_rules() -> None:
    rows = json.loads(run("--rules", "--json").stdout)
    assert {row["rule"] for row in rows} == set(RULES)
    assert len(run("--rules").stdout.splitlines()) == len(RULES) + 1


def test_wrong_arguments(tmp_path: Path) -> None:
    assert "LISTEN and CONNECT" in run(code=1).stderr
    assert "LISTEN and CONNECT" in run(tmp_path / "a", code=1).stderr
    assert "--read" in run(tmp_path / "a", tmp_path / "b", "--read", "x", code=1).stderr
    missing = run("--read", tmp_path / "none", code=1).stderr
    assert "none" in missing
    assert "Traceback" not in missing
    (tmp_path / "text").write_text("hello")
    assert "line 1: no recording" in run("--read", tmp_path / "text", code=1).stderr
    (tmp_path / "a").write_text("precious")
    said = run(tmp_path / "a", tmp_path / "b", code=1).stderr
    assert "Traceback" not in said
    assert (tmp_path / "a").read_text() == "precious"
    assert "Traceback" not in run(tmp_path / "c", tmp_path / "b", "--write", tmp_path, code=1).stderr
    assert not (tmp_path / "c").exists()
