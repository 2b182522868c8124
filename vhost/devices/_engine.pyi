# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Queues served by threads that never take the GIL: what the engines of all devices share."""

from collections.abc import Sequence

from vhost.device_queue import DeviceQueue

__all__ = ["Engine"]

class Engine:
    """Worker threads, which run while they have queues. ``cpus``: where they run, one after the other and
    from the first again; empty: anywhere. ``of``: this one has no workers, but those of another, which stays
    until this one is gone; what is told of its queues is told here."""

    def __init__(
        self, workers: int, name: str, cpus: Sequence[int] = (), of: Engine | None = None
    ) -> None: ...
    @property
    def workers(self) -> int:
        """How many there are."""

    @property
    def idlest(self) -> int:
        """The worker that has the fewest queues, of all its engines."""

    @property
    def notice(self) -> int:
        """An eventfd that is signalled when a queue, or memory below one, broke, or misses a
        mapping. Nobody reads it: watch it edge-triggered."""

    def detach(self, queue: DeviceQueue) -> None:
        """Take it back, once what was popped is published."""

    def hold(self, queue: DeviceQueue) -> None:
        """Return when nothing uses the queue, nor what it translates with; and nothing will until
        ``release``. Cheaper than ``detach`` and ``attach``."""

    def release(self, queue: DeviceQueue, look: bool) -> None:
        """``look``: there may be work that no kick tells of."""
