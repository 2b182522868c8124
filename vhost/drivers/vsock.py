# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A virtio-vsock driver in user space (VIRTIO 1.2, 5.10), on any VhostOps.

Moves packets between the rings and the connections, and knows who each packet belongs to. What a packet
means is the ``Connection``'s business; ``Stream`` and ``Listener`` are what a program has of it.

Threads: any thread may make any call; calls that wait step the driver themselves, one thread for all of
them. A program with a loop of its own polls ``fileno()`` and calls ``step()``, which never waits.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import threading
import time
from collections import deque
from collections.abc import Callable

from vhost.drivers.vsock_connection import Address, Connection, State
from vhost.drivers.vsock_rings import DATA, HEAD, VsockRings
from vhost.drivers.vsock_stream import Listener, Stream
from vhost.errors import Disconnected, InactiveFeature, ReplyTimeout, VhostError
from vhost.features import VsockF
from vhost.ops import VhostOps
from vhost.virtio_vsock import (
    HEADER,
    MAX_PAYLOAD,
    PORT_ANY,
    TX,
    VsockConfig,
    VsockOp,
    VsockType,
    is_guest_cid,
)

_RST, _REQUEST = int(VsockOp.RST), int(VsockOp.REQUEST)
_EPHEMERAL = 1024
"""The first port that connections from here have; Linux keeps those below for the privileged too."""
LINGER = 8.0
"""Seconds until a peer that does not complete a disconnect is reset; Linux waits as long."""
OURS = -1.0
"""As a timeout: the driver's."""
_FAREWELL = 1.0
"""Seconds that ``close`` gives the device to take the last packets."""


class Vsock(VsockRings):
    """Connects to and listens for peers at the other end of a socket device.

    ``guest_cid``: who we are; None reads it from the configuration space, which kernel vhost has none of.
    ``buf_alloc`` bytes are buffered for each connection. ``rx_buffers`` of ``payload`` bytes take what the
    device sends, as many of the same size are for data that is sent, and ``queue_size`` less those for
    control packets. ``timeout`` is that of the calls which wait, and of new streams; None: for ever.
    """

    def __init__(
        self,
        ops: VhostOps,
        guest_cid: int | None = None,
        *,
        packed: bool | None = None,
        queue_size: int = 128,
        rx_buffers: int = 32,
        payload: int = MAX_PAYLOAD,
        buf_alloc: int = 256 << 10,
        timeout: float | None = 30.0,
        without: int | None = None,
    ) -> None:
        if not 0 < buf_alloc < 1 << 32:
            raise ValueError(f"buf_alloc {buf_alloc:#x}: must be 1 to 0xffffffff")
        if guest_cid is not None and not is_guest_cid(guest_cid):
            raise ValueError(f"guest_cid {guest_cid:#x} is reserved, none of a guest (VIRTIO 5.10.4)")
        self.timeout = timeout
        self.buf_alloc = buf_alloc
        self.dropped = 0
        """Packets that belonged to nobody and could not be answered either."""
        self._lock = threading.Condition(threading.Lock())
        self._polling = self._gone = self._closed = False
        self._connections: dict[tuple[int, int, int], Connection] = {}
        self._listeners: dict[int, Listener] = {}
        self._next_port = random.randrange(_EPHEMERAL, PORT_ANY)
        self._lingering: deque[tuple[float, Connection]] = deque()
        """Connections that wait for the peer's last RST, and until when."""
        super().__init__(
            ops, packed=packed, queue_size=queue_size, rx_buffers=rx_buffers, payload=payload, without=without
        )
        try:
            self.guest_cid = self._read_cid() if guest_cid is None else guest_cid
            self._populate()
        except BaseException:
            super().close()
            raise

    # ------------------------------------------------------------------ for programs

    def connect(
        self,
        address: Address,
        timeout: float | None = OURS,
        *,
        port: int | None = None,
        kind: VsockType = VsockType.STREAM,
    ) -> Stream:
        """A stream to (CID, port), from ``port`` of ours (None: any that is free). ``timeout`` seconds for
        this call and the stream's others (not given: the driver's). 0 does not wait for the answer: the
        stream's calls raise BlockingIOError until it is there, and a refusal is theirs to raise.

        VsockRefused: nobody listens. ReplyTimeout: nobody answers; Linux does not for CIDs of nobody."""
        cid, peer_port = address
        timeout = self.timeout if timeout == OURS else timeout
        if not 0 <= cid < 1 << 32 or not 0 <= peer_port <= PORT_ANY:
            raise ValueError(f"address {cid:#x}:{peer_port:#x}: CIDs and ports have 32 bits")
        self._check_kind(kind)
        with self._lock:
            self._check()
            local = self.guest_cid, self._pick_port(port, cid, peer_port)
            connection = Connection(local, address, self.buf_alloc, kind=kind)
            self._connections[local[1], peer_port, cid] = connection
            self._changed(connection)
            stream = Stream(self, connection, timeout)
            if timeout == 0:
                return stream
            try:
                if not self._wait(lambda: connection.state is not State.CONNECTING, timeout):
                    raise ReplyTimeout(f"{connection}: no answer within {timeout} s")
                if connection.error is not None:
                    raise connection.error
            except BaseException:
                self._close_connection(connection)
                raise
            return stream

    def listen(
        self,
        port: int,
        *,
        backlog: int = 128,
        kind: VsockType = VsockType.STREAM,
        timeout: float | None = OURS,
    ) -> Listener:
        """Let peers connect to this port. OSError (EADDRINUSE): it has a listener."""
        if not 0 <= port < PORT_ANY:
            raise ValueError(f"port {port:#x}: must be 0 to {PORT_ANY - 1:#x}")
        if backlog < 1:
            raise ValueError(f"backlog {backlog}: must be 1 or more")
        self._check_kind(kind)
        timeout = self.timeout if timeout == OURS else timeout
        with self._lock:
            self._check()
            if port in self._listeners:
                raise OSError(errno.EADDRINUSE, f"vsock port {port} has a listener")
            listener = self._listeners[port] = Listener(self, port, int(kind), backlog, timeout)
            return listener

    def step(self) -> None:
        """Take what the device sent and did, and send what is owed. Never waits; a bounded amount at once.

        QueueBroken: the device broke a ring, and the driver is of no more use."""
        with self._lock:
            self._check()
            if self._step():
                self._wake()

    def close(self) -> None:
        """Reset what is still connected, stop the rings, reset the device. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._wake()
            self._lock.wait_for(lambda: not self._polling)
            with contextlib.suppress(VhostError):  # what cannot be told any more the peer learns otherwise
                self._say_farewell()
            for connection in list(self._connections.values()):
                connection.fail("the driver was closed")
            self._connections.clear()
            self._resets.clear()
            self._owing.clear()
            super().close()

    def restart(self, ops: VhostOps) -> bool:
        """Go on with another session after the back-end died: connections are reset, listeners stay."""
        with self._lock:
            resumed = super().restart(ops)
            self._gone = False
            self._reset_all("the back-end was replaced")
            self._populate()
            self._wake()
            return resumed

    # ------------------------------------------------------------------ for streams and listeners

    def _wait(self, ready: Callable[[], bool], timeout: float | None) -> bool:
        """Step until ``ready``; False after ``timeout`` seconds. The lock is held, and free meanwhile.

        One thread waits for the device, the others for that one; which is another when it is done."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not ready():
            self._check()
            moved = self._step()
            if moved:
                self._wake()
                if ready():
                    break
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            if self._polling:
                self._lock.wait(left)
            else:
                self._poll(0.0 if moved else left)
        return True

    def _poll(self, seconds: float | None) -> None:
        self._polling = True
        self._lock.release()
        alive = True
        try:
            ready = self._poller.poll(None if seconds is None else seconds * 1000)
            if any(fd != self._call for fd, _ in ready):
                alive = self.ops.step()
        finally:
            self._lock.acquire()
            self._polling = False
            self._gone |= not alive
            self._lock.notify_all()

    def _wake(self) -> None:
        """Something changed that another thread may be waiting for."""
        self._lock.notify_all()
        if self._polling:
            os.eventfd_write(self._call, 1)

    def _check(self) -> None:
        if self._closed:
            raise OSError(errno.EBADF, f"vsock {self.guest_cid}: the driver is closed")
        if self._gone:
            raise Disconnected(f"vsock {self.guest_cid}: the back-end is gone")

    def _changed(self, connection: Connection) -> None:
        """A call of the program's made this connection owe packets, or ended it."""
        if self._closed:
            return
        self._settle(connection)
        self._flush()
        self._wake()

    def _close_connection(self, connection: Connection) -> None:
        if connection.close():
            self._lingering.append((time.monotonic() + LINGER, connection))
        self._changed(connection)

    def _close_listener(self, listener: Listener) -> None:
        del self._listeners[listener.port]
        for connection in list(listener._waiting):
            connection.fail("nobody accepted it", 1 << _RST)
            self._changed(connection)
        self._wake()

    def _check_kind(self, kind: int) -> None:
        """5.10.3.1: the stream type is implied unless that was negotiated away."""
        streams = self.negotiated & (VsockF.STREAM | VsockF.NO_IMPLIED_STREAM) != VsockF.NO_IMPLIED_STREAM
        if not (streams if kind == VsockType.STREAM else self.negotiated & VsockF.SEQPACKET):
            raise InactiveFeature(f"the device does not offer sockets of the kind {VsockType(kind).name}")

    def _pick_port(self, port: int | None, cid: int, peer_port: int) -> int:
        if port is not None:
            if not 0 <= port < PORT_ANY:
                raise ValueError(f"port {port:#x}: must be 0 to {PORT_ANY - 1:#x}")
            if (port, peer_port, cid) in self._connections:
                raise OSError(errno.EADDRINUSE, f"vsock port {port} has a connection to {cid}:{peer_port}")
            return port
        while True:
            port = self._next_port
            self._next_port = port + 1 if port + 1 < PORT_ANY else _EPHEMERAL
            if (port, peer_port, cid) not in self._connections and port not in self._listeners:
                return port

    def _populate(self) -> None:
        super()._populate()
        self._lingering.clear()
        self._poller = select.poll()
        self._poller.register(self._call, select.POLLIN)
        if self.ops.fileno() >= 0:  # a back-end that goes away would keep us waiting
            self._poller.register(self.ops.fileno(), select.POLLIN)

    def _read_cid(self) -> int:
        cid = VsockConfig.unpack(self.ops.get_config(0, VsockConfig.SIZE)).guest_cid
        if not is_guest_cid(cid):
            raise VhostError(f"the device says guest_cid {cid:#x}, which is reserved (VIRTIO 5.10.4)")
        return cid

    # ------------------------------------------------------------------ steps

    def _step(self) -> bool:
        """One look at the rings and the clock; had the device done anything?"""
        done = self._poll_rings()
        while self._lingering and self._lingering[0][0] <= time.monotonic():
            _, connection = self._lingering.popleft()
            connection.fail("did not complete the disconnect", 1 << _RST)
            self._settle(connection)
        self._flush()
        return done

    def _packet(self, view: memoryview, written: int) -> None:
        # The device's memory as well as ours: it is read once.
        src_cid, dst_cid, src_port, dst_port, size, kind, op, flags, buf_alloc, fwd_cnt = HEADER.unpack_from(
            view, HEAD
        )
        if written < HEADER.size or dst_cid != self.guest_cid or src_cid >> 32:
            self.dropped += 1
            return
        connection = self._connections.get((dst_port, src_port, src_cid))
        if connection is None or connection.kind != kind:
            wanted = op == _REQUEST and connection is None
            if wanted and self._admit((src_cid, src_port), dst_port, kind, buf_alloc):
                return
            if op == _RST:
                self.dropped += 1
            else:  # a flow that nobody knows, or of a type that nobody knows (5.10.6.4.1)
                self._resets.append(HEADER.pack(dst_cid, src_cid, dst_port, src_port, 0, kind, _RST, 0, 0, 0))
            return
        if size > written - HEADER.size:
            connection.abort(f"says {size} bytes in a packet that has {written - HEADER.size}")
        else:
            connection.receive(op, flags, view[DATA : DATA + size], buf_alloc, fwd_cnt)
        self._settle(connection)

    def _settle(self, connection: Connection) -> None:
        if connection.state is State.CLOSED:
            self._forget(connection)
        elif connection.wants:
            self._owing[connection] = None

    def _admit(self, peer: Address, port: int, kind: int, peer_buf_alloc: int) -> bool:
        listener = self._listeners.get(port)
        if listener is None or listener._kind != kind or len(listener._waiting) >= listener.backlog:
            return False
        connection = Connection(
            (self.guest_cid, port),
            peer,
            self.buf_alloc,
            kind=kind,
            request=False,
            peer_buf_alloc=peer_buf_alloc,
        )
        self._connections[port, peer[1], peer[0]] = connection
        self._owing[connection] = None
        listener._waiting.append(connection)
        return True

    def _forget(self, connection: Connection) -> None:
        """It is closed: no packet is its any more, and all that it can still owe is a RST."""
        (_, port), (cid, peer_port) = connection.local, connection.remote
        if self._connections.get((port, peer_port, cid)) is connection:
            del self._connections[port, peer_port, cid]
        self._owing.pop(connection, None)
        if connection.next_control() is not None:
            header = bytearray(HEADER.size)
            connection.pack_into(memoryview(header), 0, _RST)
            self._resets.append(bytes(header))
        listener = self._listeners.get(port)
        if listener is not None and connection.error is not None and connection in listener._waiting:
            listener._waiting.remove(connection)

    def _transport_reset(self) -> None:
        self.guest_cid = self._read_cid()
        self._reset_all("the device was moved (transport reset)")

    def _reset_all(self, why: str) -> None:
        for connection in list(self._connections.values()):
            connection.fail(why)
            self._forget(connection)

    def _say_farewell(self) -> None:
        for connection in list(self._connections.values()):
            connection.fail("the driver was closed", 1 << _RST)
            self._forget(connection)
        deadline = time.monotonic() + _FAREWELL
        self._flush()
        while self.queues[TX].in_flight and (left := deadline - time.monotonic()) > 0:
            self.queues[TX].wait(left)
            self._reap()
            self._flush()
