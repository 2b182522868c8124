# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Every exception that this package raises for something that went wrong outside it.

``VhostError`` is the root. Wrong arguments of the caller raise ``ValueError`` or ``TypeError`` as
everywhere in Python. Messages name the message, queue or address, the field, its value and the
limit; the attributes carry the same for programs.
"""

from __future__ import annotations

import os
from typing import Any


class VhostError(Exception):
    """Anything that pyvhost reports about guests, peers, kernels and their data."""


class InvalidGuestMemory(VhostError):
    """A memory table, region or guest address that cannot be used."""


class InvalidQueue(VhostError):
    """A virtqueue that is set up wrongly or that the other side broke."""


class QueueBroken(InvalidQueue):
    """The other side broke the rules of the ring; nothing more is processed on it."""

    def __init__(self, queue: str, reason: str) -> None:
        super().__init__(f"{queue}: {reason}")
        self.queue = queue
        self.reason = reason


class InvalidLogAddress(VhostError):
    """A dirty log that does not cover what has to be marked."""


class IoctlError(VhostError, OSError):
    """An ioctl, or the opening of a device node, that the kernel refused; ``errno`` and ``strerror`` as in
    OSError. ``ioctl`` is its name, ``detail`` its argument in words, ``hint`` what the error means here."""

    def __init__(self, errno: int, ioctl: str, detail: str = "", hint: str = "") -> None:
        text = f"{ioctl}: {os.strerror(errno)}" + (f" ({detail})" if detail else "")
        OSError.__init__(self, errno, f"{text}: {hint}" if hint else text)
        self.ioctl = ioctl
        self.detail = detail
        self.hint = hint


class DeviceBusy(VhostError):
    """The device, or the file behind it, is in use by another session."""


class ProtocolError(VhostError):
    """vhost-user: the peer and we do not agree. ``request`` is the message's name, if known.

    ``message`` is set when the stream is still in step: exactly one message was refused, it can be
    answered with a failure and the session can go on. None means that the connection is lost.
    """

    def __init__(self, text: str, *, request: str | None = None, message: Any = None) -> None:
        super().__init__(f"{request}: {text}" if request else text)
        self.text = text
        self.request = request
        self.message = message


class InvalidMessage(ProtocolError):
    """A header or payload that the specification does not allow."""


class OversizedMessage(InvalidMessage):
    """A payload longer than its message can be."""


class PartialMessage(ProtocolError):
    """The connection ended in the middle of a message."""


class Disconnected(ProtocolError):
    """The peer closed the connection."""


class IncorrectFds(InvalidMessage):
    """Too many, too few or the wrong kind of file descriptors with a message."""


class InactiveFeature(ProtocolError):
    """A message whose feature was not negotiated."""


class UnsupportedRequest(ProtocolError):
    """A message that this side does not serve."""


class InvalidState(ProtocolError):
    """A message that comes at the wrong time."""


class RequestFailed(ProtocolError):
    """The peer answered that it failed: a non-zero REPLY_ACK. ``status`` is the value."""

    def __init__(
        self, text: str, *, request: str | None = None, status: int = 1, message: Any = None
    ) -> None:
        super().__init__(text, request=request, message=message)
        self.status = status


class ReplyTimeout(ProtocolError, TimeoutError):
    """The peer did not answer in time."""
