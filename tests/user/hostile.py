# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A served disk, and a front-end that can misbehave in every way a socket allows.

The wire format is written down here once more, on purpose: what our own session would refuse to send
has to be sent.
"""

from __future__ import annotations

import array
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import vhost

HEADER = struct.Struct("=III")
REGION = struct.Struct("=QQQQ")
GUEST, USER = 0x1000_0000, 0x7F00_0000_0000
SIZE = 2 << 20
NUM = 8

GET_FEATURES, SET_FEATURES, SET_OWNER, RESET_OWNER = 1, 2, 3, 4
SET_MEM_TABLE, SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 5, 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR = 12, 13, 14
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, SET_VRING_ENABLE = 15, 16, 18
SET_BACKEND_REQ_FD, GET_CONFIG = 21, 24
SET_STATUS, GET_STATUS, SET_CONFIG = 39, 40, 25
RESET_DEVICE, GET_MAX_MEM_SLOTS, ADD_MEM_REG, REM_MEM_REG = 34, 36, 37, 38
VERSION, REPLY, NEED_REPLY = 1, 4, 8
PROTOCOL_FEATURES, VERSION_1 = 1 << 30, 1 << 32
GPA_ADDRESSES = 1 << 21
NOFD = 1 << 8


class Reply(NamedTuple):
    number: int
    flags: int
    payload: bytes

    @property
    def u64(self) -> int:
        return int.from_bytes(self.payload, "little")


class RawFrontend:
    """Sends whatever it is told to, and reads what comes back."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(20)
        self.sock.connect(str(path))
        self.memfd = os.memfd_create("guest", os.MFD_ALLOW_SEALING)
        os.ftruncate(self.memfd, SIZE)
        self.kick, self.call, self.err = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3))

    def close(self) -> None:
        self.sock.close()
        for fd in (self.memfd, self.kick, self.call, self.err):
            os.close(fd)

    def raw(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        sent = self.sock.sendmsg([data], ancillary if descriptors else [])
        if sent < len(data):
            self.sock.sendall(data[sent:])

    def send(
        self, number: int, payload: bytes = b"", descriptors: Sequence[int] = (), *, flags: int = VERSION
    ) -> None:
        self.raw(HEADER.pack(number, flags, len(payload)) + payload, descriptors)

    def reply(self) -> Reply:
        number, flags, size = HEADER.unpack(self.exactly(HEADER.size))
        return Reply(number, flags, self.exactly(size))

    def exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.sock.recv(size - len(data))
            assert part, "the back-end closed the connection"
            data += part
        return data

    def ask(self, number: int, payload: bytes = b"", descriptors: Sequence[int] = ()) -> Reply:
        self.send(number, payload, descriptors)
        answer = self.reply()
        assert answer.number == number
        return answer

    def status(self, number: int, payload: bytes = b"", descriptors: Sequence[int] = ()) -> int:
        """Of a request with need_reply: 0 is yes."""
        self.send(number, payload, descriptors, flags=VERSION | NEED_REPLY)
        answer = self.reply()
        assert answer.number == number
        assert answer.flags & REPLY
        return answer.u64

    def ended(self) -> bool:
        """The back-end closes the connection, having said nothing more."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    # -- a proper session, as far as wanted --------------------------------------------------------

    def negotiate(self) -> None:
        offered = self.ask(GET_FEATURES).u64
        assert offered & PROTOCOL_FEATURES
        protocol = self.ask(GET_PROTOCOL_FEATURES).u64
        self.send(SET_PROTOCOL_FEATURES, u64(protocol & ~GPA_ADDRESSES))  # ours are user addresses
        assert self.status(SET_OWNER) == 0
        assert self.status(SET_FEATURES, u64(VERSION_1 | PROTOCOL_FEATURES)) == 0

    def share_memory(self) -> int:
        return self.status(SET_MEM_TABLE, table((GUEST, SIZE, USER, 0)), [self.memfd])

    def set_ring(self, index: int = 0) -> None:
        assert self.status(SET_VRING_NUM, state(index, NUM)) == 0
        assert self.status(SET_VRING_BASE, state(index, 0)) == 0
        assert self.status(SET_VRING_ADDR, address(index)) == 0
        assert self.status(SET_VRING_CALL, u64(index), [self.call]) == 0
        assert self.status(SET_VRING_ERR, u64(index), [self.err]) == 0

    def start_ring(self, index: int = 0) -> None:
        self.set_ring(index)
        assert self.status(SET_VRING_KICK, u64(index), [self.kick]) == 0
        assert self.status(SET_VRING_ENABLE, state(index, 1)) == 0

    def start(self) -> None:
        self.negotiate()
        assert self.share_memory() == 0
        self.start_ring()


class RawChannel:
    """A front-end's end of the channel for the back-end's own requests."""

    def __init__(self, raw: RawFrontend) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(20)
        with theirs:
            assert raw.status(SET_BACKEND_REQ_FD, b"", [theirs.fileno()]) == 0

    def receive(self) -> tuple[int, int, bytes, list[int]]:
        """Number, flags, payload and descriptors of the next request."""
        data, ancillary, _, _ = self.sock.recvmsg(HEADER.size, 1024)
        fds = array.array("i")
        for _, _, raw in ancillary:
            fds.frombytes(raw)
        number, flags, size = HEADER.unpack(data)
        return number, flags, self.sock.recv(size) if size else b"", list(fds)

    def answer(self, number: int, payload: bytes = bytes(8), descriptors: Sequence[int] = ()) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        data = HEADER.pack(number, VERSION | REPLY, len(payload)) + payload
        self.sock.sendmsg([data], ancillary if descriptors else [])

    def silent(self, raw: RawFrontend) -> bool:
        """Nothing comes: an eventfd that was signalled before is seen, at the latest, with the second of
        two requests on the main socket."""
        for _ in range(2):
            raw.ask(GET_FEATURES)
        return not select.select([self.sock], [], [], 0)[0]

    def close(self) -> None:
        self.sock.close()


def u64(value: int) -> bytes:
    return struct.pack("=Q", value)


def state(index: int, num: int) -> bytes:
    return struct.pack("=II", index, num)


def address(index: int, desc: int = USER, avail: int = USER + 0x1000, used: int = USER + 0x2000) -> bytes:
    return struct.pack("=IIQQQQ", index, 0, desc, used, avail, 0)


def table(*regions: tuple[int, int, int, int]) -> bytes:
    return struct.pack("=II", len(regions), 0) + b"".join(REGION.pack(*region) for region in regions)


def slot(*region: int) -> bytes:
    return u64(0) + REGION.pack(*region)


@contextmanager
def served(
    device: vhost.Device | Callable[[], vhost.Device],
    path: Path,
    *,
    max_connections: int = 256,
    reconnect: float = 0.5,
    without: int = 0,
    without_features: int = 0,
) -> Iterator[vhost.Server]:
    """A server in a thread, which nothing that a peer does may end."""
    with vhost.Server(
        device,
        path,
        max_connections=max_connections,
        reconnect=reconnect,
        without=without,
        without_features=without_features,
    ) as server:
        stop = os.eventfd(0)
        failed: list[BaseException] = []

        def run() -> None:
            with select.epoll() as both:
                both.register(server.fileno(), select.EPOLLIN)
                both.register(stop, select.EPOLLIN)
                try:
                    while all(fd != stop for fd, _ in both.poll(server.timeout)):
                        server.step()
                except BaseException as error:
                    failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield server
        finally:
            os.eventfd_write(stop, 1)
            thread.join(20)
            os.close(stop)
        assert not thread.is_alive()
        assert not failed, failed
