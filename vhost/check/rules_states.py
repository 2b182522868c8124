# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Rules: stopped and started, disabled and enabled, suspended (vhost-user, "Ring states")."""

from __future__ import annotations

from vhost.check.peer import FrontendMsg as F
from vhost.check.rig import rig_for, running
from vhost.check.rule import Severity, Skipped, expect, prerequisite, rule
from vhost.check.target import PROTOCOL_FEATURES, RING_PACKED, VERSION_1, Target
from vhost.features import ProtocolF, VirtioF
from vhost.user.payloads import VringState

STATES = "Ring states"
SUSPENDED = "Ring states, Suspended device state"
GET_BASE = "Front-end message types, GET_VRING_BASE"
PACKED = int(VirtioF.RING_PACKED)


def _needs_enable(target: Target) -> None:
    if not target.offered & PROTOCOL_FEATURES:
        raise Skipped("without PROTOCOL_FEATURES all rings are enabled")


@rule("state.start", "A ring that is set up, enabled and kicked is processed", section=STATES, device="any")
def start(target: Target) -> None:
    rig = rig_for(target)
    rig.start()
    rig.complete()


@rule("state.start-packed", "So is a packed ring", section=STATES, features=RING_PACKED, device="any")
def start_packed(target: Target) -> None:
    rig = rig_for(target, features=VERSION_1 | PACKED)
    rig.start()
    rig.complete()


@rule(
    "state.work-before-kick",
    "Work that lies in the ring when the first kick comes is done",
    section=STATES,
    device="any",
)
def work_before_kick(target: Target) -> None:
    rig = rig_for(target)
    sent = rig.submit()
    with prerequisite("a ring cannot be set up"):
        rig.start()
    rig.finish(sent)


@rule(
    "state.kick-not-needed",
    "SET_VRING_KICK starts a ring: work that lies in it is done without a kick",
    section=STATES,
    severity=Severity.SHOULD,  # a ring was started by the first kick in older texts
    device="any",
)
def kick_not_needed(target: Target) -> None:
    rig = rig_for(target)
    sent = rig.submit()
    with prerequisite("a ring cannot be set up"):
        rig.set_up()
    rig.finish(sent)


@rule(
    "state.disabled",
    "A ring that was never enabled does no work",
    section=STATES,
    severity=Severity.SHOULD,
    device="any",
)
def disabled(target: Target) -> None:
    _needs_enable(target)
    rig = rig_for(target)
    with prerequisite("a ring cannot be set up"):
        rig.set_up(enable=False)
    sent = rig.submit()
    for ring in rig.rings:
        ring.kick()
    idle = rig.idle()
    # A disabled ring is processed without side effects; requests may come back undone.
    expect(idle or not sent.writable or sent.work.judge(sent.contents(), sent.used), "a request was executed")


@rule(
    "state.enabled-later",
    "What was kicked while the ring was disabled is done when it is enabled",
    section=STATES,
    device="any",
)
def enabled_later(target: Target) -> None:
    _needs_enable(target)
    rig = rig_for(target)
    with prerequisite("a ring cannot be set up"):
        rig.set_up(enable=False)
    sent = rig.submit()
    for ring in rig.rings:
        ring.kick()
    if not rig.idle():
        return  # it came back before
    for ring in rig.rings:
        rig.enable(ring)
    rig.finish(sent) if sent.work.writable else rig.wait()


@rule(
    "state.enabled-while-stopped", "A ring can be enabled before it is set up", section=STATES, device="any"
)
def enabled_while_stopped(target: Target) -> None:
    _needs_enable(target)
    rig = rig_for(target)
    for ring in rig.rings:
        rig.enable(ring)
    with prerequisite("a ring cannot be set up"):
        rig.set_up(enable=False)
    for ring in rig.rings:
        ring.kick()
    rig.complete()


@rule("state.disable-enable", "A running ring can be disabled and enabled", section=STATES, device="any")
def disable_enable(target: Target) -> None:
    _needs_enable(target)
    rig = running(target)
    for _ in range(3):
        rig.enable(rig.main, False)
        rig.enable(rig.main)
        rig.complete()


@rule(
    "state.disabled-again",
    "A running ring that is disabled does no work until it is enabled",
    section=STATES,
    severity=Severity.SHOULD,
    device="any",
)
def disabled_again(target: Target) -> None:
    _needs_enable(target)
    rig = running(target)
    rig.enable(rig.main, False)
    sent = rig.submit()
    rig.main.kick()
    idle = rig.idle()
    expect(idle or not sent.writable or sent.work.judge(sent.contents(), sent.used), "a request was executed")


@rule(
    "state.disabled-discards",
    "A network device that is disabled takes frames, and drops them",
    section=STATES,
    device="net",
    writes=True,
)
def disabled_discards(target: Target) -> None:
    rig = running(target)
    for ring in rig.rings:
        rig.enable(ring, False)
    sent = rig.submit()
    rig.main.kick()
    rig.peer.sync()
    expect(
        rig.wait() is sent, f"a frame was not taken within {target.timeout:g} s while the ring was disabled"
    )


@rule("state.stop", "A ring that GET_VRING_BASE stopped is not processed", section=GET_BASE, device="any")
def stop(target: Target) -> None:
    rig = running(target)
    rig.stop(rig.main)
    rig.submit()
    rig.main.kick()
    expect(rig.idle(), "a request was processed after GET_VRING_BASE")


@rule(
    "state.stop-drains",
    "After the reply to GET_VRING_BASE nothing is used any more",
    section=GET_BASE,
    device="any",
)
def stop_drains(target: Target) -> None:
    rig = running(target)
    ring = rig.main
    sent = [rig.submit() for _ in range(4)]
    ring.kick()
    base = rig.stop(ring)
    came = 0
    while rig.wait(timeout=0) is not None:
        came += 1
    expect(
        rig.wait(timeout=target.settle) is None,
        f"a request came back after the reply ({came} of {len(sent)} before)",
    )
    expect(base & 0xFFFF <= 5, f"the index is {base & 0xFFFF}, 5 requests were made")


@rule(
    "state.restart",
    "A ring that was stopped can be started again where it was",
    section=GET_BASE,
    device="any",
)
def restart(target: Target) -> None:
    rig = running(target)
    ring = rig.main
    for _ in range(3):
        with prerequisite("GET_VRING_BASE"):
            base = rig.stop(ring)
        rig.place(ring, base)
        rig.give_call(ring)
        rig.give_kick(ring)
        rig.enable(ring)
        ring.kick()
        rig.complete()


@rule("state.restart-packed", "So can a packed ring", section=GET_BASE, features=RING_PACKED, device="any")
def restart_packed(target: Target) -> None:
    rig = running(target, features=VERSION_1 | PACKED)
    ring = rig.main
    for _ in range(3):
        with prerequisite("GET_VRING_BASE"):
            base = rig.stop(ring)
        rig.place(ring, base)
        rig.give_call(ring)
        rig.give_kick(ring)
        rig.enable(ring)
        ring.kick()
        rig.complete()


@rule(
    "state.restart-work",
    "Work that was left in a stopped ring is done after the restart",
    section=GET_BASE,
    device="any",
)
def restart_work(target: Target) -> None:
    rig = running(target)
    ring = rig.main
    with prerequisite("GET_VRING_BASE"):
        base = rig.stop(ring)
    sent = rig.submit()
    rig.place(ring, base)
    rig.give_call(ring)
    rig.give_kick(ring)
    rig.enable(ring)
    ring.kick()
    rig.finish(sent)


@rule(
    "state.new-ring",
    "After all rings were stopped, a new ring in the same place runs",
    section=GET_BASE,
    device="any",
)
def new_ring(target: Target) -> None:
    rig = running(target)
    for ring in rig.rings:
        rig.stop(ring)
    for ring in rig.rings:
        ring.renew()
    with prerequisite("SET_FEATURES"):
        rig.peer.do(F.SET_FEATURES, _features(rig.peer.features))
    rig.start()
    rig.complete()


def _features(value: int) -> bytes:
    return value.to_bytes(8, "little")


@rule(
    "state.stop-again",
    "GET_VRING_BASE of a stopped ring is answered, with the same index",
    section=GET_BASE,
    device="any",
    severity=Severity.SHOULD,
)
def stop_again(target: Target) -> None:
    rig = running(target)
    first, second = rig.stop(rig.main), rig.stop(rig.main)
    expect(first == second, f"{first:#x}, then {second:#x}")


@rule(
    "state.independent",
    "Stopping one ring leaves the others running",
    section=STATES,
    device="blk",
    protocol=ProtocolF.MQ,
)
def independent(target: Target) -> None:
    if target.queues < 2:
        raise Skipped("it has one queue")
    rig = rig_for(target, rings=2)
    with prerequisite("two rings cannot be started"):
        rig.start()
    for ring in rig.rings:
        rig.complete(ring=ring)
    rig.stop(rig.rings[0])
    rig.complete(ring=rig.rings[1])


@rule("state.suspended-answers", "A suspended device answers messages", section=SUSPENDED, device="any")
def suspended_answers(target: Target) -> None:
    rig = running(target)
    for ring in rig.rings:
        rig.stop(ring)
    rig.peer.sync()
    rig.peer.do(F.SET_VRING_NUM, VringState(0, rig.num))


@rule(
    "state.suspended-quiet",
    "A suspended device writes no guest memory and calls nobody",
    section=SUSPENDED,
    device="any",
)
def suspended_quiet(target: Target) -> None:
    rig = running(target)
    for ring in rig.rings:
        rig.stop(ring)
    for ring in rig.rings:
        ring.called(0)
    rig.submit()
    before = bytes(memoryview(rig.region))
    for ring in rig.rings:
        ring.kick()
    rig.idle()
    expect(bytes(memoryview(rig.region)) == before, "guest memory was changed")
    expect(not any(ring.called(0) for ring in rig.rings), "a call came")
