# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Structures as the VIRTIO specification writes them, compiled."""

from typing import final

from typing_extensions import Buffer

__all__ = ["Struct"]

@final
class Struct:
    """A packed structure of unsigned integers, in the specification's own words (VIRTIO 1.2, 1.4)::

        HEADER = Struct("le32 type; le32 reserved; le64 sector")

        for chain in queue:
            kind, _, sector = chain.unpack(HEADER)

    Members are u8, le16, le32, le64, be16, be32 and be64, up to 64 of them; there is no padding but what is
    named. ValueError otherwise.
    """

    def __new__(cls, members: str) -> Struct: ...
    @property
    def size(self) -> int:
        """In bytes."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The members' names."""

    def unpack(self, data: Buffer) -> tuple[int, ...]:
        """The values of ``size`` bytes; ValueError if it is another number of bytes."""

    def pack(self, *values: int) -> bytes:
        """ValueError if there are too few or too many, or one is out of its member's range."""

    def pack_into(self, buffer: Buffer, offset: int, *values: int) -> None:
        """As ``pack``, at this offset of a writable buffer."""
