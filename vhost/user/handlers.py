# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a back-end does for each request of a front-end.

One method a row of the message table, named as the row's ``handler``. It takes the message, returns
the reply's payload (an ``Answer`` if descriptors go with it) or None, and raises VhostError to refuse. It
turns messages into the words of DeviceSession, and keeps what only vhost-user has; how requests arrive is
in backend.py. Here is what every session has; areas that stand apart have classes and files of their own,
on top of this one.
"""

from __future__ import annotations

import socket
from abc import abstractmethod
from typing import Any

from vhost.devices.base import Device
from vhost.devices.rings import Areas, Ring, check_event_fd
from vhost.devices.session import DeviceSession
from vhost.errors import IncorrectFds, InvalidGuestMemory, InvalidMessage, InvalidState
from vhost.features import DeviceId, ProtocolF, VhostF, feature_names, missing_companions
from vhost.memory import MAX_REGIONS, GuestMemory, Region
from vhost.user.channel import BackendChannel
from vhost.user.messages import FRONTEND, BackendMsg, FrontendMsg
from vhost.user.payloads import (
    U64,
    Config,
    MemoryRegion,
    MemTable,
    SingleRegion,
    VringFd,
    VringState,
    XenMemoryRegion,
)
from vhost.user.session import Channel, Message, Role, Session
from vhost.user.transport import Transport, socket_of

NET_ONLY = {FrontendMsg.NET_SET_MTU: ProtocolF.MTU, FrontendMsg.SEND_RARP: ProtocolF.RARP}
CONFIG_LIVE_MIGRATION = 1
MTU_MIN, MTU_MAX = 68, 65535  # VIRTIO 5.1.4.1

# Plain integers: an operation on an IntFlag costs as much as a system call.
_PROTOCOL_FEATURES = int(VhostF.PROTOCOL_FEATURES)
_CONFIG = int(ProtocolF.CONFIG)
_RESET_DEVICE = int(ProtocolF.RESET_DEVICE)
_GPA_ADDRESSES = int(ProtocolF.GPA_ADDRESSES)
_NET = int(ProtocolF.MTU | ProtocolF.RARP)
_ALWAYS = int(
    ProtocolF.MQ
    | ProtocolF.REPLY_ACK
    | ProtocolF.BACKEND_REQ
    | ProtocolF.RESET_DEVICE
    | ProtocolF.CONFIGURE_MEM_SLOTS
    | ProtocolF.STATUS
)


class Handlers(DeviceSession):
    """The state of one session, and its answers. ``without``: protocol features not to offer."""

    def __init__(self, device: Device, sock: socket.socket, *, without: int = 0) -> None:
        self.without = int(without)
        self.channel: BackendChannel | None = None
        """For our own requests; None until the front-end gives us one, and again when it breaks."""
        self.owned = False
        super().__init__(device, user_addresses=True)
        try:
            self.session = Session(Role.BACKEND, serves=self.served_requests())
            self.transport = Transport(sock, self.session)
        except BaseException:
            self._close_events()
            raise

    @abstractmethod
    def set_channel(self, channel: BackendChannel) -> None:
        """The front-end listens to our requests on this one from now on."""

    def _happened(self, fd: int, events: int) -> None:
        """A descriptor that nobody knows any more: it was closed by what came just before."""

    def _let_go(self) -> None:
        """What an area has, it closes in a method of its own, which calls this one."""
        self.transport.close()

    def served_requests(self) -> set[int]:
        """The rows that this device's sessions answer; others are refused."""
        serves = set(FRONTEND)
        return serves if self.device.device_id == DeviceId.NET else serves - set(NET_ONLY)

    # -- the session -------------------------------------------------------------------------------

    def offered_features(self) -> int:
        return super().offered_features() | _PROTOCOL_FEATURES

    def _device_features(self) -> int:
        return self.features & ~_PROTOCOL_FEATURES

    def offered_protocol_features(self) -> int:
        """What this side can do; ``without`` is not taken off yet."""
        offered = _ALWAYS
        if self.device.config:
            offered |= _CONFIG
        if self.device.device_id == DeviceId.NET:
            offered |= _NET
        return offered

    def get_features(self, message: Message) -> U64:
        return U64(self.offered_features())

    def set_features(self, message: Message) -> None:
        features = message.payload.value
        self.acknowledge(features, message.name)
        if not features & _PROTOCOL_FEATURES:
            # Nobody will enable them one by one (vhost-user, "Ring states").
            for ring in self.rings:
                self.enable_ring(ring, True)

    def _use_features(self, features: int) -> None:
        super()._use_features(features)
        self.session.features = features
        if self.channel is not None:
            self.channel.session.features = features

    def get_protocol_features(self, message: Message) -> U64:
        return U64(self.offered_protocol_features() & ~self.without)

    def set_protocol_features(self, message: Message) -> None:
        features = message.payload.value
        foreign = features & ~(self.offered_protocol_features() & ~self.without)
        if foreign:
            names = " ".join(feature_names(foreign, ProtocolF))
            raise InvalidMessage(
                f"protocol features {foreign:#x} ({names}) were not offered", request=message.name
            )
        for feature, missing in missing_companions(features).items():
            (name,) = feature_names(feature, ProtocolF)
            needed = " and ".join(feature_names(missing, ProtocolF))
            raise InvalidMessage(f"{name} without {needed}", request=message.name)
        self.session.protocol_features = features
        if self.channel is not None:
            self.channel.session.protocol_features = features

    def set_owner(self, message: Message) -> None:
        if self.owned:
            raise InvalidState("the session has an owner already", request=message.name)
        self.owned = True

    def reset_owner(self, message: Message) -> None:
        """Deprecated; the specification recommends to disable all rings, or nothing."""
        self.owned = False
        for ring in self.rings:
            self.enable_ring(ring, False)

    def get_queue_num(self, message: Message) -> U64:
        return U64(self.device.announced_queues)

    def set_backend_req_fd(self, message: Message) -> None:
        (fd,) = message.take_fds()
        sock = socket_of(fd, request=message.name)
        session = Session(Role.BACKEND, Channel.BACKEND_REQ)
        session.protocol_features = self.session.protocol_features
        session.features = self.session.features
        try:
            self.set_channel(BackendChannel(Transport(sock, session)))
        except (ValueError, OSError) as error:
            sock.close()
            raise IncorrectFds(str(error), request=message.name) from error

    def _may_tell(self) -> bool:
        """A suspended device is silent, and one is suspended before its first ring starts (vhost-user,
        "Suspended device state"). Nor is anything added to what a front-end does not read."""
        return not self.suspended and (self.channel is None or not self.channel.pending)

    def _tell_config_change(self) -> None:
        if self.channel is not None and self.session.protocol_features & _CONFIG:
            self.channel.request(BackendMsg.BACKEND_CONFIG_CHANGE_MSG)

    # -- the device --------------------------------------------------------------------------------

    def get_config(self, message: Message) -> Config:
        asked = message.payload
        data = self.read_config(asked.offset, asked.size)
        return Config(asked.offset, asked.size, asked.flags, data)

    def set_config(self, message: Message) -> None:
        new = message.payload
        self.check_config_range(new.offset, new.offset + len(new.payload), message.name)
        if new.flags & ~CONFIG_LIVE_MIGRATION:
            raise InvalidMessage(
                f"flags {new.flags:#x}, must be 0 or {CONFIG_LIVE_MIGRATION}", request=message.name
            )
        if new.flags & CONFIG_LIVE_MIGRATION:
            return  # what the source had; ours says what this device is
        self.write_config(new.offset, new.payload, message.name)

    def get_status(self, message: Message) -> U64:
        return U64(self.status)

    def set_status(self, message: Message) -> None:
        self.change_status(message.payload.value, message.name)

    def _status_resets(self) -> bool:
        """QEMU sets 0 whenever it stops the device, for a pause or a migration as well, after which the
        driver goes on as if nothing had been. RESET_DEVICE it sends, if it can, when the driver reset."""
        return not self.session.protocol_features & _RESET_DEVICE

    def reset_device(self, message: Message) -> None:
        self.reset(message.name)

    def net_set_mtu(self, message: Message) -> None:
        mtu = message.payload.value
        if not MTU_MIN <= mtu <= MTU_MAX:
            raise InvalidMessage(f"mtu {mtu}, must be {MTU_MIN} to {MTU_MAX}", request=message.name)
        self.must_be_ours(message.name)
        self.device.set_mtu(mtu)

    def send_rarp(self, message: Message) -> None:
        self.must_be_ours(message.name)
        self.device.send_rarp(message.payload.value.to_bytes(8, "little")[:6])

    # -- memory ------------------------------------------------------------------------------------

    def set_mem_table(self, message: Message) -> MemTable | None:
        regions = zip(message.payload.regions, message.fds, strict=True)
        self.replace_memory(GuestMemory([self._map(region, fd) for region, fd in regions]))
        return None

    def get_max_mem_slots(self, message: Message) -> U64:
        return U64(MAX_REGIONS)

    def add_mem_reg(self, message: Message) -> SingleRegion | None:
        (fd,) = message.fds
        self.replace_memory(self.memory.add(self._map(message.payload.region, fd)))
        return None

    def rem_mem_reg(self, message: Message) -> None:
        payload: SingleRegion = message.payload
        region: Any = payload.region
        self.replace_memory(
            self.memory.remove(
                guest_addr=region.guest_addr, user_addr=self._user_addr(region), size=region.size
            )
        )

    def _user_addr(self, region: MemoryRegion | XenMemoryRegion) -> int:
        """With GPA_ADDRESSES, wherever there was a user address there is a guest address."""
        gpa = self.session.protocol_features & _GPA_ADDRESSES
        return int(region.guest_addr if gpa else region.user_addr)

    def _map(self, region: MemoryRegion | XenMemoryRegion, fd: int) -> Region:
        return _map(region, fd, self._user_addr(region))

    # -- rings -------------------------------------------------------------------------------------

    def _ring(self, message: Message) -> Ring:
        return self.ring_at(message.spec.ring_index(message.payload), message.name)

    def set_vring_num(self, message: Message) -> None:
        self.size_ring(self._ring(message), message.payload.num, message.name)

    def set_vring_addr(self, message: Message) -> None:
        ring = self._ring(message)
        addr = message.payload
        if not ring.started and self.iotlb is None:
            for name in ("desc", "avail", "used"):
                try:
                    self.memory.user_to_guest(getattr(addr, name))
                except InvalidGuestMemory as error:
                    raise InvalidGuestMemory(f"{message.name}: ring {ring.index}: {name}: {error}") from error
        self.place_ring(ring, Areas(addr.desc, addr.avail, addr.used), message.name)

    def set_vring_base(self, message: Message) -> None:
        self.begin_ring(self._ring(message), message.payload.num, message.name)

    def get_vring_base(self, message: Message) -> VringState:
        ring = self._ring(message)
        return VringState(ring.index, self.stop_ring(ring))

    def set_vring_kick(self, message: Message) -> None:
        self._set_event(message, "kick")

    def set_vring_call(self, message: Message) -> None:
        self._set_event(message, "call")

    def set_vring_err(self, message: Message) -> None:
        self._set_event(message, "err")

    def _set_event(self, message: Message, kind: str) -> None:
        payload: VringFd = message.payload
        ring = self._ring(message)
        if not payload.nofd:
            check_event_fd(message.fds[0])
        self.give_event(ring, kind, message.take_fd)

    def set_vring_enable(self, message: Message) -> None:
        ring = self._ring(message)
        if message.payload.num > 1:
            raise InvalidMessage(
                f"ring {ring.index}: state {message.payload.num}, must be 0 or 1", request=message.name
            )
        self.enable_ring(ring, bool(message.payload.num))


XEN_FOREIGN, XEN_GRANT = 1, 2


def _map(region: MemoryRegion | XenMemoryRegion, fd: int, user_addr: int) -> Region:
    if isinstance(region, XenMemoryRegion) and region.xen_flags:
        kind = "foreign" if region.xen_flags & XEN_FOREIGN else "grant"
        if not region.xen_flags & (XEN_FOREIGN | XEN_GRANT):
            kind = "on-demand"
        raise InvalidGuestMemory(
            f"region at {region.guest_addr:#x}: xen mmap flags {region.xen_flags:#x}, domid {region.domid}:"
            f" {kind} mappings need Xen, which is not supported here"
        )
    return Region.from_fd(
        fd,
        region.size,
        guest_addr=region.guest_addr,
        user_addr=user_addr,
        mmap_offset=region.mmap_offset,
    )
