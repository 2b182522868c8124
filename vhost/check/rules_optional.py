# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Rules: the back-end's channel, IOTLB, in-band notifications, and what few back-ends offer."""

from __future__ import annotations

import os
import socket
import time
import uuid

from vhost.check.peer import BackendMsg as B
from vhost.check.peer import FrontendMsg as F
from vhost.check.peer import Peer
from vhost.check.rig import Rig, rig_for
from vhost.check.rule import Failed, Severity, Skipped, expect, prerequisite, rule
from vhost.check.target import ACCESS_PLATFORM, VERSION_1, Target
from vhost.features import ProtocolF
from vhost.user.messages import Channel
from vhost.user.payloads import EMPTY, U64, Iotlb, SharedObject, ShmemConfig, VringAddr, VringState

CHANNEL = "Back-end communication"
IOMMU = "IOMMU support"
INBAND = "In-band notifications"
_REQ = ProtocolF.BACKEND_REQ
_ACK = ProtocolF.REPLY_ACK
_INBAND = ProtocolF.INBAND_NOTIFICATIONS | ProtocolF.BACKEND_REQ | ProtocolF.REPLY_ACK
READ_WRITE = 3


def open_channel(target: Target, peer: Peer) -> Peer:
    """SET_BACKEND_REQ_FD; our end of the channel."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    channel = Peer(ours, target.timeout, channel=Channel.BACKEND_REQ)
    channel.protocol = peer.protocol
    target.peers.append(channel)
    with theirs:
        peer.do(F.SET_BACKEND_REQ_FD, EMPTY, [theirs.fileno()])
    return channel


def _with_channel(target: Target) -> tuple[Peer, Peer]:
    peer = target.session(protocol=int(_REQ))
    return peer, open_channel(target, peer)


@rule("channel.set", "SET_BACKEND_REQ_FD is accepted", section=CHANNEL, protocol=_REQ)
def channel_set(target: Target) -> None:
    _with_channel(target)


@rule(
    "channel.quiet",
    "A back-end on which nothing happens says nothing on its channel",
    section=CHANNEL,
    severity=Severity.SHOULD,
    protocol=_REQ,
)
def channel_quiet(target: Target) -> None:
    peer, channel = _with_channel(target)
    peer.sync()
    expect(channel.quiet(target.settle), "a message came on the channel, or its end")


@rule(
    "channel.again", "The channel can be replaced", section=CHANNEL, severity=Severity.SHOULD, protocol=_REQ
)
def channel_again(target: Target) -> None:
    peer, first = _with_channel(target)
    open_channel(target, peer)
    peer.sync()
    first.close()
    peer.sync()


@rule(
    "channel.closed",
    "A channel that the front-end closed leaves the session alive",
    section=CHANNEL,
    severity=Severity.ROBUST,
    protocol=_REQ,
)
def channel_closed(target: Target) -> None:
    peer, channel = _with_channel(target)
    channel.close()
    peer.sync()
    peer.sync()


@rule(
    "channel.no-socket",
    "A channel that is no socket is refused or harmless",
    section=CHANNEL,
    severity=Severity.ROBUST,
    protocol=_REQ,
)
def no_socket(target: Target) -> None:
    peer = target.session(protocol=int(_REQ))
    peer.survive(F.SET_BACKEND_REQ_FD, EMPTY, [target.eventfd()])


@rule(
    "channel.without-fd",
    "SET_BACKEND_REQ_FD without a descriptor is refused",
    section=CHANNEL,
    protocol=_REQ | _ACK,
)
def without_fd(target: Target) -> None:
    target.session(protocol=int(_REQ)).must_refuse(F.SET_BACKEND_REQ_FD, "no descriptor came with it")


@rule(
    "channel.garbage",
    "Garbage on the channel leaves the session alive",
    section=CHANNEL,
    severity=Severity.ROBUST,
    protocol=_REQ,
)
def channel_garbage(target: Target) -> None:
    peer, channel = _with_channel(target)
    channel.send_bytes(b"\xff" * 64)
    peer.sync()
    peer.quiet(target.settle)
    peer.sync()


# -- IOTLB -----------------------------------------------------------------------------------------


def _iommu(target: Target) -> tuple[Rig, Peer]:
    """Memory is shared, nothing is mapped; rings are placed by IOVAs, which are the guest addresses."""
    target.require_protocol(int(_REQ))
    rig = rig_for(target, features=VERSION_1 | ACCESS_PLATFORM, protocol=int(_REQ))
    with prerequisite("SET_BACKEND_REQ_FD and memory"):
        channel = open_channel(target, rig.peer)
        rig.share()
    return rig, channel


def _whole(rig: Rig, kind: int) -> Iotlb:
    region = rig.region
    return Iotlb(region.guest_addr, region.size, region.user_addr, READ_WRITE, kind)


def _iotlb(rig: Rig, message: Iotlb) -> int:
    return rig.peer.ask(F.IOTLB_MSG, message, need_reply=rig.peer.acks).u64


def _set_up(rig: Rig) -> None:
    for ring in rig.rings:
        rig.peer.do(F.SET_VRING_NUM, VringState(ring.index, rig.num))
        rig.peer.do(F.SET_VRING_BASE, VringState(ring.index, ring.base))
        at, layout = ring.addr, ring.layout
        iova = VringAddr(ring.index, 0, at + layout.desc, at + layout.used, at + layout.avail)
        rig.peer.do(F.SET_VRING_ADDR, iova)
        rig.give_call(ring)
        rig.give_kick(ring)
        rig.enable(ring)


@rule(
    "iotlb.update",
    "An IOTLB update is answered with 0",
    section=IOMMU,
    features=ACCESS_PLATFORM,
    device="any",
)
def iotlb_update(target: Target) -> None:
    rig, _ = _iommu(target)
    value = _iotlb(rig, _whole(rig, Iotlb.UPDATE))
    expect(value == 0, f"{value:#x}")
    rig.peer.sync()


@rule(
    "iotlb.invalidate",
    "An IOTLB invalidation is answered with 0",
    section=IOMMU,
    features=ACCESS_PLATFORM,
    device="any",
)
def iotlb_invalidate(target: Target) -> None:
    rig, _ = _iommu(target)
    with prerequisite("an update"):
        _iotlb(rig, _whole(rig, Iotlb.UPDATE))
    value = _iotlb(rig, _whole(rig, Iotlb.INVALIDATE))
    expect(value == 0, f"{value:#x}")


@rule(
    "iotlb.unknown",
    "An IOTLB message of an unknown type is answered with another value; or the session ends",
    section=IOMMU,
    severity=Severity.SHOULD,
    features=ACCESS_PLATFORM,
    device="any",
)
def iotlb_unknown(target: Target) -> None:
    rig, _ = _iommu(target)
    rig.peer.must_refuse(F.IOTLB_MSG, "there is no type 99", _whole(rig, 99))


@rule(
    "iotlb.mapped",
    "A ring works through what was mapped before",
    section=IOMMU,
    features=ACCESS_PLATFORM,
    device="any",
)
def iotlb_mapped(target: Target) -> None:
    rig, channel = _iommu(target)
    with prerequisite("an update"):
        expect(_iotlb(rig, _whole(rig, Iotlb.UPDATE)) == 0, "it was refused")
    _set_up(rig)
    for ring in rig.rings:
        ring.kick()
    sent = rig.submit()
    rig.main.kick()
    _serve_misses(rig, channel, lambda: rig.wait(timeout=0) is sent)
    sent.judge()


@rule(
    "iotlb.miss",
    "What is not mapped is asked for by a miss, and used when it is there",
    section=IOMMU,
    features=ACCESS_PLATFORM,
    device="any",
)
def iotlb_miss(target: Target) -> None:
    rig, channel = _iommu(target)
    _set_up(rig)
    sent = rig.submit()
    for ring in rig.rings:
        ring.kick()
    misses = _serve_misses(rig, channel, lambda: rig.wait(timeout=0) is sent)
    sent.judge()
    expect(misses, "the ring was processed without a mapping")


def _serve_misses(rig: Rig, channel: Peer, done: object) -> list[Iotlb]:
    """Answer misses a page at a time until it is done."""
    assert callable(done)
    misses: list[Iotlb] = []
    deadline = time.monotonic() + rig.target.timeout
    while not done():
        if time.monotonic() > deadline:
            raise Failed(
                f"the request did not come back within {rig.target.timeout:g} s; {len(misses)} misses came"
            )
        if channel.quiet(0.01):
            continue
        got = channel.receive()
        expect(got.number == B.BACKEND_IOTLB_MSG, f"message {got.number} came on the channel")
        miss = Iotlb.unpack(got.payload.ljust(32, b"\0"))
        expect(miss.type == Iotlb.MISS, f"an IOTLB message of type {miss.type} came")
        expect(miss.perm in (1, 2, 3), f"a miss with permissions {miss.perm}")
        misses.append(miss)
        page = miss.iova & ~0xFFF
        offset = page - rig.region.guest_addr
        expect(0 <= offset < rig.region.size, f"a miss at {miss.iova:#x}, where nothing is")
        value = _iotlb(rig, Iotlb(page, 4096, rig.region.user_addr + offset, READ_WRITE, Iotlb.UPDATE))
        expect(value == 0, f"the update for {page:#x} was refused with {value:#x}")
        if got.need_reply:
            channel.send(B.BACKEND_IOTLB_MSG, U64(0), reply=True)
    return misses


# -- in-band notifications -------------------------------------------------------------------------


@rule(
    "inband.companions",
    "INBAND_NOTIFICATIONS is offered with BACKEND_REQ and REPLY_ACK",
    section=INBAND,
    protocol=ProtocolF.INBAND_NOTIFICATIONS,
)
def inband_companions(target: Target) -> None:
    expect(target.protocol & int(_INBAND) == int(_INBAND), f"offered: {target.protocol:#x}")


@rule(
    "inband.alone",
    "The connection is closed when it is set without them",
    section=INBAND,
    severity=Severity.SHOULD,
    protocol=ProtocolF.INBAND_NOTIFICATIONS,
)
def inband_alone(target: Target) -> None:
    peer = target.connect()
    peer.ask(F.GET_FEATURES)
    peer.ask(F.GET_PROTOCOL_FEATURES)
    peer.send(F.SET_PROTOCOL_FEATURES, U64(int(ProtocolF.INBAND_NOTIFICATIONS)))
    expect(peer.ended(), "the connection stays open")


def _inband(target: Target) -> tuple[Rig, Peer]:
    rig = rig_for(target, protocol=int(_INBAND))
    with prerequisite("SET_BACKEND_REQ_FD, memory and a ring"):
        channel = open_channel(target, rig.peer)
        rig.share()
        for ring in rig.rings:
            rig.place(ring)
            rig.enable(ring)
    return rig, channel


@rule(
    "inband.kick",
    "A ring without descriptors is started by VRING_KICK, and calls by VRING_CALL",
    section=INBAND,
    protocol=_INBAND,
    device="any",
)
def inband_kick(target: Target) -> None:
    rig, channel = _inband(target)
    rig.main.queue.enable_callbacks()
    sent = rig.submit()
    # The back-end may wait for our answer to its call before it answers our kick.
    for ring in rig.rings:
        rig.peer.send(F.VRING_KICK, VringState(ring.index, 0), need_reply=True)
    call = channel.receive()
    expect(call.number == B.BACKEND_VRING_CALL, f"message {call.number} came instead of VRING_CALL")
    state = VringState.unpack(call.payload)
    expect(state.index == rig.main.index, f"a call for ring {state.index}")
    expect(state.num == 0, f"num is {state.num}, must be 0")
    if call.need_reply:
        channel.send(B.BACKEND_VRING_CALL, U64(0), reply=True)
    for _ in rig.rings:
        value = rig.peer.answer(F.VRING_KICK).u64
        expect(value == 0, f"VRING_KICK: refused with {value:#x}")
    rig.finish(sent)


@rule(
    "inband.beyond", "VRING_KICK of a ring that does not exist is refused", section=INBAND, protocol=_INBAND
)
def inband_beyond(target: Target) -> None:
    peer = target.session(protocol=int(_INBAND))
    peer.must_refuse(F.VRING_KICK, "there is no such ring", VringState(0xFFFF, 0))


# -- what few back-ends offer ----------------------------------------------------------------------


@rule(
    "endian.set",
    "SET_VRING_ENDIAN takes little and big",
    section="Front-end message types, SET_VRING_ENDIAN",
    protocol=ProtocolF.CROSS_ENDIAN,
)
def endian_set(target: Target) -> None:
    peer = target.session(protocol=int(ProtocolF.CROSS_ENDIAN), features=0)  # for legacy devices
    for value in (0, 1, 0):
        peer.do(F.SET_VRING_ENDIAN, VringState(0, value))


@rule(
    "endian.other",
    "SET_VRING_ENDIAN refuses other values",
    section="Front-end message types, SET_VRING_ENDIAN",
    protocol=ProtocolF.CROSS_ENDIAN | _ACK,
)
def endian_other(target: Target) -> None:
    peer = target.session(protocol=int(ProtocolF.CROSS_ENDIAN), features=0)  # for legacy devices
    peer.must_refuse(F.SET_VRING_ENDIAN, "2 is no byte order", VringState(0, 2))


@rule(
    "object.unknown",
    "GET_SHARED_OBJECT of an unknown UUID is answered without a descriptor",
    section="Front-end message types, GET_SHARED_OBJECT",
    protocol=ProtocolF.SHARED_OBJECT,
)
def object_unknown(target: Target) -> None:
    peer = target.session(protocol=int(ProtocolF.SHARED_OBJECT))
    got = peer.ask(F.GET_SHARED_OBJECT, SharedObject(uuid.UUID(int=0x1234)))
    expect(not got.fds, "a descriptor came")
    peer.sync()


@rule(
    "shmem.config",
    "GET_SHMEM_CONFIG gives sizes that are multiples of a page, and their number",
    section="Front-end message types, GET_SHMEM_CONFIG",
    protocol=ProtocolF.SHMEM_MAP,
)
def shmem_config(target: Target) -> None:
    peer = target.session(protocol=int(ProtocolF.SHMEM_MAP))
    first = peer.ask(F.GET_SHMEM_CONFIG).payload
    expect(
        len(first) == ShmemConfig.MAX_SIZE, f"a payload of {len(first)} bytes, must be {ShmemConfig.MAX_SIZE}"
    )
    try:
        sizes = ShmemConfig.unpack(first).sizes
    except Exception as error:
        raise Failed(str(error)) from None
    page = os.sysconf("SC_PAGESIZE")
    odd = [size for size in sizes if size % page]
    expect(not odd, f"sizes {odd}")
    expect(peer.ask(F.GET_SHMEM_CONFIG).payload == first, "the second answer is another one")


@rule(
    "mtu.valid",
    "NET_SET_MTU of 1500 is granted",
    section="Front-end message types, NET_SET_MTU",
    protocol=ProtocolF.MTU | _ACK,
)
def mtu_valid(target: Target) -> None:
    peer = _mtu(target)
    peer.do(F.NET_SET_MTU, U64(1500))


@rule(
    "mtu.invalid",
    "NET_SET_MTU of what is no MTU is refused",
    section="Front-end message types, NET_SET_MTU",
    protocol=ProtocolF.MTU | _ACK,
)
def mtu_invalid(target: Target) -> None:
    for value in (0, 1 << 32):
        _mtu(target).must_refuse(
            F.NET_SET_MTU, f"{value} is no MTU (VIRTIO 5.1.4.1: 68 to 65535)", U64(value)
        )


def _mtu(target: Target) -> Peer:
    if not target.offered >> 3 & 1:
        raise Skipped("VIRTIO_NET_F_MTU is not offered")
    return target.session(protocol=int(ProtocolF.MTU), features=VERSION_1 | 1 << 3)


@rule(
    "rarp.send",
    "SEND_RARP is granted",
    section="Front-end message types, SEND_RARP",
    protocol=ProtocolF.RARP,
    writes=True,
)
def rarp(target: Target) -> None:
    peer = target.session(protocol=int(ProtocolF.RARP))
    peer.do(F.SEND_RARP, U64(0x0100_0000_0002))


@rule(
    "crypto.close-unknown",
    "CLOSE_CRYPTO_SESSION of an unknown session does no harm",
    section="Front-end message types, CLOSE_CRYPTO_SESSION",
    severity=Severity.ROBUST,
    protocol=ProtocolF.CRYPTO_SESSION,
)
def crypto_close(target: Target) -> None:
    target.session(protocol=int(ProtocolF.CRYPTO_SESSION)).survive(F.CLOSE_CRYPTO_SESSION, U64(0x7FFF_FFFF))
