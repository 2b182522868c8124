# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a device asks of its front-ends: memory to map, objects to share, doorbells.

Data and calls only: a session that can carry them (vhost-user's) is a ``FrontendRequests``, and others are
not asked. All of it is for the thread that steps the session, and for a device whose rings run: a suspended
one has to be silent (vhost-user, "Suspended device state"), so ask from ``start_queue`` on.
"""

from __future__ import annotations

import uuid as _uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

from vhost.errors import InvalidState

Done = Callable[[bool | None], None]
"""Called with whether the front-end did it; None: it will not say."""
Found = Callable[[int | None], None]
"""Called with the object's descriptor, which the called one closes; None: there is none."""


class FrontendRequests(ABC):
    """A session whose front-end takes requests. Each raises InactiveFeature if what it needs was not
    negotiated, and tells ``then`` from a later step."""

    @abstractmethod
    def shmem_map(
        self,
        shmid: int,
        shm_offset: int,
        size: int,
        fd: int,
        fd_offset: int,
        writable: bool,
        then: Done | None,
    ) -> None: ...

    @abstractmethod
    def shmem_unmap(self, shmid: int, shm_offset: int, size: int, then: Done | None) -> None: ...

    @abstractmethod
    def share_object(self, uuid: _uuid.UUID, then: Done | None) -> None: ...

    @abstractmethod
    def unshare_object(self, uuid: _uuid.UUID, then: Done | None) -> None: ...

    @abstractmethod
    def lookup_object(self, uuid: _uuid.UUID, then: Found) -> None: ...

    @abstractmethod
    def host_notifier(
        self, index: int, fd: int | None, offset: int, size: int, then: Done | None
    ) -> None: ...


class Requests:
    """The part of a Device that asks. Every session that runs its rings is asked; descriptors stay the
    caller's."""

    #: Sizes of the shared memory regions (VIRTIO 2.10) by their id, multiples of the page size; 0: unused.
    #: They may not change while there are sessions.
    shmem_sizes: tuple[int, ...] = ()
    #: The device exports objects, or looks for those of others: see ``get_shared_object``.
    shares_objects: bool = False
    #: The device has doorbells that a guest may write to directly: see ``offer_host_notifier``.
    has_host_notifiers: bool = False

    def _running_sessions(self) -> Iterable[object]:
        """Those whose rings run."""
        return ()

    def _asked(self, what: str) -> Iterable[FrontendRequests]:
        sessions = [session for session in self._running_sessions() if isinstance(session, FrontendRequests)]
        if not sessions:
            raise InvalidState(f"{what}: no vhost-user session runs the rings of {type(self).__name__}")
        return sessions

    def shmem_map(
        self,
        shmid: int,
        shm_offset: int,
        size: int,
        fd: int,
        fd_offset: int = 0,
        *,
        writable: bool = False,
        then: Done | None = None,
    ) -> None:
        """Have a part of a file appear in shared memory region ``shmid``, where nothing is yet."""
        for session in self._asked("SHMEM_MAP"):
            session.shmem_map(shmid, shm_offset, size, fd, fd_offset, writable, then)

    def shmem_unmap(self, shmid: int, shm_offset: int, size: int, *, then: Done | None = None) -> None:
        """The whole of what was mapped there goes away."""
        for session in self._asked("SHMEM_UNMAP"):
            session.shmem_unmap(shmid, shm_offset, size, then)

    def share_object(self, uuid: _uuid.UUID, *, then: Done | None = None) -> None:
        """Others may find this object from now on; ``get_shared_object`` has to know it."""
        for session in self._asked("SHARED_OBJECT_ADD"):
            session.share_object(uuid, then)

    def unshare_object(self, uuid: _uuid.UUID, *, then: Done | None = None) -> None:
        for session in self._asked("SHARED_OBJECT_REMOVE"):
            session.unshare_object(uuid, then)

    def lookup_object(self, uuid: _uuid.UUID, then: Found) -> None:
        """Ask for an object that some device exports."""
        for session in self._asked("SHARED_OBJECT_LOOKUP"):
            session.lookup_object(uuid, then)

    def get_shared_object(self, uuid: _uuid.UUID) -> int | None:
        """The descriptor of an object that this device exports, which stays the device's; None: no such
        object."""
        return None

    def offer_host_notifier(
        self, index: int, fd: int, offset: int, size: int, *, then: Done | None = None
    ) -> None:
        """The guest may write its kicks of a queue to this page of a file; ``size`` is one page."""
        for session in self._asked("VRING_HOST_NOTIFIER_MSG"):
            session.host_notifier(index, fd, offset, size, then)

    def withdraw_host_notifier(self, index: int, *, then: Done | None = None) -> None:
        for session in self._asked("VRING_HOST_NOTIFIER_MSG"):
            session.host_notifier(index, None, 0, 0, then)
