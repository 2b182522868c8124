# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A back-end that is killed and started again, over and over; runs as a program of its own.

    shuffled_blk.py SOCKET DISK QUEUES {sync,threads,io_uring,python,replay} [WITHOUT]

It forks a child that serves, says "pid N" on a line, and forks the next one when the child dies, without
the half second that a new interpreter takes. When a ring starts, the child says "again N": how many chains
it has to do again. The first three are the disk that everybody uses, by its `aio`. "python" is one that
completes its requests out of order and slowly, so that there are always some in flight. "replay" is such a
one with a defect: it does old writes again after they were completed.
"""

from __future__ import annotations

import os
import random
import sys
import time

from vhost.chain import Chain
from vhost.device_queue import DeviceQueue
from vhost.devices.blk import Blk
from vhost.devices.blk_python import run_request
from vhost.features import ProtocolF
from vhost.user.server import Server
from vhost.virtio_blk import HEADER, SECTOR, BlkType

WAITING = 8
"""Requests that it likes to have before it does one: the choice is then among so many."""
PATIENCE = 0.0005
BUDGET = 200
REPLAY_AFTER = 300
OUT = int(BlkType.OUT)


def tell(what: str, number: int) -> None:
    """A whole line at once, whatever kills us and however Python buffers."""
    os.write(1, f"{what} {number}\n".encode())


class TellingBlk(Blk):
    def start_queue(self, queue: DeviceQueue) -> bool:
        tell("again", queue.resubmits)
        return super().start_queue(queue)


class ShuffledBlk(TellingBlk):
    def __init__(self, path: str, queues: int, *, replay: bool) -> None:
        super().__init__(path, num_queues=queues, handler="python")
        self.waiting: dict[int, list[Chain]] = {index: [] for index in range(queues)}
        self.replay = replay
        self.first: dict[int, bytes] = {}  # of each sector that a write began at
        self.writes = 0

    def requestq(self, queue: DeviceQueue) -> None:
        waiting = self.waiting[queue.index]
        looks = 0
        for _ in range(BUDGET):
            more = queue.pop_batch(64)
            waiting += more
            if not waiting and not queue.enable_notification():
                return
            looks = 0 if more else looks + 1
            if len(waiting) < WAITING and looks < 3:
                time.sleep(PATIENCE)
            else:
                self.complete_one(queue)
        os.eventfd_write(queue.kick, 1)  # no kick will come for what is left

    def complete_one(self, queue: DeviceQueue) -> None:
        waiting = self.waiting[queue.index]
        if not waiting:
            return
        at = random.randrange(len(waiting))
        waiting[at], waiting[-1] = waiting[-1], waiting[at]
        chain = waiting.pop()
        if self.replay:
            self.do_again(chain)
        # Sometimes several become used at once: in a batch there is more to get wrong.
        status, written = run_request(self, chain)
        chain.write_at(chain.data_room, bytes([status]))
        queue.fill(chain, written + 1)
        if not waiting or random.random() < 0.5:
            queue.flush()
            queue.notify()

    def do_again(self, chain: Chain) -> None:
        data = chain.read_at(0, chain.readable_len)
        kind, _, sector = HEADER.unpack(data[: HEADER.size])
        if kind != OUT:
            return
        self.writes += 1
        old = self.first.setdefault(sector, data[HEADER.size :])
        if self.writes > REPLAY_AFTER and old != data[HEADER.size :]:
            # This one is written to where it was not: what is there now is newer.
            for other, stale in self.first.items():
                if other != sector:
                    os.pwrite(self.fd, stale, other * SECTOR)
                    break

    def stop_queue(self, queue: DeviceQueue) -> None:
        while self.waiting[queue.index] and not queue.broken:
            self.complete_one(queue)
        super().stop_queue(queue)


def live(path: str, disk: str, queues: int, kind: str, without: int) -> None:
    device = (
        ShuffledBlk(disk, queues, replay=kind == "replay")
        if kind in ("python", "replay")
        else TellingBlk(disk, num_queues=queues, aio=kind)
    )
    with Server(device, path, without=without) as server:
        server.serve_forever()


def main() -> None:
    path, disk, queues, kind = sys.argv[1:5]
    without = sum(int(ProtocolF[name]) for name in sys.argv[5:])
    while True:
        pid = os.fork()
        if not pid:
            live(path, disk, int(queues), kind, without)
            return
        tell("pid", pid)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
