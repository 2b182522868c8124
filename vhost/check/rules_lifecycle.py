# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Rules: connections that end, in good order and otherwise, and those that come beside them."""

from __future__ import annotations

import socket
import time

from vhost.check.peer import FrontendMsg as F
from vhost.check.peer import Peer
from vhost.check.rig import running
from vhost.check.rule import Failed, Severity, Skipped, expect, rule
from vhost.check.target import Target
from vhost.user.messages import frame
from vhost.user.payloads import U64

SECTION = "Communication"
RECONNECT = "Communication, reconnection"


def _again(target: Target, peer: Peer) -> None:
    """It ends; another one is served."""
    target.hang_up(peer)
    target.connect().ask(F.GET_FEATURES)


@rule(
    "lifecycle.reconnect",
    "After a connection another one is served",
    section=RECONNECT,
    severity=Severity.SHOULD,
)
def reconnect(target: Target) -> None:
    for _ in range(3):
        peer = target.session()
        _again(target, peer)


@rule(
    "lifecycle.silent",
    "A connection on which nothing was said may end",
    section=SECTION,
    severity=Severity.ROBUST,
)
def silent(target: Target) -> None:
    _again(target, target.connect())


@rule("lifecycle.half-header", "A connection may end in a header", section=SECTION, severity=Severity.ROBUST)
def half_header(target: Target) -> None:
    peer = target.connect()
    peer.send_bytes(frame(F.GET_FEATURES)[:7])
    _again(target, peer)


@rule(
    "lifecycle.half-payload", "A connection may end in a payload", section=SECTION, severity=Severity.ROBUST
)
def half_payload(target: Target) -> None:
    peer = target.connect()
    peer.send_bytes(frame(F.SET_FEATURES, U64(0).pack())[:15])
    _again(target, peer)


@rule(
    "lifecycle.half-with-fd",
    "A connection may end in a message that brought a descriptor; it is closed",
    section=SECTION,
    severity=Severity.ROBUST,
)
def half_with_fd(target: Target) -> None:
    read, write = socket.socketpair()
    target.finally_(read.close)
    with write:
        peer = target.connect()
        peer.send_bytes(frame(F.SET_VRING_KICK, U64(0).pack())[:15], [write.fileno()])
        _again(target, peer)
    read.settimeout(target.timeout)
    try:
        expect(read.recv(1) == b"", "the other end says something")
    except TimeoutError:
        raise Failed(
            f"the descriptor is still open {target.timeout:g} s after the connection's end"
        ) from None


@rule(
    "lifecycle.reply-unread",
    "A connection may end before the reply was read",
    section=SECTION,
    severity=Severity.ROBUST,
)
def reply_unread(target: Target) -> None:
    peer = target.connect()
    for _ in range(20):
        peer.send(F.GET_FEATURES)
    _again(target, peer)


@rule(
    "lifecycle.running",
    "A connection may end while rings run, and the next session runs",
    section=RECONNECT,
    severity=Severity.SHOULD,
    device="any",
)
def ends_running(target: Target) -> None:
    for _ in range(2):
        rig = running(target)
        rig.submit()
        rig.main.kick()
        target.hang_up(rig.peer)
    running(target).complete()


@rule(
    "lifecycle.half-close",
    "A front-end that shuts down its sending half ends the session",
    section=SECTION,
    severity=Severity.ROBUST,
)
def half_close(target: Target) -> None:
    peer = target.session()
    peer.socket.shutdown(socket.SHUT_WR)
    expect(peer.ended(), f"the connection is still open after {target.timeout:g} s")


@rule(
    "lifecycle.second",
    "A second connection does not disturb the first",
    section=SECTION,
    severity=Severity.SHOULD,
)
def second(target: Target) -> None:
    if target.once:
        raise Skipped("the program serves one connection and ends")
    first = target.session()
    other = target.connect(beside=True)
    try:
        other.send(F.GET_FEATURES)
        other.receive(target.settle)
    except Failed:
        pass  # it may wait, or be refused
    first.sync()
    target.hang_up(other)
    first.sync()


@rule(
    "lifecycle.many",
    "A connection may be one of many that come and go",
    section=RECONNECT,
    severity=Severity.ROBUST,
)
def many(target: Target) -> None:
    if target.once:
        raise Skipped("the program serves one connection and ends")
    for _ in range(20):
        target.hang_up(target.session())


@rule(
    "lifecycle.fds",
    "A session that ended leaves no descriptors behind",
    section=RECONNECT,
    severity=Severity.ROBUST,
    device="any",
)
def fds(target: Target) -> None:
    if target.once:
        raise Skipped("the program serves one connection and ends")
    target.hang_up(running(target).peer)
    before = _settled_fds(target, None)
    for _ in range(4):
        target.hang_up(running(target).peer)
    after = _settled_fds(target, before)
    expect(after <= before, f"{before} descriptors are open after one session, {after} after five")


def _settled_fds(target: Target, wanted: int | None) -> int:
    """What is open once the last session has been cleared away: as few as wanted, or what stays."""
    probe = target.connect()
    probe.sync()
    deadline = time.monotonic() + target.timeout
    last, since = target.open_fds(), time.monotonic()
    while time.monotonic() < deadline:
        now = target.open_fds()
        if wanted is not None and now <= wanted:
            break
        if now != last:
            last, since = now, time.monotonic()
        elif wanted is None and time.monotonic() - since > 2 * target.settle:
            break
        time.sleep(0.02)
    found = target.open_fds()
    target.hang_up(probe)
    return found
