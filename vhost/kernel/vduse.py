# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""VduseBackend: a Device served to this machine's own kernel.

Makes /dev/vduse/NAME and answers what the kernel asks there; after ``vdpa dev add name NAME mgmtdev vduse``
a driver finds the device: virtio_vdpa (a disk is /dev/vdX then) or, through vhost_vdpa, another process. What
the kernel mapped is in iova.py, what a session of a device is in vhost.devices.session.

The kernel waits for each answer, for 30 s by default; after that it has given the device up for good.
"""

from __future__ import annotations

import errno
import logging
import os
import select
from collections.abc import Callable
from functools import partial

from vhost.devices.base import Device
from vhost.devices.rings import Areas, Ring
from vhost.devices.session import DeviceSession
from vhost.errors import InvalidGuestMemory, InvalidQueue, IoctlError, VhostError
from vhost.features import BlkF, DeviceId, NetF, Status, VirtioF, feature_names
from vhost.kernel import _vduse as u
from vhost.kernel import ioctls as k
from vhost.kernel.base import open_node
from vhost.kernel.iova import IovaTable
from vhost.virtqueue import DeviceQueue

log = logging.getLogger("vhost.vduse")

CONTROL = "/dev/vduse/control"
MODULE = "vduse"
API_VERSION = 0
"""Version 1 adds groups of rings and address spaces, of which a Device has one."""
RING_ALIGN = 4096
REQUESTS_PER_STEP = 16

_ACCESS_PLATFORM = int(VirtioF.ACCESS_PLATFORM)
_RING_PACKED = int(VirtioF.RING_PACKED)
_IN_ORDER = int(VirtioF.IN_ORDER)
_DRIVER_OK = int(Status.DRIVER_OK)
_FEATURES_OK = int(Status.FEATURES_OK)

# The kernel takes no network device that has a control queue: its drivers would wait for an answer for ever.
_NET_CONTROL = int(
    NetF.CTRL_VQ
    | NetF.CTRL_RX
    | NetF.CTRL_RX_EXTRA
    | NetF.CTRL_VLAN
    | NetF.CTRL_MAC_ADDR
    | NetF.GUEST_ANNOUNCE
    | NetF.MQ
)


class VduseBackend(DeviceSession):
    """Serves ``device`` as /dev/vduse/``name``: a new one, or one that a predecessor left in use.

    A predecessor that was killed leaves the driver waiting. Its successor, of the same name and for the same
    device, goes on where the used index stands, so nothing is lost, and what was in flight is done again:
    used buffers are published in the order of the available ones, even if the device completes them in
    another. ``packed`` rings have no such index. They are not offered by default, and cannot be taken over.

    ``taken_over``: the driver was running when we came.
    """

    def __init__(self, device: Device, name: str, *, packed: bool = False) -> None:
        self.name = name
        self.packed = packed
        self.taken_over = False
        self.left_behind = ""
        """After ``close()``: why the VDUSE device still exists, and what to do; empty if it is gone."""
        self._fd = -1
        # Rings that wait until the kernel has noted DRIVER_OK, which it does after our answer.
        self._waits_for_driver = False
        self._control = open_node(CONTROL, MODULE)
        self._iovas = IovaTable()
        try:
            super().__init__(device, user_addresses=False)
        except BaseException:
            os.close(self._control)
            raise
        try:
            self._open()
            device.attach(self)
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> str:
        return f"/dev/vduse/{self.name}"

    # -- the VDUSE device --------------------------------------------------------------------------

    def offered_features(self) -> int:
        offered = super().offered_features() | _ACCESS_PLATFORM
        if not self.packed:
            offered &= ~_RING_PACKED
        if self.device.device_id == DeviceId.BLOCK:
            offered &= ~int(BlkF.CONFIG_WCE)  # VDUSE's configuration space is read-only
        if self.device.device_id == DeviceId.NET:
            offered &= ~_NET_CONTROL
        return offered

    def _device_features(self) -> int:
        return self.features & ~_ACCESS_PLATFORM

    def _ring_features(self) -> int:
        return self.features | _IN_ORDER  # so that the used index tells a successor all

    def _open(self) -> None:
        k.VDUSE_SET_API_VERSION(self._control, API_VERSION)
        created = self._create()
        try:
            self._fd = open_node(self.path, MODULE)
            self._epoll.register(self._fd, select.EPOLLIN)
            if not created:
                self._check_predecessor()
                self.taken_over = self._is_running()
            if self.taken_over:
                self._take_over()
            else:
                for ring in self.rings:
                    k.VDUSE_VQ_SETUP(self._fd, ring.index, self.device.max_queue_size)
        except BaseException:
            if not created:
                self._close_control()  # it is somebody else's, who may still have use for it
            raise

    def _create(self) -> bool:
        """False: there is one of this name, in use."""
        try:
            k.VDUSE_DESTROY_DEV(self._control, self.name)  # which a predecessor left, and nobody uses
        except IoctlError as error:
            if error.errno == errno.EBUSY:
                return False
            if error.errno != errno.EINVAL:  # there is none
                raise
        k.VDUSE_CREATE_DEV(
            self._control,
            self.name,
            device_id=int(self.device.device_id),
            features=self.offered_features(),
            vq_num=len(self.rings),
            vq_align=RING_ALIGN,
            config=self.device.config,
        )
        return True

    def _check_predecessor(self) -> None:
        """Is the device that exists the one that we are to serve? As far as the kernel tells."""
        what = f"VDUSE device {self.name!r} exists and is in use, but is another one"
        hint = f"`vdpa dev del {self.name}` first"
        try:
            k.VDUSE_VQ_GET_INFO(self._fd, len(self.rings), packed=False)
        except IoctlError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            raise InvalidQueue(f"{what}: it has more than {len(self.rings)} queues; {hint}")
        features = int(k.VDUSE_DEV_GET_FEATURES(self._fd))
        foreign = features & ~self.offered_features() & ~_RING_PACKED
        if foreign:
            names = " ".join(feature_names(foreign, BlkF, VirtioF))
            raise InvalidQueue(f"{what}: its driver acknowledged {foreign:#x} ({names}); {hint}")
        try:
            self._write_config()
            for ring in self.rings:
                k.VDUSE_VQ_GET_INFO(self._fd, ring.index, packed=False)
        except IoctlError as error:
            if error.errno != errno.EINVAL:
                raise
            raise InvalidQueue(f"{what}: fewer queues, or less configuration ({error}); {hint}") from None
        self.features = features

    def _is_running(self) -> bool:
        """Is the driver ready? The kernel takes this interrupt only then."""
        return self._injected(partial(k.VDUSE_DEV_INJECT_CONFIG_IRQ, self._fd))

    @staticmethod
    def _injected(inject: Callable[[], None]) -> bool:
        try:
            inject()
        except IoctlError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return True

    def _take_over(self) -> None:
        if self.features & _RING_PACKED:
            raise InvalidQueue(
                f"VDUSE device {self.name!r} runs packed rings, which do not say where a predecessor"
                f" stopped; `vdpa dev del {self.name}` first"
            )
        log.info("%s: going on where a predecessor stopped", self.name)
        self.status = _DRIVER_OK | _FEATURES_OK
        self._set_up_rings(fresh=False)
        self._waits_for_driver = True
        self.wake()

    # -- requests of the kernel --------------------------------------------------------------------

    def _happened(self, fd: int, events: int) -> None:
        if fd != self._fd:
            return
        if events & select.EPOLLERR:
            raise VhostError(
                f"the kernel has given up VDUSE device {self.name!r}, for an answer took too long:"
                f" `vdpa dev del {self.name}`, and serve it again"
            )
        for _ in range(REQUESTS_PER_STEP):
            request = u.read_request(self._fd)
            if request is None:
                break
            log.debug("%s: %s", self.name, request)
            self._answer(request)

    def _answer(self, request: u.Request) -> None:
        base = None
        try:
            if request.type == u.GET_VQ_STATE:
                base = self._position_of(self.ring_at(request.ring, "VDUSE_GET_VQ_STATE"))
            elif request.type == u.SET_STATUS:
                self._set_status(request.status)
            elif request.type == u.UPDATE_IOTLB:
                self._update_memory()
            else:
                raise VhostError(f"request {request.type} of VDUSE, which needs API version 1")
        except VhostError as error:
            self._complain(f"{self.name} refused", error)
            self._respond(request, ok=False)
        except BaseException:
            self._respond(request, ok=False)  # or the driver would wait for us until the kernel gives up
            raise
        else:
            self._respond(request, ok=True, base=base)

    def _respond(self, request: u.Request, *, ok: bool, base: int | None = None) -> None:
        packed = bool(self.features & _RING_PACKED)
        try:
            u.write_response(self._fd, request.id, ok, index=request.ring, base=base, packed=packed)
        except OSError as error:
            if error.errno != errno.ENOENT:  # who asked was killed meanwhile
                raise

    def _position_of(self, ring: Ring) -> int:
        with self.paused(ring):
            position = ring.position if ring.queue is None else ring.queue.base
        return 0 if position is None else position

    def _set_status(self, status: int) -> None:
        was = self.status
        if not status:
            self._waits_for_driver = False
            self.change_status(0, "VDUSE_SET_STATUS")
            for ring in self.rings:
                ring.close()
                ring.reset()
            self.features = 0
            self._forget_memory()
            return
        if status & ~was & _FEATURES_OK:
            self.acknowledge(int(k.VDUSE_DEV_GET_FEATURES(self._fd)), "VDUSE_SET_STATUS")
        self.change_status(status, "VDUSE_SET_STATUS")
        if status & ~was & _DRIVER_OK:
            try:
                self._set_up_rings(fresh=True)
            except BaseException:
                self.status = was
                raise
            self._waits_for_driver = True
            self.wake()

    # -- rings -------------------------------------------------------------------------------------

    def _set_up_rings(self, *, fresh: bool) -> None:
        """Make them, but do not let them run. ``fresh``: the driver says where they start."""
        self._look_at_memory()
        packed = bool(self.features & _RING_PACKED)
        try:
            for ring in self.rings:
                num, desc, driver, device, base, ready = k.VDUSE_VQ_GET_INFO(
                    self._fd, ring.index, packed=packed
                )
                if ready:
                    self.size_ring(ring, num, "VDUSE_VQ_GET_INFO")
                    self.place_ring(ring, Areas(desc, driver, device), "VDUSE_VQ_GET_INFO")
                    ring.base = base if fresh else None
                    ring.call_vq = ring.index
                    self.give_event(ring, "call", lambda: os.dup(self._fd))
                    self.give_event(ring, "kick", self._new_kick(ring.index))
        except BaseException:
            self.stop_all_rings()
            raise

    def _new_kick(self, index: int) -> Callable[[], int]:
        def make() -> int:
            fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            try:
                k.VDUSE_VQ_SETUP_KICKFD(self._fd, index, fd)
            except BaseException:
                os.close(fd)
                raise
            return fd

        return make

    def _woken(self) -> None:
        if self._waits_for_driver:
            self._run_rings()
        super()._woken()

    def _run_rings(self) -> None:
        """Once the kernel takes interrupts. The first one is for what a predecessor published and died
        before it told; of a driver that is told for nothing, the specification expects that it copes."""
        for ring in self.rings:
            if ring.started and not ring.enabled:
                if not self._injected(partial(k.VDUSE_VQ_INJECT_IRQ, self._fd, ring.index)):
                    self.wake()
                    os.sched_yield()
                    return
                self.enable_ring(ring, True)
        self._waits_for_driver = False

    def _ring_broken(self, ring: Ring, why: str) -> None:
        # The kernel maps a driver's bounce buffer when it is first used, and tells nobody.
        if ring.queue is not None and ring.queue.missed:
            self._look_at_memory()
            if ring.queue.memory is not self.memory:  # this ring's miss, or another's before it, was news
                try:
                    self._renew(ring)
                    return
                except InvalidQueue as error:
                    why = str(error)
        super()._ring_broken(ring, why)

    def _renew(self, ring: Ring) -> None:
        with self.paused(ring):
            try:
                ring.renew(self.memory, self._ring_features())
            except BaseException:
                ring.stop()
                raise

    # -- memory ------------------------------------------------------------------------------------

    def _look_at_memory(self) -> None:
        """Map what the kernel says is there; if that is what it was, the memory stays the same object."""
        if self._iovas.look(self._fd):
            self.memory = self._iovas.map(self._complain)

    def _update_memory(self) -> None:
        """The driver mapped or unmapped something: what it was told is gone must not be used any more."""
        with self.paused(*self.rings):
            self._iovas.forget()
            try:
                self._look_at_memory()
            except InvalidGuestMemory:
                self._forget_memory()
                raise
            finally:
                for ring in self.rings:
                    if ring.queue is not None:
                        self._move(ring, ring.queue)
            self._release_if_idle()

    def _move(self, ring: Ring, queue: DeviceQueue) -> None:
        try:
            if queue.missed:
                ring.renew(self.memory, self._ring_features())
            else:
                queue.set_memory(self.memory)
        except InvalidQueue as error:
            self._complain("ring stopped", error)
            ring.stop()

    def _forget_memory(self) -> None:
        self._iovas.forget()
        self.memory = self.no_memory

    def _memory_lost(self) -> None:
        # The kernel still wants its answers, and the next reset begins anew.
        self._complain("rings stopped", "a file behind their memory was truncated")
        self.stop_all_rings()
        self._forget_memory()

    # -- configuration, and the end ----------------------------------------------------------------

    def _write_config(self) -> None:
        config = self.device.config
        if config:
            k.VDUSE_DEV_SET_CONFIG(self._fd, 0, config)

    def _tell_config_change(self) -> None:
        self._write_config()
        self._is_running()  # and if it is, it was told thereby

    def _let_go(self) -> None:
        """Close the device, and destroy it unless somebody uses it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._control < 0:
            return
        try:
            k.VDUSE_DESTROY_DEV(self._control, self.name)
        except IoctlError as error:
            if error.errno == errno.EBUSY:
                self.left_behind = (
                    f"VDUSE device {self.name!r} is in use: serve it again under this name and its driver"
                    f" goes on, or `vdpa dev del {self.name}` first"
                )
                log.info("%s", self.left_behind)
            elif error.errno != errno.EINVAL:  # it was never there
                log.warning("%s", str(error))
        self._close_control()

    def _close_control(self) -> None:
        os.close(self._control)
        self._control = -1
