# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Rules: REPLY_ACK. Each request with need_reply gets exactly one answer; those that have a reply of their
own get that, with the flag or without."""

from __future__ import annotations

from collections.abc import Callable

from vhost.check.peer import Content, Peer
from vhost.check.peer import FrontendMsg as F
from vhost.check.rig import Rig
from vhost.check.rule import expect, prerequisite, rule
from vhost.check.target import PROTOCOL_FEATURES, Target
from vhost.features import PROTOCOL_COMPANIONS, ProtocolF, VhostF
from vhost.user.messages import FRONTEND
from vhost.user.payloads import EMPTY, NOFD, U64, Config, Inflight, VringState

SECTION = "VHOST_USER_PROTOCOL_F_REPLY_ACK"
_PROTOCOL = int(VhostF.PROTOCOL_FEATURES)

Order = Callable[[Rig], tuple[Content, list[int]]]
"""A request that has to be granted: payload and descriptors, on a rig whose memory and ring are known."""

_ORDERS: dict[F, Order] = {
    F.SET_OWNER: lambda rig: (EMPTY, []),
    F.SET_FEATURES: lambda rig: (U64(rig.peer.features), []),
    F.SET_PROTOCOL_FEATURES: lambda rig: (U64(rig.peer.protocol), []),
    F.SET_VRING_NUM: lambda rig: (VringState(0, rig.num), []),
    F.SET_VRING_BASE: lambda rig: (VringState(0, rig.rings[0].base), []),
    F.SET_VRING_ADDR: lambda rig: (rig.rings[0].address(), []),
    F.SET_VRING_CALL: lambda rig: (U64(0), [rig.rings[0].call_fd]),
    F.SET_VRING_ERR: lambda rig: (U64(0), [rig.rings[0].err_fd]),
    F.SET_VRING_KICK: lambda rig: (U64(0), [rig.rings[0].kick_fd]),
    F.SET_VRING_ENABLE: lambda rig: (VringState(0, 1), []),
    F.SET_STATUS: lambda rig: (U64(1), []),
}
_GETS: dict[F, Content] = {
    F.GET_FEATURES: EMPTY,
    F.GET_PROTOCOL_FEATURES: EMPTY,
    F.GET_QUEUE_NUM: EMPTY,
    F.GET_VRING_BASE: VringState(0, 0),
    F.GET_CONFIG: Config(0, 8, 0, bytes(8)),
    F.GET_MAX_MEM_SLOTS: EMPTY,
    F.GET_STATUS: EMPTY,
    F.GET_INFLIGHT_FD: Inflight(0, 0, 1, 16),
    F.CHECK_DEVICE_STATE: EMPTY,
    F.GET_SHMEM_CONFIG: EMPTY,
    F.GET_VRING_BASE_SKIP_DRAIN: VringState(0, 0),
}


def _feature(number: F) -> int:
    """The protocol feature that a request needs, if one, with its companions."""
    row = FRONTEND[number]
    if not isinstance(row.feature, ProtocolF):
        return 0
    return row.feature_bit | PROTOCOL_COMPANIONS.get(row.feature_bit, 0)


def _session(target: Target, number: F, *, without: int = 0) -> Peer:
    return target.session(protocol=_feature(number), without=without)


def _rig(target: Target, number: F, *, without: int = 0) -> Rig:
    rig = Rig(target, _session(target, number, without=without))
    if number.name.startswith("SET_VRING"):
        with prerequisite("memory and a ring"):
            rig.share()
            if number not in (F.SET_VRING_NUM, F.SET_VRING_BASE):
                rig.place(rig.rings[0])
    return rig


def ack_once(target: Target, number: F) -> None:
    """Granted with 0 in 8 bytes, and nothing more comes."""
    if number is F.SET_OWNER:
        peer = target.connect()
        _negotiate_all_but_owner(target, peer)
        status = peer.status(number)
    elif number is F.SET_MEM_TABLE:
        rig = Rig(target, target.session(without=int(ProtocolF.CONFIGURE_MEM_SLOTS)))
        peer = rig.peer
        rig.share()
        status = 0
    else:
        rig = _rig(target, number)
        peer = rig.peer
        content, fds = _ORDERS[number](rig)
        status = peer.status(number, content, fds)
    expect(status == 0, f"{number.name}, which is in order, was refused with {status:#x}")
    peer.sync()


def _negotiate_all_but_owner(target: Target, peer: Peer) -> None:
    with prerequisite("protocol features cannot be negotiated"):
        peer.ask(F.GET_FEATURES)
        offered = peer.ask(F.GET_PROTOCOL_FEATURES).u64
        peer.protocol = offered & int(ProtocolF.REPLY_ACK | ProtocolF.MQ)
        peer.send(F.SET_PROTOCOL_FEATURES, U64(peer.protocol))


for _number in (*_ORDERS, F.SET_MEM_TABLE):
    rule(
        f"reply-ack.{_number.name}",
        f"{_number.name} with need_reply is answered once, with 0 for success",
        section=SECTION,
        protocol=int(ProtocolF.REPLY_ACK) | _feature(_number),
        number=_number,
    )(ack_once)


def get_once(target: Target, number: F) -> None:
    """need_reply brings no change: one answer, of the same kind as without."""
    if number is F.GET_PROTOCOL_FEATURES and not target.offered & PROTOCOL_FEATURES:
        return
    peer = _session(target, number)
    plain = peer.ask(number, _GETS[number])
    peer.sync()
    flagged = peer.ask(number, _GETS[number], need_reply=True)
    peer.sync()
    sizes = len(plain.payload), len(flagged.payload)
    expect(sizes[0] == sizes[1], f"{sizes[0]} bytes without need_reply, {sizes[1]} with it")


for _number in _GETS:
    rule(
        f"reply-ack.{_number.name}",
        f"{_number.name} with need_reply is answered once, as without",
        section=SECTION,
        protocol=int(ProtocolF.REPLY_ACK) | _feature(_number),
        number=_number,
    )(get_once)


@rule(
    "reply-ack.only-on-demand",
    "With REPLY_ACK, a request without need_reply is not acked",
    section=SECTION,
    protocol=ProtocolF.REPLY_ACK,
)
def only_on_demand(target: Target) -> None:
    rig = Rig(target, target.session())
    peer = rig.peer
    with prerequisite("memory and a ring"):
        rig.share()
        rig.place(rig.rings[0])
    for number, order in _ORDERS.items():
        if number in (F.SET_OWNER, F.SET_STATUS):
            continue  # the first is for once, the second needs a feature of its own
        content, fds = order(rig)
        peer.send(number, content, fds)
        peer.sync()


@rule(
    "reply-ack.failure",
    "A request that cannot be granted is answered with a value that is not 0; or the session ends",
    section=SECTION,
    protocol=ProtocolF.REPLY_ACK,
)
def failure(target: Target) -> None:
    target.session().must_refuse(F.SET_VRING_NUM, "there is no such ring", VringState(0x8000, 16))


@rule(
    "reply-ack.without-descriptor",
    "A request that needs a descriptor and brings none is refused",
    section=SECTION,
    protocol=ProtocolF.REPLY_ACK,
)
def without_descriptor(target: Target) -> None:
    rig = Rig(target, target.session())
    with prerequisite("memory and a ring"):
        rig.share()
        rig.place(rig.rings[0])
    rig.peer.must_refuse(F.SET_VRING_KICK, "no descriptor came with it, and bit 8 is not set", U64(0))


@rule(
    "reply-ack.nofd",
    "SET_VRING_CALL with bit 8 set and no descriptor is granted",
    section="Front-end message types, SET_VRING_CALL",
    protocol=ProtocolF.REPLY_ACK,
)
def nofd(target: Target) -> None:
    target.session().do(F.SET_VRING_CALL, U64(NOFD))
