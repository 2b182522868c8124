# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What the IOTLBs of all transports speak of: misses, updates, invalidations.

The numbers are those of the kernel's vhost (struct vhost_iotlb_msg), which vhost-user took over. Knows
nothing of how a message travels.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag

__all__ = ["NO_ACCESS", "Access", "IotlbMessage", "IotlbType"]


class IotlbType(IntEnum):
    MISS = 1
    UPDATE = 2
    INVALIDATE = 3
    ACCESS_FAIL = 4
    # The kernel's only.
    BATCH_BEGIN = 5
    BATCH_END = 6


class Access(IntFlag):
    """What a device may do with a mapping."""

    RO = 1
    WO = 2
    RW = 3


NO_ACCESS = Access(0)


@dataclass(frozen=True, slots=True)
class IotlbMessage:
    """``user_addr`` is an address in the process that shares its memory; ``asid`` the address space, where
    there are several. A miss has neither of them, and no size."""

    type: IotlbType
    iova: int = 0
    size: int = 0
    user_addr: int = 0
    access: Access = NO_ACCESS
    asid: int = 0
