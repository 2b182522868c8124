# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a vhost-user session asks of its front-end for the device, and what the front-end asks of that:
shared memory regions, shared objects, doorbells.

Turns the calls of devices/requests.py into messages on the back-end's channel. Keeps nothing: what is
mapped or shared is the front-end's to know.
"""

from __future__ import annotations

import os
import uuid as _uuid
from collections.abc import Sequence

from vhost.devices.requests import Done, Found, FrontendRequests
from vhost.errors import InactiveFeature, InvalidMessage
from vhost.features import ProtocolF
from vhost.user.channel import Then
from vhost.user.handlers import Handlers
from vhost.user.messages import BackendMsg, FrontendMsg
from vhost.user.payloads import EMPTY, NOFD, Empty, MMap, Payload, SharedObject, ShmemConfig, VringArea
from vhost.user.session import Message
from vhost.user.spec import Answer

_SEND_FD = int(ProtocolF.BACKEND_SEND_FD)
_SHMEM = int(ProtocolF.SHMEM_MAP)
_SHARED = int(ProtocolF.SHARED_OBJECT)
_NOTIFIER = int(ProtocolF.HOST_NOTIFIER)


class ObjectHandlers(Handlers, FrontendRequests):
    """Offered as far as the device says that it has use for it."""

    def offered_protocol_features(self) -> int:
        offered = super().offered_protocol_features()
        device = self.device
        if any(device.shmem_sizes):
            offered |= _SHMEM | _SEND_FD
        if device.shares_objects:
            offered |= _SHARED | _SEND_FD
        if device.has_host_notifiers:
            offered |= _NOTIFIER | _SEND_FD
        return offered

    def served_requests(self) -> set[int]:
        serves = super().served_requests()
        if not any(self.device.shmem_sizes):
            serves -= {FrontendMsg.GET_SHMEM_CONFIG}
        if not self.device.shares_objects:
            serves -= {FrontendMsg.GET_SHARED_OBJECT}
        return serves

    # -- requests of the front-end -----------------------------------------------------------------

    def get_shmem_config(self, message: Message) -> ShmemConfig:
        return ShmemConfig(tuple(self.device.shmem_sizes))

    def get_shared_object(self, message: Message) -> Empty | Answer:
        if not isinstance(message.payload, SharedObject):
            # QEMU forgets to count the UUID, which then is not there.
            raise InvalidMessage("no UUID", request=message.name)
        fd = self.device.get_shared_object(message.payload.uuid)
        return EMPTY if fd is None else Answer(EMPTY, (os.dup(fd),))

    # -- requests of the device --------------------------------------------------------------------

    def _ask(self, number: BackendMsg, payload: Payload, fds: Sequence[int], then: Then | None) -> None:
        if fds and not self.session.protocol_features & _SEND_FD:
            raise InactiveFeature("BACKEND_SEND_FD was not negotiated", request=number.name)
        if self.channel is None:
            raise InactiveFeature("the front-end gave no channel for requests", request=number.name)
        self.channel.request(number, payload, fds, then=then)

    def shmem_map(
        self,
        shmid: int,
        shm_offset: int,
        size: int,
        fd: int,
        fd_offset: int,
        writable: bool,
        then: Done | None,
    ) -> None:
        mapping = MMap(shmid, fd_offset, shm_offset, size, MMap.READ_WRITE if writable else 0)
        self._ask(BackendMsg.BACKEND_SHMEM_MAP, mapping, [fd], _done(then))

    def shmem_unmap(self, shmid: int, shm_offset: int, size: int, then: Done | None) -> None:
        mapping = MMap(shmid, 0, shm_offset, size, 0)
        self._ask(BackendMsg.BACKEND_SHMEM_UNMAP, mapping, [], _done(then))

    def share_object(self, uuid: _uuid.UUID, then: Done | None) -> None:
        self._ask(BackendMsg.BACKEND_SHARED_OBJECT_ADD, SharedObject(uuid), [], _done(then))

    def unshare_object(self, uuid: _uuid.UUID, then: Done | None) -> None:
        self._ask(BackendMsg.BACKEND_SHARED_OBJECT_REMOVE, SharedObject(uuid), [], _done(then))

    def lookup_object(self, uuid: _uuid.UUID, then: Found) -> None:
        def answered(answer: Message | None) -> None:
            if answer is None:
                then(None)
            elif answer.status:
                then(None)  # and a descriptor that came all the same is closed with the message
            else:
                then(answer.take_fd())

        self._ask(BackendMsg.BACKEND_SHARED_OBJECT_LOOKUP, SharedObject(uuid), [], answered)

    def host_notifier(self, index: int, fd: int | None, offset: int, size: int, then: Done | None) -> None:
        area = VringArea(index | (NOFD if fd is None else 0), size, offset)
        fds = [] if fd is None else [fd]
        self._ask(BackendMsg.BACKEND_VRING_HOST_NOTIFIER_MSG, area, fds, _done(then))


def _done(then: Done | None) -> Then | None:
    if then is None:
        return None
    return lambda answer: then(None if answer is None else not answer.status)
