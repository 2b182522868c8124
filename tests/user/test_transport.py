# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The session on real sockets: fragments, descriptors, peers that vanish or never read."""

from __future__ import annotations

import array
import fcntl
import os
import resource
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import fds as holdings
from user.wire import SAMPLES, descriptors, is_open
from vhost.errors import (
    Disconnected,
    IncorrectFds,
    InvalidMessage,
    OversizedMessage,
    PartialMessage,
    ProtocolError,
    ReplyTimeout,
    RequestFailed,
)
from vhost.features import ProtocolF
from vhost.user import payloads as p
from vhost.user.messages import FRONTEND, FrontendMsg, frame
from vhost.user.session import Session
from vhost.user.spec import Message, Outgoing, Role
from vhost.user.state_channel import adopt
from vhost.user.transport import MAX_PENDING, Transport, readable, socket_of

F = FrontendMsg
ENABLE = frame(F.SET_VRING_ENABLE, p.VringState(0, 1).pack(), need_reply=True)


@contextmanager
def peers() -> Iterator[tuple[Transport, Transport]]:
    """A front-end and a back-end."""
    one, other = socket.socketpair()
    with Transport(one, Session(Role.FRONTEND)) as front, Transport(other, Session(Role.BACKEND)) as back:
        yield front, back


@contextmanager
def raw() -> Iterator[tuple[socket.socket, Transport]]:
    """A socket to misuse, and a back-end."""
    one, other = socket.socketpair()
    with one, Transport(other, Session(Role.BACKEND)) as back:
        yield one, back


def send_fds(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    """Send, and close what was sent."""
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
    for fd in fds:
        os.close(fd)


def expect(transport: Transport) -> Message:
    """The next message, which must be here or on its way."""
    deadline = time.monotonic() + 10
    while (message := transport.receive()) is None:
        assert select.select([transport], [], [], max(0, deadline - time.monotonic()))[0], "no message came"
    return message


@contextmanager
def answering(back: Transport, answer: Callable[[Message], None], count: int) -> Iterator[None]:
    """A thread that gives ``count`` messages to ``answer``."""

    def run() -> None:
        for _ in range(count):
            answer(expect(back))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()


# -- receiving ---------------------------------------------------------------------------------------


def test_nothing_there_is_none(no_leaks: None) -> None:
    with raw() as (_, back):
        assert back.receive() is None


def test_byte_by_byte_never_blocks(no_leaks: None) -> None:
    with raw() as (sock, back):
        for byte in ENABLE[:-1]:
            sock.send(bytes([byte]))
            assert back.receive() is None
        sock.send(ENABLE[-1:])
        assert expect(back).payload == p.VringState(0, 1)


def test_descriptors_stay_with_their_message(no_leaks: None) -> None:
    """Three messages are in the socket before the first is read; the second alone has descriptors."""
    with raw() as (sock, back), descriptors(2) as fds:
        sock.send(frame(F.SET_OWNER))
        send_fds(sock, frame(F.SET_MEM_TABLE, SAMPLES[p.MemTable].pack()), fds)
        sock.send(frame(F.GET_FEATURES))
        owner, table, features = expect(back), expect(back), expect(back)
        assert (owner.fds, features.fds) == ([], [])
        assert len(table.fds) == 2
        assert all(os.readlink(f"/proc/self/fd/{fd}") == "/dev/null" for fd in table.fds)
        table.close()


def test_received_descriptors_are_close_on_exec(no_leaks: None) -> None:
    with raw() as (sock, back), descriptors(1) as fds:
        send_fds(sock, frame(F.SET_VRING_KICK, p.VringFd(0).pack()), fds)
        message = expect(back)
        assert not os.get_inheritable(message.fds[0])
        message.close()


def test_descriptors_with_the_payload_are_found_too(no_leaks: None) -> None:
    data = frame(F.SET_VRING_KICK, p.VringFd(0).pack())
    with raw() as (sock, back), descriptors(1) as fds:
        sock.send(data[:12])
        assert back.receive() is None
        send_fds(sock, data[12:], fds)
        message = expect(back)
        assert len(message.fds) == 1
        message.close()


@pytest.mark.parametrize("cut", range(len(ENABLE) + 1))
def test_peer_that_vanishes_after_every_byte(cut: int, no_leaks: None) -> None:
    with raw() as (sock, back):
        if cut:
            sock.send(ENABLE[:cut])
        sock.close()
        if cut == len(ENABLE):
            assert expect(back).name == "SET_VRING_ENABLE"
        with pytest.raises(ProtocolError) as caught:
            back.receive()
        assert type(caught.value) is (Disconnected if cut in (0, len(ENABLE)) else PartialMessage)


def test_reset_connection_is_a_disconnection(no_leaks: None) -> None:
    """A Unix socket that is closed with unread data resets the other end."""
    with peers() as (front, back):
        back.send(None)
        front.send(front.session.request(F.SET_OWNER))
        back.close()
        with pytest.raises(Disconnected, match="reset"):
            front.receive()


def test_sending_to_nobody_is_a_disconnection(no_leaks: None) -> None:
    with peers() as (front, back):
        back.close()
        with pytest.raises(Disconnected, match="connection lost"):
            front.send(front.session.request(F.SET_OWNER))


def test_too_many_descriptors_for_the_process_are_an_error_of_this_session(no_leaks: None) -> None:
    """RLIMIT_NOFILE truncates the ancillary data (MSG_CTRUNC); what did arrive is closed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with raw() as (sock, back), descriptors(20) as fds:
        send_fds(sock, frame(F.SET_MEM_TABLE, SAMPLES[p.MemTable].pack()), fds)
        taken = holdings.open_fds()
        free = [number for number in range(max(taken) + 10) if number not in taken]
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[5], hard))  # room for five
        try:
            with pytest.raises(IncorrectFds, match="truncated"):
                back.receive()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_as_many_descriptors_as_linux_lets_through_are_not_taken(no_leaks: None) -> None:
    with raw() as (sock, back):
        with descriptors(253) as fds:
            send_fds(sock, frame(F.SET_OWNER), fds)
        with pytest.raises(IncorrectFds, match="truncated") as caught:
            back.receive()
        assert caught.value.message is None


def test_as_many_descriptors_as_any_message_has_are_closed(no_leaks: None) -> None:
    with raw() as (sock, back):
        with descriptors(32) as fds:
            send_fds(sock, frame(F.SET_OWNER), fds)
        with pytest.raises(IncorrectFds, match="SET_OWNER: 32 file descriptors, must be 0") as caught:
            back.receive()
        assert caught.value.message is not None
        sock.send(frame(F.SET_OWNER))
        assert expect(back).name == "SET_OWNER"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (frame(F.SET_OWNER, version=0), InvalidMessage),
        (frame(F.GET_FEATURES, reply=True), InvalidMessage),
        (frame(F.SET_MEM_TABLE, size=0xFFFFFFFF), OversizedMessage),
    ],
)
def test_hostile_header_with_descriptors(data: bytes, kind: type[ProtocolError], no_leaks: None) -> None:
    with raw() as (sock, back), descriptors(8) as fds:
        send_fds(sock, data, fds)
        with pytest.raises(kind):
            back.receive()


def test_descriptors_that_nobody_reads_go_with_the_socket(no_leaks: None) -> None:
    with raw() as (sock, back), descriptors(2) as fds:
        send_fds(sock, frame(F.SET_MEM_TABLE, SAMPLES[p.MemTable].pack())[:20], fds)
        assert back.receive() is None
        with descriptors(1) as more:
            send_fds(sock, b"x", more)


def test_closed_transport_says_so(no_leaks: None) -> None:
    with raw() as (_, back):
        back.close()
        back.close()
        assert back.fileno() == -1
        with pytest.raises(ProtocolError, match="Bad file descriptor"):
            back.receive()


def test_only_unix_streams(no_leaks: None) -> None:
    with socket.socket(socket.AF_INET) as sock, pytest.raises(ValueError, match="Unix stream socket"):
        Transport(sock, Session(Role.BACKEND))
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, other, pytest.raises(ValueError, match="Unix stream socket"):
        Transport(one, Session(Role.BACKEND))


# -- sending -----------------------------------------------------------------------------------------


def fill(sock: socket.socket) -> int:
    """Write until the socket takes no more."""
    total = 0
    while True:
        try:
            total += sock.send(bytes(1 << 16), socket.MSG_DONTWAIT)
        except BlockingIOError:
            break
    return total


def drain(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        data += sock.recv(min(1 << 16, count - len(data)))
    return data


def test_peer_that_never_reads_is_given_up(no_leaks: None) -> None:
    with raw() as (sock, back):
        sock.setblocking(False)
        sent = 0
        with pytest.raises(ProtocolError, match=f"SET_OWNER: peer does not read: .* limit {MAX_PENDING}"):
            for _ in range(10_000_000):
                try:
                    sock.send(frame(F.SET_OWNER, need_reply=True))
                except BlockingIOError:
                    pytest.fail("the back-end stopped to read")
                back.send(back.session.ack(expect(back)))
                sent += 1
        assert MAX_PENDING - 20 < back.pending <= MAX_PENDING
        assert sent > MAX_PENDING / 20


def test_what_does_not_fit_is_sent_later_with_its_descriptors(no_leaks: None) -> None:
    one, other = socket.socketpair()
    with one, Transport(other, Session(Role.FRONTEND)) as front:
        stuffing = fill(other)
        with descriptors(1) as fds:
            kick = front.session.request(F.SET_VRING_KICK, p.VringFd(3), fds)
            front.send(kick)
            front.send(front.session.request(F.SET_OWNER))
            os.close(fds[0])  # the caller may do so at once
        assert front.pending == len(kick.data) + 12
        assert not front.flush()
        drain(one, stuffing)
        assert front.flush()
        assert front.pending == 0
        data, ancillary, _, _ = one.recvmsg(100, 100)
        assert data.startswith(kick.data)
        received = array.array("i", ancillary[0][2]).tolist()
        assert len(received) == 1
        assert is_open(received[0])
        os.close(received[0])


def test_partial_send_continues_where_it_stopped(no_leaks: None) -> None:
    """A payload larger than the room that is left: the socket takes a part of it or nothing."""
    one, other = socket.socketpair()
    other.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    with one, Transport(other, Session(Role.FRONTEND)) as front:
        front.session.protocol_features = ProtocolF.CONFIG
        expected = b""
        number = 0
        while not front.pending:
            payload = bytes([number % 256]) * 4096
            outgoing = front.session.request(F.SET_CONFIG, p.Config(0, 4096, 0, payload))
            front.send(outgoing)
            expected += outgoing.data
            number += 1
        received = b""
        while len(received) < len(expected):
            received += one.recv(1000)
            front.flush()
        assert received == expected
        assert front.flush()


def test_descriptors_go_once_with_the_first_part(no_leaks: None) -> None:
    one, other = socket.socketpair()
    other.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    with one, Transport(other, Session(Role.FRONTEND)) as front, descriptors(1) as fds:
        # Longer than any real message with descriptors, so that the socket has to split it.
        outgoing = Outgoing(bytes(20_000), tuple(fds), False, FRONTEND[F.SET_MEM_TABLE])
        front.send(outgoing)
        os.close(fds[0])
        assert 0 < front.pending < 20_000
        received: list[int] = []
        count = 0
        while count < 20_000:
            data, ancillary, _, _ = one.recvmsg(1000, 100)
            count += len(data)
            for _level, _kind, numbers in ancillary:
                received += array.array("i", numbers).tolist()
            front.flush()
        assert len(received) == 1
        os.close(received[0])


def test_queued_descriptors_are_closed_with_the_transport(no_leaks: None) -> None:
    one, other = socket.socketpair()
    with one, Transport(other, Session(Role.FRONTEND)) as front, descriptors(1) as fds:
        fill(other)
        front.send(front.session.request(F.SET_VRING_KICK, p.VringFd(3), fds))
        os.close(fds[0])
        assert front.pending


def test_descriptor_that_is_not_open_cannot_be_sent(no_leaks: None) -> None:
    with peers() as (front, back):
        with descriptors(1) as fds:
            os.close(fds[0])
        with pytest.raises(ProtocolError, match="Bad file descriptor"):
            front.send(front.session.request(F.SET_VRING_KICK, p.VringFd(3), fds))
        assert back.receive() is None


# -- call --------------------------------------------------------------------------------------------


def test_call_returns_the_reply(no_leaks: None) -> None:
    with peers() as (front, back):

        def answer(message: Message) -> None:
            back.send(back.session.reply(message, p.U64(42)))

        with answering(back, answer, 3):
            for _ in range(3):
                reply = front.call(front.session.request(F.GET_FEATURES), 10)
                assert reply is not None
                assert reply.payload == p.U64(42)


def test_call_returns_at_once_without_a_reply(no_leaks: None) -> None:
    with peers() as (front, back):
        assert front.call(front.session.request(F.SET_OWNER), 10) is None
        assert expect(back).name == "SET_OWNER"


def test_call_raises_on_a_nack(no_leaks: None) -> None:
    with peers() as (front, back):
        front.session.protocol_features = ProtocolF.REPLY_ACK
        with (
            answering(back, lambda message: back.send(back.session.ack(message, 22)), 1),
            pytest.raises(RequestFailed, match=r"SET_VRING_NUM: .* status 0x16") as caught,
        ):
            front.call(front.session.request(F.SET_VRING_NUM, p.VringState(9, 1)), 10)
        assert caught.value.status == 22
        assert caught.value.message is not None, "the session goes on"
        with answering(back, lambda message: back.send(back.session.ack(message, 0)), 1):
            ack = front.call(front.session.request(F.SET_OWNER), 10)
        assert ack is not None
        assert ack.is_ack


def test_nack_of_an_earlier_request_is_not_lost(no_leaks: None) -> None:
    with peers() as (front, back):
        front.session.protocol_features = ProtocolF.REPLY_ACK
        statuses = iter([0, 5, 6])
        with answering(back, lambda message: back.send(back.session.ack(message, next(statuses))), 3):
            front.send(front.session.request(F.SET_OWNER))
            front.send(front.session.request(F.SET_VRING_NUM, p.VringState(0, 3)))
            with pytest.raises(RequestFailed, match=r"SET_VRING_NUM: .* status 0x5"):
                front.call(front.session.request(F.SET_FEATURES, p.U64(0)), 10)
        assert front.session.outstanding == 0


def test_reply_brings_a_descriptor(no_leaks: None) -> None:
    one, other = socket.socketpair()
    features = ProtocolF.INFLIGHT_SHMFD
    with (
        Transport(one, Session(Role.FRONTEND)) as front,
        Transport(other, Session(Role.BACKEND, serves=[F.GET_INFLIGHT_FD])) as back,
        descriptors(1) as fds,
    ):
        front.session.protocol_features = back.session.protocol_features = features

        def answer(message: Message) -> None:
            back.send(back.session.reply(message, p.Inflight(4096, 0, 1, 128), fds))
            os.close(fds[0])

        with answering(back, answer, 1):
            reply = front.call(front.session.request(F.GET_INFLIGHT_FD, p.Inflight(0, 0, 1, 128)), 10)
        assert reply is not None
        fd = reply.take_fd()
        assert fd is not None
        os.close(fd)


def test_descriptor_of_a_reply_that_nobody_waits_for_is_closed(no_leaks: None) -> None:
    one, other = socket.socketpair()
    with (
        Transport(one, Session(Role.FRONTEND)) as front,
        Transport(other, Session(Role.BACKEND, serves=[F.GET_FEATURES, F.GET_INFLIGHT_FD])) as back,
        descriptors(1) as fds,
    ):
        front.session.protocol_features = back.session.protocol_features = ProtocolF.INFLIGHT_SHMFD

        def answer(message: Message) -> None:
            if message.id == F.GET_FEATURES:
                back.send(back.session.reply(message, p.U64(7)))
            else:
                back.send(back.session.reply(message, p.Inflight(4096, 0, 1, 128), fds))
                os.close(fds[0])

        with answering(back, answer, 2):
            front.send(front.session.request(F.GET_INFLIGHT_FD, p.Inflight(0, 0, 1, 128)))
            reply = front.call(front.session.request(F.GET_FEATURES), 10)
        assert reply is not None
        assert reply.payload == p.U64(7)


def test_late_reply_is_not_taken_for_the_next(no_leaks: None) -> None:
    with peers() as (front, back):
        with pytest.raises(ReplyTimeout, match=r"GET_FEATURES: no reply within 0\.01 s"):
            front.call(front.session.request(F.GET_FEATURES), 0.01)
        values = iter([1, 2])
        with answering(back, lambda m: back.send(back.session.reply(m, p.U64(next(values)))), 2):
            reply = front.call(front.session.request(F.GET_FEATURES), 10)
        assert reply is not None
        assert reply.payload == p.U64(2)


def test_timeout_is_also_an_ordinary_one(no_leaks: None) -> None:
    with peers() as (front, _), pytest.raises(TimeoutError):
        front.call(front.session.request(F.GET_FEATURES), 0)


def test_call_times_out_when_nothing_can_be_sent(no_leaks: None) -> None:
    one, other = socket.socketpair()
    with one, Transport(other, Session(Role.FRONTEND)) as front:
        fill(other)
        with pytest.raises(ReplyTimeout, match="GET_FEATURES: could not be sent within"):
            front.call(front.session.request(F.GET_FEATURES), 0.01)


def test_peer_that_dies_before_the_reply(no_leaks: None) -> None:
    with (
        peers() as (front, back),
        answering(back, lambda message: back.close(), 1),
        pytest.raises(Disconnected, match="GET_FEATURES: connection closed by the peer before the reply"),
    ):
        front.call(front.session.request(F.GET_FEATURES), 10)


def test_signals_do_not_disturb_a_call(no_leaks: None) -> None:
    """EINTR: the wait goes on when a handler returns."""
    caught: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: caught.append(number))
    try:
        with peers() as (front, back):

            def answer(message: Message) -> None:
                deadline = time.monotonic() + 10
                while len(caught) < 3 and time.monotonic() < deadline:
                    os.sched_yield()
                back.send(back.session.reply(message, p.U64(1)))

            with answering(back, answer, 1):
                signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
                reply = front.call(front.session.request(F.GET_FEATURES), 20)
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert reply is not None
    assert len(caught) >= 3


def test_a_thousand_connections_leave_nothing(no_leaks: None) -> None:
    for number in range(1000):
        with raw() as (sock, back), descriptors(2) as fds:
            data = frame(F.SET_MEM_TABLE, SAMPLES[p.MemTable].pack())
            send_fds(sock, data[: number % len(data) + 1], fds)
            sock.close()
            try:
                while (message := back.receive()) is not None:
                    message.close()
            except ProtocolError as error:
                assert isinstance(error, (Disconnected, PartialMessage))


# -- descriptors of a peer -----------------------------------------------------------------------------


def test_descriptors_with_high_numbers_are_looked_at() -> None:
    """select() is for those below 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    ours, theirs = socket.socketpair()
    high = fcntl.fcntl(theirs, fcntl.F_DUPFD_CLOEXEC, 1500)
    try:
        with ours, theirs:
            assert not readable(high)
            ours.send(b"x")
            assert readable(high)
    finally:
        os.close(high)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_is_no_socket_is_closed() -> None:
    for fd in (os.open("/dev/null", os.O_RDWR), os.eventfd(0)):
        with pytest.raises(IncorrectFds, match="SET_BACKEND_REQ_FD: the descriptor is no socket"):
            socket_of(fd, request="SET_BACKEND_REQ_FD")
        assert not is_open(fd)


def test_a_socket_that_has_no_name() -> None:
    """Python asks for it, and gives up."""
    try:
        strange = socket.socket(44, socket.SOCK_RAW)  # AF_XDP
    except OSError as error:
        pytest.skip(f"AF_XDP sockets need privileges: {error.strerror}")
    with strange:
        before = holdings.open_fds()
        with pytest.raises(IncorrectFds, match="no socket that can be used"):
            socket_of(os.dup(strange.fileno()))
        assert adopt(strange.fileno(), writes=True) is None
        assert holdings.open_fds().keys() == before.keys()
