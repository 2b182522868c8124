# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A network device on each of its wires, with a driver that sends and offers what it is told to (``Raw``),
and what is beyond the wire (``World``)."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from drivers.net_device import frame
from vhost.devices.net import Net
from vhost.devices.net_wires import Bridge, Drop, Echo, Packets, Source, TapWire
from vhost.drivers import Net as NetDriver
from vhost.drivers.base import Driver, QueuePlan
from vhost.features import NetF
from vhost.inprocess import InProcess
from vhost.kernel.tap import Tap
from vhost.virtio_net import NetHeader

WIRES = ("echo", "drop", "source", "socket", "bridge", "tap")
ETHERTYPE = 0x88B5  # of drivers.net_device.frame
HEADER = NetHeader.SIZE
SOURCE_SIZE = 200
TX_ROOM = 0x20000
ROOM = 0x200000
Bufs = Sequence[tuple[int, int]]


class Raw(Driver):
    """Rings of a network device: what is in them is the caller's. ``at`` is where frames are sent from,
    ``rx`` where they are received, ``extra`` is room for anything else."""

    names = NetF

    def __init__(self, ops: InProcess, *, features: int = int(NetF.MRG_RXBUF), **options: Any) -> None:
        self.features = features
        options = {"queue_size": 128, "indirect_max": 100, **options}
        super().__init__(ops, num_queues=2, data_size=ROOM, **options)
        self.at, self.rx, self.extra = (
            self.data_addr,
            self.data_addr + TX_ROOM,
            self.data_addr + ROOM - 0x10000,
        )
        self.view = self.memory.view(self.data_addr, ROOM)
        self.sent = 0

    def _plan(self) -> tuple[Sequence[QueuePlan], int]:
        plans, size = super()._plan()
        if self.features & NetF.CTRL_VQ:
            plans = [*plans, QueuePlan(2, 16)]
        return plans, size

    # -- sending -----------------------------------------------------------------------------------

    def put(self, data: bytes, at: int = 0) -> None:
        self.view[at : at + len(data)] = data

    def give_back(self, queue: int, readable: Bufs, writable: Bufs = ()) -> int:
        """Make a chain available, and wait until it comes back: how much was written."""
        ring, token = self.queues[queue], object()
        ring.add(readable, writable, token)
        ring.kick()
        assert ring.wait(10), f"queue {queue}: a chain of {readable} {writable} did not come back"
        used = ring.get_used()
        assert used is not None
        assert used[0] is token
        return used[1]

    def send_chain(self, readable: Bufs, writable: Bufs = ()) -> None:
        """One that the device gives back, whatever it is, with nothing written."""
        assert self.give_back(1, readable, writable) == 0
        self.sent += 1

    def send(self, data: bytes, header: NetHeader | None = None, cuts: Sequence[int] = ()) -> None:
        """A frame behind its header, in pieces that end at these bytes of both."""
        whole = (header or NetHeader()).pack() + data
        self.put(whole)
        ends = [0, *cuts, len(whole)]
        self.send_chain([(self.at + a, b - a) for a, b in itertools.pairwise(ends)])

    # -- receiving ---------------------------------------------------------------------------------

    def post(self, *sizes: int, kick: bool = True) -> None:
        """Receive buffers of these sizes, each behind the one before; ``rx`` is where the first one is."""
        at = self.rx
        for size in sizes:
            self.queues[0].add([], [(at, size)], (at, size))
            at += size
        if kick:
            self.queues[0].kick()

    def close(self) -> None:
        super().close()
        self.view = memoryview(b"")  # or what refers to us would keep the memory

    def recv(self, timeout: float = 10) -> tuple[NetHeader, bytes] | None:
        """A frame, of as many buffers as it says."""
        ring = self.queues[0]
        if not ring.wait(timeout):
            return None
        header, data, left, first = NetHeader(), b"", 1, True
        while left:
            used = ring.get_used()
            assert used is not None, f"{left} more of {header.num_buffers} buffers are missing"
            (at, size), written = used
            if not written:
                continue  # of no use, and given back
            assert written <= size
            part = bytes(self.view[at - self.data_addr : at - self.data_addr + written])
            if first:
                header, part, first = NetHeader.unpack(part), part[HEADER:], False
                left = header.num_buffers
                assert left >= 1
            data += part
            left -= 1
            assert not left or written == size, "a buffer but the last is not full"
        return header, data


class World:
    """A device, and what is at the far end of its wire, if that has one."""

    def __init__(self, name: str, stack: contextlib.ExitStack) -> None:
        self.name = name
        self.far: Any = None
        mtu: dict[str, Any] = {"mtu": 9000}
        if name == "bridge":
            ends = Bridge().ends
            self.device = Net(ends[0], **mtu)
            other = Net(ends[1], **mtu)
            stack.callback(other.close)
            ops = stack.enter_context(InProcess(other))
            self.far = stack.enter_context(NetDriver(ops, mtu=9000, queue_size=1024, timeout=10))
        elif name == "socket":
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.far = stack.enter_context(ours)
            self.far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            self.far.settimeout(10)
            self.device = Net(Packets(theirs), **mtu)
        elif name == "tap":
            self.far = stack.enter_context(beyond_a_tap())
            self.tap = self.far.tap
            self.device = Net(TapWire(self.tap), **mtu)
        else:
            wire = {"echo": Echo, "drop": Drop, "source": lambda: Source(SOURCE_SIZE)}[name]()
            self.device = Net(wire, **mtu)
        stack.callback(self.device.close)

    @property
    def gives(self) -> bool:
        return self.name in ("socket", "bridge", "tap")

    def give(self, data: bytes) -> None:
        self.far.send(data)

    def expect(self, raw: Raw, data: bytes) -> None:
        """The driver sent this, and nothing else, since the last look."""
        if self.name == "echo":
            came = raw.recv()
            assert came is not None
            assert came[1] == data
        elif self.name == "bridge":
            assert self.far.recv(10) == data
        elif self.gives:
            assert self.far.recv(1 << 17) == data

    def received(self) -> int:
        """Frames that the device sent on, and that were taken note of."""
        return self.device.counters()["tx_frames"]

    def drain(self) -> None:
        """Take off the wire, at both ends, what is there, so that what comes next is what is sent next."""
        with InProcess(self.device) as ops, Raw(ops) as raw:
            raw.post(*[9100] * 60)
            while raw.recv(0.1) is not None:
                pass
        if self.name == "bridge":
            while self.far.recv(0) is not None:
                pass
        elif self.gives:
            self.far.settimeout(0)
            with contextlib.suppress(BlockingIOError):
                while True:
                    self.far.recv(1 << 17)
            self.far.settimeout(10)

    def check(self) -> None:
        """A good driver finds a device that is as it should be."""
        with InProcess(self.device) as ops, NetDriver(ops, mtu=9000, timeout=10) as nic:
            for size in (60, 1514):
                sent = frame(size)
                before = self.received()
                nic.send(sent)
                nic.flush(10)
                assert self.received() == before + 1
                if self.name == "echo":
                    assert nic.recv(10) == sent
                elif self.name == "bridge":
                    assert self.far.recv(10) == sent
                elif self.gives:
                    assert self.far.recv(1 << 17) == sent
                elif self.name == "source":
                    got = nic.recv(10)
                    assert got is not None
                    assert len(got) == SOURCE_SIZE
                if self.gives:
                    self.give(sent)
                    assert nic.recv(10) == sent


class Beyond:
    """What a tap sends comes here, and what is sent here comes to it."""

    def __init__(self, tap: Tap, sock: socket.socket) -> None:
        self.tap = tap
        self._sock = sock
        self.send, self.recv, self.settimeout = sock.send, sock.recv, sock.settimeout


@contextlib.contextmanager
def beyond_a_tap(**options: Any) -> Iterator[Beyond]:
    try:
        it = Tap("pvwire%d", **options)
    except OSError as error:
        pytest.skip(f"needs /dev/net/tun and CAP_NET_ADMIN: {error}")
    with it, socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE)) as far:
        it.mtu = 9000
        Path(f"/proc/sys/net/ipv6/conf/{it.name}/disable_ipv6").write_text("1")  # or it would say so
        it.up()
        far.bind((it.name, ETHERTYPE))
        far.settimeout(10)
        yield Beyond(it, far)


@contextlib.contextmanager
def session(wire: str, packed: bool, *, drain: bool = False, **options: Any) -> Iterator[tuple[World, Raw]]:
    """After which a good driver has to find a device that works. ``drain``: where frames went is unknown."""
    with world(wire) as there:
        with InProcess(there.device) as ops, Raw(ops, packed=packed, **options) as raw:
            yield there, raw
        if drain:
            there.drain()
        there.check()


@contextlib.contextmanager
def world(name: str) -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        yield World(name, stack)
