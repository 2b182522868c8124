# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Rules: the header, the order of answers, how messages lie in the stream."""

from __future__ import annotations

from vhost.check.peer import FrontendMsg as F
from vhost.check.peer import name_of
from vhost.check.rule import Severity, expect, rule
from vhost.check.target import Target
from vhost.features import ProtocolF, VhostF
from vhost.user.messages import frame
from vhost.user.payloads import VringState
from vhost.user.spec import REPLY_FLAG, VERSION, VERSION_MASK

HEADER = "Message Specification, Header"
PAYLOAD = "Message Specification, Payload"
COMMUNICATION = "Communication"
_PROTOCOL = int(VhostF.PROTOCOL_FEATURES)


@rule("header.version", "A reply has version 1", section=HEADER)
def version(target: Target) -> None:
    peer = target.connect()
    peer.send(F.GET_FEATURES)
    flags = peer.receive().flags
    expect(flags & VERSION_MASK == VERSION, f"flags {flags:#x}: version {flags & VERSION_MASK}")


@rule("header.reply-flag", "A reply has the reply flag", section=HEADER)
def reply_flag(target: Target) -> None:
    peer = target.connect()
    peer.send(F.GET_FEATURES)
    flags = peer.receive().flags
    expect(flags & REPLY_FLAG, f"flags {flags:#x}: bit 2 is not set")


@rule("header.request-id", "A reply repeats the request's type", section=HEADER)
def request_id(target: Target) -> None:
    peer = target.connect()
    numbers = [F.GET_FEATURES] + [F.GET_PROTOCOL_FEATURES] * bool(target.offered & _PROTOCOL)
    for number in numbers:
        peer.send(number)
        got = peer.receive().number
        expect(got == number, f"{number.name} was answered with request type {got}")


@rule("header.u64-size", "The payload of a reply that is a u64 has 8 bytes", section=PAYLOAD)
def u64_size(target: Target) -> None:
    peer = target.connect()
    assert peer.ask(F.GET_FEATURES).u64 >= 0
    if target.offered & _PROTOCOL:
        assert peer.ask(F.GET_PROTOCOL_FEATURES).u64 >= 0


@rule("header.state-size", "The reply to GET_VRING_BASE is a vring state of 8 bytes", section=PAYLOAD)
def state_size(target: Target) -> None:
    peer = target.session()
    got = peer.ask(F.GET_VRING_BASE, VringState(0, 0))
    expect(len(got.payload) == 8, f"a payload of {len(got.payload)} bytes")


@rule("header.order", "Requests that were sent together are answered in their order", section=COMMUNICATION)
def order(target: Target) -> None:
    peer = target.connect()
    kinds = [F.GET_FEATURES, F.GET_PROTOCOL_FEATURES] if target.offered & _PROTOCOL else [F.GET_FEATURES]
    sent = (kinds * 8)[:8]
    peer.send_bytes(b"".join(frame(number) for number in sent))
    for place, number in enumerate(sent):
        got = peer.receive().number
        expect(got == number, f"answer {place} is to {name_of(got)}, request {place} was {number.name}")


@rule(
    "header.byte-by-byte",
    "A message that arrives in pieces is one message",
    section=COMMUNICATION,
    severity=Severity.ROBUST,
)
def byte_by_byte(target: Target) -> None:
    peer = target.connect()
    for byte in frame(F.GET_FEATURES):
        peer.send_bytes(bytes([byte]))
        peer.drained(target.settle / 4)
    value = peer.answer(F.GET_FEATURES).u64
    expect(value == target.offered, f"features {value:#x}, on another connection {target.offered:#x}")


@rule(
    "header.payload-apart",
    "A payload may arrive after its header",
    section=COMMUNICATION,
    severity=Severity.ROBUST,
)
def payload_apart(target: Target) -> None:
    peer = target.session()
    whole = frame(F.SET_VRING_NUM, VringState(0, 16).pack())
    for piece in (whole[:12], whole[12:15], whole[15:]):
        peer.send_bytes(piece)
        peer.drained(target.settle)
    peer.sync()


@rule(
    "header.no-unasked-reply",
    "A request without a reply of its own is not answered unasked",
    section=COMMUNICATION,
)
def no_unasked_reply(target: Target) -> None:
    peer = target.session()
    peer.send(F.SET_VRING_NUM, VringState(0, 16))
    peer.send(F.SET_VRING_BASE, VringState(0, 0))
    peer.sync()


@rule(
    "header.unknown-request",
    "An unknown request gets no answer where none was asked for; or the session ends",
    section=COMMUNICATION,
    severity=Severity.ROBUST,
)
def unknown_request(target: Target) -> None:
    for number in (0, 200, 0x7FFFFFFF):
        target.session(without=int(ProtocolF.REPLY_ACK)).survive(number, b"\0" * 8)


@rule(
    "header.unknown-need-reply",
    "An unknown request with need_reply is refused, or the session ends",
    section="VHOST_USER_PROTOCOL_F_REPLY_ACK",
    protocol=ProtocolF.REPLY_ACK,
)
def unknown_need_reply(target: Target) -> None:
    for number in (0, 200, 0x7FFFFFFF):
        target.session().must_refuse(number, "there is no such request", b"\0" * 8)


@rule(
    "header.other-version",
    "A message of another version is not acted upon",
    section=HEADER,
    severity=Severity.SHOULD,
)
def other_version(target: Target) -> None:
    for number in (0, 2, 3):
        peer = target.session()
        peer.send(F.GET_FEATURES, version=number)
        closed = peer.ended(target.settle)
        answered = any(text.startswith("<- GET_FEATURES") for text in peer.transcript[-2:])
        expect(closed or not answered, f"a request of version {number} was answered")


@rule(
    "header.reply-as-request",
    "A request with the reply flag does no harm",
    section=HEADER,
    severity=Severity.ROBUST,
)
def reply_as_request(target: Target) -> None:
    peer = target.session()
    peer.send(F.GET_FEATURES, reply=True)
    peer.ended(target.settle)
