# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""THE table: one row for each message of the vhost-user specification.

Encoding, the checks of lengths and descriptors, gating, replies and acks, the names of handlers,
traces, ``vhost messages`` and the documentation all read these rows. To add a message: one row, one
handler, one test. What the columns mean is in spec.py; how a connection uses them in session.py; the rows
of the GPU protocol, which has a socket of its own, are in gpu_messages.py.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from vhost.features import ProtocolF, Status, VhostF, VirtioF
from vhost.user import payloads as p
from vhost.user.gpu_messages import GPU, GpuMsg
from vhost.user.payloads import EMPTY, NOFD, U64, Empty, VringState
from vhost.user.spec import (
    FD_PER_REGION,
    FD_UNLESS_NOFD,
    HEADER,
    NEED_REPLY_FLAG,
    ONE_FD,
    OPTIONAL_FD,
    REPLY_FLAG,
    UNUSED_FD,
    VERSION,
    Channel,
    Fds,
    Gate,
    Message,
    Outgoing,
    Policy,
    Role,
    Spec,
)

__all__ = [
    "BACKEND",
    "FRONTEND",
    "GPU",
    "BackendMsg",
    "Channel",
    "Fds",
    "FrontendMsg",
    "Gate",
    "GpuMsg",
    "Message",
    "Outgoing",
    "Policy",
    "Role",
    "Spec",
    "frame",
    "table",
    "table_rows",
    "unknown",
]


class FrontendMsg(IntEnum):
    """Requests of the front-end."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44
    GET_VRING_BASE_SKIP_DRAIN = 45
    # The name of older texts.
    SET_SLAVE_REQ_FD = SET_BACKEND_REQ_FD


class BackendMsg(IntEnum):
    """Requests of the back-end, on the channel that SET_BACKEND_REQ_FD passed."""

    BACKEND_IOTLB_MSG = 1
    BACKEND_CONFIG_CHANGE_MSG = 2
    BACKEND_VRING_HOST_NOTIFIER_MSG = 3
    BACKEND_VRING_CALL = 4
    BACKEND_VRING_ERR = 5
    BACKEND_SHARED_OBJECT_ADD = 6
    BACKEND_SHARED_OBJECT_REMOVE = 7
    BACKEND_SHARED_OBJECT_LOOKUP = 8
    BACKEND_SHMEM_MAP = 9
    BACKEND_SHMEM_UNMAP = 10
    # The names of older texts.
    SLAVE_IOTLB_MSG = BACKEND_IOTLB_MSG
    SLAVE_CONFIG_CHANGE_MSG = BACKEND_CONFIG_CHANGE_MSG
    SLAVE_VRING_HOST_NOTIFIER_MSG = BACKEND_VRING_HOST_NOTIFIER_MSG
    SLAVE_VRING_CALL = BACKEND_VRING_CALL
    SLAVE_VRING_ERR = BACKEND_VRING_ERR


_F = FrontendMsg
_B = BackendMsg
_FEATURES = (VirtioF, VhostF)
_ALWAYS = Policy.ALWAYS
_TO_FRONTEND = "Back-end message types"


def _front(number: FrontendMsg, doc: str, **columns: object) -> Spec:
    return Spec(name=number.name, id=int(number), sender=Role.FRONTEND, doc=doc, **columns)  # type: ignore[arg-type]


def _back(number: BackendMsg, doc: str, **columns: object) -> Spec:
    columns.setdefault("section", _TO_FRONTEND)
    return Spec(name=number.name, id=int(number), sender=Role.BACKEND, doc=doc, **columns)  # type: ignore[arg-type]


_FRONTEND_ROWS = (
    _front(_F.GET_FEATURES, "Which virtio and vhost features the back-end offers.",
           reply=U64, policy=_ALWAYS, names=_FEATURES),
    _front(_F.SET_FEATURES, "Enable features; without PROTOCOL_FEATURES it enables all rings too.",
           request=U64, names=_FEATURES),
    _front(_F.SET_OWNER, "The sender is the front-end that owns this session."),
    _front(_F.RESET_OWNER, "Deprecated: disable all rings, or nothing."),
    _front(_F.SET_MEM_TABLE, "Replace the memory table; one descriptor for each region.",
           request=p.MemTable, reply=p.MemTable, policy=Policy.POSTCOPY, postcopy_ack=True,
           fds=FD_PER_REGION),
    _front(_F.SET_LOG_BASE, "Where the dirty log is; the value of the reply means nothing.",
           request=p.Log, request_also=(U64,), reply=U64, reply_also=(Empty, p.Log),
           policy=Policy.LOG_SHMFD, fds=OPTIONAL_FD, feature=ProtocolF.LOG_SHMFD, gate=Gate.ADVICE,
           section="Migration"),
    _front(_F.SET_LOG_FD, "An eventfd by which the back-end tells that the log changed.",
           request_also=(U64,), fds=ONE_FD, section="Migration"),
    _front(_F.SET_VRING_NUM, "Size of a ring.", request=VringState, per_ring="index"),
    _front(_F.SET_VRING_ADDR, "Where a ring's three areas are, as user addresses.",
           request=p.VringAddr, per_ring="index"),
    _front(_F.SET_VRING_BASE, "Where a ring continues: an index; packed: both, with their wrap counters.",
           request=VringState, per_ring="index"),
    _front(_F.GET_VRING_BASE, "Stop a ring and say where it is.",
           request=VringState, reply=VringState, policy=_ALWAYS, per_ring="index"),
    _front(_F.SET_VRING_KICK, "Eventfd by which the driver tells of new buffers.",
           request=p.VringFd, fds=FD_UNLESS_NOFD, per_ring="index"),
    _front(_F.SET_VRING_CALL, "Eventfd by which the device tells of used buffers.",
           request=p.VringFd, fds=FD_UNLESS_NOFD, per_ring="index"),
    _front(_F.SET_VRING_ERR, "Eventfd by which the device tells of an error.",
           request=p.VringFd, fds=FD_UNLESS_NOFD, per_ring="index"),
    _front(_F.GET_PROTOCOL_FEATURES, "Which protocol features the back-end offers.",
           reply=U64, policy=_ALWAYS, feature=VhostF.PROTOCOL_FEATURES, gate=Gate.ADVICE,
           names=(ProtocolF,)),
    _front(_F.SET_PROTOCOL_FEATURES, "Enable protocol features.",
           request=U64, feature=VhostF.PROTOCOL_FEATURES, gate=Gate.ADVICE, names=(ProtocolF,)),
    _front(_F.GET_QUEUE_NUM, "How many queues the back-end has at most.",
           reply=U64, policy=_ALWAYS, feature=ProtocolF.MQ, gate=Gate.OFFERED,
           section="Multiple queue support"),
    _front(_F.SET_VRING_ENABLE, "Enable or disable a ring; num is 1 or 0.",
           request=VringState, per_ring="index", feature=VhostF.PROTOCOL_FEATURES, gate=Gate.ADVICE,
           section="Ring states"),
    _front(_F.SEND_RARP, "Broadcast a fake RARP for the MAC in the first six bytes.",
           request=U64, feature=ProtocolF.RARP, gate=Gate.OFFERED),
    _front(_F.NET_SET_MTU, "The MTU that the guest was told.",
           request=U64, feature=ProtocolF.MTU, gate=Gate.OFFERED),
    _front(_F.SET_BACKEND_REQ_FD, "Socket for requests of the back-end.",
           fds=ONE_FD, feature=ProtocolF.BACKEND_REQ, gate=Gate.OFFERED, section="Back-end communication",
           old_name="SET_SLAVE_REQ_FD"),
    _front(_F.IOTLB_MSG, "Update or invalidate IOTLB entries.",
           request=p.Iotlb, reply=U64, policy=_ALWAYS, refusal=U64(1), feature=VirtioF.ACCESS_PLATFORM,
           section="IOMMU support"),
    _front(_F.SET_VRING_ENDIAN, "Byte order of a legacy ring: num 0 little, 1 big.",
           request=VringState, per_ring="index", feature=ProtocolF.CROSS_ENDIAN),
    _front(_F.GET_CONFIG, "Read configuration space; the reply has the request's size, or 0 for an error.",
           request=p.Config, reply=p.Config, reply_also=(Empty,), policy=_ALWAYS,
           refusal=p.Config(0, 0, 0, b""), feature=ProtocolF.CONFIG),
    _front(_F.SET_CONFIG, "Write configuration space; flags 1: for live migration.",
           request=p.Config, feature=ProtocolF.CONFIG),
    _front(_F.CREATE_CRYPTO_SESSION, "Create a crypto session; the reply has its id, negative on failure.",
           request=p.CryptoSession, reply=p.CryptoSession, policy=_ALWAYS,
           refusal=p.CryptoSession(0, b"", -1), feature=ProtocolF.CRYPTO_SESSION),
    _front(_F.CLOSE_CRYPTO_SESSION, "Close a crypto session by its id.",
           request=U64, feature=ProtocolF.CRYPTO_SESSION),
    _front(_F.POSTCOPY_ADVISE, "Postcopy is coming; the reply brings a userfaultfd.",
           reply=Empty, policy=_ALWAYS, reply_fds=OPTIONAL_FD, refusal=EMPTY,
           feature=ProtocolF.PAGEFAULT, section="Migration"),
    _front(_F.POSTCOPY_LISTEN, "Register memory with the userfaultfd.",
           feature=ProtocolF.PAGEFAULT, section="Migration"),
    _front(_F.POSTCOPY_END, "Postcopy is over; the reply is a status.",
           reply=U64, policy=_ALWAYS, refusal=U64(1), feature=ProtocolF.PAGEFAULT, section="Migration"),
    _front(_F.GET_INFLIGHT_FD, "A buffer from the back-end to track requests in flight; may be of size 0.",
           request=p.Inflight, reply=p.Inflight, policy=_ALWAYS, reply_fds=OPTIONAL_FD,
           refusal=p.Inflight(0, 0, 0, 0), feature=ProtocolF.INFLIGHT_SHMFD,
           section="Inflight I/O tracking"),
    _front(_F.SET_INFLIGHT_FD, "The tracking buffer, given back after a restart.",
           request=p.Inflight, fds=ONE_FD, feature=ProtocolF.INFLIGHT_SHMFD,
           section="Inflight I/O tracking"),
    _front(_F.GPU_SET_SOCKET, "Socket of the vhost-user-gpu protocol.", fds=ONE_FD),
    _front(_F.RESET_DEVICE, "Disable all rings and reset the device.",
           feature=ProtocolF.RESET_DEVICE, gate=Gate.OFFERED),
    _front(_F.VRING_KICK, "A kick in band.",
           request=VringState, per_ring="index", feature=ProtocolF.INBAND_NOTIFICATIONS,
           section="In-band notifications"),
    _front(_F.GET_MAX_MEM_SLOTS, "How many memory regions the back-end can hold.",
           reply=U64, policy=_ALWAYS, feature=ProtocolF.CONFIGURE_MEM_SLOTS),
    _front(_F.ADD_MEM_REG, "Add a memory region.",
           request=p.SingleRegion, reply=p.SingleRegion, policy=Policy.POSTCOPY, postcopy_ack=True,
           fds=FD_PER_REGION, feature=ProtocolF.CONFIGURE_MEM_SLOTS),
    # The text names a reply, by which QEMU and its own back-ends would lose step: there is none.
    _front(_F.REM_MEM_REG, "Remove the memory region with this guest address, user address and size.",
           request=p.SingleRegion, postcopy_ack=True, fds=UNUSED_FD,
           feature=ProtocolF.CONFIGURE_MEM_SLOTS),
    _front(_F.SET_STATUS, "Device status as the driver wrote it.",
           request=U64, feature=ProtocolF.STATUS, names=(Status,)),
    _front(_F.GET_STATUS, "Device status.",
           reply=U64, policy=_ALWAYS, feature=ProtocolF.STATUS, names=(Status,)),
    _front(_F.GET_SHARED_OBJECT, "The dma-buf of a UUID, if the back-end exports it.",
           request=p.SharedObject, request_also=(Empty,), reply=Empty, reply_also=(U64, p.SharedObject),
           policy=_ALWAYS, reply_fds=OPTIONAL_FD, refusal=EMPTY, feature=ProtocolF.SHARED_OBJECT),
    _front(_F.SET_DEVICE_STATE_FD, "Pipe for the device's state; the reply may bring another one.",
           request=p.DeviceState, reply=U64, policy=_ALWAYS, fds=ONE_FD, reply_fds=FD_UNLESS_NOFD,
           refusal=U64(NOFD | 1), feature=ProtocolF.DEVICE_STATE, section="Migrating back-end state"),
    _front(_F.CHECK_DEVICE_STATE, "Whether the state was transferred; the reply is a status.",
           reply=U64, policy=_ALWAYS, refusal=U64(1), feature=ProtocolF.DEVICE_STATE,
           section="Migrating back-end state"),
    _front(_F.GET_SHMEM_CONFIG, "Sizes of the shared memory regions.",
           reply=p.ShmemConfig, policy=_ALWAYS, refusal=p.ShmemConfig(), feature=ProtocolF.SHMEM_MAP),
    _front(_F.GET_VRING_BASE_SKIP_DRAIN, "GET_VRING_BASE, but what is in flight is left to a successor.",
           request=VringState, reply=VringState, policy=_ALWAYS, per_ring="index",
           feature=ProtocolF.GET_VRING_BASE_SKIP_DRAIN, section="Inflight I/O tracking"),
)  # fmt: skip

_BACKEND_ROWS = (
    _back(_B.BACKEND_IOTLB_MSG, "An IOTLB miss or access failure.",
          request=p.Iotlb, feature=VirtioF.ACCESS_PLATFORM, section="IOMMU support",
          old_name="SLAVE_IOTLB_MSG"),
    _back(_B.BACKEND_CONFIG_CHANGE_MSG, "The configuration space changed.",
          feature=ProtocolF.CONFIG, old_name="SLAVE_CONFIG_CHANGE_MSG"),
    _back(_B.BACKEND_VRING_HOST_NOTIFIER_MSG, "A page of a device's doorbell for a ring, or its removal.",
          request=p.VringArea, fds=FD_UNLESS_NOFD, per_ring="index", feature=ProtocolF.HOST_NOTIFIER,
          old_name="SLAVE_VRING_HOST_NOTIFIER_MSG"),
    _back(_B.BACKEND_VRING_CALL, "A call in band.",
          request=VringState, per_ring="index", feature=ProtocolF.INBAND_NOTIFICATIONS,
          section="In-band notifications", old_name="SLAVE_VRING_CALL"),
    _back(_B.BACKEND_VRING_ERR, "An error in band.",
          request=VringState, per_ring="index", feature=ProtocolF.INBAND_NOTIFICATIONS,
          section="In-band notifications", old_name="SLAVE_VRING_ERR"),
    _back(_B.BACKEND_SHARED_OBJECT_ADD, "This back-end exports the dma-buf of a UUID.",
          request=p.SharedObject, feature=ProtocolF.SHARED_OBJECT),
    _back(_B.BACKEND_SHARED_OBJECT_REMOVE, "This back-end no longer exports a UUID.",
          request=p.SharedObject, feature=ProtocolF.SHARED_OBJECT),
    _back(_B.BACKEND_SHARED_OBJECT_LOOKUP, "The dma-buf of a UUID, whoever exports it.",
          request=p.SharedObject, reply=U64, policy=_ALWAYS, reply_fds=OPTIONAL_FD, refusal=U64(1),
          feature=ProtocolF.SHARED_OBJECT),
    _back(_B.BACKEND_SHMEM_MAP, "Map a file into a shared memory region.",
          request=p.MMap, fds=ONE_FD, feature=ProtocolF.SHMEM_MAP),
    _back(_B.BACKEND_SHMEM_UNMAP, "Unmap a range of a shared memory region.",
          request=p.MMap, feature=ProtocolF.SHMEM_MAP),
)  # fmt: skip

FRONTEND: dict[int, Spec] = {row.id: row for row in _FRONTEND_ROWS}
"""Requests of the front-end by id."""
BACKEND: dict[int, Spec] = {row.id: row for row in _BACKEND_ROWS}
"""Requests of the back-end by id."""


def table(channel: Channel) -> dict[int, Spec]:
    """The requests that travel on a channel."""
    return {Channel.MAIN: FRONTEND, Channel.BACKEND_REQ: BACKEND, Channel.GPU: GPU}[channel]


def table_rows() -> list[dict[str, Any]]:
    """All channels as plain data: ``vhost messages``, and the table in the documentation."""
    return [row.as_dict() for row in (*FRONTEND.values(), *BACKEND.values(), *GPU.values())]


def unknown(number: int, sender: Role) -> Spec:
    """A row for a message that the table does not have, so that it can be shown and refused."""
    return Spec(name=f"message {number}", id=number, sender=sender, doc="Unknown.", request=p.Opaque)


def frame(
    number: int,
    payload: bytes = b"",
    *,
    reply: bool = False,
    need_reply: bool = False,
    version: int = VERSION,
    size: int | None = None,
) -> bytes:
    """A message's bytes with nothing checked: what ``Session`` sends, and what a tester may bend."""
    flags = version | (REPLY_FLAG if reply else 0) | (NEED_REPLY_FLAG if need_reply else 0)
    return HEADER.pack(number, flags, len(payload) if size is None else size) + payload
