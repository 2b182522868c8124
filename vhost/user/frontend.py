# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Frontend: VhostOps over a vhost-user session.

Requests block until the back-end has answered, or until ``timeout``; ``fileno()`` and ``step()`` are
for what the back-end says by itself, on the channel that SET_BACKEND_REQ_FD gave it.
"""

from __future__ import annotations

from vhost.errors import InactiveFeature, InvalidGuestMemory, InvalidMessage, RequestFailed
from vhost.features import ProtocolF, VhostF
from vhost.memory import GuestMemory, Region
from vhost.user.frontend_base import WANTED
from vhost.user.frontend_inband import FrontendInband
from vhost.user.frontend_inflight import FrontendInflight
from vhost.user.frontend_iotlb import FrontendIotlb
from vhost.user.frontend_log import FrontendLog
from vhost.user.frontend_objects import FrontendObjects
from vhost.user.frontend_postcopy import FrontendPostcopy
from vhost.user.frontend_state import FrontendState
from vhost.user.messages import FrontendMsg as F
from vhost.user.payloads import (
    U64,
    Config,
    CryptoSession,
    MemoryRegion,
    MemTable,
    SingleRegion,
    VringAddr,
    VringFd,
    VringState,
)

__all__ = ["WANTED", "Frontend"]

MEM_TABLE_REGIONS = 8
"""How many regions SET_MEM_TABLE can carry."""

# Plain integers: an operation on an IntFlag costs as much as a system call.
_PROTOCOL_FEATURES = int(VhostF.PROTOCOL_FEATURES)
_TRANSPORT = _PROTOCOL_FEATURES | int(VhostF.LOG_ALL)
_MQ = int(ProtocolF.MQ)


class Frontend(
    FrontendIotlb,
    FrontendLog,
    FrontendState,
    FrontendPostcopy,
    FrontendInband,
    FrontendInflight,
    FrontendObjects,
):
    """A session with a back-end, negotiated as far as the transport goes.

    ``protocol_features`` is what both sides have; ``offered_features`` what GET_FEATURES said.
    """

    _status = 0
    _memory: tuple[Region, ...] = ()
    _guest_memory = GuestMemory()

    def get_features(self) -> int:
        return self.offered_features & ~_TRANSPORT & ~self._hidden_features

    def set_features(self, features: int) -> None:
        features = self._features_to_send(features) | (self.offered_features & _PROTOCOL_FEATURES)
        self._send(F.SET_FEATURES, U64(features))
        self.session.features = features
        if self.channel is not None:
            self.channel.session.features = features

    def set_owner(self) -> None:
        """Done when the session began."""

    def reset_owner(self) -> None:
        self._send(F.RESET_OWNER)

    def get_queue_num(self) -> int:
        if not self.offered_protocol_features & _MQ:
            raise InactiveFeature("the back-end does not say how many queues it has", request="GET_QUEUE_NUM")
        return int(self._get(F.GET_QUEUE_NUM).value)

    def get_config(self, offset: int, size: int) -> bytes:
        request = Config(offset, size, 0, bytes(size))
        reply = self._get(F.GET_CONFIG, request)
        if not isinstance(reply, Config) or len(reply.payload) != size:
            raise InvalidMessage(f"no {size} bytes of configuration at {offset}", request="GET_CONFIG")
        return reply.payload

    def set_config(self, offset: int, data: bytes) -> None:
        self._send(F.SET_CONFIG, Config(offset, len(data), 0, data))

    def get_status(self) -> int:
        return int(self._get(F.GET_STATUS).value) if self._has(ProtocolF.STATUS) else self._status

    def set_status(self, status: int) -> None:
        if self._has(ProtocolF.STATUS):
            self._send(F.SET_STATUS, U64(status))
        self._status = status
        if not status and self._has(ProtocolF.RESET_DEVICE):
            # As QEMU has it: a status of 0 alone may be a pause.
            self.reset_device()
        elif not status:
            self._device_was_reset()

    def reset_device(self) -> None:
        self._send(F.RESET_DEVICE)
        self._device_was_reset()

    def net_set_mtu(self, mtu: int) -> None:
        """Tell a network back-end the MTU, 68 to 65535; needs protocol feature MTU."""
        if not 68 <= mtu <= 65535:
            raise ValueError(f"mtu {mtu}, must be 68 to 65535")
        self._send(F.NET_SET_MTU, U64(mtu))

    def send_rarp(self, mac: bytes) -> None:
        """Have a network back-end announce this MAC address; needs protocol feature RARP."""
        if len(mac) != 6:
            raise ValueError(f"{len(mac)} bytes of a MAC address, must be 6")
        self._send(F.SEND_RARP, U64(int.from_bytes(mac, "little")))

    def create_crypto_session(self, op_code: int, setup: bytes) -> int:
        """The id of a new session of a crypto device; ``setup`` is QEMU's struct of parameters and keys, at
        most 1056 bytes. RequestFailed if the back-end makes none."""
        reply = self._get(F.CREATE_CRYPTO_SESSION, CryptoSession(op_code, setup))
        if reply.session_id < 0:
            text = f"the back-end made no session: {reply.session_id}"
            raise RequestFailed(text, request="CREATE_CRYPTO_SESSION", status=reply.session_id)
        return int(reply.session_id)

    def close_crypto_session(self, session_id: int) -> None:
        self._send(F.CLOSE_CRYPTO_SESSION, U64(session_id))

    def gpu_set_socket(self, fd: int) -> None:
        """Give a GPU's back-end its socket; ``vhost.user.gpu.GpuDisplay`` serves the other end."""
        self._send(F.GPU_SET_SOCKET, fds=[fd])

    # -- memory ------------------------------------------------------------------------------------

    def get_max_mem_slots(self) -> int:
        return int(self._get(F.GET_MAX_MEM_SLOTS).value)

    def set_mem_table(self, memory: GuestMemory) -> None:
        self._check_log(memory)
        if self._has(ProtocolF.CONFIGURE_MEM_SLOTS):
            if len(memory) > MEM_TABLE_REGIONS and len(memory) > (slots := self.get_max_mem_slots()):
                raise InvalidGuestMemory(f"{len(memory)} regions, the back-end has {slots} slots")
            for region in [old for old in self._memory if old not in memory]:
                self.remove_mem_region(region)
            for region in memory:
                if region not in self._memory:
                    self.add_mem_region(region)
        else:
            if len(memory) > MEM_TABLE_REGIONS:
                raise InvalidGuestMemory(
                    f"{len(memory)} regions, limit {MEM_TABLE_REGIONS} without CONFIGURE_MEM_SLOTS"
                )
            table = MemTable(tuple(self._describe(region) for region in memory))
            self._share(table, memory)
        self._memory = tuple(memory)
        self._guest_memory = memory
        self._map_memory(memory)

    def _describe(self, region: Region) -> MemoryRegion:
        if region.fd < 0:
            raise InvalidGuestMemory(f"the region at {region.guest_addr:#x} has no descriptor to share")
        user_addr = region.guest_addr if self._has(ProtocolF.GPA_ADDRESSES) else region.user_addr
        return MemoryRegion(region.guest_addr, region.size, user_addr, region.mmap_offset)

    def add_mem_region(self, region: Region) -> None:
        self._send(F.ADD_MEM_REG, SingleRegion(self._describe(region)), (region.fd,))
        self._memory += (region,)
        self._guest_memory = GuestMemory(self._memory)

    def remove_mem_region(self, region: Region) -> None:
        self._send(F.REM_MEM_REG, SingleRegion(self._describe(region)))
        self._memory = tuple(other for other in self._memory if other is not region)
        self._guest_memory = GuestMemory(self._memory)

    # -- rings -------------------------------------------------------------------------------------

    def set_vring_num(self, index: int, num: int) -> None:
        self._send(F.SET_VRING_NUM, VringState(index, num))
        self._rings.add(index)

    def set_vring_addr(
        self, index: int, desc: int, avail: int, used: int, *, log: int = 0, flags: int = 0
    ) -> None:
        areas = (desc, avail, used)
        log, flags = self._address_to_send(areas, log, flags)
        if not self._translates and not self._has(ProtocolF.GPA_ADDRESSES):
            desc, avail, used = map(self._guest_memory.guest_to_user, (desc, avail, used))
        self._send(F.SET_VRING_ADDR, VringAddr(index, flags, desc, used, avail, log))
        self._areas[index] = areas  # not before: it may have been refused

    def set_vring_base(self, index: int, base: int) -> None:
        self._send(F.SET_VRING_BASE, VringState(index, base))

    def get_vring_base(self, index: int, *, drain: bool = True) -> int:
        """Not ``drain``: what is in flight is left to a successor, by way of the in-flight buffer; needs
        protocol feature GET_VRING_BASE_SKIP_DRAIN."""
        request = F.GET_VRING_BASE if drain else F.GET_VRING_BASE_SKIP_DRAIN
        reply = self._get(request, VringState(index, 0))
        if reply.index != index:
            text = f"answer for ring {reply.index}, asked for {index}"
            raise InvalidMessage(text, request=request.name)
        self._forget_event("kick", index)
        self._drop_host_notifier(index)
        return int(reply.num)

    def set_vring_endian(self, index: int, *, big: bool) -> None:
        """The byte order of a legacy driver's ring; needs protocol feature CROSS_ENDIAN."""
        self._send(F.SET_VRING_ENDIAN, VringState(index, int(big)))

    def set_vring_kick(self, index: int, fd: int | None) -> None:
        self._set_event("kick", F.SET_VRING_KICK, index, fd)

    def set_vring_call(self, index: int, fd: int | None) -> None:
        self._set_event("call", F.SET_VRING_CALL, index, fd)

    def set_vring_err(self, index: int, fd: int | None) -> None:
        self._set_event("err", F.SET_VRING_ERR, index, fd)

    def _set_event(self, kind: str, number: F, index: int, fd: int | None) -> None:
        if fd is None or not self._set_event_in_band(kind, index, fd):
            self._forget_event(kind, index)
            self._send(number, VringFd(index, nofd=fd is None), () if fd is None else (fd,))

    def set_vring_enable(self, index: int, enable: bool) -> None:
        """Nothing to send to a back-end that enabled all rings with SET_FEATURES."""
        if self.offered_features & _PROTOCOL_FEATURES:
            self._send(F.SET_VRING_ENABLE, VringState(index, int(enable)))
