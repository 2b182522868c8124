# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A virtio entropy driver in user space (VIRTIO 1.2, 5.4)."""

from __future__ import annotations

from vhost.drivers.base import Driver
from vhost.errors import ReplyTimeout
from vhost.ops import VhostOps


class Rng(Driver):
    """Reads random bytes from an entropy device."""

    MOST = 4096

    def __init__(
        self,
        ops: VhostOps,
        *,
        packed: bool | None = None,
        queue_size: int = 8,
        timeout: float | None = 30.0,
    ) -> None:
        self.timeout = timeout
        super().__init__(ops, packed=packed, queue_size=queue_size, data_size=self.MOST)
        self._view = self.memory.view(self.data_addr, self.MOST)

    def read(self, size: int) -> bytes:
        """``size`` bytes, by as many requests as it takes: a device may answer with fewer (5.4.6.2)."""
        (queue,) = self.queues
        data = b""
        while len(data) < size:
            some = min(self.MOST, size - len(data))
            queue.add((), [(self.data_addr, some)], None)
            queue.kick()
            if not queue.wait(self.timeout):
                raise ReplyTimeout(f"no {some} random bytes within {self.timeout} s")
            for _, written in queue.get_used_batch():
                data += bytes(self._view[:written])
        return data
