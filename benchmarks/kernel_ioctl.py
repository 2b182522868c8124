# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What the wrapping of each ioctl costs: a row of the table, and the method over it, beside a bare
fcntl.ioctl with a buffer that was packed before the clock started.

Each is called in a state in which it succeeds and can be repeated.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.facts import IOCTL, METHOD, ROW
from benchmarks.harness import US, Case, Cases, Suite, again, cell
from vhost.dirty_log import DirtyLog
from vhost.features import VirtioF
from vhost.kernel import KernelVhost, VhostNet, VhostVdpa, VhostVsock
from vhost.kernel import ioctls as k
from vhost.kernel._ioctl import Ioctl
from vhost.memory import GuestMemory, Region

GUEST = 1 << 32
NUM = 256
MODERN = int(VirtioF.VERSION_1)
CID = 1234


@dataclass
class Call:
    """One ioctl: the bytes it takes, the row's call and the method's."""

    row: Ioctl
    argument: bytes
    call: Callable[[], object]
    method: Callable[[], object]
    fd: int

    def bare(self) -> Callable[[], object]:
        buffer, number, fd = bytearray(self.argument), self.row.number, self.fd
        if not buffer:
            return lambda: fcntl.ioctl(fd, number)
        return lambda: fcntl.ioctl(fd, number, buffer)


def vhost_cases(net: VhostNet, stack: contextlib.ExitStack) -> list[Call]:
    fd = net.fd
    region = Region.allocate(1 << 20, guest_addr=GUEST)
    memory = GuestMemory([region])
    log = DirtyLog.for_memory(memory)
    event = os.eventfd(0, os.EFD_CLOEXEC)
    stack.callback(os.close, event)
    net.set_features(MODERN)
    net.set_mem_table(memory)
    net.set_vring_num(0, NUM)
    areas = (GUEST, GUEST + 0x4000, GUEST + 0x8000)
    hosts = tuple(area - GUEST + region.host_addr for area in areas)
    state, file = struct.Struct("II"), struct.Struct("Ii")
    table = struct.pack("II4Q", 1, 0, GUEST, region.size, region.host_addr, 0)
    addresses = struct.pack("II4Q", 0, 0, hosts[0], hosts[2], hosts[1], 0)

    def case(row: Any, argument: bytes, arguments: tuple[Any, ...], method: Callable[[], object]) -> Call:
        return Call(row, argument, lambda: row(fd, *arguments), method, fd)

    word = struct.Struct("Q").pack
    return [
        case(k.GET_FEATURES, bytes(8), (), lambda: net.get_features()),
        case(k.SET_FEATURES, word(MODERN), (MODERN,), lambda: net.set_features(MODERN)),
        case(k.GET_BACKEND_FEATURES, bytes(8), (), lambda: net.get_backend_features()),
        case(k.SET_MEM_TABLE, table, (memory,), lambda: net.set_mem_table(memory)),
        case(k.SET_LOG_BASE, word(log.addr), (log.addr,), lambda: net.set_log_base(log)),
        case(k.SET_LOG_FD, struct.pack("i", event), (event,), lambda: net.set_log_fd(event)),
        case(k.SET_VRING_NUM, state.pack(0, NUM), (0, NUM), lambda: net.set_vring_num(0, NUM)),
        case(k.SET_VRING_ADDR, addresses, (0, *hosts), lambda: net.set_vring_addr(0, *areas)),
        case(k.SET_VRING_BASE, state.pack(0, 0), (0, 0), lambda: net.set_vring_base(0, 0)),
        case(k.GET_VRING_BASE, state.pack(0, 0), (0,), lambda: k.GET_VRING_BASE(fd, 0)),
        case(k.SET_VRING_KICK, file.pack(0, event), (0, event), lambda: net.set_vring_kick(0, event)),
        case(k.SET_VRING_CALL, file.pack(0, event), (0, event), lambda: net.set_vring_call(0, event)),
        case(k.SET_VRING_ERR, file.pack(0, event), (0, event), lambda: net.set_vring_err(0, event)),
        case(k.SET_VRING_BUSYLOOP_TIMEOUT, state.pack(0, 0), (0, 0),
             lambda: net.set_vring_busyloop_timeout(0, 0)),
        case(k.GET_VRING_BUSYLOOP_TIMEOUT, state.pack(0, 0), (0,), lambda: net.get_vring_busyloop_timeout(0)),
        case(k.NET_SET_BACKEND, file.pack(0, -1), (0, None), lambda: net.set_backend(0, None)),
    ]  # fmt: skip


def vsock_cases(vsock: VhostVsock) -> list[Call]:
    fd = vsock.fd
    return [
        Call(k.VSOCK_SET_GUEST_CID, struct.pack("Q", CID), lambda: k.VSOCK_SET_GUEST_CID(fd, CID),
             lambda: vsock.set_guest_cid(CID), fd),
        Call(k.VSOCK_SET_RUNNING, struct.pack("i", 0), lambda: k.VSOCK_SET_RUNNING(fd, 0),
             lambda: vsock.set_running(False), fd),
    ]  # fmt: skip


def vdpa_cases(disk: VhostVdpa) -> list[Call]:
    fd = disk.fd
    config = struct.pack("II8x", 0, 8)
    return [
        Call(k.VDPA_GET_STATUS, bytes(1), lambda: k.VDPA_GET_STATUS(fd), lambda: disk.get_status(), fd),
        Call(k.VDPA_GET_CONFIG, config, lambda: k.VDPA_GET_CONFIG(fd, 0, 8),
             lambda: disk.get_config(0, 8), fd),
        Call(k.VDPA_GET_VRING_NUM, bytes(2), lambda: k.VDPA_GET_VRING_NUM(fd),
             lambda: disk.get_vring_num_max(), fd),
        Call(k.VDPA_GET_IOVA_RANGE, bytes(16), lambda: k.VDPA_GET_IOVA_RANGE(fd),
             lambda: disk.get_iova_range(), fd),
        Call(k.VDPA_SET_VRING_ENABLE, struct.pack("II", 0, 0), lambda: k.VDPA_SET_VRING_ENABLE(fd, 0, 0),
             lambda: disk.set_vring_enable(0, False), fd),
    ]  # fmt: skip


def timed(call: Callable[[], object], times: int) -> Callable[[], float]:
    """Microseconds a call."""

    def measure() -> float:
        start = time.perf_counter_ns()
        for _ in range(times):
            call()
        return (time.perf_counter_ns() - start) / times / 1e3

    return measure


def run(suite: Suite) -> None:
    with contextlib.ExitStack() as stack:
        devices: list[KernelVhost] = []
        net, vsock = stack.enter_context(VhostNet()), stack.enter_context(VhostVsock(CID))
        devices += [net, vsock]
        calls = [*vhost_cases(net, stack), *vsock_cases(vsock)]
        if Path("/sys/bus/vdpa/drivers/vhost_vdpa").exists():
            vdpa = importlib.import_module("kernel.vdpa_bus")
            path = stack.enter_context(vdpa.vhost_vdpa("bench", "vdpasim_blk"))
            calls += vdpa_cases(stack.enter_context(VhostVdpa(path)))
        measure(suite, calls)


def measure(suite: Suite, calls: list[Call]) -> None:
    times = 100 if suite.quick else 300
    cases: Cases = {}
    for call in calls:
        here = cell(ioctl=call.row.name)
        cases[Case(IOCTL, here)] = timed(call.bare(), times)
        cases[Case(again(IOCTL), here)] = timed(call.bare(), times)
        cases[Case(ROW, here)] = timed(call.call, times)
        cases[Case(METHOD, here)] = timed(call.method, times)
    # Under TCG the calibration loop is interpreted, too, and never quiet.
    suite.interleave(cases, US, 7 if suite.quick else 21, calibrate=False, doing="ioctls")
