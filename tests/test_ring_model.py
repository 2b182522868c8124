# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Each of our sides against the other side of the plain-Python model, and against each other.

Hypothesis makes the runs: any mixture of adding, popping, giving back in any order, notifications on and
off, restarts from a saved base. The data are checked too: buffers cross regions that border each other.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import model
from rig import Rig, signals
from vhost.errors import InvalidQueue
from vhost.memory import GuestMemory
from vhost.virtqueue import Chain

RUNS = settings(
    max_examples=120,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
# Borders in the middle of many an arena; the last region begins with a page, for tables.
SIZES = (0x1100, 333, 777, 1001, 1729, 0x4000)
ARENA, TABLE = 400, 16 * 6

Shape = tuple[list[int], list[int]]
shapes = st.tuples(st.lists(st.integers(1, 40), max_size=3), st.lists(st.integers(1, 40), max_size=3)).filter(
    any
)
picks = st.integers(0, 1 << 16)


@dataclass
class Job:
    """One request, and all that has to come out of it."""

    arena: int
    readable: list[model.Buf]
    writable: list[model.Buf]
    text: bytes
    answer: bytes = b""
    id: int = -1
    slots: int = 0
    chain: Any = None

    @property
    def room(self) -> int:
        return sum(n for _, n in self.writable)


@dataclass
class Jobs:
    """Makes requests in arenas of their own, and checks the answers."""

    rig: Rig
    arenas: deque[int]
    count: int = 0
    texts: bytes = field(default=bytes(range(256)) * 2)

    def make(self, shape: Shape) -> Job:
        arena = self.arenas.popleft()
        at = self.rig.data + arena * ARENA + TABLE
        parts: list[list[model.Buf]] = [[], []]
        for kind in (0, 1):
            for size in shape[kind]:
                parts[kind].append((at, size))
                at += size
        size = sum(shape[0])
        self.count += 1
        text = self.texts[self.count % 256 :][:size]
        at = 0
        for addr, n in parts[0]:
            self.rig.ram.write(addr, text[at : at + n])
            at += n
        return Job(arena, *parts, text)

    def table(self, job: Job) -> int:
        return self.rig.data + job.arena * ARENA

    def finish(self, job: Job) -> None:
        """The driver has it back."""
        got = b"".join(self.rig.ram.read(addr, n) for addr, n in job.writable)
        assert got[: len(job.answer)] == job.answer
        self.arenas.append(job.arena)


class Common(RuleBasedStateMachine):
    """The ring, whatever is at its two ends."""

    #: Split rings may be big-endian: we are the device of a legacy driver.
    either_order = False

    def __init__(self) -> None:
        super().__init__()
        self.kick, self.call = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))

    def teardown(self) -> None:
        os.close(self.kick)
        os.close(self.call)

    @initialize(
        packed=st.booleans(),
        num=st.integers(1, 13),
        event_idx=st.booleans(),
        in_order=st.booleans(),
        big_endian=st.booleans(),
        indirect=st.booleans(),
        start=st.one_of(st.just(0), st.integers(0, 100), st.integers(65500, 65535)),
    )
    def set_up(
        self,
        packed: bool,
        num: int,
        event_idx: bool,
        in_order: bool,
        big_endian: bool,
        indirect: bool,
        start: int,
    ) -> None:
        features = {"event_idx": event_idx, "in_order": in_order}
        if not packed:
            num = 1 << num % 5
            features["big_endian"] = big_endian and self.either_order
        self.rig = Rig(num, packed=packed, sizes=SIZES, **features)
        self.jobs = Jobs(self.rig, deque(range(num)))
        self.packed, self.event_idx, self.in_order, self.indirect = packed, event_idx, in_order, indirect
        self.begin(*self.rig.start(start))

    def begin(self, at: Any, base: int) -> None:
        raise NotImplementedError


# ---------------------------------------------------------------------- our device, the model's driver


class DeviceMachine(Common):
    """DeviceQueue with the model's driver."""

    either_order = True

    def begin(self, at: Any, base: int) -> None:
        self.driver = self.rig.model_driver(at)
        self.queue = self.rig.device(base=base, call=self.call)
        self.oracle = self.rig.model_device(at)  # says when a call is due; used for nothing else
        self.first_decision = True
        self.armed = True  # the device asked for the next kick
        self.off = False  # ... or for none, in so far
        self.quiet = False  # ... as it can
        self.added: deque[Job] = deque()
        self.pops: list[Job] = []  # all, but for those undone
        self.out: list[Job] = []  # in the order of the pops; in_order: those that wait, too
        self.staged: list[Job] = []
        self.published: deque[Job] = deque()

    @rule(shape=shapes, indirect=st.booleans())
    def add(self, shape: Shape, indirect: bool) -> None:
        need = 1 if indirect else len(shape[0]) + len(shape[1])
        if need > self.driver.room or not self.jobs.arenas:
            return
        job = self.jobs.make(shape)
        job.slots = need
        job.id = self.driver.add(job.readable, job.writable, self.jobs.table(job) if indirect else None)
        self.added.append(job)
        kick = self.driver.need_kick()
        if self.armed:
            assert kick
        if self.quiet:
            assert not kick
        if self.event_idx:
            self.armed = False  # one wish, one kick

    @rule(n=st.integers(1, 20), batch=st.booleans())
    def pop(self, n: int, batch: bool) -> None:
        if batch:
            chains = self.queue.pop_batch(n)
            assert len(chains) == min(n, len(self.added))
        else:
            chain = self.queue.pop()
            assert (chain is None) == (not self.added)
            chains = [] if chain is None else [chain]
        for chain in chains:
            self.took(chain)

    def took(self, chain: Chain) -> None:
        job = self.added.popleft()
        assert (chain.id, chain.readable_len, chain.writable_len) == (job.id, len(job.text), job.room)
        assert chain.read() == job.text == b"".join(map(bytes, chain.readable))
        assert sum(map(len, chain.writable)) == job.room
        job.chain = chain
        self.pops.append(job)
        self.out.append(job)

    @rule(pick=picks)
    def unpop(self, pick: int) -> None:
        held = [job for job in self.out if job.chain is not None]
        if not held:
            return
        job = held[pick % len(held)]
        if job is self.pops[-1]:
            self.queue.unpop(job.chain)
            job.chain = None
            self.pops.remove(job)
            self.out.remove(job)
            self.added.appendleft(job)
        else:
            with pytest.raises(InvalidQueue):
                self.queue.unpop(job.chain)

    @rule(pick=picks, length=picks, flush=st.booleans())
    def give(self, pick: int, length: int, flush: bool) -> None:
        held = [job for job in self.out if job.chain is not None]
        if not held:
            return
        job = held[pick % len(held)]
        job.answer = self.jobs.texts[-1 - length % (job.room + 1) : -1]
        if length % 2:
            job.chain.write(job.answer)
            self.queue.push(job.chain) if flush else self.queue.fill(job.chain)
        else:
            job.chain.write_at(0, job.answer)
            length = len(job.answer)
            self.queue.push(job.chain, length) if flush else self.queue.fill(job.chain, length)
        self.gave(job)
        if flush:
            self.flushed(signals(self.call) != 0)

    def gave(self, job: Job) -> None:
        job.chain = None
        if not self.in_order:
            self.out.remove(job)
            self.staged.append(job)
        while self.in_order and self.out and self.out[0].chain is None:
            self.staged.append(self.out.pop(0))

    @rule()
    def flush(self) -> None:
        self.queue.flush()
        self.flushed(self.queue.should_notify())

    def flushed(self, told: bool) -> None:
        """``told``: what the queue decided to do about what it just published."""
        slots = 0
        for job in self.staged:
            slots += job.slots
            self.published.append(job)
        if isinstance(self.oracle, model.PackedDevice):
            self.oracle.used = self.oracle.step(self.oracle.used, slots)
        else:
            self.oracle.used = (self.oracle.used + len(self.staged)) % 65536
        self.staged.clear()
        due = self.oracle.need_call()
        if self.first_decision:
            assert told
            self.first_decision = False
        elif not self.packed or slots < self.rig.num:
            assert told == due
        else:
            assert told or not due  # a whole lap at once: may be told for nothing

    @rule(n=st.integers(1, 20))
    def loop(self, n: int) -> None:
        """``for chain in queue``, chains given back one by one; perhaps left early."""
        if self.staged or any(job.chain is None for job in self.out):
            return  # what the loop publishes is then not what it popped
        before = len(self.added)
        served = 0
        armed = self.armed
        for chain in self.queue:
            self.took(chain)
            job = self.pops[-1]
            job.answer = b"L" * job.room
            self.queue.push(chain, chain.write(job.answer))
            self.gave(job)
            served += 1
            if served == n:
                break
        assert served == min(n, before)
        self.flushed(signals(self.call) != 0)
        # A poller stays one; who wanted kicks wants the next one.
        self.armed = armed if self.off else self.kick_will_come()

    @rule()
    def disable_notification(self) -> None:
        self.queue.disable_notification()
        self.off = True
        # A split ring with event_idx cannot say it: its event index stays where it is.
        self.quiet = self.packed or not self.event_idx
        if self.quiet:
            self.armed = False

    @rule()
    def enable_notification(self) -> None:
        assert self.queue.enable_notification() == bool(self.added) == self.queue.has_work()
        self.off = self.quiet = False
        self.armed = self.kick_will_come()

    def kick_will_come(self) -> bool:
        """After re-arming: an event index that was passed already makes none."""
        return not (self.event_idx and self.added)

    @rule(after=st.integers(0, 15))
    def want_call(self, after: int) -> None:
        self.driver.want_call(min(after, self.rig.num - 1) if self.event_idx else 0)

    @rule()
    def suppress_calls(self) -> None:
        self.driver.suppress_calls()

    @rule()
    def reap(self) -> None:
        for head, length in self.driver.get_used():
            job = self.published.popleft()
            assert (head, length) == (job.id, len(job.answer))
            self.jobs.finish(job)
        assert not self.published

    @rule()
    def new_memory_table(self) -> None:
        self.queue.set_memory(GuestMemory(self.rig.memory.regions))

    @rule(told=st.booleans())
    def restart(self, told: bool) -> None:
        """A successor goes on from the base; what was in flight has to be back."""
        if self.out:
            return
        self.flush()
        assert self.queue.in_flight == 0
        base = self.queue.base
        self.queue.close()
        self.pops.clear()
        self.queue = self.rig.device(base=base if told or self.packed else None, call=self.call)
        self.first_decision = True
        self.armed = self.kick_will_come()
        self.off = self.quiet = False
        assert self.queue.base == base

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "queue"):
            assert self.queue.has_work() == bool(self.added)
            assert self.queue.in_flight == sum(job.slots for job in [*self.out, *self.staged])
            assert self.queue.broken is None


# ---------------------------------------------------------------------- our driver, the model's device


class DriverMachine(Common):
    """DriverQueue with the model's device."""

    def begin(self, at: Any, base: int) -> None:
        self.tables: dict[str, int] = {}
        if self.indirect:
            self.tables = {"indirect_addr": self.rig.end - 4 * 16 * self.rig.num, "indirect_max": 4}
        self.at = at
        self.queue = self.rig.driver(base=base, kick=self.kick, **self.tables)
        self.device = self.rig.model_device(at)
        self.device.want_kick()
        self.armed = True  # the driver asked for the next call
        self.quiet = False
        self.fresh: list[Job] = []  # added, and not told to the device
        self.added: deque[Job] = deque()
        self.out: list[tuple[Job, model.Request]] = []
        self.published: deque[Job] = deque()

    def slots(self, shape: Shape) -> int:
        buffers = len(shape[0]) + len(shape[1])
        return 1 if self.indirect and 1 < buffers <= 4 else buffers

    @rule(shape=shapes)
    def add(self, shape: Shape) -> None:
        if len(shape[0]) + len(shape[1]) > self.rig.num:
            with pytest.raises(ValueError, match=f"1 to {self.rig.num}"):
                self.queue.add([(1, 1)] * len(shape[0]), [(1, 1)] * len(shape[1]), None)
            return
        if self.slots(shape) > self.queue.free:
            with pytest.raises(BufferError):
                self.queue.add([(1, 1)] * len(shape[0]), [(1, 1)] * len(shape[1]), None)
            return
        job = self.jobs.make(shape)
        job.id = self.queue.add(job.readable, job.writable, job)
        job.slots = self.slots(shape)
        self.fresh.append(job)
        self.check_kick()

    @rule(some=st.lists(shapes, max_size=6))
    def add_batch(self, some: list[Shape]) -> None:
        some = [shape for shape in some if len(shape[0]) + len(shape[1]) <= self.rig.num]
        free, fit = self.queue.free, 0
        for shape in some:
            if self.slots(shape) > free:
                break
            free -= self.slots(shape)
            fit += 1
        made = [self.jobs.make(shape) for shape in some[:fit]]
        more = [([(1, 1)] * len(r), [(1, 1)] * len(w), None) for r, w in some[fit:]]
        assert self.queue.add_batch([(job.readable, job.writable, job) for job in made] + more) == fit
        for job, shape in zip(made, some, strict=False):
            job.slots = self.slots(shape)
            self.fresh.append(job)
        self.check_kick()

    def check_kick(self) -> None:
        """Is a kick due, going by what the model's device wrote?"""
        old = self.at
        lap = False
        if isinstance(self.device, model.PackedDevice):
            count = sum(job.slots for job in self.fresh)
            self.at = self.device.step(old, count)
            due = self.device.asked(self.rig.areas.used, old, self.at)
            lap = count == self.rig.num  # positions do not tell that from none
        else:
            self.at = (old + len(self.fresh)) % 65536
            if self.event_idx:
                due = self.device.asked(
                    self.rig.ram.get("H", self.device.avail_event_addr())[0], old, self.at
                )
            else:
                due = old != self.at and not self.rig.ram.get("H", self.rig.areas.used)[0] & 1
        self.added.extend(self.fresh)
        self.fresh.clear()
        told = self.queue.kick()
        assert told == due or (lap and told)
        assert (signals(self.kick) != 0) == told

    @rule(n=st.integers(1, 20))
    def device_pops(self, n: int) -> None:
        for _ in range(n):
            request = self.device.pop()
            assert (request is None) == (not self.added)
            if request is None:
                break
            job = self.added.popleft()
            assert job.id in (request.id, -1)
            assert (request.readable, request.writable) == (job.readable, job.writable)
            assert request.slots == job.slots or not self.packed
            assert b"".join(self.rig.ram.read(addr, size) for addr, size in request.readable) == job.text
            self.out.append((job, request))

    def answer(self, job: Job, length: int) -> None:
        job.answer = self.jobs.texts[:length]
        done = 0
        for addr, size in job.writable:
            self.rig.ram.write(addr, job.answer[done : done + size])
            done += size

    @rule(pick=picks, length=picks)
    def device_pushes(self, pick: int, length: int) -> None:
        if not self.out:
            return
        if self.in_order:
            batch = [self.out.pop(0) for _ in range(1 + pick % min(len(self.out), 3))]
        else:
            batch = [self.out.pop(pick % len(self.out))]
        for job, _ in batch[:-1]:
            self.answer(job, job.room)  # 2.7.9: used completely, or it could not be left out
        job, request = batch[-1]
        self.answer(job, length % (job.room + 1))
        if self.in_order:
            self.device.push_in_order([r for _, r in batch], len(job.answer))
        else:
            self.device.push(request, len(job.answer))
        self.published.extend(job for job, _ in batch)
        call = self.device.need_call()
        if self.armed:
            assert call
        if self.quiet:
            assert not call
        if self.event_idx:
            self.armed = False

    @rule(n=st.integers(1, 20), batch=st.booleans())
    def get_used(self, n: int, batch: bool) -> None:
        if batch:
            back = self.queue.get_used_batch(n)
            assert len(back) == min(n, len(self.published))
            empty = len(back) < n
        else:
            one = self.queue.get_used()
            assert (one is None) == (not self.published)
            back, empty = ([] if one is None else [one]), one is None
        for token, written in back:
            job = self.published.popleft()
            assert token is job
            assert written == len(job.answer)
            self.jobs.finish(job)
        if empty and not self.quiet:
            self.armed = True  # "none" promises a call for what comes next

    @rule()
    def disable_callbacks(self) -> None:
        self.queue.disable_callbacks()
        self.armed, self.quiet = False, True

    @rule()
    def enable_callbacks(self) -> None:
        assert self.queue.enable_callbacks() == bool(self.published) == self.queue.has_used()
        # True says that no call will come: an event index that was passed already makes none.
        self.armed, self.quiet = not (self.event_idx and self.published), False

    @rule()
    def want_kick(self) -> None:
        self.device.want_kick()

    @rule()
    def suppress_kicks(self) -> None:
        self.device.suppress_kicks()

    @rule()
    def restart(self) -> None:
        """Both sides anew on the same ring, from the driver's base."""
        if self.queue.in_flight:
            return
        base = self.queue.base
        if isinstance(self.device, model.PackedDevice):
            assert base == (self.at[0] | self.at[1] << 15) * 0x10001
        else:
            assert base == self.at
        self.queue = self.rig.driver(base=base, kick=self.kick, **self.tables)
        self.device = self.rig.model_device(self.at)
        self.device.want_kick()
        self.armed, self.quiet = True, False

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "queue"):
            out = [*self.added, *(job for job, _ in self.out), *self.published]
            assert self.queue.in_flight == len(out)
            assert self.queue.free == self.rig.num - sum(job.slots for job in out)
            assert self.queue.has_used() == bool(self.published)
            assert self.queue.broken is None


# ---------------------------------------------------------------------- ours and ours


class PairMachine(Common):
    """DeviceQueue with DriverQueue. Each acts when it was signalled, and only then: nothing may get stuck."""

    def begin(self, at: Any, base: int) -> None:
        tables: dict[str, int] = {}
        if self.indirect:
            tables = {"indirect_addr": self.rig.end - 4 * 16 * self.rig.num, "indirect_max": 4}
        self.driver = self.rig.driver(base=base, kick=self.kick, call=self.call, **tables)
        self.device = self.rig.device(base=base, kick=self.kick, call=self.call)
        self.backlog: deque[Job] = deque()
        self.out: list[Job] = []
        self.held: list[tuple[Chain, Job]] = []
        self.made = self.done = 0

    @rule(some=st.lists(shapes, min_size=1, max_size=8))
    def submit(self, some: list[Shape]) -> None:
        for shape in some:
            if len(shape[0]) + len(shape[1]) <= self.rig.num and self.jobs.arenas:
                self.backlog.append(self.jobs.make(shape))
                self.made += 1
        self.fill_ring()

    def fill_ring(self) -> None:
        while self.backlog:
            try:
                job = self.backlog[0]
                job.id = self.driver.add(job.readable, job.writable, job)
            except BufferError:
                break
            self.out.append(self.backlog.popleft())
        self.driver.kick()

    def next_out(self, chain: Chain) -> Job:
        job = self.out.pop(0)
        assert chain.id == job.id
        assert chain.read() == job.text
        return job

    @rule(budget=st.integers(1, 5), hold=st.integers(0, 3))
    def device_kicked(self, budget: int, hold: int) -> None:
        if not signals(self.kick):
            return
        self.device.budget = budget
        for chain in self.device:
            job = self.next_out(chain)
            if hold:
                hold -= 1
                self.held.append((chain, job))
            else:
                self.give(chain, job)

    def give(self, chain: Chain, job: Job) -> None:
        job.answer = self.jobs.texts[: chain.writable_len // 2 + 1][: chain.writable_len]
        self.device.push(chain, chain.write(job.answer))

    @rule(pick=picks)
    def device_finishes(self, pick: int) -> None:
        if self.held:
            self.give(*self.held.pop(pick % len(self.held)))

    @rule()
    def driver_called(self) -> None:
        if not signals(self.call):
            return
        while True:
            self.driver.disable_callbacks()
            while (back := self.driver.get_used()) is not None:
                job, written = back
                assert written == len(job.answer)
                self.jobs.finish(job)
                self.done += 1
            self.fill_ring()
            if not self.driver.enable_callbacks():
                break

    @rule()
    def driver_polls(self) -> None:
        for job, written in self.driver.get_used_batch(2):
            assert written == len(job.answer)
            self.jobs.finish(job)
            self.done += 1
        self.fill_ring()

    def teardown(self) -> None:
        if hasattr(self, "device"):
            while self.held:
                self.device_finishes(len(self.held) - 1)
            for _ in range(4 * self.rig.num + 4):
                self.device_kicked(256, 0)
                self.driver_called()
            assert self.done == self.made
            assert self.driver.in_flight == self.device.in_flight == 0
            assert self.driver.free == self.rig.num
        super().teardown()


TestDevice = DeviceMachine.TestCase
TestDriver = DriverMachine.TestCase
TestPair = PairMachine.TestCase
for case in (TestDevice, TestDriver, TestPair):
    case.settings = RUNS
del case
