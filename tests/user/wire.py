# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Well-formed payloads for hypothesis, one of each type for tables, and descriptors to send."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import strategies as st

from vhost.user import gpu_payloads as g
from vhost.user import payloads as p
from vhost.user.spec import Spec

U8 = st.integers(0, 0xFF)
U16 = st.integers(0, 0xFFFF)
U32 = st.integers(0, p.U32_MAX)
U64 = st.integers(0, p.U64_MAX)
REGION = st.builds(p.MemoryRegion, U64, U64, U64, U64)
XEN_REGION = st.builds(p.XenMemoryRegion, U64, U64, U64, U64, U32, U32)


def _config(offset: int, flags: int, payload: bytes) -> p.Config:
    return p.Config(offset, len(payload), flags, payload)


def _shmem(sizes: list[int]) -> p.ShmemConfig:
    while sizes and not sizes[-1]:
        sizes.pop()
    return p.ShmemConfig(tuple(sizes))


def _update(scanout: int, x: int, y: int, size: tuple[int, int]) -> g.GpuUpdate:
    return g.GpuUpdate(scanout, x, y, *size, bytes(4 * size[0] * size[1]))


def _modes(modes: list[g.Mode]) -> g.GpuDisplayInfo:
    while modes and modes[-1] == g.Mode():
        modes.pop()
    return g.GpuDisplayInfo(tuple(modes))


I32 = st.integers(-(1 << 31), (1 << 31) - 1)
SIDE = st.integers(0, 20)
CURSOR = st.binary(max_size=64).map(lambda data: data.ljust(4 * 64 * 64, b"\0"))

STRATEGIES: dict[type[p.Payload], st.SearchStrategy[p.Payload]] = {
    p.Empty: st.just(p.EMPTY),
    p.Opaque: st.builds(p.Opaque, st.binary(max_size=4096)),
    p.U64: st.builds(p.U64, U64),
    p.VringState: st.builds(p.VringState, U32, U32),
    p.VringAddr: st.builds(p.VringAddr, U32, U32, U64, U64, U64, U64),
    p.VringFd: st.builds(p.VringFd, U8, st.booleans()),
    p.MemoryRegion: REGION,
    p.XenMemoryRegion: XEN_REGION,
    p.MemTable: st.builds(p.MemTable, st.lists(REGION, min_size=1, max_size=8)),
    p.XenMemTable: st.builds(p.XenMemTable, st.lists(XEN_REGION, min_size=1, max_size=8)),
    p.SingleRegion: st.builds(p.SingleRegion, REGION),
    p.XenSingleRegion: st.builds(p.XenSingleRegion, XEN_REGION),
    p.Log: st.builds(p.Log, U64, U64),
    p.Iotlb: st.builds(p.Iotlb, U64, U64, U64, U8, U8),
    p.Config: st.builds(_config, U32, U32, st.binary(max_size=p.CONFIG_MAX)),
    p.VringArea: st.builds(p.VringArea, U64, U64, U64),
    p.Inflight: st.builds(p.Inflight, U64, U64, U16, U16),
    p.SharedObject: st.builds(p.SharedObject, st.uuids()),
    p.DeviceState: st.builds(p.DeviceState, U32, U32),
    p.MMap: st.builds(p.MMap, U8, U64, U64, U64, U64),
    p.ShmemConfig: st.builds(_shmem, st.lists(U64, max_size=p.SHMEM_REGIONS)),
    p.CryptoSession: st.builds(
        p.CryptoSession,
        U64,
        st.binary(min_size=p.CryptoSession.SETUP, max_size=p.CryptoSession.SETUP),
        st.integers(-(1 << 63), (1 << 63) - 1),
    ),
    g.GpuCursorPos: st.builds(g.GpuCursorPos, U32, U32, U32),
    g.GpuCursorUpdate: st.builds(g.GpuCursorUpdate, U32, U32, U32, U32, U32, CURSOR),
    g.GpuScanout: st.builds(g.GpuScanout, U32, U32, U32),
    g.GpuArea: st.builds(g.GpuArea, U32, U32, U32, U32, U32),
    g.GpuUpdate: st.builds(_update, U32, U32, U32, st.tuples(SIDE, SIDE)),
    g.GpuDmabufScanout: st.builds(g.GpuDmabufScanout, *[U32] * 9, I32),
    g.GpuDmabufScanout2: st.builds(g.GpuDmabufScanout2, *[U32] * 9, I32, U64),
    g.GpuEdidRequest: st.builds(g.GpuEdidRequest, U32),
    g.GpuDisplayInfo: st.builds(_modes, st.lists(st.builds(g.Mode, *[U32] * 6), max_size=16)),
    g.GpuEdid: st.builds(g.GpuEdid, st.binary(max_size=1024)),
}

_REGION = p.MemoryRegion(0x1000, 0x2000, 0x7F00_0000_0000, 0x4000)
_XEN_REGION = p.XenMemoryRegion(0x1000, 0x2000, 0x7F00_0000_0000, 0x4000, 2, 7)
SAMPLES: dict[type[p.Payload], p.Payload] = {
    p.Empty: p.EMPTY,
    p.Opaque: p.Opaque(b"?"),
    p.U64: p.U64(0x1234),
    p.VringState: p.VringState(1, 256),
    p.VringAddr: p.VringAddr(1, 0, 0x1000, 0x3000, 0x2000, 0x4000),
    p.VringFd: p.VringFd(1),
    p.MemoryRegion: _REGION,
    p.XenMemoryRegion: _XEN_REGION,
    p.MemTable: p.MemTable((_REGION, p.MemoryRegion(0x10000, 0x1000, 0x7F00_0001_0000))),
    p.XenMemTable: p.XenMemTable((_XEN_REGION,)),
    p.SingleRegion: p.SingleRegion(_REGION),
    p.XenSingleRegion: p.XenSingleRegion(_XEN_REGION),
    p.Log: p.Log(0x8000, 0x1000),
    p.Iotlb: p.Iotlb(0x1000, 0x2000, 0x7F00_0000_0000, 3, p.Iotlb.UPDATE),
    p.Config: p.Config(8, 4, 0, b"abcd"),
    p.VringArea: p.VringArea(1, 4096, 0),
    p.Inflight: p.Inflight(0x1000, 0, 2, 128),
    p.SharedObject: p.SharedObject(uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")),
    p.DeviceState: p.DeviceState(p.DeviceState.LOAD, 0),
    p.MMap: p.MMap(3, 0x1000, 0x2000, 0x3000, p.MMap.READ_WRITE),
    p.ShmemConfig: p.ShmemConfig((0x1000, 0, 0x4000)),
    p.CryptoSession: p.CryptoSession(0x104, bytes(range(256)) * 4 + bytes(32), 5),
    g.GpuCursorPos: g.GpuCursorPos(1, 20, 30),
    g.GpuCursorUpdate: g.GpuCursorUpdate(1, 20, 30, 4, 5, bytes(range(256)) * 64),
    g.GpuScanout: g.GpuScanout(1, 1024, 768),
    g.GpuArea: g.GpuArea(1, 0, 8, 16, 32),
    g.GpuUpdate: g.GpuUpdate(1, 0, 8, 2, 3, bytes(range(24))),
    g.GpuDmabufScanout: g.GpuDmabufScanout(1, 0, 0, 640, 480, 640, 480, 2560, 0, 0x34325258),
    g.GpuDmabufScanout2: g.GpuDmabufScanout2(1, 0, 0, 640, 480, 640, 480, 2560, 0, 0x34325258, 1 << 56),
    g.GpuEdidRequest: g.GpuEdidRequest(1),
    g.GpuDisplayInfo: g.GpuDisplayInfo((g.Mode(0, 0, 1024, 768, 1, 0),)),
    g.GpuEdid: g.GpuEdid(bytes(range(128))),
}


def right_number(spec: Spec, payload: p.Payload, *, reply: bool = False) -> int:
    """The most descriptors that may come with this payload."""
    return (spec.reply_fds if reply else spec.fds).expected(payload)[1]


@contextmanager
def descriptors(count: int) -> Iterator[list[int]]:
    """Descriptors to give away; those that somebody closed stay closed."""
    yield [os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC) for _ in range(count)]


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
