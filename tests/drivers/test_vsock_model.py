# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""One vsock connection against a model: any packets, any calls, and what must hold whatever happens."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from drivers.vsock_peer import CREDIT_REQUEST, CREDIT_UPDATE, REQUEST, RESPONSE, RST, RW, SHUTDOWN, Packet
from vhost.drivers.vsock_connection import Connection, State
from vhost.virtio_vsock import VsockType

M32 = 1 << 32
ROOM = 64


def established(kind: int, start: int, credit: int) -> Connection:
    one = Connection((42, 1), (2, 2), ROOM, kind=kind, request=False, peer_buf_alloc=credit)
    one.tx_cnt = one.fwd_cnt = one._announced = start
    sent(one)
    return one


def sent(one: Connection, size: int = 0) -> list[Packet]:
    """What the connection owes, and data of ``size`` bytes: headers as they go out."""
    packets = []
    while (control := one.next_control()) is not None:
        packets.append(header(one, control[0], 0, control[1]))
    if size:
        packets.append(header(one, RW, size, 0))
    return packets


def header(one: Connection, op: int, size: int, flags: int) -> Packet:
    raw = bytearray(44)
    one.pack_into(memoryview(raw), 0, op, size, flags)
    return Packet.parse(bytes(raw))


counts = st.one_of(st.integers(0, M32 - 1), st.sampled_from([0, M32 - 1, M32 - 20]))
steps = st.lists(
    st.one_of(
        st.tuples(st.just("data"), st.integers(0, ROOM), st.integers(0, 3)),
        st.tuples(st.just("read"), st.integers(0, ROOM), st.just(0)),
        st.tuples(st.just("send"), st.integers(1, 100), st.just(0)),
        st.tuples(st.just("forward"), st.integers(0, 100), st.integers(0, 300)),
        st.tuples(st.just("ask"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@given(steps, counts, st.sampled_from(VsockType))
@settings(max_examples=300, deadline=None)
def test_a_peer_that_keeps_the_rules(script: list[tuple[str, int, int]], start: int, kind: VsockType) -> None:
    """The peer's own account, in plain integers without an end, is the connection's account."""
    one = established(kind, start, 50)
    given_, taken, out, forwarded, alloc = bytearray(), 0, 0, 0, 50
    announced, ends, got = 0, [], []
    byte = 0

    def look(size: int = 0) -> None:
        nonlocal announced
        for packet in sent(one, size):
            announced = taken
            assert packet.fwd_cnt == (start + taken) % M32
            assert packet.buf_alloc == ROOM

    for what, number, extra in script:
        if what == "data":
            size = min(number, ROOM - (len(given_) - announced))  # what we know to be free
            data = bytes((byte + i) % 256 for i in range(size))
            byte += size
            given_ += data
            one.receive(RW, extra, memoryview(data), alloc, (start + forwarded) % M32)
            if kind is VsockType.SEQPACKET and extra & 1 and len(given_) > (ends[-1] if ends else 0):
                ends.append(len(given_))
        elif what == "read" and kind is VsockType.STREAM:
            got = one.take(number)
            assert got == given_[taken : taken + min(number, len(given_) - taken)]
            taken += len(got)
            # A reader that has all must not leave the sender without a way to go on.
            if taken == len(given_) and one.wants == 0:
                assert ROOM - (taken - announced) > 0
        elif what == "read":
            end = next((end for end in ends if end > taken), None)
            got = one.take(number)
            assert got == (b"" if end is None else given_[taken : min(end, taken + number)])
            if end is not None:
                taken = end
            if not any(end > taken for end in ends) and taken > announced:
                assert one.wants & 1 << CREDIT_UPDATE
        elif what == "send":
            size = min(number, one.credit)
            assert one.credit == max(alloc - (out - forwarded), 0)
            out += size
            look(size)
        elif what == "forward":
            forwarded, alloc = min(out, forwarded + number), extra
            one.receive(CREDIT_UPDATE, 0, memoryview(b""), alloc, (start + forwarded) % M32)
        else:
            one.receive(CREDIT_REQUEST, 0, memoryview(b""), alloc, (start + forwarded) % M32)
            assert one.wants & 1 << CREDIT_UPDATE
        assert one.error is None, one.error
        if number % 2:
            look()
    assert one.state is State.ESTABLISHED


packets = st.tuples(
    st.sampled_from([0, REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 9]),
    st.integers(0, 7),
    st.binary(max_size=2 * ROOM),
    counts,
    st.one_of(counts, st.integers(0, 100)),
)
calls = st.sampled_from(["take", "shutdown", "close", "ask", "send", "control"])


@given(st.lists(st.one_of(packets, calls), max_size=40), st.booleans(), st.sampled_from(VsockType))
@settings(max_examples=300, deadline=None)
def test_a_peer_that_does_as_it_likes(
    script: list[tuple[int, int, bytes, int, int] | str], request: bool, kind: VsockType
) -> None:
    one = Connection((42, 1), (2, 2), ROOM, kind=kind, request=request, peer_buf_alloc=10)
    for step in script:
        was = one.state
        if isinstance(step, tuple):
            op, flags, data, alloc, fwd_cnt = step
            one.receive(op, flags, memoryview(data), alloc, fwd_cnt)
        elif step == "take":
            assert len(one.take(10)) <= 10
        elif step == "shutdown":
            one.shutdown(2)
        elif step == "close":
            one.close()
        elif step == "ask":
            one.ask_credit()
        elif step == "send":
            sent(one, min(one.credit, 5))
        else:
            sent(one)
        assert len(one._buffer) <= ROOM
        assert len(one._messages) <= len(one._buffer)
        assert sum(message >> 1 for message in one._messages) + one._partial <= len(one._buffer)
        assert one.credit >= 0
        assert was is not State.CLOSED or one.state is State.CLOSED
        if one.state is State.CLOSED:
            assert one.wants in (0, 1 << RST)
            assert one.credit == 0
