# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
from vhost.memory import GuestMemory

def ring_areas(
    name: str, memory: GuestMemory, num: int, packed: bool, desc: int, avail: int, used: int
) -> tuple[int, int, int]:
    """Where the three areas of a ring, given by guest addresses, are in this process. InvalidQueue if they
    are misaligned, overlap, or do not lie in memory."""
