# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The wire structs of vhost-user: what follows the 12-byte header.

Knows the layout of each payload, in the machine's native byte order, and what makes one well formed.
Knows nothing about messages, file descriptors, features or sockets.

Each class has ``pack()``, ``unpack(bytes)`` and the range of lengths that ``unpack`` may be given
(``MIN_SIZE``..``MAX_SIZE``), by which a receiver judges the announced size before it reads. A payload
that came from a peer is data: ``unpack`` checks lengths and what the specification forbids, and
leaves the meaning of addresses and indices to whoever uses them.
"""

from __future__ import annotations

import dataclasses
import struct
import uuid as _uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from vhost.errors import InvalidMessage

U32_MAX = (1 << 32) - 1
U64_MAX = (1 << 64) - 1

TABLE_REGIONS = 8
"""Regions of a SET_MEM_TABLE by the specification; what we send at most."""
TABLE_REGIONS_ACCEPTED = 32
"""What we accept: VMMs built on rust-vmm send up to this many."""
CONFIG_MAX = 4096
"""Bytes of configuration space in one message; QEMU uses 256, PCI could address 4096."""
SHMEM_REGIONS = 256
NOFD = 1 << 8
"""Bit 8 of the u64 of SET_VRING_KICK/CALL/ERR and others: no descriptor comes with it."""


class Payload(ABC):
    """Base of all payloads; subclasses are frozen dataclasses."""

    __slots__ = ()
    MIN_SIZE: ClassVar[int]
    MAX_SIZE: ClassVar[int]

    @abstractmethod
    def pack(self) -> bytes:
        """The bytes on the wire."""

    @classmethod
    @abstractmethod
    def unpack(cls, data: bytes) -> Self:
        """From the bytes on the wire; InvalidMessage if they are none of this kind."""

    def __str__(self) -> str:
        # Every payload is a dataclass, which the type of this base cannot express.
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return " ".join(f"{field.name}={show(getattr(self, field.name), field.name)}" for field in fields)


_HEX = frozenset({"value", "desc", "used", "avail", "log", "guest_addr", "user_addr", "mmap_offset", "iova"})
_HEX_SIZES = frozenset({"size", "len", "mmap_size", "fd_offset", "shm_offset"})


def show(value: Any, name: str = "") -> str:
    """One field for people: addresses in hexadecimal, bytes by their number."""
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, tuple):
        return "[" + ", ".join(show(item) for item in value) + "]"
    if isinstance(value, Payload):
        return f"({value})"
    if isinstance(value, int) and (name in _HEX or (name in _HEX_SIZES and value >= 4096)):
        return hex(value)
    return str(value)


def check_size(cls: type[Payload], data: bytes) -> None:
    """Raise InvalidMessage for a length that is none of this payload's."""
    if cls.MIN_SIZE <= len(data) <= cls.MAX_SIZE:
        return
    limit = str(cls.MIN_SIZE) if cls.MIN_SIZE == cls.MAX_SIZE else f"{cls.MIN_SIZE} to {cls.MAX_SIZE}"
    raise InvalidMessage(f"payload {cls.__name__}: size {len(data)}, must be {limit}")


class Fixed(Payload):
    """A payload that is one struct with its fields in the dataclass's order."""

    __slots__ = ()
    FORMAT: ClassVar[struct.Struct]

    def __init_subclass__(cls, format: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if format:
            cls.FORMAT = struct.Struct("=" + format)
            cls.MIN_SIZE = cls.MAX_SIZE = cls.FORMAT.size

    def _values(self) -> tuple[Any, ...]:
        # The dataclass's fields in their order, without its ClassVars.
        return tuple([getattr(self, name) for name in self.__match_args__])  # type: ignore[attr-defined]

    def pack(self) -> bytes:
        try:
            return self.FORMAT.pack(*self._values())
        except struct.error as error:
            raise ValueError(f"{type(self).__name__}({self}): {error}") from None

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        if len(data) != cls.MAX_SIZE:
            check_size(cls, data)
        return cls(*cls.FORMAT.unpack(data))


@dataclass(frozen=True, slots=True)
class Empty(Payload):
    """No payload."""

    MIN_SIZE: ClassVar[int] = 0
    MAX_SIZE: ClassVar[int] = 0

    def pack(self) -> bytes:
        return b""

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        if data:
            check_size(cls, data)
        return cls()


EMPTY = Empty()


@dataclass(frozen=True, slots=True)
class Opaque(Payload):
    """The payload of a message that nobody here knows."""

    MIN_SIZE: ClassVar[int] = 0
    MAX_SIZE: ClassVar[int] = 4096
    data: bytes = b""

    def pack(self) -> bytes:
        return self.data

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        check_size(cls, data)
        return cls(data)


@dataclass(frozen=True, slots=True)
class U64(Fixed, format="Q"):
    """A single 64-bit integer."""

    value: int = 0


@dataclass(frozen=True, slots=True)
class VringState(Fixed, format="II"):
    """A vring state description; also its index or, packed, both indices with their wrap counters."""

    index: int
    num: int = 0


@dataclass(frozen=True, slots=True)
class VringAddr(Fixed, format="IIQQQQ"):
    """A vring address description."""

    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int = 0


@dataclass(frozen=True, slots=True)
class VringFd(Payload):
    """The u64 of SET_VRING_KICK, CALL and ERR: bits 0-7 the vring index, bit 8 "no descriptor"."""

    MIN_SIZE: ClassVar[int] = 8
    MAX_SIZE: ClassVar[int] = 8
    index: int
    nofd: bool = False

    def pack(self) -> bytes:
        if not 0 <= self.index <= 0xFF:
            raise ValueError(f"VringFd: index {self.index}, must be 0 to 255")
        return U64(self.index | (NOFD if self.nofd else 0)).pack()

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        value = U64.unpack(data).value
        if value >> 9:
            # Never mask: index 0x10000 must not become ring 0.
            raise InvalidMessage(f"payload VringFd: value {value:#x}, bits 9 to 63 must be 0")
        return cls(value & 0xFF, bool(value & NOFD))


@dataclass(frozen=True, slots=True)
class MemoryRegion(Fixed, format="QQQQ"):
    """A memory region description."""

    guest_addr: int
    size: int
    user_addr: int
    mmap_offset: int = 0


@dataclass(frozen=True, slots=True)
class XenMemoryRegion(Fixed, format="QQQQII"):
    """A memory region description when XEN_MMAP was negotiated."""

    guest_addr: int
    size: int
    user_addr: int
    mmap_offset: int = 0
    xen_flags: int = 0
    domid: int = 0


_TABLE_HEAD = struct.Struct("=II")


@dataclass(frozen=True, slots=True)
class MemTable(Payload):
    """Multiple memory regions. Only the used ones are sent, as all front-ends do."""

    REGION: ClassVar[type[Fixed]] = MemoryRegion
    MIN_SIZE: ClassVar[int] = 8
    MAX_SIZE: ClassVar[int] = 8 + TABLE_REGIONS_ACCEPTED * 32
    regions: tuple[Any, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "regions", tuple(self.regions))

    def pack(self) -> bytes:
        if not 1 <= len(self.regions) <= TABLE_REGIONS:
            raise ValueError(f"MemTable: {len(self.regions)} regions, must be 1 to {TABLE_REGIONS}")
        return _TABLE_HEAD.pack(len(self.regions), 0) + b"".join(region.pack() for region in self.regions)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        check_size(cls, data)
        count, _padding = _TABLE_HEAD.unpack_from(data)
        each = cls.REGION.MAX_SIZE
        if not 1 <= count <= TABLE_REGIONS_ACCEPTED:
            raise InvalidMessage(
                f"payload MemTable: num regions {count}, must be 1 to {TABLE_REGIONS_ACCEPTED}"
            )
        end = 8 + count * each
        # The struct has room for eight (in Linux' virtio_uml for two); one that was sent whole has zeroes
        # behind the used ones.
        rest = data[end:]
        whole = len(data) <= 8 + TABLE_REGIONS * each and not len(rest) % each and not any(rest)
        if len(data) < end or (rest and not whole):
            raise InvalidMessage(f"payload MemTable: size {len(data)}, must be {end} for num regions {count}")
        return cls(tuple(cls.REGION.unpack(data[at : at + each]) for at in range(8, end, each)))


@dataclass(frozen=True, slots=True)
class XenMemTable(MemTable):
    """Multiple memory regions when XEN_MMAP was negotiated."""

    REGION: ClassVar[type[Fixed]] = XenMemoryRegion
    MAX_SIZE: ClassVar[int] = 8 + TABLE_REGIONS_ACCEPTED * 40


@dataclass(frozen=True, slots=True)
class SingleRegion(Payload):
    """Padding and one memory region."""

    REGION: ClassVar[type[Fixed]] = MemoryRegion
    MIN_SIZE: ClassVar[int] = 40
    MAX_SIZE: ClassVar[int] = 40
    region: Any

    def pack(self) -> bytes:
        return bytes(8) + bytes(self.region.pack())

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        check_size(cls, data)
        return cls(cls.REGION.unpack(data[8:]))


@dataclass(frozen=True, slots=True)
class XenSingleRegion(SingleRegion):
    """One memory region when XEN_MMAP was negotiated."""

    REGION: ClassVar[type[Fixed]] = XenMemoryRegion
    MIN_SIZE: ClassVar[int] = 48
    MAX_SIZE: ClassVar[int] = 48


@dataclass(frozen=True, slots=True)
class Log(Fixed, format="QQ"):
    """A log description: what part of the file is the dirty log."""

    size: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Iotlb(Fixed, format="QQQBB6x"):
    """An IOTLB message, ``struct vhost_iotlb_msg`` with its tail padding."""

    iova: int
    size: int
    user_addr: int
    perm: int
    type: int

    MISS: ClassVar[int] = 1
    UPDATE: ClassVar[int] = 2
    INVALIDATE: ClassVar[int] = 3
    ACCESS_FAIL: ClassVar[int] = 4


_CONFIG_HEAD = struct.Struct("=III")


@dataclass(frozen=True, slots=True)
class Config(Payload):
    """A part of the virtio configuration space. ``size`` is the length of ``payload`` on the wire;
    a size of 0 (or, from some, no payload at all) in a reply means that the request failed."""

    MIN_SIZE: ClassVar[int] = 12
    MAX_SIZE: ClassVar[int] = 12 + CONFIG_MAX
    offset: int
    size: int
    flags: int
    payload: bytes

    def pack(self) -> bytes:
        if self.size != len(self.payload) or self.size > CONFIG_MAX:
            raise ValueError(
                f"Config: size {self.size}, payload {len(self.payload)} bytes, limit {CONFIG_MAX}"
            )
        return _CONFIG_HEAD.pack(self.offset, self.size, self.flags) + self.payload

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        check_size(cls, data)
        offset, size, flags = _CONFIG_HEAD.unpack_from(data)
        if size != len(data) - 12:
            raise InvalidMessage(f"payload Config: field size {size}, but {len(data) - 12} bytes follow")
        return cls(offset, size, flags, data[12:])


@dataclass(frozen=True, slots=True)
class VringArea(Fixed, format="QQQ"):
    """A vring area description; ``value`` holds the vring index and, in bit 8, "no descriptor"."""

    value: int
    size: int
    offset: int

    @property
    def index(self) -> int:
        return self.value & 0xFF

    @property
    def nofd(self) -> bool:
        return bool(self.value & NOFD)


@dataclass(frozen=True, slots=True)
class Inflight(Payload):
    """An inflight description: 20 bytes, which C rounds up to 24 on the wire."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("=QQHH")
    MIN_SIZE: ClassVar[int] = 20
    MAX_SIZE: ClassVar[int] = 24
    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int

    def pack(self) -> bytes:
        try:
            head = self.FORMAT.pack(self.mmap_size, self.mmap_offset, self.num_queues, self.queue_size)
        except struct.error as error:
            raise ValueError(f"Inflight({self}): {error}") from None
        return head + bytes(4)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        if len(data) not in (20, 24):
            raise InvalidMessage(f"payload Inflight: size {len(data)}, must be 20 or 24")
        return cls(*cls.FORMAT.unpack_from(data))


@dataclass(frozen=True, slots=True)
class SharedObject(Payload):
    """The UUID of a shared object; its first three components are big-endian on any machine."""

    MIN_SIZE: ClassVar[int] = 16
    MAX_SIZE: ClassVar[int] = 16
    uuid: _uuid.UUID

    def pack(self) -> bytes:
        return self.uuid.bytes

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        check_size(cls, data)
        return cls(_uuid.UUID(bytes=bytes(data)))


@dataclass(frozen=True, slots=True)
class DeviceState(Fixed, format="II"):
    """Device state transfer parameters."""

    direction: int
    phase: int = 0

    SAVE: ClassVar[int] = 0
    LOAD: ClassVar[int] = 1


@dataclass(frozen=True, slots=True)
class MMap(Fixed, format="B7xQQQQ"):
    """A mapping of a shared memory region."""

    shmid: int
    fd_offset: int
    shm_offset: int
    len: int
    flags: int

    READ_WRITE: ClassVar[int] = 1


@dataclass(frozen=True, slots=True)
class ShmemConfig(Payload):
    """Sizes of the shared memory regions by shmid; an unused one is 0."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct(f"=I4x{SHMEM_REGIONS}Q")
    MIN_SIZE: ClassVar[int] = 8 + 8 * SHMEM_REGIONS
    MAX_SIZE: ClassVar[int] = MIN_SIZE
    sizes: tuple[int, ...] = ()

    def pack(self) -> bytes:
        if len(self.sizes) > SHMEM_REGIONS:
            raise ValueError(f"ShmemConfig: {len(self.sizes)} sizes, must be at most {SHMEM_REGIONS}")
        used = sum(1 for size in self.sizes if size)
        return self.FORMAT.pack(used, *self.sizes, *(0,) * (SHMEM_REGIONS - len(self.sizes)))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        check_size(cls, data)
        count, *sizes = cls.FORMAT.unpack(data)
        while sizes and not sizes[-1]:
            sizes.pop()
        if count != sum(1 for size in sizes if size):
            raise InvalidMessage(f"payload ShmemConfig: num regions {count} does not match {sizes}")
        return cls(tuple(sizes))


@dataclass(frozen=True, slots=True)
class CryptoSession(Payload):
    """A crypto session description. The specification leaves it to QEMU's struct: an opcode, the
    session's parameters with their keys (a union of 1056 bytes), the session id (negative: failed)."""

    SETUP: ClassVar[int] = 1056
    FORMAT: ClassVar[struct.Struct] = struct.Struct("=Q1056sq")
    MIN_SIZE: ClassVar[int] = 1072
    MAX_SIZE: ClassVar[int] = 1072
    op_code: int
    setup: bytes
    session_id: int = 0

    def __post_init__(self) -> None:
        if len(self.setup) > self.SETUP:
            raise ValueError(f"CryptoSession: setup of {len(self.setup)} bytes, must be at most {self.SETUP}")
        object.__setattr__(self, "setup", self.setup.ljust(self.SETUP, b"\0"))

    def pack(self) -> bytes:
        return self.FORMAT.pack(self.op_code, self.setup, self.session_id)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        check_size(cls, data)
        return cls(*cls.FORMAT.unpack(data))


XEN_VARIANT: dict[type[Payload], type[Payload]] = {MemTable: XenMemTable, SingleRegion: XenSingleRegion}
"""What a payload becomes when XEN_MMAP was negotiated."""
