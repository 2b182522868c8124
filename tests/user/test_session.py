# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The sans-IO session: hostile peers, sloppy peers, and descriptors that must not leak."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fds as holdings
from user.wire import SAMPLES, descriptors, is_open, right_number
from vhost.errors import (
    Disconnected,
    InactiveFeature,
    IncorrectFds,
    InvalidMessage,
    InvalidState,
    OversizedMessage,
    PartialMessage,
    ProtocolError,
    UnsupportedRequest,
    VhostError,
)
from vhost.features import ProtocolF, VirtioF
from vhost.user import payloads as p
from vhost.user.messages import BACKEND, FRONTEND, BackendMsg, FrontendMsg, frame
from vhost.user.session import Session
from vhost.user.spec import Channel, Message, Outgoing, Role

F = FrontendMsg
ENABLE = frame(F.SET_VRING_ENABLE, p.VringState(0, 1).pack(), need_reply=True)


def backend(protocol_features: int = 0, features: int = 0) -> Session:
    session = Session(Role.BACKEND)
    session.protocol_features = protocol_features
    session.features = features
    return session


def frontend(protocol_features: int = 0) -> Session:
    session = Session(Role.FRONTEND)
    session.protocol_features = protocol_features
    return session


def feed(session: Session, data: bytes, fds: list[int] | None = None) -> list[Message]:
    """Everything, in the pieces that the session asks for; descriptors come with the first byte."""
    messages = []
    at = 0
    given_fds = fds or []
    while at < len(data):
        step = min(session.wanted, len(data) - at)
        message = session.receive(data[at : at + step], given_fds)
        given_fds = []
        at += step
        if message is not None:
            messages.append(message)
    return messages


# -- framing ---------------------------------------------------------------------------------------


def test_header_is_read_by_itself_then_exactly_the_payload() -> None:
    session = backend()
    assert session.wanted == 12
    assert session.receive(ENABLE[:5]) is None
    assert session.wanted == 7
    assert session.receive(ENABLE[5:12]) is None
    assert session.wanted == 8
    assert session.receive(ENABLE[12:15]) is None
    assert session.wanted == 5
    message = session.receive(ENABLE[15:])
    assert message is not None
    assert message.payload == p.VringState(0, 1)
    assert session.wanted == 12
    assert not session.in_message


def test_message_without_payload_is_whole_with_its_header() -> None:
    message = backend().receive(frame(F.SET_OWNER))
    assert message is not None
    assert message.name == "SET_OWNER"
    assert not message.waits


def test_reading_more_than_wanted_is_the_callers_mistake(no_leaks: None) -> None:
    with descriptors(1) as fds, pytest.raises(ValueError, match="20 bytes received, wanted at most 12"):
        backend().receive(ENABLE, fds)


@given(cuts=st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_any_fragmentation_gives_the_same_messages(cuts: list[int]) -> None:
    stream = ENABLE + frame(F.SET_OWNER) + ENABLE + frame(F.GET_FEATURES)
    session = backend()
    messages = []
    at = 0
    for cut in cuts * len(stream):
        step = min(session.wanted, cut, len(stream) - at)
        if not step:
            break
        message = session.receive(stream[at : at + step])
        messages += [message] if message else []
        at += step
    assert [message.name for message in messages] == [
        "SET_VRING_ENABLE",
        "SET_OWNER",
        "SET_VRING_ENABLE",
        "GET_FEATURES",
    ]


@pytest.mark.parametrize("cut", range(len(ENABLE) + 1))
def test_end_of_stream_after_every_byte(cut: int, no_leaks: None) -> None:
    session = backend()
    with descriptors(1 if cut else 0) as fds:
        try:
            messages = feed(session, ENABLE[:cut], fds)
        except IncorrectFds as error:
            assert cut == len(ENABLE)  # ENABLE takes no descriptor
            assert error.message is not None
            messages = [error.message]
    assert len(messages) == (cut == len(ENABLE))
    with pytest.raises(ProtocolError) as caught:
        session.receive_eof()
    if cut in (0, len(ENABLE)):
        assert type(caught.value) is Disconnected
    elif cut < 12:
        assert type(caught.value) is PartialMessage
        assert f"after {cut} of 12 bytes of the header" in str(caught.value)
    else:
        assert type(caught.value) is PartialMessage
        assert f"SET_VRING_ENABLE: connection closed by the peer after {cut - 12} of 8 bytes" in str(
            caught.value
        )
    with pytest.raises(InvalidState, match="ended before"):
        session.receive(ENABLE[:12])


def test_end_of_stream_names_the_reply_that_never_came() -> None:
    session = frontend()
    session.request(F.GET_FEATURES)
    with pytest.raises(Disconnected, match="GET_FEATURES: connection closed by the peer before the reply"):
        session.receive_eof()


def test_descriptors_may_come_with_any_fragment(no_leaks: None) -> None:
    data = frame(F.SET_MEM_TABLE, SAMPLES[p.MemTable].pack())
    with descriptors(2) as fds:
        session = backend()
        for at in range(0, 12, 3):
            assert session.receive(data[at : at + 3], fds[:1] if at == 6 else []) is None
        for at in range(12, len(data) - 1):
            assert session.receive(data[at : at + 1], fds[1:] if at == 30 else []) is None
        message = session.receive(data[-1:])
        assert message is not None
        assert message.take_fds() == fds
        message.close()
        assert all(map(is_open, fds))
        holdings_of_test = fds
    for fd in holdings_of_test:
        os.close(fd)


# -- headers that are wrong ------------------------------------------------------------------------


def bent(**fields: int) -> bytes:
    header = {"number": int(F.SET_VRING_ENABLE), "flags": 1, "size": 8} | fields
    return struct.pack("=III", header["number"], header["flags"], header["size"])


@pytest.mark.parametrize(
    ("header", "kind", "text"),
    [
        (bent(flags=0), InvalidMessage, "version 0, must be 1"),
        (bent(flags=2), InvalidMessage, "version 2, must be 1"),
        (bent(flags=3), InvalidMessage, "version 3, must be 1"),
        (bent(flags=5), InvalidMessage, "REPLY on a request"),
        (bent(flags=13), InvalidMessage, "REPLY on a request"),
        (bent(size=0xFFFFFFFF), OversizedMessage, "payload size 4294967295, limit 8"),
        (bent(size=9), OversizedMessage, "payload size 9, limit 8"),
        (bent(number=F.SET_OWNER, size=1), OversizedMessage, "SET_OWNER: payload size 1, limit 0"),
        (bent(number=F.SET_MEM_TABLE, size=8 + 33 * 32), OversizedMessage, "limit 1032"),
        (bent(number=F.SET_CONFIG, size=12 + 4097), OversizedMessage, "limit 4108"),
        (bent(number=99, size=4097), OversizedMessage, "message 99: payload size 4097, limit 4096"),
        (bent(number=0xFFFFFFFF, size=0xFFFFFFFF), OversizedMessage, "message 4294967295"),
    ],
)
def test_header_that_ends_the_session(
    header: bytes, kind: type[ProtocolError], text: str, no_leaks: None
) -> None:
    session = backend()
    with descriptors(3) as fds, pytest.raises(kind, match=text) as caught:
        session.receive(header, fds)
    assert not any(map(is_open, fds))
    assert type(caught.value) is kind
    assert caught.value.message is None
    assert isinstance(caught.value, VhostError)
    with descriptors(1) as fds, pytest.raises(InvalidState, match=text):
        session.receive(bent(), fds)


def test_announced_size_is_refused_before_anything_is_allocated() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(OversizedMessage):
            backend().receive(bent(size=0xFFFFFFFF))
        _now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_truncated_ancillary_data_ends_the_session(no_leaks: None) -> None:
    session = backend()
    with descriptors(3) as fds, pytest.raises(IncorrectFds, match="truncated") as caught:
        session.receive(ENABLE[:12], fds, truncated=True)
    assert caught.value.message is None
    assert not any(map(is_open, fds))


def test_descriptors_with_each_byte_do_not_pile_up(no_leaks: None) -> None:
    data = frame(F.SET_MEM_TABLE, SAMPLES[p.MemTable].pack())
    session = backend()
    with pytest.raises(IncorrectFds, match="limit 32") as caught:
        for at in range(len(data)):
            with descriptors(10) as fds:
                session.receive(data[at : at + 1], fds)
    assert caught.value.message is None


def test_version_bits_that_mean_nothing_yet_are_ignored() -> None:
    message = backend().receive(struct.pack("=III", F.SET_OWNER, 0xFFFFFFF1, 0))
    assert message is not None


# -- messages that are wrong, in a stream that stays in step ----------------------------------------


def refused(session: Session, data: bytes, count: int, kind: type[ProtocolError], text: str) -> Message:
    """The error, with the descriptors closed and a session that goes on."""
    with descriptors(count) as fds, pytest.raises(kind, match=text) as caught:
        feed(session, data, fds)
    assert not any(map(is_open, fds))
    assert type(caught.value) is kind
    message = caught.value.message
    assert isinstance(message, Message)
    assert message.fds == []
    assert str(message)
    # Nothing is lost: the next message is read as usual.
    assert [other.name for other in feed(session, frame(F.SET_OWNER))] == ["SET_OWNER"]
    return message


@pytest.mark.parametrize("need_reply", [False, True])
@pytest.mark.parametrize(
    ("number", "payload", "count", "kind", "text"),
    [
        (99, b"x" * 100, 2, UnsupportedRequest, "message 99: unknown request"),
        (0, b"", 1, UnsupportedRequest, "message 0: unknown request"),
        (0xFFFFFFFF, b"x" * 4096, 0, UnsupportedRequest, "unknown request"),
        (F.GPU_SET_SOCKET, b"", 0, IncorrectFds, "GPU_SET_SOCKET: 0 file descriptors, must be 1"),
        (
            F.SET_CONFIG,
            bytes(12),
            0,
            InactiveFeature,
            "SET_CONFIG: VHOST_USER_PROTOCOL_F_CONFIG was not nego",
        ),
        (F.ADD_MEM_REG, bytes(40), 1, InactiveFeature, "ADD_MEM_REG: VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_S"),
        (F.SET_VRING_NUM, b"", 0, InvalidMessage, "SET_VRING_NUM: payload size 0, must be 8"),
        (F.SET_VRING_NUM, bytes(7), 0, InvalidMessage, "SET_VRING_NUM: payload size 7, must be 8"),
        (F.SET_VRING_KICK, struct.pack("=Q", 0x10000), 1, InvalidMessage, "SET_VRING_KICK: .* bits 9 to 63"),
        (F.SET_VRING_NUM, bytes(8), 1, IncorrectFds, "SET_VRING_NUM: 1 file descriptors, must be 0"),
        (F.SET_FEATURES, bytes(8), 3, IncorrectFds, "SET_FEATURES: 3 file descriptors, must be 0"),
        (
            F.SET_VRING_KICK,
            p.VringFd(0).pack(),
            0,
            IncorrectFds,
            "SET_VRING_KICK: 0 file descriptors, must be 1",
        ),
        (
            F.SET_VRING_KICK,
            p.VringFd(0).pack(),
            2,
            IncorrectFds,
            "SET_VRING_KICK: 2 file descriptors, must be 1",
        ),
        (
            F.SET_VRING_CALL,
            p.VringFd(0, True).pack(),
            1,
            IncorrectFds,
            "SET_VRING_CALL: 1 file descriptors, must",
        ),
        (F.SET_MEM_TABLE, SAMPLES[p.MemTable].pack(), 1, IncorrectFds, "1 file descriptors, must be 2"),
        (F.SET_MEM_TABLE, SAMPLES[p.MemTable].pack(), 3, IncorrectFds, "3 file descriptors, must be 2"),
        (F.SET_MEM_TABLE, bytes(8), 0, InvalidMessage, "num regions 0"),
        (
            F.SET_MEM_TABLE,
            struct.pack("=II", 3, 0) + bytes(64),
            2,
            InvalidMessage,
            "must be 104 for num regions 3",
        ),
    ],
)
def test_message_that_is_refused_alone(
    number: int,
    payload: bytes,
    count: int,
    kind: type[ProtocolError],
    text: str,
    need_reply: bool,
    no_leaks: None,
) -> None:
    session = backend()
    message = refused(session, frame(number, payload, need_reply=need_reply), count, kind, text)
    assert message.id == number
    nack = session.ack(message, 1)
    if need_reply:
        assert nack is not None
        assert nack.data == frame(number, p.U64(1).pack(), reply=True)
    else:
        assert nack is None


def _with_descriptor_too_many() -> list[int]:
    return [row.id for row in FRONTEND.values() if not row.fds.rule and not row.fds.most]


@pytest.mark.parametrize("number", _with_descriptor_too_many(), ids=lambda number: FrontendMsg(number).name)
def test_descriptor_with_a_message_that_takes_none(number: int, no_leaks: None) -> None:
    row = FRONTEND[number]
    session = Session(Role.BACKEND, serves=FRONTEND)
    session.features = session.protocol_features = ((1 << 64) - 1) & ~ProtocolF.XEN_MMAP
    data = frame(number, SAMPLES[row.request].pack())
    refused(session, data, 1, IncorrectFds, "1 file descriptors, must be 0")


@pytest.mark.parametrize("row", FRONTEND.values(), ids=lambda row: row.name)
def test_not_served_is_refused_whatever_was_negotiated(row: object, no_leaks: None) -> None:
    spec = FRONTEND[row.id]  # type: ignore[attr-defined]
    session = Session(Role.BACKEND, serves=[F.SET_OWNER])
    session.features = session.protocol_features = (1 << 64) - 1
    payload = SAMPLES[spec.request]
    if spec.id == F.SET_OWNER:
        return
    data = frame(spec.id, payload.pack(), need_reply=True)
    refused(session, data, right_number(spec, payload), UnsupportedRequest, spec.name)


def test_config_request_is_refused_as_the_specification_says() -> None:
    """GET_CONFIG: "zero length of payload to indicate an error"."""
    session = backend(ProtocolF.CONFIG)
    [message] = feed(session, frame(F.GET_CONFIG, p.Config(0, 60, 0, bytes(60)).pack()))
    assert session.ack(message, 0) is None, "success is the reply itself"
    assert message.waits
    refusal = session.ack(message, 1)
    assert refusal is not None
    assert refusal.data == frame(F.GET_CONFIG, p.Config(0, 0, 0, b"").pack(), reply=True)
    assert not message.waits


def test_request_without_a_refusal_keeps_the_peer_waiting() -> None:
    session = backend(ProtocolF.REPLY_ACK)
    with pytest.raises(InactiveFeature) as caught:
        feed(session, frame(F.GET_STATUS, need_reply=True))
    assert session.ack(caught.value.message, 1) is None
    assert caught.value.message.waits


def test_unused_descriptor_of_rem_mem_reg_is_closed(no_leaks: None) -> None:
    session = backend(ProtocolF.CONFIGURE_MEM_SLOTS)
    data = frame(F.REM_MEM_REG, SAMPLES[p.SingleRegion].pack())
    with descriptors(1) as fds:
        [message] = feed(session, data, fds)
    assert message.fds == []
    assert not is_open(fds[0])
    refused(session, data, 2, IncorrectFds, "2 file descriptors, must be 0 to 1")


def test_message_that_nobody_takes_warns_and_closes(no_leaks: None) -> None:
    with descriptors(1) as fds:
        [message] = feed(backend(), frame(F.SET_VRING_KICK, p.VringFd(3).pack()), fds)
    with pytest.warns(ResourceWarning, match="SET_VRING_KICK index=3"):
        message.__del__()
    assert not is_open(fds[0])


def test_single_descriptor_is_taken_once(no_leaks: None) -> None:
    with descriptors(1) as fds:
        [message] = feed(backend(), frame(F.SET_VRING_CALL, p.VringFd(0).pack()), fds)
    assert message.take_fd() == fds[0]
    assert message.take_fd() is None
    message.close()
    assert is_open(fds[0])
    os.close(fds[0])


def test_close_closes_what_came_with_half_a_message(no_leaks: None) -> None:
    session = backend()
    with descriptors(2) as fds:
        session.receive(frame(F.SET_MEM_TABLE, bytes(72))[:12], fds)
        session.close()
        session.close()
    assert not any(map(is_open, fds))
    with descriptors(1) as fds, pytest.raises(InvalidState, match="session was closed"):
        session.receive(b"x", fds)
    assert not is_open(fds[0])
    with pytest.raises(InvalidState, match="session was closed"):
        session.receive_eof()


# -- answers ----------------------------------------------------------------------------------------


def test_need_reply_is_answered_once_even_before_it_was_negotiated() -> None:
    """Some front-ends set it on SET_PROTOCOL_FEATURES itself and hang without the answer."""
    session = backend()
    [message] = feed(session, frame(F.SET_PROTOCOL_FEATURES, p.U64(8).pack(), need_reply=True))
    ack = session.ack(message)
    assert ack is not None
    assert ack.data == frame(F.SET_PROTOCOL_FEATURES, p.U64(0).pack(), reply=True)
    assert session.ack(message) is None


def test_need_reply_on_a_get_brings_one_reply() -> None:
    session = backend()
    [message] = feed(session, frame(F.GET_FEATURES, need_reply=True))
    assert session.ack(message) is None, "the reply is the answer"
    reply = session.reply(message, p.U64(5))
    assert reply.data == frame(F.GET_FEATURES, p.U64(5).pack(), reply=True)
    assert session.ack(message, 0) is None
    assert session.ack(message, 1) is None
    with pytest.raises(ValueError, match="answered before"):
        session.reply(message, p.U64(5))


def test_nothing_is_due_without_need_reply() -> None:
    session = backend(ProtocolF.REPLY_ACK)
    [message] = feed(session, frame(F.SET_FEATURES, bytes(8)))
    assert session.ack(message) is None
    with pytest.raises(ValueError, match="use ack"):
        session.reply(message, p.U64(0))


def test_reply_must_fit_the_row(no_leaks: None) -> None:
    session = backend()
    [message] = feed(session, frame(F.GET_FEATURES))
    with pytest.raises(ValueError, match="payload VringState, must be U64"):
        session.reply(message, p.VringState(0, 0))
    with pytest.raises(ValueError, match="1 file descriptors, must be 0"):
        session.reply(message, p.U64(0), [0])


def test_requests_of_the_wrong_side_are_refused() -> None:
    with pytest.raises(ValueError, match="the back-end sends no requests on the channel 'main'"):
        backend().request(F.GET_FEATURES)
    with pytest.raises(ValueError, match="the front-end sends no requests"):
        Session(Role.FRONTEND, Channel.BACKEND_REQ).request(BackendMsg.BACKEND_CONFIG_CHANGE_MSG)
    with pytest.raises(ValueError, match="message 99 is unknown"):
        frontend().request(99)


def test_request_must_fit_its_row() -> None:
    session = frontend()
    with pytest.raises(ValueError, match="SET_VRING_NUM: payload U64, must be VringState"):
        session.request(F.SET_VRING_NUM, p.U64(1))
    with pytest.raises(ValueError, match="SET_VRING_KICK: 0 file descriptors, must be 1"):
        session.request(F.SET_VRING_KICK, p.VringFd(0))
    with pytest.raises(InactiveFeature, match="GET_STATUS: VHOST_USER_PROTOCOL_F_STATUS was not negotiated"):
        session.request(F.GET_STATUS)
    assert session.outstanding == 0


def test_acks_are_asked_for_once_negotiated() -> None:
    session = frontend()
    plain = session.request(F.SET_OWNER)
    assert (plain.need_reply, plain.expects_reply) == (False, False)
    session.protocol_features = ProtocolF.REPLY_ACK
    acked = session.request(F.SET_FEATURES, p.U64(0))
    assert (acked.need_reply, acked.expects_reply) == (True, True)
    assert acked.data == frame(F.SET_FEATURES, bytes(8), need_reply=True)
    got = session.request(F.GET_FEATURES)
    assert (got.need_reply, got.expects_reply) == (False, True)
    quiet = session.request(F.SET_FEATURES, p.U64(0), need_reply=False)
    assert not quiet.expects_reply
    assert session.outstanding == 2


# -- replies to a front-end -------------------------------------------------------------------------


def test_replies_match_requests_in_order() -> None:
    session = frontend(ProtocolF.REPLY_ACK | ProtocolF.MQ)
    session.request(F.GET_QUEUE_NUM)
    session.request(F.SET_VRING_NUM, p.VringState(0, 128))
    replies = feed(
        session,
        frame(F.GET_QUEUE_NUM, p.U64(4).pack(), reply=True)
        + frame(F.SET_VRING_NUM, p.U64(3).pack(), reply=True),
    )
    assert [(reply.name, reply.is_ack, reply.payload.value) for reply in replies] == [
        ("GET_QUEUE_NUM", False, 4),
        ("SET_VRING_NUM", True, 3),
    ]
    assert session.outstanding == 0


def test_reply_with_need_reply_set_is_accepted() -> None:
    """libvhost-user copies the flags of the request into the reply."""
    session = frontend()
    session.request(F.GET_FEATURES, need_reply=True)
    [reply] = feed(session, frame(F.GET_FEATURES, bytes(8), reply=True, need_reply=True))
    assert reply.is_reply


def _ask_features(session: Session) -> Outgoing:
    return session.request(F.GET_FEATURES)


def _ask_ack(session: Session) -> Outgoing:
    return session.request(F.SET_OWNER, need_reply=True)


def _ask_config(session: Session) -> Outgoing:
    session.protocol_features |= ProtocolF.CONFIG
    return session.request(F.GET_CONFIG, p.Config(0, 4, 0, bytes(4)))


def _ask_inflight(session: Session) -> Outgoing:
    session.protocol_features |= ProtocolF.INFLIGHT_SHMFD
    return session.request(F.GET_INFLIGHT_FD, p.Inflight(0, 0, 1, 128))


@pytest.mark.parametrize(
    ("ask", "data", "count", "kind", "text"),
    [
        (None, frame(F.GET_FEATURES, bytes(8), reply=True), 1, InvalidMessage, "a reply to nothing"),
        (
            _ask_features,
            frame(F.GET_FEATURES, bytes(8)),
            1,
            InvalidMessage,
            "a request where a reply was due",
        ),
        (
            _ask_features,
            frame(F.SET_OWNER, bytes(8), reply=True),
            1,
            InvalidMessage,
            "reply to SET_OWNER, expected",
        ),
        (_ask_features, frame(99, bytes(8), reply=True), 1, InvalidMessage, "reply to message 99, expected"),
        (_ask_features, frame(F.GET_FEATURES, bytes(7), reply=True), 0, InvalidMessage, "payload size 7"),
        (_ask_features, frame(F.GET_FEATURES, bytes(9), reply=True), 0, OversizedMessage, "size 9, limit 8"),
        (_ask_features, frame(F.GET_FEATURES, size=0xFFFFFFFF, reply=True), 0, OversizedMessage, "limit 8"),
        (
            _ask_features,
            frame(F.GET_FEATURES, bytes(8), reply=True),
            1,
            IncorrectFds,
            "reply: 1 file descriptors",
        ),
        (
            _ask_features,
            frame(F.GET_FEATURES, bytes(8), reply=True, version=2),
            0,
            InvalidMessage,
            "version 2",
        ),
        (_ask_ack, frame(F.SET_OWNER, b"", reply=True), 0, InvalidMessage, "SET_OWNER: reply: .* size 0"),
        (_ask_ack, frame(F.SET_OWNER, bytes(16), reply=True), 0, OversizedMessage, "size 16, limit 8"),
        (
            _ask_ack,
            frame(F.SET_OWNER, bytes(8), reply=True),
            2,
            IncorrectFds,
            "2 file descriptors, must be 0",
        ),
        (
            _ask_config,
            frame(F.GET_CONFIG, bytes(13), reply=True),
            0,
            InvalidMessage,
            "field size 0, but 1 bytes",
        ),
        (_ask_inflight, frame(F.GET_INFLIGHT_FD, bytes(24), reply=True), 2, IncorrectFds, "must be 0 to 1"),
    ],
)
def test_reply_that_ends_the_session(
    ask: Callable[[Session], Outgoing] | None,
    data: bytes,
    count: int,
    kind: type[ProtocolError],
    text: str,
    no_leaks: None,
) -> None:
    session = frontend()
    if ask is not None:
        ask(session)
    with descriptors(count) as fds, pytest.raises(kind, match=text) as caught:
        feed(session, data, fds)
    assert not any(map(is_open, fds))
    assert caught.value.message is None
    with pytest.raises(InvalidState):
        session.request(F.GET_FEATURES)


@pytest.mark.parametrize("body", [b"", p.Config(0, 0, 0, b"").pack()], ids=["no payload", "size 0"])
def test_config_that_the_peer_refused(body: bytes) -> None:
    session = frontend()
    _ask_config(session)
    [reply] = feed(session, frame(F.GET_CONFIG, body, reply=True))
    assert reply.payload in (p.EMPTY, p.Config(0, 0, 0, b""))


def test_empty_inflight_buffer_comes_without_a_descriptor() -> None:
    session = frontend()
    _ask_inflight(session)
    [reply] = feed(session, frame(F.GET_INFLIGHT_FD, bytes(24), reply=True))
    assert reply.payload == p.Inflight(0, 0, 0, 0)
    assert reply.take_fd() is None


@pytest.mark.parametrize("body", [b"", bytes(8), bytes(16)])
def test_value_of_a_log_base_reply_means_nothing(body: bytes) -> None:
    session = frontend(ProtocolF.LOG_SHMFD)
    assert session.request(F.SET_LOG_BASE, p.Log(4096), [0]).expects_reply
    [reply] = feed(session, frame(F.SET_LOG_BASE, body, reply=True))
    assert not reply.is_ack


# -- what was negotiated ----------------------------------------------------------------------------


def test_offered_features_are_seen_on_both_sides() -> None:
    front, back = frontend(), backend()
    outgoing = front.request(F.GET_PROTOCOL_FEATURES)
    [request] = feed(back, outgoing.data)
    reply = back.reply(request, p.U64(ProtocolF.MQ))
    feed(front, reply.data)
    assert front.offered_protocol_features == back.offered_protocol_features == ProtocolF.MQ
    # GET_QUEUE_NUM needs MQ to be offered, not to be acknowledged.
    [queues] = feed(back, front.request(F.GET_QUEUE_NUM).data)
    assert queues.name == "GET_QUEUE_NUM"


def test_queue_num_without_the_offer_is_inactive() -> None:
    with pytest.raises(InactiveFeature, match="GET_QUEUE_NUM: VHOST_USER_PROTOCOL_F_MQ was not negotiated"):
        feed(backend(), frame(F.GET_QUEUE_NUM))


def test_enable_is_accepted_before_anything_was_negotiated() -> None:
    """QEMU sends it before SET_FEATURES, DPDK even if protocol features were never offered."""
    [message] = feed(backend(), ENABLE)
    assert message.payload == p.VringState(0, 1)


def test_virtio_features_gate_too() -> None:
    session = Session(Role.BACKEND, serves=FRONTEND)
    data = frame(F.IOTLB_MSG, SAMPLES[p.Iotlb].pack())
    with pytest.raises(InactiveFeature, match="IOTLB_MSG: VIRTIO_F_ACCESS_PLATFORM was not negotiated"):
        feed(session, data)
    session.features = VirtioF.ACCESS_PLATFORM
    [message] = feed(session, data)
    assert message.own_reply


def test_back_end_requests_travel_the_other_way(no_leaks: None) -> None:
    back = Session(Role.BACKEND, Channel.BACKEND_REQ)
    front = Session(Role.FRONTEND, Channel.BACKEND_REQ)
    for session in (back, front):
        session.protocol_features = ProtocolF.CONFIG | ProtocolF.REPLY_ACK
    outgoing = back.request(BackendMsg.BACKEND_CONFIG_CHANGE_MSG)
    [message] = feed(front, outgoing.data)
    assert message.spec is BACKEND[2]
    ack = front.ack(message)
    assert ack is not None
    [reply] = feed(back, ack.data)
    assert reply.is_ack
    assert reply.status == 0
    with pytest.raises(InactiveFeature):
        feed(front, frame(BackendMsg.BACKEND_SHMEM_UNMAP, SAMPLES[p.MMap].pack()))


def test_trace_sees_both_directions_and_refusals() -> None:
    lines: list[str] = []
    session = Session(Role.BACKEND, trace=lambda what, message: lines.append(f"{what} {message}"))
    [message] = feed(session, frame(F.GET_FEATURES))
    session.reply(message, p.U64(VirtioF.VERSION_1))
    with pytest.raises(UnsupportedRequest) as caught:
        feed(session, frame(99, b"abc", need_reply=True))
    session.ack(caught.value.message, 1)
    assert lines == [
        "recv GET_FEATURES",
        "send GET_FEATURES reply value=0x100000000 (VERSION_1)",
        "recv message 99 data=<3 bytes> need_reply",
        "send message 99 reply value=0x1",
    ]


# -- anything at all --------------------------------------------------------------------------------

HEADERS = st.builds(
    lambda number, flags, body, lie: struct.pack("=III", number, flags, len(body) + lie) + body,
    st.integers(0, 50) | st.integers(0, p.U32_MAX),
    st.sampled_from([1, 1, 1, 9, 9, 5, 0, 2]) | st.integers(0, p.U32_MAX),
    st.binary(max_size=80),
    st.sampled_from([0, 0, 0, 1, -1, 4096, 0x7FFFFFFF]).map(abs),
)


@settings(max_examples=300)
@given(
    chunks=st.lists(st.tuples(HEADERS, st.integers(0, 3), st.integers(1, 40)), max_size=8),
    protocol_features=st.integers(0, (1 << 23) - 1),
    role=st.sampled_from(Role),
    channel=st.sampled_from(Channel),
)
def test_no_stream_crashes_or_leaks(
    chunks: list[tuple[bytes, int, int]], protocol_features: int, role: Role, channel: Channel
) -> None:
    before = len(holdings.open_fds())
    session = Session(role, channel, serves=range(100))
    session.protocol_features = protocol_features
    session.features = (1 << 64) - 1
    try:
        if session.requester:
            acks = True if channel is not Channel.GPU else None
            session.request(1, SAMPLES[session.table[1].request], need_reply=acks)
        for data, count, step in chunks:
            at = 0
            while at < len(data):
                size = min(step, session.wanted, len(data) - at)
                with descriptors(count if at == 0 else 0) as fds:
                    try:
                        message = session.receive(data[at : at + size], fds)
                    except ProtocolError as error:
                        if error.message is None:
                            raise
                        session.ack(error.message, 1)
                        message = None
                at += size
                if message is not None:
                    assert str(message)
                    session.ack(message, 1)
                    message.close()
        session.receive_eof()
    except ProtocolError as error:
        assert str(error)
    session.close()
    assert len(holdings.open_fds()) == before


# -- post-copy -----------------------------------------------------------------------------------------


SLOTS = int(ProtocolF.CONFIGURE_MEM_SLOTS | ProtocolF.REPLY_ACK)


@pytest.mark.parametrize("number", [F.SET_MEM_TABLE, F.ADD_MEM_REG, F.REM_MEM_REG, 0])
@pytest.mark.parametrize("need_reply", [False, True])
def test_acknowledgement_of_the_addresses(number: int, need_reply: bool) -> None:
    """No request, whatever its number says: QEMU repeats its last one, or 0 if there was none."""
    session = backend(SLOTS)
    session.postcopy = True
    (message,) = feed(session, frame(number, bytes(8), need_reply=need_reply))
    assert message.spec.name in ("SET_MEM_TABLE", "ADD_MEM_REG", "REM_MEM_REG")
    assert message.payload == p.U64(0)
    assert not message.own_reply
    assert (session.ack(message, 0) is not None) == need_reply


@pytest.mark.parametrize("number", [F.SET_MEM_TABLE, F.ADD_MEM_REG, F.REM_MEM_REG, 0])
def test_no_acknowledgement_without_post_copy(number: int, no_leaks: None) -> None:
    session = backend(SLOTS)
    kind: type[ProtocolError] = InvalidMessage if number else UnsupportedRequest
    refused(session, frame(number, bytes(8)), 0, kind, "num regions 0|must be 40|unknown")


def test_front_end_in_post_copy(no_leaks: None) -> None:
    session = frontend(SLOTS)
    session.postcopy = True
    region = p.MemoryRegion(0, 4096, 0, 0)
    with descriptors(1) as fds:
        request = session.request(F.ADD_MEM_REG, p.SingleRegion(region), fds)
        assert request.expects_reply
        assert not request.need_reply, "the reply says it"
        assert not session.request(F.ADD_MEM_REG, p.U64(0), need_reply=False).expects_reply
        assert session.outstanding == 1
        removal = session.request(F.REM_MEM_REG, p.SingleRegion(region))
        assert removal.need_reply, "that has no reply of its own"
        session.postcopy = False
        with pytest.raises(ValueError, match="payload U64"):
            session.request(F.ADD_MEM_REG, p.U64(0))
        os.close(fds[0])
