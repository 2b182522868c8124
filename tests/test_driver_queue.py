# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""DriverQueue as its users meet it: layouts, adding, waiting, tokens; and devices that lie."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections import Counter

import pytest

import model
from rig import BASE, Rig, signals
from vhost.errors import InvalidQueue, QueueBroken
from vhost.memory import GuestMemory, Region
from vhost.virtqueue import DeviceQueue, DriverQueue

pytestmark = pytest.mark.usefixtures("no_leaks")
both = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


# ---------------------------------------------------------------------- set-up


@pytest.mark.parametrize(
    ("num", "packed"), [(1, False), (256, False), (32768, False), (1, True), (100, True)]
)
@pytest.mark.parametrize("indirect_max", [0, 1, 16])
def test_a_layout_is_a_ring(num: int, packed: bool, indirect_max: int) -> None:
    at = DriverQueue.layout(num, packed=packed, indirect_max=indirect_max)
    region = Region.allocate(at.size, guest_addr=BASE)
    queue = DriverQueue(
        GuestMemory([region]),
        num,
        desc=BASE + at.desc,
        avail=BASE + at.avail,
        used=BASE + at.used,
        packed=packed,
        indirect_addr=BASE + at.indirect if indirect_max else None,
        indirect_max=indirect_max,
    )
    assert (queue.num, queue.packed, queue.free, queue.in_flight) == (num, packed, num, 0)
    assert sorted(at) == list(at)


def test_set_up_errors() -> None:
    rig = Rig(16)
    for num, packed in [(0, False), (3, False), (65536, False), (0, True), (32769, True)]:
        with pytest.raises(InvalidQueue, match=f"num {num}"):
            DriverQueue.layout(num, packed=packed)
        with pytest.raises(InvalidQueue, match=f"num {num}"):
            DriverQueue(rig.memory, num, desc=BASE, avail=BASE + 256, used=BASE + 512, packed=packed)
    for more in (
        {"indirect_max": 4},
        {"indirect_max": 4, "indirect_addr": 0},
        {"indirect_max": 4, "indirect_addr": rig.data + 8},
        {"indirect_max": 4, "indirect_addr": rig.end - 16 * 4 * 16 + 16},
        {"indirect_max": 0xFFFFFFFF, "indirect_addr": rig.data},
        {"base": -1},
        {"base": 0x10000},
    ):
        with pytest.raises(InvalidQueue, match=r"indirect|base"):
            rig.driver(**more)
    rig.driver(indirect_max=4, indirect_addr=rig.end - 16 * 4 * 16)
    with pytest.raises(InvalidQueue, match="overlaps"):
        DriverQueue(rig.memory, 16, desc=BASE, avail=BASE + 16, used=BASE + 512)
    with pytest.raises(InvalidQueue, match="not wholly within"):
        DriverQueue(GuestMemory(), 16, desc=BASE, avail=BASE + 256, used=BASE + 512)


# ---------------------------------------------------------------------- adding


@both
def test_requests_that_can_never_be_added(packed: bool) -> None:
    rig = Rig(8, packed=packed)
    queue = rig.driver()
    for readable, writable in (
        ([], []),
        ([(rig.data, 0)], []),
        ([], [(rig.data, 4), (rig.data, 0)]),
        ([(rig.data, 1)] * 5, [(rig.data, 1)] * 4),
        ([((1 << 64) - 1, 2)], []),
        ([(rig.data, 0xFFFFFFFF)], [(rig.data, 1)]),
    ):
        with pytest.raises(ValueError, match=r"readable and \d writable buffers"):
            queue.add(readable, writable, None)
        with pytest.raises(ValueError, match="writable buffers"):
            queue.add_batch([(readable, writable, None)])
    with pytest.raises(ValueError, match="a length has 32 bits"):
        queue.add([(rig.data, 1 << 32)], [], None)
    for bad in ([(1 << 64, 1)], [(-1, 1)], [(0, -1)]):
        with pytest.raises(OverflowError):
            queue.add(bad, [], None)
    for wrong in ([5], [(1, 2, 3)], 5, [("a", "b")]):
        with pytest.raises((TypeError, ValueError)):
            queue.add(wrong, [], None)  # type: ignore[arg-type]
    assert (queue.free, queue.in_flight) == (8, 0)
    assert not queue.kick_prepare()
    assert rig.device().pop() is None


@both
@pytest.mark.parametrize("indirect", [False, True])
def test_a_full_ring(packed: bool, indirect: bool) -> None:
    rig = Rig(8, packed=packed)
    queue = rig.driver(**({"indirect_max": 4, "indirect_addr": rig.data + 0x2000} if indirect else {}))
    device = rig.device()
    two = ([(rig.data, 1)], [(rig.data + 8, 1)])
    fits = 8 if indirect else 4
    for lap in range(5):
        for i in range(fits):
            queue.add(*two, (lap, i))
        with pytest.raises(BufferError, match="0 descriptors free, too few for 2"):
            queue.add(*two, None)
        assert queue.add_batch([(*two, None)]) == 0
        assert (queue.free, queue.in_flight) == (0, fits)
        device.push_batch(device.pop_batch())
        assert queue.get_used_batch() == [((lap, i), 0) for i in range(fits)]
        assert queue.add_batch([(*two, i) for i in range(20)]) == fits
        assert queue.add_batch([]) == 0
        for chain in device:
            device.push(chain, 1)
        assert queue.has_used()
        assert [queue.get_used() for _ in range(fits)] == [(i, 1) for i in range(fits)]
        assert queue.get_used() is None
        assert not queue.has_used()


@both
def test_a_batch_stops_at_the_first_mistake(packed: bool) -> None:
    rig = Rig(8, packed=packed)
    queue, device = rig.driver(), rig.device()
    good, bad = ([(rig.data, 1)], [], "good"), ([], [], "bad")
    assert queue.add_batch([good, good, bad, good]) == 2
    with pytest.raises(ValueError, match="0 readable and 0 writable"):
        queue.add_batch([bad, good])
    device.push_batch(device.pop_batch())
    assert queue.get_used_batch() == [("good", 0)] * 2
    with pytest.raises(ValueError, match=r"unpack|values"):
        queue.add_batch([good, (1, 2)])  # type: ignore[list-item]
    assert queue.in_flight == 0
    assert device.pop() is None


@both
def test_tokens_are_held_and_given_back(packed: bool) -> None:
    class Token:
        pass

    rig = Rig(8, packed=packed)
    queue, device = rig.driver(), rig.device()
    token = Token()
    seen = weakref.ref(token)
    queue.add([(rig.data, 1)], [], token)
    del token
    assert seen() is not None
    device.push_batch(device.pop_batch())
    assert queue.get_used() == (seen(), 0)
    assert seen() is None
    # A token that leads back to its queue is no leak.
    token = Token()
    token.queue = queue  # type: ignore[attr-defined]
    seen = weakref.ref(token)
    queue.add([(rig.data, 1)], [], token)
    del token, queue
    gc.collect()
    assert seen() is None


# ---------------------------------------------------------------------- kicks and calls


@both
@pytest.mark.parametrize("event_idx", [False, True])
def test_kick_asks_the_device(packed: bool, event_idx: bool, events: list[int]) -> None:
    rig = Rig(8, packed=packed, event_idx=event_idx)
    queue = rig.driver(kick=events[0])
    device = rig.model_device()
    device.want_kick()
    assert not queue.kick()
    queue.add([(rig.data, 1)], [], 0)
    assert queue.kick()
    assert not queue.kick()
    assert signals(events[0]) == 1
    device.suppress_kicks()
    queue.add([(rig.data, 1)], [], 0)
    assert not queue.kick()
    assert signals(events[0]) == 0
    while device.pop():
        pass
    device.want_kick()
    queue.add([(rig.data, 1)], [], 0)
    assert queue.kick()


def serve(device: DeviceQueue) -> None:
    for chain in device:
        device.push(chain)


@both
@pytest.mark.parametrize("event_idx", [False, True])
def test_waiting(packed: bool, event_idx: bool, events: list[int]) -> None:
    rig = Rig(8, packed=packed, event_idx=event_idx)
    queue, device = rig.driver(call=events[1]), rig.device(call=events[1])
    started = time.monotonic()
    assert not queue.wait(0)
    assert not queue.wait(0.05)
    assert time.monotonic() - started >= 0.05
    # Signals that mean nothing do not count as used, and do not shorten the wait.
    os.eventfd_write(events[1], 1)
    started = time.monotonic()
    assert not queue.wait(0.05)
    assert time.monotonic() - started >= 0.05
    assert signals(events[1]) == 0

    for timeout in (None, 60):
        queue.add([(rig.data, 1)], [], timeout)
        server = threading.Thread(target=serve, args=(device,))
        server.start()
        assert queue.wait(timeout)
        server.join()
        assert queue.wait(0)
        assert queue.get_used() == (timeout, 0)
        assert not queue.wait(0)


@both
def test_wait_leaves_callbacks_as_they_were(packed: bool, events: list[int]) -> None:
    rig = Rig(8, packed=packed)
    queue, device = rig.driver(call=events[1]), rig.device(call=events[1])
    queue.add([(rig.data, 1)], [], 0)
    device.push_batch(device.pop_batch())
    queue.get_used()
    signals(events[1])
    for off, calls in ((True, 0), (False, 1)):
        queue.disable_callbacks() if off else queue.enable_callbacks()
        assert not queue.wait(0)
        queue.add([(rig.data, 1)], [], 0)
        device.push_batch(device.pop_batch())
        assert signals(events[1]) == calls
        queue.get_used()


def test_wait_errors(events: list[int]) -> None:
    rig = Rig(8)
    with pytest.raises(ValueError, match="no call eventfd"):
        rig.driver().wait(0)
    with pytest.raises(OSError, match="cannot be waited for"):
        rig.driver(call=100000).wait(1)
    # A thread that waits does not keep the others from running.
    queue = rig.driver(call=events[1])
    waiter = threading.Thread(target=queue.wait)
    waiter.start()
    device = rig.device(call=events[1])
    queue.add([(rig.data, 1)], [], 0)
    device.push_batch(device.pop_batch())
    waiter.join(60)
    assert not waiter.is_alive()


@both
def test_what_was_written_is_clipped_to_what_could_be(packed: bool) -> None:
    rig = Rig(8, packed=packed)
    queue, device = rig.driver(), rig.model_device()
    queue.add([(rig.data, 100)], [(rig.data, 8)], "token")
    request = device.pop()
    assert request is not None
    device.push(request, 0xFFFFFFFF)
    assert queue.get_used() == ("token", 8)


# ---------------------------------------------------------------------- devices that lie


def broken(queue: DriverQueue, reason: str) -> None:
    for call in (queue.get_used, queue.get_used_batch):
        with pytest.raises(QueueBroken, match=reason):
            call()
    assert queue.broken is not None
    with pytest.raises(QueueBroken, match=reason):
        queue.add([(BASE, 1)], [], None)
    with pytest.raises(QueueBroken, match=reason):
        queue.add_batch([([(BASE, 1)], [], None)])
    queue.call_fd = 0
    with pytest.raises(QueueBroken, match=reason):
        queue.wait()


@pytest.mark.parametrize(
    ("used_id", "reason"), [(8, "outside the ring"), (0xFFFFFFFF, "outside"), (5, "does not have")]
)
def test_split_used_ids_that_are_none(used_id: int, reason: str) -> None:
    rig = Rig(8)
    queue, device = rig.driver(), rig.model_device()
    queue.add([(rig.data, 1)], [], 0)
    device.push(model.Request(used_id), 0)
    broken(queue, reason)


def test_a_split_used_index_that_jumps() -> None:
    rig = Rig(8)
    queue, device = rig.driver(), rig.model_device()
    queue.add([(rig.data, 1)], [], 0)
    rig.ram.put("H", device.used_idx_addr(), 2)
    broken(queue, "ran ahead")


@pytest.mark.parametrize(
    ("used_id", "reason"), [(8, "outside the ring"), (0xFFFF, "outside"), (5, "does not have")]
)
def test_packed_used_ids_that_are_none(used_id: int, reason: str) -> None:
    rig = Rig(8, packed=True)
    queue, device = rig.driver(), rig.model_device()
    queue.add([(rig.data, 1)], [], 0)
    device.push(model.Request(used_id), 0)
    broken(queue, reason)


@both
def test_the_same_chain_twice(packed: bool) -> None:
    rig = Rig(8, packed=packed)
    queue, device = rig.driver(), rig.model_device()
    for token in range(2):
        queue.add([(rig.data, 1)], [], token)
    request = device.pop()
    assert request is not None
    device.push(request, 0)
    device.push(request, 0)
    assert queue.get_used_batch() == [(0, 0)]
    broken(queue, "does not have")


class Meddler(list[tuple[int, int]]):
    """Buffers that, when they are looked at, add another request."""

    def __init__(self, queue: DriverQueue, buffers: list[tuple[int, int]]) -> None:
        super().__init__(buffers)
        self.queue = queue

    def __len__(self) -> int:
        if self.queue.in_flight < 3:
            self.queue.add([(self[0][0] + 0x800, 5)], [], "meddler")
        return super().__len__()


@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
@both
def test_what_is_added_while_it_is_looked_at(packed: bool, batch: bool) -> None:
    rig = Rig(8, packed=packed)
    driver, device = rig.driver(), rig.device()
    buffers = [Meddler(driver, [(rig.data + i * 16, 4)]) for i in range(4)]
    if batch:
        assert driver.add_batch([(buffers[0], buffers[1], "first"), (buffers[2], buffers[3], "second")]) == 2
        wanted = Counter(meddler=3, first=1, second=1)
    else:
        driver.add(buffers[0], buffers[1], "first")
        wanted = Counter(meddler=2, first=1)
    chains = device.pop_batch(8)
    sizes = Counter((chain.readable_len, chain.writable_len) for chain in chains)
    assert sizes == Counter({(5, 0): wanted["meddler"], (4, 4): wanted.total() - wanted["meddler"]})
    device.push_batch(chains)
    assert Counter(token for token, _ in driver.get_used_batch(8)) == wanted
    assert driver.in_flight == 0
