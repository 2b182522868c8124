# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Everything that may be changed while rings run (vhost-user, "Ring states"), changed under verified load:
eventfds, enabling, memory. A thread makes requests without end; the test makes the changes meanwhile."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import vhost
from user import hostile as h
from vhost.features import ProtocolF
from vhost.memory import GuestMemory, Region

BLOCK = 4096
BLOCKS = 256  # of each queue
QUEUES = 2
DEPTH = 16
ROUNDS = 12
PATIENCE = 20.0


class Load:
    """Writes and reads on both queues, each block's newest contents known."""

    def __init__(self, disk: vhost.drivers.Blk) -> None:
        self.disk = disk
        self.done = 0
        self.error: BaseException | None = None
        self._stop = threading.Event()
        self._news = threading.Condition()
        self._rng = random.Random(1)
        self._written = [bytes(BLOCK)] * (BLOCKS * QUEUES)
        self._busy: set[int] = set()
        self._thread = threading.Thread(target=self._run)

    def go_on(self, requests: int = 50) -> None:
        """Until so many more are done."""
        with self._news:
            wanted = self.done + requests
            self._news.wait_for(lambda: self.done >= wanted or self.error is not None, PATIENCE)
            if self.error is None:
                assert self.done >= wanted, f"{self.done} of {wanted} requests"

    def is_stuck(self) -> bool:
        """Nothing more is done, for a while at least."""
        with self._news:
            seen = self.done
            return not self._news.wait_for(lambda: self.done > seen or self.error is not None, 0.1)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(2 * PATIENCE)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._submit()
                self._reap(0.02)
            deadline = time.monotonic() + PATIENCE
            while self._busy:
                assert time.monotonic() < deadline, f"{len(self._busy)} requests do not end"
                self._reap(0.02)
        except BaseException as error:
            with self._news:
                self.error = error
                self._news.notify_all()

    def _submit(self) -> None:
        for queue in range(QUEUES):
            for _ in range(4):
                block = queue * BLOCKS + self._rng.randrange(BLOCKS)
                if block in self._busy or sum(busy // BLOCKS == queue for busy in self._busy) >= DEPTH:
                    continue
                self._busy.add(block)
                if self._rng.random() < 0.5:
                    self._written[block] = self._rng.randbytes(BLOCK)
                    self.disk.submit_write(block * 8, self._written[block], (block, False), queue=queue)
                else:
                    self.disk.submit_read(block * 8, 8, (block, True), queue=queue)

    def _reap(self, timeout: float) -> None:
        for done in self.disk.poll(timeout):
            block, is_read = done.token
            assert done.error is None
            assert not is_read or done.data == self._written[block]
            self._busy.remove(block)
            with self._news:
                self.done += 1
                self._news.notify_all()


@contextmanager
def loaded(
    folder: Path, handler: str, packed: bool, without: int = 0
) -> Iterator[tuple[vhost.Frontend, Load]]:
    image = folder / "disk.raw"
    image.write_bytes(bytes(BLOCK * BLOCKS * QUEUES))
    more = {"handler": "python", "threads": QUEUES} if handler == "workers" else {"handler": handler}
    device = vhost.devices.Blk(image, num_queues=QUEUES, **more)
    wanted = int(vhost.user.frontend_base.WANTED) & ~without
    with (
        h.served(device, folder / "s"),
        vhost.Frontend.connect(folder / "s", protocol_features=wanted) as frontend,
        vhost.drivers.Blk(frontend, packed=packed, num_queues=QUEUES, depth=DEPTH) as disk,
        Load(disk) as load,
    ):
        yield frontend, load
    device.close()


@pytest.fixture(params=["c", "python", "workers"])
def handler(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def packed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_events(tmp_path: Path, handler: str, packed: bool, no_leaks: None) -> None:
    """Others, none, and others again."""
    made: list[int] = []

    def new() -> int:
        made.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        return made[-1]

    with loaded(tmp_path, handler, packed) as (frontend, load):
        for _ in range(ROUNDS):
            for queue in load.disk.queues:
                # In this order nothing is lost: what is told by the old one was told in time.
                call = queue.call_fd = new()
                frontend.set_vring_call(queue.index, call)
                frontend.set_vring_err(queue.index, new())
                frontend.set_vring_kick(queue.index, None)
                load.go_on(10)
                kick = new()
                frontend.set_vring_kick(queue.index, kick)
                queue.kick_fd = kick
                frontend.set_vring_err(queue.index, None)
            load.go_on()
    for fd in made:
        os.close(fd)


def test_enable(tmp_path: Path, handler: str, packed: bool, no_leaks: None) -> None:
    """A disabled ring waits with what it has, and the other one goes on."""
    with loaded(tmp_path, handler, packed) as (frontend, load):
        for turn in range(ROUNDS):
            frontend.set_vring_enable(turn % QUEUES, False)
            load.go_on(5)
            frontend.set_vring_enable(turn % QUEUES, True)
            load.go_on()
        for index in range(QUEUES):
            frontend.set_vring_enable(index, False)
        frontend.get_status()
        assert load.is_stuck() or load.is_stuck()  # what was done before may only be found now
        for index in range(QUEUES):
            frontend.set_vring_enable(index, True)
        load.go_on()


@pytest.mark.parametrize("slots", [True, False], ids=["slots", "table"])
def test_memory(tmp_path: Path, handler: str, packed: bool, slots: bool, no_leaks: None) -> None:
    """Regions come and go beside the one that is used, one by one or with a whole table."""
    without = 0 if slots else int(ProtocolF.CONFIGURE_MEM_SLOTS)
    with loaded(tmp_path, handler, packed, without) as (frontend, load):
        mine = tuple(load.disk.memory)
        for turn in range(ROUNDS):
            others = [Region.allocate(1 << 20, guest_addr=(8 + turn + i) << 32) for i in range(turn % 7)]
            frontend.set_mem_table(GuestMemory([*others[:3], *mine, *others[3:]]))
            load.go_on(20)
        frontend.set_mem_table(GuestMemory(mine))


def test_everything_at_once(tmp_path: Path, handler: str, packed: bool, no_leaks: None) -> None:
    """What is refused changes nothing; what is repeated changes nothing either."""
    with loaded(tmp_path, handler, packed) as (frontend, load):
        load.go_on()
        refused: list[Callable[[], None]] = [
            lambda: frontend.set_vring_num(0, 64),
            lambda: frontend.set_vring_base(0, 0),
            lambda: frontend.set_vring_num(QUEUES, 64),
            lambda: frontend.set_features(frontend.session.features ^ int(vhost.VirtioF.RING_PACKED)),
        ]
        rng = random.Random(2)
        for _ in range(4 * ROUNDS):
            with pytest.raises(vhost.VhostError):
                rng.choice(refused)()
            frontend.set_features(load.disk.negotiated)
            frontend.set_vring_enable(rng.randrange(QUEUES), True)
            load.go_on(10)
