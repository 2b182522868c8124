# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Rules: the dirty log, the device's state, post-copy."""

from __future__ import annotations

import os
import select
import time

from vhost.check.peer import FrontendMsg as F
from vhost.check.peer import memfd
from vhost.check.rig import GUEST_ADDR, PAGE, Rig, rig_for, running
from vhost.check.rule import Failed, PeerClosed, Severity, expect, prerequisite, rule
from vhost.check.target import LOG_ALL, Target
from vhost.features import ProtocolF, VhostF
from vhost.memory import Region
from vhost.user.payloads import EMPTY, NOFD, U64, DeviceState, Log

LOG = "Migration"
STATE = "Migrating back-end state"
SET_STATE = "Front-end message types, SET_DEVICE_STATE_FD"
_SHMFD = ProtocolF.LOG_SHMFD
_STATE = ProtocolF.DEVICE_STATE
_PAGEFAULT = ProtocolF.PAGEFAULT
LOG_SIZE = 2 * GUEST_ADDR // PAGE // 8
VRING_LOG = 1


def _reply_to_log(rig: Rig, log: Log, fd: int) -> None:
    """Answered once; what the reply says means nothing."""
    rig.peer.ask(F.SET_LOG_BASE, log, [fd])
    rig.peer.sync()


@rule("log.base", "SET_LOG_BASE is answered, once", section=LOG, protocol=_SHMFD)
def base(target: Target) -> None:
    peer = target.session(protocol=int(_SHMFD))
    fd = target.keep(memfd(LOG_SIZE))
    peer.ask(F.SET_LOG_BASE, Log(LOG_SIZE, 0), [fd])
    peer.sync()


@rule(
    "log.base-need-reply",
    "So it is with need_reply",
    section="VHOST_USER_PROTOCOL_F_REPLY_ACK",
    protocol=_SHMFD | ProtocolF.REPLY_ACK,
)
def base_need_reply(target: Target) -> None:
    peer = target.session(protocol=int(_SHMFD))
    fd = target.keep(memfd(LOG_SIZE))
    peer.ask(F.SET_LOG_BASE, Log(LOG_SIZE, 0), [fd], need_reply=True)
    peer.sync()


@rule(
    "log.offered",
    "LOG_SHMFD and LOG_ALL are offered together",
    section=LOG,
    severity=Severity.SHOULD,
    protocol=_SHMFD,
)
def offered(target: Target) -> None:
    expect(target.offered & LOG_ALL, "LOG_SHMFD is offered, VHOST_F_LOG_ALL is not")


@rule("log.fd", "SET_LOG_FD is accepted", section=LOG, severity=Severity.SHOULD, protocol=_SHMFD)
def log_fd(target: Target) -> None:
    target.session(protocol=int(_SHMFD)).do(F.SET_LOG_FD, EMPTY, [target.eventfd()])


def _logging(
    target: Target, *, offset: int = 0, log_all: bool = True, used: bool = True
) -> tuple[Rig, Region]:
    """A running rig, logging switched on as QEMU does it."""
    rig = running(target, protocol=int(_SHMFD))
    log = Region.allocate(offset + LOG_SIZE)
    with prerequisite("SET_LOG_BASE"):
        _reply_to_log(rig, Log(LOG_SIZE, offset), log.fd)
    features = rig.peer.features | (LOG_ALL if log_all else 0)
    rig.peer.do(F.SET_FEATURES, U64(features))
    for ring in rig.rings:
        where = ring.addr + ring.layout.used
        rig.peer.do(F.SET_VRING_ADDR, ring.address(flags=VRING_LOG if used else 0, log=where))
    return rig, log


def _marked(log: Region, addr: int, offset: int = 0) -> bool:
    page = addr // PAGE
    return bool(memoryview(log)[offset + page // 8] >> page % 8 & 1)


def _expect_marks(rig: Rig, log: Region, offset: int = 0) -> None:
    """A back-end may mark after the driver has seen what was used, but before it is stopped."""
    sent = rig.complete()
    ring = rig.main
    places = [
        ("the used ring", ring.addr + ring.layout.used),
        *(("the buffer", addr) for addr, _ in sent.writable),
    ]
    deadline = time.monotonic() + rig.target.timeout
    for what, addr in places:
        while not _marked(log, addr, offset):
            if time.monotonic() > deadline:
                raise Failed(f"{what} at {addr:#x} was written, its page is not marked")
            time.sleep(0.001)


@rule(
    "log.marks",
    "With LOG_ALL, what is written is marked: buffers, and the used ring",
    section=LOG,
    protocol=_SHMFD,
    features=VhostF.LOG_ALL,
    device="any",
)
def marks(target: Target) -> None:
    _expect_marks(*_logging(target))


@rule(
    "log.offset",
    "The log begins at the offset that SET_LOG_BASE says",
    section=LOG,
    protocol=_SHMFD,
    features=VhostF.LOG_ALL,
    device="any",
)
def log_offset(target: Target) -> None:
    rig, log = _logging(target, offset=PAGE)
    _expect_marks(rig, log, PAGE)
    expect(not any(memoryview(log)[:PAGE]), "bytes before the offset were written")


@rule(
    "log.only-written",
    "Pages that nobody wrote are not marked",
    section=LOG,
    severity=Severity.SHOULD,
    protocol=_SHMFD,
    features=VhostF.LOG_ALL,
    device="any",
)
def only_written(target: Target) -> None:
    rig, log = _logging(target)
    rig.complete()
    first, last = rig.region.guest_addr // PAGE, (rig.region.guest_addr + rig.region.size) // PAGE
    outside = [
        page
        for page in range(first - 64, last + 64)
        if not first <= page < last and _marked(log, page * PAGE)
    ]
    expect(not outside, f"pages {outside} outside the memory are marked")
    untouched = rig.region.guest_addr + rig.region.size - PAGE
    expect(not _marked(log, untouched), f"the page at {untouched:#x}, where no buffer is, is marked")


@rule(
    "log.off",
    "Without LOG_ALL no buffer is marked",
    section=LOG,
    severity=Severity.SHOULD,
    protocol=_SHMFD,
    features=VhostF.LOG_ALL,
    device="any",
)
def off(target: Target) -> None:
    rig, log = _logging(target, log_all=False, used=False)
    rig.complete()
    expect(not any(memoryview(log)), "the log was written")


@rule(
    "log.too-small",
    "A log that does not cover the memory is refused, or not written beyond",
    section=LOG,
    severity=Severity.ROBUST,
    protocol=_SHMFD,
    features=VhostF.LOG_ALL,
    device="any",
)
def too_small(target: Target) -> None:
    rig = running(target, protocol=int(_SHMFD))
    log = Region.allocate(2 * PAGE)
    try:
        rig.peer.ask(F.SET_LOG_BASE, Log(16, 0), [log.fd])
        rig.peer.do(F.SET_FEATURES, U64(rig.peer.features | LOG_ALL))
        ring = rig.main
        rig.peer.do(F.SET_VRING_ADDR, ring.address(flags=VRING_LOG, log=ring.addr + ring.layout.used))
        rig.submit()
        ring.kick()
        rig.wait(timeout=target.settle)
    except Failed:
        return
    expect(not any(memoryview(log)[16:]), "16 bytes were given, what lies behind was written")


@rule(
    "log.beyond-file",
    "A log that is larger than its file does no harm",
    section=LOG,
    severity=Severity.ROBUST,
    protocol=_SHMFD,
    features=VhostF.LOG_ALL,
    device="any",
)
def beyond_file(target: Target) -> None:
    rig = running(target, protocol=int(_SHMFD))
    fd = target.keep(memfd(0))
    try:
        rig.peer.ask(F.SET_LOG_BASE, Log(LOG_SIZE, 0), [fd])
        rig.peer.do(F.SET_FEATURES, U64(rig.peer.features | LOG_ALL))
        rig.submit()
        rig.main.kick()
        rig.wait(timeout=target.settle)
    except Failed:
        return


# -- the device's state ----------------------------------------------------------------------------


def _suspended(target: Target) -> Rig:
    rig = running(target, protocol=int(_STATE))
    with prerequisite("GET_VRING_BASE"):
        for ring in rig.rings:
            rig.stop(ring)
    return rig


def _transfer(rig: Rig, direction: int, data: bytes = b"") -> bytes:
    """Through a pipe of ours, or the channel that the back-end gives instead."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    saving = direction == DeviceState.SAVE
    ours, theirs = (reader, writer) if saving else (writer, reader)
    os.set_blocking(ours, False)  # ours alone: that end's mode is nothing to surprise the back-end with
    try:
        got = rig.peer.ask(F.SET_DEVICE_STATE_FD, DeviceState(direction, 0), [theirs])
    finally:
        os.close(theirs)
    with os.fdopen(ours, "rb" if saving else "wb", buffering=0) as channel:
        value = got.u64
        expect(value & 0xFF == 0, f"SET_DEVICE_STATE_FD: refused with {value:#x}")
        expect(
            bool(value & NOFD) == (not got.fds),
            f"SET_DEVICE_STATE_FD: {value:#x} with {len(got.fds)} descriptors",
        )
        fd = got.fds[0] if got.fds else channel.fileno()
        deadline = time.monotonic() + rig.target.timeout
        came = bytearray()
        while saving or data:
            poll = select.poll()
            poll.register(fd, select.POLLIN if saving else select.POLLOUT)
            if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
                raise Failed("the state's end did not come" if saving else "the state is not read")
            if not saving:
                try:
                    data = data[os.write(fd, data) :]
                except BrokenPipeError:
                    raise Failed("the back-end closed the channel before it had read the state") from None
                continue
            part = os.read(fd, 1 << 16)
            if not part:
                break
            came += part
        return bytes(came)


@rule(
    "state-transfer.save",
    "The state can be saved, and CHECK_DEVICE_STATE says that it was",
    section=STATE,
    protocol=_STATE,
    device="any",
)
def save(target: Target) -> None:
    rig = _suspended(target)
    _transfer(rig, DeviceState.SAVE)
    value = rig.peer.ask(F.CHECK_DEVICE_STATE).u64
    expect(value == 0, f"CHECK_DEVICE_STATE: {value:#x}")


@rule(
    "state-transfer.load",
    "Another session can load it and go on",
    section=STATE,
    protocol=_STATE,
    device="any",
)
def load(target: Target) -> None:
    rig = _suspended(target)
    with prerequisite("the state cannot be saved"):
        state = _transfer(rig, DeviceState.SAVE)
        rig.peer.ask(F.CHECK_DEVICE_STATE)
    target.hang_up(rig.peer)
    second = rig_for(target, protocol=int(_STATE))
    _transfer(second, DeviceState.LOAD, state)
    value = second.peer.ask(F.CHECK_DEVICE_STATE).u64
    expect(value == 0, f"CHECK_DEVICE_STATE: {value:#x}")
    second.start()
    second.complete()


@rule(
    "state-transfer.garbage",
    "A state that is none is told of by CHECK_DEVICE_STATE",
    section=STATE,
    protocol=_STATE,
    device="any",
)
def garbage(target: Target) -> None:
    rig = rig_for(target, protocol=int(_STATE))
    try:
        _transfer(rig, DeviceState.LOAD, b"\xff" * 4096)
        value = rig.peer.ask(F.CHECK_DEVICE_STATE).u64
    except Failed:
        return
    expect(value != 0, "CHECK_DEVICE_STATE says that 4096 bytes of 0xff are this device's state")


@rule("state-transfer.direction", "A direction that is none is refused", section=SET_STATE, protocol=_STATE)
def direction(target: Target) -> None:
    peer = target.session(protocol=int(_STATE))
    reader, writer = os.pipe2(os.O_CLOEXEC)
    target.keep(reader)
    target.keep(writer)
    try:
        got = peer.ask(F.SET_DEVICE_STATE_FD, DeviceState(7, 0), [writer])
    except PeerClosed:
        return
    expect(got.u64 & 0xFF, f"direction 7 was granted with {got.u64:#x}")
    expect(not got.fds, "an error was told, with a descriptor")


@rule(
    "state-transfer.check-first",
    "CHECK_DEVICE_STATE without a transfer is answered",
    section=STATE,
    protocol=_STATE,
    severity=Severity.ROBUST,
)
def check_first(target: Target) -> None:
    assert target.session(protocol=int(_STATE)).ask(F.CHECK_DEVICE_STATE).u64 >= 0


# -- post-copy -------------------------------------------------------------------------------------


@rule(
    "postcopy.advise",
    "POSTCOPY_ADVISE is answered with a userfaultfd",
    section="Front-end message types, POSTCOPY_ADVISE",
    protocol=_PAGEFAULT,
)
def advise(target: Target) -> None:
    peer = target.session(protocol=int(_PAGEFAULT))
    got = peer.ask(F.POSTCOPY_ADVISE)
    expect(len(got.fds) == 1, f"{len(got.fds)} descriptors")
    link = os.readlink(f"/proc/self/fd/{got.fds[0]}")
    expect("userfaultfd" in link, f"the descriptor is {link}")


@rule(
    "postcopy.end",
    "POSTCOPY_END is answered with a status",
    section="Front-end message types, POSTCOPY_END",
    protocol=_PAGEFAULT,
)
def end(target: Target) -> None:
    peer = target.session(protocol=int(_PAGEFAULT))
    with prerequisite("POSTCOPY_ADVISE and POSTCOPY_LISTEN"):
        peer.ask(F.POSTCOPY_ADVISE)
        peer.do(F.POSTCOPY_LISTEN)
    value = peer.ask(F.POSTCOPY_END).u64
    expect(value == 0, f"{value:#x}")
    peer.sync()
