# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vhost`` as users do not run it: with faults that a test has to notice, or with another request handler.

    python variant.py WHAT,... serve blk ...

``unlogged``: nothing is marked in the dirty log; ``unlogged-rings``: rings are not. ``python``: requests are
run in Python. ``late``: those that read LATE_SECTOR are run and given back when the ring is about to stop,
and "held" is said of each until then. ``hasty``: pages that post-copy has not brought yet are taken for
empty ones.
"""

from __future__ import annotations

import sys

from vhost.chain import Chain
from vhost.cli import main
from vhost.device_queue import DeviceQueue
from vhost.devices.blk import Blk
from vhost.devices.blk_python import run_request
from vhost.devices.rings import Ring
from vhost.memory import GuestMemory, Region
from vhost.user.log import LogHandlers
from vhost.user.payloads import VringState
from vhost.user.postcopy import PostcopyHandlers
from vhost.user.session import Message
from vhost.virtio_blk import HEADER, BlkType

LATE_SECTOR = 1 << 16
HELD: list[tuple[Blk, Chain]] = []


def forget_log(self: LogHandlers, ring: Ring) -> None:
    assert ring.queue is not None
    ring.queue.set_log(None)


def forget_ring_log(self: LogHandlers, ring: Ring) -> None:
    assert ring.queue is not None
    ring.queue.set_log(self._log if self._logs else None, ring=False)


def hold(self: Blk, queue: DeviceQueue) -> None:
    for chain in queue:
        kind, _, sector = HEADER.unpack(chain.read_at(0, HEADER.size))
        if kind == BlkType.IN and sector == LATE_SECTOR:
            HELD.append((self, chain))
            print("held", file=sys.stderr, flush=True)
        else:
            chain.finish(*run_request(self, chain))


def give_back(self: LogHandlers, message: Message) -> VringState:
    while HELD:
        device, chain = HELD.pop()
        chain.finish(*run_request(device, chain))
    return stop(self, message)


def take_for_empty(self: PostcopyHandlers, memory: GuestMemory, new: list[Region]) -> None:
    self._coming = memory


for what in sys.argv.pop(1).split(","):
    if what == "unlogged":
        LogHandlers._tell_log = forget_log  # type: ignore[method-assign]
    elif what == "unlogged-rings":
        LogHandlers._tell_log = forget_ring_log  # type: ignore[method-assign]
    elif what == "late":
        Blk.requestq = hold  # type: ignore[method-assign]
        stop = LogHandlers.get_vring_base
        LogHandlers.get_vring_base = give_back  # type: ignore[method-assign]
    elif what == "hasty":
        PostcopyHandlers._announce = take_for_empty  # type: ignore[method-assign]
    elif what == "python":
        sys.argv.append("--python")
    else:
        sys.exit(f"variant {what!r} is not known")
sys.exit(main())
