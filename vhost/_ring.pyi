# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
from vhost._iotlb import Iotlb
from vhost.memory import GuestMemory

def ring_areas(
    name: str, memory: GuestMemory, num: int, packed: bool, desc: int, avail: int, used: int
) -> tuple[int, int, int]:
    """Where the three areas of a ring, given by guest addresses, are in this process. InvalidQueue if they
    are misaligned, overlap, or do not lie in memory."""

def ring_misses(
    iotlb: Iotlb, num: int, packed: bool, desc: int, avail: int, used: int
) -> list[tuple[int, int]]:
    """What the areas of a ring, given by IOVAs, lack: of each the first IOVA, and the access."""

def signal_eventfd(fd: int) -> None:
    """Write to an eventfd that a peer may share: one that is full, which is readable, is left as it is."""
