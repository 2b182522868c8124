# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A virtqueue as the driver sees it."""

from collections.abc import Sequence
from typing import Any, NamedTuple, final

from vhost.memory import GuestMemory

__all__ = ["DriverQueue", "Layout"]

class Layout(NamedTuple):
    """Offsets of a ring's areas in one block of ``size`` bytes, whose address is a multiple of 16."""

    desc: int
    avail: int
    used: int
    indirect: int
    size: int

@final
class DriverQueue:
    """A split or packed virtqueue, seen from the driver. One thread at a time.

    Buffers are ``(guest address, length)`` pairs; a token is any object, and comes back with the chain.
    """

    kick_fd: int
    call_fd: int

    def __init__(
        self,
        memory: GuestMemory,
        num: int,
        *,
        desc: int,
        avail: int,
        used: int,
        packed: bool = False,
        event_idx: bool = False,
        in_order: bool = False,
        base: int | None = None,
        indirect_addr: int | None = None,
        indirect_max: int = 0,
        kick: int = -1,
        call: int = -1,
        index: int = 0,
        name: str = "queue",
    ) -> None: ...
    @staticmethod
    def layout(num: int, *, packed: bool, indirect_max: int = 0) -> Layout: ...
    @property
    def index(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def num(self) -> int: ...
    @property
    def packed(self) -> bool: ...
    @property
    def event_idx(self) -> bool: ...
    @property
    def in_order(self) -> bool: ...
    @property
    def memory(self) -> GuestMemory: ...
    def add(
        self,
        readable: Sequence[tuple[int, int]],
        writable: Sequence[tuple[int, int]],
        token: object,
    ) -> int:
        """Make one chain available and return its id; BufferError while the ring is too full for it."""

    def add_batch(
        self, requests: Sequence[tuple[Sequence[tuple[int, int]], Sequence[tuple[int, int]], object]]
    ) -> int:
        """Make chains available together: how many of them fitted."""

    def kick_prepare(self) -> bool:
        """Does the device want a kick for what was added since the last question?"""

    def kick(self) -> bool:
        """Ask ``kick_prepare`` and signal the kick eventfd accordingly."""

    def get_used(self) -> tuple[Any, int] | None:
        """(token, bytes written) of a chain that came back."""

    def get_used_batch(self, n: int = 32) -> list[tuple[Any, int]]: ...
    def has_used(self) -> bool: ...
    def disable_callbacks(self) -> None: ...
    def enable_callbacks(self) -> bool:
        """Ask the device for calls. True: something is used already, and no call will come for it."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until something is used; False after ``timeout`` seconds without."""

    @property
    def free(self) -> int:
        """Descriptors that are free."""

    @property
    def in_flight(self) -> int:
        """Chains that the device has."""

    @property
    def base(self) -> int:
        """Where a device would start on this ring (SET_VRING_BASE)."""

    @property
    def resume_base(self) -> int:
        """Where one goes on that finds in the in-flight buffer what is out: after what was used."""

    @property
    def broken(self) -> str | None: ...
