# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a back-end does for each request of a front-end.

One method a row of the message table, named as the row's ``handler``. It takes the message, returns
the reply's payload or None, and raises VhostError to refuse. It knows the session's state (features,
memory, rings) and the device; how requests arrive and how rings are watched is in backend.py.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from vhost.device_queue import DeviceQueue
from vhost.devices.base import Device
from vhost.errors import (
    DeviceBusy,
    IncorrectFds,
    InvalidGuestMemory,
    InvalidMessage,
    InvalidQueue,
    InvalidState,
)
from vhost.features import DeviceId, ProtocolF, VhostF, VirtioF, feature_names
from vhost.memory import MAX_REGIONS, GuestMemory, Region
from vhost.user.messages import FRONTEND, BackendMsg, FrontendMsg
from vhost.user.payloads import U64, Config, MemoryRegion, MemTable, SingleRegion, VringFd, VringState
from vhost.user.rings import Ring, check_event_fd
from vhost.user.session import Channel, Message, Role, Session
from vhost.user.transport import Transport

NET_ONLY = {FrontendMsg.NET_SET_MTU: ProtocolF.MTU, FrontendMsg.SEND_RARP: ProtocolF.RARP}
CONFIG_LIVE_MIGRATION = 1
PACKED_START = 0x8000_8000
"""Both positions of a new packed ring, each with its wrap counter."""

# Plain integers: an operation on an IntFlag costs as much as a system call.
_PROTOCOL_FEATURES = int(VhostF.PROTOCOL_FEATURES)
_CONFIG = int(ProtocolF.CONFIG)
_RING_PACKED = int(VirtioF.RING_PACKED)
_NET = int(ProtocolF.MTU | ProtocolF.RARP)
_ALWAYS = int(
    ProtocolF.MQ
    | ProtocolF.REPLY_ACK
    | ProtocolF.BACKEND_REQ
    | ProtocolF.RESET_DEVICE
    | ProtocolF.CONFIGURE_MEM_SLOTS
    | ProtocolF.STATUS
)


class Handlers(ABC):
    """The state of one session, and its answers."""

    def __init__(self, device: Device, sock: socket.socket) -> None:
        self.device = device
        serves = {row.id for row in FRONTEND.values() if row.live}
        if device.device_id != DeviceId.NET:
            serves -= set(NET_ONLY)
        self.session = Session(Role.BACKEND, serves=serves)
        self.transport = Transport(sock, self.session)
        self.channel: Transport | None = None
        self.no_memory = GuestMemory()
        self.memory = self.no_memory
        self.rings = [Ring(i, device.queue_name(i)) for i in range(device.num_queues)]
        self.owned = False
        self.status = 0
        self._claimed = False

    # -- what backend.py adds ----------------------------------------------------------------------

    @abstractmethod
    def run_ring(self, ring: Ring) -> None:
        """The ring is started, or may go on after a pause: process it."""

    @abstractmethod
    def pause_ring(self, ring: Ring) -> None:
        """Return when nothing uses the ring's queue any more."""

    @abstractmethod
    def set_channel(self, transport: Transport) -> None:
        """The front-end listens to our requests on this one from now on."""

    @abstractmethod
    def config_changed(self) -> None:
        """The device's configuration space changed. From any thread."""

    @abstractmethod
    def wake(self) -> None:
        """Look after rings and memory. From any thread."""

    # -- the session -------------------------------------------------------------------------------

    def offered_features(self) -> int:
        return self.device.offered_features() | _PROTOCOL_FEATURES

    def offered_protocol_features(self) -> int:
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
        foreign = features & ~self.offered_features()
        if foreign:
            names = " ".join(feature_names(foreign))
            raise InvalidMessage(f"features {foreign:#x} ({names}) were not offered", request=message.name)
        if features != self.session.features:
            for ring in self.rings:
                ring.must_be_stopped("SET_FEATURES with other features")
        self.session.features = features
        if not features & _PROTOCOL_FEATURES:
            # Nobody will enable them one by one (vhost-user, "Ring states").
            for ring in self.rings:
                self._enable(ring, True)

    def get_protocol_features(self, message: Message) -> U64:
        return U64(self.offered_protocol_features())

    def set_protocol_features(self, message: Message) -> None:
        features = message.payload.value
        foreign = features & ~self.offered_protocol_features()
        if foreign:
            names = " ".join(feature_names(foreign, ProtocolF))
            raise InvalidMessage(
                f"protocol features {foreign:#x} ({names}) were not offered", request=message.name
            )
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
            self._enable(ring, False)

    def get_queue_num(self, message: Message) -> U64:
        return U64(len(self.rings))

    def set_backend_req_fd(self, message: Message) -> None:
        (fd,) = message.fds
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise IncorrectFds("the descriptor is no socket", request=message.name)
        sock = socket.socket(fileno=message.take_fd())
        session = Session(Role.BACKEND, Channel.BACKEND_REQ)
        session.protocol_features = self.session.protocol_features
        try:
            self.set_channel(Transport(sock, session))
        except (ValueError, OSError) as error:
            sock.close()
            raise IncorrectFds(str(error), request=message.name) from error

    def _tell_config_change(self) -> None:
        if self.channel is None or not self.session.protocol_features & _CONFIG:
            return
        if self.channel.flush():
            # Without need_reply: the front-end may be waiting for us on the other channel.
            self.channel.send(
                self.channel.session.request(BackendMsg.BACKEND_CONFIG_CHANGE_MSG, need_reply=False)
            )

    # -- the device --------------------------------------------------------------------------------

    def _must_be_ours(self, message: Message) -> None:
        """Another session's driver has the device: what changes the device is for that one to say."""
        if self.device.is_busy(self) and not self.device.share:
            raise DeviceBusy(f"{message.name}: another session runs this device's rings")

    def get_config(self, message: Message) -> Config:
        asked = message.payload
        config = self.device.config
        # Front-ends ask for the structure that they know, which may be longer than ours.
        data = config[asked.offset : asked.offset + asked.size].ljust(asked.size, b"\0")
        return Config(asked.offset, asked.size, asked.flags, data)

    def set_config(self, message: Message) -> None:
        new = message.payload
        end = new.offset + len(new.payload)
        if end > len(self.device.config):
            size = len(self.device.config)
            raise InvalidMessage(
                f"bytes {new.offset} to {end} of a configuration space of {size}", request=message.name
            )
        if new.flags & CONFIG_LIVE_MIGRATION:
            return  # what the source had; ours says what this device is
        self._must_be_ours(message)
        self.device.write_config(new.offset, new.payload)

    def get_status(self, message: Message) -> U64:
        return U64(self.status)

    def set_status(self, message: Message) -> None:
        status = message.payload.value
        if status > 0xFF:
            raise InvalidMessage(f"status {status:#x}, limit 0xff", request=message.name)
        self._must_be_ours(message)
        self.status = status
        if status:
            self.device.set_status(status)
        else:
            self.stop_all_rings()
            for ring in self.rings:
                ring.base = ring.left = None  # the driver makes new rings, where nothing was ever used
            self.device.reset()

    def reset_device(self, message: Message) -> None:
        self._must_be_ours(message)
        self.stop_all_rings()
        for ring in self.rings:
            ring.reset()
        self.status = 0
        self.device.reset()

    def net_set_mtu(self, message: Message) -> None:
        self._must_be_ours(message)
        self.device.set_mtu(message.payload.value)

    def send_rarp(self, message: Message) -> None:
        self._must_be_ours(message)
        self.device.send_rarp(message.payload.value.to_bytes(8, "little")[:6])

    # -- memory ------------------------------------------------------------------------------------

    def set_mem_table(self, message: Message) -> None:
        table: MemTable = message.payload
        self._replace_memory(
            GuestMemory([_map(region, fd) for region, fd in zip(table.regions, message.fds, strict=True)])
        )

    def get_max_mem_slots(self, message: Message) -> U64:
        return U64(MAX_REGIONS)

    def add_mem_reg(self, message: Message) -> None:
        (fd,) = message.fds
        self._replace_memory(self.memory.add(_map(message.payload.region, fd)))

    def rem_mem_reg(self, message: Message) -> None:
        payload: SingleRegion = message.payload
        region: Any = payload.region
        self._replace_memory(
            self.memory.remove(guest_addr=region.guest_addr, user_addr=region.user_addr, size=region.size)
        )

    def _replace_memory(self, memory: GuestMemory) -> None:
        with self._paused(*self.rings):
            moved: list[DeviceQueue] = []
            for ring in self.rings:
                if ring.queue is None:
                    continue
                try:
                    ring.queue.set_memory(memory)
                except InvalidQueue as error:
                    for queue in moved:
                        queue.set_memory(self.memory)
                    raise InvalidGuestMemory(f"a live ring would lose its memory: {error}") from error
                moved.append(ring.queue)
            self.memory = memory

    # -- rings -------------------------------------------------------------------------------------

    def _ring(self, message: Message) -> Ring:
        index = message.spec.ring_index(message.payload)
        if index is None or index >= len(self.rings):
            raise InvalidMessage(f"ring {index}, must be below {len(self.rings)}", request=message.name)
        return self.rings[index]

    def set_vring_num(self, message: Message) -> None:
        ring = self._ring(message)
        ring.must_be_stopped(message.name)
        num = message.payload.num
        if not 0 < num <= self.device.max_queue_size:
            raise InvalidMessage(
                f"ring {ring.index}: size {num}, must be 1 to {self.device.max_queue_size}",
                request=message.name,
            )
        ring.num = num
        self._start_if_ready(ring)

    def set_vring_addr(self, message: Message) -> None:
        ring = self._ring(message)
        addr = message.payload
        if ring.started and ring.addr is not None:
            # QEMU repeats it to switch the dirty log; moving a live ring is another matter.
            old = ring.addr
            if (addr.desc, addr.used, addr.avail) != (old.desc, old.used, old.avail):
                ring.must_be_stopped(message.name)
            return
        for name in ("desc", "avail", "used"):
            try:
                self.memory.user_to_guest(getattr(addr, name))
            except InvalidGuestMemory as error:
                raise InvalidGuestMemory(f"{message.name}: ring {ring.index}: {name}: {error}") from error
        ring.place(addr)
        self._start_if_ready(ring)

    def set_vring_base(self, message: Message) -> None:
        ring = self._ring(message)
        ring.must_be_stopped(message.name)
        ring.base = message.payload.num

    def get_vring_base(self, message: Message) -> VringState:
        ring = self._ring(message)
        if ring.started:
            self.pause_ring(ring)
        base = ring.stop()
        if base is None:  # it never ran; for a packed ring 0 would be another place than that (2.8.1)
            base = PACKED_START if self.session.features & _RING_PACKED else 0
        self._release_if_idle()
        return VringState(ring.index, base)

    def set_vring_kick(self, message: Message) -> None:
        ring = self._set_event(message, "kick")
        ring.kick_known = True
        self._start_if_ready(ring)

    def set_vring_call(self, message: Message) -> None:
        self._set_event(message, "call")

    def set_vring_err(self, message: Message) -> None:
        self._set_event(message, "err")

    def _set_event(self, message: Message, kind: str) -> Ring:
        payload: VringFd = message.payload
        ring = self._ring(message)
        if not payload.nofd:
            check_event_fd(message.fds[0])
        with self._paused(ring):
            fd = message.take_fd()
            ring.set_fd(kind, -1 if fd is None else fd)
        return ring

    def set_vring_enable(self, message: Message) -> None:
        ring = self._ring(message)
        if message.payload.num > 1:
            raise InvalidMessage(
                f"ring {ring.index}: state {message.payload.num}, must be 0 or 1", request=message.name
            )
        self._enable(ring, bool(message.payload.num))

    def _enable(self, ring: Ring, enabled: bool) -> None:
        if enabled == ring.enabled:
            return
        with self._paused(ring):
            ring.enabled = enabled

    def _start_if_ready(self, ring: Ring) -> None:
        if not ring.can_start():
            return
        if not self._claimed:
            self.device.claim(self)
            self._claimed = True
            negotiated = self.session.features & ~_PROTOCOL_FEATURES
            if self.device.is_busy(self):
                # A shared device can rely on what all of its drivers know: one without FLUSH needs
                # writes to be stable, whatever the others do.
                negotiated &= self.device.negotiated
            self.device.negotiated = negotiated
        try:
            ring.start(self.memory, self.session.features)
            self.run_ring(ring)
        except BaseException:
            if ring.started:
                self.pause_ring(ring)
            ring.stop()
            self._release_if_idle()
            raise

    def stop_all_rings(self) -> None:
        for ring in self.rings:
            if ring.started:
                self.pause_ring(ring)
                ring.stop()
        self._release_if_idle()

    def _release_if_idle(self) -> None:
        if self._claimed and not any(ring.started for ring in self.rings):
            self._claimed = False
            self.device.release(self)

    @contextlib.contextmanager
    def _paused(self, *rings: Ring) -> Iterator[None]:
        """Nothing uses these rings' queues inside the block; those that ran go on after it."""
        with contextlib.ExitStack() as resume:  # all of them, also if a handler fails in between
            for ring in rings:
                if ring.started:
                    resume.callback(self.run_ring, ring)
                    self.pause_ring(ring)
            yield


def _map(region: MemoryRegion, fd: int) -> Region:
    return Region.from_fd(
        fd,
        region.size,
        guest_addr=region.guest_addr,
        user_addr=region.user_addr,
        mmap_offset=region.mmap_offset,
    )
