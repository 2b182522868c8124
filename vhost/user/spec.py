# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a row of the message table says, and a message as an object.

Knows how a row is read: which payload types a size allows, how many descriptors belong to a payload,
whether a feature mask activates it. Knows no particular message (messages.py), keeps no state of a
connection (session.py).
"""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, IntFlag
from typing import Any, NamedTuple

from vhost.errors import InvalidMessage
from vhost.features import ProtocolF, VhostF, VirtioF, feature_names
from vhost.user.payloads import EMPTY, TABLE_REGIONS_ACCEPTED, XEN_VARIANT, Empty, MemTable, Payload, show

HEADER = struct.Struct("=III")
HEADER_SIZE = 12
VERSION = 1
VERSION_MASK = 3
REPLY_FLAG = 1 << 2
NEED_REPLY_FLAG = 1 << 3
POSTCOPY_ACK_SIZE = 8
_LOG_SHMFD = int(ProtocolF.LOG_SHMFD)
MAX_FDS = TABLE_REGIONS_ACCEPTED
"""As many as any message has. Linux lets 253 through at a time, and then a few sessions with a message
that is never finished would hold all that the process may have, which others need."""


class Role(Enum):
    """Which end of the connection."""

    FRONTEND = "front-end"
    BACKEND = "back-end"


class Channel(Enum):
    """The connection itself, the one that SET_BACKEND_REQ_FD passes for requests the other way, or the one
    that GPU_SET_SOCKET passes, which speaks the vhost-user-gpu protocol: the same frames, but no version
    in the flags and no need_reply, and in requests nothing that means anything."""

    MAIN = "main"
    BACKEND_REQ = "back-end requests"
    GPU = "gpu"


class Policy(Enum):
    """When a request is answered."""

    ACK = "ack"
    """With a u64 status when the sender sets need_reply (REPLY_ACK)."""
    ALWAYS = "always"
    """With the row's reply payload; need_reply changes nothing."""
    LOG_SHMFD = "log"
    """With the row's reply payload if LOG_SHMFD was negotiated, else as ACK."""
    POSTCOPY = "postcopy"
    """With the row's reply payload after POSTCOPY_LISTEN, else as ACK."""


class Gate(Enum):
    """How strictly the row's feature is demanded of a peer."""

    NEGOTIATED = "negotiated"
    OFFERED = "offered"
    """The specification asks only that the back-end offered it."""
    ADVICE = "advice"
    """Real front-ends send it regardless, and it does no harm."""


@dataclass(frozen=True, slots=True)
class Fds:
    """How many file descriptors belong to a message."""

    least: int = 0
    most: int = 0
    rule: str = ""
    """"nofd": exactly one unless the payload's "no descriptor" bit is set; "disabled": unless it disables a
    scanout; "region": one each."""
    discard: bool = False
    """Tolerated from peers that got it wrong, closed unused (REM_MEM_REG)."""

    def expected(self, payload: Payload) -> tuple[int, int]:
        if self.rule in ("nofd", "disabled"):
            count = 0 if _nofd(payload) else 1
            return count, count
        if self.rule == "region":
            count = len(payload.regions) if isinstance(payload, MemTable) else int(hasattr(payload, "region"))
            return count, count
        return self.least, self.most

    def complaint(self, count: int, payload: Payload) -> str | None:
        """What is wrong with that many descriptors, or None."""
        least, most = self.expected(payload)
        if least <= count <= most:
            return None
        return f"{count} file descriptors, must be {least if least == most else f'{least} to {most}'}"

    def __str__(self) -> str:
        if self.rule:
            return {"nofd": "1 or NOFD bit", "disabled": "1 or 0x0", "region": "1 per region"}[self.rule]
        text = str(self.least) if self.least == self.most else f"{self.least}..{self.most}"
        return text + (" (closed unused)" if self.discard else "")


def _nofd(payload: Any) -> bool:
    if hasattr(payload, "nofd"):
        return bool(payload.nofd)
    return bool(payload.value & (1 << 8))


NO_FDS = Fds()
ONE_FD = Fds(1, 1)
OPTIONAL_FD = Fds(0, 1)
FD_UNLESS_NOFD = Fds(0, 1, "nofd")
FD_UNLESS_DISABLED = Fds(0, 1, "disabled")
FD_PER_REGION = Fds(0, MAX_FDS, "region")
UNUSED_FD = Fds(0, 1, discard=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One message: a row of the table."""

    name: str
    id: int
    sender: Role
    doc: str
    request: type[Payload] = Empty
    reply: type[Payload] | None = None
    policy: Policy = Policy.ACK
    fds: Fds = NO_FDS
    reply_fds: Fds = NO_FDS
    feature: IntFlag | None = None
    gate: Gate = Gate.NEGOTIATED
    per_ring: str | None = None
    """The payload's field that holds the ring index."""
    section: str = "Front-end message types"
    postcopy_ack: bool = False
    """After POSTCOPY_LISTEN a u64 in place of the payload, 0, acknowledges the replies before; it has
    none itself (SET_MEM_TABLE)."""
    request_also: tuple[type[Payload], ...] = ()
    reply_also: tuple[type[Payload], ...] = ()
    """Other payloads that peers send, told apart by their size."""
    refusal: Payload | None = None
    """The reply that means "failed", for rows whose reply is not an ack."""
    names: tuple[type[IntFlag], ...] = ()
    """Flags by which a u64 is shown."""
    old_name: str | None = None
    handler: str = field(init=False)
    feature_bit: int = field(init=False, repr=False)
    _types: tuple[tuple[type[Payload], ...], ...] = field(init=False, repr=False)
    _limits: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        set_derived = object.__setattr__  # the dataclass is frozen
        set_derived(self, "handler", self.name.lower().removeprefix("backend_"))
        set_derived(self, "feature_bit", int(self.feature or 0))
        plain = (
            (self.request, *self.request_also),
            (self.reply, *self.reply_also) if self.reply is not None else (),
        )
        types = plain + tuple(tuple(XEN_VARIANT.get(kind, kind) for kind in kinds) for kinds in plain)
        set_derived(self, "_types", types)
        set_derived(
            self, "_limits", tuple(max((kind.MAX_SIZE for kind in kinds), default=0) for kinds in types)
        )

    def payload_types(self, reply: bool, *, xen: bool = False) -> tuple[type[Payload], ...]:
        return self._types[reply + 2 * xen]

    def decode(self, data: bytes, *, reply: bool = False, xen: bool = False) -> Payload:
        """The payload of a request or reply; InvalidMessage if none of the row's types fits."""
        types = self.payload_types(reply, xen=xen)
        for kind in types:
            if kind.MIN_SIZE <= len(data) <= kind.MAX_SIZE:
                return kind.unpack(data)
        sizes = ", ".join(
            f"{kind.MIN_SIZE}" if kind.MIN_SIZE == kind.MAX_SIZE else f"{kind.MIN_SIZE} to {kind.MAX_SIZE}"
            for kind in types
        )
        raise InvalidMessage(f"payload size {len(data)}, must be {sizes or 'absent: it has no reply'}")

    def max_size(self, reply: bool, *, xen: bool = False) -> int:
        return self._limits[reply + 2 * xen]

    def active(self, features: int, protocol_features: int, offered: int = 0) -> bool:
        """Whether the row's feature allows the message."""
        if self.feature is None or self.gate is Gate.ADVICE:
            return True
        if isinstance(self.feature, (VirtioF, VhostF)):
            return bool(int(features) & self.feature_bit)
        word = int(protocol_features) | (int(offered) if self.gate is Gate.OFFERED else 0)
        return bool(word & self.feature_bit)

    def replies(self, protocol_features: int, postcopy: bool = False, size: int = 0) -> bool:
        """Whether the row's own reply payload answers it, as opposed to an ack. ``size``: of the request's
        payload."""
        if self.policy is Policy.ACK:
            return False
        if self.policy is Policy.ALWAYS:
            return True
        if self.policy is Policy.POSTCOPY:
            return postcopy and not self.acks_postcopy(postcopy, size)
        return bool(int(protocol_features) & _LOG_SHMFD)

    def acks_postcopy(self, postcopy: bool, size: int) -> bool:
        """Whether a request with a payload of this size is no request but the acknowledgement."""
        return postcopy and self.postcopy_ack and size == POSTCOPY_ACK_SIZE

    @property
    def feature_name(self) -> str:
        if self.feature is None:
            return ""
        prefix = {
            "ProtocolF": "VHOST_USER_PROTOCOL_F_",
            "VirtioF": "VIRTIO_F_",
            "VhostF": "VHOST_USER_F_",
            "GpuF": "VHOST_USER_GPU_PROTOCOL_F_",
        }
        return prefix[type(self.feature).__name__] + (self.feature.name or "")

    def ring_index(self, payload: Any) -> int | None:
        return getattr(payload, self.per_ring) if self.per_ring else None

    def show(self, payload: Payload, names: tuple[type[IntFlag], ...] | None = None) -> str:
        """The payload for people, with the names of feature bits: the row's, or those given."""
        value = getattr(payload, "value", None)
        names = self.names if names is None else names
        if names and isinstance(value, int):
            return f"value={value:#x} ({' '.join(feature_names(value, *names)) or 'none'})"
        return str(payload)

    def as_dict(self) -> dict[str, Any]:
        """The row as plain data, for tables and JSON."""
        return {
            "id": self.id,
            "name": self.name,
            "old_name": self.old_name or "",
            "sender": self.sender.value,
            "request": "" if self.request is Empty else self.request.__name__,
            "reply": "" if self.reply is None else self.reply.__name__,
            "answered": self.policy.value,
            "fds": str(self.fds),
            "reply_fds": str(self.reply_fds),
            "feature": self.feature_name,
            "per_ring": self.per_ring is not None,
            "handler": self.handler,
            "section": self.section,
            "doc": self.doc,
        }


@dataclass(slots=True, eq=False)
class Message:
    """A message that was received. It owns its descriptors until they are taken or it is closed."""

    spec: Spec
    payload: Any = EMPTY
    fds: list[int] = field(default_factory=list)
    need_reply: bool = False
    is_reply: bool = False
    is_ack: bool = False
    """A reply that is only the status of REPLY_ACK."""
    own_reply: bool = False
    """A request that is answered by its row's reply payload rather than an ack."""
    answered: bool = False
    number: int = 0
    """Of a reply: that of the request that it answers."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def id(self) -> int:
        return self.spec.id

    @property
    def waits(self) -> bool:
        """The peer waits for an answer that was not given yet."""
        return (self.need_reply or self.own_reply) and not self.answered and not self.is_reply

    @property
    def status(self) -> int:
        """The value of an ack."""
        return int(self.payload.value)

    def take_fds(self) -> list[int]:
        """Hand the descriptors over; whoever calls this closes them."""
        fds, self.fds = self.fds, []
        return fds

    def take_fd(self) -> int | None:
        """The only descriptor, or None if none came."""
        return self.fds.pop() if self.fds else None

    def close(self) -> None:
        """Close the descriptors that nobody took."""
        close_fds(self.take_fds())

    def __del__(self) -> None:
        if self.fds:
            warnings.warn(f"{self}: descriptors never taken nor closed", ResourceWarning, stacklevel=2)
            self.close()

    def __str__(self) -> str:
        return describe(self)


class Answer(NamedTuple):
    """What a handler answers with when a descriptor goes with its payload. They are closed once sent."""

    payload: Payload
    fds: Sequence[int] = ()

    @classmethod
    def of(cls, value: Answer | Payload) -> Answer:
        return value if isinstance(value, Answer) else cls(value)


@dataclass(slots=True, eq=False)
class Outgoing:
    """A message to send: bytes, and descriptors that stay the caller's and go with the first byte."""

    data: bytes
    fds: tuple[int, ...]
    expects_reply: bool
    spec: Spec
    payload: Any = EMPTY
    need_reply: bool = False
    is_reply: bool = False
    number: int = 0
    """Of a request that is answered: which one of the channel it is, from 1 on."""

    @property
    def name(self) -> str:
        return self.spec.name

    def __str__(self) -> str:
        return describe(self)


def describe(message: Message | Outgoing) -> str:
    """One line for logs and traces."""
    payload = message.payload
    parts = [message.spec.name + (" reply" if message.is_reply else "")]
    if not isinstance(payload, Empty):
        parts.append(message.spec.show(payload))
    if message.fds:
        parts.append(f"fds={show(tuple(message.fds))}")
    if message.need_reply:
        parts.append("need_reply")
    return " ".join(parts)


def close_fds(fds: Sequence[int]) -> None:
    """Close all, even when one of them was closed behind our back, which is reported afterwards."""
    failed: OSError | None = None
    for fd in fds:
        try:
            os.close(fd)
        except OSError as error:
            failed = error
    if failed is not None:
        raise failed
