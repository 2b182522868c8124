# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Rules: features, protocol features, the owner, the number of queues."""

from __future__ import annotations

from vhost.check.peer import FrontendMsg as F
from vhost.check.peer import Peer
from vhost.check.rig import rig_for, running, work_for
from vhost.check.rule import NotOffered, Severity, expect, prerequisite, rule
from vhost.check.target import ACCESS_PLATFORM, LOG_ALL, PROTOCOL_FEATURES, VERSION_1, Target
from vhost.features import PROTOCOL_COMPANIONS, ProtocolF, VhostF, VirtioF, bits, feature_names
from vhost.user.payloads import U64, VringState

_FEATURES = "Front-end message types, {}"
_ALL_KNOWN = (1 << (max(int(bit) for bit in ProtocolF).bit_length())) - 1
_CHANNEL = int(
    ProtocolF.BACKEND_SEND_FD | ProtocolF.HOST_NOTIFIER | ProtocolF.INBAND_NOTIFICATIONS
    | ProtocolF.SHARED_OBJECT | ProtocolF.SHMEM_MAP
)  # fmt: skip
"""Features whose messages travel on the back-end's channel."""


def _offers_protocol(target: Target) -> None:
    if not target.offered & PROTOCOL_FEATURES:
        raise NotOffered("VHOST_USER_F_PROTOCOL_FEATURES")


@rule(
    "features.get",
    "GET_FEATURES is answered before anything else was said",
    section=_FEATURES.format("GET_FEATURES"),
)
def get(target: Target) -> None:
    target.connect().ask(F.GET_FEATURES)


@rule(
    "features.stable",
    "GET_FEATURES says the same each time",
    section=_FEATURES.format("GET_FEATURES"),
    severity=Severity.SHOULD,
)
def stable(target: Target) -> None:
    peer = target.session()
    later = peer.ask(F.GET_FEATURES).u64
    expect(later == target.offered, f"{target.offered:#x} at first, {later:#x} after SET_FEATURES")


@rule("features.version-1", "VIRTIO_F_VERSION_1 is offered", section="VIRTIO 6.1", severity=Severity.SHOULD)
def version_1(target: Target) -> None:
    expect(target.offered & VERSION_1, "a legacy device only")


def _set(target: Target, features: int) -> None:
    with prerequisite("a session"):
        peer = target.connect()
        target.negotiate(peer)
    peer.do(F.SET_FEATURES, U64(features))


@rule(
    "features.set-all", "All features that are offered can be set", section=_FEATURES.format("SET_FEATURES")
)
def set_all(target: Target) -> None:
    _set(target, target.offered & ~(LOG_ALL | ACCESS_PLATFORM))


@rule("features.set-few", "A subset of the features can be set", section=_FEATURES.format("SET_FEATURES"))
def set_few(target: Target) -> None:
    _set(target, target.offered & (VERSION_1 | PROTOCOL_FEATURES))


@rule("features.set-again", "The same features can be set again", section=_FEATURES.format("SET_FEATURES"))
def set_again(target: Target) -> None:
    peer = target.session()
    peer.do(F.SET_FEATURES, U64(peer.features))


@rule(
    "features.set-while-running",
    "The same features can be set again while a ring runs",
    section="Migration",
    device="any",
)
def set_while_running(target: Target) -> None:
    rig = running(target)
    rig.peer.do(F.SET_FEATURES, U64(rig.peer.features))
    rig.complete()


@rule(
    "features.foreign",
    "Features that were not offered are refused",
    section="Communication",
    severity=Severity.SHOULD,
    protocol=ProtocolF.REPLY_ACK,
)
def foreign(target: Target) -> None:
    with prerequisite("a session"):
        peer = target.connect()
        target.negotiate(peer)
    known = int(VirtioF.SR_IOV) | 1 << 42
    bit = next(1 << n for n in bits(known | ~target.offered & ((1 << 60) - 1)) if not target.offered >> n & 1)
    name = feature_names(bit, VirtioF, VhostF)[0]
    peer.must_refuse(F.SET_FEATURES, f"{name} was not offered", U64(peer_features(target) | bit))


def peer_features(target: Target) -> int:
    return target.offered & (VERSION_1 | PROTOCOL_FEATURES)


@rule(
    "features.enable-all",
    "SET_FEATURES without PROTOCOL_FEATURES enables all rings",
    section="Ring states",
    device="any",
)
def enable_all(target: Target) -> None:
    work_for(target)
    with prerequisite("a ring cannot be set up"):
        rig = rig_for(target)
        rig.peer.features &= ~PROTOCOL_FEATURES
        rig.peer.do(F.SET_FEATURES, U64(rig.peer.features))
        rig.set_up(enable=False)
    rig.complete()


# -- protocol features -----------------------------------------------------------------------------


@rule(
    "protocol.before-features",
    "GET and SET_PROTOCOL_FEATURES work before SET_FEATURES",
    section=_FEATURES.format("GET_PROTOCOL_FEATURES"),
)
def before_features(target: Target) -> None:
    _offers_protocol(target)
    peer = target.connect()
    offered = peer.ask(F.GET_PROTOCOL_FEATURES).u64
    peer.send(F.SET_PROTOCOL_FEATURES, U64(offered & int(ProtocolF.REPLY_ACK | ProtocolF.MQ)))
    peer.sync()


@rule(
    "protocol.stable",
    "GET_PROTOCOL_FEATURES says the same each time",
    section=_FEATURES.format("GET_PROTOCOL_FEATURES"),
    severity=Severity.SHOULD,
)
def protocol_stable(target: Target) -> None:
    _offers_protocol(target)
    peer = target.session()
    later = peer.ask(F.GET_PROTOCOL_FEATURES).u64
    expect(later == target.protocol, f"{target.protocol:#x} at first, {later:#x} later")


@rule(
    "protocol.known",
    "Only protocol features that the specification has are offered",
    section="Protocol features",
    severity=Severity.SHOULD,
)
def protocol_known(target: Target) -> None:
    _offers_protocol(target)
    foreign = target.protocol & ~_ALL_KNOWN
    expect(not foreign, f"{' '.join(feature_names(foreign, ProtocolF))} of {target.protocol:#x}")


@rule("protocol.none", "No protocol feature has to be set", section=_FEATURES.format("SET_PROTOCOL_FEATURES"))
def protocol_none(target: Target) -> None:
    _offers_protocol(target)
    peer = _protocol(target, 0)
    peer.send(F.SET_OWNER)
    peer.send(F.SET_FEATURES, U64(peer_features(target)))
    peer.sync()


@rule(
    "protocol.one-by-one",
    "Each protocol feature that stands alone can be set alone",
    section=_FEATURES.format("SET_PROTOCOL_FEATURES"),
    severity=Severity.SHOULD,
)
def one_by_one(target: Target) -> None:
    _offers_protocol(target)
    together = _CHANNEL | int(ProtocolF.BACKEND_REQ | ProtocolF.XEN_MMAP)
    for bit in bits(target.protocol & _ALL_KNOWN & ~together):
        if 1 << bit not in PROTOCOL_COMPANIONS:
            _protocol(target, 1 << bit).sync()


@rule(
    "protocol.all",
    "All protocol features that are offered can be set together",
    section=_FEATURES.format("SET_PROTOCOL_FEATURES"),
)
def protocol_all(target: Target) -> None:
    _offers_protocol(target)
    _protocol(target, target.protocol & ~int(ProtocolF.XEN_MMAP)).sync()


def _protocol(target: Target, chosen: int) -> Peer:
    peer = target.connect()
    with prerequisite("GET_PROTOCOL_FEATURES"):
        peer.ask(F.GET_FEATURES)
        peer.ask(F.GET_PROTOCOL_FEATURES)
    peer.send(F.SET_PROTOCOL_FEATURES, U64(chosen))
    peer.protocol = chosen
    return peer


@rule(
    "protocol.foreign",
    "Protocol features that were not offered are refused",
    section="Communication",
    severity=Severity.SHOULD,
    protocol=ProtocolF.REPLY_ACK,
)
def protocol_foreign(target: Target) -> None:
    peer = _protocol(target, target.protocol & int(ProtocolF.REPLY_ACK | ProtocolF.MQ))
    peer.must_refuse(
        F.SET_PROTOCOL_FEATURES, "bit 63 was not offered", U64(int(ProtocolF.REPLY_ACK) | 1 << 63)
    )


@rule(
    "protocol.mq",
    "MQ is offered, also with a fixed number of queues",
    section="Multiple queue support",
    severity=Severity.SHOULD,
)
def mq(target: Target) -> None:
    _offers_protocol(target)
    expect(target.protocol & ProtocolF.MQ, f"offered: {' '.join(feature_names(target.protocol, ProtocolF))}")


@rule(
    "protocol.channel",
    "What uses the back-end's channel is offered with BACKEND_REQ only",
    section="Back-end communication",
    severity=Severity.SHOULD,
)
def channel(target: Target) -> None:
    _offers_protocol(target)
    users = target.protocol & _CHANNEL
    names = " ".join(feature_names(users, ProtocolF))
    expect(not users or target.protocol & ProtocolF.BACKEND_REQ, f"{names} without BACKEND_REQ")


# -- the owner, the queues -------------------------------------------------------------------------


@rule("owner.set", "SET_OWNER begins a session", section=_FEATURES.format("SET_OWNER"))
def owner(target: Target) -> None:
    peer = target.connect()
    target.negotiate(peer)
    peer.sync()


@rule(
    "owner.reset",
    "RESET_OWNER discards no state of the connection",
    section=_FEATURES.format("RESET_OWNER"),
    severity=Severity.SHOULD,
    device="any",
)
def owner_reset(target: Target) -> None:
    rig = running(target)
    rig.peer.do(F.RESET_OWNER)
    for ring in rig.rings:
        rig.enable(ring)
    rig.complete()


@rule(
    "queues.number",
    "GET_QUEUE_NUM says that there is at least one queue",
    section="Multiple queue support",
    protocol=ProtocolF.MQ,
)
def number(target: Target) -> None:
    peer = target.session()
    first, second = (peer.ask(F.GET_QUEUE_NUM).u64 for _ in range(2))
    expect(1 <= first <= 0xFFFF, f"{first} queues")
    expect(first == second, f"{first} queues, then {second}")


@rule(
    "queues.usable",
    "Each queue below GET_QUEUE_NUM exists",
    section="Multiple queue support",
    protocol=ProtocolF.MQ | ProtocolF.REPLY_ACK,
)
def usable(target: Target) -> None:
    peer = target.session()
    for index in range(min(target.queues, 256)):
        peer.do(F.SET_VRING_NUM, VringState(index, 16))


@rule(
    "queues.beyond",
    "A queue far beyond GET_QUEUE_NUM is refused",
    section="Multiple queue support",
    severity=Severity.SHOULD,
    protocol=ProtocolF.MQ | ProtocolF.REPLY_ACK,
)
def beyond(target: Target) -> None:
    for index in (0xFFFF, 0x10000, 0xFFFFFFFF):
        target.session().must_refuse(
            F.SET_VRING_NUM, f"queue {index} does not exist ({target.queues} do)", VringState(index, 16)
        )
