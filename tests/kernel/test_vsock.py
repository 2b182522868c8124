# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The vsock driver on the kernel's vhost-vsock: the peers are AF_VSOCK sockets of the same kernel."""

from __future__ import annotations

import errno
import hashlib
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from vhost.drivers import Vsock
from vhost.drivers.vsock_connection import VsockBroken, VsockRefused, VsockReset
from vhost.drivers.vsock_stream import Stream
from vhost.errors import ReplyTimeout
from vhost.kernel import VhostVsock
from vhost.virtio_vsock import VsockType

pytestmark = pytest.mark.kernel("vsock")

CID, HOST, PORT = 42, 2, 1234
MIB = 1 << 20
DEADLINE = 60
KINDS = {VsockType.STREAM: socket.SOCK_STREAM, VsockType.SEQPACKET: socket.SOCK_SEQPACKET}


@contextmanager
def driver(**more: Any) -> Iterator[Vsock]:
    with VhostVsock(CID) as ops, Vsock(ops, CID, **{"timeout": DEADLINE, **more}) as vsock:
        yield vsock


@pytest.fixture(params=[False, True], ids=["big", "small"])
def buffers(request: pytest.FixtureRequest) -> dict[str, int]:
    """Receive buffers that take what the kernel sends as it is, and such that it has to split."""
    return {"payload": 4096 - 44, "rx_buffers": 64} if request.param else {}


@contextmanager
def listening(kind: VsockType = VsockType.STREAM, port: int = PORT, size: int = 0) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_VSOCK, KINDS[kind]) as server:
        if size:
            set_size(server, size)
        server.settimeout(DEADLINE)
        server.bind((socket.VMADDR_CID_ANY, port))
        server.listen(128)
        yield server


def set_size(sock: socket.socket, size: int) -> None:
    sock.setsockopt(socket.AF_VSOCK, socket.SO_VM_SOCKETS_BUFFER_SIZE, size)


@contextmanager
def pair(
    vsock: Vsock, *, theirs: bool = False, kind: VsockType = VsockType.STREAM, size: int = 0
) -> Iterator[tuple[Stream, socket.socket]]:
    """A stream of ours and the kernel's socket at its other end; ``theirs``: the socket connected."""
    if theirs:
        with vsock.listen(PORT, kind=kind) as listener, socket.socket(socket.AF_VSOCK, KINDS[kind]) as sock:
            if size:
                set_size(sock, size)
            sock.settimeout(DEADLINE)
            with ThreadPoolExecutor(1) as pool:
                connecting = pool.submit(sock.connect, (CID, PORT))
                stream, address = listener.accept()
                connecting.result(DEADLINE)
            assert address == (HOST, sock.getsockname()[1])
            with stream:
                yield stream, sock
    else:
        with listening(kind, size=size) as server, vsock.connect((HOST, PORT), kind=kind) as stream:
            sock, address = server.accept()
            assert address == stream.getsockname()
            with sock:
                sock.settimeout(DEADLINE)
                yield stream, sock


def pour(send: Callable[[bytes], Any], size: int, seed: int) -> str:
    """Send so many bytes that are no two alike; their hash."""
    whole = hashlib.sha256()
    block = hashlib.shake_256(bytes([seed])).digest(MIB + 7)
    while size:
        part = block[: min(size, len(block))]
        block = block[1:] + block[:1]
        send(part)
        whole.update(part)
        size -= len(part)
    return whole.hexdigest()


def drain(recv: Callable[[int], bytes]) -> tuple[int, str]:
    """All that comes until the end."""
    whole, size = hashlib.sha256(), 0
    while part := recv(1 << 17):
        whole.update(part)
        size += len(part)
    return size, whole.hexdigest()


def results(*futures: Future[Any]) -> list[Any]:
    return [future.result(DEADLINE) for future in futures]


# ---------------------------------------------------------------------- bytes


@pytest.mark.parametrize("theirs", [False, True], ids=["we-connect", "they-connect"])
@pytest.mark.parametrize("outward", [True, False], ids=["to-kernel", "from-kernel"])
def test_16_mib(theirs: bool, outward: bool, buffers: dict[str, int]) -> None:
    with (
        driver(**buffers) as vsock,
        pair(vsock, theirs=theirs) as (stream, sock),
        ThreadPoolExecutor() as pool,
    ):
        begun = time.monotonic()
        if outward:
            received = pool.submit(drain, sock.recv)
            sent = pour(stream.sendall, 16 * MIB, 1)
            stream.shutdown(socket.SHUT_WR)
            size, digest = received.result(DEADLINE)
        else:
            sending = pool.submit(pour, sock.sendall, 16 * MIB, 2)
            sending.add_done_callback(lambda _: sock.shutdown(socket.SHUT_WR))
            size, digest = drain(stream.recv)
            sent = sending.result(DEADLINE)
        seconds = time.monotonic() - begun
        assert (size, digest) == (16 * MIB, sent)
        print(f"{size / MIB / seconds:.1f} MiB/s")


def test_16_mib_both_ways_at_once(buffers: dict[str, int]) -> None:
    """Each way in threads of its own, on one stream; two of them are in the driver at the same time."""
    with driver(**buffers) as vsock, pair(vsock) as (stream, sock), ThreadPoolExecutor() as pool:
        out = pool.submit(pour, stream.sendall, 16 * MIB, 3)
        out.add_done_callback(lambda _: stream.shutdown(socket.SHUT_WR))
        back = pool.submit(pour, sock.sendall, 16 * MIB, 4)
        back.add_done_callback(lambda _: sock.shutdown(socket.SHUT_WR))
        there, here = results(pool.submit(drain, sock.recv), pool.submit(drain, stream.recv))
        assert there == (16 * MIB, out.result(DEADLINE))
        assert here == (16 * MIB, back.result(DEADLINE))


@pytest.mark.parametrize("ours", [100, 1000, 5000])
@pytest.mark.parametrize("size", [4096, 10_000])
@pytest.mark.parametrize("theirs", [False, True])
def test_small_buffers(theirs: bool, size: int, ours: int) -> None:
    """Nearly every packet waits for credit. Newer kernels count what a packet costs them besides, so that a
    buffer of a few hundred bytes is none: their socket fails with ENOBUFS."""
    total = 100_000
    with (
        driver(buf_alloc=ours) as vsock,
        pair(vsock, theirs=theirs, size=size) as (stream, sock),
        ThreadPoolExecutor() as pool,
    ):
        out = pool.submit(pour, stream.sendall, total, 5)
        back = pool.submit(pour, sock.sendall, total, 6)
        out.add_done_callback(lambda _: stream.shutdown(socket.SHUT_WR))
        back.add_done_callback(lambda _: sock.shutdown(socket.SHUT_WR))
        assert stream._connection.peer_buf_alloc == size
        there, here = results(pool.submit(drain, sock.recv), pool.submit(drain, stream.recv))
        assert there == (total, out.result(DEADLINE))
        assert here == (total, back.result(DEADLINE))


def test_a_reader_that_does_not_read_stops_us() -> None:
    with driver() as vsock, pair(vsock) as (stream, sock):
        stream.settimeout(0)
        sent = 0
        with pytest.raises(BlockingIOError):
            while True:
                sent += stream.send(bytes(100_000))
        assert sent == 256 << 10  # the default of the kernel's sockets
        stream.settimeout(0.05)
        with pytest.raises(ReplyTimeout, match="send: not within"):
            stream.send(b"x")
        stream.settimeout(DEADLINE)
        with ThreadPoolExecutor() as pool:
            sending = pool.submit(stream.sendall, b"x" * 1000)
            left = sent + 1000
            while left:
                left -= len(sock.recv(left))
            sending.result(DEADLINE)


# ---------------------------------------------------------------------- ends


@pytest.mark.parametrize("theirs", [False, True])
def test_half_close(theirs: bool) -> None:
    with driver() as vsock:
        with pair(vsock, theirs=theirs) as (stream, sock):  # we are the first to end
            stream.sendall(b"question")
            stream.shutdown(socket.SHUT_WR)
            assert drain(sock.recv)[0] == 8
            with pytest.raises(VsockBroken):
                stream.send(b"x")
            sock.sendall(b"answer")
            assert stream.recv(100) == b"answer"
            sock.shutdown(socket.SHUT_WR)
            assert stream.recv(100) == b""
        with pair(vsock, theirs=theirs) as (stream, sock):  # they are
            sock.sendall(b"question")
            sock.shutdown(socket.SHUT_WR)
            assert drain(stream.recv)[0] == 8
            stream.sendall(b"answer")
            assert sock.recv(100) == b"answer"
            stream.shutdown(socket.SHUT_WR)
            assert sock.recv(100) == b""


def test_the_reader_leaves() -> None:
    with driver() as vsock:
        with pair(vsock) as (stream, sock):
            stream.shutdown(socket.SHUT_RD)
            with pytest.raises(BrokenPipeError):
                for _ in range(10_000):  # until the kernel heard of it
                    sock.sendall(b"x" * 100)
            assert stream.recv(1) == b""
        with pair(vsock) as (stream, sock):
            sock.shutdown(socket.SHUT_RD)
            stream.settimeout(0)
            deadline = time.monotonic() + DEADLINE
            with pytest.raises(VsockBroken, match="the peer has shut down receiving"):
                while time.monotonic() < deadline:
                    vsock.step()
                    if stream.writable:
                        stream.send(b"x")


def test_closing_delivers_what_was_sent() -> None:
    with driver() as vsock:
        with pair(vsock) as (stream, sock):
            digest = pour(stream.sendall, 200_000, 7)
            stream.close()
            assert drain(sock.recv) == (200_000, digest)
            with pytest.raises(BrokenPipeError):
                sock.sendall(b"x")
        with pair(vsock) as (stream, sock):
            digest = pour(sock.sendall, 200_000, 8)
            sock.close()
            assert drain(stream.recv) == (200_000, digest)
            with pytest.raises(VsockBroken):
                stream.sendall(b"x")
        wait_for(vsock, lambda: not vsock._connections)


def test_the_driver_ends() -> None:
    """Sockets learn of it, and the port is free for the next."""
    for _ in range(2):
        with driver() as vsock, listening() as server:
            stream = vsock.connect((HOST, PORT))
            sock, _ = server.accept()
            stream.send(b"x")
            assert sock.recv(1) == b"x"
            vsock.close()
            sock.settimeout(DEADLINE)
            assert sock.recv(1) == b""
            with pytest.raises(BrokenPipeError):
                sock.sendall(b"x")
            sock.close()
            with pytest.raises(VsockReset, match="the driver was closed"):
                stream.recv(1)


def test_restart_on_another_session() -> None:
    with VhostVsock(CID) as first, Vsock(first, CID, timeout=DEADLINE) as vsock, listening() as server:
        stream = vsock.connect((HOST, PORT))
        sock, _ = server.accept()
        first.close()
        with pytest.raises(ConnectionResetError), sock:
            sock.settimeout(DEADLINE)
            sock.recv(1)
        with VhostVsock(CID) as second:
            vsock.restart(second)
            with pytest.raises(VsockReset, match="replaced"):
                stream.recv(1)
            with vsock.connect((HOST, PORT)) as stream:
                sock, _ = server.accept()
                with sock:
                    sock.sendall(b"again")
                    assert stream.recv(5) == b"again"
            vsock.close()


PEER = """
import socket, sys
sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
sock.connect((int(sys.argv[1]), int(sys.argv[2])))
sock.sendall(b"here")
if sys.argv[3] == "sends":
    while True:
        sock.sendall(bytes(100_000))
sock.recv(1)
sys.stdin.read()
"""


@pytest.mark.parametrize("what", ["waits", "sends"])
def test_the_peer_is_killed(what: str) -> None:
    with driver() as vsock, vsock.listen(PORT) as listener:
        command = [sys.executable, "-c", PEER, str(CID), str(PORT), what]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as peer:
            try:
                stream, _ = listener.accept()
                assert stream.recv(4) == b"here"
            finally:
                peer.send_signal(signal.SIGKILL)
                peer.wait()
            drain(stream.recv)  # the kernel closes what the dead one had open: an end like any other
            with pytest.raises(VsockBroken):
                stream.sendall(b"x")
            stream.close()
        with pair(vsock) as (stream, sock):  # the driver is as good as before
            stream.sendall(b"x")
            assert sock.recv(1) == b"x"


# ---------------------------------------------------------------------- nobody


def test_refused() -> None:
    with driver() as vsock:
        for _ in range(3):
            with pytest.raises(VsockRefused, match=f"2:{PORT}: refused"):
                vsock.connect((HOST, PORT))
        with listening(), pytest.raises(VsockRefused):
            vsock.connect((HOST, PORT), kind=VsockType.SEQPACKET)  # another type than the listener's
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
            sock.settimeout(DEADLINE)
            with ThreadPoolExecutor() as pool:
                connecting = pool.submit(sock.connect, (CID, PORT))
                wait_for(vsock, connecting.done)
                with pytest.raises(ConnectionResetError):
                    connecting.result()
        assert not vsock._connections


def test_cids_of_nobody() -> None:
    with driver() as vsock:
        for cid in (0, 1, 43, 0xFFFF_FFFE):
            with pytest.raises(ReplyTimeout, match="no answer within"):
                vsock.connect((cid, PORT), 0.1)
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock, pytest.raises(OSError) as error:
            sock.connect((43, PORT))
        assert error.value.errno == errno.ENODEV


def test_a_cid_that_is_not_the_devices() -> None:
    """The kernel takes nothing from us under a name that it does not know us by."""
    with VhostVsock(CID) as ops, Vsock(ops, CID + 1) as vsock, listening():
        with pytest.raises(ReplyTimeout):
            vsock.connect((HOST, PORT), 0.1)


# ---------------------------------------------------------------------- many


def test_64_connections_at_the_same_time() -> None:
    """All open together, each with data of its own, echoed by the kernel's side."""

    def echo(sock: socket.socket) -> None:
        with sock:
            while data := sock.recv(65536):
                sock.sendall(data)

    with driver() as vsock, listening() as server, ThreadPoolExecutor(64) as pool:
        streams = [vsock.connect((HOST, PORT), 0) for _ in range(64)]
        echoes = [pool.submit(echo, server.accept()[0]) for _ in streams]
        wait_for(vsock, lambda: all(stream.connected for stream in streams))
        payloads = [hashlib.shake_256(bytes([i])).digest(5000 + i) for i in range(64)]
        for stream, payload in zip(streams, payloads, strict=True):
            stream.settimeout(DEADLINE)
            stream.sendall(payload)
        for stream, payload in zip(streams, payloads, strict=True):
            with stream.makefile("rb") as file:
                assert file.read(len(payload)) == payload
        for stream in streams:
            stream.close()
        results(*echoes)
        wait_for(vsock, lambda: not vsock._connections)


def test_a_thread_for_each_stream() -> None:
    def talk(stream: Stream, seed: int) -> None:
        with stream:
            for turn in range(20):
                message = bytes([seed, turn]) * 50
                stream.sendall(message)
                with stream.makefile("rb", buffering=0) as file:
                    assert file.read(100) == message

    def echo(sock: socket.socket) -> None:
        with sock:
            while data := sock.recv(65536):
                sock.sendall(data)

    with driver() as vsock, listening() as server, ThreadPoolExecutor(32) as pool:
        done = []
        for seed in range(16):
            stream = vsock.connect((HOST, PORT))
            done += [pool.submit(echo, server.accept()[0]), pool.submit(talk, stream, seed)]
        results(*done)


def test_connections_one_after_the_other() -> None:
    with driver() as vsock, listening() as server:
        for number in range(200):
            with vsock.connect((HOST, PORT)) as stream:
                sock, _ = server.accept()
                with sock:
                    stream.send(b"%d" % number)
                    assert sock.recv(10) == b"%d" % number
        wait_for(vsock, lambda: not vsock._connections)


def test_an_event_loop() -> None:
    """A server that never waits in a call: one selector for the driver, 16 clients that are processes of
    this kernel as any other."""

    def client(seed: int) -> None:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
            sock.settimeout(DEADLINE)
            sock.connect((CID, PORT))
            data = bytes([seed]) * 30_000
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            got = b""
            while part := sock.recv(65536):
                got += part
            assert got == data

    with (
        driver(timeout=0) as vsock,
        vsock.listen(PORT) as listener,
        selectors.DefaultSelector() as selector,
        ThreadPoolExecutor(16) as pool,
    ):
        selector.register(vsock, selectors.EVENT_READ)
        clients = [pool.submit(client, seed) for seed in range(16)]
        held: dict[Stream, bytearray] = {}
        deadline = time.monotonic() + DEADLINE
        while not all(one.done() for one in clients):
            assert time.monotonic() < deadline
            selector.select(0.1)
            vsock.step()
            while listener.readable:
                held[listener.accept()[0]] = bytearray()
            for stream, data in list(held.items()):
                while stream.readable:
                    part = stream.recv(65536)
                    data += part
                    if not part:
                        break
                if stream._connection.at_end and data and stream.writable:
                    del data[: stream.send(data)]
                if stream._connection.at_end and not data:
                    stream.close()
                    del held[stream]
        results(*clients)


# ---------------------------------------------------------------------- messages


@pytest.mark.parametrize("theirs", [False, True])
def test_messages(theirs: bool, buffers: dict[str, int]) -> None:
    sizes = [1, 2, 100, 4051, 4052, 4053, 65535, 65536, 65537, 200_000, 3]
    with (
        ThreadPoolExecutor() as pool,  # ends last: what goes wrong closes the stream, which ends all waiting
        driver(**buffers) as vsock,
        pair(vsock, theirs=theirs, kind=VsockType.SEQPACKET) as (stream, sock),
    ):
        # Python's timeouts make a socket non-blocking, of which the kernel sends parts of messages that have
        # no room as a whole, and says that it sent nothing.
        sock.settimeout(None)
        messages = [hashlib.shake_256(bytes([i])).digest(size) for i, size in enumerate(sizes)]

        def send(to: Any) -> None:
            for number, message in enumerate(messages):
                to.sendall(message, socket.MSG_EOR if number % 2 else 0)

        def check(source: Any) -> None:
            for number, message in enumerate(messages):
                data, _, flags, _ = source.recvmsg(1 << 18)
                assert data == message, number
                assert bool(flags & socket.MSG_EOR) == bool(number % 2), number

        results(
            *(pool.submit(*job) for job in ((send, stream), (check, sock), (send, sock), (check, stream)))
        )
        sock.sendall(bytes(100))
        data, _, flags, _ = stream.recvmsg(10)
        assert (len(data), flags & socket.MSG_TRUNC) == (10, socket.MSG_TRUNC)
        with pytest.raises(OSError, match="a message of 262145 bytes, limit") as error:
            stream.send(bytes((256 << 10) + 1))
        assert error.value.errno == errno.EMSGSIZE
        sock.shutdown(socket.SHUT_WR)
        assert stream.recv(10) == b""


def wait_for(vsock: Vsock, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    poll = selectors.DefaultSelector()
    with poll:
        poll.register(vsock, selectors.EVENT_READ)
        while not ready():
            assert time.monotonic() < deadline, "nothing happens"
            poll.select(0.05)
            vsock.step()
