# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Each rule of the linter, broken in one way or more, and kept in the nearest way."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tracing import ALL_FEATURES, ALL_PROTOCOL, EVENTFD, MEMFD, SOCKET, Seen
from vhost.features import NetF, ProtocolF, VhostF, VirtioF
from vhost.trace.records import FdInfo, Happening
from vhost.trace.rules import RULES
from vhost.user import payloads as p
from vhost.user.messages import BackendMsg, FrontendMsg
from vhost.user.payloads import U64, VringAddr, VringFd, VringState
from vhost.user.spec import HEADER, NEED_REPLY_FLAG, REPLY_FLAG, VERSION, Role

F, B = FrontendMsg, BackendMsg
PROTOCOL_FEATURES = int(VhostF.PROTOCOL_FEATURES)
PACKED = PROTOCOL_FEATURES | int(VirtioF.RING_PACKED)
LOG_ALL = int(VhostF.LOG_ALL)
ACK = int(ProtocolF.REPLY_ACK)
USUAL_PROTOCOL = ALL_PROTOCOL & ~int(ProtocolF.XEN_MMAP | ProtocolF.GPA_ADDRESSES)
SLOTS = ACK | int(ProtocolF.CONFIGURE_MEM_SLOTS)
REQ = ACK | int(ProtocolF.BACKEND_REQ)
REGION = p.MemoryRegion(0, 0x10000, 0x7000_0000, 0)
NEXT = p.MemoryRegion(0x10000, 0x10000, 0x7001_0000, 0)
RING = VringAddr(0, 0, 0x7000_0000, 0x7000_2000, 0x7000_1000)
PIPE = FdInfo("pipe")
INFLIGHT = int(ProtocolF.INFLIGHT_SHMFD)
STATE = int(ProtocolF.DEVICE_STATE)
SHMEM = int(ProtocolF.SHMEM_MAP | ProtocolF.BACKEND_SEND_FD)


def ready(features: int = PROTOCOL_FEATURES, protocol: int = USUAL_PROTOCOL) -> Seen:
    """Negotiated, with memory."""
    seen = Seen().negotiate(features, protocol)
    seen.front(F.SET_MEM_TABLE, p.MemTable((REGION, NEXT)), [MEMFD, MEMFD])
    return seen


def running(features: int = PROTOCOL_FEATURES) -> Seen:
    """With ring 0 started."""
    seen = ready(features)
    seen.front(F.SET_VRING_NUM, VringState(0, 256))
    seen.front(F.SET_VRING_ADDR, RING)
    seen.front(F.SET_VRING_KICK, VringFd(0), [EVENTFD])
    return seen


def channel(seen: Seen) -> Seen:
    seen.open_channel()
    return seen


def counted(queues: int, offered: int = PROTOCOL_FEATURES) -> Seen:
    seen = Seen().negotiate(PROTOCOL_FEATURES, int(ProtocolF.MQ), offered=offered)
    seen.front(F.GET_QUEUE_NUM)
    seen.back(F.GET_QUEUE_NUM, U64(queues))
    return seen


def table(*regions: p.MemoryRegion, fd: FdInfo = MEMFD) -> Seen:
    seen = Seen().negotiate()
    seen.front(F.SET_MEM_TABLE, p.MemTable(regions), [fd] * len(regions))
    return seen


def header(flags: int, number: int = F.SET_OWNER, sender: Role = Role.FRONTEND) -> Seen:
    seen = Seen()
    seen.raw(sender, HEADER.pack(number, flags, 0))
    return seen


def ask(seen: Seen, number: int, payload: p.Payload, answer: p.Payload, *fds: FdInfo) -> Seen:
    request_fds = [PIPE] if number == F.SET_DEVICE_STATE_FD else []
    seen.front(number, payload, request_fds)
    seen.back(number, answer, fds)
    return seen


def sent(seen: Seen, number: int, payload: p.Payload | bytes = p.EMPTY, *fds: FdInfo) -> Seen:
    seen.front(number, payload, fds)
    return seen


def asked(seen: Seen, number: int, payload: p.Payload | bytes = p.EMPTY, *fds: FdInfo, **more: bool) -> Seen:
    """A request of the back-end."""
    seen.back(number, payload, fds, channel=1, **more)
    return seen


def shmem(*maps: tuple[int, int, int]) -> Seen:
    seen = ready()
    channel(ask(seen, F.GET_SHMEM_CONFIG, p.EMPTY, p.ShmemConfig((0x10000,))))
    for shmid, offset, length in maps:
        asked(seen, B.BACKEND_SHMEM_MAP, p.MMap(shmid, 0, offset, length, 1), MEMFD)
    return seen


def logging(size: int, *fds: FdInfo) -> Seen:
    return sent(ready(), F.SET_LOG_BASE, p.Log(size), *fds)


def unanswered(number: int, payload: p.Payload, need_reply: bool) -> Seen:
    seen = ready()
    seen.front(number, payload, need_reply=need_reply)
    return ask(seen, F.GET_FEATURES, p.EMPTY, U64(0))


def ended(what: Callable[[Seen], object]) -> Seen:
    seen = ready()
    what(seen)
    seen.record(Happening.EOF, Role.BACKEND)
    return seen


def iotlb(*, type: int, perm: int = 3, user: int = 0x7000_0000) -> p.Iotlb:
    return p.Iotlb(0, 0x1000, user, perm, type)


IOMMU = PROTOCOL_FEATURES | int(VirtioF.ACCESS_PLATFORM)
LONG = tuple(p.MemoryRegion(at << 16, 1 << 16, 0x7000_0000 + (at << 16)) for at in range(9))
PAIRS = PROTOCOL_FEATURES | int(NetF.MRG_RXBUF)

BROKEN: list[tuple[str, Callable[[], Seen]]] = [
    ("version", lambda: header(2)),
    ("version", lambda: header(0)),
    ("flags", lambda: header(VERSION | 0x10)),
    ("reply-flag", lambda: header(VERSION | REPLY_FLAG)),
    ("reply-flag", lambda: header(VERSION, F.GET_FEATURES, Role.BACKEND)),
    ("reply-to-nothing", lambda: header(VERSION | REPLY_FLAG, F.GET_FEATURES, Role.BACKEND)),
    ("reply-missing", lambda: unanswered(F.GET_VRING_BASE, VringState(0), False)),
    ("ack-missing", lambda: unanswered(F.SET_VRING_NUM, VringState(0, 4), True)),
    ("need-reply", lambda: header(VERSION | NEED_REPLY_FLAG)),
    ("need-reply-habit", lambda: header(VERSION | NEED_REPLY_FLAG, F.GET_FEATURES)),
    ("unknown", lambda: header(VERSION, len(F) + 1)),
    ("unknown", lambda: header(VERSION, 0)),
    ("size", lambda: sent(ready(), F.SET_VRING_NUM, bytes(7))),
    ("size", lambda: sent(ready(), F.SET_VRING_KICK, U64(1 << 9), EVENTFD)),
    ("size", lambda: ask(ready(), F.GET_FEATURES, p.EMPTY, p.Opaque(bytes(4)))),
    ("fds", lambda: sent(ready(), F.SET_VRING_KICK, VringFd(0))),
    ("fds", lambda: sent(ready(), F.SET_VRING_KICK, VringFd(0, nofd=True), EVENTFD)),
    ("fds", lambda: sent(ready(), F.SET_MEM_TABLE, p.MemTable((REGION,)))),
    ("fds", lambda: sent(ready(), F.SET_OWNER, p.EMPTY, EVENTFD)),
    ("fds", lambda: ask(ready(), F.GET_FEATURES, p.EMPTY, U64(0), MEMFD)),
    ("fd-unused", lambda: sent(ready(), F.REM_MEM_REG, p.SingleRegion(REGION), MEMFD)),
    ("fd-kind", lambda: sent(ready(), F.SET_VRING_CALL, VringFd(0), MEMFD)),
    ("fd-kind", lambda: sent(ready(), F.SET_BACKEND_REQ_FD, p.EMPTY, EVENTFD)),
    ("fd-kind", lambda: sent(ready(), F.GPU_SET_SOCKET, p.EMPTY, PIPE)),
    ("feature", lambda: sent(Seen().negotiate(), F.GET_CONFIG, p.Config(0, 0, 0, b""))),
    ("feature", lambda: sent(ready(), F.IOTLB_MSG, iotlb(type=2))),
    ("feature", lambda: sent(Seen().negotiate(offered=0), F.GET_PROTOCOL_FEATURES)),
    ("feature", lambda: asked(channel(Seen().negotiate()), B.BACKEND_CONFIG_CHANGE_MSG)),
    ("feature-habit", lambda: sent(Seen().negotiate(0), F.SET_VRING_ENABLE, VringState(0, 1))),
    ("feature-habit", lambda: sent(Seen().negotiate(), F.SET_LOG_BASE, p.Log(4096), MEMFD)),
    ("cut-off", lambda: ended(lambda seen: seen.raw(Role.BACKEND, b"\1"))),
    ("unanswered", lambda: ended(lambda seen: seen.front(F.GET_FEATURES))),
    ("not-offered", lambda: Seen().negotiate(PROTOCOL_FEATURES | 1, offered=PROTOCOL_FEATURES)),
    ("not-offered", lambda: Seen().negotiate(protocol=9, offered_protocol=8)),
    ("not-asked", lambda: sent(Seen(), F.SET_FEATURES, U64(0))),
    ("not-asked", lambda: sent(Seen(), F.SET_PROTOCOL_FEATURES, U64(0))),
    ("companions", lambda: Seen().negotiate(protocol=int(ProtocolF.GET_VRING_BASE_INFLIGHT) | ACK)),
    ("inband", lambda: Seen().negotiate(protocol=int(ProtocolF.INBAND_NOTIFICATIONS) | ACK)),
    ("changed", lambda: sent(running(), F.SET_FEATURES, U64(PACKED))),
    ("owner", lambda: sent(Seen(), F.SET_VRING_NUM, VringState(0, 4))),
    ("owner", lambda: sent(ready(), F.SET_OWNER)),
    ("reset-owner", lambda: sent(ready(), F.RESET_OWNER)),
    ("regions", lambda: sent(ready(), F.SET_MEM_TABLE, _long_table(), *[MEMFD] * 9)),
    ("region", lambda: table(p.MemoryRegion(0, 0, 0x7000_0000))),
    ("region", lambda: table(p.MemoryRegion((1 << 64) - 0x1000, 0x2000, 0x7000_0000))),
    ("region", lambda: table(p.MemoryRegion(0, 0x2000, (1 << 64) - 0x1000))),
    ("overlap", lambda: table(REGION, p.MemoryRegion(0xF000, 0x1000, 0x9000_0000))),
    ("overlap", lambda: table(REGION, p.MemoryRegion(0x20000, 0x1000, 0x7000_F000))),
    ("overlap", lambda: sent(ready(), F.ADD_MEM_REG, p.SingleRegion(REGION), MEMFD)),
    ("region-gpa", lambda: _gpa(REGION)),
    ("file-size", lambda: table(REGION, fd=FdInfo("memfd", "m", 0xF000))),
    ("no-region", lambda: sent(ready(), F.REM_MEM_REG, p.SingleRegion(LONG[5]))),
    ("slots", lambda: _slots(1)),
    ("unmapped", lambda: sent(ready(), F.SET_VRING_ADDR, VringAddr(0, 0, 0x1000, 0x3000, 0x2000))),
    ("unmapped", lambda: sent(_sized(4096), F.SET_VRING_ADDR, VringAddr(0, 0, 0x7001_F000, *_REST))),
    ("unmapped", lambda: sent(ready(IOMMU, ACK), F.IOTLB_MSG, iotlb(type=2, user=0x1000))),
    ("no-table", lambda: sent(Seen().negotiate(), F.SET_VRING_ADDR, RING)),
    ("log-size", lambda: logging(0, MEMFD)),
    ("log-size", lambda: sent(logging(1, MEMFD), F.SET_VRING_ADDR, _logged(0x8000))),
    ("log-fd", lambda: logging(0x1000)),
    ("log-early", lambda: Seen().negotiate(PROTOCOL_FEATURES | LOG_ALL)),
    ("iotlb", lambda: sent(ready(IOMMU), F.IOTLB_MSG, iotlb(type=1))),
    ("iotlb", lambda: sent(ready(IOMMU), F.IOTLB_MSG, iotlb(type=2, perm=4))),
    ("iotlb", lambda: asked(channel(ready(IOMMU)), B.BACKEND_IOTLB_MSG, iotlb(type=2))),
    ("inflight", lambda: ask(ready(), F.GET_INFLIGHT_FD, p.Inflight(0, 0, 1, 4), p.Inflight(64, 0, 1, 4))),
    ("inflight", lambda: sent(ready(), F.SET_INFLIGHT_FD, p.Inflight(0, 0, 1, 4), MEMFD)),
    ("ring-index", lambda: sent(counted(2), F.SET_VRING_NUM, VringState(2, 4))),
    ("ring-index", lambda: sent(counted(2, PAIRS), F.SET_VRING_NUM, VringState(5, 4))),
    ("ring-pairs", lambda: sent(counted(2, PAIRS), F.SET_VRING_NUM, VringState(4, 4))),
    ("ring-size", lambda: sent(ready(), F.SET_VRING_NUM, VringState(0, 0))),
    ("ring-size", lambda: sent(ready(), F.SET_VRING_NUM, VringState(0, 100))),
    ("ring-size", lambda: sent(ready(PACKED), F.SET_VRING_NUM, VringState(0, 32769))),
    ("ring-align", lambda: sent(ready(), F.SET_VRING_ADDR, VringAddr(0, 0, 0x7000_0008, *_REST))),
    ("ring-align", lambda: sent(ready(PACKED), F.SET_VRING_ADDR, VringAddr(0, 0, 0x7000_0000, *_ODD))),
    ("ring-runs", lambda: sent(running(), F.SET_VRING_NUM, VringState(0, 128))),
    ("ring-runs", lambda: sent(running(), F.SET_VRING_BASE, VringState(0, 1))),
    ("ring-runs", lambda: sent(running(), F.SET_VRING_ADDR, VringAddr(0, 0, 0x7000_4000, *_REST))),
    ("ring-runs", lambda: sent(running(), F.SET_INFLIGHT_FD, p.Inflight(64, 0, 1, 4), MEMFD)),
    ("ring-early", lambda: sent(ready(), F.SET_VRING_KICK, VringFd(0), EVENTFD)),
    ("ring-base", lambda: sent(ready(), F.SET_VRING_BASE, VringState(0, 0x10000))),
    ("ring-base", lambda: ask(ready(), F.GET_VRING_BASE, VringState(0), VringState(0, 1 << 31))),
    ("ring-half", lambda: sent(ready(PACKED), F.SET_VRING_BASE, VringState(0, 0x8000))),
    ("reserved", lambda: sent(ready(), F.GET_VRING_BASE, VringState(0, 7))),
    ("reserved", lambda: sent(ready(), F.VRING_KICK, VringState(0, 1))),
    ("reserved", lambda: sent(ready(), F.SET_VRING_ADDR, _logged(0, flags=3))),
    ("reserved", lambda: asked(channel(running()), B.BACKEND_VRING_CALL, VringState(0, 1))),
    ("reserved", lambda: asked(channel(running()), B.BACKEND_VRING_ERR, VringState(0, 1))),
    ("enable", lambda: sent(ready(), F.SET_VRING_ENABLE, VringState(0, 2))),
    ("endian", lambda: sent(ready(), F.SET_VRING_ENDIAN, VringState(0, 2))),
    ("index-reply", lambda: ask(ready(), F.GET_VRING_BASE, VringState(0), VringState(1))),
    ("config-size", lambda: _config(8, 4)),
    ("config-flags", lambda: sent(ready(), F.SET_CONFIG, p.Config(0, 1, 2, b"x"))),
    ("status", lambda: sent(ready(), F.SET_STATUS, U64(0x100))),
    ("status", lambda: ask(ready(), F.GET_STATUS, p.EMPTY, U64(0x100))),
    ("postcopy", lambda: sent(ready(), F.POSTCOPY_LISTEN)),
    ("postcopy", lambda: sent(ready(), F.POSTCOPY_END)),
    ("postcopy-slots", lambda: sent(ready(), F.POSTCOPY_ADVISE)),
    ("state-phase", lambda: sent(ready(), F.SET_DEVICE_STATE_FD, p.DeviceState(2, 0), PIPE)),
    ("state-phase", lambda: sent(ready(), F.SET_DEVICE_STATE_FD, p.DeviceState(0, 1), PIPE)),
    ("state-running", lambda: sent(running(), F.SET_DEVICE_STATE_FD, p.DeviceState(0, 0), PIPE)),
    ("state-reply", lambda: ask(ready(), F.SET_DEVICE_STATE_FD, p.DeviceState(0, 0), U64(1), PIPE)),
    ("state-check", lambda: sent(ready(), F.CHECK_DEVICE_STATE)),
    ("shmem-range", lambda: shmem((0, 0x8000, 0x9000))),
    ("shmem-range", lambda: shmem((1, 0, 0x1000))),
    ("shmem-overlap", lambda: shmem((0, 0, 0x2000), (0, 0x1000, 0x1000))),
    (
        "shmem-overlap",
        lambda: asked(shmem((0, 0, 0x2000)), B.BACKEND_SHMEM_UNMAP, p.MMap(0, 0, 0, 0x1000, 0)),
    ),
    ("send-fd", lambda: asked(channel(Seen().negotiate(protocol=ACK)), B.BACKEND_SHMEM_MAP, _MAP, MEMFD)),
    ("send-fd", lambda: asked(shmem(), B.BACKEND_SHMEM_MAP, _MAP, *[MEMFD] * 9)),
    ("suspended", lambda: asked(channel(_stopped()), B.BACKEND_CONFIG_CHANGE_MSG)),
]
# Told elsewhere: by the relay, or after thousands of messages (test_tracer.py).
ELSEWHERE = {"undelivered", "backlog"}

_REST = (0x7000_2000, 0x7000_1000)
_ODD = (0x7000_2000, 0x7000_1002)
_MAP = p.MMap(0, 0, 0, 0x1000, 1)


def _long_table() -> p.Opaque:
    """Nine regions, which we would not send."""
    return p.Opaque((9).to_bytes(8, "little") + b"".join(region.pack() for region in LONG))


def _slots(limit: int) -> Seen:
    seen = ask(Seen().negotiate(protocol=SLOTS), F.GET_MAX_MEM_SLOTS, p.EMPTY, U64(limit))
    for region in (REGION, NEXT):
        sent(seen, F.ADD_MEM_REG, p.SingleRegion(region), MEMFD)
    return seen


def _sized(num: int) -> Seen:
    return sent(ready(), F.SET_VRING_NUM, VringState(0, num))


def _logged(log: int, flags: int = 1) -> VringAddr:
    return VringAddr(0, flags, 0x7000_0000, *_REST, log)


def _config(asked_for: int, got: int) -> Seen:
    config = p.Config(0, got, 0, bytes(got))
    return ask(ready(), F.GET_CONFIG, p.Config(0, asked_for, 0, bytes(asked_for)), config)


def _stopped() -> Seen:
    return ask(running(), F.GET_VRING_BASE, VringState(0), VringState(0, 1))


KEPT: list[tuple[str, Callable[[], Seen]]] = [
    ("a session", running),
    ("a session, packed", lambda: running(PACKED)),
    ("stopped and started", lambda: sent(_stopped(), F.SET_VRING_NUM, VringState(0, 64))),
    ("the log's flag on the fly", lambda: sent(running(), F.SET_VRING_ADDR, _logged(0))),
    ("logging", lambda: sent(logging(4096, MEMFD), F.SET_FEATURES, U64(PROTOCOL_FEATURES | LOG_ALL))),
    ("a log just large enough", lambda: logging(4, MEMFD)),
    ("pairs", lambda: sent(counted(2, PAIRS), F.SET_VRING_NUM, VringState(1, 4))),
    (
        "enabled before SET_FEATURES",
        lambda: sent(sent(Seen(), F.SET_OWNER), F.SET_VRING_ENABLE, VringState(0, 1)),
    ),
    ("packed base", lambda: sent(ready(PACKED), F.SET_VRING_BASE, VringState(0, 0x80008000))),
    ("config refused", lambda: _config(8, 0)),
    ("config as asked for", lambda: _config(8, 8)),
    ("enough slots", lambda: _slots(2)),
    ("no slots left, one taken out", lambda: sent(_slots(2), F.REM_MEM_REG, p.SingleRegion(NEXT))),
    ("addresses of the IOTLB", lambda: sent(ready(IOMMU), F.SET_VRING_ADDR, VringAddr(0, 0, 16, 32, 48))),
    ("a mapping", lambda: sent(ready(IOMMU), F.IOTLB_MSG, iotlb(type=2))),
    (
        "a ring across two regions",
        lambda: sent(ready(), F.SET_VRING_ADDR, VringAddr(0, 0, 0x7000_FFF0, *_REST)),
    ),
    ("maps side by side", lambda: shmem((0, 0, 0x8000), (0, 0x8000, 0x8000))),
    ("a map and its end", lambda: asked(shmem((0, 0, 0x1000)), B.BACKEND_SHMEM_UNMAP, _MAP)),
    ("postcopy", lambda: _postcopy()),
    ("guest addresses for both", lambda: _gpa(p.MemoryRegion(0x1000, 0x1000, 0x1000))),
    ("no descriptor in flight", lambda: ask(ready(), F.GET_INFLIGHT_FD, _NONE, _NONE)),
    ("a pipe of the back-end's", lambda: ask(ready(), F.SET_DEVICE_STATE_FD, p.DeviceState(0), U64(0), PIPE)),
    ("no polling", lambda: sent(_sized(4), F.SET_VRING_CALL, VringFd(0, nofd=True))),
    ("REPLY_ACK takes effect with the message that sets it", lambda: _first_ack()),
]
_NONE = p.Inflight(0, 0, 0, 0)


def _gpa(region: p.MemoryRegion) -> Seen:
    seen = Seen().negotiate(protocol=int(ProtocolF.GPA_ADDRESSES | ProtocolF.REPLY_ACK))
    return sent(seen, F.SET_MEM_TABLE, p.MemTable((region,)), MEMFD)


def _postcopy() -> Seen:
    """With the front-end's word that it knows the addresses, which is no table."""
    seen = ready(protocol=USUAL_PROTOCOL & ~int(ProtocolF.CONFIGURE_MEM_SLOTS))
    seen.front(F.POSTCOPY_ADVISE)
    seen.back(F.POSTCOPY_ADVISE, p.EMPTY, [FdInfo("userfaultfd")])
    seen.front(F.POSTCOPY_LISTEN)
    seen.front(F.SET_MEM_TABLE, p.MemTable((REGION,)), [MEMFD])
    seen.back(F.SET_MEM_TABLE, p.MemTable((REGION,)))
    event = seen.front(F.SET_MEM_TABLE, U64(0))
    assert event.text == "SET_MEM_TABLE value=0x0"
    return ask(seen, F.POSTCOPY_END, p.EMPTY, U64(0))


def _first_ack() -> Seen:
    seen = ask(Seen(), F.GET_FEATURES, p.EMPTY, U64(ALL_FEATURES))
    ask(seen, F.GET_PROTOCOL_FEATURES, p.EMPTY, U64(ALL_PROTOCOL))
    seen.front(F.SET_PROTOCOL_FEATURES, U64(ACK), need_reply=True)
    seen.back(F.SET_PROTOCOL_FEATURES, U64(0))
    return seen


@pytest.mark.parametrize("rule, case", BROKEN, ids=[f"{rule}-{at}" for at, (rule, _) in enumerate(BROKEN)])
def test_broken(rule: str, case: Callable[[], Seen]) -> None:
    seen = case()
    assert rule in seen.rules(), seen.text()
    found = [finding for event in seen.events for finding in event.findings if finding.rule.name == rule]
    assert all(finding.section and finding.text for finding in found)
    assert f"; {rule}]" in seen.text()


@pytest.mark.parametrize("case", [case for _, case in KEPT], ids=[name for name, _ in KEPT])
def test_kept(case: Callable[[], Seen]) -> None:
    seen = case()
    assert seen.rules() == [], seen.text()


def test_every_rule_is_tried() -> None:
    assert {rule for rule, _ in BROKEN} | ELSEWHERE == set(RULES)


def test_a_finding_is_told_with_the_message_that_it_is_about() -> None:
    seen = running()
    event = seen.front(F.SET_VRING_NUM, VringState(0, 100))
    assert [finding.rule.name for finding in event.findings] == ["ring-size", "ring-runs"]
    assert event.violations == event.notes == 1
    assert not seen.front(F.SET_VRING_ENABLE, VringState(0, 1)).findings


def test_rings_that_cannot_be_are_not_remembered() -> None:
    seen = ready()
    for index in range(0, 1 << 32, 1 << 20):
        seen.front(F.SET_VRING_NUM, VringState(index, 4))
    (linter,) = seen.tracer._linters.values()
    assert len(linter.state.rings) == 1


def test_socket_is_known() -> None:
    assert sent(ready(), F.SET_BACKEND_REQ_FD, p.EMPTY, SOCKET).rules() == []
