# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The IOMMU, as a front-end is one (vhost-user, "IOMMU support").

Answers what the back-end misses, at once and also while a request of ours waits: that request may be the
one that needs the mapping. What is mapped to what is the user's business; without any, IOVAs are guest
addresses.
"""

from __future__ import annotations

from collections.abc import Callable

from vhost.errors import InvalidGuestMemory, InvalidMessage, RequestFailed
from vhost.features import ProtocolF, VirtioF
from vhost.iotlb import NO_ACCESS, Access, IotlbMessage, IotlbType
from vhost.memory import GuestMemory
from vhost.user.frontend_base import FrontendBase
from vhost.user.messages import FrontendMsg as F
from vhost.user.payloads import Iotlb
from vhost.user.session import Message

_ACCESS_PLATFORM = int(VirtioF.ACCESS_PLATFORM)


class FrontendIotlb(FrontendBase):
    _guest_memory: GuestMemory

    transport_features = _ACCESS_PLATFORM
    behind_iommu: bool = False
    """Shall drivers acknowledge ACCESS_PLATFORM, if the back-end offers it? From then on, ring addresses and
    all that descriptors say are IOVAs."""

    on_iotlb_miss: Callable[[IotlbMessage], None] | None = None
    """Called for each miss, in the middle of whatever runs. It answers with ``iotlb_update``, now or later:
    the ring waits until then, and somebody has to call ``step()`` when ``fileno()`` is readable. VhostError
    tells the back-end that there is no such mapping. None: all of the memory table is mapped at its guest
    addresses, without waiting for misses."""
    on_iotlb_access_fail: Callable[[IotlbMessage], None] | None = None
    """The back-end may not access what it has to in this way, and gave the ring up. Called when no request
    waits."""

    @property
    def _hidden_features(self) -> int:
        return 0 if self.behind_iommu else _ACCESS_PLATFORM

    @property
    def _translates(self) -> bool:
        """Are the addresses that we send IOVAs?"""
        return bool(self.session.features & _ACCESS_PLATFORM)

    def iotlb_update(self, iova: int, size: int, user_addr: int, access: Access = Access.RW) -> None:
        """Map ``size`` bytes at ``iova`` to a user address of the memory table. RequestFailed: they are
        not in the back-end's memory."""
        if self._has(ProtocolF.GPA_ADDRESSES):
            user_addr = self._guest_memory.user_to_guest(user_addr)
        self._send_iotlb(IotlbType.UPDATE, iova, size, user_addr, access)

    def iotlb_invalidate(self, iova: int, size: int) -> None:
        """Unmap. When this returns nothing is accessed there any more; the back-end waits, with a miss, when
        it needs it again."""
        self._send_iotlb(IotlbType.INVALIDATE, iova, size, 0, NO_ACCESS)

    def _send_iotlb(self, kind: IotlbType, iova: int, size: int, user_addr: int, access: Access) -> None:
        payload = Iotlb(iova, size, user_addr, int(access), int(kind))
        # It is answered in any case; DPDK's vhost wants to be asked all the same, as QEMU does.
        asks = True if self._has(ProtocolF.REPLY_ACK) else None
        reply = self._call(self.session.request(F.IOTLB_MSG, payload, need_reply=asks))
        assert reply is not None  # says the message table
        status = int(reply.payload.value)
        if status:
            raise RequestFailed(
                f"{kind.name} of IOVA {iova:#x}, size {size:#x}: the peer answered with failure: {status:#x}",
                request=F.IOTLB_MSG.name,
                status=status,
            )

    def _serve_iotlb_msg(self, message: Message) -> None:
        asked: Iotlb = message.payload
        if asked.perm > Access.RW:
            raise InvalidMessage(f"access {asked.perm:#x}, limit {int(Access.RW):#x}", request=message.name)
        if asked.type == IotlbType.MISS:
            miss = IotlbMessage(IotlbType.MISS, asked.iova, access=Access(asked.perm))
            (self.on_iotlb_miss or self._map_guest_address)(miss)
        elif asked.type == IotlbType.ACCESS_FAIL:
            fail = IotlbMessage(IotlbType.ACCESS_FAIL, asked.iova, access=Access(asked.perm))
            if self.on_iotlb_access_fail is not None:
                callback = self.on_iotlb_access_fail
                self._tell("access fail", lambda: callback(fail))
        else:
            raise InvalidMessage(
                f"type {asked.type}: {IotlbType.MISS} is a miss, {IotlbType.ACCESS_FAIL} an access failure",
                request=message.name,
            )

    def _map_memory(self, memory: GuestMemory) -> None:
        """The back-end has this memory now."""
        if self._translates and self.on_iotlb_miss is None:
            for region in memory:
                self.iotlb_update(region.guest_addr, region.size, region.user_addr)

    def _map_guest_address(self, miss: IotlbMessage) -> None:
        for region in self._guest_memory:
            if region.guest_addr <= miss.iova < region.guest_addr + region.size:
                self.iotlb_update(region.guest_addr, region.size, region.user_addr)
                return
        raise InvalidGuestMemory(f"IOTLB miss: nothing is mapped at IOVA {miss.iova:#x}")
