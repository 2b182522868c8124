# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Rules: the memory table, as a whole and region by region."""

from __future__ import annotations

import struct

from vhost.check.peer import FrontendMsg as F
from vhost.check.peer import Peer, memfd
from vhost.check.rig import GUEST_ADDR, describe, rig_for, running
from vhost.check.rule import Failed, Severity, Skipped, expect, prerequisite, rule
from vhost.check.target import Target
from vhost.features import ProtocolF
from vhost.user.payloads import MemoryRegion, MemTable, SingleRegion

TABLE = "Front-end message types, SET_MEM_TABLE"
ADD = "Front-end message types, ADD_MEM_REG"
REM = "Front-end message types, REM_MEM_REG"
ACCESS = "Memory access"
PAGE = 4096
SIZE = 16 * PAGE
_SLOTS = ProtocolF.CONFIGURE_MEM_SLOTS
_ACK = ProtocolF.REPLY_ACK
MOST_SLOTS = 32
"""How many slots are filled at most."""


def _regions(target: Target, count: int) -> tuple[list[MemoryRegion], list[int]]:
    """Regions apart from each other, and their files."""
    regions = [
        MemoryRegion(0x1000_0000 * (i + 1), SIZE, 0x7000_0000_0000 + 0x1000_0000 * i) for i in range(count)
    ]
    return regions, [target.keep(memfd(SIZE)) for _ in regions]


def _table(*regions: MemoryRegion, count: int | None = None) -> bytes:
    """A table whose count need not be true."""
    head = struct.pack("=II", len(regions) if count is None else count, 0)
    return head + b"".join(region.pack() for region in regions)


@rule("memory.table", "A table of one region is accepted", section=TABLE)
def one(target: Target) -> None:
    regions, fds = _regions(target, 1)
    target.session().do(F.SET_MEM_TABLE, MemTable(tuple(regions)), fds)


@rule("memory.eight", "A table of eight regions is accepted", section=TABLE)
def eight(target: Target) -> None:
    regions, fds = _regions(target, 8)
    target.session().do(F.SET_MEM_TABLE, MemTable(tuple(regions)), fds)


@rule("memory.replace", "A table replaces the one before it", section=TABLE)
def replace(target: Target) -> None:
    peer = target.session()
    for count in (3, 1, 8, 1):
        regions, fds = _regions(target, count)
        peer.do(F.SET_MEM_TABLE, MemTable(tuple(regions)), fds)


@rule("memory.order", "The regions of a table may come in any order", section=TABLE)
def order(target: Target) -> None:
    regions, fds = _regions(target, 3)
    target.session().do(F.SET_MEM_TABLE, MemTable(tuple(reversed(regions))), fds[::-1])


@rule(
    "memory.offset",
    "A region may begin inside its file (mmap offset)",
    section="Memory region description",
    device="any",
)
def offset(target: Target) -> None:
    rig = rig_for(target, skip=4 * PAGE)
    rig.start()
    rig.complete()


@rule(
    "memory.addresses",
    "Rings are placed by user addresses, buffers by guest addresses",
    section=ACCESS,
    device="any",
)
def addresses(target: Target) -> None:
    rig = rig_for(target)
    expect(rig.region.user_addr != rig.region.guest_addr, "the rig's addresses are the same")
    rig.start()
    rig.complete()


@rule(
    "memory.on-the-fly", "The table can be sent again while a ring runs", section="Ring states", device="any"
)
def on_the_fly(target: Target) -> None:
    rig = running(target)
    rig.share()
    rig.complete()
    extra = MemoryRegion(2 * GUEST_ADDR, SIZE, 0x7000_0000_0000)
    table = MemTable((describe(rig.region), extra))
    rig.peer.do(F.SET_MEM_TABLE, table, [rig.file.fd, target.keep(memfd(SIZE))])
    rig.complete()


@rule(
    "memory.fewer-fds", "A table with fewer descriptors than regions is refused", section=TABLE, protocol=_ACK
)
def fewer_fds(target: Target) -> None:
    regions, fds = _regions(target, 2)
    target.session().must_refuse(
        F.SET_MEM_TABLE, "two regions came with one descriptor", MemTable(tuple(regions)), fds[:1]
    )


@rule(
    "memory.more-fds",
    "A table with more descriptors than regions is refused",
    section=TABLE,
    severity=Severity.SHOULD,
    protocol=_ACK,
)
def more_fds(target: Target) -> None:
    regions, fds = _regions(target, 2)
    target.session().must_refuse(
        F.SET_MEM_TABLE, "one region came with two descriptors", MemTable(tuple(regions[:1])), fds
    )


@rule(
    "memory.count",
    "A number of regions that does not fit the message is refused",
    section="Multiple Memory regions description",
    protocol=_ACK,
)
def count(target: Target) -> None:
    regions, fds = _regions(target, 1)
    for claimed in (2, 33, 0xFFFFFFFF):
        target.session().must_refuse(
            F.SET_MEM_TABLE, f"one region was sent, {claimed} claimed", _table(*regions, count=claimed), fds
        )


@rule("memory.none", "A table of no regions does no harm", section=TABLE, severity=Severity.ROBUST)
def none(target: Target) -> None:
    target.session().survive(F.SET_MEM_TABLE, _table())


@rule(
    "memory.zero-size", "A region of no bytes is refused or harmless", section=TABLE, severity=Severity.ROBUST
)
def zero_size(target: Target) -> None:
    fd = target.keep(memfd(SIZE))
    target.session().survive(F.SET_MEM_TABLE, _table(MemoryRegion(0x1000, 0, 0x7000_0000_0000)), [fd])


@rule(
    "memory.huge",
    "A region whose end is beyond 64 bits is refused",
    section=TABLE,
    severity=Severity.SHOULD,
    protocol=_ACK,
)
def huge(target: Target) -> None:
    fd = target.keep(memfd(SIZE))
    region = MemoryRegion(0xFFFF_FFFF_FFFF_0000, 0x20000, 0x7000_0000_0000)
    target.session().must_refuse(F.SET_MEM_TABLE, "its end wraps around", _table(region), [fd])


@rule(
    "memory.mmap-offset-huge",
    "An mmap offset that with the size is beyond 64 bits is refused",
    section=TABLE,
    severity=Severity.SHOULD,
    protocol=_ACK,
)
def mmap_offset_huge(target: Target) -> None:
    fd = target.keep(memfd(SIZE))
    region = MemoryRegion(0x1000_0000, SIZE, 0x7000_0000_0000, 0xFFFF_FFFF_FFFF_F000)
    target.session().must_refuse(F.SET_MEM_TABLE, "its place in the file wraps around", _table(region), [fd])


@rule(
    "memory.beyond-file",
    "A region that is larger than its file does no harm",
    section=TABLE,
    severity=Severity.ROBUST,
)
def beyond_file(target: Target) -> None:
    fd = target.keep(memfd(PAGE))
    target.session().survive(F.SET_MEM_TABLE, _table(MemoryRegion(0x1000_0000, SIZE, 0x7000_0000_0000)), [fd])


@rule(
    "memory.overlap", "Regions that overlap are refused or harmless", section=TABLE, severity=Severity.ROBUST
)
def overlap(target: Target) -> None:
    regions, fds = _regions(target, 1)
    target.session().survive(F.SET_MEM_TABLE, _table(regions[0], regions[0]), [fds[0], fds[0]])


@rule("memory.no-memory", "A descriptor that cannot be mapped is refused", section=TABLE, protocol=_ACK)
def no_memory(target: Target) -> None:
    regions, _ = _regions(target, 1)
    target.session().must_refuse(
        F.SET_MEM_TABLE, "an eventfd cannot be mapped", MemTable(tuple(regions)), [target.eventfd()]
    )


# -- region by region ------------------------------------------------------------------------------


def _slots(target: Target) -> Peer:
    return target.session(protocol=int(_SLOTS))


@rule(
    "slots.number",
    "GET_MAX_MEM_SLOTS says that there is room for at least one region",
    section="Front-end message types, GET_MAX_MEM_SLOTS",
    protocol=_SLOTS,
)
def number(target: Target) -> None:
    peer = _slots(target)
    first, second = (peer.ask(F.GET_MAX_MEM_SLOTS).u64 for _ in range(2))
    expect(1 <= first < 1 << 32, f"{first} slots")
    expect(first == second, f"{first} slots, then {second}")


@rule("slots.add", "A region can be added", section=ADD, protocol=_SLOTS)
def add(target: Target) -> None:
    regions, fds = _regions(target, 1)
    _slots(target).do(F.ADD_MEM_REG, SingleRegion(regions[0]), fds)


@rule("slots.remove", "A region that was added can be removed, and added again", section=REM, protocol=_SLOTS)
def remove(target: Target) -> None:
    regions, fds = _regions(target, 1)
    peer = _slots(target)
    for _ in range(3):
        with prerequisite("ADD_MEM_REG"):
            peer.do(F.ADD_MEM_REG, SingleRegion(regions[0]), fds)
        peer.do(F.REM_MEM_REG, SingleRegion(regions[0]))


@rule("slots.all", "As many regions as there are slots can be added", section=ADD, protocol=_SLOTS)
def all_slots(target: Target) -> None:
    peer = _slots(target)
    with prerequisite("GET_MAX_MEM_SLOTS"):
        slots = peer.ask(F.GET_MAX_MEM_SLOTS).u64
    regions, fds = _regions(target, min(slots, MOST_SLOTS))
    for place, (region, fd) in enumerate(zip(regions, fds, strict=True)):
        try:
            peer.do(F.ADD_MEM_REG, SingleRegion(region), [fd])
        except Failed as error:
            raise Failed(f"region {place} of {slots}: {error}") from None


@rule(
    "slots.ring",
    "A device runs on memory that was added by ADD_MEM_REG",
    section=ADD,
    protocol=_SLOTS,
    device="any",
)
def slots_ring(target: Target) -> None:
    rig = rig_for(target, protocol=int(_SLOTS))
    rig.start()
    rig.complete()


@rule(
    "slots.on-the-fly",
    "A region can be added and removed while a ring runs",
    section=ADD,
    protocol=_SLOTS,
    device="any",
)
def slots_on_the_fly(target: Target) -> None:
    rig = running(target, protocol=int(_SLOTS))
    regions, fds = _regions(target, 1)
    rig.peer.do(F.ADD_MEM_REG, SingleRegion(regions[0]), fds)
    rig.complete()
    rig.peer.do(F.REM_MEM_REG, SingleRegion(regions[0]))
    rig.complete()


@rule(
    "slots.use-added",
    "A region that was added while a ring runs can be used at once",
    section=ADD,
    protocol=_SLOTS,
    device="any",
)
def use_added(target: Target) -> None:
    rig = rig_for(target, protocol=int(_SLOTS), hold_back=SIZE)
    with prerequisite("a ring cannot be started"):
        rig.start()
        rig.complete()
    rig.grow()
    rig.complete()


@rule(
    "slots.remove-unknown",
    "The removal of a region that is not there is refused",
    section=REM,
    protocol=_SLOTS | _ACK,
)
def remove_unknown(target: Target) -> None:
    regions, fds = _regions(target, 2)
    peer = _slots(target)
    with prerequisite("ADD_MEM_REG"):
        peer.do(F.ADD_MEM_REG, SingleRegion(regions[0]), fds[:1])
    peer.must_refuse(F.REM_MEM_REG, "there is no such region", SingleRegion(regions[1]))


@rule("slots.remove-by-size", "A region is identified by its size too", section=REM, protocol=_SLOTS | _ACK)
def remove_by_size(target: Target) -> None:
    regions, fds = _regions(target, 1)
    peer = _slots(target)
    with prerequisite("ADD_MEM_REG"):
        peer.do(F.ADD_MEM_REG, SingleRegion(regions[0]), fds)
    other = MemoryRegion(regions[0].guest_addr, SIZE // 2, regions[0].user_addr)
    peer.must_refuse(F.REM_MEM_REG, "the region has another size", SingleRegion(other))


@rule(
    "slots.remove-offset",
    "The mmap offset of the region to be removed is ignored",
    section=REM,
    protocol=_SLOTS,
)
def remove_offset(target: Target) -> None:
    regions, fds = _regions(target, 1)
    peer = _slots(target)
    with prerequisite("ADD_MEM_REG"):
        peer.do(F.ADD_MEM_REG, SingleRegion(regions[0]), fds)
    region = regions[0]
    peer.do(F.REM_MEM_REG, SingleRegion(MemoryRegion(region.guest_addr, SIZE, region.user_addr, 0xABC000)))


@rule("slots.remove-fd", "A descriptor that comes with REM_MEM_REG is closed", section=REM, protocol=_SLOTS)
def remove_fd(target: Target) -> None:
    regions, fds = _regions(target, 1)
    peer = _slots(target)
    with prerequisite("ADD_MEM_REG and REM_MEM_REG"):
        peer.do(F.ADD_MEM_REG, SingleRegion(regions[0]), fds)
        peer.do(F.REM_MEM_REG, SingleRegion(regions[0]))
    before = target.open_fds()
    for _ in range(4):
        peer.do(F.ADD_MEM_REG, SingleRegion(regions[0]), fds)
        if not peer.acks:
            raise Skipped("without REPLY_ACK it cannot be seen whether it is refused")
        if peer.refusal(F.REM_MEM_REG, SingleRegion(regions[0]), fds):
            return  # it may refuse
    after = target.open_fds()
    expect(after <= before + 1, f"{before} descriptors are open before, {after} after 4 rounds")


@rule(
    "slots.add-without-fd", "ADD_MEM_REG without a descriptor is refused", section=ADD, protocol=_SLOTS | _ACK
)
def add_without_fd(target: Target) -> None:
    regions, _ = _regions(target, 1)
    _slots(target).must_refuse(F.ADD_MEM_REG, "no descriptor came with it", SingleRegion(regions[0]))


@rule(
    "slots.add-two-fds",
    "ADD_MEM_REG with two descriptors is refused",
    section=ADD,
    severity=Severity.SHOULD,
    protocol=_SLOTS | _ACK,
)
def add_two_fds(target: Target) -> None:
    regions, fds = _regions(target, 2)
    _slots(target).must_refuse(F.ADD_MEM_REG, "two descriptors came with it", SingleRegion(regions[0]), fds)


@rule(
    "slots.add-again",
    "A region that is there already is refused or harmless",
    section=ADD,
    severity=Severity.ROBUST,
    protocol=_SLOTS,
)
def add_again(target: Target) -> None:
    regions, fds = _regions(target, 1)
    peer = _slots(target)
    with prerequisite("ADD_MEM_REG"):
        peer.do(F.ADD_MEM_REG, SingleRegion(regions[0]), fds)
    peer.survive(F.ADD_MEM_REG, SingleRegion(regions[0]), fds)


@rule(
    "slots.zero-size",
    "A region of no bytes is refused or harmless",
    section=ADD,
    severity=Severity.ROBUST,
    protocol=_SLOTS,
)
def slots_zero_size(target: Target) -> None:
    fd = target.keep(memfd(SIZE))
    _slots(target).survive(F.ADD_MEM_REG, SingleRegion(MemoryRegion(0x1000, 0, 0x7000_0000_0000)), [fd])
