# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""VhostVsock: the kernel's end of a guest's vsock (AF_VSOCK sockets of this machine are the other)."""

from __future__ import annotations

import os
from typing import ClassVar

from vhost.kernel import ioctls as k
from vhost.kernel.base import KernelVhost


class VhostVsock(KernelVhost):
    """The guest with the address ``guest_cid`` (3 to 0xfffffffe). Ring 0 receives, ring 1 sends; a driver's
    event queue is not the kernel's. The rings run from DRIVER_OK on."""

    path: ClassVar[str] = "/dev/vhost-vsock"
    module: ClassVar[str] = "vhost_vsock"
    kind: ClassVar[str] = "vhost-vsock"
    node: ClassVar[k.Node] = k.Node.VSOCK

    def __init__(
        self,
        guest_cid: int | None = None,
        path: str | os.PathLike[str] | None = None,
        *,
        owner: bool = True,
    ) -> None:
        self.guest_cid: int | None = None
        self._runs = False
        super().__init__(path, owner=owner)
        if guest_cid is not None:
            try:
                self.set_guest_cid(guest_cid)
            except BaseException:
                self.close()
                raise

    def set_guest_cid(self, cid: int) -> None:
        """The address by which sockets of this machine reach the driver."""
        k.VSOCK_SET_GUEST_CID(self.fd, cid)
        self.guest_cid = cid

    def set_running(self, running: bool) -> None:
        """Start or stop both rings."""
        k.VSOCK_SET_RUNNING(self.fd, int(running))
        self._runs = running

    def _start(self) -> None:
        self.set_running(True)

    def _stop(self, index: int | None = None) -> None:
        if self._runs:
            self.set_running(False)

    def _is_running(self, index: int) -> bool:
        return self._runs
