# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a network device is connected to. A wire knows the device's pairs of queues; it knows no session."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from typing import Protocol

from vhost.devices._net_engine import FRAME_MAX, NetEngine, NetPair
from vhost.features import NetF
from vhost.virtio_net import ETH_HEADER, NetHeader

SOURCE_TYPE = b"\x88\xb5"
"""The EtherType of a source's frames: IEEE 802's for local experiments."""
SEGMENTS = int(
    NetF.HOST_TSO4
    | NetF.HOST_TSO6
    | NetF.HOST_ECN
    | NetF.HOST_USO
    | NetF.GUEST_TSO4
    | NetF.GUEST_TSO6
    | NetF.GUEST_ECN
    | NetF.GUEST_USO4
    | NetF.GUEST_USO6
)
"""Segmentation that is left to the other side, in both directions; but for fragments (UFO)."""
SOCKET_BUFFER = 1 << 20


class Connected(Protocol):
    """A device, as its wire sees it."""

    pairs: Sequence[NetPair]
    mac: bytes

    def deliver(self, frame: bytes) -> bool:
        """Give its driver a frame. From any thread."""


class Wire:
    """Drops whatever is sent, and has nothing to receive. A device's own: what it is connected to by
    ``connect`` no other device may have."""

    features = int(NetF.CSUM | NetF.GUEST_CSUM)
    """What it lets a device offer: checksums and segmentation that may be left open."""
    max_mtu = 65535

    def make_engine(self, pairs: int, threads: int | None) -> NetEngine:
        """What serves the device's queues."""
        return NetEngine(min(pairs, threads or len(os.sched_getaffinity(0))), "vhost-net")

    def connect(self, device: Connected) -> None:
        """Called once, by the device that has it."""

    def configure(self, negotiated: int) -> None:
        """A driver agreed to these features; no queue is served at this moment."""

    def set_receiving(self, pair: int, receives: bool) -> None:
        """There is a receive queue, or none any more."""

    def send(self, frame: bytes) -> None:
        """One that the driver has not sent, but the device in its name."""

    def close(self) -> None:
        """Let go of what it has."""


class Drop(Wire):
    """Nowhere: counts what is sent."""


class Echo(Wire):
    """Sends back what it is sent, on the same pair."""

    def connect(self, device: Connected) -> None:
        for pair in device.pairs:
            pair.connect(pair)


class Source(Wire):
    """As many frames of ``size`` bytes as there are buffers for, to the driver; drops what that one sends."""

    def __init__(self, size: int) -> None:
        if not ETH_HEADER <= size <= FRAME_MAX:
            raise ValueError(f"frames of {size} bytes, must be {ETH_HEADER} to {FRAME_MAX}")
        self.size = size

    def connect(self, device: Connected) -> None:
        head = device.mac + bytes([2, 0, 0, 0, 0, 1]) + SOURCE_TYPE
        frame = head + bytes(i & 0xFF for i in range(self.size - len(head)))
        for pair in device.pairs:
            pair.repeat(frame)


class Packets(Wire):
    """A Unix socket that keeps messages apart (SOCK_DGRAM or SOCK_SEQPACKET), which is the wire's from here
    on, for a device with one pair of queues. A message is a frame from its Ethernet header on, without a
    checksum at its end. What the socket has no room for is dropped."""

    def __init__(self, sock: socket.socket) -> None:
        if sock.family != socket.AF_UNIX or sock.type not in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
            raise ValueError(f"{sock.family.name} {sock.type.name}: must be AF_UNIX, and keep messages apart")
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)  # or what the kernel allows
        self.socket = sock

    def connect(self, device: Connected) -> None:
        if len(device.pairs) != 1:
            raise ValueError(f"{len(device.pairs)} pairs of queues: a socket serves one")
        device.pairs[0].open(self.socket.fileno(), True)

    def send(self, frame: bytes) -> None:
        with contextlib.suppress(OSError):  # no room, or nobody there: as if on its way
            self.socket.send(frame)

    def close(self) -> None:
        self.socket.close()


class TapDevice(Protocol):
    """What is wanted of a ``vhost.kernel.Tap``."""

    features: int
    vnet_hdr: bool

    @property
    def fds(self) -> tuple[int, ...]: ...
    def set_features(self, features: int) -> None: ...
    def set_vnet_hdr_size(self, size: int) -> None: ...
    def set_queue(self, index: int, attached: bool) -> None: ...
    def close(self) -> None: ...


class TapWire(Wire):
    """A tap, which is the wire's from here on, with a queue for each pair of the device's. What the tap and
    the driver both can leave to the other side, checksums and segmentation, they do."""

    def __init__(self, tap: TapDevice) -> None:
        if not tap.vnet_hdr:
            raise ValueError("the tap has no virtio-net header")
        self.tap = tap
        self.features = tap.features
        tap.set_vnet_hdr_size(NetHeader.SIZE)

    def connect(self, device: Connected) -> None:
        pairs, fds = device.pairs, self.tap.fds
        if len(pairs) != len(fds):
            raise ValueError(f"{len(pairs)} pairs of queues, and a tap with {len(fds)}")
        for pair, fd in zip(pairs, fds, strict=True):
            pair.open(fd, False)
        self._detached: set[int] = set()
        for index in range(len(pairs)):
            self.set_receiving(index, False)

    def configure(self, negotiated: int) -> None:
        self.tap.set_features(negotiated)

    def set_receiving(self, pair: int, receives: bool) -> None:
        """The kernel spreads its frames over the queues that take part."""
        if len(self.tap.fds) > 1 and receives == (pair in self._detached):
            # One that is not there any more keeps no ring from being stopped.
            with contextlib.nullcontext() if receives else contextlib.suppress(OSError):
                self.tap.set_queue(pair, receives)
            (self._detached.discard if receives else self._detached.add)(pair)

    def send(self, frame: bytes) -> None:
        with contextlib.suppress(OSError):  # the interface is down
            os.write(self.tap.fds[0], bytes(NetHeader.SIZE) + frame)

    def close(self) -> None:
        self.tap.close()


class Bridge:
    """Connects two devices: ``Net(bridge.ends[0])`` and ``Net(bridge.ends[1])``, each with as many pairs of
    queues, and made before one is served. What one driver sends the other receives, on the same pair, or on
    another of the same thread if it does not use that.

    ``threads`` serve both. With more than one, both drivers should use all their pairs.
    """

    def __init__(self, *, threads: int = 1) -> None:
        if threads < 1:
            raise ValueError(f"threads {threads}, must be at least 1")
        engine = NetEngine(threads, "vhost-net")
        self.ends = (BridgeEnd(engine), BridgeEnd(engine))
        self.ends[0].other, self.ends[1].other = self.ends[1], self.ends[0]


class BridgeEnd(Wire):
    """One of a bridge's."""

    features = Wire.features | SEGMENTS
    other: BridgeEnd

    def __init__(self, engine: NetEngine) -> None:
        self._engine: NetEngine | None = engine
        self.device: Connected | None = None

    def make_engine(self, pairs: int, threads: int | None) -> NetEngine:
        if threads is not None:
            raise ValueError("threads: a bridge has its own")
        if self._engine is None or self.device is not None:
            raise ValueError("this end of the bridge has, or had, a device")
        return self._engine

    def connect(self, device: Connected) -> None:
        assert self._engine is not None
        pairs, workers = device.pairs, self._engine.workers
        others = self.other.device.pairs if self.other.device is not None else ()
        if others and len(others) != len(pairs):
            raise ValueError(f"{len(pairs)} pairs of queues: the bridge's other device has {len(others)}")
        self.device = device
        for index, pair in enumerate(pairs):
            pair.join(pairs[index + workers] if index + workers < len(pairs) else pairs[index % workers])
        for pair, other in zip(pairs, others, strict=False):
            pair.connect(other)
            other.connect(pair)

    def send(self, frame: bytes) -> None:
        if self.other.device is not None:
            self.other.device.deliver(frame)

    def close(self) -> None:
        """What the other driver sends is dropped from here on, as it is while there is no session."""
        self._engine = None
