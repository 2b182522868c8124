# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The vsock driver packet by packet, against packets written down from the specification (VIRTIO 5.10.6)."""

from __future__ import annotations

import errno
import select
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from drivers.vsock_peer import (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    HOST,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SEQPACKET,
    SHUTDOWN,
    STREAM,
    US,
    Ends,
    Packet,
)
from vhost.drivers import Vsock
from vhost.drivers.vsock_connection import VsockBroken, VsockRefused, VsockReset
from vhost.drivers.vsock_stream import Listener, Stream
from vhost.errors import Disconnected, InactiveFeature, QueueBroken, ReplyTimeout, VhostError
from vhost.features import VsockF
from vhost.virtio_vsock import VsockType

PORT, OURS = 1234, 5000
ROOM = 1000
"""The buffer that the driver has in these tests, for each connection."""
SEQ = int(VsockF.SEQPACKET | VsockF.STREAM | VsockF.NO_IMPLIED_STREAM)


@contextmanager
def driver(**more: Any) -> Iterator[tuple[Ends, Vsock]]:
    ends = {name: more.pop(name) for name in ("features", "packed", "queues", "event_idx") if name in more}
    with Ends(**ends) as ops, Vsock(ops, **{"buf_alloc": ROOM, "timeout": 0, **more}) as vsock:
        yield ops, vsock
    for one in (ops, vsock):
        one.__dict__.clear()  # pytest keeps a fixture's value beyond the look for leaks


@pytest.fixture(autouse=True)
def short_farewell(monkeypatch: pytest.MonkeyPatch) -> None:
    """This device does nothing by itself, so that waiting for it is in vain."""
    monkeypatch.setattr("vhost.drivers.vsock._FAREWELL", 0.01)


@pytest.fixture
def pair(no_leaks: None) -> Iterator[tuple[Ends, Vsock]]:
    with driver() as both:
        yield both


def here(op: int, data: bytes = b"", **more: Any) -> Packet:
    """What we expect of the driver."""
    return Packet(
        **{
            "src_cid": US,
            "dst_cid": HOST,
            "src_port": OURS,
            "dst_port": PORT,
            "len": len(data),
            "type": STREAM,
            "op": op,
            "flags": 0,
            "buf_alloc": ROOM,
            "fwd_cnt": 0,
            "data": data,
            **more,
        }
    )


def there(op: int, data: bytes = b"", **more: Any) -> Packet:
    """What we send to it."""
    peer = {"src_cid": HOST, "dst_cid": US, "src_port": PORT, "dst_port": OURS, "buf_alloc": 100}
    return here(op, data, **{**peer, **more})


def connected(ops: Ends, vsock: Vsock, **more: Any) -> Stream:
    stream = vsock.connect((HOST, PORT), port=OURS, **more)
    kind = {"type": int(stream.kind)}
    assert ops.sent() == [here(REQUEST, **kind)]
    ops.give(there(RESPONSE, **kind))
    vsock.step()
    assert stream.connected
    return stream


def received(ops: Ends, vsock: Vsock, *packets: Packet | bytes) -> list[Packet]:
    """The driver's answers."""
    ops.give(*packets)
    vsock.step()
    return ops.sent()


# ---------------------------------------------------------------------- bytes


def test_the_header_byte_by_byte(pair: tuple[Ends, Vsock]) -> None:
    ops, vsock = pair
    vsock.connect((HOST, 0x01020304), port=0x0A0B0C0D)
    (chain,) = ops.take_sent()
    assert chain.read() == bytes.fromhex(
        "2a00000000000000 0200000000000000"  # src_cid, dst_cid
        "0d0c0b0a 04030201 00000000"  # src_port, dst_port, len
        "0100 0100 00000000"  # type STREAM, op REQUEST, flags
        "e8030000 00000000"  # buf_alloc 1000, fwd_cnt
    )
    ops.queues[1].push(chain, 0)


def test_a_connection_from_beginning_to_end(pair: tuple[Ends, Vsock]) -> None:
    ops, vsock = pair
    stream = connected(ops, vsock)
    assert (stream.getsockname(), stream.getpeername()) == ((US, OURS), (HOST, PORT))
    assert stream.send(b"hello") == 5
    assert ops.sent() == [here(RW, b"hello")]
    assert received(ops, vsock, there(RW, b"world", fwd_cnt=5)) == []
    assert stream.recv(100) == b"world"
    with pytest.raises(BlockingIOError, match="vsock 42:5000 - 2:1234: recv"):
        stream.recv(100)
    stream.send(b"!")
    assert ops.sent() == [here(RW, b"!", fwd_cnt=5)]  # every packet says what was read
    stream.close()
    assert ops.sent() == [here(SHUTDOWN, flags=3, fwd_cnt=5)]
    assert received(ops, vsock, there(RST)) == []
    assert received(ops, vsock, there(RW, b"x")) == [here(RST, buf_alloc=0)]  # nobody's any more


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("event_idx", [False, True])
def test_rings_of_either_shape(packed: bool, event_idx: bool, no_leaks: None) -> None:
    with driver(packed=packed, event_idx=event_idx, queue_size=8, rx_buffers=4) as (ops, vsock):
        assert vsock.packed is packed
        stream = connected(ops, vsock)
        for turn in range(100):
            data = bytes([turn]) * 7
            fwd = {"fwd_cnt": turn * 7}
            assert stream.send(data) == 7
            assert ops.sent() == [here(RW, data, **fwd)]
            assert received(ops, vsock, there(RW, data, fwd_cnt=turn * 7 + 7)) == []
            assert stream.recv(7) == data
            ops.sent()  # credit updates


# ---------------------------------------------------------------------- connecting


def test_refused(pair: tuple[Ends, Vsock]) -> None:
    ops, vsock = pair
    stream = vsock.connect((HOST, PORT), port=OURS)
    assert not stream.connected and not stream.writable and not stream.readable
    with pytest.raises(BlockingIOError):
        stream.send(b"too early")
    ops.sent()
    assert received(ops, vsock, there(RST, buf_alloc=0)) == []
    assert stream.writable and stream.readable
    for call in (lambda: stream.send(b"x"), lambda: stream.recv(1)):
        with pytest.raises(VsockRefused, match="vsock 42:5000 - 2:1234: refused") as error:
            call()
        assert isinstance(error.value, ConnectionRefusedError) and isinstance(error.value, VhostError)
        assert error.value.errno == errno.ECONNREFUSED


@pytest.mark.parametrize("op", [REQUEST, RW, CREDIT_UPDATE, SHUTDOWN, 0, 99])
def test_an_answer_that_is_none(pair: tuple[Ends, Vsock], op: int) -> None:
    ops, vsock = pair
    stream = vsock.connect((HOST, PORT), port=OURS)
    ops.sent()
    assert received(ops, vsock, there(op)) == [here(RST)]
    with pytest.raises(VsockReset, match="while the connection was connecting"):
        stream.recv(1)


def test_nobody_answers(pair: tuple[Ends, Vsock]) -> None:
    ops, vsock = pair
    begun = time.monotonic()
    with pytest.raises(ReplyTimeout, match=r"vsock 42:5000 - 99:1234: no answer within 0\.05 s"):
        vsock.connect((99, PORT), 0.05, port=OURS)
    assert time.monotonic() - begun >= 0.05
    assert ops.sent() == [here(REQUEST, dst_cid=99)]
    # The answer that comes too late finds nobody.
    assert received(ops, vsock, there(RESPONSE, src_cid=99)) == [here(RST, dst_cid=99, buf_alloc=0)]


def test_addresses_that_cannot_be(pair: tuple[Ends, Vsock]) -> None:
    _, vsock = pair
    for address in ((1 << 32, 1), (-1, 1), (2, 1 << 32), (2, -1)):
        with pytest.raises(ValueError, match="32 bits"):
            vsock.connect(address)
    vsock.connect((HOST, PORT), port=OURS)
    with pytest.raises(OSError, match="port 5000 has a connection to 2:1234") as error:
        vsock.connect((HOST, PORT), port=OURS)
    assert error.value.errno == errno.EADDRINUSE
    vsock.connect((HOST, PORT + 1), port=OURS)  # another flow
    with pytest.raises(ValueError, match="port"):
        vsock.listen(0xFFFF_FFFF)
    vsock.listen(1)
    with pytest.raises(OSError, match="port 1 has a listener"):
        vsock.listen(1)


def test_ports_of_our_own_are_not_used_twice(pair: tuple[Ends, Vsock]) -> None:
    _, vsock = pair
    vsock._next_port = 0xFFFF_FFFD
    vsock.listen(1024)
    ports = [vsock.connect((HOST, PORT)).getsockname()[1] for _ in range(4)]
    assert ports == [0xFFFF_FFFD, 0xFFFF_FFFE, 1025, 1026]


def test_listening(pair: tuple[Ends, Vsock]) -> None:
    ops, vsock = pair
    listener = vsock.listen(OURS, backlog=2)
    assert not listener.readable
    with pytest.raises(BlockingIOError):
        listener.accept()
    first = {"src_port": 70}
    assert received(ops, vsock, there(REQUEST, **first)) == [here(RESPONSE, dst_port=70)]
    assert listener.readable
    # Data may come before anybody accepted.
    assert received(ops, vsock, there(RW, b"early", **first)) == []
    assert received(ops, vsock, there(REQUEST, src_port=71)) == [here(RESPONSE, dst_port=71)]
    assert received(ops, vsock, there(REQUEST, src_port=72)) == [here(RST, dst_port=72, buf_alloc=0)]
    stream, address = listener.accept()
    assert address == stream.getpeername() == (HOST, 70)
    assert stream.recv(10) == b"early"
    assert stream.send(b"a" * 200) == 100  # the credit of the REQUEST
    assert ops.sent() == [here(RW, b"a" * 100, dst_port=70, fwd_cnt=5)]
    # One that gives up before it was accepted makes room, and is never seen.
    assert received(ops, vsock, there(RST, src_port=71)) == []
    assert received(ops, vsock, there(REQUEST, src_port=72)) == [here(RESPONSE, dst_port=72)]
    listener.close()
    assert ops.sent() == [here(RST, dst_port=72)]
    assert received(ops, vsock, there(REQUEST, src_port=73)) == [here(RST, dst_port=73, buf_alloc=0)]
    assert received(ops, vsock, there(RW, b"still", src_port=70, fwd_cnt=100)) == []
    assert stream.recv(10) == b"still"
    with pytest.raises(OSError, match="is closed"):
        listener.accept()


def test_a_peer_that_ended_before_it_was_accepted_is_still_read(pair: tuple[Ends, Vsock]) -> None:
    ops, vsock = pair
    listener = vsock.listen(OURS)
    packets = there(REQUEST), there(RW, b"last words"), there(SHUTDOWN, flags=3)
    assert received(ops, vsock, *packets) == [here(RST)]
    stream, _ = listener.accept()
    assert [stream.recv(5), stream.recv(5), stream.recv(5)] == [b"last ", b"words", b""]


def test_a_second_request_on_a_connection(pair: tuple[Ends, Vsock]) -> None:
    """The peer lost its memory: the old connection is over, and the new one may try again."""
    ops, vsock = pair
    listener = vsock.listen(OURS)
    received(ops, vsock, there(REQUEST))
    stream, _ = listener.accept()
    assert received(ops, vsock, there(REQUEST)) == [here(RST)]
    with pytest.raises(VsockReset, match="sent REQUEST while the connection was established"):
        stream.recv(1)
    assert received(ops, vsock, there(REQUEST)) == [here(RESPONSE)]


# ---------------------------------------------------------------------- credit


def test_no_more_is_sent_than_the_peer_takes(pair: tuple[Ends, Vsock]) -> None:
    ops, vsock = pair
    stream = connected(ops, vsock)
    assert stream.send(b"x" * 60) == 60
    assert stream.send(b"y" * 60) == 40  # buf_alloc 100
    assert not stream.writable
    with pytest.raises(BlockingIOError):
        stream.send(b"z")
    with pytest.raises(BlockingIOError):
        stream.send(b"z")
    assert ops.sent() == [here(RW, b"x" * 60), here(RW, b"y" * 40), here(CREDIT_REQUEST)]  # asked once
    assert received(ops, vsock, there(CREDIT_UPDATE, fwd_cnt=0)) == []
    assert not stream.writable
    received(ops, vsock, there(CREDIT_UPDATE, fwd_cnt=60))
    assert stream.writable
    assert stream.send(b"z" * 100) == 60
    received(ops, vsock, there(CREDIT_UPDATE, fwd_cnt=160, buf_alloc=30))  # a smaller buffer
    assert stream.send(b"z" * 100) == 30
    received(ops, vsock, there(CREDIT_UPDATE, fwd_cnt=160, buf_alloc=10))  # smaller than what is under way
    assert not stream.writable
    received(ops, vsock, there(RW, b"any packet tells", fwd_cnt=190, buf_alloc=10))
    assert stream.send(b"z" * 100) == 10


def test_our_credit(pair: tuple[Ends, Vsock]) -> None:
    ops, vsock = pair
    stream = connected(ops, vsock)
    assert received(ops, vsock, there(RW, bytes(600)), there(RW, bytes(400))) == []  # all of it
    assert received(ops, vsock, there(CREDIT_REQUEST)) == [here(CREDIT_UPDATE)]
    assert len(stream.recv(499)) == 499
    assert ops.sent() == []
    assert len(stream.recv(1)) == 1
    assert ops.sent() == [here(CREDIT_UPDATE, fwd_cnt=500)]  # half of the buffer
    assert len(stream.recv(1000)) == 500
    assert ops.sent() == [here(CREDIT_UPDATE, fwd_cnt=1000)]
    assert received(ops, vsock, there(RW, bytes(1000))) == []
    stream.send(b"said by the way")
    buffer = bytearray(600)
    assert stream.recv_into(buffer) == 600
    assert ops.sent() == [
        here(RW, b"said by the way", fwd_cnt=1000),
        here(CREDIT_UPDATE, fwd_cnt=1600),
    ]


def test_counters_wrap(pair: tuple[Ends, Vsock]) -> None:
    ops, vsock = pair
    stream = connected(ops, vsock)
    connection = stream._connection
    connection.tx_cnt = connection.fwd_cnt = connection._announced = 0xFFFF_FFF0
    assert stream.send(b"a" * 100) == 100  # tx_cnt is 0x54 now
    assert ops.sent() == [here(RW, b"a" * 100, fwd_cnt=0xFFFF_FFF0)]
    assert received(ops, vsock, there(CREDIT_UPDATE, fwd_cnt=0xFFFF_FFFF)) == []
    assert stream.send(b"b" * 100) == 15  # 0x63
    received(ops, vsock, there(CREDIT_UPDATE, fwd_cnt=0x10))
    assert stream.send(b"c" * 100) == 0x11
    assert received(ops, vsock, there(RW, bytes(600), fwd_cnt=0x10)) == [
        here(RW, b"c" * 0x11, fwd_cnt=0xFFFF_FFF0)
    ]
    assert len(stream.recv(1000)) == 600
    assert ops.sent() == [here(CREDIT_UPDATE, fwd_cnt=0x248)]
    assert received(ops, vsock, there(CREDIT_UPDATE, fwd_cnt=0xFFFF_FFFF)) == [here(RST, fwd_cnt=0x248)]


@pytest.mark.parametrize(
    ("fwd_cnt", "fine"), [(30, True), (60, True), (29, False), (61, False), (0xFFFF_FFFF, False)]
)
def test_a_forward_counter_that_cannot_be(pair: tuple[Ends, Vsock], fwd_cnt: int, fine: bool) -> None:
    ops, vsock = pair
    stream = connected(ops, vsock)
    other = vsock.connect((HOST, PORT), port=OURS + 1)
    received(ops, vsock, there(RESPONSE, dst_port=OURS + 1))
    stream.send(bytes(60))
    received(ops, vsock, there(CREDIT_UPDATE, fwd_cnt=30))
    answer = received(ops, vsock, there(CREDIT_UPDATE, fwd_cnt=fwd_cnt))
    assert answer == ([] if fine else [here(RST)])
    assert stream.connected is fine
    if not fine:
        with pytest.raises(VsockReset, match=rf"fwd_cnt {fwd_cnt:#x}: must be 0x1e to 0x3c"):
            stream.send(b"x")
    assert other.connected  # others live
    assert other.send(b"x") == 1


def test_more_than_we_allotted(pair: tuple[Ends, Vsock]) -> None:
    ops, vsock = pair
    stream = connected(ops, vsock)
    assert received(ops, vsock, there(RW, bytes(999))) == []
    assert received(ops, vsock, there(RW, b"ab")) == [here(RST)]
    assert len(stream.recv(2000)) == 999  # what came before is not lost
    with pytest.raises(VsockReset, match="2 bytes for a buffer that holds 999 of 1000"):
        stream.recv(1)
    assert not vsock._connections


def test_empty_packets_cost_nothing(pair: tuple[Ends, Vsock]) -> None:
    ops, vsock = pair
    stream = connected(ops, vsock)
    for _ in range(1000):
        assert received(ops, vsock, there(RW)) == []
    assert not stream.readable
    assert not stream._connection._messages


# ---------------------------------------------------------------------- shutting down


def test_half_close_by_us(pair: tuple[Ends, Vsock]) -> None:
    ops, vsock = pair
    stream = connected(ops, vsock)
    stream.send(b"last")
    stream.shutdown(socket.SHUT_WR)
    assert ops.sent() == [here(RW, b"last"), here(SHUTDOWN, flags=2)]
    stream.shutdown(socket.SHUT_WR)
    assert ops.sent() == []  # once
    with pytest.raises(VsockBroken, match="sending was shut down") as error:
        stream.send(b"x")
    assert isinstance(error.value, BrokenPipeError)
    assert received(ops, vsock, there(RW, b"answer", fwd_cnt=4)) == []
    assert stream.recv(10) == b"answer"
    assert not stream.readable
    assert received(ops, vsock, there(SHUTDOWN, flags=3, fwd_cnt=4)) == [here(RST, fwd_cnt=6)]
    assert stream.recv(10) == b""
    stream.close()
    assert ops.sent() == []  # it is over


def test_half_close_by_the_peer(pair: tuple[Ends, Vsock]) -> None:
    ops, vsock = pair
    stream = connected(ops, vsock)
    assert received(ops, vsock, there(RW, b"last"), there(SHUTDOWN, flags=2)) == []
    assert stream.recv(10) == b"last"
    assert stream.recv(10) == stream.recv(10) == b""
    assert stream.send(b"answer") == 6
    received(ops, vsock, there(SHUTDOWN, flags=0, fwd_cnt=6))  # takes nothing back (5.10.6.5)
    assert stream.recv(10) == b""
    stream.close()
    assert ops.sent()[-1] == here(SHUTDOWN, flags=3, fwd_cnt=4)


def test_a_peer_that_no_longer_receives(pair: tuple[Ends, Vsock]) -> None:
    ops, vsock = pair
    stream = connected(ops, vsock)
    assert received(ops, vsock, there(SHUTDOWN, flags=1)) == []
    with pytest.raises(VsockBroken, match="the peer has shut down receiving"):
        stream.send(b"x")
    assert received(ops, vsock, there(RW, b"but it sends")) == []
    assert stream.recv(100) == b"but it sends"


def test_we_no_longer_receive(pair: tuple[Ends, Vsock]) -> None:
    ops, vsock = pair
    stream = connected(ops, vsock)
    received(ops, vsock, there(RW, b"unread"))
    stream.shutdown(socket.SHUT_RD)
    assert ops.sent() == [here(SHUTDOWN, flags=1, fwd_cnt=6)]
    assert stream.recv(10) == b""
    assert received(ops, vsock, there(RW, b"was on its way")) == []
    assert stream.recv(10) == b""
    stream.shutdown(socket.SHUT_WR)
    assert ops.sent() == [here(SHUTDOWN, flags=3, fwd_cnt=20)]


def test_data_after_the_peers_shutdown(pair: tuple[Ends, Vsock]) -> None:
    ops, vsock = pair
    stream = connected(ops, vsock)
    assert received(ops, vsock, there(RW, b"a"), there(SHUTDOWN, flags=2), there(RW, b"b")) == [here(RST)]
    assert stream.recv(10) == b"a"
    assert stream.recv(10) == b""  # that much it had promised
    with pytest.raises(VsockReset, match="after it had shut down sending"):
        stream.send(b"x")


def test_reset_by_the_peer(pair: tuple[Ends, Vsock]) -> None:
    ops, vsock = pair
    stream = connected(ops, vsock)
    assert received(ops, vsock, there(RW, b"before"), there(RST, buf_alloc=0)) == []
    assert stream.recv(10) == b"before"
    for call in (lambda: stream.recv(1), lambda: stream.send(b"x"), lambda: stream.recv(1)):
        with pytest.raises(VsockReset, match="vsock 42:5000 - 2:1234: reset by the peer") as error:
            call()
        assert isinstance(error.value, ConnectionResetError) and error.value.errno == errno.ECONNRESET
    assert received(ops, vsock, there(RST)) == []  # no answer to a RST, ever
    assert vsock.dropped == 1


def test_both_close_at_the_same_time(pair: tuple[Ends, Vsock]) -> None:
    ops, vsock = pair
    stream = connected(ops, vsock)
    stream.close()
    assert received(ops, vsock, there(RW, b"late")) == [here(SHUTDOWN, flags=3)]
    assert received(ops, vsock, there(SHUTDOWN, flags=3)) == [here(RST, fwd_cnt=4)]
    assert not vsock._connections
    with pytest.raises(OSError, match="is closed"):
        stream.recv(1)
    with pytest.raises(OSError, match="is closed"):
        stream.send(b"")


def test_a_disconnect_that_the_peer_does_not_complete(
    pair: tuple[Ends, Vsock], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vhost.drivers.vsock.LINGER", 0.02)
    ops, vsock = pair
    connected(ops, vsock).close()
    assert ops.sent() == [here(SHUTDOWN, flags=3)]
    vsock.step()
    assert len(vsock._connections) == 1
    with pytest.raises(OSError, match="has a connection"):
        vsock.connect((HOST, PORT), port=OURS)  # the flow is not free yet
    deadline = time.monotonic() + 10
    while vsock._connections:
        assert time.monotonic() < deadline
        vsock.step()
    assert ops.sent() == [here(RST)]


# ---------------------------------------------------------------------- what does not belong


@pytest.mark.parametrize("op", [RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, REQUEST, 0, 8])
def test_flows_that_nobody_knows(pair: tuple[Ends, Vsock], op: int) -> None:
    ops, vsock = pair
    vsock.listen(OURS, kind=VsockType.STREAM)
    assert received(ops, vsock, there(op, dst_port=9)) == [here(RST, src_port=9, buf_alloc=0)]


@pytest.mark.parametrize("kind", [0, 2, 3, 0xFFFF])
def test_types_that_are_not_the_flows(pair: tuple[Ends, Vsock], kind: int) -> None:
    """5.10.6.4.1: a RST, of the same type; the connection of the right type goes on."""
    ops, vsock = pair
    vsock.listen(9)
    stream = connected(ops, vsock)
    assert received(ops, vsock, there(RW, b"x", type=kind)) == [here(RST, type=kind, buf_alloc=0)]
    assert received(ops, vsock, there(RST, type=kind)) == []
    assert received(ops, vsock, there(REQUEST, type=kind, dst_port=9)) == [
        here(RST, type=kind, src_port=9, buf_alloc=0)
    ]
    assert stream.connected


def test_packets_that_cannot_be_answered(pair: tuple[Ends, Vsock]) -> None:
    ops, vsock = pair
    stream = connected(ops, vsock)
    for number, packet in enumerate(
        (
            there(RW, b"x", dst_cid=43),
            there(RW, b"x", dst_cid=US | 1 << 32),
            there(RW, b"x", src_cid=HOST | 1 << 32),
            there(RW, b"x").pack()[:43],
            b"",
        )
    ):
        assert received(ops, vsock, packet) == []
        assert vsock.dropped == number + 1
    assert stream.connected and not stream.readable


@pytest.mark.parametrize(("said", "written"), [(5, 48), (0xFFFF_FFFF, None), (1, 44)])
def test_lengths_that_do_not_fit(pair: tuple[Ends, Vsock], said: int, written: int | None) -> None:
    ops, vsock = pair
    stream = connected(ops, vsock)
    ops.give(there(RW, b"four", len=said), written=written)
    vsock.step()
    assert ops.sent() == [here(RST)]
    with pytest.raises(VsockReset, match="bytes in a packet that has"):
        stream.recv(1)


def test_bytes_behind_the_payload_are_none_of_it(pair: tuple[Ends, Vsock]) -> None:
    ops, vsock = pair
    stream = connected(ops, vsock)
    received(ops, vsock, there(RW, b"four and more", len=4))
    assert stream.recv(100) == b"four"


@pytest.mark.parametrize("op", [0, 8, 0xFFFF])
def test_operations_that_nobody_knows(pair: tuple[Ends, Vsock], op: int) -> None:
    ops, vsock = pair
    stream = connected(ops, vsock)
    assert received(ops, vsock, there(op)) == [here(RST)]
    with pytest.raises(VsockReset, match="the peer sent"):
        stream.recv(1)


def test_a_device_that_takes_nothing_cannot_make_answers_pile_up(no_leaks: None) -> None:
    """5.10.6.1: receiving stops when what is owed has no place any more, and goes on later."""
    with driver(queue_size=32, rx_buffers=16) as (ops, vsock):
        stream = connected(ops, vsock)
        strange, given = there(RW, b"x", dst_port=9), 0
        for _ in range(1000):
            while (chain := ops.queues[0].pop()) is not None:
                ops.queues[0].push(chain, chain.write(strange.pack()))
                given += 1
            vsock.step()
        assert given < 200
        assert len(vsock._resets) == 64
        held = ops.take_sent()
        assert len(held) == 16
        ready = select.select([vsock.fileno()], [], [], 0)[0]
        if ready:
            vsock.step()
        assert not select.select([vsock.fileno()], [], [], 0)[0]
        for chain in held:
            ops.queues[1].push(chain, 0)
        assert select.select([vsock.fileno()], [], [], 10)[0], "nobody says that there is place again"
        answers = len(held)
        while select.select([vsock.fileno()], [], [], 0)[0]:
            vsock.step()
            answers += len(ops.sent())
        assert answers == given
        ops.give(there(RW, b"alive"))
        vsock.step()
        assert stream.recv(5) == b"alive"


def test_every_connection_owes_each_packet_once(no_leaks: None) -> None:
    with driver(queue_size=32, rx_buffers=16) as (ops, vsock):
        connected(ops, vsock)
        vsock.step()
        for _ in range(1000):
            ops.give(there(CREDIT_REQUEST))
            vsock.step()
        held = ops.take_sent()
        assert len(held) == 16
        assert len(vsock._owing) == 1
        for chain in held:
            ops.queues[1].push(chain, 0)
        vsock.step()
        assert ops.sent() == [here(CREDIT_UPDATE)]


def test_a_device_that_breaks_a_ring(pair: tuple[Ends, Vsock]) -> None:
    ops, vsock = pair
    stream = connected(ops, vsock)
    received(ops, vsock, there(RW, b"before"))
    used = ops.rings[0]["used"]
    ops.memory.write(used + 2, (0x4000).to_bytes(2, "little"))
    with pytest.raises(QueueBroken, match=r"vsock\[0\]"):
        vsock.step()
    assert stream.recv(10) == b"before"
    with pytest.raises(QueueBroken):
        stream.recv(10)


# ---------------------------------------------------------------------- place in the ring


def test_sending_waits_for_place(no_leaks: None) -> None:
    with driver(queue_size=8, rx_buffers=2, payload=100) as (ops, vsock):
        stream = vsock.connect((HOST, PORT), port=OURS)
        ops.sent()
        received(ops, vsock, there(RESPONSE, buf_alloc=10_000))
        assert stream.send(bytes(1000)) == 200  # two slots of 100
        assert not stream.writable
        with pytest.raises(BlockingIOError):
            stream.send(b"x")
        vsock.step()
        held = ops.take_sent()
        assert [chain.readable_len for chain in held] == [144, 144]  # nobody was asked for credit
        assert not select.select([vsock.fileno()], [], [], 0)[0]
        ops.queues[1].push(held[0], 0)
        assert select.select([vsock.fileno()], [], [], 10)[0]
        vsock.step()
        assert stream.writable
        assert stream.send(bytes(1000)) == 100
        ops.queues[1].push(held[1], 0)
        ops.sent()


def test_the_device_is_asked_to_call_only_when_it_matters(no_leaks: None) -> None:
    """Nobody waits for place, so that the device need not say that it took the packets."""
    with driver(event_idx=False) as (ops, vsock):
        stream = connected(ops, vsock)
        vsock.step()
        stream.send(b"x")
        assert len(ops.sent()) == 1
        assert not select.select([vsock.fileno()], [], [], 0)[0]


# ---------------------------------------------------------------------- messages


@pytest.fixture
def seq(no_leaks: None) -> Iterator[tuple[Ends, Vsock]]:
    with driver(features=SEQ) as both:
        yield both


def test_messages(seq: tuple[Ends, Vsock]) -> None:
    ops, vsock = seq
    stream = connected(ops, vsock, kind=VsockType.SEQPACKET)
    assert stream.kind is VsockType.SEQPACKET
    kind = {"type": SEQPACKET}
    assert stream.send(b"one") == 3
    stream.sendall(b"two", socket.MSG_EOR)
    assert stream.send(b"") == 0
    assert ops.sent() == [here(RW, b"one", flags=1, **kind), here(RW, b"two", flags=3, **kind)]
    received(ops, vsock, there(RW, b"begin ", fwd_cnt=6, **kind))
    assert not stream.readable
    received(ops, vsock, there(RW, b"end", flags=1, fwd_cnt=6, **kind))
    received(ops, vsock, there(RW, b"next", flags=3, fwd_cnt=6, **kind))
    assert stream.recvmsg(100) == (b"begin end", [], 0, (HOST, PORT))
    assert stream.recvmsg(2) == (b"ne", [], socket.MSG_EOR | socket.MSG_TRUNC, (HOST, PORT))
    assert ops.sent() == [here(CREDIT_UPDATE, fwd_cnt=13, **kind)]  # empty: whole messages fit again
    received(ops, vsock, there(RW, b"half", fwd_cnt=6, **kind), there(SHUTDOWN, flags=2, fwd_cnt=6, **kind))
    assert stream.recv(100) == b""  # it never became a message


def test_a_message_goes_as_a_whole(no_leaks: None) -> None:
    with driver(features=SEQ, queue_size=8, rx_buffers=3, payload=64) as (ops, vsock):
        kind = {"type": SEQPACKET}
        stream = connected(ops, vsock, kind=VsockType.SEQPACKET)
        with pytest.raises(OSError, match="message of 101 bytes, limit 100") as error:
            stream.send(bytes(101))
        assert error.value.errno == errno.EMSGSIZE
        assert stream.send(bytes(100)) == 100
        assert ops.sent() == [here(RW, bytes(64), **kind), here(RW, bytes(36), flags=1, **kind)]
        received(ops, vsock, there(CREDIT_UPDATE, fwd_cnt=50, **kind))
        with pytest.raises(BlockingIOError):
            stream.send(bytes(60))  # there is room for 50
        assert ops.sent() == [here(CREDIT_REQUEST, **kind)]
        received(ops, vsock, there(CREDIT_UPDATE, fwd_cnt=100, buf_alloc=1000, **kind))
        with pytest.raises(OSError, match="message of 193 bytes, limit 192"):
            stream.send(bytes(193))  # three slots


def test_a_part_of_a_message_does_not_keep_the_rest_away(seq: tuple[Ends, Vsock]) -> None:
    """The reader will wait for a message whose sender has no credit left: it has to hear of what there is."""
    ops, vsock = seq
    kind = {"type": SEQPACKET}
    stream = connected(ops, vsock, kind=VsockType.SEQPACKET)
    received(ops, vsock, there(RW, bytes(100), flags=1, **kind), there(RW, bytes(900), **kind))
    assert len(stream.recv(1000)) == 100
    assert ops.sent() == [here(CREDIT_UPDATE, fwd_cnt=100, **kind)]
    received(ops, vsock, there(RW, bytes(100), flags=1, **kind))
    assert len(stream.recv(1000)) == 1000


def test_messages_of_nothing_do_not_pile_up(seq: tuple[Ends, Vsock]) -> None:
    ops, vsock = seq
    kind = {"type": SEQPACKET}
    stream = connected(ops, vsock, kind=VsockType.SEQPACKET)
    for _ in range(100):
        received(ops, vsock, there(RW, flags=1, **kind))
    assert not stream.readable and not stream._connection._messages


@pytest.mark.parametrize(
    ("features", "stream", "seqpacket"),
    [
        (0, True, False),
        (VsockF.STREAM, True, False),
        (VsockF.SEQPACKET, True, True),
        (VsockF.SEQPACKET | VsockF.NO_IMPLIED_STREAM, False, True),
        (VsockF.STREAM | VsockF.NO_IMPLIED_STREAM, True, False),
    ],
)
def test_kinds_that_are_offered(features: int, stream: bool, seqpacket: bool, no_leaks: None) -> None:
    with driver(features=features) as (_, vsock):
        for kind, offered in ((VsockType.STREAM, stream), (VsockType.SEQPACKET, seqpacket)):
            if offered:
                vsock.connect((HOST, PORT), kind=kind)
            else:
                with pytest.raises(InactiveFeature, match=kind.name):
                    vsock.connect((HOST, PORT), kind=kind)
                with pytest.raises(InactiveFeature, match=kind.name):
                    vsock.listen(PORT, kind=kind)


# ---------------------------------------------------------------------- the device, and the end


def test_transport_reset(no_leaks: None) -> None:
    with driver(queues=3) as (ops, vsock):
        stream = connected(ops, vsock)
        listener = vsock.listen(7)
        ops.event(99)  # not known: nothing
        vsock.step()
        assert stream.connected
        ops.config = (77).to_bytes(8, "little")
        ops.event(0)
        assert select.select([vsock.fileno()], [], [], 10)[0]
        vsock.step()
        assert vsock.guest_cid == 77
        with pytest.raises(VsockReset, match="transport reset"):
            stream.recv(1)
        assert ops.sent() == []  # whoever is there now has nothing to do with it
        request = there(REQUEST, dst_cid=77, dst_port=7)
        assert received(ops, vsock, request) == [here(RESPONSE, src_cid=77, src_port=7)]
        assert listener.accept()[0].getsockname() == (77, 7)
        for _ in range(20):  # more than were posted
            ops.event(0)
            vsock.step()


@pytest.mark.parametrize("cid", [0, 1, 2, 0xFFFF_FFFF, 1 << 32, (1 << 64) - 1])
def test_reserved_cids(cid: int, no_leaks: None) -> None:
    with Ends() as ops:
        with pytest.raises(ValueError, match="is reserved"):
            Vsock(ops, cid)
        ops.config = cid.to_bytes(8, "little")
        with pytest.raises(VhostError, match="is reserved"):
            Vsock(ops)


def test_the_back_end_goes_away(no_leaks: None) -> None:
    with driver(timeout=10) as (ops, vsock):
        stream = vsock.connect((HOST, PORT), 0, port=OURS)
        received(ops, vsock, there(RESPONSE))
        stream.settimeout(None)
        ops.die()
        with pytest.raises(Disconnected, match="the back-end is gone"):
            stream.recv(1)
        listener: Listener | None = None
        with pytest.raises(Disconnected):
            listener = vsock.listen(1)
        assert listener is None
        with Ends() as fresh:
            vsock.restart(fresh)
            with pytest.raises(VsockReset, match="the back-end was replaced"):
                stream.recv(1)
            again = connected(fresh, vsock, timeout=0)
            again.close()
            assert fresh.sent() == [here(SHUTDOWN, flags=3)]
            vsock.close()


def test_closing_the_driver(no_leaks: None) -> None:
    with Ends() as ops:
        vsock = Vsock(ops, buf_alloc=ROOM, timeout=0)
        stream = connected(ops, vsock)
        other = vsock.connect((HOST, 9))
        listener = vsock.listen(1)
        ops.sent()
        seen: list[Packet] = []
        stop = ops.get_vring_base
        ops.get_vring_base = lambda index: (seen.extend(ops.sent() if index == 1 else []), stop(index))[1]  # type: ignore[method-assign]
        vsock.close()
        vsock.close()
        assert {(packet.op, packet.dst_port) for packet in seen} == {(RST, PORT), (RST, 9)}
        for call in (lambda: stream.recv(1), lambda: other.send(b"x")):
            with pytest.raises(VsockReset, match="the driver was closed"):
                call()
        stream.close()
        listener.close()
        with pytest.raises(OSError, match="the driver is closed"):
            vsock.connect((HOST, PORT))
        with pytest.raises(OSError, match="the driver is closed"):
            vsock.step()


def test_arguments(no_leaks: None) -> None:
    with Ends() as ops:
        for wrong in (
            {"payload": 0},
            {"payload": 65537},
            {"rx_buffers": 0},
            {"rx_buffers": 128},
            {"buf_alloc": 0},
        ):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                Vsock(ops, **wrong)  # type: ignore[arg-type]
        ops.queue_num = 1
        with pytest.raises(VhostError, match="2 or 3 queues, this one 1"):
            Vsock(ops)
