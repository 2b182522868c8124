# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Memory and rings to share with a back-end, and a driver on them that takes every step by itself.

Rules leave steps out or take them in another order; ``start`` takes all of them, as a front-end would.
The rings are the library's DriverQueue; the messages go through a Peer.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Sequence
from typing import Any

from vhost.check.peer import FrontendMsg as F
from vhost.check.peer import Peer
from vhost.check.rule import Failed, Skipped, expect, prerequisite
from vhost.check.target import PROTOCOL_FEATURES, RING_PACKED, VERSION_1, Target
from vhost.check.work import WORK, Work
from vhost.driver_queue import DriverQueue
from vhost.errors import QueueBroken
from vhost.features import ProtocolF, Status, VirtioF
from vhost.memory import GuestMemory, Region
from vhost.user.payloads import U64, MemoryRegion, MemTable, SingleRegion, VringAddr, VringFd, VringState

GUEST_ADDR = 0x4000_0000
NUM = 16
DATA = 1 << 16
PAGE = 4096
PATTERN = 0xA5
"""What buffers hold that the device shall write."""
_EVENT_IDX = int(VirtioF.RING_EVENT_IDX)
_INDIRECT = int(VirtioF.RING_INDIRECT_DESC)
INDIRECT_MOST = 8


def describe(region: Region, *, mmap_offset: int | None = None) -> MemoryRegion:
    offset = region.mmap_offset if mmap_offset is None else mmap_offset
    return MemoryRegion(region.guest_addr, region.size, region.user_addr, offset)


class Ring:
    """One ring: where it is, its descriptors, and the driver's half of it."""

    def __init__(self, rig: Rig, index: int, addr: int, base: int | None) -> None:
        self.rig = rig
        self.index = index
        self.addr = addr
        self.kick_fd = rig.target.eventfd()
        self.call_fd = rig.target.eventfd()
        self.err_fd = rig.target.eventfd()
        self.layout = DriverQueue.layout(rig.num, packed=rig.packed, indirect_max=rig.indirect_max)
        self.queue = self._queue(base)
        self.base = self.queue.base
        """Where the ring began, for SET_VRING_BASE."""

    def _queue(self, base: int | None) -> DriverQueue:
        rig, layout = self.rig, self.layout
        return DriverQueue(
            rig.memory,
            rig.num,
            desc=self.addr + layout.desc,
            avail=self.addr + layout.avail,
            used=self.addr + layout.used,
            packed=rig.packed,
            event_idx=bool(rig.peer.features & _EVENT_IDX),
            base=base,
            indirect_addr=self.addr + layout.indirect if rig.indirect_max else None,
            indirect_max=rig.indirect_max,
            kick=self.kick_fd,
            call=self.call_fd,
            index=self.index,
            name=f"ring[{self.index}]",
        )

    def renew(self, base: int | None = None) -> None:
        """A new, empty ring in the same place, as a driver makes one after a reset."""
        self.rig.memory.view(self.addr, self.layout.size)[:] = bytes(self.layout.size)
        self.queue = self._queue(base)
        self.base = self.queue.base

    def address(self, *, flags: int = 0, log: int = 0, base: int = 0) -> VringAddr:
        """Its addresses as the messages say them; ``base`` is added to each."""
        user = self.rig.memory.guest_to_user
        desc, avail, used = (
            base + user(self.addr + offset)
            for offset in (self.layout.desc, self.layout.avail, self.layout.used)
        )
        return VringAddr(self.index, flags, desc, used, avail, log)

    def used_area(self, offset: int, size: int) -> bytes:
        return self.rig.memory.read(self.addr + self.layout.used + offset, size)

    def kick(self) -> None:
        """Whatever the device says of notifications."""
        os.eventfd_write(self.kick_fd, 1)

    def called(self, timeout: float) -> bool:
        """The device signals within the time; the signal is taken."""
        poll = select.poll()
        poll.register(self.call_fd, select.POLLIN)
        if not poll.poll(timeout * 1000):
            return False
        os.eventfd_read(self.call_fd)
        return True


class Rig:
    """``peer`` has negotiated its features. Rings are numbered from 0; memory is one region."""

    def __init__(
        self,
        target: Target,
        peer: Peer,
        *,
        rings: int = 1,
        num: int = NUM,
        base: int | None = None,
        skip: int = 0,
        hold_back: int = 0,
        work: Work | None = None,
    ) -> None:
        """``skip`` bytes of the file lie before the region; ``base`` is where the rings start;
        ``hold_back`` bytes of memory are there, but ``share`` does not tell of them."""
        self.target = target
        self.peer = peer
        self.num = num
        self.work = work
        self.packed = bool(peer.features & RING_PACKED)
        self.indirect_max = INDIRECT_MOST if peer.features & _INDIRECT else 0
        layout = DriverQueue.layout(num, packed=self.packed, indirect_max=self.indirect_max)
        each = -(-layout.size // PAGE) * PAGE
        size = rings * each + DATA
        self.file = Region.allocate(skip + size, guest_addr=GUEST_ADDR)
        self.region = self.file
        if skip:
            self.region = Region.from_fd(
                self.file.fd, size, guest_addr=GUEST_ADDR, user_addr=0x7000_0000_0000, mmap_offset=skip
            )
        self.held_back = Region.allocate(hold_back, guest_addr=2 * GUEST_ADDR) if hold_back else None
        self.memory = GuestMemory([self.region, self.held_back] if self.held_back else [self.region])
        self._free = GUEST_ADDR + rings * each
        self._end = GUEST_ADDR + size
        self.rings = [Ring(self, index, GUEST_ADDR + index * each, base) for index in range(rings)]

    # -- one step each -----------------------------------------------------------------------------

    def share(self) -> None:
        """SET_MEM_TABLE, or ADD_MEM_REG where slots were negotiated."""
        if self.peer.protocol & ProtocolF.CONFIGURE_MEM_SLOTS:
            self.peer.do(F.ADD_MEM_REG, SingleRegion(describe(self.region)), [self.file.fd])
        else:
            self.peer.do(F.SET_MEM_TABLE, MemTable((describe(self.region),)), [self.file.fd])

    def place(self, ring: Ring, base: int | None = None) -> None:
        """SET_VRING_NUM, SET_VRING_BASE, SET_VRING_ADDR."""
        start = ring.base if base is None else base
        self.peer.do(F.SET_VRING_NUM, VringState(ring.index, self.num))
        self.peer.do(F.SET_VRING_BASE, VringState(ring.index, start))
        self.peer.do(F.SET_VRING_ADDR, ring.address())

    def give_call(self, ring: Ring) -> None:
        self.peer.do(F.SET_VRING_CALL, VringFd(ring.index), [ring.call_fd])

    def give_kick(self, ring: Ring) -> None:
        self.peer.do(F.SET_VRING_KICK, VringFd(ring.index), [ring.kick_fd])

    def enable(self, ring: Ring, on: bool = True) -> None:
        if self.target.offered & PROTOCOL_FEATURES:
            self.peer.do(F.SET_VRING_ENABLE, VringState(ring.index, int(on)))

    def set_up(self, *, kick: bool = True, enable: bool = True) -> None:
        """All of it up to the first kick."""
        self.share()
        for ring in self.rings:
            self.place(ring)
            self.give_call(ring)
            if kick:
                self.give_kick(ring)
        for ring in self.rings:
            if enable:
                self.enable(ring)

    def start(self, *, status: bool = False) -> None:
        """``set_up``, and a kick on each ring, which starts it; with ``status`` as a driver does it that
        writes the device status."""
        ready = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
        if status:
            self.peer.do(F.SET_STATUS, U64(int(Status.ACKNOWLEDGE | Status.DRIVER)))
            self.peer.do(F.SET_STATUS, U64(int(ready)))
        self.set_up()
        if status:
            self.peer.do(F.SET_STATUS, U64(int(ready | Status.DRIVER_OK)))
        for ring in self.rings:
            ring.kick()

    def stop(self, ring: Ring, number: F = F.GET_VRING_BASE) -> int:
        """GET_VRING_BASE: where the ring stands."""
        return stopped_at(self.peer, ring.index, number)

    # -- requests ----------------------------------------------------------------------------------

    @property
    def main(self) -> Ring:
        """The ring on which work is done."""
        return self.rings[self.work.ring if self.work is not None else 0]

    def alloc(self, size: int) -> int:
        """Guest address of fresh memory."""
        addr = self._free
        self._free += -(-size // 64) * 64
        if self._free > self._end:
            raise ValueError("the rig's memory is used up")
        return addr

    def grow(self) -> None:
        """Share the region that was held back, and take buffers from there from now on."""
        assert self.held_back is not None
        extra = self.held_back
        self.peer.do(F.ADD_MEM_REG, SingleRegion(describe(extra)), [extra.fd])
        self._free, self._end = extra.guest_addr, extra.guest_addr + extra.size

    def submit(self, work: Work | None = None, ring: Ring | None = None) -> Sent:
        """Make a request available, without a kick."""
        work = work or self.work
        assert work is not None
        readable = []
        for content in work.readable:
            addr = self.alloc(len(content))
            self.memory.write(addr, content)
            readable.append((addr, len(content)))
        writable = [(self.alloc(size), size) for size in work.writable]
        sent = Sent(self, work, writable)
        for addr, size in writable:
            self.memory.write(addr, bytes([PATTERN]) * size)
        sent.head = (ring or self.main).queue.add(readable, writable, sent)
        return sent

    def wait(self, ring: Ring | None = None, timeout: float | None = None) -> Sent | None:
        """The next request that comes back, or None. Looks at the used ring by itself: whether the device
        calls is another rule."""
        ring = ring or self.main
        deadline = time.monotonic() + (self.target.timeout if timeout is None else timeout)
        pause = 0.0002
        while (got := _used(ring)) is None:
            if time.monotonic() >= deadline:
                return None
            time.sleep(pause)
            pause = min(2 * pause, 0.01)
        sent: Sent = got[0]
        sent.used = got[1]
        return sent

    def complete(self, work: Work | None = None, ring: Ring | None = None, *, kick: bool = True) -> Sent:
        """One request from beginning to end; Failed if it does not come back, or not right."""
        ring = ring or self.main
        sent = self.submit(work, ring)
        if kick:
            ring.kick()
        return self.finish(sent, ring)

    def finish(self, sent: Sent, ring: Ring | None = None) -> Sent:
        """A request that was submitted comes back as it should."""
        got = self.wait(ring)
        if got is None:
            raise Failed(f"a request ({sent.work.name}) did not come back within {self.target.timeout:g} s")
        expect(got is sent, f"another request ({got.work.name}) came back first")
        sent.judge()
        return sent

    def idle(self, ring: Ring | None = None) -> bool:
        """No request comes back: the back-end has handled all messages, and time has passed."""
        self.peer.sync()
        return self.wait(ring, self.target.settle) is None


def _used(ring: Ring) -> tuple[Any, int] | None:
    try:
        return ring.queue.get_used()
    except QueueBroken as error:
        raise Failed(f"the device broke the ring: {error.reason}") from None


class Sent:
    """A request on its way."""

    def __init__(self, rig: Rig, work: Work, writable: Sequence[tuple[int, int]]) -> None:
        self.rig = rig
        self.work = work
        self.writable = writable
        self.head = -1
        """The chain's id in the ring."""
        self.used = -1

    def contents(self) -> list[bytes]:
        return [self.rig.memory.read(addr, size) for addr, size in self.writable]

    @property
    def untouched(self) -> bool:
        return all(data == bytes([PATTERN]) * len(data) for data in self.contents())

    def judge(self) -> None:
        complaint = self.work.judge(self.contents(), self.used)
        expect(not complaint, f"a request ({self.work.name}) came back wrong: {complaint}")


def stopped_at(peer: Peer, index: int, number: F = F.GET_VRING_BASE) -> int:
    """GET_VRING_BASE, with its answer judged."""
    got = peer.ask(number, VringState(index, 0))
    expect(
        len(got.payload) == VringState.MAX_SIZE,
        f"{number.name}: a reply of {len(got.payload)} bytes, must be 8",
    )
    state = VringState.unpack(got.payload)
    expect(state.index == index, f"{number.name}: the reply is for ring {state.index}, asked for {index}")
    return state.num


def work_for(target: Target) -> Work:
    """The request that shows whether a ring is processed; Skipped if there is none for this device."""
    work = WORK.get(target.device)
    if work is None:
        known = " ".join(WORK)
        raise Skipped(f"what kind of device it is cannot be told from here (--device {known})")
    if work.leaves and not target.write:
        raise Skipped(f"{work.name} leaves this machine: only with --write")
    return work


def rig_for(
    target: Target,
    *,
    features: int = VERSION_1,
    protocol: int = 0,
    without: int = 0,
    num: int = NUM,
    base: int | None = None,
    skip: int = 0,
    rings: int = 0,
    hold_back: int = 0,
    work: Work | None = None,
) -> Rig:
    """A session and a rig with the rings that the device's work needs; nothing said of them yet."""
    work = work or work_for(target)
    peer = target.session(features=features, protocol=protocol, without=without)
    rings = rings or work.rings
    return Rig(target, peer, rings=rings, num=num, base=base, skip=skip, hold_back=hold_back, work=work)


def running(
    target: Target,
    *,
    features: int = VERSION_1,
    protocol: int = 0,
    without: int = 0,
    num: int = NUM,
    status: bool = False,
    work: Work | None = None,
) -> Rig:
    """A rig that runs, and has done one request."""
    rig = rig_for(target, features=features, protocol=protocol, without=without, num=num, work=work)
    with prerequisite("a ring cannot be started"):
        rig.start(status=status)
        rig.complete()
    return rig
