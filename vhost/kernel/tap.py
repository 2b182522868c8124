# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Tap: a network interface of this machine whose other end is a descriptor (linux/if_tun.h).

Made for VhostNet, which moves packets between it and rings; read() and write() work as well, a frame each,
behind a virtio-net header unless ``vnet_hdr=False``. Knows interfaces; knows neither rings nor drivers.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from errno import E2BIG, EBADFD, EBUSY, EINVAL, ENODEV, ENOTTY, EPERM
from types import TracebackType
from typing import Self

from vhost.errors import IoctlError
from vhost.features import NetF
from vhost.kernel.base import open_node

NODE = "/dev/net/tun"
MODULE = "tun"
NAME_MAX = 15

_IFF_TUN, _IFF_TAP = 0x1, 0x2
_IFF_MULTI_QUEUE, _IFF_ATTACH_QUEUE, _IFF_DETACH_QUEUE = 0x100, 0x200, 0x400
_IFF_NO_PI, _IFF_VNET_HDR = 0x1000, 0x4000
_IFF_UP = 0x1
_ARPHRD_ETHER = 1

_NUMBERS = {
    "TUNSETIFF": 0x400454CA,
    "TUNSETPERSIST": 0x400454CB,
    "TUNSETOFFLOAD": 0x400454D0,
    "TUNGETIFF": 0x800454D2,
    "TUNSETSNDBUF": 0x400454D4,
    "TUNGETVNETHDRSZ": 0x800454D7,
    "TUNSETVNETHDRSZ": 0x400454D8,
    "TUNSETQUEUE": 0x400454D9,
    "TUNSETVNETLE": 0x400454DC,
    "TUNSETCARRIER": 0x400454E2,
    "SIOCGIFFLAGS": 0x8913,
    "SIOCSIFFLAGS": 0x8914,
    "SIOCGIFMTU": 0x8921,
    "SIOCSIFMTU": 0x8922,
    "SIOCSIFHWADDR": 0x8924,
    "SIOCGIFHWADDR": 0x8927,
}
_HINTS = {
    ("TUNSETIFF", EPERM): "needs CAP_NET_ADMIN, or a persistent tap of this user",
    ("TUNSETIFF", EBUSY): "another process has it, or it has another number of queues",
    ("TUNSETIFF", EINVAL): "an interface of this name is no tap, or one with other queues",
    ("TUNSETIFF", E2BIG): "more queues than the kernel gives a tap",
    ("TUNGETIFF", ENOTTY): f"not a descriptor of {NODE}",
    ("TUNGETIFF", EBADFD): "no interface belongs to it yet",
    ("SIOCSIFFLAGS", EPERM): "needs CAP_NET_ADMIN",
    ("SIOCSIFMTU", EPERM): "needs CAP_NET_ADMIN",
    ("SIOCSIFMTU", EINVAL): "not an MTU that a tap takes",
    ("SIOCSIFHWADDR", EPERM): "needs CAP_NET_ADMIN",
    ("TUNSETQUEUE", EINVAL): "the tap has one queue only, or the queue is attached, or not, already",
    ("SIOCGIFFLAGS", ENODEV): "the interface is gone",
}
_IFREQ = struct.Struct("16s24x")
_FLAGS, _INT, _ADDRESS = struct.Struct("16sH22x"), struct.Struct("16si20x"), struct.Struct("16sH6s16x")

# What a driver acknowledges, and what the tap then hands it (TUN_F_*).
_OFFLOADS = {
    NetF.GUEST_CSUM: 0x01,
    NetF.GUEST_TSO4: 0x02,
    NetF.GUEST_TSO6: 0x04,
    NetF.GUEST_ECN: 0x08,
    NetF.GUEST_UFO: 0x10,
    NetF.GUEST_USO4: 0x20,
    NetF.GUEST_USO6: 0x40,
}
_UFO, _USO = 0x10, 0x60
# What it takes in the header of a frame that is written.
_HOST = NetF.CSUM | NetF.HOST_TSO4 | NetF.HOST_TSO6 | NetF.HOST_ECN
_GUEST = NetF.GUEST_CSUM | NetF.GUEST_TSO4 | NetF.GUEST_TSO6 | NetF.GUEST_ECN


class Tap:
    """A tap, which goes when this object is closed, unless it is persistent.

    ``name``: of one that is made, or of a persistent one that is opened; may have one "%d"; empty: the
    kernel's choice. ``queue_pairs``: descriptors, each with a queue of its own.
    """

    def __init__(self, name: str = "", *, queue_pairs: int = 1, vnet_hdr: bool = True) -> None:
        raw = name.encode()
        if len(raw) > NAME_MAX:
            raise ValueError(f"interface name {name!r} of {len(raw)} bytes, limit {NAME_MAX}")
        if queue_pairs < 1:
            raise ValueError(f"queue_pairs {queue_pairs}, must be at least 1")
        self.name = name
        self.vnet_hdr = vnet_hdr
        self.fds: tuple[int, ...] = ()
        """One for each queue; they do not block."""
        flags = _IFF_TAP | _IFF_NO_PI
        flags |= _IFF_VNET_HDR if vnet_hdr else 0
        flags |= _IFF_MULTI_QUEUE if queue_pairs > 1 else 0
        try:
            for _ in range(queue_pairs):
                fd = open_node(NODE, MODULE)
                self.fds += (fd,)
                found = self._ioctl(fd, "TUNSETIFF", _FLAGS.pack(raw, flags), f"{name or 'any name'}")
                raw = _name(found)
                self.name = raw.decode()
            self._finish()
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_fd(cls, *fds: int) -> Tap:
        """A tap that somebody else set up: its queues' descriptors, which are this object's from now on."""
        self = cls.__new__(cls)
        self.name, self.vnet_hdr, self.fds = "", True, ()
        for fd in fds:
            found = self._ioctl(fd, "TUNGETIFF", bytes(_IFREQ.size), f"descriptor {fd}")
            raw, flags = _FLAGS.unpack(found)
            name = raw.rstrip(b"\0").decode()
            if not flags & _IFF_TAP:
                raise IoctlError(
                    EINVAL, "TUNGETIFF", f"interface {name}", "it is a tun, which has no Ethernet"
                )
            if self.name and name != self.name:
                raise ValueError(f"queues of two taps, {self.name} and {name}")
            self.name, self.vnet_hdr = name, bool(flags & _IFF_VNET_HDR)
        if not fds:
            raise ValueError("at least one descriptor is needed")
        self.fds = fds
        self._finish()
        return self

    def _finish(self) -> None:
        self.features = 0
        """What it makes possible: bits of ``NetF``. None of it without the header."""
        if self.vnet_hdr:
            for fd in self.fds:
                self._ioctl(fd, "TUNSETVNETLE", struct.pack("i", 1))
            self.features = int(_HOST | _GUEST) | self._probe(_UFO, NetF.HOST_UFO | NetF.GUEST_UFO)
            self.features |= self._probe(_USO, NetF.HOST_USO | NetF.GUEST_USO4 | NetF.GUEST_USO6)
            self.set_features(0)

    def _probe(self, offload: int, features: NetF) -> int:
        """Does the kernel know this offload? (USO came with 6.2.)"""
        try:
            self._set_offload(_OFFLOADS[NetF.GUEST_CSUM] | offload)
        except IoctlError as error:
            if error.errno != EINVAL:
                raise
            return 0
        return int(features)

    def _ioctl(self, fd: int, name: str, argument: bytes | int, detail: str = "") -> bytes:
        try:
            found = fcntl.ioctl(fd, _NUMBERS[name], argument)
        except OSError as error:
            number = error.errno or EINVAL
            what = detail or f"interface {self.name}"
            raise IoctlError(number, name, what, _HINTS.get((name, number), "")) from None
        return found if isinstance(found, bytes) else b""

    def _interface(self, name: str, argument: bytes, detail: str = "") -> bytes:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            return self._ioctl(any_socket.fileno(), name, argument, detail)

    # -- for VhostNet ------------------------------------------------------------------------------

    def set_features(self, features: int) -> None:
        """Hand the reader what these allow, and nothing else: checksums to finish, segments to cut."""
        self._set_offload(sum(bit for feature, bit in _OFFLOADS.items() if features & feature))

    def _set_offload(self, mask: int) -> None:
        # An integer argument, not a pointer to one.
        for fd in self.fds:
            self._ioctl(fd, "TUNSETOFFLOAD", mask, f"interface {self.name}, offloads {mask:#x}")

    def set_vnet_hdr_size(self, size: int) -> None:
        """Bytes before each frame: 10 or 12."""
        if self.vnet_hdr:
            for fd in self.fds:
                self._ioctl(
                    fd, "TUNSETVNETHDRSZ", struct.pack("i", size), f"interface {self.name}, {size} bytes"
                )

    @property
    def vnet_hdr_size(self) -> int:
        if not self.vnet_hdr:
            return 0
        found = self._ioctl(self.fileno(), "TUNGETVNETHDRSZ", bytes(4))
        return int(struct.unpack("i", found)[0])

    def fileno(self) -> int:
        """The first queue's descriptor."""
        if not self.fds:
            raise ValueError(f"tap {self.name} is closed")
        return self.fds[0]

    # -- the interface -----------------------------------------------------------------------------

    @property
    def index(self) -> int:
        return socket.if_nametoindex(self.name)

    @property
    def is_up(self) -> bool:
        return bool(self._flags() & _IFF_UP)

    def up(self) -> None:
        """Take part in traffic."""
        self._set_flags(self._flags() | _IFF_UP)

    def down(self) -> None:
        self._set_flags(self._flags() & ~_IFF_UP)

    def _flags(self) -> int:
        return int(_FLAGS.unpack(self._interface("SIOCGIFFLAGS", _FLAGS.pack(self.name.encode(), 0)))[1])

    def _set_flags(self, flags: int) -> None:
        self._interface("SIOCSIFFLAGS", _FLAGS.pack(self.name.encode(), flags & 0xFFFF))

    @property
    def mtu(self) -> int:
        """The longest payload of a frame that the interface sends; can be set."""
        return int(_INT.unpack(self._interface("SIOCGIFMTU", _INT.pack(self.name.encode(), 0)))[1])

    @mtu.setter
    def mtu(self, mtu: int) -> None:
        detail = f"interface {self.name}, MTU {mtu}"
        self._interface("SIOCSIFMTU", _INT.pack(self.name.encode(), mtu), detail)

    @property
    def mac(self) -> bytes:
        """The interface's own address, which is not that of the driver behind the tap; can be set."""
        found = self._interface("SIOCGIFHWADDR", _ADDRESS.pack(self.name.encode(), 0, bytes(6)))
        return bytes(_ADDRESS.unpack(found)[2])

    @mac.setter
    def mac(self, mac: bytes) -> None:
        if len(mac) != 6:
            raise ValueError(f"MAC address of {len(mac)} bytes")
        argument = _ADDRESS.pack(self.name.encode(), _ARPHRD_ETHER, mac)
        self._interface("SIOCSIFHWADDR", argument, f"interface {self.name}, {mac.hex(':')}")

    # -- the tap -----------------------------------------------------------------------------------

    def set_persistent(self, on: bool) -> None:
        """Keep the interface after it is closed, for somebody to open it again."""
        self._ioctl(self.fileno(), "TUNSETPERSIST", int(on))

    def set_carrier(self, on: bool) -> None:
        """Plug the cable in, or pull it."""
        self._ioctl(self.fileno(), "TUNSETCARRIER", struct.pack("i", int(on)))

    def set_sndbuf(self, size: int) -> None:
        """Bytes that may wait in the interface before a writer has to."""
        for fd in self.fds:
            self._ioctl(fd, "TUNSETSNDBUF", struct.pack("i", size), f"interface {self.name}, {size} bytes")

    def set_queue(self, index: int, attached: bool) -> None:
        """Have a queue of several take part, or not."""
        flags = _IFF_ATTACH_QUEUE if attached else _IFF_DETACH_QUEUE
        self._ioctl(self.fds[index], "TUNSETQUEUE", _FLAGS.pack(b"", flags), f"{self.name}, queue {index}")

    def close(self) -> None:
        """Idempotent."""
        fds, self.fds = self.fds, ()
        for fd in fds:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Tap {self.name}: {len(self.fds)} queue(s)>"


def _name(ifreq: bytes) -> bytes:
    raw: bytes = _FLAGS.unpack(ifreq)[0]
    return raw.rstrip(b"\0")
