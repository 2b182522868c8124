# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""vhost's ioctls as callables, one class for each kind of argument. Failures raise IoctlError."""

from collections.abc import Mapping
from typing import Any, overload

from vhost.memory import GuestMemory

class Ioctl:
    """One ioctl: what the table says of it."""

    argument: str
    """What a call takes after the descriptor, in words."""
    def __init__(
        self,
        name: str,
        devices: Any,
        doc: str,
        *,
        feature: str = "",
        errors: Mapping[int, str] | None = None,
    ) -> None: ...
    @staticmethod
    def names() -> tuple[str, ...]:
        """All that csrc/vhost_uapi.h knows."""

    @property
    def name(self) -> str: ...
    @property
    def number(self) -> int: ...
    @property
    def devices(self) -> Any: ...
    @property
    def doc(self) -> str: ...
    @property
    def feature(self) -> str: ...
    @property
    def errors(self) -> Mapping[int, str]: ...
    @property
    def nr(self) -> int: ...
    @property
    def type(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def direction(self) -> str:
        """As the program sees it: "r", "w", "rw", or "" for one without an argument."""

class Plain(Ioctl):
    def __call__(self, fd: int, /) -> None: ...

class Scalar(Ioctl):
    """One integer, of the size that the number says; returned by the calls that get it."""

    def __init__(
        self,
        name: str,
        devices: Any,
        doc: str,
        *,
        gives: bool = False,
        feature: str = "",
        errors: Mapping[int, str] | None = None,
    ) -> None: ...
    def __call__(self, fd: int, value: int = 0, /) -> Any: ...

class VringState(Ioctl):
    """An index and a number (struct vhost_vring_state, vhost_vring_worker); the number is returned by the
    calls that get it."""

    def __init__(
        self,
        name: str,
        devices: Any,
        doc: str,
        *,
        gives: bool = False,
        what: str = "ring",
        value: str = "num",
        feature: str = "",
        errors: Mapping[int, str] | None = None,
    ) -> None: ...
    def __call__(self, fd: int, index: int, num: int = 0, /) -> Any: ...

class VringFile(Ioctl):
    """An index and a descriptor; None: none."""

    def __call__(self, fd: int, index: int, file: int | None, /) -> None: ...

class VringAddr(Ioctl):
    def __call__(
        self, fd: int, index: int, desc: int, avail: int, used: int, /, *, log: int = 0, flags: int = 0
    ) -> None: ...

class MemTable(Ioctl):
    """Addresses in this process are those of the regions' own mappings (``Region.host_addr``)."""

    def __call__(self, fd: int, memory: GuestMemory, /) -> None: ...

class Features(Ioctl):
    """Feature bits in any number of 64-bit words. Without ``features``, ``words`` of them are read."""

    @overload
    def __call__(self, fd: int, /, *, words: int = 2) -> int: ...
    @overload
    def __call__(self, fd: int, features: int, /) -> None: ...

class ScsiTarget(Ioctl):
    def __call__(self, fd: int, wwpn: str, /, *, tpgt: int = 0, abi_version: int = 1) -> None: ...

class ConfigRange(Ioctl):
    """A part of the configuration space: an integer reads so many bytes, bytes are written."""

    @overload
    def __call__(self, fd: int, offset: int, size: int, /) -> bytes: ...
    @overload
    def __call__(self, fd: int, offset: int, data: bytes, /) -> None: ...

class IovaRange(Ioctl):
    def __call__(self, fd: int, /) -> tuple[int, int]:
        """First and last."""

def iotlb_write(
    fd: int, *, v2: bool, asid: int, type: int, iova: int, size: int, uaddr: int, perm: int
) -> int:
    """Send an IOTLB message: 0 or an errno."""

def iotlb_read(fd: int) -> tuple[int, int, int, int, int, int] | None:
    """Type, address space, iova, size, uaddr and perm of the next message; None: there is none now."""
