# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Load on a block device, through our driver, that knows what the disk has to hold."""

from __future__ import annotations

import random
from pathlib import Path

from vhost.drivers import Blk

BLOCK = 8
"""Sectors of a request."""


class Load:
    """Random reads and writes, each of a block that no other request in flight touches, and what the
    disk has to hold. Each block says who wrote it, so that a request done twice or on stale memory shows."""

    def __init__(self, disk: Blk, seed: int = 1) -> None:
        self.disk = disk
        self.rnd = random.Random(seed)
        self.blocks = disk.capacity // BLOCK
        self.content = dict.fromkeys(range(self.blocks), b"")
        self.busy: set[int] = set()
        self.done = 0
        self.queues = len(disk.queues)

    def fill(self) -> None:
        for queue in range(self.queues):
            while True:
                block = self.rnd.randrange(self.blocks)
                if block in self.busy:
                    continue
                try:
                    if self.rnd.random() < 0.5 or not self.content[block]:
                        data = self.rnd.randbytes(BLOCK * 512)
                        self.disk.submit_write(block * BLOCK, data, (block, data), queue=queue)
                    else:
                        self.disk.submit_read(block * BLOCK, BLOCK, (block, None), queue=queue)
                except BufferError:
                    break
                self.busy.add(block)

    def reap(self, *, wait: bool = False) -> int:
        done = self.disk.poll(0.0)
        if wait and not done:
            busiest = max(range(self.queues), key=lambda q: len(self.disk._flying[q]))
            done = self.disk.poll(10.0, queue=busiest)
            assert done, "requests got lost"
        for one in done:
            assert one.error is None
            block, data = one.token
            self.busy.remove(block)
            if data is None:
                assert one.data == self.content[block]
            else:
                self.content[block] = data
        self.done += len(done)
        return len(done)

    def drain(self) -> None:
        while self.disk.in_flight:
            self.reap(wait=True)
        assert not self.busy

    def check(self, image: Path) -> None:
        self.drain()
        stored = image.read_bytes()
        for block, data in self.content.items():
            if data:
                assert stored[block * BLOCK * 512 : (block + 1) * BLOCK * 512] == data
