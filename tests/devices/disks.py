# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Block devices under test: on a bare ring without any session (``Ring``), or behind a server in a
thread (``serving``)."""

from __future__ import annotations

import contextlib
import os
import random
import select
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from vhost.devices._blk_engine import probe_io_uring
from vhost.devices.blk import Blk
from vhost.errors import QueueBroken
from vhost.features import BlkF
from vhost.memory import GuestMemory, Region, install_sigbus_handler
from vhost.user.frontend import Frontend
from vhost.user.server import Server
from vhost.virtio_blk import HEADER
from vhost.virtqueue import DeviceQueue, DriverQueue

HANDLERS = ("sync", "threads", "io_uring", "cached", "mapped", "python")
BASE = 1 << 33
REGION = 1 << 16
SEGMENT = struct.Struct("<QII")
Bufs = Sequence[tuple[int, int]]


def how(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Arguments for Blk. With threads and io_uring, nothing is done at once that these can do; cached is what
    a file is by default; mapped is what one on tmpfs is, wherever it is, in a program that survives that
    others truncate it."""
    if name == "python":
        return {"handler": name}
    if name == "io_uring" and (why := probe_io_uring()):
        pytest.skip(f"io_uring: {os.strerror(why)}")
    if name == "mapped":
        install_sigbus_handler()
    if name in ("cached", "mapped"):
        monkeypatch.setattr(Blk, "_pace", {"cached": name, "mapped": "memory"}[name])
        return {}
    if name != "sync":
        monkeypatch.setattr(Blk, "_pace", "waits")
    return {"aio": name}


class Ring:
    """One ring between a driver and a block device, in memory of ``regions`` adjacent regions."""

    def __init__(self, device: Blk, *, packed: bool = False, num: int = 64, regions: int = 4) -> None:
        self.device = device
        device.negotiated = int(BlkF.FLUSH)
        self.kick, self.call, self.err = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(3))
        self.memory = GuestMemory(
            [Region.allocate(REGION, guest_addr=BASE + i * REGION) for i in range(regions)]
        )
        place = DriverQueue.layout(num, packed=packed)
        areas = {"desc": BASE + place.desc, "avail": BASE + place.avail, "used": BASE + place.used}
        self.free = BASE + (place.size + 4095) // 4096 * 4096
        self.border = BASE + REGION
        """Where the second region begins."""
        self.driver = DriverQueue(self.memory, num, packed=packed, **areas, kick=self.kick, call=self.call)
        self.queue = DeviceQueue(
            self.memory, num, packed=packed, **areas, kick=self.kick, call=self.call, err=self.err, name="q"
        )
        self.threaded = device.start_queue(self.queue)

    def send(self, readable: Bufs, writable: Bufs) -> None:
        self.driver.add(readable, writable, (readable, writable))
        self.driver.kick()
        if not self.threaded and not self.queue.broken:
            with contextlib.suppress(QueueBroken):  # see queue.broken
                self.device.handle(self.queue)

    def run(self, readable: Bufs, writable: Bufs) -> tuple[int, int]:
        """Status (the last writable byte, which was 0xEE before) and how much was written."""
        at, size = writable[-1]
        self.memory.write(at + size - 1, b"\xee")
        self.send(readable, writable)
        assert self.driver.wait(10), f"no answer: {self.queue.broken}"
        (token, written) = self.driver.get_used() or (None, 0)
        assert token == (readable, writable)
        return self.memory.read(at + size - 1, 1)[0], written

    def request(
        self, kind: int, sector: int = 0, *, data: bytes = b"", room: int = 0, at: int | None = None
    ) -> tuple[int, int, bytes]:
        """A request in the usual three descriptors: status, written, what was read."""
        header, status = self.free, self.free + 64
        place = self.free + 4096 if at is None else at
        self.memory.write(header, HEADER.pack(kind, 0, sector))
        readable, writable = [(header, HEADER.size)], [(status, 1)]
        if data:
            self.memory.write(place, data)
            readable.append((place, len(data)))
        if room:
            writable.insert(0, (place, room))
        answer, written = self.run(readable, writable)
        return answer, written, self.memory.read(place, room)

    def wait_broken(self) -> str:
        """The reason, once there is one; a session would look when the device notices something."""
        if self.threaded:
            wait_for(self.device.notice)
        reason = self.queue.broken
        assert reason
        return reason

    def close(self) -> None:
        self.device.stop_queue(self.queue)
        self.queue.close()
        for fd in (self.kick, self.call, self.err):
            os.close(fd)
        self.__dict__.clear()  # pytest keeps a fixture's value beyond the look for leaks


def wait_for(fd: int, seconds: float = 10) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(seconds * 1000), "nothing was signalled"


@contextmanager
def ring(device: Blk, **more: Any) -> Iterator[Ring]:
    one = Ring(device, **more)
    try:
        yield one
    finally:
        one.close()
        device.close()


def segments(*ranges: tuple[int, int, int]) -> bytes:
    return b"".join(SEGMENT.pack(*one) for one in ranges)


def header(kind: int, sector: int = 0) -> bytes:
    return HEADER.pack(kind, 0, sector)


class Serving:
    """A server of any number of sessions, in a thread."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.error: BaseException | None = None
        self._stop = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="server")
        self._thread.start()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._stop, select.POLLIN)
        poll.register(self.server.fileno(), select.POLLIN)
        try:
            while not any(fd == self._stop for fd, _ in poll.poll()):
                self.server.step()
        except BaseException as error:
            self.error = error
        finally:
            self.server.close()

    def connect(self, **more: Any) -> Frontend:
        return Frontend.connect(self.server.path, timeout=10, **more)

    def stop(self) -> None:
        os.eventfd_write(self._stop, 1)
        self._thread.join(20)
        assert not self._thread.is_alive(), "the server hangs"
        os.close(self._stop)
        if self.error is not None:
            raise self.error


@contextmanager
def serving(device: Any, path: Any) -> Iterator[Serving]:
    one = Serving(Server(device, path))
    try:
        yield one
    finally:
        one.stop()
        if hasattr(device, "close"):
            device.close()


def pattern(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)
