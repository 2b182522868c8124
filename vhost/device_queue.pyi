# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A virtqueue as the device sees it."""

from collections.abc import Iterator, Sequence
from typing import final

from vhost._iotlb import Iotlb
from vhost.chain import Chain
from vhost.dirty_log import DirtyLog
from vhost.inflight import InflightRegion
from vhost.memory import GuestMemory

__all__ = ["DeviceQueue"]

@final
class DeviceQueue:
    """A split or packed virtqueue, seen from the device.

    ``for chain in queue`` serves what is there: notifications are off meanwhile, the driver is told
    once at the end, and the loop ends after ``budget`` chains at most. If work is left then, the queue
    writes to its own ``kick`` eventfd, so that whoever polls it comes back after the other queues.
    A loop that is left early (``break``, an exception) re-arms and notifies too; work that is left is
    then the caller's to remember (``has_work``).

    One thread at a time.
    """

    kick: int
    call: int
    err: int
    budget: int

    def __init__(
        self,
        memory: GuestMemory,
        num: int,
        desc: int,
        avail: int,
        used: int,
        *,
        packed: bool = False,
        indirect: bool = True,
        event_idx: bool = False,
        in_order: bool = False,
        big_endian: bool = False,
        base: int | None = None,
        user_addresses: bool = False,
        iotlb: Iotlb | None = None,
        kick: int = -1,
        call: int = -1,
        call_vq: int | None = None,
        err: int = -1,
        inflight: InflightRegion | None = None,
        index: int = 0,
        name: str = "queue",
    ) -> None:
        """``packed``: ``avail`` is the driver's and ``used`` the device's event suppression area.

        ``big_endian``: a split ring of a legacy driver in that byte order (VIRTIO 2.7.3), as are then what
        its requests and its configuration space have of numbers: those are the device's business.

        ``kick``, ``call`` and ``err`` are eventfds that stay the caller's (-1: none). With ``call_vq``,
        ``call`` is a VDUSE device (/dev/vduse/NAME), and the driver is told by an interrupt of this queue
        of it.
        ``iotlb``: all addresses are IOVAs. The ring has to be mapped; what its chains need need not be.
        ``base`` as in SET_VRING_BASE; None starts where a split ring's used index stands.
        ``inflight``: note in its part ``index`` what is in flight. If a predecessor did, ``base`` means
        nothing: the queue goes on where that one was, and what it left is popped first, in its order.
        InvalidQueue if what it says cannot be.
        """

    @property
    def index(self) -> int: ...
    @property
    def call_vq(self) -> int | None: ...
    @property
    def name(self) -> str: ...
    @property
    def num(self) -> int: ...
    @property
    def packed(self) -> bool: ...
    @property
    def indirect(self) -> bool: ...
    @property
    def event_idx(self) -> bool: ...
    @property
    def in_order(self) -> bool: ...
    @property
    def big_endian(self) -> bool: ...
    read_only: bool
    """The device only reads this queue: a writable buffer before a readable one does not break it,
    but is taken for readable. Set before anything is popped."""

    @property
    def memory(self) -> GuestMemory: ...
    def __iter__(self) -> Iterator[Chain]: ...
    def pop(self) -> Chain | None: ...
    def pop_batch(self, n: int = 32) -> list[Chain]: ...
    def unpop(self, chain: Chain) -> None:
        """Put the chain that was popped last back, to be popped again."""

    def push(self, chain: Chain, written: int | None = None) -> None:
        """Give a chain back, notifying the driver if it wants that.

        ``written`` is how many bytes the device wrote; None: ``chain.written``.

        Within ``for chain in queue`` the notification waits for the end of the loop.
        """

    def push_batch(self, chains: Sequence[Chain], written: Sequence[int] | None = None) -> None:
        """Give chains back together, with one notification at most."""

    def fill(self, chain: Chain, written: int | None = None) -> None:
        """Like push, but nothing is published before ``flush``, and nobody notified before ``notify``."""

    def flush(self) -> None: ...
    def should_notify(self) -> bool:
        """Must the driver be told about what was published since the last question?"""

    def notify(self) -> bool:
        """Ask ``should_notify`` and signal ``call`` accordingly."""

    def enable_notification(self) -> bool:
        """Ask the driver for kicks. True: work is pending already, and no kick will come for it."""

    def disable_notification(self) -> None: ...
    def has_work(self) -> bool: ...
    @property
    def base(self) -> int:
        """For GET_VRING_BASE: where a successor goes on, after what was published."""

    @property
    def in_flight(self) -> int:
        """Ring slots of chains that were popped and are not published yet."""

    @property
    def inflight(self) -> InflightRegion | None:
        """Where it is noted what is in flight."""

    @property
    def resubmits(self) -> int:
        """Chains of a predecessor that are still to be popped again."""

    @property
    def device_area_size(self) -> int:
        """Bytes of what the device writes to: the used ring, or a packed ring's device event area."""

    def set_log(
        self, log: DirtyLog | None, *, ring: bool = False, used: int | None = None, fd: int = -1
    ) -> None:
        """Mark in this log, from now on, the pages that the device writes; None: no longer. Chains that are
        out are marked when they come back.

        ``ring``: what is written to the ring, too. ``used``: the guest address under which its used ring (or
        device event area) is marked; None: where it is. ``fd``: an eventfd, the caller's, to be signalled
        after marks. Raises InvalidLogAddress if the log does not cover the ring; nothing is logged then. A
        buffer that it does not cover breaks the queue.
        """

    @property
    def dirty_log(self) -> DirtyLog | None: ...
    def mark_written(self, addr: int, size: int) -> None:
        """For a device that writes to guest memory otherwise than through a chain, after it did: ``size``
        bytes at a guest-physical address. Chains see to themselves: what ``write`` wrote, what a buffer of
        ``writable`` covers, and what ``push`` was told."""

    @property
    def broken(self) -> str | None:
        """Why nothing more is processed, or None."""

    @property
    def missed(self) -> bool:
        """It is broken because an address is not in memory. With memory where it is, a new queue from
        ``base`` on would find the chain again."""

    def mark_broken(self, reason: str) -> None:
        """For a device that got a chain which is no request and cannot even be answered."""

    @property
    def closed(self) -> bool: ...
    def set_memory(self, memory: GuestMemory) -> None:
        """Go on with another memory table; chains that are out keep the one that they came from.

        The ring must still be in memory (InvalidQueue, and nothing changes), but for one with an IOTLB, which
        has to have the memory before: see ``translate``.
        """

    def translate(self) -> list[tuple[int, int]]:
        """With an IOTLB that changed: find the ring anew. Returns what the ring itself lacks, IOVAs and
        access; while that is something the queue looks empty, touches nothing of the ring, and keeps what
        is pushed for later. Nothing else may use the queue meanwhile."""

    def retry(self) -> None:
        """What the next chain misses may be mapped now: look again. Until then the queue looks empty."""

    def deny(self, reason: str) -> None:
        """What it misses it will never get: it is broken."""

    @property
    def miss(self) -> tuple[int, int] | None:
        """The IOVA, and the access that lacks, for which the next chain waits."""

    @property
    def iotlb(self) -> Iotlb | None: ...
    def close(self) -> None:
        """Process nothing more: chains that come back later are refused, never published."""
