# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Where one message ends and the next begins, and nothing of what they mean.

A tracer must go on after what a session would refuse: any size is taken as it is announced, 4 GiB too,
but no more than KEPT bytes of it are ever held.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from vhost.trace.records import KEPT, FdInfo
from vhost.user.spec import HEADER, HEADER_SIZE, MAX_FDS


class Boundary:
    """Follows a stream from message to message: how much belongs to the one that it is in."""

    __slots__ = ("_head", "_left")

    def __init__(self) -> None:
        self._head = bytearray()
        self._left = 0

    @property
    def wanted(self) -> int:
        """Bytes to the end of the header, or of the payload."""
        return self._left or HEADER_SIZE - len(self._head)

    @property
    def in_header(self) -> bool:
        return not self._left

    @property
    def between(self) -> bool:
        """Nothing of a message was seen yet."""
        return not self._left and not self._head

    @property
    def header(self) -> tuple[int, int, int] | None:
        """Request, flags and size of the message whose payload is due; None in a header and after."""
        return HEADER.unpack(self._head) if self._left else None

    def advance(self, data: bytes | memoryview) -> tuple[int, int, int] | None:
        """Take the next bytes, at most ``wanted``; the header when they complete one."""
        if self._left:
            self.skip(len(data))
            return None
        self._head += data
        if len(self._head) < HEADER_SIZE:
            return None
        header = HEADER.unpack(self._head)
        self._left = header[2]
        if not self._left:
            self._head.clear()
        return header

    def skip(self, count: int) -> None:
        """Like ``advance`` in a payload, for bytes that nobody kept."""
        self._left -= count
        if not self._left:
            self._head.clear()


@dataclass(slots=True)
class Frame:
    """One message, as far as it came."""

    time: int
    header: tuple[int, int, int] | None = None
    data: bytearray = field(default_factory=bytearray)
    """The payload, at most KEPT bytes of it."""
    received: int = 0
    """Bytes of header and payload."""
    fds: list[FdInfo] = field(default_factory=list)
    fd_count: int = 0
    delivered: bool = True
    announced: bool = False
    """It was told of before, because it is too long to be held."""

    @property
    def size(self) -> int:
        return self.header[2] if self.header else 0

    @property
    def too_long(self) -> bool:
        return self.size > KEPT

    @property
    def whole(self) -> bool:
        return self.header is not None and self.received == HEADER_SIZE + self.size


class Assembler:
    """Puts the messages of one direction together again."""

    def __init__(self) -> None:
        self._boundary = Boundary()
        self.frame: Frame | None = None
        """The message that is not whole yet."""

    def feed(
        self, time: int, data: bytes, skipped: int, fds: tuple[FdInfo, ...], delivered: bool
    ) -> Iterator[Frame]:
        """Messages that are whole now, and those that are too long to wait for, once before."""
        view = memoryview(data)
        while view or skipped or fds:
            frame = self.frame
            if frame is None:
                frame = self.frame = Frame(time)
            frame.delivered &= delivered
            frame.fd_count += len(fds)
            frame.fds += fds[: max(0, MAX_FDS - len(frame.fds))]
            fds = ()
            if view:
                part = view[: self._boundary.wanted]
                view = view[len(part) :]
                in_header = self._boundary.in_header
                header = self._boundary.advance(part)
                frame.received += len(part)
                if header is not None:
                    frame.header = header
                elif not in_header:
                    frame.data += part[: max(0, KEPT - len(frame.data))]
            elif self._boundary.in_header:
                # Only payloads are skipped; a file that says otherwise is wrong, and this its end.
                skipped = 0
            else:
                count = min(skipped, self._boundary.wanted)
                self._boundary.skip(count)
                frame.received += count
                skipped -= count
            if frame.whole:
                self.frame = None
                yield frame
            elif frame.too_long and not frame.announced:
                yield frame
                frame.announced = True
