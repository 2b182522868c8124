# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A network driver's rings. One thread at a time for each of these: RuntimeError says if there are two."""

from collections.abc import Sequence
from typing import Final, Literal, final, overload

from typing_extensions import Buffer

from vhost.driver_queue import DriverQueue
from vhost.errors import VhostError

__all__ = ["SEQ_BYTES", "SLOT_ALIGN", "NetError", "NetRx", "NetTx"]

SEQ_BYTES: Final = 8
SLOT_ALIGN: Final = 64

class NetError(VhostError):
    """The device spoiled a received frame, which was dropped: its length, its header or its number of
    buffers cannot be. Its buffers are back in the ring, and the next call goes on behind it."""

@final
class NetTx:
    """Sends through ``num`` slots of ``size`` bytes at guest address ``addr``. Headers have 12 bytes, of
    which ``hdr_len`` go out."""

    def __init__(self, queue: DriverQueue, *, addr: int, size: int, num: int, hdr_len: int) -> None: ...
    @property
    def queue(self) -> DriverQueue: ...
    @property
    def longest(self) -> int:
        """Bytes of the longest frame."""

    @property
    def free(self) -> int:
        """Slots that are free, as far as we looked."""

    def reap(self) -> int:
        """Take back what was sent; ``free`` afterwards."""

    def send(self, frame: Buffer, header: Buffer | None = None) -> bool:
        """False: the ring is full. ValueError: no frame has this length."""

    def send_batch(self, frames: Sequence[Buffer], headers: Sequence[Buffer | None] | None = None) -> int:
        """How many fitted."""

    def pump(
        self,
        frame: Buffer,
        count: int | None = None,
        timeout: float | None = None,
        *,
        seq_at: int | None = None,
        seq: int = 0,
    ) -> int:
        """Send one frame again and again; how often it was. ``seq_at``: eight of its bytes count from ``seq``
        on, little-endian."""

@final
class NetRx:
    """Receives into ``num`` slots of ``size`` bytes at guest address ``addr``; ``fill()`` gives them to the
    device for the first time."""

    def __init__(
        self, queue: DriverQueue, *, addr: int, size: int, num: int, hdr_len: int, mergeable: bool
    ) -> None: ...
    @property
    def queue(self) -> DriverQueue: ...
    @property
    def dropped(self) -> int:
        """Frames that the device spoiled."""

    def fill(self) -> None: ...
    def recv(self, finish: bool = True) -> bytes | None:
        """A frame, if there is one; ``finish``: with the checksum that its header left open."""

    @overload
    def recv_batch(
        self, n: int = 32, finish: bool = True, headers: Literal[False] = False
    ) -> list[bytes]: ...
    @overload
    def recv_batch(self, n: int, finish: bool, headers: Literal[True]) -> list[tuple[bytes, bytes]]:
        """With the 12 bytes of each header."""

    def pump(
        self,
        frame: Buffer,
        count: int | None = None,
        timeout: float | None = None,
        *,
        seq_at: int | None = None,
        seq: int = 0,
    ) -> tuple[int, int, int, int]:
        """Receive and compare with one frame, but for its sequence number: how many it were, sequence numbers
        passed over, numbers that came late or again, frames that are others (and do not count)."""
