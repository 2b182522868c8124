# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""VhostScsi: the kernel's SCSI host on a target of its target core (configfs, fabric "vhost")."""

from __future__ import annotations

import os
from typing import ClassVar

from vhost.errors import InvalidQueue
from vhost.kernel import ioctls as k
from vhost.kernel.base import KernelVhost


class VhostScsi(KernelVhost):
    """Ring 0 is for control, ring 1 for events, the rest for requests. With ``wwpn``, the endpoint is set
    at DRIVER_OK and cleared when the device stops."""

    path: ClassVar[str] = "/dev/vhost-scsi"
    module: ClassVar[str] = "vhost_scsi"
    kind: ClassVar[str] = "vhost-scsi"
    node: ClassVar[k.Node] = k.Node.SCSI
    FIXED_RINGS: ClassVar[int] = 2

    def __init__(
        self,
        wwpn: str | None = None,
        path: str | os.PathLike[str] | None = None,
        *,
        tpgt: int = 0,
        num_queues: int = 1,
        owner: bool = True,
    ) -> None:
        self.wwpn = wwpn
        self.tpgt = tpgt
        self.num_queues = num_queues
        self._endpoint: tuple[str, int] | None = None
        super().__init__(path, owner=owner)

    def get_queue_num(self) -> int:
        return self.FIXED_RINGS + self.num_queues

    def _at(self, index: int) -> tuple[int, int]:
        if not 0 <= index < self.get_queue_num():
            raise InvalidQueue(f"{self.name}: ring {index}, must be below {self.get_queue_num()}")
        return self.fd, index

    def _is_running(self, index: int) -> bool:
        return self._endpoint is not None

    def get_abi_version(self) -> int:
        """Of the endpoint's struct."""
        return int(k.SCSI_GET_ABI_VERSION(self.fd))

    def set_endpoint(self, wwpn: str, tpgt: int = 0) -> None:
        """Serve the rings with this target; they have to be set up."""
        k.SCSI_SET_ENDPOINT(self.fd, wwpn, tpgt=tpgt)
        self._endpoint = wwpn, tpgt

    def clear_endpoint(self, wwpn: str, tpgt: int = 0) -> None:
        """Stop; requests that are under way are completed first."""
        k.SCSI_CLEAR_ENDPOINT(self.fd, wwpn, tpgt=tpgt)
        self._endpoint = None

    def get_events_missed(self) -> bool:
        """Did events find no buffer?"""
        return bool(k.SCSI_GET_EVENTS_MISSED(self.fd))

    def set_events_missed(self, missed: bool) -> None:
        k.SCSI_SET_EVENTS_MISSED(self.fd, int(missed))

    def _start(self) -> None:
        if self.wwpn is not None:
            self.set_endpoint(self.wwpn, self.tpgt)

    def _stop(self, index: int | None = None) -> None:
        if self._endpoint is not None:
            self.clear_endpoint(*self._endpoint)

    # -- workers -----------------------------------------------------------------------------------

    def new_worker(self) -> int:
        """Start a kernel thread that can serve rings; its id."""
        return int(k.NEW_WORKER(self.fd))

    def free_worker(self, worker: int) -> None:
        """End one that has no ring."""
        k.FREE_WORKER(self.fd, worker)

    def attach_vring_worker(self, index: int, worker: int) -> None:
        """Have this worker serve the ring."""
        fd, ring = self._at(index)
        k.ATTACH_VRING_WORKER(fd, ring, worker)

    def get_vring_worker(self, index: int) -> int:
        """The id of the worker that serves the ring."""
        fd, ring = self._at(index)
        return int(k.GET_VRING_WORKER(fd, ring))
