# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""VhostOps: the control interface that every vhost back-end offers to whoever shares the rings.

A vhost-user socket, the kernel's vhost devices and vDPA all take the same requests under different
names; a driver (``vhost.drivers``) speaks this interface and runs on each of them. It knows nothing
of how a request travels.

All ring addresses here are *guest* addresses. What goes to the back-end instead of them (the address
in the front-end's process for vhost-user and kernel vhost, an IOVA for vDPA) is the transport's
business: it was told the memory with ``set_mem_table`` and translates.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Self

from vhost.errors import InactiveFeature, UnsupportedRequest

if TYPE_CHECKING:
    from vhost.dirty_log import DirtyLog
    from vhost.memory import GuestMemory


class InflightBuffer:
    """A back-end's notes of what it has in flight. They survive it: this owns the descriptor."""

    def __init__(self, fd: int, size: int, offset: int, num_queues: int, queue_size: int) -> None:
        self.fd = fd
        self.size = size
        """Bytes, from ``offset`` in the file."""
        self.offset = offset
        self.num_queues = num_queues
        self.queue_size = queue_size

    def close(self) -> None:
        """Any number of times."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<InflightBuffer of {self.num_queues} queues of {self.queue_size}, fd {self.fd}>"


class VhostOps(ABC):
    """One back-end. Requests return when the back-end has them; what it refuses raises VhostError."""

    #: Features that have to do with how the device is reached, not with what it does: every driver
    #: acknowledges those of them that are offered.
    transport_features: ClassVar[int] = 0
    #: Called when the device's configuration space changed: from ``step()``, or at the end of the
    #: request during which the news came. It may make requests of its own.
    on_config_change: Callable[[], None] | None = None

    # ------------------------------------------------------------------ the device

    @abstractmethod
    def get_features(self) -> int:
        """The virtio feature bits that the device offers, without the transport's own."""

    @abstractmethod
    def set_features(self, features: int) -> None:
        """Acknowledge these; all of them must have been offered."""

    @abstractmethod
    def set_owner(self) -> None:
        """Begin the session. A transport that did so itself when it connected ignores this."""

    @abstractmethod
    def reset_owner(self) -> None:
        """Deprecated in vhost-user, there for kernel vhost: give up the session's ownership."""

    @abstractmethod
    def get_queue_num(self) -> int:
        """How many virtqueues the back-end serves at most."""

    @abstractmethod
    def get_config(self, offset: int, size: int) -> bytes:
        """``size`` bytes of the configuration space."""

    @abstractmethod
    def set_config(self, offset: int, data: bytes) -> None:
        """Write to the configuration space, as the guest would."""

    @abstractmethod
    def get_status(self) -> int:
        """The virtio device status; what was set last where the back-end does not keep one."""

    @abstractmethod
    def set_status(self, status: int) -> None:
        """Set the virtio device status (0 resets). Kept here where the back-end does not want it."""

    @abstractmethod
    def reset_device(self) -> None:
        """Stop everything and return the device to its initial state."""

    # ------------------------------------------------------------------ memory

    @abstractmethod
    def set_mem_table(self, memory: GuestMemory) -> None:
        """Share this memory, and no longer what was shared before and is not part of it."""

    # ------------------------------------------------------------------ rings

    @abstractmethod
    def set_vring_num(self, index: int, num: int) -> None:
        """The ring's size."""

    @abstractmethod
    def set_vring_addr(
        self, index: int, desc: int, avail: int, used: int, *, log: int = 0, flags: int = 0
    ) -> None:
        """Where the ring's areas are: guest addresses. Packed: ``avail`` is the driver's event area,
        ``used`` the device's."""

    @abstractmethod
    def set_vring_base(self, index: int, base: int) -> None:
        """Where to go on: split the next available index, packed both indices with their wrap bits."""

    @abstractmethod
    def get_vring_base(self, index: int) -> int:
        """Stop the ring and say where a successor goes on."""

    @abstractmethod
    def set_vring_kick(self, index: int, fd: int | None) -> None:
        """The eventfd that tells the device of new buffers; None: the device is to poll."""

    @abstractmethod
    def set_vring_call(self, index: int, fd: int | None) -> None:
        """The eventfd that tells the driver of used buffers; None: the driver polls."""

    @abstractmethod
    def set_vring_err(self, index: int, fd: int | None) -> None:
        """The eventfd that tells the driver of a broken ring; None: nobody listens."""

    @abstractmethod
    def set_vring_enable(self, index: int, enable: bool) -> None:
        """Let the device process the ring, or not."""

    # ------------------------------------------------------------------ migration

    def start_log(self, log: DirtyLog) -> None:
        """Mark in ``log``, from now on, the pages that the device writes: buffers, and the used areas of the
        rings. It has to cover the memory; UnsupportedRequest where the back-end cannot."""
        raise UnsupportedRequest(f"{type(self).__name__} keeps no dirty log ({log!r})")

    def stop_log(self) -> None:
        """Mark no more pages."""
        raise UnsupportedRequest(f"{type(self).__name__} keeps no dirty log")

    # ------------------------------------------------------------------ what is in flight

    @property
    def tracks_inflight(self) -> bool:
        """Can the back-end note what it has in flight, for the one that comes after it?"""
        return False

    def get_inflight_fd(self, num_queues: int, queue_size: int) -> InflightBuffer | None:
        """A new buffer for these notes, which is the caller's; None if the back-end has none. For new rings
        that start from now on."""
        return None

    def set_inflight_fd(self, buffer: InflightBuffer) -> None:
        """Go on with what is in flight according to this buffer. While no ring runs; again whenever rings
        that were stopped are to start again."""
        raise InactiveFeature("the back-end does not track what is in flight")

    # ------------------------------------------------------------------ events, and the end

    @abstractmethod
    def fileno(self) -> int:
        """A file descriptor that is readable when ``step()`` has something to do."""

    @abstractmethod
    def step(self) -> bool:
        """Handle what the back-end says by itself. Never blocks; False once the back-end is gone."""

    @abstractmethod
    def close(self) -> None:
        """End the session. Any number of times."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
