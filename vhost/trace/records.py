# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What was seen on the wire, before anybody made sense of it.

A trace is a sequence of records; the same records give the same events, live or from a file. Knows no
message and no socket.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from vhost.user.spec import Role

KEPT = 64 * 1024
"""Bytes of one message that are kept; what comes beyond is passed on and counted."""


@dataclass(frozen=True, slots=True)
class FdInfo:
    """A descriptor as the one who passed it on found it. ``size`` in bytes, of what has one."""

    kind: str
    name: str = ""
    size: int | None = None

    def __str__(self) -> str:
        parts = [self.kind, self.name]
        if self.size is not None:
            parts.append(_size(self.size))
        return " ".join(part for part in parts if part)


def printable(text: str) -> str:
    """Text of a stranger's, with nothing in it that a terminal would obey."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _size(value: int) -> str:
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if value and not value & ((1 << shift) - 1):
            return f"{value >> shift} {unit}"
    return f"{value} B"


class Happening(Enum):
    """What a record tells of."""

    OPEN = "open"
    """A channel is there; ``text`` says which, by the value of ``Channel``."""
    DATA = "data"
    """``sender`` wrote bytes, never more than to the end of a message, and the descriptors with them."""
    EOF = "eof"
    """``sender`` will send no more; ``text`` says why if it did not just close."""
    CLOSE = "close"
    """The channel is gone in both directions."""
    REMARK = "remark"
    """Something that the one in between has to say, in ``text``."""


@dataclass(frozen=True, slots=True)
class Record:
    """``time`` in ns since the trace began. Sessions count from 1, a session's channels from 0, which is
    the connection itself."""

    time: int
    session: int
    channel: int
    happening: Happening
    sender: Role | None = None
    data: bytes = b""
    skipped: int = 0
    """Bytes that followed ``data`` and were not kept."""
    fds: tuple[FdInfo, ...] = ()
    text: str = ""
    delivered: bool = True
    """False: the other side was gone."""
