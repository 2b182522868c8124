# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""VhostNet: the kernel's vhost-net on a tap or a packet socket.

The kernel moves packets between the rings and the backend; what a NIC can do beyond that (checksums,
segmentation) is the backend's matter, so its features are offered here as the device's.
"""

from __future__ import annotations

import os
from enum import IntFlag
from typing import ClassVar, Protocol, runtime_checkable

from vhost.errors import VhostError
from vhost.features import NetF, VhostF, VirtioF
from vhost.kernel import ioctls as k
from vhost.kernel.base import KernelVhost

VHOST_NET_F_VIRTIO_NET_HDR = 1 << 27
"""The kernel takes the header off what is sent and puts one before what arrives, for a backend that knows
none. The same bit is ANY_LAYOUT elsewhere."""
_LONG_HEADER = int(VirtioF.VERSION_1) | int(NetF.MRG_RXBUF)


@runtime_checkable
class Offloads(Protocol):
    """A backend that passes the virtio-net header on: a tap."""

    @property
    def fds(self) -> tuple[int, ...]:
        """A descriptor for each pair of rings."""

    @property
    def features(self) -> int:
        """Bits of ``NetF`` that it makes possible."""

    def set_features(self, features: int) -> None:
        """These were acknowledged; it must not use others."""

    def set_vnet_hdr_size(self, size: int) -> None:
        """The header's size: 12 bytes, or 10 for a legacy driver without mergeable buffers (5.1.6.1)."""


class HasFileno(Protocol):
    def fileno(self) -> int: ...


class VhostNet(KernelVhost):
    """``queue_pairs`` pairs of rings, each on a descriptor of its own: ring 2i receives, 2i + 1 sends."""

    path: ClassVar[str] = "/dev/vhost-net"
    module: ClassVar[str] = "vhost_net"
    kind: ClassVar[str] = "vhost-net"
    node: ClassVar[k.Node] = k.Node.NET
    names: ClassVar[type[IntFlag]] = NetF

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, queue_pairs: int = 1, owner: bool = True
    ) -> None:
        self._offloads: Offloads | None = None
        self._backends: tuple[int, ...] = ()
        self._running: set[int] = set()
        super().__init__(path, descriptors=queue_pairs, owner=owner)

    def attach(self, *backends: Offloads | HasFileno | int) -> None:
        """What the rings run on once they are enabled: a ``Tap`` with a queue for each pair, or a packet
        socket or descriptor for each. They stay the caller's, and open. InactiveFeature, and nothing
        changes, if they cannot do what was acknowledged already."""
        offloads, fds = None, []
        for backend in backends:
            if isinstance(backend, int):
                fds.append(backend)
            elif isinstance(backend, Offloads):
                offloads = backend
                fds += backend.fds
            else:
                fds.append(backend.fileno())
        if len(fds) != len(self.fds):
            raise VhostError(f"{self.name}: {len(fds)} backends for {len(self.fds)} pairs of rings")
        if offloads is not None and len(backends) > 1:
            raise VhostError(f"{self.name}: a tap with all its queues, or other backends, not both")
        old = self._offloads
        self._offloads = offloads
        if self.features:
            try:
                self.set_features(self.features)  # which the new one has to have, too
            except BaseException:
                self._offloads = old
                raise
        self._backends = tuple(fds)

    def set_backend(self, index: int, fd: int | None) -> None:
        """Run one ring on this descriptor, or stop it."""
        device, ring = self._at(index)
        k.NET_SET_BACKEND(device, ring, fd)
        if fd is None:
            self._running.discard(index)
        else:
            self._running.add(index)

    def set_vring_enable(self, index: int, enable: bool) -> None:
        if enable and index not in self._running:
            if not self._backends:
                raise VhostError(f"{self.name}: ring {index}: no backend, attach() comes first")
            self._at(index)
            self.set_backend(index, self._backends[index // self.rings_per_fd])
        elif not enable:
            self._stop(index)

    def _stop(self, index: int | None = None) -> None:
        for ring in sorted(self._running):
            if index is None or index == ring:
                self.set_backend(ring, None)

    def _is_running(self, index: int) -> bool:
        return index in self._running

    def get_features(self) -> int:
        features = super().get_features() & ~VHOST_NET_F_VIRTIO_NET_HDR
        return features | (int(self._offloads.features) if self._offloads is not None else 0)

    def _tell_features(self, features: int) -> None:
        # What the kernel acknowledges is what it has to do itself.
        if self._offloads is not None:
            self._offloads.set_vnet_hdr_size(12 if features & _LONG_HEADER else 10)
            self._offloads.set_features(features & int(self._offloads.features))
        super()._tell_features(features)

    def _kernel_features(self, features: int) -> int:
        features &= int(k.GET_FEATURES(self.fd)) & ~int(VhostF.LOG_ALL) & ~VHOST_NET_F_VIRTIO_NET_HDR
        return features | (VHOST_NET_F_VIRTIO_NET_HDR if self._offloads is None else 0)

    def get_features_array(self, words: int = 2) -> int:
        """Feature bits of the kernel's own beyond 64, too; newer kernels only."""
        return int(k.GET_FEATURES_ARRAY(self.fd, words=words))

    def set_features_array(self, features: int) -> None:
        """As the kernel takes them, for callers of its own interface: neither the tap nor ``features``
        hears of it."""
        for fd in self.fds:
            k.SET_FEATURES_ARRAY(fd, features)

    def reset_owner(self) -> None:
        super().reset_owner()
        self._running.clear()
