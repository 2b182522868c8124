# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a device takes off a queue: a chain of buffers in guest memory."""

from typing import final

from typing_extensions import Buffer as _Buffer

from vhost.wire import Struct

__all__ = ["Buffer", "Chain"]

@final
class Buffer:
    """A piece of guest memory with the buffer protocol, which keeps its mapping alive.

    Goes as it is, in a tuple, into os.preadv, os.pwritev, socket.sendmsg and socket.recvmsg_into;
    ``memoryview(buffer)`` and ``bytes(buffer)`` work as usual. Device-readable ones are read-only.
    """

    @property
    def readonly(self) -> bool: ...
    @property
    def address(self) -> int:
        """Where it is in this process."""

    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class Chain:
    """One request: bytes that the device may read, followed by bytes that it may write.

    The other side can change the bytes at any time: what has to be checked is read once.
    """

    @property
    def id(self) -> int: ...
    @property
    def readable_len(self) -> int: ...
    @property
    def writable_len(self) -> int: ...
    @property
    def data_room(self) -> int:
        """Writable bytes before the status, see ``finish``."""

    @property
    def readable(self) -> tuple[Buffer, ...]: ...
    @property
    def writable(self) -> tuple[Buffer, ...]: ...
    def readable_part(self, offset: int, size: int = -1) -> tuple[Buffer, ...]:
        """The buffers that make up ``size`` readable bytes from ``offset`` on (-1: all the rest)."""

    def writable_part(self, offset: int, size: int = -1) -> tuple[Buffer, ...]: ...
    def read(self, n: int = -1) -> bytes:
        """The next ``n`` readable bytes, fewer at the end."""

    def unpack(self, struct: Struct) -> tuple[int, ...]:
        """The next readable bytes as a structure, wherever the driver cut them into pieces; each byte is read
        once. If there are too few of them this is no request: the queue is broken, and QueueBroken raised."""

    def readinto(self, buffer: _Buffer) -> int: ...
    def write(self, data: _Buffer) -> int:
        """Put all of ``data`` into the next writable bytes; ValueError if it does not fit."""

    def read_at(self, offset: int, n: int) -> bytes:
        """Exactly ``n`` readable bytes from ``offset`` on; the cursor stays."""

    def write_at(self, offset: int, data: _Buffer) -> None:
        """Put ``data`` into the writable bytes from ``offset`` on; ``written`` stays."""

    def finish(self, status: int, data_written: int | None = None) -> None:
        """Put ``status`` into the last writable byte, and push the chain to the queue that it came from: with
        one byte more than ``data_written``, by default what ``write`` has written.

        A chain that has no room for a status breaks its queue, as too short a header does: QueueBroken. What
        must not have happened then looks at ``data_room`` before.
        """

    @property
    def written(self) -> int:
        """Bytes that ``write`` has written: what ``push`` reports unless it is told otherwise."""
