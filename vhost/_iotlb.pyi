# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The IOTLB of a device."""

from typing import Final, final

from vhost.memory import GuestMemory

__all__ = ["MAX_ENTRIES", "Iotlb"]

MAX_ENTRIES: Final = 4096

@final
class Iotlb:
    """What is mapped: ranges of IOVAs to user addresses in ``memory``. Queues that were made with it
    translate through it; it may only change while none of them is used."""

    def __init__(self, memory: GuestMemory) -> None: ...
    @property
    def memory(self) -> GuestMemory: ...
    def update(self, iova: int, size: int, user_addr: int, access: int) -> None:
        """Map ``size`` bytes. The same mapping adds to what is allowed; another one replaces what is there.
        InvalidGuestMemory, and nothing changes, if it is none or not wholly in memory. Beyond
        ``MAX_ENTRIES``, others go."""

    def invalidate(self, iova: int, size: int) -> None:
        """Unmap; size 0 stands for 2**64."""

    def clear(self) -> None: ...
    def set_memory(self, memory: GuestMemory) -> None:
        """What is mapped to user addresses that it does not have is unmapped."""

    def missing(self, iova: int, size: int, access: int) -> tuple[int, int] | None:
        """The first IOVA that may not be accessed in this way, and what it lacks; None: nothing is."""

    def allows(self, iova: int) -> int | None:
        """What may be done at one IOVA; None: nothing is mapped there."""

    def __len__(self) -> int: ...
