# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""KernelVhost: what the kernel's vhost devices have in common, as VhostOps.

Knows ioctls and descriptors; what starts and stops the rings of a device is in its own file. A device
may consist of several descriptors (a multi-queue NIC has one for each pair of rings): ``fds``. It is told
the addresses of our own mappings (``Region.host_addr``) for memory and rings, or, once ACCESS_PLATFORM was
acknowledged, IOVAs, which the IOTLB maps to those.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

from vhost._ring import ring_areas
from vhost.dirty_log import DirtyLog
from vhost.errors import InvalidLogAddress, InvalidQueue, IoctlError, UnsupportedRequest
from vhost.features import BackendF, Status, VhostF, VirtioF
from vhost.kernel import ioctls as k
from vhost.kernel.iotlb import Access, IotlbMessage, IotlbType
from vhost.memory import GuestMemory
from vhost.ops import VhostOps

_LOG_ALL = int(VhostF.LOG_ALL)
_PACKED = int(VirtioF.RING_PACKED)
_ACCESS_PLATFORM = int(VirtioF.ACCESS_PLATFORM)
_IOTLB = int(BackendF.IOTLB_MSG_V2)
_BATCH = int(BackendF.IOTLB_BATCH)
MISSES_PER_STEP = 64
"""So that a device that misses without end does not keep a caller's loop for itself."""


def open_node(path: str | os.PathLike[str], module: str) -> int:
    """Open a device node; what fails says what is lacking."""
    path = os.fspath(path)
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        number = error.errno or errno.EIO
    load = f"modprobe {module}"
    hints = {
        errno.ENOENT: f"no such device here; {load}",
        errno.ENODEV: f"nothing is behind it; {load}",
        errno.ENXIO: f"nothing is behind it; {load}",
        errno.EACCES: "needs permission to read and write it: be root, or of the node's group",
        errno.EPERM: "the container, or a security module, does not let this process use the device",
        errno.EBUSY: "another process has it open",
    }
    raise IoctlError(number, f"open {path}", hint=hints.get(number, ""))


class KernelVhost(VhostOps):
    """A device of the kernel. ``owner``: begin the session at once; False leaves that to ``set_owner()``."""

    #: The node, and the module that makes it.
    path: ClassVar[str] = ""
    module: ClassVar[str] = ""
    #: What the device is called, in messages and in the table of ioctls.
    kind: ClassVar[str] = ""
    node: ClassVar[k.Node]
    #: Rings of one descriptor.
    rings_per_fd: ClassVar[int] = 2

    #: Called by ``step()`` for each access of the device that the IOTLB has no mapping for. It answers with
    #: ``iotlb_update``, now or later: the ring waits until then.
    on_iotlb_miss: Callable[[IotlbMessage], None] | None = None

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, descriptors: int = 1, owner: bool = True
    ) -> None:
        self.name = os.fspath(path if path is not None else self.path)
        self._fds: tuple[int, ...] = ()
        self.memory = GuestMemory()
        self.features = 0
        """What was acknowledged."""
        self.backend_features = 0
        """What the IOTLB can do, acknowledged with ``set_owner``."""
        self._began = False
        self._status = 0
        self._nums: dict[int, int] = {}
        self._log: DirtyLog | None = None
        self._listens = False
        self._epoll = select.epoll()
        try:
            for _ in range(descriptors):
                self._fds += (open_node(self.name, self.module),)
            if owner:
                self.set_owner()
        except BaseException:
            self.close()
            raise

    @property
    def fds(self) -> tuple[int, ...]:
        """Its descriptors, for ioctls of the caller's own."""
        if not self._fds:
            raise IoctlError(errno.EBADF, self.name, hint="it was closed")
        return self._fds

    @property
    def fd(self) -> int:
        return self.fds[0]

    def _at(self, index: int) -> tuple[int, int]:
        """Where a ring is: a descriptor, and the ring's number there."""
        which, ring = divmod(index, self.rings_per_fd)
        if not 0 <= which < len(self.fds):
            raise InvalidQueue(f"{self.name}: ring {index}, must be below {self.get_queue_num()}")
        return self.fds[which], ring

    # -- what a device's own file says -------------------------------------------------------------

    def _start(self) -> None:
        """The driver is ready: run the rings, if it takes more than enabling them."""

    def _stop(self, index: int | None = None) -> None:
        """Return when the kernel no longer uses this ring, or any."""

    # -- the session -------------------------------------------------------------------------------

    def set_owner(self) -> None:
        """Begin the session; nothing but that is allowed before. Done by the constructor, unless it was
        told not to."""
        if self._began:
            return
        for fd in self.fds:
            k.SET_OWNER(fd)
        self._began = True
        self._agree_on_backend_features()

    def _agree_on_backend_features(self) -> None:
        if self.node not in k.GET_BACKEND_FEATURES.devices:
            return
        offered = int(k.GET_BACKEND_FEATURES(self.fd))
        self.set_backend_features(offered & int(BackendF.IOTLB_MSG_V2 | BackendF.IOTLB_BATCH))

    def reset_owner(self) -> None:
        for fd in self.fds:
            k.RESET_OWNER(fd)
        self._began = False

    def get_backend_features(self) -> int:
        """What the kernel's control interface can do: bits of ``BackendF``."""
        return int(k.GET_BACKEND_FEATURES(self.fd))

    def set_backend_features(self, features: int) -> None:
        for fd in self.fds:
            k.SET_BACKEND_FEATURES(fd, features)
        self.backend_features = int(features)

    def get_fork_from_owner(self) -> int:
        """Whether workers are tasks of the owner (1) or kernel threads (0)."""
        return int(k.GET_FORK_FROM_OWNER(self.fd))

    def set_fork_from_owner(self, mode: int) -> None:
        """Before ``set_owner`` only, on kernels that let one choose."""
        for fd in self.fds:
            k.SET_FORK_FROM_OWNER(fd, mode)

    # -- the device --------------------------------------------------------------------------------

    def get_features(self) -> int:
        return int(k.GET_FEATURES(self.fd)) & ~_LOG_ALL

    def set_features(self, features: int) -> None:
        for fd in self.fds:
            k.SET_FEATURES(fd, features)
        self.features = int(features)
        self._listen_for_misses(bool(features & _ACCESS_PLATFORM))

    def get_queue_num(self) -> int:
        return len(self.fds) * self.rings_per_fd

    def get_config(self, offset: int, size: int) -> bytes:
        raise UnsupportedRequest(f"{self.kind} has no configuration space ({size} bytes at {offset})")

    def set_config(self, offset: int, data: bytes) -> None:
        raise UnsupportedRequest(f"{self.kind} has no configuration space ({len(data)} bytes at {offset})")

    def get_status(self) -> int:
        return self._status

    def set_status(self, status: int) -> None:
        """The kernel keeps none for these devices. DRIVER_OK starts them, 0 stops them."""
        was, self._status = self._status, status
        if status & Status.DRIVER_OK and not was & Status.DRIVER_OK:
            try:
                self._start()
            except BaseException:
                self._status = was
                raise
        elif not status:
            self._stop()

    def reset_device(self) -> None:
        self.set_status(0)

    # -- memory ------------------------------------------------------------------------------------

    def set_mem_table(self, memory: GuestMemory) -> None:
        if self._log is not None:
            self._check_log(self._log, memory)
        for fd in self.fds:
            k.SET_MEM_TABLE(fd, memory)
        self.memory = memory  # and with it the mappings that the kernel was told of

    # -- rings -------------------------------------------------------------------------------------

    def set_vring_num(self, index: int, num: int) -> None:
        fd, ring = self._at(index)
        k.SET_VRING_NUM(fd, ring, num)
        self._nums[index] = num

    def set_vring_addr(
        self, index: int, desc: int, avail: int, used: int, *, log: int = 0, flags: int = 0
    ) -> None:
        fd, ring = self._at(index)
        if not self._translates:
            name = f"{self.name} ring {index}"
            if index not in self._nums:
                raise InvalidQueue(f"{name}: its size comes before its addresses")
            packed = bool(self.features & _PACKED)
            desc, avail, used = ring_areas(name, self.memory, self._nums[index], packed, desc, avail, used)
        k.SET_VRING_ADDR(fd, ring, desc, avail, used, log=log, flags=flags)

    @property
    def _translates(self) -> bool:
        """Are addresses IOVAs, for the IOTLB to translate?"""
        return bool(self.features & _ACCESS_PLATFORM)

    def set_vring_base(self, index: int, base: int) -> None:
        fd, ring = self._at(index)
        k.SET_VRING_BASE(fd, ring, base)

    def get_vring_base(self, index: int) -> int:
        fd, ring = self._at(index)
        self._stop(index)
        return int(k.GET_VRING_BASE(fd, ring))

    def set_vring_kick(self, index: int, fd: int | None) -> None:
        device, ring = self._at(index)
        k.SET_VRING_KICK(device, ring, fd)

    def set_vring_call(self, index: int, fd: int | None) -> None:
        device, ring = self._at(index)
        k.SET_VRING_CALL(device, ring, fd)

    def set_vring_err(self, index: int, fd: int | None) -> None:
        device, ring = self._at(index)
        k.SET_VRING_ERR(device, ring, fd)

    def set_vring_enable(self, index: int, enable: bool) -> None:
        """Rings of these devices run from DRIVER_OK on, all of them."""
        self._at(index)

    def set_vring_endian(self, index: int, big: bool) -> None:
        """Byte order of a legacy ring, on kernels that were built for foreign ones."""
        fd, ring = self._at(index)
        k.SET_VRING_ENDIAN(fd, ring, int(big))

    def get_vring_endian(self, index: int) -> bool:
        fd, ring = self._at(index)
        return bool(k.GET_VRING_ENDIAN(fd, ring))

    def set_vring_busyloop_timeout(self, index: int, microseconds: int) -> None:
        """Have the kernel poll a ring for that long before it waits for a kick; 0: not at all."""
        fd, ring = self._at(index)
        k.SET_VRING_BUSYLOOP_TIMEOUT(fd, ring, microseconds)

    def get_vring_busyloop_timeout(self, index: int) -> int:
        fd, ring = self._at(index)
        return int(k.GET_VRING_BUSYLOOP_TIMEOUT(fd, ring))

    # -- dirty log ---------------------------------------------------------------------------------

    def set_log_base(self, log: DirtyLog) -> None:
        """Where to mark pages that the device writes, once LOG_ALL is acknowledged; it has to cover all
        of the memory table."""
        self._check_log(log, self.memory)
        for fd in self.fds:
            k.SET_LOG_BASE(fd, log.addr)
        self._log = log

    def set_log_fd(self, fd: int | None) -> None:
        """An eventfd that is signalled when the log changed."""
        for device in self.fds:
            k.SET_LOG_FD(device, -1 if fd is None else fd)

    def start_log(self, log: DirtyLog) -> None:
        """Log from now on what the device writes into buffers. A ring's own used area is logged if
        ``set_vring_addr`` says so (``flags=VringF.LOG``)."""
        self.set_log_base(log)
        for fd in self.fds:
            k.SET_FEATURES(fd, self._kernel_features(self.features) | _LOG_ALL)

    def stop_log(self) -> None:
        for fd in self.fds:
            k.SET_FEATURES(fd, self._kernel_features(self.features))
        self._log = None

    def _kernel_features(self, features: int) -> int:
        """Of what a driver acknowledged, that which the kernel is to know."""
        return features

    @staticmethod
    def _check_log(log: DirtyLog, memory: GuestMemory) -> None:
        end = max((region.guest_addr + region.size for region in memory), default=0)
        if log.limit < end:
            raise InvalidLogAddress(
                f"dirty log of {log.limit:#x} bytes of guest memory, which ends at {end:#x}"
            )

    # -- IOTLB -------------------------------------------------------------------------------------

    def iotlb_update(
        self, iova: int, size: int, user_addr: int, access: Access = Access.RW, *, asid: int = 0
    ) -> None:
        """Map ``size`` bytes at ``iova`` to this process's ``user_addr``."""
        self._send_iotlb(IotlbMessage(IotlbType.UPDATE, iova, size, user_addr, access, asid))

    def iotlb_invalidate(self, iova: int, size: int, *, asid: int = 0) -> None:
        """Unmap; the device waits, with a miss, when it needs it again."""
        self._send_iotlb(IotlbMessage(IotlbType.INVALIDATE, iova, size, asid=asid))

    @contextmanager
    def iotlb_batch(self, *, asid: int = 0) -> Iterator[None]:
        """Updates and invalidations that belong together, where the device knows batches."""
        if not self.backend_features & _BATCH:
            yield
            return
        self._send_iotlb(IotlbMessage(IotlbType.BATCH_BEGIN, asid=asid))
        try:
            yield
        finally:
            self._send_iotlb(IotlbMessage(IotlbType.BATCH_END, asid=asid))

    def _send_iotlb(self, message: IotlbMessage) -> None:
        v2 = bool(self.backend_features & _IOTLB)
        for fd in self.fds:
            message.write(fd, v2=v2, name=self.name)

    def _listen_for_misses(self, wanted: bool) -> None:
        if wanted != self._listens:
            for fd in self.fds:
                if wanted:
                    self._epoll.register(fd, select.EPOLLIN)
                else:
                    self._epoll.unregister(fd)
            self._listens = wanted

    # -- events, and the end -----------------------------------------------------------------------

    def fileno(self) -> int:
        return self._epoll.fileno()

    def step(self) -> bool:
        if not self._fds:
            return False
        for fd, _ in self._epoll.poll(0):
            self._event(fd)
        return True

    def _event(self, fd: int) -> None:
        for _ in range(MISSES_PER_STEP):
            message = IotlbMessage.read(fd)
            if message is None:
                return
            if self.on_iotlb_miss is not None and message.type is IotlbType.MISS:
                self.on_iotlb_miss(message)

    def close(self) -> None:
        """The kernel stops all rings before this returns."""
        fds, self._fds = self._fds, ()
        self._epoll.close()
        for fd in fds:
            os.close(fd)
        self.memory, self._log = GuestMemory(), None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"
