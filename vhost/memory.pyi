# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Guest memory: mappings (``Region``) and immutable tables of them (``GuestMemory``)."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, final, overload

from typing_extensions import Buffer

__all__ = ["MAX_REGIONS", "GuestMemory", "Region", "has_sigbus_handler", "install_sigbus_handler"]

MAX_REGIONS: Final = 509

def install_sigbus_handler() -> None:
    """Survive a memory file that its owner truncates under a mapping.

    Process-wide, so only a program does it, never the library: from now on a SIGBUS inside a mapped
    region puts zero pages there and sets ``Region.broken``; any other SIGBUS goes where it went before.
    """

def has_sigbus_handler() -> bool:
    """Whether the program called ``install_sigbus_handler``."""

@final
class Region:
    """One mapping of guest memory; unmapped when the last object that refers to it goes.

    Supports the buffer protocol (writable).
    """

    @classmethod
    def allocate(
        cls, size: int, *, guest_addr: int = 0, user_addr: int | None = None, name: str = "vhost"
    ) -> Region:
        """Zeroed memory in a memfd that cannot change its size; ``user_addr`` None: our own address."""

    @classmethod
    def from_fd(
        cls,
        fd: int,
        size: int,
        *,
        guest_addr: int,
        user_addr: int,
        mmap_offset: int = 0,
        what: str = "memory region",
    ) -> Region:
        """Map a part of somebody's file. The caller keeps ``fd``, and may close it at once. ``what``: its
        name in errors."""

    @classmethod
    def from_iotlb(cls, fd: int, size: int, *, iova: int, offset: int, writable: bool) -> Region:
        """Map what the kernel says lies at ``iova``: a file of any kind, from ``offset`` on. The caller
        keeps ``fd``, and may close it at once. Not ``writable``: what is written is seen by us alone."""

    @property
    def guest_addr(self) -> int: ...
    @property
    def user_addr(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def mmap_offset(self) -> int: ...
    @property
    def host_addr(self) -> int: ...
    @property
    def fd(self) -> int:
        """The memfd of ``allocate``, to be sent to a back-end; -1 for a region that came from an fd."""

    @property
    def broken(self) -> bool:
        """The file shrank under us, and a SIGBUS was caught (see ``install_sigbus_handler``)."""

    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class GuestMemory(Sequence[Region]):
    """An immutable table of regions that overlap neither in guest nor in user addresses."""

    def __init__(self, regions: Iterable[Region] = ()) -> None: ...
    @property
    def regions(self) -> tuple[Region, ...]: ...
    def add(self, region: Region) -> GuestMemory: ...
    def remove(self, *, guest_addr: int, user_addr: int, size: int) -> GuestMemory: ...
    def view(self, addr: int, size: int) -> memoryview:
        """A writable view of guest memory, which must lie in one region."""

    def views(self, addr: int, size: int) -> list[memoryview]:
        """The same, in as many pieces as it takes."""

    def read(self, addr: int, size: int) -> bytes: ...
    def write(self, addr: int, data: Buffer) -> None: ...
    def user_to_guest(self, user_addr: int) -> int: ...
    def guest_to_user(self, guest_addr: int) -> int: ...
    @property
    def broken(self) -> bool:
        """Is one of the regions broken?"""

    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, index: int) -> Region: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Region, ...]: ...
    def __iter__(self) -> Iterator[Region]: ...
    def __contains__(self, region: object) -> bool: ...
    def __reversed__(self) -> Iterator[Region]: ...
    def index(self, value: Any, start: int = 0, stop: int = ...) -> int: ...
    def count(self, value: Any) -> int: ...
