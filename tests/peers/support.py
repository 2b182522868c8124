# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What the peers' tests share: `require`, our own back-end and qemu-storage-daemon as processes.

Knows command lines and how each program says that it is ready. Each class ends its process by its
pid, whatever happened.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn, Self

import pytest

from guest.qmp import Qmp
from peers.catalogue import PEERS

DEADLINE = 30.0


def require(*names: str) -> None:
    """Skip the test if one of these programs is missing; under CI=true fail instead."""
    for name in names:
        peer = PEERS[name]
        reason = peer.missing()
        if not reason:
            continue
        text = f"{reason}; Debian package: {', '.join(peer.packages)} (make peers)"
        if os.environ.get("CI") == "true":
            pytest.fail(text, pytrace=False)
        pytest.skip(text)


def wait_until(condition: Callable[[], object], *, pause: float = 0.001, timeout: float = DEADLINE) -> None:
    """Ask again and again, ``pause`` seconds apart, until it holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not so in {timeout} s"
        time.sleep(pause)


class Process:
    """A program whose standard error is kept, and looked at for the line that says it is ready."""

    def __init__(
        self,
        command: list[str],
        *,
        ready: str,
        pass_fds: tuple[int, ...] = (),
        stdout: int | IO[str] = subprocess.DEVNULL,
    ) -> None:
        self.command = command
        self._ready = ready
        self._is_ready = threading.Event()
        self._lines: list[str] = []
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            pass_fds=pass_fds,
        )
        # A thread, because a pipe that nobody empties would stop the program.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._is_ready.wait(DEADLINE) or (self._ready and not self._seen()):
            self.kill()
            raise AssertionError(f"{' '.join(command)} did not say {ready!r}:\n{self.errors()}")

    def errors(self) -> str:
        """What it wrote to standard error."""
        return "".join(self._lines)

    def wait_line(self, text: str) -> None:
        """Until it has written a line with that to standard error."""
        deadline = time.monotonic() + DEADLINE
        while not any(text in line for line in self._lines):
            assert time.monotonic() < deadline, f"no {text!r}:\n{self.errors()}"
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait(DEADLINE)
        self._finish()

    def terminate(self) -> str:
        """SIGTERM; it must end with 0 in good time. Returns what it wrote to standard error."""
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self.kill()
            self._fail("did not end on SIGTERM")
        self._finish()
        if code:
            self._fail(f"exited with {code}")
        return self.errors()

    def _seen(self) -> bool:
        return any(self._ready in line for line in self._lines)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.append(line)
            if self._ready in line:
                self._is_ready.set()
        self._is_ready.set()  # it ended: no use to wait longer

    def _finish(self) -> None:
        self._reader.join(DEADLINE)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def _fail(self, what: str) -> NoReturn:
        raise AssertionError(f"{' '.join(self.command)} {what}:\n{self.errors()}")


class Serve(Process):
    """``python -m vhost serve DEVICE --socket-path PATH ...``. Leaving the context checks a clean end.
    ``program``: what runs instead of ``-m vhost``."""

    def __init__(
        self, device: str, path: Path, *options: str, program: Sequence[str] = ("-m", "vhost")
    ) -> None:
        self.path = path
        command = [sys.executable, *program, "serve", device, "--socket-path", str(path), *options]
        super().__init__(command, ready="serving")

    def reload(self) -> None:
        """SIGHUP: look at the file's size again."""
        self.process.send_signal(signal.SIGHUP)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is not None:
            self.kill()
            value.add_note(f"--- {' '.join(self.command)}\n{self.errors()}")
            return
        errors = self.terminate()
        assert "Traceback" not in errors, errors
        assert not self.path.exists(), f"{self.path} was left behind"


class StorageDaemon:
    """qemu-storage-daemon with one vhost-user-blk export of a plain file, and its monitor."""

    def __init__(
        self, disk: Path, path: Path, *, queues: int = 2, writable: bool = True, more: str = ""
    ) -> None:
        """``more`` adds to the export's options."""
        self.path = path
        # Our listening socket, so that there is nothing to wait for before one can connect.
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        ours, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [
                "qemu-storage-daemon",
                *("--blockdev", f"driver=file,node-name=f,filename={disk},discard=unmap"),
                *("--chardev", f"socket,id=m,fd={theirs.fileno()}", "--monitor", "chardev=m"),
                "--export",
                f"type=vhost-user-blk,id=e,addr.type=fd,addr.str={listener.fileno()},"
                f"node-name=f,writable={'on' if writable else 'off'},num-queues={queues}{more}",
            ],
            stdin=subprocess.DEVNULL,
            pass_fds=(listener.fileno(), theirs.fileno()),
        )
        listener.close()
        theirs.close()
        self._monitor = ours
        try:
            self.qmp = Qmp(ours)
        except BaseException:
            self.close()
            raise

    def resize(self, size: int) -> None:
        self.qmp.command("block_resize", {"node-name": "f", "size": size})

    def close(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE)
        self._monitor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def make_disk(path: Path, size: int) -> Path:
    """A sparse file."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def run(*command: str | Path, timeout: float = 60, env: dict[str, str] | None = None) -> str:
    """A program that must end with 0; returns its standard output."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, **(env or {})},
    )
    if done.returncode:
        raise AssertionError(
            f"{' '.join(map(str, command))} exited with {done.returncode}\n{done.stdout}{done.stderr}"
        )
    return done.stdout
