# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Rules: the rings at work, with each of their features, and rings that a driver has broken."""

from __future__ import annotations

import contextlib
import struct

from vhost.check.peer import FrontendMsg as F
from vhost.check.rig import Rig, running
from vhost.check.rule import Failed, PeerClosed, Severity, Skipped, expect, rule
from vhost.check.target import VERSION_1, Target
from vhost.check.work import Work, blk_read, blk_request
from vhost.features import BlkF, VirtioF
from vhost.virtio_blk import ID_BYTES, SECTOR, BlkStatus, BlkType

PACKED = int(VirtioF.RING_PACKED)
INDIRECT = int(VirtioF.RING_INDIRECT_DESC)
EVENT_IDX = int(VirtioF.RING_EVENT_IDX)
BLK = "VIRTIO 5.2.6"
_DESC = struct.Struct("<QIHH")
NEXT, WRITE = 1, 2


def many(target: Target, features: int) -> None:
    """Rings that wrap several times, with one request in flight and with several."""
    rig = running(target, features=VERSION_1 | features)
    ring = rig.main
    for _ in range(2 * rig.num):
        rig.complete()
    for _ in range(rig.num):
        sent = {rig.submit() for _ in range(3)}
        ring.kick()
        for _ in range(3):
            got = rig.wait()
            expect(got is not None, f"{len(sent)} requests did not come back within {target.timeout:g} s")
            expect(got in sent, "a request came back twice")
            assert got is not None
            sent.discard(got)
            got.judge()
    expect(rig.wait(timeout=0) is None, "something more came back")


for _name, _title, _bits in (
    ("split", "A split ring wraps", 0),
    ("split-indirect", "A split ring with indirect descriptors", INDIRECT),
    ("split-event-idx", "A split ring with EVENT_IDX", EVENT_IDX),
    ("split-both", "A split ring with indirect descriptors and EVENT_IDX", INDIRECT | EVENT_IDX),
    ("packed", "A packed ring wraps", PACKED),
    ("packed-indirect", "A packed ring with indirect descriptors", PACKED | INDIRECT),
    ("packed-event-idx", "A packed ring with EVENT_IDX", PACKED | EVENT_IDX),
    ("packed-both", "A packed ring with indirect descriptors and EVENT_IDX", PACKED | INDIRECT | EVENT_IDX),
):
    rule(
        f"data.{_name}",
        f"{_title}: each request comes back once, and right",
        section="VIRTIO 2.8" if _bits & PACKED else "VIRTIO 2.7",
        features=_bits,
        device="any",
        bits=_bits,
    )(lambda target, bits: many(target, bits))


@rule(
    "data.event-idx-calls",
    "With EVENT_IDX the call comes at the entry that the driver named",
    section="VIRTIO 2.7.7",
    features=EVENT_IDX,
    device="any",
)
def event_idx_calls(target: Target) -> None:
    rig = running(target, features=VERSION_1 | EVENT_IDX)
    ring = rig.main
    for _ in range(rig.num):
        while ring.queue.enable_callbacks():
            expect(rig.wait(timeout=0) is None, "something came back unasked")
        ring.called(0)
        rig.submit()
        ring.queue.kick()
        expect(ring.called(target.timeout), f"no call within {target.timeout:g} s")
        expect(rig.wait() is not None, "a call came, but no request came back")


@rule(
    "data.kick-when-wanted",
    "A device that asks for no kick finds new work by itself",
    section="VIRTIO 2.7.10",
    device="any",
)
def kick_when_wanted(target: Target) -> None:
    rig = running(target)
    for _ in range(rig.num):
        sent = rig.submit()
        rig.main.queue.kick()
        rig.finish(sent)


@rule("data.blk-read", "A block device reads its first sector", section=BLK, device="blk")
def blk_first(target: Target) -> None:
    rig = running(target)
    first = rig.complete(blk_read())
    expect(first.used == SECTOR + 1, f"used length {first.used}, must be {SECTOR + 1}")
    second = rig.complete(blk_read())
    expect(first.contents()[0] == second.contents()[0], "the same sector reads differently the second time")


@rule("data.blk-last", "A block device reads its last sector", section=BLK, device="blk")
def blk_last(target: Target) -> None:
    rig = running(target)
    rig.complete(blk_read(_capacity(target) - 1))


@rule("data.blk-beyond", "A read beyond the capacity fails with IOERR", section=BLK, device="blk")
def blk_beyond(target: Target) -> None:
    rig = running(target)
    capacity = _capacity(target)
    for sector, count in ((capacity, 1), (capacity - 1, 2), ((1 << 64) - 1, 1)):
        sent = rig.submit(blk_read(sector, count))
        rig.main.kick()
        expect(rig.wait() is sent, f"a read of sector {sector} of {capacity} did not come back")
        status = sent.contents()[-1][0]
        expect(
            status == BlkStatus.IOERR, f"a read of sector {sector} of {capacity}: status {status}, must be 1"
        )


def _capacity(target: Target) -> int:
    if target.blk is None or not target.blk.capacity:
        raise Skipped("the capacity is not known (GET_CONFIG)")
    return target.blk.capacity


@rule("data.blk-unknown", "A request of an unknown type fails with UNSUPP", section=BLK, device="blk")
def blk_unknown(target: Target) -> None:
    rig = running(target)
    sent = rig.submit(blk_request(0x7000_0000, room=SECTOR))
    rig.main.kick()
    expect(rig.wait() is sent, "it did not come back")
    status = sent.contents()[-1][0]
    expect(status == BlkStatus.UNSUPP, f"status {status}, must be 2 (UNSUPP)")


@rule(
    "data.blk-flush", "FLUSH succeeds where the feature was negotiated", section=BLK, features=0, device="blk"
)
def blk_flush(target: Target) -> None:
    if not target.offered & BlkF.FLUSH:
        raise Skipped("FLUSH is not offered")
    rig = running(target, features=VERSION_1 | int(BlkF.FLUSH))
    rig.complete(blk_request(BlkType.FLUSH))


@rule(
    "data.blk-layout",
    "Header, data and status may lie in other descriptors than usual",
    section="VIRTIO 2.7.4.1",
    device="blk",
)
def blk_layout(target: Target) -> None:
    rig = running(target)
    usual = blk_request(BlkType.GET_ID, room=ID_BYTES)
    head = usual.readable[0]
    cut = Work("GET_ID in small pieces", 0, (head[:4], head[4:10], head[10:]), (7, 13, 1), usual.judge)
    rig.complete(cut)


@rule(
    "data.blk-write",
    "What was written can be read again; the sector is restored",
    section=BLK,
    device="blk",
    writes=True,
)
def blk_write(target: Target) -> None:
    if target.offered & BlkF.RO:
        raise Skipped("the disk is read-only")
    rig = running(target)
    sector = _capacity(target) - 1
    before = rig.complete(blk_read(sector)).contents()[0]
    new = bytes(byte ^ 0x5A for byte in before)
    rig.complete(blk_request(BlkType.OUT, sector, new))
    try:
        expect(rig.complete(blk_read(sector)).contents()[0] == new, "another content was read than written")
    finally:
        rig.complete(blk_request(BlkType.OUT, sector, before))


# -- rings that a driver has broken ----------------------------------------------------------------


def _set_descriptor(rig: Rig, head: int, addr: int, size: int, flags: int, following: int) -> None:
    ring = rig.main
    where = ring.addr + ring.layout.desc + 16 * head
    rig.memory.write(where, _DESC.pack(addr, size, flags, following))


@rule(
    "data.bad-address",
    "A buffer outside the memory table does no harm",
    section="VIRTIO 2.7.5",
    severity=Severity.ROBUST,
    device="any",
)
def bad_address(target: Target) -> None:
    for addr in (0x10, 0xFFFF_FFFF_FFFF_F000, 0x7FFF_FFFF_0000):
        rig = running(target)
        sent = rig.submit()
        _set_descriptor(rig, sent.head, addr, 64, WRITE if not sent.work.readable else 0, 0)
        _survive(rig)


@rule(
    "data.loop",
    "A chain that goes round does no harm",
    section="VIRTIO 2.7.5",
    severity=Severity.ROBUST,
    device="any",
)
def loop(target: Target) -> None:
    rig = running(target)
    sent = rig.submit()
    flags = NEXT | (WRITE if not sent.work.readable else 0)
    _set_descriptor(rig, sent.head, rig.alloc(64), 64, flags, sent.head)
    _survive(rig)


@rule(
    "data.next-beyond",
    "A chain that goes on beyond the table does no harm",
    section="VIRTIO 2.7.5",
    severity=Severity.ROBUST,
    device="any",
)
def next_beyond(target: Target) -> None:
    rig = running(target)
    sent = rig.submit()
    _set_descriptor(rig, sent.head, rig.alloc(64), 64, NEXT | (0 if sent.work.readable else WRITE), 0x7FFF)
    _survive(rig)


@rule(
    "data.head-beyond",
    "An available entry beyond the table does no harm",
    section="VIRTIO 2.7.6",
    severity=Severity.ROBUST,
    device="any",
)
def head_beyond(target: Target) -> None:
    rig = running(target)
    ring = rig.main
    rig.submit()
    rig.memory.write(ring.addr + ring.layout.avail + 4, struct.pack("<H", 0x7FFF) * rig.num)
    _survive(rig)


@rule(
    "data.index-jump",
    "An available index that jumps beyond the ring's size does no harm",
    section="VIRTIO 2.7.6",
    severity=Severity.ROBUST,
    device="any",
)
def index_jump(target: Target) -> None:
    rig = running(target)
    ring = rig.main
    rig.memory.write(ring.addr + ring.layout.avail + 2, struct.pack("<H", 0x4000))
    _survive(rig)


@rule(
    "data.size-wraps",
    "A buffer whose end is beyond 64 bits does no harm",
    section="VIRTIO 2.7.5",
    severity=Severity.ROBUST,
    device="any",
)
def size_wraps(target: Target) -> None:
    rig = running(target)
    sent = rig.submit()
    _set_descriptor(
        rig, sent.head, 0xFFFF_FFFF_FFFF_FFF0, 0xFFFF_FFFF, WRITE if not sent.work.readable else 0, 0
    )
    _survive(rig)


@rule(
    "data.memory-goes",
    "Memory that is taken away under a running ring does no harm",
    section="Memory access",
    severity=Severity.ROBUST,
    device="any",
)
def memory_goes(target: Target) -> None:
    rig = running(target)
    rig.submit()
    rig.peer.survive(F.SET_MEM_TABLE, struct.pack("=II", 0, 0))
    if not rig.peer.closed:
        _survive(rig)


def _survive(rig: Rig) -> None:
    rig.main.kick()
    with contextlib.suppress(Failed):  # what comes back from a broken ring may be anything
        rig.wait(timeout=rig.target.settle)
    # The session may have ended: what counts is that a new one works, which is looked at next.
    with contextlib.suppress(PeerClosed):
        rig.peer.sync()


@rule(
    "data.broken-lives",
    "A broken ring leaves the session alive: it still answers",
    section="Communication",
    severity=Severity.SHOULD,
    device="any",
)
def broken_lives(target: Target) -> None:
    rig = running(target)
    rig.memory.write(rig.main.addr + rig.main.layout.avail + 2, struct.pack("<H", 0x4000))
    rig.main.kick()
    rig.peer.quiet(target.settle)
    rig.peer.sync()


@rule(
    "data.broken-err",
    "A broken ring signals the error descriptor",
    section="Front-end message types, SET_VRING_ERR",
    severity=Severity.SHOULD,
    device="any",
)
def broken_err(target: Target) -> None:
    rig = running(target)
    ring = rig.main
    rig.peer.do(F.SET_VRING_ERR, ring.index.to_bytes(8, "little"), [ring.err_fd])
    rig.memory.write(ring.addr + ring.layout.avail + 2, struct.pack("<H", 0x4000))
    ring.kick()
    ring.call_fd, kept = ring.err_fd, ring.call_fd
    signalled = ring.called(2 * target.settle)
    ring.call_fd = kept
    expect(signalled, "the ring is broken, and the error descriptor is silent")
