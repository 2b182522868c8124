# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Frontend: VhostOps over a vhost-user session.

Requests block until the back-end has answered, or until ``timeout``; ``fileno()`` and ``step()`` are
for what the back-end says by itself, on the channel that SET_BACKEND_REQ_FD gave it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Sequence
from typing import Any

from vhost.errors import (
    Disconnected,
    InactiveFeature,
    InvalidGuestMemory,
    InvalidMessage,
    PartialMessage,
    ProtocolError,
    ReplyTimeout,
)
from vhost.features import ProtocolF, VhostF
from vhost.memory import GuestMemory, Region
from vhost.ops import VhostOps
from vhost.user.messages import FrontendMsg as F
from vhost.user.payloads import (
    EMPTY,
    U64,
    Config,
    MemoryRegion,
    MemTable,
    Payload,
    SingleRegion,
    VringAddr,
    VringFd,
    VringState,
)
from vhost.user.session import Channel, Message, Outgoing, Role, Session
from vhost.user.transport import Transport

MEM_TABLE_REGIONS = 8
"""How many regions SET_MEM_TABLE can carry."""

WANTED = (
    ProtocolF.MQ
    | ProtocolF.REPLY_ACK
    | ProtocolF.BACKEND_REQ
    | ProtocolF.CONFIG
    | ProtocolF.RESET_DEVICE
    | ProtocolF.CONFIGURE_MEM_SLOTS
    | ProtocolF.STATUS
    | ProtocolF.MTU
    | ProtocolF.RARP
)
RETRY_PAUSE = 0.05
MESSAGES_PER_LOOK = 16
"""So that a back-end that asks without end does not keep us from our own timeouts."""

# Plain integers: an operation on an IntFlag costs as much as a system call.
_PROTOCOL_FEATURES = int(VhostF.PROTOCOL_FEATURES)
_MQ = int(ProtocolF.MQ)


class Frontend(VhostOps):
    """A session with a back-end, negotiated as far as the transport goes.

    ``protocol_features`` is what both sides have; ``offered_features`` what GET_FEATURES said.
    """

    def __init__(
        self, sock: socket.socket, *, timeout: float | None = 10.0, protocol_features: int = int(WANTED)
    ) -> None:
        """Begins the session on a connected socket, which is this object's from now on."""
        self.timeout = timeout
        self.session = Session(Role.FRONTEND)
        self.transport = Transport(sock, self.session)
        self.channel: Transport | None = None
        self.offered_features = 0
        self.protocol_features = 0
        self.offered_protocol_features = 0
        self._status = 0
        self._channel_open = False
        self._config_changed = False
        self._memory: tuple[Region, ...] = ()
        self._guest_memory = GuestMemory()
        try:
            self._negotiate(protocol_features)
        except BaseException:
            self.close()
            raise

    @classmethod
    def connect(
        cls,
        path: str | os.PathLike[str],
        *,
        retry: float | None = None,
        timeout: float | None = 10.0,
        protocol_features: int = int(WANTED),
    ) -> Frontend:
        """Connect to a listening back-end. With ``retry``, a socket that is not there yet, refuses, has a
        full backlog, or dies during the handshake is tried again, all of it, for that many seconds."""
        deadline = None if retry is None else time.monotonic() + retry
        while True:
            try:
                return cls._connect_once(path, timeout, protocol_features)
            except (ConnectionError, FileNotFoundError, BlockingIOError, Disconnected, PartialMessage):
                if deadline is None or time.monotonic() >= deadline:
                    raise
                time.sleep(RETRY_PAUSE)

    @classmethod
    def _connect_once(
        cls, path: str | os.PathLike[str], timeout: float | None, protocol_features: int
    ) -> Frontend:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            sock.connect(os.fspath(path))
        except BaseException:
            sock.close()
            raise
        return cls(sock, timeout=timeout, protocol_features=protocol_features)

    @classmethod
    def listen(
        cls,
        path: str | os.PathLike[str],
        *,
        timeout: float | None = 10.0,
        protocol_features: int = int(WANTED),
    ) -> Frontend:
        """Wait for one back-end that connects to us (a back-end in client mode). The socket is removed
        once it has."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.settimeout(timeout)
            listener.bind(os.fspath(path))
            try:
                listener.listen(1)
                try:
                    sock, _ = listener.accept()
                except TimeoutError:
                    raise ReplyTimeout(f"no back-end connected to {path} within {timeout} s") from None
            finally:
                os.unlink(path)
        return cls(sock, timeout=timeout, protocol_features=protocol_features)

    def _negotiate(self, wanted: int) -> None:
        self.offered_features = self._get(F.GET_FEATURES).value
        if self.offered_features & _PROTOCOL_FEATURES:
            self.offered_protocol_features = self._get(F.GET_PROTOCOL_FEATURES).value
            chosen = self.offered_protocol_features & wanted
            self._send(F.SET_PROTOCOL_FEATURES, U64(chosen))
            self.protocol_features = self.session.protocol_features = chosen
        self._send(F.SET_OWNER)
        if self._has(ProtocolF.BACKEND_REQ):
            self._open_channel()

    def _open_channel(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        session = Session(Role.FRONTEND, Channel.BACKEND_REQ)
        session.protocol_features = self.protocol_features
        self.channel = Transport(ours, session)
        self._channel_open = True
        self.transport.serve_meanwhile(ours.fileno(), self._serve_channel)
        with theirs:
            self._send(F.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])

    # -- requests ----------------------------------------------------------------------------------

    def _has(self, feature: ProtocolF) -> bool:
        return bool(self.protocol_features & int(feature))

    def _send(self, number: F, payload: Payload = EMPTY, fds: Sequence[int] = ()) -> None:
        """A request without a reply of its own; waits for the ack where REPLY_ACK was negotiated."""
        message = self._call(self.session.request(number, payload, fds))
        if message is not None:
            message.close()

    def _get(self, number: F, payload: Payload = EMPTY) -> Any:
        """A request with a reply: its payload."""
        message = self._call(self.session.request(number, payload))
        if message is None:
            raise ProtocolError("the message table knows no reply", request=number.name)
        message.close()
        return message.payload

    def _call(self, outgoing: Outgoing) -> Message | None:
        reply = self.transport.call(outgoing, self.timeout)
        try:
            self._deliver()
        except BaseException:
            if reply is not None:
                reply.close()
            raise
        return reply

    def get_features(self) -> int:
        return self.offered_features & ~_PROTOCOL_FEATURES

    def set_features(self, features: int) -> None:
        features |= self.offered_features & _PROTOCOL_FEATURES
        self._send(F.SET_FEATURES, U64(features))
        self.session.features = features

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

    def reset_device(self) -> None:
        self._send(F.RESET_DEVICE)

    def net_set_mtu(self, mtu: int) -> None:
        """Tell a network back-end the MTU; needs protocol feature MTU."""
        self._send(F.NET_SET_MTU, U64(mtu))

    def send_rarp(self, mac: bytes) -> None:
        """Have a network back-end announce this MAC address; needs protocol feature RARP."""
        self._send(F.SEND_RARP, U64(int.from_bytes(mac, "little")))

    # -- memory ------------------------------------------------------------------------------------

    def get_max_mem_slots(self) -> int:
        return int(self._get(F.GET_MAX_MEM_SLOTS).value)

    def set_mem_table(self, memory: GuestMemory) -> None:
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
            table = MemTable(tuple(_describe(region) for region in memory))
            self._send(F.SET_MEM_TABLE, table, [region.fd for region in memory])
        self._memory = tuple(memory)
        self._guest_memory = memory

    def add_mem_region(self, region: Region) -> None:
        self._send(F.ADD_MEM_REG, SingleRegion(_describe(region)), [region.fd])
        self._memory += (region,)
        self._guest_memory = GuestMemory(self._memory)

    def remove_mem_region(self, region: Region) -> None:
        self._send(F.REM_MEM_REG, SingleRegion(_describe(region)))
        self._memory = tuple(other for other in self._memory if other is not region)
        self._guest_memory = GuestMemory(self._memory)

    # -- rings -------------------------------------------------------------------------------------

    def set_vring_num(self, index: int, num: int) -> None:
        self._send(F.SET_VRING_NUM, VringState(index, num))

    def set_vring_addr(
        self, index: int, desc: int, avail: int, used: int, *, log: int = 0, flags: int = 0
    ) -> None:
        user = self._guest_memory.guest_to_user
        self._send(F.SET_VRING_ADDR, VringAddr(index, flags, user(desc), user(used), user(avail), log))

    def set_vring_base(self, index: int, base: int) -> None:
        self._send(F.SET_VRING_BASE, VringState(index, base))

    def get_vring_base(self, index: int) -> int:
        reply = self._get(F.GET_VRING_BASE, VringState(index, 0))
        if reply.index != index:
            text = f"answer for ring {reply.index}, asked for {index}"
            raise InvalidMessage(text, request="GET_VRING_BASE")
        return int(reply.num)

    def set_vring_kick(self, index: int, fd: int | None) -> None:
        self._set_event(F.SET_VRING_KICK, index, fd)

    def set_vring_call(self, index: int, fd: int | None) -> None:
        self._set_event(F.SET_VRING_CALL, index, fd)

    def set_vring_err(self, index: int, fd: int | None) -> None:
        self._set_event(F.SET_VRING_ERR, index, fd)

    def _set_event(self, number: F, index: int, fd: int | None) -> None:
        self._send(number, VringFd(index, nofd=fd is None), () if fd is None else (fd,))

    def set_vring_enable(self, index: int, enable: bool) -> None:
        """Nothing to send to a back-end that enabled all rings with SET_FEATURES."""
        if self.offered_features & _PROTOCOL_FEATURES:
            self._send(F.SET_VRING_ENABLE, VringState(index, int(enable)))

    # -- events, and the end -----------------------------------------------------------------------

    def fileno(self) -> int:
        """The back-end's channel if there is one; else the session's own socket, which becomes
        readable when the back-end goes away."""
        return (self.channel or self.transport).fileno()

    def step(self) -> bool:
        if self.channel is None:
            return not self._peer_gone()
        self._serve_channel()
        self._deliver()
        return self._channel_open

    def _serve_channel(self) -> None:
        """Answer what the back-end asks; what came of it is told by ``_deliver``, for this may run in
        the middle of a request of ours."""
        assert self.channel is not None
        for _ in range(MESSAGES_PER_LOOK):
            if not self._channel_open:
                return
            try:
                message = self.channel.receive()
                if message is None:
                    break
                with contextlib.closing(message):
                    self._config_changed = True  # the one request that is served
                    self.channel.send(self.channel.session.ack(message, 0))
            except ProtocolError as error:
                self._refuse_on_channel(error)

    def _refuse_on_channel(self, error: ProtocolError) -> None:
        assert self.channel is not None
        try:
            if error.message is None:
                raise error
            self.channel.send(self.channel.session.ack(error.message, 1))
        except ProtocolError:
            # The session itself can go on without it.
            self._channel_open = False
            self.transport.serve_meanwhile(self.channel.fileno(), None)

    def _deliver(self) -> None:
        if self._config_changed:
            self._config_changed = False
            if self.on_config_change is not None:
                self.on_config_change()

    def _peer_gone(self) -> bool:
        try:
            return not self.transport.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        if self.channel is not None:
            self.channel.close()
        self.transport.close()


def _describe(region: Region) -> MemoryRegion:
    if region.fd < 0:
        raise InvalidGuestMemory(f"the region at {region.guest_addr:#x} has no descriptor to share")
    return MemoryRegion(region.guest_addr, region.size, region.user_addr, region.mmap_offset)
