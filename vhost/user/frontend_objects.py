# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a back-end shares with its front-end, the front-end's side: objects, shared memory regions, doorbells.

Checks what the back-end asks for, and keeps what came of it until the back-end takes it back, the device is
reset or the session ends. What a region is, is in vhost/shmem.pyx; who exports an object, in
shared_objects.py.
"""

from __future__ import annotations

import contextlib
import mmap
import uuid as _uuid

from vhost.errors import InactiveFeature, IncorrectFds, InvalidGuestMemory, InvalidMessage, InvalidState
from vhost.features import ProtocolF
from vhost.shmem import ShmemRegion
from vhost.user.frontend_base import FrontendBase
from vhost.user.messages import FrontendMsg as F
from vhost.user.payloads import U64, MMap, SharedObject, ShmemConfig, VringArea
from vhost.user.session import Message
from vhost.user.shared_objects import SharedObjects
from vhost.user.spec import Answer

PAGE = mmap.PAGESIZE
SHMEM_MAX = 1 << 40
"""Bytes of address space that a back-end may have for all its shared memory regions."""


class FrontendObjects(FrontendBase):
    """Set ``shared_objects`` to one table in all Frontends whose back-ends shall find each other's objects,
    and serve these Frontends in one thread."""

    _shared_objects: SharedObjects | None = None
    _shmem: dict[int, ShmemRegion] | None = None
    _host_notifiers: dict[int, mmap.mmap] | None = None

    # -- shared objects ----------------------------------------------------------------------------

    @property
    def shared_objects(self) -> SharedObjects:
        if self._shared_objects is None:
            self._shared_objects = SharedObjects()
        return self._shared_objects

    @shared_objects.setter
    def shared_objects(self, table: SharedObjects) -> None:
        old = self.shared_objects
        if table is old:
            return
        try:
            for uuid in old.of(self):
                table.add(uuid, self)
        except InvalidState:
            table.drop(self)
            raise
        old.drop(self)
        self._shared_objects = table

    def get_shared_object(self, uuid: _uuid.UUID) -> int | None:
        """The descriptor of an object that this back-end exports, for the caller to close; None if it has
        none. InvalidState in the middle of another request."""
        if self.session.outstanding:
            # A second request now would take the answer of the first.
            raise InvalidState("another request waits for its answer", request="GET_SHARED_OBJECT")
        reply = self._call(self.session.request(F.GET_SHARED_OBJECT, SharedObject(uuid)))
        if reply is None:
            return None
        fd = reply.take_fd()
        reply.close()
        return fd

    def _serve_shared_object_add(self, message: Message) -> None:
        self.shared_objects.add(message.payload.uuid, self)

    def _serve_shared_object_remove(self, message: Message) -> None:
        self.shared_objects.remove(message.payload.uuid, self)

    def _serve_shared_object_lookup(self, message: Message) -> Answer:
        """Asks the owner, whose back-end must answer while this one waits."""
        uuid = message.payload.uuid
        owner = self.shared_objects.owner(uuid)
        if owner is None:
            raise InvalidState(f"nobody exports object {uuid}", request=message.name)
        fd = owner.get_shared_object(uuid)
        if fd is None:
            raise InvalidState(f"the owner of object {uuid} does not have it", request=message.name)
        return Answer(U64(0), (fd,))

    # -- shared memory regions ---------------------------------------------------------------------

    @property
    def shmem(self) -> dict[int, ShmemRegion]:
        """The regions by their id; none before ``get_shmem_config``."""
        return dict(self._shmem or {})

    def get_shmem_config(self) -> tuple[int, ...]:
        """The sizes of the back-end's shared memory regions by their id, 0 for one that is not used. The
        regions are in ``shmem`` from now on, and the back-end may map files into them."""
        config: ShmemConfig = self._get(F.GET_SHMEM_CONFIG)
        sizes = config.sizes
        if self._shmem is not None:
            known = {shmid: region.size for shmid, region in self._shmem.items()}
            if known != {shmid: size for shmid, size in enumerate(sizes) if size}:
                raise InvalidMessage(f"sizes {sizes} are not those of before", request="GET_SHMEM_CONFIG")
            return sizes
        if any(size % PAGE for size in sizes) or sum(sizes) > SHMEM_MAX:
            text = f"sizes {sizes}: must be multiples of {PAGE}, and {SHMEM_MAX:#x} together at most"
            raise InvalidMessage(text, request="GET_SHMEM_CONFIG")
        self._shmem = {shmid: ShmemRegion(shmid, size) for shmid, size in enumerate(sizes) if size}
        return sizes

    def _shmem_region(self, message: Message) -> ShmemRegion:
        region = (self._shmem or {}).get(message.payload.shmid)
        if region is None:
            raise InvalidGuestMemory(f"{message.name}: no shared memory region {message.payload.shmid}")
        return region

    def _serve_shmem_map(self, message: Message) -> None:
        self._may_send_fds(message)
        region = self._shmem_region(message)
        asked: MMap = message.payload
        if asked.flags & ~MMap.READ_WRITE:
            raise InvalidMessage(f"flags {asked.flags:#x}, must be 0 or 1", request=message.name)
        region.map(
            asked.shm_offset,
            asked.len,
            message.fds[0],
            asked.fd_offset,
            writable=bool(asked.flags & MMap.READ_WRITE),
        )

    def _serve_shmem_unmap(self, message: Message) -> None:
        self._shmem_region(message).unmap(message.payload.shm_offset, message.payload.len)

    # -- host notifiers ----------------------------------------------------------------------------

    @property
    def host_notifiers(self) -> dict[int, mmap.mmap]:
        """By ring, the page that the guest may write its kicks to, instead of the eventfd."""
        return dict(self._host_notifiers or {})

    def _serve_vring_host_notifier_msg(self, message: Message) -> None:
        area: VringArea = message.payload
        if area.value >> 9:
            raise InvalidMessage(f"value {area.value:#x}, bits 9 to 63 must be 0", request=message.name)
        self._known_ring(area.index, message.name)
        if not area.nofd:
            self._may_send_fds(message)
            if area.size != PAGE or area.offset % PAGE or area.offset >> 63:
                raise InvalidMessage(
                    f"ring {area.index}: size {area.size:#x}, offset {area.offset:#x}: must be one page of"
                    f" {PAGE:#x} bytes",
                    request=message.name,
                )
        page = None if area.nofd else self._doorbell(area, message)
        self._drop_host_notifier(area.index)
        if page is not None:
            if self._host_notifiers is None:
                self._host_notifiers = {}
            self._host_notifiers[area.index] = page
        self._tell("host notifiers", self._tell_host_notifiers)

    def _doorbell(self, area: VringArea, message: Message) -> mmap.mmap:
        try:
            return mmap.mmap(message.fds[0], PAGE, offset=area.offset)
        except (OSError, ValueError) as error:
            raise IncorrectFds(
                f"ring {area.index}: the page at {area.offset:#x} cannot be mapped: {error}",
                request=message.name,
            ) from error

    def _tell_host_notifiers(self) -> None:
        """The back-end gave or took a host notifier; for a subclass."""

    def _drop_host_notifier(self, index: int) -> None:
        page = (self._host_notifiers or {}).pop(index, None)
        if page is not None:
            with contextlib.suppress(BufferError):  # somebody has a view of it, and unmaps it with that
                page.close()

    # -- what both need ----------------------------------------------------------------------------

    def _may_send_fds(self, message: Message) -> None:
        if not self._has(ProtocolF.BACKEND_SEND_FD):
            raise InactiveFeature("BACKEND_SEND_FD was not negotiated", request=message.name)

    def _device_was_reset(self) -> None:
        super()._device_was_reset()
        for region in (self._shmem or {}).values():
            region.unmap_all()
        for index in list(self._host_notifiers or {}):
            self._drop_host_notifier(index)

    def close(self) -> None:
        super().close()
        self.shared_objects.drop(self)
        for region in (self._shmem or {}).values():
            region.close()
        for index in list(self._host_notifiers or {}):
            self._drop_host_notifier(index)
