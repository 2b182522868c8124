# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Rules: tracking of requests in flight."""

from __future__ import annotations

import os
import struct

from vhost.check.peer import FrontendMsg as F
from vhost.check.peer import Peer, memfd
from vhost.check.rig import NUM, Rig, rig_for
from vhost.check.rule import Failed, Severity, Skipped, expect, prerequisite, rule
from vhost.check.target import Target
from vhost.features import ProtocolF
from vhost.memory import Region
from vhost.user.payloads import Inflight

SECTION = "Inflight I/O tracking"
GET = "Front-end message types, GET_INFLIGHT_FD"
SET = "Front-end message types, SET_INFLIGHT_FD"
_SHMFD = ProtocolF.INFLIGHT_SHMFD
_HEAD = struct.Struct("=QHHHH")
"""QueueRegionSplit: features, version, desc_num, last_batch_head, used_idx."""
_DESC = struct.Struct("=B5xHQ")
"""DescStateSplit: inflight, next, counter."""


def _get(peer: Peer, queues: int = 1) -> tuple[Inflight, int]:
    """The buffer: its description and its descriptor, which the connection closes."""
    got = peer.ask(F.GET_INFLIGHT_FD, Inflight(0, 0, queues, NUM))
    expect(
        len(got.payload) in (20, 24),
        f"GET_INFLIGHT_FD: a payload of {len(got.payload)} bytes, must be 20 or 24",
    )
    told = Inflight.unpack(got.payload)
    if told.mmap_size == 0:
        raise Skipped("GET_INFLIGHT_FD gives no buffer: size 0")
    expect(
        len(got.fds) == 1,
        f"GET_INFLIGHT_FD: {len(got.fds)} descriptors with a buffer of {told.mmap_size} bytes",
    )
    return told, got.fds[0]


def _session(target: Target) -> Peer:
    return target.session(protocol=int(_SHMFD))


@rule(
    "inflight.get",
    "GET_INFLIGHT_FD gives a buffer with its descriptor, or none",
    section=GET,
    protocol=_SHMFD,
)
def get(target: Target) -> None:
    _get(_session(target))


@rule("inflight.size", "The buffer has room for all queues", section=SECTION, protocol=_SHMFD)
def size(target: Target) -> None:
    queues = max(1, min(target.queues, 4))
    told, fd = _get(_session(target), queues)
    least = queues * (_HEAD.size + NUM * _DESC.size)
    expect(
        told.mmap_size >= least, f"{told.mmap_size} bytes for {queues} queues of {NUM}, {least} are needed"
    )
    length = os.fstat(fd).st_size
    expect(
        length >= told.mmap_offset + told.mmap_size,
        f"the file has {length} bytes, the buffer is {told.mmap_size} at {told.mmap_offset}",
    )


@rule(
    "inflight.fresh", "A new buffer tracks nothing: no entry is in flight", section=SECTION, protocol=_SHMFD
)
def fresh(target: Target) -> None:
    told, fd = _get(_session(target))
    _expect_nothing_in_flight(_read(told, fd))


def _read(told: Inflight, fd: int) -> bytes:
    data = bytearray()
    while len(data) < told.mmap_size:
        part = os.pread(fd, told.mmap_size - len(data), told.mmap_offset + len(data))
        if not part:
            raise Failed(f"the file ends after {told.mmap_offset + len(data)} bytes")
        data += part
    return bytes(data)


def _entries(region: bytes) -> list[tuple[int, int, int]]:
    return [_DESC.unpack_from(region, _HEAD.size + i * _DESC.size) for i in range(NUM)]


def _expect_nothing_in_flight(region: bytes) -> None:
    flying = [i for i, (inflight, _, _) in enumerate(_entries(region)) if inflight]
    expect(not flying, f"entries {flying} are marked")


@rule("inflight.again", "GET_INFLIGHT_FD can be repeated", section=GET, protocol=_SHMFD)
def again(target: Target) -> None:
    peer = _session(target)
    sizes = {_get(peer)[0].mmap_size for _ in range(4)}
    expect(len(sizes) == 1, f"sizes {sizes} for the same request")


@rule(
    "inflight.set",
    "SET_INFLIGHT_FD accepts the buffer that GET_INFLIGHT_FD gave",
    section=SET,
    protocol=_SHMFD,
)
def set_(target: Target) -> None:
    peer = _session(target)
    told, fd = _get(peer)
    peer.do(F.SET_INFLIGHT_FD, told, [fd])


@rule("inflight.set-other-session", "Another session accepts it too", section=SET, protocol=_SHMFD)
def set_other(target: Target) -> None:
    first = _session(target)
    told, fd = _get(first)
    kept = target.keep(os.dup(fd))
    target.hang_up(first)
    _session(target).do(F.SET_INFLIGHT_FD, told, [kept])


@rule(
    "inflight.set-without-fd",
    "SET_INFLIGHT_FD without a descriptor is refused",
    section=SET,
    protocol=_SHMFD | ProtocolF.REPLY_ACK,
)
def without_fd(target: Target) -> None:
    peer = _session(target)
    told, _ = _get(peer)
    peer.must_refuse(F.SET_INFLIGHT_FD, "no descriptor came with it", told)


@rule(
    "inflight.too-small",
    "A buffer that is too small for its queues is refused",
    section=SET,
    severity=Severity.SHOULD,
    protocol=_SHMFD | ProtocolF.REPLY_ACK,
)
def too_small(target: Target) -> None:
    fd = target.keep(memfd(64))
    _session(target).must_refuse(
        F.SET_INFLIGHT_FD, f"64 bytes cannot hold {NUM} entries", Inflight(64, 0, 1, NUM), [fd]
    )


@rule(
    "inflight.beyond-file",
    "A buffer that is larger than its file does no harm",
    section=SET,
    severity=Severity.ROBUST,
    protocol=_SHMFD,
    device="any",
)
def beyond_file(target: Target) -> None:
    rig = rig_for(target, protocol=int(_SHMFD))
    fd = target.keep(memfd(0))
    _hostile_start(rig, Inflight(4096, 0, len(rig.rings), NUM), fd)


@rule(
    "inflight.lies",
    "A buffer whose version, size and entries are nonsense does no harm",
    section=SET,
    severity=Severity.ROBUST,
    protocol=_SHMFD,
    device="any",
)
def lies(target: Target) -> None:
    for head in ((1, 0xFFFF), (0xFFFF, NUM), (1, 0)):
        rig = rig_for(target, protocol=int(_SHMFD))
        with prerequisite("GET_INFLIGHT_FD"):
            told, fd = _get(rig.peer, len(rig.rings))
        # Every entry in flight, every index beyond the ring.
        content = _HEAD.pack(0, *head, 0xFFFF, 0x7FFF) + _DESC.pack(1, 0xFFFF, 1 << 63) * NUM
        os.pwrite(fd, content, told.mmap_offset)
        _hostile_start(rig, told, fd)


def _hostile_start(rig: Rig, told: Inflight, fd: int) -> None:
    """Whatever becomes of it, the back-end has to go on serving; which is looked at next."""
    try:
        rig.peer.survive(F.SET_INFLIGHT_FD, told, [fd])
        if rig.peer.closed:
            return
        rig.start()
        rig.submit()
        rig.main.kick()
        rig.wait(timeout=rig.target.settle)
    except Failed:
        return


def _tracked(target: Target, protocol: int = 0) -> tuple[Rig, Region]:
    """A rig whose session has a buffer, mapped here too; its rings are not set up."""
    rig = rig_for(target, protocol=int(_SHMFD | protocol))
    with prerequisite("GET_INFLIGHT_FD and SET_INFLIGHT_FD"):
        told, fd = _get(rig.peer, len(rig.rings))
        length = os.fstat(fd).st_size
        expect(length >= told.mmap_offset + told.mmap_size, "the file is shorter than the buffer")
        region = Region.from_fd(fd, told.mmap_size, guest_addr=0, user_addr=0, mmap_offset=told.mmap_offset)
        rig.peer.do(F.SET_INFLIGHT_FD, told, [fd])
    return rig, region


@rule(
    "inflight.tracks",
    "After a request came back, its entry is clear and used_idx follows the used ring",
    section=SECTION,
    protocol=_SHMFD,
    device="any",
)
def tracks(target: Target) -> None:
    rig, region = _tracked(target)
    with prerequisite("a ring cannot be started"):
        rig.start()
        for _ in range(5):
            rig.complete()
        rig.peer.sync()
    at = rig.main.index * (region.size // len(rig.rings))
    data = bytes(memoryview(region))[at:]
    _, version, desc_num, _, used = _HEAD.unpack_from(data)
    expect(version == 1, f"the region's version is {version}, must be 1")
    expect(desc_num == NUM, f"desc_num is {desc_num}, the ring has {NUM}")
    expect(used == 5, f"used_idx is {used}, 5 requests came back")
    _expect_nothing_in_flight(data)


@rule(
    "inflight.resubmits",
    "A request that is marked in flight is done again, and no other",
    section=SECTION,
    protocol=_SHMFD,
    device="any",
)
def resubmits(target: Target) -> None:
    rig, region = _tracked(target)
    ring = rig.main
    if ring.queue.packed:
        raise Skipped("split rings only")
    # Two requests were made; the second came back before the first, then the back-end died.
    lost, done = rig.submit(), rig.submit()
    used = ring.addr + ring.layout.used
    rig.memory.write(used + 4, struct.pack("<II", done.head, done.used if done.used > 0 else 0))
    rig.memory.write(used + 2, struct.pack("<H", 1))
    expect(rig.wait(timeout=1) is done, "the rig's own used ring")
    at = ring.index * (region.size // len(rig.rings))
    view = memoryview(region)[at:]
    view[: _HEAD.size] = _HEAD.pack(0, 1, NUM, done.head, 1)
    for head in range(NUM):
        offset = _HEAD.size + head * _DESC.size
        view[offset : offset + _DESC.size] = _DESC.pack(
            int(head == lost.head), 0, 1 if head == lost.head else 0
        )
    with prerequisite("a ring cannot be set up"):
        rig.share()
        for other in rig.rings:
            # What QEMU says after a crash: where the used ring is.
            rig.place(other, 1 if other is ring else None)
            rig.give_call(other)
            rig.give_kick(other)
            rig.enable(other)
            other.kick()
    rig.finish(lost)
    expect(rig.wait(timeout=target.settle) is None, "a request came back that was done before the crash")
    rig.complete()


@rule(
    "inflight.skip-drain",
    "A ring that GET_VRING_BASE_SKIP_DRAIN stopped is not processed, and goes on where it was",
    section="Front-end message types, GET_VRING_BASE_SKIP_DRAIN",
    protocol=_SHMFD | ProtocolF.GET_VRING_BASE_INFLIGHT | ProtocolF.GET_VRING_BASE_SKIP_DRAIN,
    device="any",
)
def skip_drain(target: Target) -> None:
    rig, _ = _tracked(target, ProtocolF.GET_VRING_BASE_INFLIGHT | ProtocolF.GET_VRING_BASE_SKIP_DRAIN)
    with prerequisite("a ring cannot be started"):
        rig.start()
        rig.complete()
    base = rig.stop(rig.main, F.GET_VRING_BASE_SKIP_DRAIN)
    expect(base == 1, f"one request came back, and the ring stands at {base}")
    sent = rig.submit()
    rig.main.kick()
    expect(rig.idle(), "a request was processed after the ring was stopped")
    rig.place(rig.main, base)
    rig.give_call(rig.main)
    rig.give_kick(rig.main)
    rig.enable(rig.main)
    rig.main.kick()
    rig.finish(sent)
