# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Rules: the device status, and RESET_DEVICE."""

from __future__ import annotations

from vhost.check.peer import FrontendMsg as F
from vhost.check.peer import Peer
from vhost.check.rig import running
from vhost.check.rule import Severity, expect, prerequisite, rule
from vhost.check.target import Target
from vhost.features import ProtocolF, Status
from vhost.user.payloads import U64

SET = "Front-end message types, SET_STATUS"
GET = "Front-end message types, GET_STATUS"
RESET = "Front-end message types, RESET_DEVICE"
_STATUS = ProtocolF.STATUS
_RESET = ProtocolF.RESET_DEVICE


def _session(target: Target) -> Peer:
    return target.session(protocol=int(_STATUS))


@rule(
    "status.initial",
    "The device status is 0 at the beginning of a session",
    section=GET,
    severity=Severity.SHOULD,
    protocol=_STATUS,
)
def initial(target: Target) -> None:
    value = _session(target).ask(F.GET_STATUS).u64
    expect(value == 0, f"{value:#x}")


@rule("status.echo", "GET_STATUS says what SET_STATUS said", section=GET, protocol=_STATUS)
def echo(target: Target) -> None:
    peer = _session(target)
    for value in (Status.ACKNOWLEDGE, Status.ACKNOWLEDGE | Status.DRIVER):
        peer.do(F.SET_STATUS, U64(int(value)))
        got = peer.ask(F.GET_STATUS).u64
        expect(got == value, f"{int(value):#x} was set, {got:#x} is said")


@rule(
    "status.features-ok",
    "FEATURES_OK stays set when the features are among those offered",
    section="VIRTIO 3.1.1",
    protocol=_STATUS,
)
def features_ok(target: Target) -> None:
    peer = _session(target)
    value = int(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
    peer.do(F.SET_STATUS, U64(value))
    got = peer.ask(F.GET_STATUS).u64
    expect(got & Status.FEATURES_OK, f"{value:#x} was set, {got:#x} is said")


@rule("status.reset", "SET_STATUS 0 resets the device status", section="VIRTIO 2.1", protocol=_STATUS)
def reset(target: Target) -> None:
    peer = _session(target)
    peer.do(F.SET_STATUS, U64(3))
    peer.do(F.SET_STATUS, U64(0))
    got = peer.ask(F.GET_STATUS).u64
    expect(got == 0, f"{got:#x} is said after 0 was set")


@rule(
    "status.wide",
    "A status that is no byte is refused or cut, without a hang",
    section=SET,
    severity=Severity.ROBUST,
    protocol=_STATUS,
)
def wide(target: Target) -> None:
    _session(target).survive(F.SET_STATUS, U64(0x1_0000_0003))


@rule(
    "status.run",
    "A device runs under a driver that sets the status",
    section=SET,
    protocol=_STATUS,
    device="any",
)
def run(target: Target) -> None:
    rig = running(target, protocol=int(_STATUS), status=True)
    rig.complete()


@rule("reset.granted", "RESET_DEVICE is granted", section=RESET, protocol=_RESET)
def granted(target: Target) -> None:
    target.session(protocol=int(_RESET)).do(F.RESET_DEVICE)


@rule("reset.stops", "RESET_DEVICE disables all rings", section=RESET, protocol=_RESET, device="any")
def stops(target: Target) -> None:
    rig = running(target, protocol=int(_RESET))
    rig.peer.do(F.RESET_DEVICE)
    rig.submit()
    rig.main.kick()
    expect(rig.idle(), "a request was processed after RESET_DEVICE")


@rule(
    "reset.again",
    "After RESET_DEVICE the device can be initialised again without SET_OWNER",
    section=RESET,
    protocol=_RESET,
    device="any",
)
def again(target: Target) -> None:
    rig = running(target, protocol=int(_RESET))
    rig.peer.do(F.RESET_DEVICE)
    for ring in rig.rings:
        ring.renew()
    with prerequisite("SET_FEATURES"):
        rig.peer.do(F.SET_FEATURES, U64(rig.peer.features))
    rig.start()
    rig.complete()


@rule(
    "reset.status",
    "RESET_DEVICE resets the device status",
    section=RESET,
    severity=Severity.SHOULD,
    protocol=_RESET | _STATUS,
)
def reset_status(target: Target) -> None:
    peer = target.session(protocol=int(_RESET | _STATUS))
    peer.do(F.SET_STATUS, U64(3))
    peer.do(F.RESET_DEVICE)
    got = peer.ask(F.GET_STATUS).u64
    expect(got == 0, f"{got:#x}")
