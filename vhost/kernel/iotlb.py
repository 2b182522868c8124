# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Messages of the kernel's IOTLB: read from and written to a vhost device's descriptor.

Knows how they travel (struct vhost_msg and vhost_msg_v2), and nothing of who sends them why; what they say is
in vhost.iotlb.
"""

from __future__ import annotations

from errno import EFAULT, EINVAL, ENOMEM
from typing import Self

from vhost import iotlb
from vhost.errors import IoctlError
from vhost.iotlb import Access, IotlbType
from vhost.kernel._ioctl import iotlb_read, iotlb_write

__all__ = ["Access", "IotlbMessage", "IotlbType"]

_HINTS = {
    # The kernel says this whatever the reason is.
    EFAULT: "something is mapped there already; or the user address is none of this process; or it is out"
    " of the device's IOVA range; or no such address space; or more memory than this process may lock"
    " (ulimit -l); or ACCESS_PLATFORM was not acknowledged",
    EINVAL: "an empty range, or no message that the device knows",
    ENOMEM: "more memory than this process may lock (ulimit -l)",
}


class IotlbMessage(iotlb.IotlbMessage):
    """``user_addr`` is an address in this process."""

    __slots__ = ()

    def write(self, fd: int, *, v2: bool, name: str) -> None:
        """IoctlError if the kernel refuses it."""
        if self.asid and not v2:
            raise ValueError(f"address space {self.asid}: needs the backend feature IOTLB_MSG_V2")
        failed = iotlb_write(
            fd,
            v2=v2,
            asid=self.asid,
            type=self.type,
            iova=self.iova,
            size=self.size,
            uaddr=self.user_addr,
            perm=self.access,
        )
        if failed:
            detail = f"IOVA {self.iova:#x}, size {self.size:#x}, user address {self.user_addr:#x}"
            detail += f", address space {self.asid}" if self.asid else ""
            raise IoctlError(failed, f"{name}: IOTLB {self.type.name}", detail, _HINTS.get(failed, ""))

    @classmethod
    def read(cls, fd: int) -> Self | None:
        """The next message; None if there is none now."""
        found = iotlb_read(fd)
        if found is None:
            return None
        kind, asid, iova, size, user_addr, perm = found
        return cls(IotlbType(kind), iova, size, user_addr, Access(perm), asid)
