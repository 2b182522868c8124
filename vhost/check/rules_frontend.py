# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Rules for front-ends: what the tracer's linter sees, the order of things, and how it takes what a back-end
may ask or refuse.

A rule of the linter (vhost.trace.rules) is a rule here; what this file adds is when it had a chance to be
broken. Each rule gets the Stage; those of the topics "ask" and "refusal" act, the others only look back.
"""

from __future__ import annotations

import contextlib
import uuid

from vhost.check.peer import Peer
from vhost.check.rule import Evidence, NoReply, NotOffered, PeerClosed, Severity, Skipped, expect, rule
from vhost.check.stage import Stage, shown
from vhost.features import ProtocolF, Status, VhostF
from vhost.trace import rules as linted
from vhost.user.messages import BackendMsg as B
from vhost.user.messages import frame
from vhost.user.payloads import EMPTY, SharedObject
from vhost.user.spec import Role

FRONTEND = "front-end"
_RING = ("SET_VRING_NUM", "SET_VRING_ADDR", "SET_VRING_BASE", "SET_VRING_KICK")
_TABLE = ("SET_MEM_TABLE", "ADD_MEM_REG")
_STOPS = ("GET_VRING_BASE", "GET_VRING_BASE_SKIP_DRAIN")
_LINTED: dict[linted.Rule, tuple[str, ...]] = {
    linted.VERSION: (),
    linted.FLAGS: (),
    linted.REPLY_FLAG: (),
    linted.REPLY_TO_NOTHING: (),
    linted.NEED_REPLY: (),
    linted.NEED_REPLY_HABIT: (),
    linted.UNKNOWN: (),
    linted.SIZE: (),
    linted.FDS: (),
    linted.FD_UNUSED: ("REM_MEM_REG",),
    linted.FD_KIND: ("SET_VRING_KICK", "SET_VRING_CALL", *_TABLE),
    linted.FEATURE: (),
    linted.FEATURE_HABIT: (),
    linted.CUT_OFF: (),
    linted.BACKLOG: (),
    linted.NOT_OFFERED: ("SET_FEATURES", "SET_PROTOCOL_FEATURES"),
    linted.NOT_ASKED: ("SET_FEATURES", "SET_PROTOCOL_FEATURES"),
    linted.COMPANIONS: ("SET_PROTOCOL_FEATURES",),
    linted.INBAND: ("SET_PROTOCOL_FEATURES",),
    linted.CHANGED: ("SET_FEATURES",),
    linted.OWNER: (),
    linted.RESET_OWNER: (),
    linted.REGIONS: ("SET_MEM_TABLE",),
    linted.REGION: _TABLE,
    linted.REGION_GPA: _TABLE,
    linted.OVERLAP: _TABLE,
    linted.FILE_SIZE: _TABLE,
    linted.NO_REGION: ("REM_MEM_REG",),
    linted.SLOTS: ("ADD_MEM_REG",),
    linted.UNMAPPED: ("SET_VRING_ADDR",),
    linted.NO_TABLE: ("SET_VRING_ADDR",),
    linted.LOG_SIZE: ("SET_LOG_BASE",),
    linted.LOG_FD: ("SET_LOG_BASE",),
    linted.LOG_EARLY: ("SET_LOG_BASE",),
    linted.IOTLB: ("IOTLB_MSG",),
    linted.INFLIGHT: ("SET_INFLIGHT_FD",),
    linted.RING_INDEX: _RING,
    linted.RING_PAIRS: _RING,
    linted.RING_SIZE: ("SET_VRING_NUM",),
    linted.RING_ALIGN: ("SET_VRING_ADDR",),
    linted.RING_RUNS: _RING,
    linted.RING_EARLY: ("SET_VRING_KICK",),
    linted.RING_BASE: ("SET_VRING_BASE",),
    linted.RING_HALF: ("SET_VRING_BASE",),
    linted.RESERVED: ("GET_VRING_BASE", "SET_VRING_ADDR", "VRING_KICK"),
    linted.ENABLE: ("SET_VRING_ENABLE",),
    linted.ENDIAN: ("SET_VRING_ENDIAN",),
    linted.CONFIG_FLAGS: ("SET_CONFIG",),
    linted.STATUS: ("SET_STATUS",),
    linted.POSTCOPY: ("POSTCOPY_ADVISE",),
    linted.POSTCOPY_SLOTS: ("POSTCOPY_ADVISE",),
    linted.STATE_PHASE: ("SET_DEVICE_STATE_FD",),
    linted.STATE_RUNNING: ("SET_DEVICE_STATE_FD",),
    linted.STATE_CHECK: ("CHECK_DEVICE_STATE",),
}
"""The linter's rules that a front-end can break, and the requests with which it can; none: with any."""


def lint(stage: Stage, breach: linted.Rule, occasions: tuple[str, ...]) -> None:
    broken = [
        event
        for event in stage.events
        if event.sender is Role.FRONTEND and any(finding.rule is breach for finding in event.findings)
    ]
    if broken:
        first = next(finding for finding in broken[0].findings if finding.rule is breach)
        more = f"; {len(broken)} times in all" if len(broken) > 1 else ""
        raise Evidence(f"{first.text}{more}", shown(broken[:3]))
    if occasions and not stage.messages(*occasions):
        raise NotOffered(f"never seen: {' '.join(occasions)}")


for _breach, _occasions in _LINTED.items():
    rule(
        f"lint.{_breach.name}",
        _breach.doc.rstrip("."),
        section=_breach.section,
        severity=Severity.MUST if _breach.severity is linted.Severity.VIOLATION else Severity.SHOULD,
        role=FRONTEND,
        breach=_breach,
        occasions=_occasions,
    )(lint)


# -- the order of things ---------------------------------------------------------------------------


@rule(
    "order.first",
    "The session begins with GET_FEATURES or SET_OWNER",
    section="Communication",
    severity=Severity.SHOULD,
    role=FRONTEND,
)
def first(stage: Stage) -> None:
    for session in stage.sessions:
        event = stage.messages(session=session)[0]
        if event.detail["name"] not in ("GET_FEATURES", "SET_OWNER"):
            raise Evidence(f"it begins with {event.detail['name']}", shown([event]))


@rule("order.owner", "SET_OWNER is sent, once", section="Front-end message types, SET_OWNER", role=FRONTEND)
def owner(stage: Stage) -> None:
    for session in stage.sessions:
        sent = stage.messages("SET_OWNER", session=session)
        if len(sent) != 1 and stage.started_rings(session):
            raise Evidence(f"session {session}: {len(sent)} times", shown(sent))


@rule("order.features", "SET_FEATURES comes before a ring can start", section="VIRTIO 3.1.1", role=FRONTEND)
def features(stage: Stage) -> None:
    for session in stage.sessions:
        names = [
            event.detail["name"]
            for event in stage.messages("SET_FEATURES", "SET_VRING_KICK", session=session)
        ]
        if names and names[0] != "SET_FEATURES":
            raise Evidence(
                "a kick comes first",
                shown(stage.messages("SET_FEATURES", "SET_VRING_KICK", session=session)[:2]),
            )


@rule(
    "order.protocol-bit",
    "PROTOCOL_FEATURES is acknowledged when protocol features were set",
    section="Ring states",
    severity=Severity.SHOULD,
    role=FRONTEND,
)
def protocol_bit(stage: Stage) -> None:
    for session in stage.sessions:
        if not stage.messages("SET_PROTOCOL_FEATURES", session=session):
            raise NotOffered("never seen: SET_PROTOCOL_FEATURES")
        for event in stage.messages("SET_FEATURES", session=session):
            if not event.detail["payload"]["value"] & VhostF.PROTOCOL_FEATURES:
                raise Evidence("SET_FEATURES without it enables all rings at once", shown([event]))


@rule(
    "order.enable",
    "With PROTOCOL_FEATURES, a ring that is to run is enabled",
    section="Ring states",
    role=FRONTEND,
)
def enable(stage: Stage) -> None:
    seen = False
    for session in stage.sessions:
        enabled = {
            event.detail["payload"]["index"]
            for event in stage.messages("SET_VRING_ENABLE", session=session)
            if event.detail["payload"]["num"] == 1
        }
        acked = stage.messages("SET_FEATURES", session=session)
        rings = stage.started_rings(session)
        if not rings or not acked or not acked[-1].detail["payload"]["value"] & VhostF.PROTOCOL_FEATURES:
            continue
        seen = True
        expect(
            rings <= enabled,
            f"session {session}: rings {sorted(rings - enabled)} got a kick and were never enabled",
        )
    if not seen:
        raise NotOffered("no ring was started with PROTOCOL_FEATURES")


@rule(
    "order.stop",
    "Each ring that ran is stopped by GET_VRING_BASE before the session ends",
    section="Ring states",
    severity=Severity.SHOULD,
    role=FRONTEND,
)
def stop(stage: Stage) -> None:
    ended = [session for session in stage.sessions if stage.over(session) and stage.started_rings(session)]
    if not ended:
        raise Skipped("no session that ran rings has ended")
    for session in ended:
        for ring in sorted(stage.started_rings(session)):
            last = [
                event.detail["name"]
                for event in stage.messages("SET_VRING_KICK", *_STOPS, session=session)
                if event.detail["payload"]["index"] == ring
            ][-1]
            expect(last in _STOPS, f"session {session} ended with ring {ring} running")


@rule(
    "order.status",
    "The device status only gains bits, until it is reset",
    section="VIRTIO 2.1",
    role=FRONTEND,
)
def status(stage: Stage) -> None:
    if not stage.messages("SET_STATUS"):
        raise NotOffered("never seen: SET_STATUS")
    for session in stage.sessions:
        before = 0
        for event in stage.messages("SET_STATUS", session=session):
            value = event.detail["payload"]["value"]
            if value and before & ~value:
                raise Evidence(f"{value:#x} after {before:#x}", shown([event]))
            before = value


@rule("order.driver-ok", "DRIVER_OK is set when rings run", section="VIRTIO 3.1.1", role=FRONTEND)
def driver_ok(stage: Stage) -> None:
    values = [event.detail["payload"]["value"] for event in stage.messages("SET_STATUS")]
    if not values or not any(stage.started_rings(session) for session in stage.sessions):
        raise NotOffered("never seen: SET_STATUS and a ring that runs")
    expect(any(value & Status.DRIVER_OK for value in values), f"it set {' '.join(map(hex, values))}")


# -- what a back-end may ask -----------------------------------------------------------------------


def _channel(stage: Stage) -> Peer:
    if not stage.messages("SET_BACKEND_REQ_FD"):
        raise NotOffered("never seen: SET_BACKEND_REQ_FD")
    for actor in stage.actors:
        if actor.raw is not None:
            return actor.raw
    raise Skipped("the session is over")


def _answer(stage: Stage, channel: Peer, limit: float | None = None) -> int | None:
    """The status that comes; None if the channel ends. The front-end may ask us things before."""
    wait = stage.timeout if limit is None else limit
    if not stage.until(lambda: not channel.quiet(0), wait):
        channel.transcript.append(f"-- nothing came within {wait:g} s")
        raise NoReply(f"nothing came within {wait:g} s")
    try:
        return channel.receive().u64
    except PeerClosed:
        return None


def _alive(stage: Stage, channel: Peer) -> None:
    """The session goes on."""
    stage.pause(stage.settle)
    expect(any(actor.raw is channel for actor in stage.actors), "the session ended")


def _needs(channel: Peer, features: int) -> None:
    missing = int(features) & ~channel.protocol
    if missing:
        raise NotOffered(" ".join(f.name or "" for f in ProtocolF if int(f) & missing))


_BACK = "Back-end message types, {}"


@rule(
    "ask.config-change",
    "BACKEND_CONFIG_CHANGE_MSG with need_reply is answered with 0",
    section=_BACK.format("BACKEND_CONFIG_CHANGE_MSG"),
    role=FRONTEND,
)
def config_change(stage: Stage) -> None:
    channel = _channel(stage)
    _needs(channel, int(ProtocolF.CONFIG | ProtocolF.REPLY_ACK))
    channel.send(B.BACKEND_CONFIG_CHANGE_MSG, need_reply=True)
    value = _answer(stage, channel)
    expect(value == 0, "the channel was closed" if value is None else f"{value:#x}")


@rule(
    "ask.config-read",
    "After it the configuration is read again",
    section=_BACK.format("BACKEND_CONFIG_CHANGE_MSG"),
    severity=Severity.SHOULD,
    role=FRONTEND,
)
def config_read(stage: Stage) -> None:
    channel = _channel(stage)
    _needs(channel, int(ProtocolF.CONFIG))
    before = len(stage.messages("GET_CONFIG"))
    channel.send(B.BACKEND_CONFIG_CHANGE_MSG)
    expect(
        stage.until(lambda: len(stage.messages("GET_CONFIG")) > before, stage.timeout),
        f"no GET_CONFIG within {stage.timeout:g} s",
    )


@rule(
    "ask.unasked",
    "A request without need_reply is not answered",
    section="VHOST_USER_PROTOCOL_F_REPLY_ACK",
    role=FRONTEND,
)
def unasked(stage: Stage) -> None:
    channel = _channel(stage)
    _needs(channel, int(ProtocolF.CONFIG))
    channel.send(B.BACKEND_CONFIG_CHANGE_MSG)
    came = stage.until(lambda: not channel.quiet(0), 2 * stage.settle)
    expect(not came, f"message {channel.receive().number} came" if came else "")


@rule(
    "ask.object-add",
    "BACKEND_SHARED_OBJECT_ADD is answered with 0, and so is its removal",
    section=_BACK.format("BACKEND_SHARED_OBJECT_ADD"),
    role=FRONTEND,
)
def object_add(stage: Stage) -> None:
    channel = _channel(stage)
    _needs(channel, int(ProtocolF.SHARED_OBJECT | ProtocolF.REPLY_ACK))
    ours = SharedObject(uuid.UUID("6b1f2a6e-0f1b-4a3e-9f57-3f1f6c1d0001"))
    for number in (B.BACKEND_SHARED_OBJECT_ADD, B.BACKEND_SHARED_OBJECT_REMOVE):
        channel.send(number, ours, need_reply=True)
        value = _answer(stage, channel)
        expect(value == 0, f"{number.name}: {'the channel was closed' if value is None else hex(value)}")


@rule(
    "ask.object-unknown",
    "BACKEND_SHARED_OBJECT_LOOKUP of an unknown UUID is answered with another value",
    section=_BACK.format("BACKEND_SHARED_OBJECT_LOOKUP"),
    role=FRONTEND,
)
def object_unknown(stage: Stage) -> None:
    channel = _channel(stage)
    _needs(channel, int(ProtocolF.SHARED_OBJECT | ProtocolF.REPLY_ACK))
    channel.send(B.BACKEND_SHARED_OBJECT_LOOKUP, SharedObject(uuid.UUID(int=7)), need_reply=True)
    value = _answer(stage, channel)
    expect(value != 0, "0: it was found")


@rule(
    "ask.not-negotiated",
    "A request whose feature was not negotiated is refused, or the channel ends",
    section="Back-end communication",
    severity=Severity.SHOULD,
    role=FRONTEND,
)
def not_negotiated(stage: Stage) -> None:
    channel = _channel(stage)
    _needs(channel, int(ProtocolF.REPLY_ACK))
    if channel.protocol & ProtocolF.INBAND_NOTIFICATIONS:
        raise NotOffered("in-band notifications were negotiated")
    channel.send(B.BACKEND_VRING_CALL, bytes(8), need_reply=True)
    value = _answer(stage, channel)
    expect(value != 0, "BACKEND_VRING_CALL was granted")
    _alive(stage, channel)


@rule(
    "ask.unknown",
    "An unknown request with need_reply is refused, or the channel ends; the session goes on",
    section="VHOST_USER_PROTOCOL_F_REPLY_ACK",
    role=FRONTEND,
)
def unknown(stage: Stage) -> None:
    channel = _channel(stage)
    _needs(channel, int(ProtocolF.REPLY_ACK))
    channel.send(99, EMPTY, need_reply=True)
    value = _answer(stage, channel)
    expect(value != 0, "it was granted")
    _alive(stage, channel)


@rule(
    "ask.huge",
    "A header that announces 4 GiB ends the channel at most",
    section="Message Specification",
    severity=Severity.ROBUST,
    role=FRONTEND,
)
def huge(stage: Stage) -> None:
    channel = _channel(stage)
    with contextlib.suppress(PeerClosed):  # an earlier rule may have ended it
        channel.send_bytes(frame(B.BACKEND_CONFIG_CHANGE_MSG, b"", size=0xFFFFFFFF))
    _alive(stage, channel)


@rule(
    "ask.closed",
    "A channel that the back-end closes leaves the session alive",
    section="Back-end communication",
    severity=Severity.ROBUST,
    role=FRONTEND,
)
def closed(stage: Stage) -> None:
    channel = _channel(stage)
    channel.close()
    _alive(stage, channel)


# -- what a back-end may refuse --------------------------------------------------------------------


def refused(stage: Stage, names: frozenset[str]) -> None:
    """The session in which it was refused is the last one."""
    session = stage.sessions[-1]
    events = stage.messages(session=session, sender=None)
    asked = [event for event in stage.messages(*names, session=session) if event.detail["need_reply"]]
    if not asked:
        raise NotOffered(f"never seen with need_reply: {' '.join(sorted(names))}")
    later = [
        event for event in events if event.time > asked[0].time and event.detail["name"] == "SET_VRING_KICK"
    ]
    if later:
        raise Evidence("it went on and gave the ring a kick", shown([asked[0], later[0]]))


REFUSALS = {
    "refusal.memory": frozenset({"SET_MEM_TABLE", "ADD_MEM_REG"}),
    "refusal.ring": frozenset({"SET_VRING_NUM"}),
    "refusal.address": frozenset({"SET_VRING_ADDR"}),
}
"""What our back-end refuses while a rule is checked."""
for _id, _names in REFUSALS.items():
    rule(
        _id,
        f"A front-end whose {' or '.join(sorted(_names))} was refused starts no ring",
        section="VHOST_USER_PROTOCOL_F_REPLY_ACK",
        role=FRONTEND,
        names=_names,
    )(refused)
