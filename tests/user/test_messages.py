# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Every row of the table: what it says, and that it is encoded, decoded, gated and shown by it."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from user.wire import SAMPLES, STRATEGIES, descriptors, right_number
from vhost.errors import InvalidMessage
from vhost.features import GpuF, ProtocolF, VhostF, VirtioF
from vhost.user import payloads as p
from vhost.user.messages import (
    BACKEND,
    FRONTEND,
    GPU,
    BackendMsg,
    FrontendMsg,
    GpuMsg,
    frame,
    table,
    table_rows,
    unknown,
)
from vhost.user.session import Session
from vhost.user.spec import Channel, Fds, Gate, Message, Outgoing, Policy, Role, Spec

ROWS = [*FRONTEND.values(), *BACKEND.values(), *GPU.values()]
EVERYTHING = (1 << 64) - 1
ALL_BUT_XEN = EVERYTHING & ~ProtocolF.XEN_MMAP

each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def channel_of(row: Spec) -> Channel:
    return next(channel for channel in Channel if table(channel).get(row.id) is row)


def acks(row: Spec) -> bool:
    """Can its sender ask for a status?"""
    return channel_of(row) is not Channel.GPU


def pair(row: Spec, *, protocol_features: int = ALL_BUT_XEN) -> tuple[Session, Session]:
    """The session that sends the row's requests, and the one that answers them."""
    channel = channel_of(row)
    other = Role.BACKEND if row.sender is Role.FRONTEND else Role.FRONTEND
    sessions = Session(row.sender, channel), Session(other, channel, serves=table(channel))
    for session in sessions:
        session.features = EVERYTHING
        session.protocol_features = protocol_features
    return sessions


def carry(outgoing: Outgoing, to: Session, fds: list[int]) -> Message:
    """What a transport does: the header by itself, then the payload."""
    assert to.wanted == 12
    message = to.receive(outgoing.data[:12], fds)
    if message is None:
        assert to.wanted == len(outgoing.data) - 12
        message = to.receive(outgoing.data[12:])
    assert message is not None
    return message


def test_rows_are_named_as_their_ids() -> None:
    for number, row in FRONTEND.items():
        assert FrontendMsg(number).name == row.name
        assert row.sender is Role.FRONTEND
    for number, row in BACKEND.items():
        assert BackendMsg(number).name == row.name
        assert row.sender is Role.BACKEND
    for number, row in GPU.items():
        assert GpuMsg(number).name == row.name
        assert row.sender is Role.BACKEND


def test_handlers_are_methods_and_do_not_collide() -> None:
    assert FRONTEND[FrontendMsg.SET_VRING_NUM].handler == "set_vring_num"
    assert BACKEND[BackendMsg.BACKEND_CONFIG_CHANGE_MSG].handler == "config_change_msg"
    for rows in (FRONTEND, BACKEND, GPU):
        handlers = [row.handler for row in rows.values()]
        assert len(set(handlers)) == len(handlers)
        assert all(handler.isidentifier() for handler in handlers)


def test_old_names_lead_to_the_rows() -> None:
    assert FrontendMsg.SET_SLAVE_REQ_FD is FrontendMsg.SET_BACKEND_REQ_FD
    for rows, enum in ((FRONTEND, FrontendMsg), (BACKEND, BackendMsg)):
        old = {row.old_name: row.id for row in rows.values() if row.old_name}
        aliases = {name: int(member) for name, member in enum.__members__.items() if name != member.name}
        assert old == aliases


@each_row
def test_row_makes_sense(row: Spec) -> None:
    assert row.doc.endswith(".")
    assert row.section
    assert row.request in STRATEGIES
    assert (row.policy is Policy.ACK) == (row.reply is None)
    if row.per_ring:
        assert row.ring_index(SAMPLES[row.request]) == 1
    else:
        assert row.ring_index(SAMPLES[row.request]) is None
    if row.refusal is not None:
        assert row.reply is not None
        assert isinstance(row.refusal, row.reply)
        assert row.reply_fds.complaint(0, row.refusal) is None, "a refusal brings no descriptor"
    if row.policy is Policy.ALWAYS and row.reply_fds != Fds():
        assert row.refusal is not None
    if row.feature is not None:
        assert row.feature_name.startswith(("VHOST_USER_", "VIRTIO_F_"))


@each_row
def test_row_as_plain_data(row: Spec) -> None:
    plain = json.loads(json.dumps(row.as_dict()))
    assert plain["id"] == row.id
    assert plain["handler"] == row.handler
    assert all(value is not None for value in plain.values())
    assert plain in table_rows()


@each_row
@pytest.mark.parametrize("need_reply", [False, True])
def test_request_arrives_as_it_was_sent(row: Spec, need_reply: bool, no_leaks: None) -> None:
    sender, receiver = pair(row)
    payload = SAMPLES[row.request]
    with descriptors(right_number(row, payload)) as fds:
        need_reply = need_reply and acks(row)
        outgoing = sender.request(row.id, payload, fds, need_reply=need_reply)
        assert outgoing.fds == tuple(fds)
        message = carry(outgoing, receiver, fds)
    assert message.spec is row
    assert message.payload == payload
    assert message.need_reply == need_reply
    assert message.fds == ([] if row.fds.discard else fds)
    assert row.name in str(message)
    assert row.name in str(outgoing)
    assert message.waits == (need_reply or message.own_reply) == outgoing.expects_reply
    message.close()


@each_row
def test_reply_arrives_as_it_was_sent(row: Spec, no_leaks: None) -> None:
    sender, receiver = pair(row)
    sender.postcopy = receiver.postcopy = True
    payload = SAMPLES[row.request]
    with descriptors(right_number(row, payload)) as fds:
        request = carry(sender.request(row.id, payload, fds, need_reply=acks(row)), receiver, fds)
    request.close()
    if not acks(row) and row.reply is None:
        assert receiver.ack(request, 1) is None
        return
    assert sender.outstanding == 1
    if row.reply is None:
        answer = receiver.ack(request, 0)
        assert answer is not None
        reply = carry(answer, sender, [])
        assert reply.is_ack
        assert reply.status == 0
    else:
        body = SAMPLES[row.reply]
        with descriptors(right_number(row, body, reply=True)) as fds:
            reply = carry(receiver.reply(request, body, fds), sender, fds)
            assert reply.fds == fds
        assert not reply.is_ack
        assert reply.payload == body
    assert reply.is_reply
    assert not reply.waits
    assert f"{row.name} reply" in str(reply)
    assert sender.outstanding == 0
    assert receiver.ack(request, 1) is None, "answered once"
    reply.close()


@each_row
def test_refusal_arrives_as_a_reply(row: Spec, no_leaks: None) -> None:
    sender, receiver = pair(row)
    payload = SAMPLES[row.request]
    with descriptors(right_number(row, payload)) as fds:
        request = carry(sender.request(row.id, payload, fds, need_reply=acks(row)), receiver, fds)
    request.close()
    if not acks(row) and row.reply is None:
        assert receiver.ack(request, 1) is None
        return
    refusal = receiver.ack(request, 7)
    if refusal is None:
        assert request.own_reply
        assert row.refusal is None
        assert request.waits, "so the session has to end"
        return
    assert not request.waits
    reply = carry(refusal, sender, [])
    assert reply.payload == (row.refusal if request.own_reply else p.U64(7))


@each_row
@settings(max_examples=20)  # the payload itself has its own test
@given(data=st.data())
def test_any_payload_of_the_row_survives(row: Spec, data: st.DataObject) -> None:
    sender, receiver = pair(row)
    payload = data.draw(STRATEGIES[row.request])
    with descriptors(right_number(row, payload)) as fds:
        message = carry(sender.request(row.id, payload, fds, need_reply=False), receiver, fds)
    message.close()
    assert message.payload == payload
    assert str(message).startswith(row.name)


@pytest.mark.parametrize("row", [FRONTEND[5], FRONTEND[37], FRONTEND[38]], ids=lambda row: row.name)
def test_xen_regions_are_longer(row: Spec, no_leaks: None) -> None:
    sender, receiver = pair(row, protocol_features=EVERYTHING)
    kind = p.XEN_VARIANT[row.request]
    payload = SAMPLES[kind]
    with descriptors(right_number(row, payload)) as fds:
        message = carry(sender.request(row.id, payload, fds), receiver, fds)
    message.close()
    assert message.payload == payload
    with pytest.raises(ValueError, match=f"must be {kind.__name__}"):
        sender.request(row.id, SAMPLES[row.request], [0] * right_number(row, SAMPLES[row.request]))


@each_row
def test_sizes_are_judged_by_the_row(row: Spec) -> None:
    largest = row.max_size(False)
    with pytest.raises(InvalidMessage, match=f"payload size {largest + 1}"):
        row.decode(bytes(largest + 1))
    if row.reply is None:
        with pytest.raises(InvalidMessage, match="it has no reply"):
            row.decode(b"", reply=True)
        assert row.max_size(True) == 0


@pytest.mark.parametrize("row", [row for row in ROWS if row.feature is not None], ids=lambda row: row.name)
def test_gate(row: Spec) -> None:
    assert row.feature is not None
    free = row.gate is Gate.ADVICE
    assert row.active(0, 0, 0) == free
    assert row.active(EVERYTHING, EVERYTHING, 0)
    if isinstance(row.feature, (ProtocolF, GpuF)):
        assert row.active(0, row.feature, 0)
        assert row.active(EVERYTHING, EVERYTHING & ~row.feature, 0) == free
        assert row.active(0, 0, row.feature) == (free or row.gate is Gate.OFFERED)
    else:
        assert isinstance(row.feature, (VirtioF, VhostF))
        assert row.active(row.feature, 0, 0)


def test_no_acks_on_the_gpu_socket() -> None:
    row = GPU[GpuMsg.GPU_CURSOR_POS]
    sender, receiver = pair(row)
    payload = SAMPLES[row.request]
    assert sender.request(row.id, payload).data == struct.pack("=IIIIII", 4, 0, 12, 1, 20, 30)
    with pytest.raises(ValueError, match="there are no acks"):
        sender.request(row.id, payload, need_reply=True)
    message = carry(Outgoing(frame(row.id, payload.pack(), need_reply=True), (), False, row), receiver, [])
    assert not message.waits, "the flag means nothing there"


def test_messages_without_a_feature_are_always_active() -> None:
    assert all(row.active(0, 0) for row in ROWS if row.feature is None)
    # What every front-end sends first must be.
    for name in ("GET_FEATURES", "GET_PROTOCOL_FEATURES", "SET_PROTOCOL_FEATURES", "SET_VRING_ENABLE"):
        assert FRONTEND[FrontendMsg[name]].active(0, 0)


def test_descriptor_rules() -> None:
    kick = FRONTEND[FrontendMsg.SET_VRING_KICK].fds
    assert kick.complaint(1, p.VringFd(0)) is None
    assert kick.complaint(0, p.VringFd(0)) == "0 file descriptors, must be 1"
    assert kick.complaint(0, p.VringFd(0, nofd=True)) is None
    assert kick.complaint(1, p.VringFd(0, nofd=True)) == "1 file descriptors, must be 0"
    tables = FRONTEND[FrontendMsg.SET_MEM_TABLE].fds
    assert tables.complaint(2, SAMPLES[p.MemTable]) is None
    assert tables.complaint(3, SAMPLES[p.MemTable]) == "3 file descriptors, must be 2"
    inflight = FRONTEND[FrontendMsg.GET_INFLIGHT_FD].reply_fds
    assert inflight.complaint(2, p.EMPTY) == "2 file descriptors, must be 0 to 1"
    state = FRONTEND[FrontendMsg.SET_DEVICE_STATE_FD].reply_fds
    assert state.complaint(1, p.U64(0)) is None
    assert state.complaint(1, p.U64(0x100)) is not None
    assert [str(rule) for rule in (kick, tables, inflight)] == ["1 or NOFD bit", "1 per region", "0..1"]
    assert str(FRONTEND[FrontendMsg.REM_MEM_REG].fds) == "0..1 (closed unused)"


def test_reply_policies() -> None:
    log = FRONTEND[FrontendMsg.SET_LOG_BASE]
    assert log.replies(ProtocolF.LOG_SHMFD)
    assert not log.replies(0)
    memory = FRONTEND[FrontendMsg.SET_MEM_TABLE]
    assert not memory.replies(EVERYTHING)
    assert memory.replies(0, postcopy=True)
    assert FRONTEND[FrontendMsg.IOTLB_MSG].replies(0)
    assert not FRONTEND[FrontendMsg.SET_OWNER].replies(EVERYTHING, postcopy=True)


def test_features_are_shown_by_name() -> None:
    row = FRONTEND[FrontendMsg.SET_PROTOCOL_FEATURES]
    assert (
        row.show(p.U64(ProtocolF.MQ | ProtocolF.CONFIG | 1 << 40)) == "value=0x10000000201 (MQ CONFIG bit 40)"
    )
    assert row.show(p.U64(0)) == "value=0x0 (none)"
    message = Message(FRONTEND[FrontendMsg.SET_STATUS], p.U64(0xF), need_reply=True)
    assert str(message) == "SET_STATUS value=0xf (ACKNOWLEDGE DRIVER DRIVER_OK FEATURES_OK) need_reply"


def test_unknown_row_can_be_shown() -> None:
    row = unknown(99, Role.FRONTEND)
    assert row.name == "message 99"
    assert str(Message(row, p.Opaque(b"abc"))) == "message 99 data=<3 bytes>"


def test_frame_is_three_words_and_the_payload() -> None:
    assert frame(18, p.VringState(1, 1).pack(), need_reply=True) == struct.pack("=IIIII", 18, 9, 8, 1, 1)
    assert frame(1, b"", reply=True) == struct.pack("=III", 1, 5, 0)
    assert frame(1, b"", version=2, size=0xFFFFFFFF) == struct.pack("=III", 1, 2, 0xFFFFFFFF)
