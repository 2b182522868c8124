# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The proxy on real sockets: what comes out is what went in, whatever that is, and nothing stays behind.

Single-threaded: the test is both sides, and has the proxy do all that there is to do in between.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import random
import resource
import select
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from vhost.errors import VhostError
from vhost.trace.descriptors import describe
from vhost.trace.proxy import MAX_CHANNELS, Proxy
from vhost.trace.records import KEPT, FdInfo, Happening, Record
from vhost.trace.relay import SCM_MAX_FD
from vhost.trace.tracer import Tracer
from vhost.user.messages import BackendMsg, FrontendMsg, frame
from vhost.user.spec import HEADER, Channel, Role

pytestmark = pytest.mark.usefixtures("no_leaks")

ANCILLARY = socket.CMSG_SPACE(SCM_MAX_FD * 4)
KICK = frame(FrontendMsg.SET_VRING_KICK, bytes(8))
SET_REQ = frame(FrontendMsg.SET_BACKEND_REQ_FD)


class Between:
    """A proxy, and a listening socket behind it."""

    def __init__(self, folder: Path, **options: bool) -> None:
        self.records: list[Record] = []
        self.path, self.behind = folder / "a", folder / "b"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.behind))
        self.listener.listen()
        self.proxy = Proxy(self.path, self.behind, self.records.append, **options)
        self._sockets = contextlib.ExitStack()

    def settle(self) -> None:
        """Until the proxy has nothing more to do."""
        while not self.proxy.closed and select.select([self.proxy], [], [], 0)[0]:
            self.proxy.step()

    def session(self) -> tuple[socket.socket, socket.socket]:
        """A front-end's and a back-end's socket with the proxy in between."""
        front = self._sockets.enter_context(socket.socket(socket.AF_UNIX))
        front.connect(str(self.path))
        self.settle()
        back = self._sockets.enter_context(self.listener.accept()[0])
        for sock in (front, back):
            sock.setblocking(False)
        return front, back

    def own(self, sock: socket.socket) -> socket.socket:
        return self._sockets.enter_context(sock)

    def texts(self) -> list[str]:
        tracer = Tracer()
        return [event.text for record in self.records for event in tracer.feed(record)]

    def close(self) -> None:
        self._sockets.close()
        self.settle()
        self.proxy.close()
        self.listener.close()


@pytest.fixture
def between(tmp_path: Path) -> Iterator[Between]:
    one = Between(tmp_path)
    yield one
    one.close()


def send(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """All of it at once."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    assert sock.sendmsg([data], ancillary) == len(data)


def receive(sock: socket.socket, size: int = 1 << 16) -> tuple[bytes, list[int]]:
    data, ancillary, flags, _ = sock.recvmsg(size, ANCILLARY, socket.MSG_CMSG_CLOEXEC)
    assert not flags & socket.MSG_CTRUNC
    fds = array.array("i")
    for _, _, more in ancillary:
        fds.frombytes(more)
    return data, fds.tolist()


@contextlib.contextmanager
def files(count: int) -> Iterator[list[int]]:
    """Memfds of 1, 2, 3 ... bytes, so that each is told from the others."""
    made = []
    for number in range(count):
        fd = os.memfd_create(f"file{number}")
        os.truncate(fd, number + 1)
        made.append(fd)
    yield made
    for fd in made:
        os.close(fd)


def sizes(fds: Sequence[int]) -> list[int]:
    """Tells them apart, and closes them."""
    found = []
    for fd in fds:
        found.append(os.fstat(fd).st_size)
        os.close(fd)
    return found


@contextlib.contextmanager
def room_for(count: int) -> Iterator[None]:
    """The process can open so many more descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    with contextlib.ExitStack() as stack:
        while (fd := os.open("/dev/null", os.O_RDONLY)) <= highest:
            stack.callback(os.close, fd)
        os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + count, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def nothing(sock: socket.socket) -> bool:
    with contextlib.suppress(BlockingIOError):
        sock.recv(1, socket.MSG_PEEK)
        return False
    return True


def test_a_message_arrives_in_one_piece_with_its_descriptors(between: Between) -> None:
    front, back = between.session()
    owner = frame(FrontendMsg.SET_OWNER)
    with files(2) as fds:
        send(front, KICK, fds)
        send(front, owner)
        send(front, KICK, fds[1:])
    between.settle()
    for message, expected in ((KICK, [1, 2]), (owner, []), (KICK, [2])):
        data, got = receive(back, len(message))
        assert (data, sizes(got)) == (message, expected)
    assert [(record.data, len(record.fds)) for record in between.records[1:]] == [
        (KICK, 2),
        (owner, 0),
        (KICK, 1),
    ]


def test_descriptors_stay_with_the_first_of_many(between: Between) -> None:
    """Three messages in one write: the kernel sends the descriptors with the first byte."""
    front, back = between.session()
    with files(3) as fds:
        send(front, KICK * 3, fds)
    between.settle()
    data, got = receive(back)
    assert (data, sizes(got)) == (KICK, [1, 2, 3])
    assert receive(back) == (KICK * 2, [])


def test_byte_by_byte(between: Between) -> None:
    front, back = between.session()
    with files(2) as fds:
        for at in range(len(KICK)):
            send(front, KICK[at : at + 1], fds[:1] if at == 3 else fds[1:] if at == 15 else ())
            between.settle()
            if at < 11:
                assert nothing(back), "a header is not sent in parts"
    data, got = receive(back)
    assert (data, sizes(got)) == (KICK[:12], [1])
    # A read may go on over the bytes in between, but not over those that have descriptors.
    data, got = receive(back)
    assert (data, sizes(got)) == (KICK[12:16], [2])
    assert receive(back) == (KICK[16:], [])


def test_a_payload_that_comes_later_does_not_keep_its_header(between: Between) -> None:
    front, back = between.session()
    send(front, KICK[:12])
    between.settle()
    assert receive(back)[0] == KICK[:12]
    send(front, KICK[12:])
    between.settle()
    assert receive(back)[0] == KICK[12:]


def test_any_bytes_both_ways(between: Between) -> None:
    front, back = between.session()
    source = random.Random(1)
    for sender, receiver in ((front, back), (back, front)):
        data = source.randbytes(1 << 20)
        arrived = b""
        sent = 0
        while len(arrived) < len(data) - 11:
            with contextlib.suppress(BlockingIOError):
                sent += sender.send(data[sent : sent + source.randrange(1, 5000)])
            between.settle()
            with contextlib.suppress(BlockingIOError):
                arrived += receiver.recv(1 << 16)
        sender.shutdown(socket.SHUT_WR)
        between.settle()
        with contextlib.suppress(BlockingIOError):
            arrived += receiver.recv(1 << 16)  # what looked like the beginning of a header
        assert arrived == data
    text = "\n".join(between.texts())
    assert "front-end closed" in text
    assert "back-end closed" in text


def test_four_gigabytes_announced(between: Between) -> None:
    """Passed on as they come, 64 KiB in memory, not in the records, and shown as what they are."""
    front, back = between.session()
    header = HEADER.pack(FrontendMsg.SET_MEM_TABLE, 1, (1 << 32) - 1)
    send(front, header)
    total = 0
    for _ in range(64):
        send(front, bytes(1 << 16))
        between.settle()
        with contextlib.suppress(BlockingIOError):
            while data := back.recv(1 << 20):
                total += len(data)
    assert total == 12 + (64 << 16)
    assert sum(len(record.data) for record in between.records) == 12 + KEPT
    front.close()
    between.settle()
    assert not back.recv(1)
    assert "SET_MEM_TABLE: 4294967295 bytes of payload announced, passed on as they come" in between.texts()


def test_one_side_does_not_read(between: Between) -> None:
    """It holds up the other's writes, as without a proxy, and nothing else."""
    front, back = between.session()
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += front.send(frame(FrontendMsg.SET_MEM_TABLE, bytes(4084)))
            between.settle()
    assert sent < 4 << 20, "it does not buffer without end"
    for number in range(100):
        send(back, frame(FrontendMsg.GET_FEATURES, bytes([number]) * 8, reply=True))
        between.settle()
        assert receive(front)[0][12:] == bytes([number]) * 8
    got = 0
    while got < sent:
        got += len(back.recv(1 << 20))
        between.settle()
    send(front, KICK)
    between.settle()
    assert receive(back)[0] == KICK


def test_half_close(between: Between) -> None:
    front, back = between.session()
    send(front, KICK)
    front.shutdown(socket.SHUT_WR)
    between.settle()
    assert receive(back)[0] == KICK
    assert back.recv(1) == b""
    send(back, KICK)
    between.settle()
    assert receive(front)[0] == KICK
    assert nothing(front)
    back.close()
    between.settle()
    assert front.recv(1) == b""
    assert between.records[-1].happening is Happening.CLOSE


@pytest.mark.parametrize("which", [0, 1], ids=["front", "back"])
def test_a_side_dies(between: Between, which: int) -> None:
    """What it had sent arrives, then its end; what was on the way to it is shown as not delivered."""
    sockets = between.session()
    dead, other = sockets[which], sockets[1 - which]
    send(dead, KICK)
    send(other, frame(FrontendMsg.SET_OWNER))
    dead.close()
    between.settle()
    assert receive(other)[0] == KICK
    assert other.recv(1) == b""
    with pytest.raises(BrokenPipeError):
        other.send(b"x")
    assert between.records[-1].happening is Happening.CLOSE
    lost = [record for record in between.records if record.data == frame(FrontendMsg.SET_OWNER)]
    remarks = [record.text for record in between.records if record.happening is Happening.REMARK]
    assert any(not record.delivered for record in lost) or any("not passed on" in text for text in remarks)


def test_inside_a_message(between: Between) -> None:
    front, back = between.session()
    with files(1) as fds:
        send(front, KICK[:5], fds)
    front.close()
    between.settle()
    data, got = receive(back)
    assert (data, sizes(got)) == (KICK[:5], [1])
    assert back.recv(1) == b""
    tracer = Tracer()
    found = [
        finding for record in between.records for event in tracer.feed(record) for finding in event.findings
    ]
    assert [finding.rule.name for finding in found] == ["cut-off"]


def test_nobody_behind(between: Between) -> None:
    between.listener.close()
    with socket.socket(socket.AF_UNIX) as front:
        front.connect(str(between.path))
        between.settle()
        assert front.recv(1) == b""
    assert "Connection refused" in between.records[-1].text


def test_a_full_backlog_is_waited_for(tmp_path: Path) -> None:
    between = Between(tmp_path)
    between.listener.listen(0)
    sockets = []
    for _ in range(4):
        sockets.append(socket.socket(socket.AF_UNIX))
        sockets[-1].connect(str(between.path))
        between.settle()
    assert between.proxy.timeout is not None
    sockets.pop().close()  # one does not wait
    accepted = []
    while len(accepted) < 3:
        accepted.append(between.listener.accept()[0])
        while len(accepted) < 3 and not select.select([between.listener], [], [], 0)[0]:
            between.proxy.step(between.proxy.timeout)
    for number, (front, back) in enumerate(zip(sockets, accepted, strict=True)):
        send(front, frame(FrontendMsg.SET_VRING_NUM, bytes([number]) * 8))
        between.settle()
        assert receive(back)[0][-1] == number
    for sock in sockets + accepted:
        sock.close()
    between.close()


def test_many_sessions_at_the_same_time_and_after_each_other(between: Between) -> None:
    for _ in range(3):
        pairs = [between.session() for _ in range(50)]
        for number, (front, back) in enumerate(pairs):
            send(front, frame(FrontendMsg.SET_VRING_NUM, bytes([number]) * 8))
            send(back, frame(FrontendMsg.GET_FEATURES, bytes([number]) * 8))
        between.settle()
        for number, (front, back) in enumerate(pairs):
            assert receive(front)[0][-1] == receive(back)[0][-1] == number
            front.close()
            back.close()
        between.settle()
    assert between.proxy.sessions == 150
    assert {record.session for record in between.records} == set(range(1, 151))


def test_once(tmp_path: Path) -> None:
    between = Between(tmp_path, once=True)
    front, back = between.session()
    with socket.socket(socket.AF_UNIX) as second:
        second.connect(str(between.path))
        between.settle()
        assert between.proxy.sessions == 1
        front.close()
        back.close()
        between.settle()
    assert between.proxy.closed
    assert not between.path.exists()
    between.close()


def test_reverse(tmp_path: Path) -> None:
    """Who comes is the back-end."""
    between = Between(tmp_path, reverse=True)
    came, behind = between.session()
    send(came, frame(FrontendMsg.GET_FEATURES, bytes(8), reply=True))
    send(behind, frame(FrontendMsg.GET_FEATURES))
    between.settle()
    senders = {record.data[4] & 4: record.sender for record in between.records if record.data}
    assert senders == {4: Role.BACKEND, 0: Role.FRONTEND}
    between.close()


def test_channel_of_the_backend(between: Between) -> None:
    """Both ways, descriptors too, and each end when it comes."""
    front, back = between.session()
    ours, theirs = socket.socketpair()
    between.own(ours)
    send(front, SET_REQ, [theirs.fileno()])
    theirs.close()
    between.settle()
    data, (fd,) = receive(back)
    assert data == SET_REQ
    channel = between.own(socket.socket(fileno=fd))
    request = frame(BackendMsg.BACKEND_SHMEM_MAP, bytes(40))
    with files(3) as fds:
        send(channel, request, fds)
        between.settle()
        data, got = receive(ours)
        assert (data, sizes(got)) == (request, [1, 2, 3])
        send(ours, frame(BackendMsg.BACKEND_SHMEM_MAP, bytes(8), reply=True), fds[:1])
        between.settle()
        data, got = receive(channel)
        assert sizes(got) == [1]
    front.close()
    between.settle()
    assert back.recv(1) == b""
    send(channel, request)
    between.settle()
    assert receive(ours)[0] == request, "the channel lives as long as both want it"
    ours.close()
    between.settle()
    assert channel.recv(1) == b""
    assert {record.channel for record in between.records} == {0, 1}
    opened = [record.text for record in between.records if record.happening is Happening.OPEN]
    assert opened == [Channel.MAIN.value, Channel.BACKEND_REQ.value]


def test_gpu_socket(between: Between) -> None:
    front, back = between.session()
    ours, theirs = socket.socketpair()
    between.own(ours)
    send(front, frame(FrontendMsg.GPU_SET_SOCKET), [theirs.fileno()])
    theirs.close()
    between.settle()
    _, (fd,) = receive(back)
    gpu = between.own(socket.socket(fileno=fd))
    pixels = HEADER.pack(8, 0, 200_000) + bytes(200_000)
    sent = 0
    got = b""
    while len(got) < len(pixels):
        with contextlib.suppress(BlockingIOError):
            sent += gpu.send(pixels[sent : sent + 50_000], socket.MSG_DONTWAIT)
        between.settle()
        with contextlib.suppress(BlockingIOError):
            got += ours.recv(1 << 20, socket.MSG_DONTWAIT)
    assert got == pixels


@pytest.mark.parametrize("count", [0, 1, 2])
def test_what_is_no_channel_is_passed_on_as_it_is(between: Between, count: int) -> None:
    """No socket, or not one of them."""
    front, back = between.session()
    with files(count) as fds:
        send(front, SET_REQ, fds)
        between.settle()
        data, got = receive(back)
        assert (data, sizes(got)) == (SET_REQ, list(range(1, count + 1)))
    datagram = between.own(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    send(front, SET_REQ, [datagram.fileno()])
    between.settle()
    data, (fd,) = receive(back)
    assert os.fstat(fd).st_ino == os.fstat(datagram.fileno()).st_ino
    os.close(fd)


def test_channels_without_end(between: Between) -> None:
    """More than a session can have use for are passed on, and said to be unseen."""
    front, back = between.session()
    ours, theirs = socket.socketpair()
    between.own(ours)
    between.own(theirs)
    kept = []
    for _ in range(MAX_CHANNELS + 5):
        send(front, SET_REQ, [theirs.fileno()])
        between.settle()
        _, fds = receive(back)
        kept += fds
    mine = os.fstat(theirs.fileno()).st_ino
    unseen = [fd for fd in kept if os.fstat(fd).st_ino == mine]
    assert len(unseen) == 6
    assert sum("unseen" in record.text for record in between.records) == 6
    for fd in kept:
        os.close(fd)


def test_a_channel_keeps_its_flags(between: Between) -> None:
    """O_NONBLOCK belongs to the socket, whoever holds it."""
    front, back = between.session()
    ours, theirs = socket.socketpair()
    between.own(ours)
    send(front, SET_REQ, [theirs.fileno()])
    between.settle()
    _, (fd,) = receive(back)
    assert os.get_blocking(fd)
    assert os.get_blocking(theirs.fileno())
    os.close(fd)
    theirs.close()


def test_descriptors_without_end(between: Between) -> None:
    """The most that go with a byte, with each byte, behind a reader that does not read."""
    front, back = between.session()
    count = 0
    with files(1) as (fd,), contextlib.suppress(BlockingIOError):
        for _ in range(2000):
            send(front, b"\1", [fd] * SCM_MAX_FD)
            between.settle()
            count += 1
    assert len(os.listdir("/proc/self/fd")) < 4 * SCM_MAX_FD
    front.close()
    between.settle()
    arrived = got = 0
    while True:
        data, fds = receive(back)
        if not data:
            break
        arrived += len(data)
        got += len(fds)
        for one in fds:
            os.close(one)
        between.settle()
    assert (arrived, got) == (count, count * SCM_MAX_FD)


def test_no_room_for_descriptors(between: Between) -> None:
    """The sender's receiver learns that it is over: without them it must not get the message."""
    front, back = between.session()
    with files(20) as fds:
        send(front, KICK, fds)
        with room_for(5):
            between.settle()
    assert back.recv(100) == b""
    assert any("descriptors were lost" in record.text for record in between.records)
    assert not [record for record in between.records if record.data]


def test_more_descriptors_in_flight_than_the_kernel_lets_a_user_have(tmp_path: Path) -> None:
    """It does not say when there is room again; the message waits, and arrives whole."""
    if os.geteuid():
        pytest.skip("needs root, who is not limited, to be the sender")
    between = Between(tmp_path)
    front, back = between.session()
    back.setblocking(True)
    back.settimeout(20)
    ours, theirs = (between.own(sock) for sock in socket.socketpair())
    ours.settimeout(20)
    child = os.fork()
    if not child:
        try:
            wanted: list[bytes] = []
            between.proxy.add_reader(theirs.fileno(), lambda: wanted.append(theirs.recv(1)))
            resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
            os.setresuid(65534, 65534, 65534)
            while not wanted:
                between.proxy.step(between.proxy.timeout)
                if between.proxy.timeout is not None:
                    theirs.send(b"!")  # it has as many under way as it may
        finally:
            os._exit(1 if sys.exc_info()[0] else 0)
    count = 0
    with files(60) as fds, contextlib.suppress(BlockingIOError):
        while count < 20:
            send(front, KICK, fds)
            count += 1
    assert ours.recv(1) == b"!"
    arrived = b""
    got: list[int] = []
    while len(arrived) < count * len(KICK):
        data, more = receive(back)
        arrived += data
        got += sizes(more)
    assert arrived == KICK * count
    assert got == list(range(1, 61)) * count
    ours.send(b".")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    between.close()


@pytest.mark.parametrize("room", [0, 1])
def test_no_room_for_a_session(between: Between, room: int) -> None:
    front, back = between.session()
    with socket.socket(socket.AF_UNIX) as second:
        second.connect(str(between.path))
        with room_for(room):
            between.settle()
            send(front, KICK)
            between.settle()
            assert receive(back)[0] == KICK, "who is there goes on"
            assert between.proxy.timeout is not None
        while not select.select([between.listener], [], [], 0)[0]:
            between.proxy.step(between.proxy.timeout)
        third, _ = between.listener.accept()
        third.close()


def test_closing_ends_all(tmp_path: Path) -> None:
    between = Between(tmp_path)
    pairs = [between.session() for _ in range(3)]
    between.proxy.close()
    for pair in pairs:
        for sock in pair:
            assert sock.recv(1) == b""
    assert [record.happening for record in between.records[-3:]] == [Happening.CLOSE] * 3
    between.close()


def test_socket_in_use(between: Between, tmp_path: Path) -> None:
    with pytest.raises(OSError) as error:
        Proxy(between.path, between.behind, between.records.append)
    assert error.value.errno == errno.EADDRINUSE
    assert not isinstance(error.value, VhostError)


def test_descriptors_are_told_by_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    reader, writer = os.pipe()
    ours, theirs = socket.socketpair()
    made = [reader, writer]

    def info(fd: int) -> FdInfo:
        made.append(fd)
        return describe(fd)

    assert info(os.eventfd(0)) == FdInfo("eventfd")
    assert describe(reader) == FdInfo("pipe")
    assert describe(ours.fileno()) == FdInfo("socket")
    assert info(os.open("/dev/null", os.O_RDWR)) == FdInfo("device", "/dev/null")
    file = info(os.open(tmp_path / "file", os.O_RDONLY))
    assert (file.kind, file.size) == ("file", 5)
    assert file.name.startswith("/")
    memfd = os.memfd_create("ra\x1b[31m" + "m" * 100)
    os.truncate(memfd, 3 << 20)
    assert str(info(memfd)) == "memfd ra?[31m" + "m" * 73 + "... 3 MiB"
    assert info(os.open(tmp_path, os.O_RDONLY)).kind == "directory"
    for fd in made:
        os.close(fd)
    ours.close()
    theirs.close()
