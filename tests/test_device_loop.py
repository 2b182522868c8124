# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``for chain in queue``, and who is notified of what when; well-behaved drivers only."""

from __future__ import annotations

import os

import pytest

from rig import Rig, signals

pytestmark = pytest.mark.usefixtures("no_leaks")
both = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


@both
@pytest.mark.parametrize("event_idx", [False, True])
def test_a_loop_notifies_once_and_rearms(packed: bool, event_idx: bool, events: list[int]) -> None:
    rig = Rig(16, packed=packed, event_idx=event_idx)
    driver, queue = rig.model_driver(), rig.device(kick=events[0], call=events[1], err=events[2])
    for lap in range(3):
        driver.want_call()
        for _ in range(5):
            driver.add([], [(rig.data, 8)])
        assert driver.need_kick()
        for served, chain in enumerate(queue):
            driver.add([], [(rig.data, 8)]) if served < 3 else None
            assert not driver.need_kick()
            queue.push(chain)
            assert signals(events[1]) == 0
        assert signals(events[1]) == 1
        assert len(driver.get_used()) == 8
        assert served == 7, lap
        assert not queue.has_work()
    assert signals(events[0]) == signals(events[2]) == 0


@both
def test_who_wants_no_calls_gets_none(packed: bool, events: list[int]) -> None:
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device(call=events[1])

    def serve() -> None:
        driver.add([], [(rig.data, 8)])
        for chain in queue:
            queue.push(chain)
        driver.get_used()

    serve()
    assert signals(events[1]) == 1  # the first decision of a new queue is always yes
    driver.suppress_calls()
    serve()
    assert signals(events[1]) == 0
    driver.want_call()
    serve()
    assert signals(events[1]) == 1
    for chain in queue:
        raise AssertionError(chain)
    assert signals(events[1]) == 0


@both
def test_push_outside_a_loop_notifies_at_once(packed: bool, events: list[int]) -> None:
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device(call=events[1])
    for _ in range(6):
        driver.add([], [(rig.data, 8)])
    chains = queue.pop_batch()
    queue.push(chains[0])
    assert signals(events[1]) == 1
    queue.push_batch(chains[1:3])
    assert signals(events[1]) == 1
    queue.fill(chains[3])
    queue.flush()
    assert signals(events[1]) == 0
    assert queue.notify()
    assert signals(events[1]) == 1
    assert not queue.notify()
    queue.fill(chains[4])
    queue.flush()
    assert queue.should_notify()
    assert not queue.should_notify()
    driver.suppress_calls()
    queue.push(chains[5])
    assert signals(events[1]) == 0
    # Without an eventfd the decision is still made.
    driver.want_call()
    queue.call = -1
    driver.add([], [(rig.data, 8)])
    (chain,) = queue.pop_batch()
    queue.fill(chain)
    queue.flush()
    assert queue.notify()


@both
@pytest.mark.parametrize("event_idx", [False, True])
def test_a_spent_budget_leaves_a_kick(packed: bool, event_idx: bool, events: list[int]) -> None:
    rig = Rig(16, packed=packed, event_idx=event_idx)
    driver, queue = rig.model_driver(), rig.device(kick=events[0], call=events[1])
    queue.budget = 4
    for _ in range(9):
        driver.add([], [(rig.data, 8)])
    counts = []
    while True:
        served = 0
        for chain in queue:
            served += 1
            queue.push(chain)
        counts.append(served)
        if not signals(events[0]):
            break
        assert queue.has_work()
    assert counts == [4, 4, 1]
    # All of it served exactly at the end of the budget: nobody needs to come back.
    for _ in range(4):
        driver.add([], [(rig.data, 8)])
    driver.get_used()
    assert len([queue.push(c) for c in queue]) == 4
    assert signals(events[0]) == 0
    driver.need_kick()
    driver.add([], [(rig.data, 8)])
    assert driver.need_kick()
    with pytest.raises(ValueError, match="budget 0"):
        queue.budget = 0
    with pytest.raises(OverflowError):
        queue.budget = -1


@both
@pytest.mark.parametrize("how", ["break", "exception", "drop"])
def test_a_loop_that_is_left_early_rearms_and_notifies(packed: bool, how: str, events: list[int]) -> None:
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device(kick=events[0], call=events[1])
    for _ in range(3):
        driver.add([], [(rig.data, 8)])
    if how == "break":
        for chain in queue:
            queue.push(chain)
            break
    elif how == "exception":
        with pytest.raises(ZeroDivisionError):
            for chain in queue:
                queue.push(chain)
                _ = 1 // 0
    else:
        loop = iter(queue)
        queue.push(next(loop))
        driver.need_kick()
        driver.add([], [(rig.data, 8)])
        assert not driver.need_kick()
        assert signals(events[1]) == 0
        del loop
    assert signals(events[1]) == 1
    assert queue.has_work()
    assert signals(events[0]) == 0
    driver.need_kick()
    driver.add([], [(rig.data, 8)])
    assert driver.need_kick()
    assert len(driver.get_used()) == 1


@both
def test_a_poller_stays_without_kicks(packed: bool) -> None:
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device()
    queue.disable_notification()
    driver.add([], [(rig.data, 8)])
    assert not driver.need_kick()
    for chain in queue:
        queue.push(chain)
    driver.add([], [(rig.data, 8)])
    assert not driver.need_kick()
    assert queue.enable_notification()
    for chain in queue:
        queue.push(chain)
    assert not queue.enable_notification()
    driver.add([], [(rig.data, 8)])
    assert driver.need_kick()


@both
def test_loops_in_loops_notify_at_the_outermost_end(packed: bool, events: list[int]) -> None:
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device(call=events[1])
    for _ in range(4):
        driver.add([], [(rig.data, 8)])
    for outer in queue:
        for inner in queue:
            queue.push(inner)
            break
        assert signals(events[1]) == 0
        queue.push(outer)
    assert signals(events[1]) == 1
    finished = iter(queue)
    assert list(finished) == []
    assert list(finished) == []


def test_a_call_eventfd_that_is_full_is_no_error(events: list[int]) -> None:
    rig = Rig(16)
    driver, queue = rig.model_driver(), rig.device(call=events[1])
    os.eventfd_write(events[1], 0xFFFF_FFFF_FFFF_FFFE)
    driver.add([], [(rig.data, 8)])
    for chain in queue:
        queue.push(chain)
    assert len(driver.get_used()) == 1


def test_a_call_fd_that_is_none_is_an_error_after_publishing() -> None:
    rig = Rig(16)
    driver, queue = rig.model_driver(), rig.device(call=100000)
    driver.add([], [(rig.data, 8)])
    chain = queue.pop()
    assert chain is not None
    with pytest.raises(OSError, match="eventfd 100000: Bad file descriptor"):
        queue.push(chain)
    assert len(driver.get_used()) == 1
