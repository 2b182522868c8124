# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""QEMU's vhost-user-gpu: our front-end and our display, and a driver that says just enough to see pixels.

It has no GPU here, and then renders in memory and sends what changed. Commands are those of VIRTIO 5.7.6.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import vhost
from peers.catalogue import VHOST_USER_GPU
from peers.support import require
from vhost.drivers.base import Driver
from vhost.user.gpu import GpuDisplay, Mode
from vhost.user.gpu_payloads import GpuCursorUpdate, GpuUpdate

pytestmark = pytest.mark.peer

WIDTH, HEIGHT = 64, 48
HEADER = struct.Struct("<IIQII")
GET_DISPLAY_INFO, CREATE_2D, SET_SCANOUT, FLUSH, TRANSFER, ATTACH = 0x100, 0x101, 0x103, 0x104, 0x105, 0x106
UPDATE_CURSOR, MOVE_CURSOR = 0x300, 0x301
OK_NODATA, OK_DISPLAY_INFO = 0x1100, 0x1101
B8G8R8A8, B8G8R8X8 = 1, 2
MODES = (Mode(0, 0, WIDTH, HEIGHT, 1, 0), Mode(0, 0, 1234, 567, 1, 0))


class Display(GpuDisplay):
    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.scanouts: list[tuple[int, int, int]] = []
        self.updates: list[GpuUpdate] = []
        self.moves: list[tuple[int, int, int, bool]] = []
        self.cursors: list[GpuCursorUpdate] = []

    def display_info(self) -> Sequence[Mode]:
        return MODES

    def scanout_changed(self, scanout: int, width: int, height: int) -> None:
        self.scanouts.append((scanout, width, height))

    def updated(self, update: GpuUpdate) -> None:
        self.updates.append(update)

    def cursor_moved(self, scanout: int, x: int, y: int, visible: bool) -> None:
        self.moves.append((scanout, x, y, visible))

    def cursor_changed(self, cursor: GpuCursorUpdate) -> None:
        self.cursors.append(cursor)


class Gpu(Driver):
    """As much of a driver as it takes: a command at a time, on the control or the cursor queue."""

    PIXELS = 8192

    def __init__(self, ops: vhost.Frontend, display: Display) -> None:
        self.display = display
        super().__init__(ops, packed=False, num_queues=2, queue_size=16, data_size=self.PIXELS + (64 << 10))
        self.view = self.memory.view(self.data_addr, self.PIXELS + (64 << 10))

    def ask(self, command: int, body: bytes = b"", *, queue: int = 0, room: int = 0) -> bytes:
        request = HEADER.pack(command, 0, 0, 0, 0) + body
        self.view[: len(request)] = request
        writable = [(self.data_addr + 4096, room)] if room else []
        self.queues[queue].add([(self.data_addr, len(request))], writable, None)
        self.queues[queue].kick()
        until = time.monotonic() + 20
        while not self.queues[queue].has_used():
            select.select([self.display, self.queues[queue].call_fd], [], [], until - time.monotonic())
            assert self.display.step(), self.display.error
            assert time.monotonic() < until
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.queues[queue].call_fd)
        [(_, written)] = self.queues[queue].get_used_batch()
        return bytes(self.view[4096 : 4096 + written])

    def command(self, command: int, *words: int) -> None:
        answer = self.ask(command, struct.pack(f"<{len(words)}I", *words), room=24)
        assert HEADER.unpack(answer)[0] == OK_NODATA, hex(HEADER.unpack(answer)[0])

    def image(self, resource: int, width: int, height: int, form: int, pixels: bytes) -> None:
        """A resource with these pixels, which are in guest memory until they are transferred."""
        self.view[self.PIXELS : self.PIXELS + len(pixels)] = pixels
        self.command(CREATE_2D, resource, form, width, height)
        addr = self.data_addr + self.PIXELS
        self.command(ATTACH, resource, 1, addr & 0xFFFFFFFF, addr >> 32, len(pixels), 0)
        self.command(TRANSFER, 0, 0, width, height, 0, 0, resource, 0)

    def serve(self, done: int, what: list[object]) -> None:
        until = time.monotonic() + 20
        while len(what) < done:
            select.select([self.display], [], [], until - time.monotonic())
            assert self.display.step(), self.display.error
            assert time.monotonic() < until


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    require("vhost-user-gpu")
    (libraries,) = VHOST_USER_GPU.glob("usr/lib/*-linux-gnu")
    process = subprocess.Popen(
        [VHOST_USER_GPU / "usr/lib/qemu/vhost-user-gpu", f"--socket-path={tmp_path / 's'}"],
        env={**os.environ, "LD_LIBRARY_PATH": str(libraries)},
        stdin=subprocess.DEVNULL,
    )
    try:
        yield tmp_path / "s"
    finally:
        process.kill()
        process.wait()


def test_pixels(path: Path) -> None:
    ours, theirs = socket.socketpair()
    with vhost.Frontend.connect(path, retry=20) as frontend, contextlib.closing(Display(ours)) as display:
        with theirs:
            frontend.gpu_set_socket(theirs.fileno())
        gpu = Gpu(frontend, display)
        with gpu:
            # What we prefer goes to the driver as it is; the device asked us for it.
            info = gpu.ask(GET_DISPLAY_INFO, room=408)
            assert HEADER.unpack_from(info)[0] == OK_DISPLAY_INFO
            assert struct.unpack_from("<12I", info, 24) == (*MODES[0], *MODES[1])
            # A frame, and a part of it that changes.
            pixels = bytearray(os.urandom(4 * WIDTH * HEIGHT))
            gpu.image(1, WIDTH, HEIGHT, B8G8R8X8, pixels)
            gpu.command(SET_SCANOUT, 0, 0, WIDTH, HEIGHT, 0, 1)
            gpu.command(FLUSH, 0, 0, WIDTH, HEIGHT, 1, 0)
            gpu.serve(1, display.updates)  # type: ignore[arg-type]
            assert display.scanouts == [(0, WIDTH, HEIGHT)]
            whole = display.updates[0]
            assert (whole.scanout, whole.x, whole.y, whole.width, whole.height) == (0, 0, 0, WIDTH, HEIGHT)
            assert without_x(whole.pixels) == without_x(pixels)
            gpu.command(FLUSH, 8, 4, 16, 2, 1, 0)
            gpu.serve(2, display.updates)  # type: ignore[arg-type]
            part = display.updates[1]
            assert (part.x, part.y, part.width, part.height) == (8, 4, 16, 2)
            lines = [pixels[4 * (WIDTH * y + 8) : 4 * (WIDTH * y + 24)] for y in (4, 5)]
            assert without_x(part.pixels) == without_x(b"".join(lines))
            # The cursor, on its own queue.
            cursor = os.urandom(4 * 64 * 64)
            gpu.image(2, 64, 64, B8G8R8A8, cursor)
            gpu.ask(UPDATE_CURSOR, struct.pack("<8I", 0, 3, 4, 0, 2, 5, 6, 0), queue=1)
            gpu.serve(1, display.cursors)  # type: ignore[arg-type]
            assert display.cursors == [GpuCursorUpdate(0, 3, 4, 5, 6, cursor)]
            gpu.ask(MOVE_CURSOR, struct.pack("<8I", 0, 7, 8, 0, 2, 0, 0, 0), queue=1)
            gpu.ask(MOVE_CURSOR, struct.pack("<8I", 0, 9, 9, 0, 0, 0, 0, 0), queue=1)
            gpu.serve(2, display.moves)  # type: ignore[arg-type]
            assert display.moves == [(0, 7, 8, True), (0, 9, 9, False)]
            gpu.command(SET_SCANOUT, 0, 0, 0, 0, 0, 0)
            gpu.serve(2, display.scanouts)  # type: ignore[arg-type]
            assert display.scanouts[1] == (0, 0, 0)


def without_x(pixels: bytes | bytearray) -> bytes:
    """The fourth byte of each pixel means nothing."""
    return b"".join(bytes(pixels[i : i + 3]) for i in range(0, len(pixels), 4))
