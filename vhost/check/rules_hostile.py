# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Rules: input that no front-end in its right mind sends. The session may end; the back-end may not."""

from __future__ import annotations

import random
import socket
import struct

from vhost.check.peer import FrontendMsg as F
from vhost.check.peer import Peer
from vhost.check.rule import Failed, PeerClosed, Severity, expect, rule
from vhost.check.target import Target
from vhost.features import ProtocolF
from vhost.user.messages import FRONTEND, frame
from vhost.user.payloads import U64, VringState

SECTION = "Message Specification"
ROBUST = Severity.ROBUST
_FIXED = (F.SET_FEATURES, F.SET_VRING_NUM, F.SET_VRING_ADDR, F.SET_VRING_BASE)


@rule("hostile.garbage", "Garbage ends the session at most", section=SECTION, severity=ROBUST)
def garbage(target: Target) -> None:
    for seed in range(4):
        peer = target.connect()
        _pour(peer, random.Random(seed).randbytes(4096))
        peer.ended(target.settle)


def _pour(peer: Peer, data: bytes) -> None:
    try:
        peer.send_bytes(data)
    except Failed:
        return


@rule(
    "hostile.huge-size",
    "A header that announces 4 GiB ends the session at most",
    section=SECTION,
    severity=ROBUST,
)
def huge_size(target: Target) -> None:
    for number in (F.GET_FEATURES, F.SET_MEM_TABLE, 99):
        peer = target.connect()
        _pour(peer, frame(number, b"", size=0xFFFFFFFF) + bytes(64))
        peer.ended(target.settle)


@rule(
    "hostile.short-payload",
    "A payload that is too short is refused, or the session ends",
    section=SECTION,
    severity=Severity.SHOULD,
    protocol=ProtocolF.REPLY_ACK,
)
def short_payload(target: Target) -> None:
    for number in _FIXED:
        target.session().must_refuse(number, "its payload has 3 bytes", b"\0\0\0")


@rule(
    "hostile.empty-payload",
    "A request without the payload that it must have does no harm",
    section=SECTION,
    severity=ROBUST,
)
def empty_payload(target: Target) -> None:
    for number, row in FRONTEND.items():
        if row.request.MIN_SIZE and row.feature is None:
            peer = target.session()
            peer.send(number)
            peer.ended(target.settle / 4)


@rule("hostile.long-payload", "A payload that is too long does no harm", section=SECTION, severity=ROBUST)
def long_payload(target: Target) -> None:
    for number in _FIXED:
        peer = target.session()
        peer.survive(number, b"\0" * 200)


@rule(
    "hostile.get-with-payload",
    "A payload with a request that has none does no harm",
    section=SECTION,
    severity=ROBUST,
)
def get_with_payload(target: Target) -> None:
    peer = target.session()
    peer.send(F.GET_FEATURES, b"\xff" * 64)
    peer.ended(target.settle)


@rule(
    "hostile.unasked-fds",
    "Descriptors with a request that has none are closed",
    section="Communication",
    severity=ROBUST,
)
def unasked_fds(target: Target) -> None:
    peer = target.session()
    before = target.open_fds()
    try:
        for _ in range(8):
            peer.send(F.SET_VRING_NUM, VringState(0, 16), [target.eventfd(), target.eventfd()])
        peer.sync()
    except PeerClosed:
        return
    after = target.open_fds()
    expect(
        after <= before, f"{before} descriptors were open before, {after} are after 8 messages with two each"
    )


@rule(
    "hostile.many-fds",
    "253 descriptors with one message end the session at most",
    section="Communication",
    severity=ROBUST,
)
def many_fds(target: Target) -> None:
    peer = target.session()
    fd = target.eventfd()
    try:
        peer.survive(F.SET_VRING_KICK, U64(0), [fd] * 253)
    except PeerClosed:
        return


@rule(
    "hostile.fds-per-byte",
    "A message of which each byte brings a descriptor does no harm",
    section="Communication",
    severity=ROBUST,
)
def fds_per_byte(target: Target) -> None:
    peer = target.session()
    fd = target.eventfd()
    try:
        for byte in frame(F.SET_VRING_KICK, U64(0).pack()):
            peer.send_bytes(bytes([byte]), [fd])
    except PeerClosed:
        return
    peer.ended(target.settle)


@rule(
    "hostile.wrong-fd",
    "A kick that is a plain file does no harm",
    section="Front-end message types, SET_VRING_KICK",
    severity=ROBUST,
)
def wrong_fd(target: Target) -> None:
    peer = target.session()
    with open("/dev/zero", "rb") as file:
        peer.survive(F.SET_VRING_KICK, U64(0), [file.fileno()])
    a, b = socket.socketpair()
    with a, b:
        if not peer.closed:
            peer.survive(F.SET_VRING_CALL, U64(0), [a.fileno()])


@rule(
    "hostile.mem-count",
    "A table of 4 billion regions in 8 bytes does no harm",
    section="Multiple Memory regions description",
    severity=ROBUST,
)
def mem_count(target: Target) -> None:
    target.session().survive(F.SET_MEM_TABLE, struct.pack("=II", 0xFFFFFFFF, 0))


@rule(
    "hostile.flood",
    "A thousand requests at once are answered, or the session ends",
    section="Communication",
    severity=ROBUST,
)
def flood(target: Target) -> None:
    peer = target.connect()
    many = 1000
    peer.transcript.append(f"-> GET_FEATURES x {many}")
    sent = 0
    data = memoryview(frame(F.GET_FEATURES) * many)
    came = 0
    try:
        while came < many:
            if sent < len(data):
                peer.send_bytes(bytes(data[sent : sent + 1200]), quiet=True)
                sent += 1200
            while came < many and (sent >= len(data) or not peer.quiet(0)):
                peer.receive()
                del peer.transcript[1:]
                came += 1
    except PeerClosed:
        return
    peer.sync()


@rule(
    "hostile.not-served",
    "Each request of the specification that was not negotiated is refused, or the session ends",
    section="Communication",
    severity=Severity.SHOULD,
    protocol=ProtocolF.REPLY_ACK,
)
def not_served(target: Target) -> None:
    granted = []
    for number, row in FRONTEND.items():
        if (
            not isinstance(row.feature, ProtocolF)
            or row.feature_bit & target.protocol
            or row.reply
            or row.fds.most
        ):
            continue
        if not target.session().refusal(number, bytes(row.request.MIN_SIZE)):
            granted.append(row.name)
    expect(not granted, f"granted although the feature is not offered: {' '.join(granted)}")


@rule(
    "hostile.get-not-served",
    "A request with a reply that was not negotiated does not hang: it is answered, or the session ends",
    section="Communication",
    severity=ROBUST,
    protocol=ProtocolF.REPLY_ACK,
)
def get_not_served(target: Target) -> None:
    for number, row in FRONTEND.items():
        if isinstance(row.feature, ProtocolF) and not row.feature_bit & target.protocol and row.reply:
            try:
                target.session().ask(number, bytes(row.request.MIN_SIZE), need_reply=True)
            except PeerClosed:
                continue
