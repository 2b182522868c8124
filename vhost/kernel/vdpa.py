# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""VhostVdpa: a device on the vDPA bus (hardware, a simulator, a VDUSE daemon) through /dev/vhost-vdpa-N.

The whole virtio device is behind it: configuration space, status, any number of rings. Memory is mapped
into its IOTLB: guest addresses are IOVAs here. Its ioctls may wait for another process, without the GIL.
"""

from __future__ import annotations

import os
import select
from collections.abc import Iterable
from typing import ClassVar

from vhost.errors import InvalidGuestMemory
from vhost.features import BackendF, DeviceId, VirtioF
from vhost.kernel import ioctls as k
from vhost.kernel.base import KernelVhost
from vhost.kernel.iotlb import Access
from vhost.memory import GuestMemory, Region

PAGE = os.sysconf("SC_PAGESIZE")
_WANTED = BackendF.IOTLB_MSG_V2 | BackendF.IOTLB_BATCH | BackendF.IOTLB_ASID
_WANTED |= BackendF.SUSPEND | BackendF.RESUME | BackendF.IOTLB_PERSIST
_PERSIST = int(BackendF.IOTLB_PERSIST)
_DEVICE_IDS = frozenset(int(device) for device in DeviceId)


class VhostVdpa(KernelVhost):
    """One process at a time may have it open."""

    module: ClassVar[str] = "vhost_vdpa"
    kind: ClassVar[str] = "vhost-vdpa"
    node: ClassVar[k.Node] = k.Node.VDPA
    transport_features: ClassVar[int] = int(VirtioF.ACCESS_PLATFORM)

    def __init__(self, path: str | os.PathLike[str] = "/dev/vhost-vdpa-0", *, owner: bool = True) -> None:
        self._config_call = self._call_on_change = -1
        self._mapped: dict[int, tuple[Region, ...]] = {}
        super().__init__(path, owner=owner)

    def _agree_on_backend_features(self) -> None:
        self.set_backend_features(self.get_backend_features() & int(_WANTED))
        self._config_call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._config_call, select.EPOLLIN)
        self.set_config_call(self._config_call)

    # -- the device --------------------------------------------------------------------------------

    def get_device_id(self) -> int:
        """The virtio device id: a ``DeviceId`` where it is known."""
        number = int(k.VDPA_GET_DEVICE_ID(self.fd))
        return DeviceId(number) if number in _DEVICE_IDS else number

    def get_queue_num(self) -> int:
        return int(k.VDPA_GET_VQS_COUNT(self.fd))

    def get_vring_num_max(self) -> int:
        """The largest ring that the device takes."""
        return int(k.VDPA_GET_VRING_NUM(self.fd))

    def get_vring_size(self, index: int) -> int:
        """The size of one ring as it is now; newer kernels only."""
        return int(k.VDPA_GET_VRING_SIZE(self.fd, index))

    def get_config_size(self) -> int:
        return int(k.VDPA_GET_CONFIG_SIZE(self.fd))

    def get_config(self, offset: int, size: int) -> bytes:
        return k.VDPA_GET_CONFIG(self.fd, offset, size)

    def set_config(self, offset: int, data: bytes) -> None:
        k.VDPA_SET_CONFIG(self.fd, offset, data)

    def get_status(self) -> int:
        return int(k.VDPA_GET_STATUS(self.fd))

    def set_status(self, status: int) -> None:
        k.VDPA_SET_STATUS(self.fd, status)
        self._status = status
        if not status:
            # Devices forget this with a reset, vhost-vdpa does not.
            self._tell_config_call()
            if not self.backend_features & _PERSIST:
                self._map_again()

    def _stop(self, index: int | None = None) -> None:
        if self._status:
            k.VDPA_SET_STATUS(self.fd, 0)
            self._status = 0

    def set_config_call(self, fd: int | None) -> None:
        """The eventfd that tells of a new configuration. By default it is one of our own, which ``step()``
        watches to call ``on_config_change``."""
        self._call_on_change = -1 if fd is None else fd
        self._tell_config_call()

    def _tell_config_call(self) -> None:
        k.VDPA_SET_CONFIG_CALL(self.fd, self._call_on_change)

    def suspend(self) -> None:
        """Stop processing, between DRIVER_OK and a reset; rings keep their place, for ``get_vring_base``."""
        k.VDPA_SUSPEND(self.fd)

    def resume(self) -> None:
        """Go on after ``suspend()``."""
        k.VDPA_RESUME(self.fd)

    # -- rings -------------------------------------------------------------------------------------

    def _at(self, index: int) -> tuple[int, int]:
        return self.fd, index  # the kernel knows how many there are

    @property
    def _translates(self) -> bool:
        return True

    def set_vring_enable(self, index: int, enable: bool) -> None:
        k.VDPA_SET_VRING_ENABLE(self.fd, index, int(enable))

    def get_vring_base(self, index: int) -> int:
        """Exact once the device is suspended; without that, a hint."""
        return int(k.GET_VRING_BASE(self.fd, index))

    # -- groups and address spaces -----------------------------------------------------------------

    def get_group_num(self) -> int:
        """How many groups of rings the device has; a group is in one address space."""
        return int(k.VDPA_GET_GROUP_NUM(self.fd))

    def get_as_num(self) -> int:
        """How many address spaces."""
        return int(k.VDPA_GET_AS_NUM(self.fd))

    def get_vring_group(self, index: int) -> int:
        return int(k.VDPA_GET_VRING_GROUP(self.fd, index))

    def get_vring_desc_group(self, index: int) -> int:
        """The group of the ring's own areas, where the device has another for them."""
        return int(k.VDPA_GET_VRING_DESC_GROUP(self.fd, index))

    def set_group_asid(self, group: int, asid: int) -> None:
        """Put a group into an address space, before DRIVER_OK."""
        k.VDPA_SET_GROUP_ASID(self.fd, group, asid)

    # -- memory ------------------------------------------------------------------------------------

    def get_iova_range(self) -> tuple[int, int]:
        """First and last address that can be mapped."""
        return k.VDPA_GET_IOVA_RANGE(self.fd)

    def dma_map(self, iova: int, size: int, user_addr: int, *, readonly: bool = False, asid: int = 0) -> None:
        """Let the device use ``size`` bytes at our ``user_addr`` as ``iova``; all are whole pages. A device
        of VDUSE takes shared file memory only, such as that of ``Region.allocate``. Map it again after a
        reset of a device without IOTLB_PERSIST; ``set_mem_table`` needs no repetition."""
        self.iotlb_update(iova, size, user_addr, Access.RO if readonly else Access.RW, asid=asid)

    def dma_unmap(self, iova: int, size: int, *, asid: int = 0) -> None:
        self.iotlb_invalidate(iova, size, asid=asid)

    def set_mem_table(self, memory: GuestMemory, *, asid: int = 0) -> None:
        """Map these regions, at their guest addresses, and no others that were mapped this way."""
        regions = tuple(memory)
        first, last = self.get_iova_range()
        for region in regions:
            _check(region, first, last)
        mapped = self._mapped.get(asid, ())
        with self.iotlb_batch(asid=asid):
            self._unmap((old for old in mapped if old not in regions), asid)
            for region in regions:
                if region not in self._mapped.get(asid, ()):
                    self.dma_map(region.guest_addr, _pages(region.size), region.host_addr, asid=asid)
                    self._mapped[asid] = (*self._mapped.get(asid, ()), region)
        if not asid:
            self.memory = memory

    def _unmap(self, regions: Iterable[Region], asid: int) -> None:
        for region in regions:
            self.dma_unmap(region.guest_addr, _pages(region.size), asid=asid)
            self._mapped[asid] = tuple(old for old in self._mapped[asid] if old is not region)

    def _map_again(self) -> None:
        """Devices without IOTLB_PERSIST may have lost all mappings with the reset; vhost-vdpa has not."""
        for asid, regions in self._mapped.items():
            with self.iotlb_batch(asid=asid):
                for region in regions:
                    self.dma_unmap(region.guest_addr, _pages(region.size), asid=asid)
                    self.dma_map(region.guest_addr, _pages(region.size), region.host_addr, asid=asid)

    # -- events, and the end -----------------------------------------------------------------------

    def _listen_for_misses(self, wanted: bool) -> None:
        """There are none: what is not mapped is an error of the device."""

    def _event(self, fd: int) -> None:
        os.eventfd_read(fd)
        if self.on_config_change is not None:
            self.on_config_change()

    def close(self) -> None:
        super().close()
        call, self._config_call = self._config_call, -1
        if call >= 0:
            os.close(call)


def _pages(size: int) -> int:
    """A mapping ends with its last page."""
    return -(-size // PAGE) * PAGE


def _check(region: Region, first: int, last: int) -> None:
    if region.guest_addr % PAGE or region.host_addr % PAGE:
        raise InvalidGuestMemory(f"{region!r} at {region.host_addr:#x} here: vDPA maps whole pages of {PAGE}")
    if region.guest_addr < first or region.guest_addr + region.size - 1 > last:
        raise InvalidGuestMemory(f"{region!r}: the device's addresses are {first:#x} to {last:#x}")
