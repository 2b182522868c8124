# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Rules: the configuration space."""

from __future__ import annotations

from vhost.check.peer import Content, Peer
from vhost.check.peer import FrontendMsg as F
from vhost.check.rule import Failed, NoReply, PeerClosed, Severity, expect, prerequisite, rule
from vhost.check.target import Target
from vhost.features import ProtocolF
from vhost.user.payloads import Config
from vhost.virtio_blk import BlkConfig

GET = "Front-end message types, GET_CONFIG"
SET = "Front-end message types, SET_CONFIG"
_CONFIG = ProtocolF.CONFIG


def _known(target: Target) -> tuple[Peer, bytes]:
    peer = target.session()
    with prerequisite("GET_CONFIG"):
        return peer, target.config(peer)


def _raw(offset: int, size: int, payload: int, flags: int = 0) -> bytes:
    """A payload whose fields need not be true."""
    return b"".join(value.to_bytes(4, "little") for value in (offset, size, flags)) + bytes(payload)


@rule("config.get", "The configuration space can be read", section=GET, protocol=_CONFIG)
def get(target: Target) -> None:
    data = target.config(target.session())
    expect(len(data) >= 8, f"{len(data)} bytes")


@rule("config.size", "The reply's payload has the request's size", section=GET, protocol=_CONFIG)
def size(target: Target) -> None:
    peer, data = _known(target)
    for length in (1, 4, 8, len(data)):
        got = peer.ask(F.GET_CONFIG, Config(0, length, 0, bytes(length))).payload
        expect(len(got) == 12 + length, f"{length} bytes were asked for, {len(got) - 12} came")
        field = Config.unpack(got).size
        expect(field == length, f"{length} bytes were asked for, the field says {field}")


@rule("config.content", "Parts of it read as the whole does", section=GET, protocol=_CONFIG)
def content(target: Target) -> None:
    peer, data = _known(target)
    part = Config.unpack(peer.ask(F.GET_CONFIG, Config(0, 8, 0, bytes(8))).payload).payload
    expect(part == data[:8], f"bytes 0 to 8 are {part.hex()}, of the whole {data[:8].hex()}")


@rule(
    "config.offset",
    "An offset other than 0 is minded",
    section=GET,
    severity=Severity.SHOULD,
    protocol=_CONFIG,
)
def offset(target: Target) -> None:
    peer, data = _known(target)
    got = peer.ask(F.GET_CONFIG, Config(4, 4, 0, bytes(4))).payload
    if len(got) <= 12:
        raise Failed(f"4 bytes at offset 4 were refused, of {len(data)}")
    part = Config.unpack(got).payload
    expect(part == data[4:8], f"bytes 4 to 8 are {part.hex()}, of the whole {data[4:8].hex()}")


def _refused_or_whole(peer: Peer, content: Content, size: int) -> None:
    """A read that may be too long: of that size, or refused by a size of 0, or by the end of the session."""
    try:
        got = peer.ask(F.GET_CONFIG, content)
    except PeerClosed:
        return
    length = max(0, len(got.payload) - 12)
    expect(length in (0, size), f"{size} bytes were asked for, {length} came")


@rule(
    "config.long",
    "A read of 257 bytes, more than QEMU's space, has that size or none",
    section=GET,
    protocol=_CONFIG,
)
def long(target: Target) -> None:
    _refused_or_whole(target.session(), _raw(0, 257, 257), 257)


@rule(
    "config.too-long",
    "A read of 4097 bytes, more than any space, does no harm",
    section=GET,
    severity=Severity.ROBUST,
    protocol=_CONFIG,
)
def too_long(target: Target) -> None:
    _refused_or_whole(target.session(), _raw(0, 4097, 4097), 4097)


@rule(
    "config.nothing",
    "A read of no bytes does no harm",
    section=GET,
    severity=Severity.ROBUST,
    protocol=_CONFIG,
)
def nothing(target: Target) -> None:
    _refused_or_whole(target.session(), _raw(0, 0, 0), 0)


@rule(
    "config.beyond",
    "A read that begins beyond the end does no harm",
    section=GET,
    severity=Severity.ROBUST,
    protocol=_CONFIG,
)
def beyond(target: Target) -> None:
    for start in (250, 4096, 0xFFFFFFFC):
        _refused_or_whole(target.session(), _raw(start, 8, 8), 8)


@rule(
    "config.lie",
    "A size that does not fit the payload is refused or ignored, without a hang",
    section=GET,
    severity=Severity.ROBUST,
    protocol=_CONFIG,
)
def lie(target: Target) -> None:
    for claimed, real in ((200, 8), (8, 0), (0xFFFFFFFF, 8)):
        peer = target.session()
        try:
            got = peer.ask(F.GET_CONFIG, _raw(0, claimed, real))
        except PeerClosed:
            continue
        expect(len(got.payload) <= 12 + 4096, f"a reply of {len(got.payload)} bytes")


def _capacity(target: Target, flags: int) -> tuple[Peer, Config]:
    """The bytes that are there already: also an obedient back-end changes nothing."""
    peer, data = _known(target)
    return peer, Config(0, 8, flags, data[:8])


@rule(
    "config.read-only",
    "SET_CONFIG of a field that is read-only is refused",
    section=SET,
    device="blk",
    protocol=_CONFIG | ProtocolF.REPLY_ACK,
)
def read_only(target: Target) -> None:
    peer, payload = _capacity(target, 0)
    peer.must_refuse(F.SET_CONFIG, "the capacity is read-only", payload)


@rule(
    "config.migration",
    "SET_CONFIG for live migration is granted for read-only fields too",
    section=SET,
    severity=Severity.SHOULD,
    device="blk",
    protocol=_CONFIG | ProtocolF.REPLY_ACK,
)
def migration(target: Target) -> None:
    peer, payload = _capacity(target, 1)
    status = peer.status(F.SET_CONFIG, payload)
    expect(status == 0, f"SET_CONFIG with flag 1 was refused with {status:#x}")


@rule(
    "config.unchanged",
    "A SET_CONFIG that was refused changed nothing",
    section=SET,
    device="blk",
    protocol=_CONFIG,
)
def unchanged(target: Target) -> None:
    peer, payload = _capacity(target, 0)
    before = payload.payload
    peer.refusal(F.SET_CONFIG, payload)
    again = target.config(target.session())[:8]
    expect(again == before, f"the capacity was {before.hex()}, is {again.hex()}")


@rule(
    "config.set-beyond",
    "SET_CONFIG beyond the end does no harm",
    section=SET,
    severity=Severity.ROBUST,
    protocol=_CONFIG,
)
def set_beyond(target: Target) -> None:
    for start, length in ((250, 8), (0xFFFFFFF8, 8), (4096, 1)):
        peer = target.session()
        try:
            peer.survive(F.SET_CONFIG, _raw(start, length, length))
        except NoReply as error:
            raise Failed(f"SET_CONFIG of {length} bytes at {start:#x}: {error}") from None


@rule(
    "config.capacity",
    "A block device's capacity is in the first 8 bytes",
    section="VIRTIO 5.2.4",
    device="blk",
    protocol=_CONFIG,
)
def capacity(target: Target) -> None:
    _, data = _known(target)
    expect(BlkConfig.unpack(data).capacity > 0, f"a capacity of 0 sectors in {data.hex()}")
