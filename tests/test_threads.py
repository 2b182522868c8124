# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Objects used by several threads at once. With the interpreter's lock this says little; `make
test-free-threaded` runs it by an interpreter that has none, where each object has to guard itself."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from rig import USER, Rig
from vhost._iotlb import Iotlb
from vhost.errors import InvalidGuestMemory, InvalidQueue, VhostError
from vhost.shmem import ShmemRegion
from vhost.virtqueue import Chain, DeviceQueue, DriverQueue

pytestmark = pytest.mark.usefixtures("no_leaks")
both = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])

ROUNDS = 2000


failed = threading.Event()  # in one of the threads: the others need not wait for what it was to do


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    """With the lock, hand it over as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(*bodies: Callable[[], None]) -> None:
    """Runs them in threads that start together; the first error of any is raised."""
    start, errors = threading.Barrier(len(bodies)), []
    failed.clear()

    def run(body: Callable[[], None]) -> None:
        try:
            start.wait()
            body()
        except BaseException as error:
            errors.append(error)
            failed.set()

    threads = [threading.Thread(target=run, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def pump(driver: DriverQueue, rig: Rig, total: int, got: list[int]) -> None:
    """Adds requests with a number each as their token, until all of these have come back."""
    sent = 0
    while len(got) < total and not failed.is_set():
        while sent < total and driver.free:
            driver.add([(rig.data, 4)], [(rig.data + 64, 8)], sent)
            sent += 1
        for token, written in driver.get_used_batch(16):
            assert written == 8
            got.append(token)


@both
@pytest.mark.parametrize("how", ["pop", "pop_batch", "loop", "finish"])
def test_one_queue_served_by_two_threads(packed: bool, how: str) -> None:
    rig = Rig(16, packed=packed)
    driver, queue = rig.driver(), rig.device()
    got: list[int] = []

    def one(chain: Chain) -> None:
        assert len(chain.read(4)) == 4
        chain.write(b"1234567")
        if how == "finish":
            chain.finish(0)
        else:
            queue.push(chain, 8)

    def serve() -> None:
        while len(got) < ROUNDS and not failed.is_set():
            if how == "loop":
                for chain in queue:
                    one(chain)
            elif how == "pop_batch":
                batch = queue.pop_batch(8)
                queue.push_batch(batch, [8] * len(batch))
            elif chain := queue.pop():
                one(chain)

    at_once(serve, serve, lambda: pump(driver, rig, ROUNDS, got))
    assert sorted(got) == list(range(ROUNDS))
    assert queue.in_flight == 0


@both
def test_chains_in_the_hands_of_two(packed: bool) -> None:
    """Both give each chain back: one succeeds. A third reads them the while."""
    count, turns = 12, ROUNDS // 10
    rig = Rig(64, packed=packed)
    driver, queue = rig.driver(), rig.device()
    hands: list[Chain] = []
    given = [0, 0]
    before, behind = threading.Barrier(4, timeout=60), threading.Barrier(4, timeout=60)

    def feed() -> None:
        for _ in range(turns):
            for i in range(count):
                driver.add([(rig.data, 64), (rig.data + 64, 64)], [(rig.data + 128, 8)], i)
            hands[:] = queue.pop_batch(count)
            before.wait()
            behind.wait()
            assert sorted(token for token, _ in driver.get_used_batch(2 * count)) == list(range(count))

    def give(who: int) -> None:
        for _ in range(turns):
            before.wait()
            for chain in hands:
                try:
                    queue.push(chain, 8)
                    given[who] += 1
                except InvalidQueue:
                    pass
            chain = None
            behind.wait()

    def look() -> None:
        for _ in range(turns):
            before.wait()
            for chain in hands:
                chain.read(16)
                assert sum(len(buffer) for buffer in chain.readable) == 128
            chain = None
            behind.wait()

    at_once(feed, lambda: give(0), lambda: give(1), look)
    assert sum(given) == turns * count
    assert queue.in_flight == 0


@both
def test_one_ring_filled_by_three_threads(packed: bool) -> None:
    rig = Rig(16, packed=packed)
    driver, device = rig.driver(), rig.device()
    got: list[int] = []

    def drive(first: int, batch: bool) -> None:
        mine, end = first, first + ROUNDS
        while (mine < end or len(got) < 3 * ROUNDS) and not failed.is_set():
            try:
                if batch:
                    wanted = [
                        ([(rig.data, 4)], [(rig.data + 64, 8)], mine + i) for i in range(min(3, end - mine))
                    ]
                    mine += driver.add_batch(wanted)
                elif mine < end:
                    driver.add([(rig.data, 4)], [(rig.data + 64, 8)], mine)
                    mine += 1
            except BufferError:
                pass
            found = driver.get_used_batch(8) if batch else [used] if (used := driver.get_used()) else []
            got.extend([token for token, _ in found])  # of a generator, its length would be guessed first

    def serve() -> None:
        while len(got) < 3 * ROUNDS and not failed.is_set():
            for chain in device:
                device.push(chain, 8)

    at_once(lambda: drive(0, True), lambda: drive(ROUNDS, False), lambda: drive(2 * ROUNDS, True), serve)
    assert sorted(got) == list(range(3 * ROUNDS))
    assert driver.in_flight == 0


def test_an_iotlb_that_changes_while_it_is_asked() -> None:
    rig = Rig()
    iotlb = Iotlb(rig.memory)

    def change(at: int) -> Callable[[], None]:
        def body() -> None:
            for i in range(4 * ROUNDS):
                where = at + i % 61 * 0x3000
                iotlb.update(where, 0x1000, USER + i % 16 * 0x1000, 3)
                assert iotlb.missing(where, 0x1000, 3) is None
                iotlb.invalidate(where, 0x1000)
                assert iotlb.missing(where, 0x1000, 1) == (where, 1)
                assert iotlb.allows(where) is None

        return body

    at_once(change(0x1000), change(0x10_0000_0000), change(0x2000_0000_0000))
    assert len(iotlb) == 0


@pytest.mark.parametrize("action", ["read", "write"])
def test_a_shared_region_closed_while_it_is_copied(action: str) -> None:
    fd = os.memfd_create("shared")
    os.ftruncate(fd, 1 << 20)
    data = b"x" * (1 << 20)
    try:
        for _ in range(60):
            region = ShmemRegion(0, 1 << 20)
            region.map(0, 1 << 20, fd, writable=True)

            def copy(region: ShmemRegion = region) -> None:
                try:
                    while True:
                        if action == "read":
                            assert len(region.read(0, 1 << 20)) == 1 << 20
                        else:
                            region.write(0, data)
                except InvalidGuestMemory as error:
                    assert "was closed" in str(error)

            at_once(copy, copy, region.close)
            assert region.host_addr == 0
            assert region.mappings == ()
    finally:
        os.close(fd)


def test_mappings_made_and_undone_at_once() -> None:
    region = ShmemRegion(0, 1 << 20)
    fd = os.memfd_create("shared")
    os.ftruncate(fd, 1 << 20)

    def body(start: int) -> Callable[[], None]:
        def run() -> None:
            for i in range(ROUNDS // 4):
                at = start + i % 8 * 0x2000
                region.map(at, 0x1000, fd, writable=True)
                region.write(at, b"here")
                assert region.read(at, 4) == b"here"
                region.unmap(at, 0x1000)

        return run

    try:
        at_once(body(0), body(0x4_0000), body(0x8_0000))
        assert region.mappings == ()
    finally:
        region.close()
        os.close(fd)


@both
def test_a_queue_closed_under_its_users(packed: bool) -> None:
    for _ in range(40):
        rig = Rig(16, packed=packed)
        driver, queue = rig.driver(), rig.device()
        for i in range(8):
            driver.add([(rig.data, 4)], [(rig.data + 64, 8)], i)

        def serve(queue: DeviceQueue = queue) -> None:
            try:
                while True:
                    for chain in queue:
                        queue.push(chain, 8)
            except VhostError as error:
                assert "closed" in str(error)

        def close(queue: DeviceQueue = queue) -> None:
            time.sleep(0.001)
            queue.close()

        at_once(serve, serve, close)
        assert queue.closed
