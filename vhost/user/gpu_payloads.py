# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The wire structs of the vhost-user-gpu protocol, the same kind of classes as in payloads.py.

In the machine's own byte order; the two replies that are structs of the virtio GPU device (VIRTIO 5.7.6) are
little-endian, as that is, and keep its header.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

from vhost.errors import InvalidMessage
from vhost.user.payloads import Fixed, Payload, check_size

CURSOR_SIDE = 64
"""A cursor has this many pixels in each direction, of 4 bytes."""
MAX_SCANOUTS = 16
UPDATE_MAX = 1 << 27
"""Bytes of pixels in one update that are accepted; 7680 x 4320 needs a little less."""
EDID_MAX = 1024


@dataclass(frozen=True, slots=True)
class GpuCursorPos(Fixed, format="III"):
    """Where a scanout's cursor is."""

    scanout: int
    x: int
    y: int


@dataclass(frozen=True, slots=True)
class GpuCursorUpdate(Payload):
    """A cursor's place, its hot spot and its pixels (a8r8g8b8)."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct(f"=IIIII{4 * CURSOR_SIDE**2}s")
    MIN_SIZE: ClassVar[int] = FORMAT.size
    MAX_SIZE: ClassVar[int] = FORMAT.size
    scanout: int
    x: int
    y: int
    hot_x: int
    hot_y: int
    pixels: bytes

    def pack(self) -> bytes:
        if len(self.pixels) != 4 * CURSOR_SIDE**2:
            raise ValueError(f"GpuCursorUpdate: {len(self.pixels)} bytes, must be {4 * CURSOR_SIDE**2}")
        return self.FORMAT.pack(self.scanout, self.x, self.y, self.hot_x, self.hot_y, self.pixels)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        check_size(cls, data)
        return cls(*cls.FORMAT.unpack(data))


@dataclass(frozen=True, slots=True)
class GpuScanout(Fixed, format="III"):
    """The size of a scanout; 0 x 0 disables it."""

    scanout: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class GpuArea(Fixed, format="IIIII"):
    """A part of a scanout that is shared as a dma-buf, and changed."""

    scanout: int
    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class GpuUpdate(Payload):
    """A part of a scanout and its pixels (x8r8g8b8), line by line."""

    HEAD: ClassVar[struct.Struct] = struct.Struct("=IIIII")
    MIN_SIZE: ClassVar[int] = HEAD.size
    MAX_SIZE: ClassVar[int] = HEAD.size + UPDATE_MAX
    scanout: int
    x: int
    y: int
    width: int
    height: int
    pixels: bytes

    def pack(self) -> bytes:
        if len(self.pixels) != 4 * self.width * self.height or len(self.pixels) > UPDATE_MAX:
            raise ValueError(
                f"GpuUpdate: {len(self.pixels)} bytes for {self.width} x {self.height}, limit {UPDATE_MAX}"
            )
        return self.HEAD.pack(self.scanout, self.x, self.y, self.width, self.height) + self.pixels

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        check_size(cls, data)
        scanout, x, y, width, height = cls.HEAD.unpack_from(data)
        if len(data) - cls.HEAD.size != 4 * width * height:
            raise InvalidMessage(
                f"payload GpuUpdate: {len(data) - cls.HEAD.size} bytes of pixels for {width} x {height},"
                f" must be {4 * width * height}"
            )
        return cls(scanout, x, y, width, height, data[cls.HEAD.size :])


@dataclass(frozen=True, slots=True)
class GpuDmabufScanout(Fixed, format="IIIIIIIIIi"):
    """A dma-buf that a scanout shows a part of; one of size 0 disables it, and then none comes along."""

    scanout: int
    x: int
    y: int
    width: int
    height: int
    fd_width: int
    fd_height: int
    fd_stride: int
    fd_flags: int
    fourcc: int

    @property
    def nofd(self) -> bool:
        return not self.width or not self.height


@dataclass(frozen=True, slots=True)
class GpuDmabufScanout2(GpuDmabufScanout, format="IIIIIIIIIiQ"):
    """The same with the dma-buf's modifiers."""

    modifier: int


@dataclass(frozen=True, slots=True)
class GpuEdidRequest(Fixed, format="I"):
    """Of which scanout."""

    scanout: int


class Mode(NamedTuple):
    """What is preferred for one scanout (struct virtio_gpu_display_one)."""

    x: int = 0
    y: int = 0
    width: int = 0
    height: int = 0
    enabled: int = 0
    flags: int = 0


_GPU_HEADER = struct.Struct("<IIQIB3x")
_MODE = struct.Struct("<IIIIII")
RESP_OK_DISPLAY_INFO = 0x1101
RESP_OK_EDID = 0x1104


@dataclass(frozen=True, slots=True)
class GpuDisplayInfo(Payload):
    """struct virtio_gpu_resp_display_info: a mode for each scanout, the first ones given, the others off."""

    MIN_SIZE: ClassVar[int] = _GPU_HEADER.size + MAX_SCANOUTS * _MODE.size
    MAX_SIZE: ClassVar[int] = MIN_SIZE
    modes: tuple[Mode, ...]

    def pack(self) -> bytes:
        if len(self.modes) > MAX_SCANOUTS:
            raise ValueError(f"GpuDisplayInfo: {len(self.modes)} modes, must be at most {MAX_SCANOUTS}")
        modes = b"".join(_MODE.pack(*mode) for mode in self.modes)
        return (_GPU_HEADER.pack(RESP_OK_DISPLAY_INFO, 0, 0, 0, 0) + modes).ljust(self.MIN_SIZE, b"\0")

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        check_size(cls, data)
        modes = [Mode(*fields) for fields in _MODE.iter_unpack(data[_GPU_HEADER.size :])]
        while modes and modes[-1] == Mode():
            modes.pop()
        return cls(tuple(modes))


@dataclass(frozen=True, slots=True)
class GpuEdid(Payload):
    """struct virtio_gpu_resp_edid: the EDID of a scanout."""

    MIN_SIZE: ClassVar[int] = _GPU_HEADER.size + 8 + EDID_MAX
    MAX_SIZE: ClassVar[int] = MIN_SIZE
    edid: bytes

    def pack(self) -> bytes:
        if len(self.edid) > EDID_MAX:
            raise ValueError(f"GpuEdid: {len(self.edid)} bytes, must be at most {EDID_MAX}")
        head = _GPU_HEADER.pack(RESP_OK_EDID, 0, 0, 0, 0) + struct.pack("<II", len(self.edid), 0)
        return head + self.edid.ljust(EDID_MAX, b"\0")

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        check_size(cls, data)
        size, _padding = struct.unpack_from("<II", data, _GPU_HEADER.size)
        if size > EDID_MAX:
            raise InvalidMessage(f"payload GpuEdid: size {size}, must be at most {EDID_MAX}")
        at = _GPU_HEADER.size + 8
        return cls(data[at : at + size])
