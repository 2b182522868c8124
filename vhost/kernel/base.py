# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""KernelVhost: what the kernel's vhost devices have in common, as VhostOps.

Knows ioctls and descriptors; what starts and stops the rings of a device is in its own file. A device
may consist of several descriptors (a multi-queue NIC has one for each pair of rings): ``fds``. It is told
the addresses of our own mappings (``Region.host_addr``) for memory and rings, or, once ACCESS_PLATFORM was
acknowledged, IOVAs, which the IOTLB maps to those.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
from collections.abc import Callable, Iterator
from enum import IntFlag
from typing import ClassVar

from vhost._ring import ring_areas
from vhost.dirty_log import DirtyLog
from vhost.errors import (
    InactiveFeature,
    InvalidLogAddress,
    InvalidQueue,
    IoctlError,
    UnsupportedRequest,
    VhostError,
)
from vhost.features import BackendF, Status, VhostF, VirtioF, VringF, feature_names
from vhost.kernel import ioctls as k
from vhost.kernel.iotlb import Access, IotlbMessage, IotlbType
from vhost.memory import GuestMemory
from vhost.ops import VhostOps

_LOG_ALL = int(VhostF.LOG_ALL)
_PACKED = int(VirtioF.RING_PACKED)
_ACCESS_PLATFORM = int(VirtioF.ACCESS_PLATFORM)
_IOTLB = int(BackendF.IOTLB_MSG_V2)
_BATCH = int(BackendF.IOTLB_BATCH)
_ASID = int(BackendF.IOTLB_ASID)
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
    #: What its own feature bits are called.
    names: ClassVar[type[IntFlag]] = VirtioF
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
        self._areas: dict[int, tuple[int, int, int]] = {}
        """Where each ring is: guest addresses."""
        # What the kernel may still use though we were told of something newer: it neither asks nor tells.
        self._held: dict[int, GuestMemory] = {}
        self._unsure: list[GuestMemory] = []
        self._dirty_logs: list[DirtyLog] = []
        self._logs = False
        self._behind_iotlb = False
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

    def _is_running(self, index: int) -> bool:
        """May the kernel be using this ring?"""
        return False

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

    @property
    def has_backend_features(self) -> bool:
        """Does the kernel have an IOTLB for this kind of device?"""
        return self.node in k.GET_BACKEND_FEATURES.devices

    def _agree_on_backend_features(self) -> None:
        if not self.has_backend_features:
            return
        offered = int(k.GET_BACKEND_FEATURES(self.fd))
        self.set_backend_features(offered & int(BackendF.IOTLB_MSG_V2 | BackendF.IOTLB_BATCH))

    def reset_owner(self) -> None:
        """Give the session up: the kernel forgets memory, rings, log and features. vhost-net only."""
        if self.node not in k.RESET_OWNER.devices:
            raise UnsupportedRequest(f"{self.kind} cannot give its owner up", request="RESET_OWNER")
        for fd in self.fds:
            k.RESET_OWNER(fd)
        self._began = self._logs = self._behind_iotlb = False
        self._listen_for_misses(False)
        self.features = self._status = 0
        self.memory = GuestMemory()
        for forgotten in (self._nums, self._areas, self._held, self._unsure, self._dirty_logs):
            forgotten.clear()

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
        """Acknowledge these. Each time that ACCESS_PLATFORM is one of them, the IOTLB is empty afterwards,
        and it cannot be taken back."""
        foreign = features & ~self.get_features()
        if foreign:
            names = " ".join(feature_names(foreign, self.names, VirtioF))
            raise InactiveFeature(f"{self.name} does not offer {names}", request="SET_FEATURES")
        translates = bool(features & _ACCESS_PLATFORM)
        if self._behind_iotlb and not translates:
            raise VhostError(
                f"{self.name}: ACCESS_PLATFORM was acknowledged; open the device anew without it"
            )
        self._tell_features(features)
        self.features = int(features)
        self._behind_iotlb = translates and self.node in k.Node.VHOST
        self._listen_for_misses(translates)

    def _tell_features(self, features: int) -> None:
        for fd in self.fds:
            k.SET_FEATURES(fd, self._kernel_features(features) | (_LOG_ALL if self._logs else 0))

    def _kernel_features(self, features: int) -> int:
        """Of what a driver acknowledged, that which the kernel is to know."""
        return features

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
        """Rings that run go on in the new memory; InvalidQueue, and nothing changes, if one is not in it."""
        if self._logs:
            self._check_log(self._dirty_logs[-1], memory)
        lost = self._lost_in(memory)
        for fd in self.fds:
            k.SET_MEM_TABLE(fd, memory)
            if fd == self.fds[0]:  # from here on, until all of it is done, the kernel uses both
                self._unsure += [self.memory, memory]
        # A ring that is stopped stays where it was until it is placed anew.
        self._held.update({index: self.memory for index in lost if index not in self._held})
        self.memory = memory
        if not self._translates:
            for index in self._areas:
                if index not in self._held:
                    self._tell_areas(index)
        self._unsure.clear()

    def _lost_in(self, memory: GuestMemory) -> list[int]:
        lost = []
        for index in () if self._translates else self._areas:
            try:
                self._host_areas(index, memory)
            except InvalidQueue:
                if self._is_running(index):
                    raise
                lost.append(index)
        return lost

    # -- rings -------------------------------------------------------------------------------------

    def set_vring_num(self, index: int, num: int) -> None:
        fd, ring = self._at(index)
        k.SET_VRING_NUM(fd, ring, num)
        self._nums[index] = num

    def set_vring_addr(
        self, index: int, desc: int, avail: int, used: int, *, log: int = 0, flags: int = 0
    ) -> None:
        self._at(index)
        old = self._areas.get(index)
        self._areas[index] = desc, avail, used
        try:
            self._tell_areas(index, log, flags)
        except BaseException:
            if old is None:
                del self._areas[index]
            else:
                self._areas[index] = old
            raise
        self._held.pop(index, None)

    def _tell_areas(self, index: int, log: int = 0, flags: int = 0) -> None:
        fd, ring = self._at(index)
        areas = self._areas[index] if self._translates else self._host_areas(index, self.memory)
        if self._logs:
            log, flags = self._areas[index][2], flags | VringF.LOG
        k.SET_VRING_ADDR(fd, ring, *areas, log=log, flags=flags)

    def _host_areas(self, index: int, memory: GuestMemory) -> tuple[int, int, int]:
        name = f"{self.name} ring {index}"
        if index not in self._nums:
            raise InvalidQueue(f"{name}: its size comes before its addresses")
        return ring_areas(name, memory, self._nums[index], bool(self.features & _PACKED), *self._areas[index])

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
        """Where to mark pages that the device writes, from LOG_ALL on. It has to cover the memory table, and
        stays mapped until ``close()``: the kernel cannot be told to forget it."""
        self._check_log(log, self.memory)
        self._dirty_logs.append(log)  # even what fails may have told some rings
        for fd in self.fds:
            k.SET_LOG_BASE(fd, log.addr)
        self._dirty_logs = [log]

    def set_log_fd(self, fd: int | None) -> None:
        """An eventfd that is signalled when the log changed."""
        for device in self.fds:
            k.SET_LOG_FD(device, -1 if fd is None else fd)

    def start_log(self, log: DirtyLog) -> None:
        """Log from now on what the device writes: buffers, and the used areas of the rings. Of vhost-vsock,
        and of vhost-scsi on many kernels, only the latter: stop such a device before the last copy. Behind
        an IOTLB this empties it, as ``stop_log`` does."""
        self.set_log_base(log)
        self._logs = True
        self._switch_log()

    def stop_log(self) -> None:
        self._logs = False
        self._switch_log()

    def _switch_log(self) -> None:
        self._tell_features(self.features)
        for index in self._areas:
            if index not in self._held:
                self._tell_areas(index)

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

    @contextlib.contextmanager
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
        if message.asid and not self.backend_features & _ASID:
            raise UnsupportedRequest(f"{self.name}: address space {message.asid}: there is one only, 0")
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
        """Stop all rings, and let go of the device and the memory. Idempotent."""
        if self._fds and self._began:
            # Closing does that, too, but not while a forked child has the descriptors. Such a child is not
            # the owner, and cannot stop anything.
            with contextlib.suppress(IoctlError):
                self._stop()
        fds, self._fds = self._fds, ()
        self._epoll.close()
        for fd in fds:
            os.close(fd)
        self.memory = GuestMemory()
        self._held.clear()
        self._unsure.clear()
        self._dirty_logs.clear()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"
