# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""DirtyLog, and what a DeviceQueue marks in one for each way in which a device can write to a chain."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from devices.disks import BASE, HANDLERS, REGION, Ring, header, how, pattern, ring
from vhost._iotlb import Iotlb
from vhost.chain import Chain
from vhost.devices.blk import Blk
from vhost.dirty_log import PAGE, DirtyLog
from vhost.errors import IncorrectFds, InvalidLogAddress, InvalidQueue, QueueBroken
from vhost.memory import GuestMemory, Region
from vhost.virtio_blk import BlkStatus, BlkType
from vhost.virtqueue import DeviceQueue, DriverQueue

FORMATS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])

# -- the log itself ------------------------------------------------------------------------------------


def test_mark_and_take() -> None:
    log = DirtyLog(130 * PAGE)
    assert log.limit == 192 * PAGE
    assert log.size == 24
    log.mark(5 * PAGE + 7, 1)
    log.mark(5 * PAGE - 1, 2)
    log.mark(64 * PAGE, 65 * PAGE)
    assert log.take() == [4 * PAGE, 5 * PAGE, *range(64 * PAGE, 129 * PAGE, PAGE)]
    assert log.take() == []
    log.mark(1 << 63, 0)
    assert log.take() == []


@pytest.mark.parametrize(
    "addr, size",
    [(192 * PAGE, 1), (191 * PAGE, PAGE + 1), ((1 << 64) - 1, 1), ((1 << 64) - 1, 2), (0, 1 << 63)],
)
def test_beyond_its_end(addr: int, size: int) -> None:
    log = DirtyLog(192 * PAGE)
    assert not log.covers(addr, size)
    with pytest.raises(InvalidLogAddress, match=f"{addr:#x}.*ends at {log.limit:#x}"):
        log.mark(addr, size)
    assert log.take() == []


@pytest.mark.parametrize("limit", [0, -1, 1 << 63])
def test_of_no_size(limit: int) -> None:
    with pytest.raises(InvalidLogAddress):
        DirtyLog(limit)


def test_of_somebody_elses(no_leaks: None) -> None:
    ours = DirtyLog(1 << 24)
    theirs = DirtyLog.from_fd(ours.region.fd, ours.size)
    theirs.mark(9 * PAGE, 1)
    assert ours.take() == [9 * PAGE]
    assert theirs.take() == []
    part = DirtyLog.from_fd(ours.region.fd, 3, offset=2)
    assert part.limit == 24 * PAGE
    part.mark(0, PAGE)
    part.mark(23 * PAGE, PAGE)
    with pytest.raises(InvalidLogAddress, match="words"):
        part.take()
    assert ours.take() == [16 * PAGE, 39 * PAGE]
    assert not part.broken


def test_of_what_is_none(tmp_path: Path, no_leaks: None) -> None:
    fd = os.memfd_create("short")
    os.ftruncate(fd, 100)
    wrong = [(0, 0), (101, 0), (8, 93), (8, 1 << 63), (1 << 64, 0), ((1 << 64) - 1, 8), (8, (1 << 64) - 8)]
    for size, offset in wrong:
        with pytest.raises(InvalidLogAddress, match="dirty log"):
            DirtyLog.from_fd(fd, size, offset=offset)
    os.close(fd)
    with pytest.raises(IncorrectFds, match="dirty log"):
        DirtyLog.from_fd(fd, 8)
    reader, writer = os.pipe()
    with pytest.raises(IncorrectFds, match=r"dirty log.s fd .* is no file"):
        DirtyLog.from_fd(reader, 8)
    os.close(reader)
    os.close(writer)


def test_covers_memory() -> None:
    memory = GuestMemory([Region.allocate(PAGE, guest_addr=64 * PAGE)])
    DirtyLog(65 * PAGE).must_cover(memory)
    with pytest.raises(InvalidLogAddress, match="ends at 0x41000"):
        DirtyLog(64 * PAGE).must_cover(memory)


# -- what a queue marks --------------------------------------------------------------------------------

RING, BUFFERS = 1 << 20, (1 << 20) + 16 * PAGE
FIRST, SECOND = BUFFERS + PAGE - 100, BUFFERS + 8 * PAGE
"""Two writable buffers of 200 bytes and of two pages."""


class Queues:
    """A driver and a device on one ring, and a log that the device is not told of yet."""

    def __init__(self, packed: bool) -> None:
        self.memory = GuestMemory([Region.allocate(64 * PAGE, guest_addr=RING)])
        place = DriverQueue.layout(8, packed=packed)
        areas = {"desc": RING + place.desc, "avail": RING + place.avail, "used": RING + place.used}
        self.driver = DriverQueue(self.memory, 8, packed=packed, **areas)
        self.device = DeviceQueue(self.memory, 8, packed=packed, **areas, name="q")
        self.log = DirtyLog.for_memory(self.memory)

    def chain(self) -> Chain:
        self.driver.add([], [(FIRST, 200), (SECOND, 2 * PAGE)], None)
        chain = self.device.pop()
        assert chain is not None
        return chain

    def take(self) -> list[int]:
        """Which pages of the buffers."""
        return [(page - BUFFERS) // PAGE for page in self.log.take() if page >= BUFFERS]


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def queues(request: pytest.FixtureRequest) -> Queues:
    return Queues(request.param)


def _views(chain: Chain) -> None:
    chain.writable[1]


def _preadv(chain: Chain) -> None:
    fd = os.memfd_create("data")
    os.pwrite(fd, b"x" * 300, 0)
    assert os.preadv(fd, chain.writable, 0) == 300
    os.close(fd)


ALL = [0, 1, 8, 9]
WAYS: dict[str, tuple[Callable[[Chain], object], int | None, list[int]]] = {
    "nothing": (lambda chain: None, 0, []),
    "write": (lambda chain: chain.write(b"x" * 50), None, [0]),
    "write across": (lambda chain: chain.write(b"x" * 201), None, [0, 1, 8]),
    "write more than is said": (lambda chain: chain.write(b"x" * 150), 1, [0, 1]),
    "said only": (lambda chain: None, 101, [0, 1]),
    "write_at": (lambda chain: chain.write_at(0, b"x"), 0, [0]),
    "a status at the end": (lambda chain: chain.write_at(chain.writable_len - 1, b"x"), 1, ALL),
    "views": (_views, 0, ALL),
    "a part": (lambda chain: chain.writable_part(0, 200), 0, [0, 1]),
    "preadv": (_preadv, 300, ALL),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_write(queues: Queues, way: str) -> None:
    write, written, pages = WAYS[way]
    for when in ("never", "before", "after", "batch", "unpop"):
        if when == "before":
            queues.device.set_log(queues.log)
        elif when == "after":
            queues.device.set_log(None)
        chain = queues.chain()
        write(chain)
        if when == "after":  # popped and written, but not given back
            queues.device.set_log(queues.log)
        assert queues.take() == []
        if when == "batch":
            queues.device.push_batch([chain], [written] if written is not None else None)
        elif when == "unpop":
            queues.device.unpop(chain)
            assert queues.take() == (pages if way != "said only" else [])
            break
        else:
            queues.device.push(chain, written)
        assert queues.take() == ([] if when == "never" else pages)
        assert queues.driver.get_used() is not None


def test_chain_objects_forget(queues: Queues) -> None:
    """They are used again, with the buffers that somebody asked an earlier one for."""
    queues.device.set_log(queues.log)
    for _ in range(10):
        chain = queues.chain()
        assert len(chain.writable) == 2
        queues.device.push(chain, 0)
        assert queues.take() == ALL
        del chain
        chain = queues.chain()
        queues.device.push(chain, 0)
        assert queues.take() == []
        del chain
        while queues.driver.get_used() is not None:
            pass


def test_memory_that_changes(queues: Queues) -> None:
    queues.device.set_log(queues.log, ring=True)
    chain = queues.chain()
    old = queues.memory.regions
    queues.device.set_memory(GuestMemory([*old, Region.allocate(PAGE, guest_addr=RING + 64 * PAGE)]))
    chain.write(b"x")
    queues.device.push(chain)
    assert queues.take() == [0]
    assert queues.device.broken is None
    assert queues.device.dirty_log is queues.log


@FORMATS
def test_memory_that_is_gone(packed: bool) -> None:
    """A chain out of a region that the guest has no more: nobody migrates it, and the ring goes on."""
    queues = Queues(packed)
    gone = Region.allocate(PAGE, guest_addr=1 << 40)
    memory = GuestMemory([*queues.memory.regions, gone])
    queues.device.set_memory(memory)
    driver_memory = memory
    place = DriverQueue.layout(8, packed=packed)
    driver = DriverQueue(
        driver_memory,
        8,
        desc=RING + place.desc,
        avail=RING + place.avail,
        used=RING + place.used,
        packed=packed,
    )
    driver.add([], [(1 << 40, 16)], None)
    chain = queues.device.pop()
    assert chain is not None
    queues.device.set_memory(queues.memory)
    queues.device.set_log(queues.log)
    queues.device.push(chain, 16)
    assert queues.log.take() == []
    assert queues.device.broken is None


def is_mapped(address: int) -> bool:
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(start, 16) <= address < int(end, 16) for start, end in ranges)


@FORMATS
def test_memory_that_the_log_does_not_cover(packed: bool) -> None:
    """The queue says so and goes on without a log, in the new memory: what is popped there keeps it."""
    user, far = 1 << 40, 1 << 41
    file = Region.allocate(64 * PAGE)

    def memory(guest: int) -> GuestMemory:
        return GuestMemory([Region.from_fd(file.fd, file.size, guest_addr=guest, user_addr=user)])

    place = DriverQueue.layout(8, packed=packed)
    offsets = {"desc": place.desc, "avail": place.avail, "used": place.used}
    areas = {area: far + offset for area, offset in offsets.items()}
    driver = DriverQueue(memory(far), 8, packed=packed, **areas)
    user_areas = {area: user + offset for area, offset in offsets.items()}
    device = DeviceQueue(memory(0), 8, packed=packed, **user_areas, user_addresses=True, name="q")
    assert device.pop() is None  # an object that is there to be used again
    device.set_log(DirtyLog(64 * PAGE), ring=True)
    moved = memory(far)
    with pytest.raises(InvalidLogAddress, match="beyond the dirty log, which ends at 0x40000"):
        device.set_memory(moved)
    assert device.memory is moved
    assert device.dirty_log is None
    driver.add([], [(far + 16 * PAGE, 16)], None)
    chain = device.pop()
    assert chain is not None
    (view,) = chain.writable
    assert view.address == moved[0].host_addr + 16 * PAGE
    address = view.address
    device.push(chain, 0)
    del moved, chain
    device.set_memory(memory(far))
    assert is_mapped(address)
    del view
    assert not is_mapped(address)


def test_logs_that_are_too_small(queues: Queues) -> None:
    small = DirtyLog(RING - PAGE)
    with pytest.raises(InvalidLogAddress, match=r"^q: .* is beyond the dirty log, which ends at 0x100000$"):
        queues.device.set_log(small, ring=True)
    assert queues.device.dirty_log is None
    with pytest.raises(InvalidLogAddress, match="its used ring at 0x100000 is beyond"):
        queues.device.set_log(small, ring=True, used=1 << 20)
    for used in (-1, 1 << 64):
        with pytest.raises(InvalidLogAddress, match="64 bits"):
            queues.device.set_log(small, ring=True, used=used)
    queues.device.set_log(small)
    chain = queues.chain()
    queues.device.push(chain, 16)
    with pytest.raises(QueueBroken, match=r"outside the dirty log .* value 0x110f9c, limit 0x100000"):
        queues.device.pop()


def test_closed_queue(queues: Queues) -> None:
    queues.device.close()
    with pytest.raises(InvalidQueue):
        queues.device.set_log(queues.log)
    with pytest.raises(InvalidQueue):
        queues.device.mark_written(RING, 1)


IOVA, SCATTERED = 1 << 32, 1 << 33


@FORMATS
def test_behind_an_iommu(packed: bool) -> None:
    """The ring and the buffers are at IOVAs; what is marked is where they are in guest memory, also when
    the ring moves there."""
    regions = [Region.allocate(32 * PAGE, guest_addr=addr) for addr in (1 << 20, 1 << 24)]
    memory = GuestMemory(regions)
    first, second = (region.user_addr for region in regions)
    iotlb = Iotlb(memory)
    iotlb.update(IOVA, 16 * PAGE, first, 3)
    iotlb.update(SCATTERED, PAGE, second + 5 * PAGE, 3)
    iotlb.update(SCATTERED + PAGE, PAGE, first + 20 * PAGE, 2)  # for the device to write only
    place = DriverQueue.layout(8, packed=packed)
    # The driver's own view: one region, as its IOMMU shows it.
    seen = GuestMemory([Region.from_fd(regions[0].fd, 16 * PAGE, guest_addr=IOVA, user_addr=1 << 40)])
    areas = {"desc": IOVA + place.desc, "avail": IOVA + place.avail, "used": IOVA + place.used}
    driver = DriverQueue(seen, 8, packed=packed, **areas)
    device = DeviceQueue(memory, 8, packed=packed, **areas, iotlb=iotlb, name="q")
    log = DirtyLog.for_memory(memory)
    device.set_log(log, ring=True)
    written = (place.desc if packed else place.used) // PAGE * PAGE
    assert set(log.take()) == {(1 << 20) + place.used // PAGE * PAGE}
    driver.add([], [(SCATTERED + PAGE - 8, 16)], None)
    chain = device.pop()
    assert chain is not None
    chain.write(bytes(range(16)))
    device.push(chain)
    assert memory.read((1 << 24) + 6 * PAGE - 8, 8) == bytes(range(8))
    data = {(1 << 24) + 5 * PAGE, (1 << 20) + 20 * PAGE}
    assert set(log.take()) >= data | {(1 << 20) + written}

    # The same pages of memory elsewhere: the driver writes there from now on.
    memory.write(1 << 24, memory.read(1 << 20, 4 * PAGE))
    iotlb.invalidate(IOVA, 16 * PAGE)
    iotlb.update(IOVA, 4 * PAGE, second, 3)
    assert device.translate() == []
    log.take()
    moved = GuestMemory([Region.from_fd(regions[1].fd, 4 * PAGE, guest_addr=IOVA, user_addr=1 << 40)])
    driver = DriverQueue(moved, 8, packed=packed, **areas, base=device.base)
    driver.add([], [(SCATTERED, 8)], None)
    chain = device.pop()
    assert chain is not None
    device.push(chain, 8)
    marked = set(log.take())
    assert marked >= {(1 << 24) + 5 * PAGE, (1 << 24) + written}
    assert not any(page < 1 << 24 for page in marked)


# -- block requests ------------------------------------------------------------------------------------

SECTORS = 64


@pytest.fixture(params=HANDLERS)
def disk(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Blk]:
    image = tmp_path / "disk"
    image.write_bytes(pattern(SECTORS * 512))
    yield Blk(image, serial="a serial number", **how(request.param, monkeypatch))


def all_pages(memory: GuestMemory) -> dict[int, bytes]:
    return {
        addr: memory.read(addr, PAGE)
        for region in memory
        for addr in range(region.guest_addr, region.guest_addr + region.size, PAGE)
    }


@FORMATS
def test_requests_of_any_shape(disk: Blk, packed: bool) -> None:
    """Every page that changed, and that the driver did not write, is in the log; of those that did not, only
    pages with a part of the request that the device may write."""
    chance = random.Random(7)
    with ring(disk, packed=packed) as one:
        log = DirtyLog.for_memory(one.memory)
        disk.stop_queue(one.queue)
        one.queue.set_log(log)
        disk.start_queue(one.queue)
        end = BASE + REGION * len(one.memory)
        for _ in range(150):
            bufs = _scatter(chance, one, end)
            kind = chance.choice([BlkType.IN, BlkType.IN, BlkType.IN, BlkType.GET_ID, BlkType.FLUSH, 77])
            # The last ones are beyond the end of the disk, or of its file.
            sector = chance.randrange(SECTORS + 2)
            one.memory.write(one.free, header(int(kind), sector))
            at, size = bufs[-1]
            one.memory.write(at + size - 1, b"\xee")
            before = all_pages(one.memory)
            log.take()
            status, written = one.run([(one.free, 16)], bufs)
            assert status in (BlkStatus.OK, BlkStatus.IOERR, BlkStatus.UNSUPP)
            after = all_pages(one.memory)
            marked = set(log.take())
            theirs = {page for at, size in bufs for page in range(at // PAGE * PAGE, at + size, PAGE)}
            changed = {page for page, data in after.items() if data != before[page]}
            assert changed & theirs <= marked
            assert marked <= theirs
            assert written or not marked


def _scatter(chance: random.Random, one: Ring, end: int) -> list[tuple[int, int]]:
    """Writable buffers that do not touch each other, with room for some sectors and the status."""
    total = chance.randrange(1, 9) * 512 + 1 if chance.random() < 0.8 else chance.randrange(1, 600)
    sizes = []
    while total:
        sizes.append(chance.randrange(1, total + 1) if len(sizes) < 5 else total)
        total -= sizes[-1]
    places = chance.sample(range(one.free + PAGE, end - 2 * PAGE, 2 * PAGE), len(sizes))
    return [(place + chance.randrange(PAGE), size) for place, size in zip(places, sizes, strict=True)]


def test_memory_stays_the_same() -> None:
    log = DirtyLog(1 << 20)
    addr = log.addr
    with pytest.raises(RuntimeError, match="already"):
        log.__init__(1 << 20)  # type: ignore[misc]
    assert log.addr == addr
