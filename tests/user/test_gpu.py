# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The GPU socket: a device that shows things, a display, and either of them when it misbehaves."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import vhost
from user import hostile as h
from user.hostile import RawFrontend
from vhost.errors import Disconnected, InactiveFeature, InvalidMessage, ProtocolError
from vhost.features import GpuF
from vhost.user.gpu import GpuChannel, GpuDisplay, Mode
from vhost.user.gpu_messages import GpuMsg
from vhost.user.gpu_payloads import (
    GpuArea,
    GpuCursorUpdate,
    GpuDmabufScanout,
    GpuDmabufScanout2,
    GpuUpdate,
)
from vhost.user.transport import READ_MAX

GPU_SET_SOCKET = 33
XRGB = 0x34325258
MODES = (Mode(width=640, height=480, enabled=1), Mode(640, 0, 800, 600, 1, 0))
SCANOUT = (2, 0, 0, 640, 480, 640, 480, 2560, 0, XRGB)


class Display(GpuDisplay):
    """Keeps what it is told."""

    def __init__(self, sock: socket.socket, **more: Any) -> None:
        super().__init__(sock, **more)
        self.seen: list[Any] = []

    def display_info(self) -> Sequence[Mode]:
        return MODES

    def edid(self, scanout: int) -> bytes:
        return b"EDID of %d" % scanout

    def cursor_moved(self, scanout: int, x: int, y: int, visible: bool) -> None:
        self.seen.append((scanout, x, y, visible))

    def cursor_changed(self, cursor: GpuCursorUpdate) -> None:
        self.seen.append(cursor)

    def scanout_changed(self, scanout: int, width: int, height: int) -> None:
        self.seen.append((scanout, width, height))

    def updated(self, update: GpuUpdate) -> None:
        self.seen.append(update)

    def dmabuf_changed(self, scanout: GpuDmabufScanout | GpuDmabufScanout2, fd: int | None) -> None:
        self.seen.append((scanout, None if fd is None else os.pread(fd, 6, 0)))

    def dmabuf_updated(self, area: GpuArea) -> None:
        self.seen.append(area)


class Pair:
    def __init__(self, features: int = int(GpuF.EDID | GpuF.DMABUF2)) -> None:
        ours, theirs = socket.socketpair()
        self.channel, self.display = GpuChannel(ours), Display(theirs, features=features)
        self.settle(lambda: self.channel.features is not None)

    def settle(self, done: Callable[[], bool]) -> None:
        until = time.monotonic() + 20
        while not done():
            assert time.monotonic() < until
            for end in (self.channel, self.display):
                assert end.step(), end.error

    def close(self) -> None:
        self.channel.close()
        self.display.close()


@pytest.fixture
def pair(no_leaks: None) -> Iterator[Pair]:
    with contextlib.closing(Pair()) as pair:
        yield pair


def test_everything_that_a_device_can_say(pair: Pair, tmp_path: Path) -> None:
    channel, seen = pair.channel, pair.display.seen
    assert channel.features == pair.display.session.protocol_features == GpuF.EDID | GpuF.DMABUF2
    heard: list[Any] = []
    channel.get_display_info(heard.append)
    channel.get_edid(3, heard.append)
    pair.settle(lambda: len(heard) == 2)
    assert heard == [MODES, b"EDID of 3"]
    pixels = os.urandom(4 * 64 * 64)
    channel.cursor_pos(1, 2, 3)
    channel.cursor_pos_hide(1, 4, 5)
    channel.cursor_update(1, 6, 7, 8, 9, pixels)
    channel.scanout(0, 1024, 768)
    channel.update(0, 1, 2, 3, 4, pixels[:48])
    with open(tmp_path / "dmabuf", "wb+", buffering=0) as file:
        file.write(b"pixels")
        channel.dmabuf_scanout(GpuDmabufScanout(*SCANOUT), file.fileno())
        channel.dmabuf_scanout(GpuDmabufScanout2(*SCANOUT, 7), file.fileno())
    channel.dmabuf_scanout(GpuDmabufScanout(2, *[0] * 9), None)
    channel.dmabuf_update(GpuArea(2, 0, 0, 640, 480), heard.append)
    pair.settle(lambda: len(heard) == 3)
    assert heard[2] is True
    assert seen == [
        (1, 2, 3, True),
        (1, 4, 5, False),
        GpuCursorUpdate(1, 6, 7, 8, 9, pixels),
        (0, 1024, 768),
        GpuUpdate(0, 1, 2, 3, 4, pixels[:48]),
        (GpuDmabufScanout(*SCANOUT), b"pixels"),
        (GpuDmabufScanout2(*SCANOUT, 7), b"pixels"),
        (GpuDmabufScanout(2, *[0] * 9), None),
        GpuArea(2, 0, 0, 640, 480),
    ]


def test_a_large_update_comes_in_pieces(pair: Pair) -> None:
    width, height = 1920, 1080
    pixels = os.urandom(4096) * (4 * width * height // 4096) + bytes(4 * width * height % 4096)
    assert len(pixels) > 4 * READ_MAX
    pair.channel.update(0, 0, 0, width, height, pixels)
    assert pair.channel.pending
    pair.channel.cursor_pos(0, 1, 1)
    pair.settle(lambda: len(pair.display.seen) == 2)
    assert pair.display.seen[0].pixels == pixels
    assert not pair.channel.pending


def test_features_that_the_display_has_not(no_leaks: None) -> None:
    with contextlib.closing(Pair(0)) as pair:
        assert pair.channel.features == 0
        with pytest.raises(InactiveFeature, match="VHOST_USER_GPU_PROTOCOL_F_EDID"):
            pair.channel.get_edid(0, lambda edid: None)
        with pytest.raises(InactiveFeature, match="DMABUF2"):
            pair.channel.dmabuf_scanout(GpuDmabufScanout2(*SCANOUT, 7), 0)
    with contextlib.closing(Pair(1 << 40 | int(GpuF.EDID))) as pair:
        assert pair.channel.features == GpuF.EDID, "what the device does not know it does not take"


def test_the_display_goes_away(pair: Pair) -> None:
    heard: list[Any] = []
    pair.channel.get_display_info(heard.append)
    pair.channel.dmabuf_update(GpuArea(0, 0, 0, 1, 1), heard.append)
    pair.display.close()
    while pair.channel.step():
        pass
    pair.channel.close()
    assert heard == [None, False]
    pair.channel.get_display_info(heard.append)
    assert heard == [None, False, None]


# -- a device that breaks the rules -------------------------------------------------------------------


def raw(number: int, payload: bytes = b"", *, flags: int = 0, size: int | None = None) -> bytes:
    return h.HEADER.pack(number, flags, len(payload) if size is None else size) + payload


@pytest.mark.parametrize(
    ("data", "fds", "why"),
    [
        (raw(0), 0, "unknown"),
        (raw(13), 0, "unknown"),
        (raw(GpuMsg.GPU_CURSOR_POS, bytes(11)), 0, "payload size 11, must be 12"),
        (raw(GpuMsg.GPU_CURSOR_POS, struct.pack("=III", 16, 0, 0)), 0, "scanout 16, must be below 16"),
        (raw(GpuMsg.GPU_SCANOUT, struct.pack("=III", 0xFFFFFFFF, 1, 1)), 0, "scanout"),
        (raw(GpuMsg.GPU_CURSOR_UPDATE, bytes(20)), 0, "payload size 20"),
        (raw(GpuMsg.GPU_UPDATE, struct.pack("=IIIII", 0, 0, 0, 2, 2) + bytes(15)), 0, "15 bytes of pixels"),
        (raw(GpuMsg.GPU_UPDATE, struct.pack("=IIIII", 0, 0, 0, 1 << 31, 1 << 31)), 0, "0 bytes of pixels"),
        (raw(GpuMsg.GPU_UPDATE, bytes(8), size=(1 << 27) + 21), 0, "limit"),
        (raw(GpuMsg.GPU_UPDATE, bytes(8), size=0xFFFFFFFF), 0, "limit"),
        (raw(GpuMsg.GPU_DMABUF_SCANOUT, struct.pack("=9Ii", *SCANOUT)), 0, "0 file descriptors, must be 1"),
        (raw(GpuMsg.GPU_DMABUF_SCANOUT, bytes(40)), 1, "1 file descriptors, must be 0"),
        (raw(GpuMsg.GPU_DMABUF_SCANOUT, struct.pack("=9Ii", *SCANOUT)), 2, "2 file descriptors, must be 1"),
        (raw(GpuMsg.GPU_SCANOUT, bytes(12)), 3, "3 file descriptors, must be 0"),
        (raw(GpuMsg.GPU_GET_EDID, bytes(4)), 0, "EDID was not negotiated"),
        (raw(GpuMsg.GPU_DMABUF_SCANOUT2, bytes(48)), 0, "DMABUF2 was not negotiated"),
        (raw(GpuMsg.GPU_SET_PROTOCOL_FEATURES, h.u64(4)), 0, "features 0x4"),
        (raw(GpuMsg.GPU_SCANOUT, bytes(3), size=12), 0, "after 3 of 12 bytes"),
        (raw(7)[:5], 0, "of the header"),
    ],
)
def test_devices_that_break_the_rules(data: bytes, fds: int, why: str, no_leaks: None) -> None:
    theirs, ours = socket.socketpair()
    with contextlib.closing(Display(ours)) as display, open("/dev/null", "rb") as file:
        with theirs:
            socket.send_fds(theirs, [data], [file.fileno()] * fds)
        until = time.monotonic() + 20
        while display.step():
            assert time.monotonic() < until
        assert isinstance(display.error, ProtocolError)
        assert why in str(display.error)
        assert not display.seen
        assert not display.step()


def test_flags_of_requests_mean_nothing(no_leaks: None) -> None:
    """QEMU's vhost-user-gpu sends what was in its memory, bit 2 included; nobody looks."""
    theirs, ours = socket.socketpair()
    with contextlib.closing(Display(ours)) as display, theirs:
        theirs.sendall(raw(GpuMsg.GPU_GET_PROTOCOL_FEATURES, flags=1))
        theirs.sendall(raw(GpuMsg.GPU_CURSOR_POS, bytes(12), flags=0x55DF))
        while display.step() and not select.select([theirs], [], [], 0)[0]:
            pass
        assert theirs.recv(20) == raw(GpuMsg.GPU_GET_PROTOCOL_FEATURES, h.u64(3), flags=4)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (raw(GpuMsg.GPU_GET_PROTOCOL_FEATURES, bytes(4), flags=4), "size"),
        (raw(GpuMsg.GPU_GET_EDID, bytes(1056), flags=4), "reply to GPU_GET_EDID, expected"),
        (raw(GpuMsg.GPU_GET_PROTOCOL_FEATURES, h.u64(3), flags=0), "a request where a reply was due"),
        (raw(GpuMsg.GPU_GET_PROTOCOL_FEATURES, h.u64(3), flags=4) * 2, "no request is outstanding"),
    ],
)
def test_displays_that_break_the_rules(data: bytes, why: str, no_leaks: None) -> None:
    ours, theirs = socket.socketpair()
    with contextlib.closing(GpuChannel(ours)) as channel, theirs:
        theirs.sendall(data)
        until = time.monotonic() + 20
        while channel.step():
            assert time.monotonic() < until
        assert why in str(channel.error)


def test_edid_that_lies(no_leaks: None) -> None:
    ours, theirs = socket.socketpair()
    with contextlib.closing(GpuChannel(ours)) as channel, theirs:
        theirs.sendall(raw(GpuMsg.GPU_GET_PROTOCOL_FEATURES, h.u64(1), flags=4))
        while channel.features is None:
            channel.step()
        heard: list[bytes | None] = []
        channel.get_edid(0, heard.append)
        edid = struct.pack("<24xII1024x", 1025, 0)
        theirs.sendall(raw(GpuMsg.GPU_GET_EDID, edid, flags=4))
        while channel.step():
            pass
        assert "size 1025, must be at most 1024" in str(channel.error)
        channel.close()
        assert heard == [None]


def test_display_that_does_not_read(no_leaks: None) -> None:
    ours, theirs = socket.socketpair()
    with contextlib.closing(GpuChannel(ours)) as channel, theirs:
        channel.transport.max_pending = 1 << 20
        pixels = bytes(1 << 18)
        for _ in range(64):
            channel.update(0, 0, 0, 256, 256, pixels)
        assert "peer does not read" in str(channel.error)


# -- with a session -----------------------------------------------------------------------------------


class Gpu(vhost.Device):
    device_id = vhost.DeviceId.GPU
    queues = ("controlq", "cursorq")
    channel: GpuChannel | None = None

    def set_gpu_socket(self, sock: socket.socket) -> GpuChannel:
        self.channel = GpuChannel(sock)
        self.channel.get_display_info(self.show)
        return self.channel

    def show(self, modes: Sequence[Mode] | None) -> None:
        if modes is not None and self.channel is not None:
            self.channel.scanout(0, modes[0].width, modes[0].height)
            self.channel.update(0, 0, 0, 640, 480, bytes(4 * 640 * 480))


def test_socket_goes_to_the_device(tmp_path: Path, no_leaks: None) -> None:
    device = Gpu()
    with h.served(device, tmp_path / "s"), vhost.Frontend.connect(tmp_path / "s") as frontend:
        ours, theirs = socket.socketpair()
        with contextlib.closing(Display(ours)) as display:
            with theirs:
                frontend.gpu_set_socket(theirs.fileno())
            until = time.monotonic() + 20
            while len(display.seen) < 2:
                select.select([display], [], [], until - time.monotonic())
                assert display.step(), display.error
            assert display.seen == [(0, 640, 480), GpuUpdate(0, 0, 0, 640, 480, bytes(4 * 640 * 480))]
            again = socket.socketpair()
            with again[0], again[1], pytest.raises(ProtocolError, match="GPU_SET_SOCKET"):
                frontend.gpu_set_socket(again[0].fileno())
            # The session ends, and with it the socket.
            frontend.close()
            while display.step():
                select.select([display], [], [], until - time.monotonic())
            assert isinstance(display.error, Disconnected)


def test_display_that_ends_does_not_end_the_session(tmp_path: Path, no_leaks: None) -> None:
    device = Gpu()
    with h.served(device, tmp_path / "s"), contextlib.closing(RawFrontend(tmp_path / "s")) as front:
        front.negotiate()
        for data in (b"", raw(99, flags=4)):
            ours, theirs = socket.socketpair()
            with theirs:
                # The one before is gone, once the session has seen that.
                until = time.monotonic() + 20
                while front.status(GPU_SET_SOCKET, b"", [theirs.fileno()]):
                    assert time.monotonic() < until
            with ours:
                ours.sendall(data)
            assert front.ask(h.GET_FEATURES)


def test_sockets_that_are_none(tmp_path: Path, no_leaks: None) -> None:
    with h.served(Gpu(), tmp_path / "s"), contextlib.closing(RawFrontend(tmp_path / "s")) as front:
        front.negotiate()
        assert front.status(GPU_SET_SOCKET) != 0
        assert front.status(GPU_SET_SOCKET, b"", [front.kick]) != 0
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
            assert front.status(GPU_SET_SOCKET, b"", [datagrams.fileno()]) != 0
        with socket.socket() as tcp:
            assert front.status(GPU_SET_SOCKET, b"", [tcp.fileno()]) != 0
        assert front.ask(h.GET_FEATURES)
    with h.served(vhost.devices.Rng(), tmp_path / "s"):
        one, other = socket.socketpair()
        with contextlib.closing(RawFrontend(tmp_path / "s")) as front, one, other:
            assert front.status(GPU_SET_SOCKET, b"", [one.fileno()]) != 0, "no GPU"


def test_payloads_that_cannot_be_sent() -> None:
    for wrong in (
        lambda: GpuUpdate(0, 0, 0, 2, 2, bytes(15)).pack(),
        lambda: GpuCursorUpdate(0, 0, 0, 0, 0, b"").pack(),
        lambda: GpuUpdate(0, 0, 0, 1 << 13, 1 << 13, bytes(1 << 28)).pack(),
    ):
        with pytest.raises(ValueError, match="bytes"):
            wrong()
    with pytest.raises(InvalidMessage):
        GpuUpdate.unpack(bytes(19))
