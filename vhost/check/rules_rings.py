# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Rules: the messages that set up a ring, and what they must refuse."""

from __future__ import annotations

from vhost.check.peer import FrontendMsg as F
from vhost.check.rig import Rig, rig_for, running, stopped_at
from vhost.check.rule import Severity, expect, prerequisite, rule
from vhost.check.target import RING_PACKED, VERSION_1, Target
from vhost.features import ProtocolF, VirtioF
from vhost.user.payloads import NOFD, U64, VringAddr, VringFd, VringState

NUM = "Front-end message types, SET_VRING_NUM"
ADDR = "Front-end message types, SET_VRING_ADDR"
BASE = "Front-end message types, SET_VRING_BASE"
GET_BASE = "Front-end message types, GET_VRING_BASE"
KICK = "Front-end message types, SET_VRING_KICK"
CALL = "Front-end message types, SET_VRING_CALL"
ERR = "Front-end message types, SET_VRING_ERR"
ENABLE = "Front-end message types, SET_VRING_ENABLE"
_ACK = ProtocolF.REPLY_ACK
PACKED = int(VirtioF.RING_PACKED)


def _placed(target: Target, *, features: int = VERSION_1) -> Rig:
    """Memory and one ring, without descriptors."""
    rig = Rig(target, target.session(features=features))
    with prerequisite("memory and a ring"):
        rig.share()
        rig.place(rig.rings[0])
    return rig


@rule("ring.num", "Rings of 2 to 256 entries are accepted", section=NUM)
def num(target: Target) -> None:
    peer = target.session()
    for exponent in range(1, 9):
        peer.do(F.SET_VRING_NUM, VringState(0, 1 << exponent))


@rule("ring.num-zero", "A ring of 0 entries is refused", section=NUM, severity=Severity.SHOULD, protocol=_ACK)
def num_zero(target: Target) -> None:
    target.session().must_refuse(F.SET_VRING_NUM, "a ring has at least one entry", VringState(0, 0))


@rule(
    "ring.num-odd",
    "A split ring whose size is no power of 2 is refused",
    section="VIRTIO 2.7",
    severity=Severity.SHOULD,
    protocol=_ACK,
)
def num_odd(target: Target) -> None:
    rig = Rig(target, target.session())
    peer = rig.peer
    with prerequisite("memory"):
        rig.share()
    if peer.refusal(F.SET_VRING_NUM, VringState(0, 13)):
        return
    # It may be known only later that the ring is split: then it must not start.
    ring = rig.rings[0]
    refused = peer.refusal(F.SET_VRING_ADDR, ring.address())
    refused = refused or peer.refusal(F.SET_VRING_KICK, U64(0), [ring.kick_fd])
    expect(refused, "a split ring of 13 entries was accepted, its addresses and its kick too")


@rule(
    "ring.num-large",
    "A ring of more than 32768 entries is refused",
    section="VIRTIO 2.7",
    severity=Severity.SHOULD,
    protocol=_ACK,
)
def num_large(target: Target) -> None:
    for size in (1 << 16, 0xFFFFFFFF):
        target.session().must_refuse(F.SET_VRING_NUM, "32768 is the limit", VringState(0, size))


@rule(
    "ring.addr-outside",
    "Addresses outside the memory table are refused, or the ring does not start",
    section=ADDR,
    severity=Severity.ROBUST,
)
def addr_outside(target: Target) -> None:
    rig = _placed(target)
    ring = rig.rings[0]
    wrong = VringAddr(0, 0, 0x10_0000, 0x11_0000, 0x12_0000)
    if rig.peer.refusal(F.SET_VRING_ADDR, wrong) and rig.peer.acks:
        return
    if not rig.peer.refusal(F.SET_VRING_KICK, U64(0), [ring.kick_fd]) and not rig.peer.closed:
        ring.kick()
        rig.peer.ended(target.settle)


@rule(
    "ring.addr-end",
    "A ring that reaches beyond the end of its region is refused or harmless",
    section=ADDR,
    severity=Severity.ROBUST,
)
def addr_end(target: Target) -> None:
    rig = _placed(target)
    ring = rig.rings[0]
    end = rig.region.user_addr + rig.region.size
    wrong = VringAddr(0, 0, end - 16, end - 16, end - 16)
    if rig.peer.refusal(F.SET_VRING_ADDR, wrong) and rig.peer.acks:
        return
    if not rig.peer.refusal(F.SET_VRING_KICK, U64(0), [ring.kick_fd]) and not rig.peer.closed:
        ring.kick()
        rig.peer.ended(target.settle)


@rule(
    "ring.addr-unaligned",
    "Addresses that are not aligned are refused, or the ring does not start",
    section="VIRTIO 2.7",
    severity=Severity.ROBUST,
)
def addr_unaligned(target: Target) -> None:
    rig = _placed(target)
    ring = rig.rings[0]
    if rig.peer.refusal(F.SET_VRING_ADDR, ring.address(base=1)) and rig.peer.acks:
        return
    if not rig.peer.refusal(F.SET_VRING_KICK, U64(0), [ring.kick_fd]) and not rig.peer.closed:
        ring.kick()
        rig.peer.ended(target.settle)


@rule(
    "ring.addr-again", "The addresses of a running ring can be said again", section="Migration", device="any"
)
def addr_again(target: Target) -> None:
    rig = running(target)
    rig.peer.do(F.SET_VRING_ADDR, rig.main.address())
    rig.complete()


@rule(
    "ring.base-kept",
    "GET_VRING_BASE of a ring that never ran says what SET_VRING_BASE said",
    section=GET_BASE,
    severity=Severity.SHOULD,
)
def base_kept(target: Target) -> None:
    rig = _placed(target)
    with prerequisite("SET_VRING_BASE"):
        rig.peer.do(F.SET_VRING_BASE, VringState(0, 77))
    got = stopped_at(rig.peer, 0)
    expect(got == 77, f"77 was set, {got} is said")


@rule("ring.base-reply", "The reply to GET_VRING_BASE names the ring that was asked for", section=GET_BASE)
def base_reply(target: Target) -> None:
    rig = _placed(target)
    stopped_at(rig.peer, 0)


@rule("ring.base-index", "GET_VRING_BASE says where the ring stands", section=GET_BASE, device="any")
def base_index(target: Target) -> None:
    rig = running(target)
    for _ in range(2):
        rig.complete()
    got = rig.stop(rig.main)
    expect(got & 0xFFFF == 3, f"3 requests were done, the index is {got & 0xFFFF}")


@rule(
    "ring.base-reserved",
    "The upper 16 bits of a split ring's index are 0",
    section="A vring descriptor index for split virtqueues",
    device="any",
)
def base_reserved(target: Target) -> None:
    rig = running(target)
    got = rig.stop(rig.main)
    expect(got >> 16 == 0, f"{got:#x}")


@rule(
    "ring.base-packed",
    "GET_VRING_BASE of a packed ring says both positions with their wrap counters",
    section="Vring descriptor indices for packed virtqueues",
    features=RING_PACKED,
    device="any",
)
def base_packed(target: Target) -> None:
    rig = running(target, features=VERSION_1 | PACKED)
    work = rig.work
    assert work is not None
    slots = 1 if rig.indirect_max else len(work.readable) + len(work.writable)
    wanted = 0x8000_8000 | slots << 16 | slots
    got = rig.stop(rig.main)
    expect(got == wanted, f"{got:#010x}, must be {wanted:#010x} after one chain of {slots} descriptors")


@rule("ring.base-start", "A ring continues where SET_VRING_BASE says", section=BASE, device="any")
def base_start(target: Target) -> None:
    rig = rig_for(target, base=1000)
    rig.start()
    rig.complete()
    got = rig.stop(rig.main)
    expect(got & 0xFFFF == 1001, f"it began at 1000 and did one request, the index is {got & 0xFFFF}")


@rule("ring.kick-nofd", "SET_VRING_KICK without a descriptor: the ring is polled", section=KICK, device="any")
def kick_nofd(target: Target) -> None:
    rig = rig_for(target)
    with prerequisite("a ring cannot be set up"):
        rig.set_up(kick=False)
    for ring in rig.rings:
        rig.peer.do(F.SET_VRING_KICK, VringFd(ring.index, nofd=True))
    rig.complete(kick=False)


@rule(
    "ring.kick-first",
    "The kick may be given before size and addresses",
    section=KICK,
    severity=Severity.SHOULD,
    device="any",
)
def kick_first(target: Target) -> None:
    rig = rig_for(target)
    for ring in rig.rings:
        rig.give_call(ring)
        rig.enable(ring)
    rig.share()
    for ring in rig.rings:
        rig.place(ring)
        rig.give_kick(ring)
        ring.kick()
    rig.complete()


@rule(
    "ring.kick-replaced",
    "The kick descriptor can be replaced while a ring runs",
    section="Ring states",
    device="any",
)
def kick_replaced(target: Target) -> None:
    rig = running(target)
    ring = rig.main
    ring.kick_fd = target.eventfd()
    rig.give_kick(ring)
    rig.complete()


@rule("ring.call", "The call descriptor is signalled when buffers were used", section=CALL, device="any")
def call(target: Target) -> None:
    rig = running(target)
    ring = rig.main
    ring.queue.enable_callbacks()
    ring.called(0)
    rig.complete()
    expect(ring.called(target.timeout), f"a request came back, but no call within {target.timeout:g} s")


@rule(
    "ring.call-replaced",
    "The call descriptor can be replaced while a ring runs",
    section="Ring states",
    device="any",
)
def call_replaced(target: Target) -> None:
    rig = running(target)
    ring = rig.main
    ring.queue.enable_callbacks()
    ring.called(0)
    old, ring.call_fd = ring.call_fd, target.eventfd()
    rig.give_call(ring)
    rig.complete()
    expect(
        ring.called(target.timeout),
        f"a request came back, but no call on the new one within {target.timeout:g} s",
    )
    ring.call_fd = old


@rule("ring.call-nofd", "SET_VRING_CALL without a descriptor: the driver polls", section=CALL, device="any")
def call_nofd(target: Target) -> None:
    rig = running(target)
    rig.peer.do(F.SET_VRING_CALL, VringFd(rig.main.index, nofd=True))
    rig.complete()


@rule("ring.err", "SET_VRING_ERR is accepted, with a descriptor and without", section=ERR)
def err(target: Target) -> None:
    rig = Rig(target, target.session())
    rig.peer.do(F.SET_VRING_ERR, VringFd(0), [rig.rings[0].err_fd])
    rig.peer.do(F.SET_VRING_ERR, U64(NOFD))


@rule(
    "ring.event-index",
    "A descriptor for a ring that does not exist is refused",
    section=KICK,
    severity=Severity.SHOULD,
    protocol=_ACK | ProtocolF.MQ,
)
def event_index(target: Target) -> None:
    if target.queues >= 128:  # queue pairs: all 256 rings may be there
        return
    for number in (F.SET_VRING_KICK, F.SET_VRING_CALL, F.SET_VRING_ERR):
        target.session().must_refuse(number, "there is no ring 255", U64(255), [target.eventfd()])


@rule(
    "ring.event-high-bits",
    "Bits 9 to 63 of SET_VRING_KICK do not make another ring of it",
    section=KICK,
    severity=Severity.ROBUST,
)
def event_high_bits(target: Target) -> None:
    target.session().survive(F.SET_VRING_KICK, U64(0x10000), [target.eventfd()])


@rule(
    "ring.enable-value",
    "SET_VRING_ENABLE with a value other than 0 and 1 does no harm",
    section=ENABLE,
    severity=Severity.ROBUST,
)
def enable_value(target: Target) -> None:
    target.session().survive(F.SET_VRING_ENABLE, VringState(0, 0xFFFFFFFF))


@rule(
    "ring.get-base-unknown",
    "GET_VRING_BASE of a ring that does not exist does no harm",
    section=GET_BASE,
    severity=Severity.ROBUST,
)
def get_base_unknown(target: Target) -> None:
    for index in (0xFFFF, 0x8000_0000):
        peer = target.session()
        peer.send(F.GET_VRING_BASE, VringState(index, 0))
        peer.ended(target.settle)
