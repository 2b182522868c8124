# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A loop pops chains before their turn. Nobody may notice: what it has not given is in the ring."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from contextlib import suppress

import pytest

from rig import Rig, error_event, eventfds, signals
from vhost.errors import InvalidQueue, QueueBroken
from vhost.virtqueue import Chain, DeviceQueue

pytestmark = pytest.mark.usefixtures("no_leaks")
both = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])

CHAINS = 12


def filled(packed: bool, chains: int = CHAINS, **more: int) -> tuple[Rig, DeviceQueue, list[int]]:
    """A ring with chains whose sizes tell them apart, after a burst as large: a loop looks ahead at all."""
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device(**more)
    for _ in range(CHAINS):
        driver.add([], [(rig.data, 8)])
    assert len([queue.push(chain) for chain in queue]) == CHAINS
    driver.get_used()
    ids = [driver.add([], [(rig.data, 1 + i)]) for i in range(chains)]
    return rig, queue, ids


def rest(queue: DeviceQueue) -> list[int]:
    return [chain.writable_len for chain in queue.pop_batch(CHAINS)]


@both
def test_a_loop_gives_all_in_their_order(packed: bool) -> None:
    _, queue, ids = filled(packed)
    assert [chain.id for chain in queue] == ids
    assert queue.in_flight == CHAINS


ASKED: dict[str, tuple[Callable[[Rig, DeviceQueue], object], Callable[[Rig], object]]] = {
    "base": (lambda rig, queue: queue.base & 0xFFFF, lambda rig: rig.start(CHAINS + 1)[1] & 0xFFFF),
    "in_flight": (lambda rig, queue: queue.in_flight, lambda rig: 1),
    "has_work": (lambda rig, queue: queue.has_work(), lambda rig: True),
    "enable_notification": (lambda rig, queue: queue.enable_notification(), lambda rig: True),
    "set_memory": (lambda rig, queue: queue.set_memory(rig.memory), lambda rig: None),
    "pop": (lambda rig, queue: queue.unpop(queue.pop()), lambda rig: None),
}


@both
@pytest.mark.parametrize("what", ASKED)
def test_asking_within_a_loop(packed: bool, what: str) -> None:
    rig, queue, _ = filled(packed)
    ask, answer = ASKED[what]
    sizes = []
    for chain in queue:
        if not sizes:
            assert ask(rig, queue) == answer(rig)
        sizes.append(chain.writable_len)
        queue.push(chain)
    assert sizes == [*range(1, CHAINS + 1)]


@both
def test_what_a_loop_gives_can_be_unpopped_and_comes_again(packed: bool) -> None:
    _, queue, _ = filled(packed)
    sizes = []
    for chain in queue:
        sizes.append(chain.writable_len)
        if len(sizes) == 3:
            queue.unpop(chain)
            with pytest.raises(InvalidQueue, match="given back"):
                chain.write(b"x")
    assert sizes == [1, 2, 3, *range(3, CHAINS + 1)]
    assert queue.in_flight == CHAINS


@both
def test_pops_within_a_loop_take_the_next_ones(packed: bool) -> None:
    _, queue, _ = filled(packed)
    seen: list[int] = []
    for chain in queue:
        more = [queue.pop(), *queue.pop_batch(2)]
        seen += [one.writable_len for one in (chain, *more) if one is not None]
    assert seen == [*range(1, CHAINS + 1)]


@both
def test_a_loop_left_early_leaves_the_rest_in_the_ring(packed: bool) -> None:
    rig, queue, _ = filled(packed)
    for chain in queue:
        queue.push(chain)
        if chain.writable_len == 2:
            break
    assert queue.base & 0xFFFF == rig.start(CHAINS + 2)[1] & 0xFFFF
    assert queue.has_work()
    assert rest(queue) == [*range(3, CHAINS + 1)]


@both
def test_a_successor_finds_what_a_closed_queue_did_not_give(packed: bool) -> None:
    rig, queue, _ = filled(packed)
    with pytest.raises(InvalidQueue, match="closed"):
        for chain in queue:
            queue.push(chain)
            queue.close()
    assert rest(rig.device(base=queue.base)) == [*range(2, CHAINS + 1)]


@both
def test_the_budget_counts_what_was_given(packed: bool) -> None:
    with eventfds(1) as (kick,):
        _, queue, _ = filled(packed, kick=kick)
        queue.budget = 5
        sizes = []
        for chain in queue:
            assert queue.in_flight == 1  # which puts back what is ahead
            sizes.append(chain.writable_len)
            queue.push(chain)
        assert sizes == [1, 2, 3, 4, 5]
        assert signals(kick) == 1
        # Another loop takes what this one looked ahead at.
        outer, inner = [], []
        for one in queue:
            outer.append(one.writable_len)
            inner += [chain.writable_len for chain in queue]
        assert (outer, inner) == ([6, 12], [7, 8, 9, 10, 11])
        assert signals(kick) == 0


class InACycle:
    """What it does when the collector finds it, which before CPython 3.12 may be within any allocation."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act
        self.itself = self

    def __del__(self) -> None:
        self.act()


def pop_with_finalizer(queue: DeviceQueue, act: Callable[[], object]) -> list[Chain]:
    """A batch, in whose first allocation the collector runs, and then `act`."""
    before = gc.get_threshold()
    gc.collect()
    gc.disable()
    InACycle(act)
    gc.set_threshold(1, 1000, 1000)
    gc.enable()
    try:
        return queue.pop_batch(CHAINS)
    finally:
        gc.set_threshold(*before)
        gc.collect()


FINALIZERS: dict[str, Callable[[DeviceQueue], object]] = {
    "pop": lambda queue: queue.pop(),
    "pop_batch": lambda queue: queue.pop_batch(3),
    "base": lambda queue: queue.base,
    "loop": lambda queue: next(iter(queue), None),
    "nothing": lambda queue: None,
}


@both
@pytest.mark.parametrize("what", FINALIZERS)
def test_a_finalizer_within_a_batch(packed: bool, what: str) -> None:
    """Each chain is handed out once, whoever else asks meanwhile."""
    _, queue, ids = filled(packed)
    loop = iter(queue)
    seen = [next(loop)]  # the others are ahead
    theirs: list[Chain] = []

    def act() -> None:
        got = FINALIZERS[what](queue)
        theirs.extend(got if isinstance(got, list) else [got] if isinstance(got, Chain) else [])

    seen += pop_with_finalizer(queue, act)
    del loop
    while more := queue.pop_batch(CHAINS):
        seen += more
    assert sorted(chain.id for chain in seen + theirs) == sorted(ids)
    assert len({id(chain) for chain in seen + theirs}) == CHAINS
    assert queue.in_flight == CHAINS


@both
def test_a_finalizer_that_closes_the_queue_within_a_batch(packed: bool) -> None:
    rig, queue, _ = filled(packed)
    loop = iter(queue)
    first = next(loop)
    batch = []
    with suppress(InvalidQueue):  # where the collector does not run within an allocation, but before it
        batch = pop_with_finalizer(queue, queue.close)
    # What it did not give is its successor's.
    assert rest(rig.device(base=queue.base)) == [*range(2 + len(batch), CHAINS + 1)]
    assert first.writable_len == 1


def test_a_loop_is_its_queues_own() -> None:
    """Nobody can make another of it, which would end it twice."""
    _, queue, _ = filled(False)
    loop = iter(queue)
    with pytest.raises(TypeError):
        copy.copy(loop)
    with pytest.raises(TypeError):
        pickle.dumps(loop)
    bare = type(loop).__new__(type(loop))
    assert list(bare) == []


@both
def test_a_fault_is_found_at_its_turn(packed: bool) -> None:
    with error_event() as err:
        rig, queue, _ = filled(packed, chains=4, err=err)
        rig.ram.write(rig.areas.desc + 16 * _descriptor(rig, CHAINS + 3) + 8, b"\0\0\0\0")  # its length
        sizes = []
        with pytest.raises(QueueBroken, match="buffer has length 0"):
            for chain in queue:
                assert queue.broken is None
                assert signals(err) == 0
                sizes.append(chain.writable_len)
                queue.push(chain)
        assert sizes == [1, 2, 3]
        assert queue.broken is not None
        assert signals(err) == 1


@both
def test_a_fault_that_is_mended_before_its_turn_was_none(packed: bool) -> None:
    rig, queue, _ = filled(packed, chains=4)
    at = rig.areas.desc + 16 * _descriptor(rig, CHAINS + 3) + 8
    good = rig.ram.read(at, 4)
    rig.ram.write(at, b"\0\0\0\0")
    sizes = []
    for chain in queue:
        rig.ram.write(at, good)
        sizes.append(chain.writable_len)
    assert sizes == [1, 2, 3, 4]


def _descriptor(rig: Rig, index: int) -> int:
    """Where the ring has its chain number `index`, each of one descriptor."""
    if rig.packed:
        return index % rig.num
    (head,) = rig.ram.get("H", rig.areas.avail + 4 + 2 * (index % rig.num))
    return head


@both
def test_a_chain_held_beyond_the_queue_keeps_it(packed: bool) -> None:
    rig, queue, _ = filled(packed)
    held: list[Chain] = []
    for chain in queue:
        held.append(chain)
        if len(held) == 2:
            break
    del queue, chain
    for one in held:
        one.finish(0, 0)  # its last reference to the queue
    with pytest.raises(InvalidQueue, match="given back"):
        held[0].finish(0, 0)
    assert rest(rig.device(base=rig.start(CHAINS + 2)[1])) == [*range(3, CHAINS + 1)]
