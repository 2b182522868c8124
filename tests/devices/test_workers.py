# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Handlers in Python on threads of their own (``Device.workers``): which thread runs what, at the same time,
and what becomes of stops, errors and forks meanwhile."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import vhost
from vhost.devices.blk_python import run_request
from vhost.devices.workers import Worker
from vhost.errors import Disconnected, InvalidState

QUEUES = 3
PATIENCE = 10.0


class Disk(vhost.devices.Blk):
    """Does ``before`` (of the queue's index) with each chain before it is run."""

    def __init__(self, workers: int, before: Callable[[int], None]) -> None:
        super().__init__(null_size=1 << 20, num_queues=QUEUES, handler="python", threads=workers)
        self.before = before

    def requestq(self, queue: vhost.DeviceQueue) -> None:
        for chain in queue:
            self.before(queue.index)
            chain.finish(*run_request(self, chain))


@contextmanager
def driven(device: Disk) -> Iterator[tuple[vhost.InProcess, vhost.drivers.Blk]]:
    with vhost.InProcess(device) as ops, vhost.drivers.Blk(ops, num_queues=QUEUES) as driver:
        yield ops, driver
    device.close()


def workers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("vhost-disk-")]


def reap(driver: vhost.drivers.Blk, count: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while count:
        done = driver.poll(0.01)
        assert all(one.error is None for one in done)
        count -= len(done)
        assert time.monotonic() < deadline, f"{count} requests are missing"


def test_queues_have_their_threads(no_leaks: None) -> None:
    """Queue i is worker i % workers'."""
    seen: dict[int, set[str]] = {}

    def note(queue: int) -> None:
        seen.setdefault(queue, set()).add(threading.current_thread().name)

    with driven(Disk(2, note)) as (_, driver):
        for _ in range(5):
            for queue in range(QUEUES):
                driver.submit_flush(queue=queue)
            reap(driver, QUEUES)
    assert seen == {0: {"vhost-disk-0"}, 1: {"vhost-disk-1"}, 2: {"vhost-disk-0"}}
    assert not workers()


def test_handlers_run_at_the_same_time(no_leaks: None) -> None:
    """Each waits for the other, or the barrier breaks."""
    together = threading.Barrier(2, timeout=PATIENCE)

    def meet(queue: int) -> None:
        if queue < 2:
            together.wait()

    with driven(Disk(2, meet)) as (_, driver):
        for _ in range(20):
            driver.submit_flush(queue=0)
            driver.submit_flush(queue=1)
            reap(driver, 2)


def test_a_slow_handler_keeps_nobody_else_waiting(no_leaks: None) -> None:
    """Neither the other worker's queues nor the session."""
    entered, go_on = threading.Event(), threading.Event()

    def block(queue: int) -> None:
        if queue == 0:
            entered.set()
            assert go_on.wait(PATIENCE)

    with driven(Disk(2, block)) as (ops, driver):
        driver.submit_flush(queue=0)
        assert entered.wait(PATIENCE)
        driver.submit_flush(queue=1)
        reap(driver, 1)
        assert len(ops.get_config(0, 8)) == 8
        go_on.set()
        reap(driver, 1)


def test_a_stop_waits_for_the_handler(no_leaks: None) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def block(queue: int) -> None:
        entered.set()
        assert go_on.wait(PATIENCE)

    with driven(Disk(1, block)) as (ops, driver):
        driver.submit_flush(queue=0)
        assert entered.wait(PATIENCE)
        bases: list[int] = []
        stopping = threading.Thread(target=lambda: bases.append(ops.get_vring_base(0)))
        stopping.start()
        stopping.join(0.1)
        assert stopping.is_alive(), "the ring stopped while its handler ran"
        go_on.set()
        stopping.join(PATIENCE)
        assert bases
        reap(driver, 1)


@pytest.mark.filterwarnings("default")
def test_a_handler_that_fails_ends_the_session() -> None:  # pytest's log keeps the frames
    def fail(queue: int) -> None:
        raise ZeroDivisionError("of a handler")

    device = Disk(2, fail)
    with vhost.InProcess(device) as ops:
        driver = vhost.drivers.Blk(ops, num_queues=QUEUES)
        driver.submit_flush(queue=1)
        while ops.step():
            assert select.select([ops], [], [], PATIENCE)[0]
        assert isinstance(ops.error, ZeroDivisionError)
        with pytest.raises(Disconnected):
            driver.close()
    assert not workers()
    device.close()


def test_a_broken_queue_breaks_no_other(no_leaks: None) -> None:
    with driven(Disk(1, lambda _: None)) as (ops, driver):
        err = os.eventfd(0, os.EFD_NONBLOCK)
        ops.set_vring_err(0, err)
        queue = driver.queues[0]
        queue.add([(1 << 60, 16)], [(1 << 60, 1)], "nowhere")
        queue.kick()
        assert select.select([err], [], [], PATIENCE)[0], "no word of it"
        driver.submit_flush(queue=1)
        reap(driver, 1)
        assert ops.error is None
        os.close(err)


def test_asking_is_for_who_steps_the_session(no_leaks: None) -> None:
    """A worker is told so, and can have it done."""
    refused: list[str] = []
    posted = threading.Event()
    where: list[str] = []

    def ask(queue: int) -> None:
        try:
            device.shmem_unmap(0, 0, 4096)
        except InvalidState as error:
            refused.append(str(error))

        def note() -> None:
            where.append(threading.current_thread().name)
            posted.set()

        device.post(note)

    device = Disk(1, ask)
    with driven(device) as (_, driver):
        driver.submit_flush()
        reap(driver, 1)
        assert posted.wait(PATIENCE)
    assert "post()" in refused[0]
    assert where == ["vhost-disk"]  # InProcess's
    with pytest.raises(InvalidState, match="no session"):
        device.post(posted.set)


def test_polled_rings(no_leaks: None) -> None:
    """Without a kick the worker looks for itself."""
    with driven(Disk(2, lambda _: None)) as (ops, driver):
        for queue in range(QUEUES):
            ops.set_vring_kick(queue, None)
        for _ in range(10):
            for queue in range(QUEUES):
                driver.submit_flush(queue=queue)
            reap(driver, QUEUES)


def test_a_fork_ends_without_its_parents_threads(no_leaks: None) -> None:
    """And takes no kick from the parent, whose epoll set it shares."""
    device = Disk(2, lambda _: None)
    ops = vhost.InProcess(device)
    with ops, vhost.drivers.Blk(ops, num_queues=QUEUES) as driver:
        child = os.fork()
        if not child:
            workers = device._handler_threads
            assert workers is not None
            for ring in ops._session.rings:
                ring.watch.end()
            workers.close()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        for queue in range(QUEUES):
            driver.submit_flush(queue=queue)
        reap(driver, QUEUES)
    device.close()


def test_how_many() -> None:
    with pytest.raises(ValueError, match="threads 0"):
        Disk(0, lambda _: None)
    device = vhost.devices.Rng()
    device.workers = -1
    with vhost.InProcess(device) as ops, pytest.raises(Exception, match="-1 workers"):
        vhost.drivers.Rng(ops)


def test_what_cannot_be_waited_for(no_leaks: None) -> None:
    """A front-end may give anything as a kick."""
    worker = Worker("w")
    with open(__file__) as file, pytest.raises(PermissionError):
        worker.watch(file.fileno(), lambda: True, look=False)
    worker.close()
