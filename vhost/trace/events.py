# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a trace shows: messages with their findings, and what became of channels. As text and as JSON.

Knows how an event reads; what happened, the tracer knows.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntFlag
from typing import Any

from vhost.features import feature_names
from vhost.trace.lint_base import Seen
from vhost.trace.records import FdInfo
from vhost.trace.rules import Finding, Severity
from vhost.user.payloads import U64, Empty, Opaque, Payload
from vhost.user.spec import Channel, Role

_ARROWS = {Role.FRONTEND: "front>back", Role.BACKEND: "back>front", None: ""}
_LABELS = {Channel.MAIN: "", Channel.BACKEND_REQ: " req", Channel.GPU: " gpu"}
_INDENT = " " * 16
_HEX_BYTES = 64
FDS_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened on a channel at ``time`` (ns since the trace began)."""

    time: int
    session: int
    channel: Channel
    sender: Role | None
    what: str
    """"message", "opened", "closed", "ended", "remark"."""
    text: str
    findings: tuple[Finding, ...] = ()
    detail: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def violations(self) -> int:
        return sum(1 for finding in self.findings if finding.rule.severity is Severity.VIOLATION)

    @property
    def notes(self) -> int:
        return len(self.findings) - self.violations

    def as_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return {
            "time": self.time / 1e9,
            "session": self.session,
            "channel": self.channel.value,
            "sender": None if self.sender is None else self.sender.value,
            "event": self.what,
            **self.detail,
            "text": self.text,
            "findings": [finding.as_dict() for finding in self.findings],
        }

    def lines(self) -> Iterable[str]:
        """For people: one line, and one more for each finding."""
        arrow = _ARROWS[self.sender]
        where = f"#{self.session} {arrow}{_LABELS[self.channel]}"
        yield f"{self.time / 1e9:12.6f} {where:<17} {self.text}"
        for finding in self.findings:
            mark = "!!" if finding.rule.severity is Severity.VIOLATION else " !"
            yield f"{_INDENT}{mark} {finding}"


def message_text(seen: Seen, latency: int | None, flags: str) -> str:
    """The message in one line."""
    parts = [seen.spec.name]
    if seen.is_ack:
        value = seen.payload.value if isinstance(seen.payload, U64) else None
        parts.append("ack" if value == 0 else "refused" if value is not None else "reply")
    elif seen.is_reply:
        parts.append("reply")
    if isinstance(seen.payload, Opaque):
        parts.append(f"<{len(seen.payload.data)} bytes: {_hex(seen.payload.data)}>")
    elif not isinstance(seen.payload, Empty) and not (seen.is_ack and not seen.failed):
        parts.append(seen.spec.show(seen.payload, seen.names) if not seen.is_ack else str(seen.payload))
    if seen.fd_count:
        parts.append(f"fds=[{', '.join(map(str, seen.fds[:FDS_SHOWN]))}{_more(seen)}]")
    if seen.need_reply:
        parts.append("need_reply")
    if flags:
        parts.append(flags)
    if latency is not None:
        parts.append(f"({_duration(latency)})")
    return " ".join(parts)


def message_detail(seen: Seen, latency: int | None, header: tuple[int, int, int]) -> dict[str, Any]:
    """The message as plain data."""
    number, flags, size = header
    return {
        "name": seen.spec.name,
        "id": number,
        "flags": flags,
        "size": size,
        "reply": seen.is_reply,
        "need_reply": seen.need_reply,
        "payload": plain(seen.payload, seen.names),
        "fds": [fd_dict(fd) for fd in seen.fds],
        "fd_count": seen.fd_count,
        "latency": None if latency is None else latency / 1e9,
    }


def fd_dict(fd: FdInfo) -> dict[str, Any]:
    return {"kind": fd.kind, "name": fd.name, "size": fd.size}


def plain(value: Any, names: tuple[type[IntFlag], ...] = ()) -> Any:
    """A payload as what JSON knows; bytes in hexadecimal."""
    if isinstance(value, Payload):
        fields = dataclasses.fields(value)  # type: ignore[arg-type]
        result = {field.name: plain(getattr(value, field.name)) for field in fields}
        if names and isinstance(value, U64):
            result["names"] = feature_names(value.value, *names)
        return result
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    return str(value) if isinstance(value, uuid.UUID) else value


def _more(seen: Seen) -> str:
    hidden = seen.fd_count - min(len(seen.fds), FDS_SHOWN)
    return f", {hidden} more" if hidden else ""


def _hex(data: bytes) -> str:
    return data[:_HEX_BYTES].hex(" ", 4) + (" ..." if len(data) > _HEX_BYTES else "")


def _duration(ns: int) -> str:
    if ns < 1_000_000:
        return f"{ns / 1e3:.0f} us"
    return f"{ns / 1e6:.1f} ms" if ns < 1_000_000_000 else f"{ns / 1e9:.2f} s"
