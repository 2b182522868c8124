# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The vhost-user-blk back-ends that are compared, each as a process on a core of its own.

Knows their command lines, and the modes that qemu-storage-daemon has; not how they are measured.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import harness
from benchmarks.facts import NULL

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
catalogue = importlib.import_module("peers.catalogue")

NULL_BYTES = 1 << 30
SERVE_BLK = (sys.executable, "-m", "vhost", "serve", "blk")

# The arguments that serve a socket path (or, for one connection, an inherited descriptor).
Command = Callable[[str], list[str]]


def missing(peer: str) -> str:
    """Why this program of the catalogue cannot be used, and what gets it; "" when it can."""
    why = str(catalogue.PEERS[peer].missing())
    return why and f"{why} (make peers)"


class Backend:
    """One back-end program, started in a session of its own on the back-end's core."""

    def __init__(self, name: str, command: Command, path: Path, *, once: bool = False) -> None:
        self.name, self.command, self.path = name, command, path
        self.once = once  # serves one connection, on a listening socket that it inherits
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, cores: Iterable[int] | None = None) -> None:
        """On these cores, or on that of back-ends."""
        cores = [harness.cores()[1]] if cores is None else list(cores)
        listener = None
        argument = str(self.path)
        self.path.unlink(missing_ok=True)
        if self.once:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(self.path))
            listener.listen()
            argument = str(listener.fileno())
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            self.command(argument),
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            pass_fds=[listener.fileno()] if listener else [],
            start_new_session=True,
            cwd=ROOT,
            preexec_fn=lambda: harness.pin(cores),
        )
        harness.autogroup_first(self.process.pid)
        if listener:
            listener.close()
        else:
            self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(self.path))
                return
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} does not serve {self.path}\n{self.output()}")
            time.sleep(0.01)

    def output(self) -> str:
        # Not by a seek: it writes where that leads to.
        fd = self.log.fileno()
        return os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace")

    def stop(self) -> None:
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process = None
        self.log.close()


def qsd_modes(device: str, file: Path) -> dict[str, Command]:
    if device == NULL:
        nodes = {"null-co": f"driver=null-co,node-name=n,size={NULL_BYTES},read-zeroes=off"}
    else:
        base = f"driver=file,node-name=n,filename={file},locking=off"
        nodes = {
            "direct, native": f"{base},cache.direct=on,aio=native",
            "direct, io_uring": f"{base},cache.direct=on,aio=io_uring",
            "cached, io_uring": f"{base},aio=io_uring",
            "cached, threads": f"{base},aio=threads",
        }
    modes: dict[str, Command] = {}
    for name, node in nodes.items():
        for thread, properties in (
            ("main loop", ""),
            ("iothread", "iothread,id=t0"),
            ("iothread that does not poll", "iothread,id=t0,poll-max-ns=0"),
            ("iothread that polls for 200 us", "iothread,id=t0,poll-max-ns=200000"),
        ):
            extra = ["--object", properties] if properties else []

            def command(path: str, node: str = node, extra: list[str] = extra) -> list[str]:
                export = f"type=vhost-user-blk,id=e,addr.type=unix,addr.path={path},node-name=n,writable=on"
                export += ",iothread=t0" if extra else ""
                return ["qemu-storage-daemon", *extra, "--blockdev", node, "--export", export]

            modes[f"{name}, {thread}"] = command
    return modes


def ours(device: str, file: Path) -> Command:
    disk = ["--null-size", str(NULL_BYTES)] if device == NULL else ["--blk-file", str(file)]
    return lambda path: [*SERVE_BLK, "--socket-path", path, *disk]


def serve_blk(file: Path, *options: str) -> Command:
    """Ours with a file, and more options."""
    return lambda path: [*SERVE_BLK, "--socket-path", path, "--blk-file", str(file), *options]


def contrib(file: Path) -> Command:
    return lambda fd: [str(catalogue.CONTRIB_BLK), f"--fd={fd}", "-b", str(file)]
