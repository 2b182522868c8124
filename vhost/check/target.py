# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The back-end under test: how to get a connection to it, and what it offers.

Each rule has connections of its own, which end with it. Knows no rule.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vhost.check.peer import FrontendMsg as F
from vhost.check.peer import Peer
from vhost.check.rule import Failed, NotOffered, Outcome, PeerClosed, Skipped, prerequisite
from vhost.check.spawn import Program
from vhost.features import BlkF, NetF, ProtocolF, VhostF, VirtioF
from vhost.user.payloads import U64, Config
from vhost.virtio_blk import BlkConfig

PROTOCOL_FEATURES = int(VhostF.PROTOCOL_FEATURES)
LOG_ALL = int(VhostF.LOG_ALL)
VERSION_1 = int(VirtioF.VERSION_1)
RING_PACKED = int(VirtioF.RING_PACKED)
ACCESS_PLATFORM = int(VirtioF.ACCESS_PLATFORM)
USUAL = int(ProtocolF.REPLY_ACK | ProtocolF.MQ | ProtocolF.CONFIG)
"""What every session negotiates where it is offered."""
_RETRY_PAUSE = 0.02
_STARTS = 3
"""How often a program is started that ends before it can be connected to."""


class CannotRun(Exception):
    """There is nothing that could be checked."""


class Target:
    """A back-end that listens on ``path``. With ``program`` it is ours to start, as often as it ends."""

    def __init__(
        self,
        path: str,
        *,
        program: Program | None = None,
        timeout: float = 5.0,
        settle: float = 0.2,
        write: bool = False,
        device: str = "",
    ) -> None:
        self.path = path
        self.program = program
        self.timeout = timeout
        self.settle = settle
        """How long nothing has to happen before it is taken that nothing will."""
        self.write = write
        self.device = device
        self.offered = 0
        self.protocol = 0
        self.queues = 0
        """What GET_QUEUE_NUM says; 0 if it was not asked."""
        self.blk: BlkConfig | None = None
        self.once = False
        """It ends after one connection, or serves no other beside it."""
        self.peers: list[Peer] = []
        self._cleanups: list[Callable[[], None]] = []

    # -- connections -------------------------------------------------------------------------------

    def connect(self, *, beside: bool = False) -> Peer:
        """A connection that is served: GET_FEATURES was answered on it, and nothing else was said. It is
        closed with the rule; those before it are closed now, for many back-ends serve one at a time, unless
        it is to be ``beside`` them: then it may never be served."""
        deadline = time.monotonic() + max(self.timeout, 5.0)
        if beside:
            self.peers.append(Peer(self._socket(deadline), self.timeout))
            return self.peers[-1]
        self.hang_up()
        while True:
            peer = Peer(self._socket(deadline), self.timeout)
            self.peers.append(peer)
            try:
                _lenient(peer, F.GET_FEATURES)
            except PeerClosed:
                # A back-end that has not yet cleared away the session before may refuse this one.
                if time.monotonic() >= deadline:
                    raise
                peer.close()
                self.peers.remove(peer)
                time.sleep(_RETRY_PAUSE)
                continue
            peer.transcript.clear()
            return peer

    def _socket(self, deadline: float) -> socket.socket:
        """A connected socket; waits for a program that has just been started."""
        if self.program is not None and self.once and all(peer.closed for peer in self.peers):
            self.program.ended(self.timeout)
        starts = 0
        while True:
            if self.program is not None and not self.program.alive:
                if starts == _STARTS:
                    raise PeerClosed(f"cannot connect to {self.path}: {self.program.how()}")
                self.program.start()
                starts += 1
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.settimeout(self.timeout)
                sock.connect(self.path)
                return sock
            except OSError as error:
                sock.close()
                retry = self.program is not None or isinstance(
                    error, (ConnectionRefusedError, BlockingIOError)
                )
                if not retry or time.monotonic() > deadline:
                    how = f" ({self.program.how()})" if self.program else ""
                    reason = error.strerror or str(error)
                    raise PeerClosed(f"cannot connect to {self.path}: {reason}{how}") from error
                time.sleep(_RETRY_PAUSE)

    def session(self, *, protocol: int = 0, features: int = VERSION_1, without: int = 0) -> Peer:
        """A connection with what is usual and ``protocol`` negotiated, an owner, and these features."""
        with prerequisite("a session cannot be set up"):
            peer = self.connect()
            self.negotiate(peer, protocol=protocol, without=without)
            self.set_features(peer, features)
            return peer

    def negotiate(self, peer: Peer, *, protocol: int = 0, without: int = 0) -> None:
        """As far as SET_OWNER."""
        offered = peer.ask(F.GET_FEATURES).u64
        if offered & PROTOCOL_FEATURES:
            chosen = peer.ask(F.GET_PROTOCOL_FEATURES).u64 & (USUAL | int(protocol)) & ~int(without)
            peer.send(F.SET_PROTOCOL_FEATURES, U64(chosen))
            peer.protocol = chosen
        peer.do(F.SET_OWNER)

    def set_features(self, peer: Peer, features: int) -> None:
        """Those of them that are offered, and the protocol features' bit."""
        peer.features = self.offered & (int(features) | PROTOCOL_FEATURES)
        peer.do(F.SET_FEATURES, U64(peer.features))

    def hang_up(self, *peers: Peer) -> None:
        """Close these connections now, or all, not at the end of the rule. What was said is kept."""
        for peer in peers or tuple(self.peers):
            peer.close()

    # -- for the rule that runs --------------------------------------------------------------------

    def finally_(self, cleanup: Callable[[], None]) -> None:
        """Call this at the end of the rule."""
        self._cleanups.append(cleanup)

    def keep(self, fd: int) -> int:
        """Close this descriptor at the end of the rule."""
        self.finally_(lambda: os.close(fd))
        return fd

    def eventfd(self) -> int:
        return self.keep(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))

    def end_rule(self) -> list[str]:
        """Close what the rule opened; returns what was said, the connections one after the other."""
        said: list[str] = []
        for number, peer in enumerate(self.peers, 1):
            if len(self.peers) > 1:
                said.append(f"connection {number}:")
            said += peer.transcript
            peer.close()
        self.peers = []
        cleanups, self._cleanups = self._cleanups, []
        for cleanup in reversed(cleanups):
            cleanup()
        return said

    def require_protocol(self, features: int) -> None:
        """NotOffered unless the back-end has them all."""
        missing = int(features) & ~self.protocol
        if missing:
            raise NotOffered(" ".join(f.name or "" for f in ProtocolF if int(f) & missing))

    # -- what it is --------------------------------------------------------------------------------

    def learn(self) -> None:
        """Ask what it offers; CannotRun if it does not answer."""
        try:
            self._learn()
        except Outcome as error:
            raise CannotRun(f"{self.path}: {error}") from error
        finally:
            self.end_rule()
        if self.program is not None:
            self.once = self.program.ended(0.5)

    def _learn(self) -> None:
        peer = self.connect()
        self.offered = _lenient(peer, F.GET_FEATURES)
        if self.offered & PROTOCOL_FEATURES:
            self.protocol = _lenient(peer, F.GET_PROTOCOL_FEATURES)
            chosen = self.protocol & int(ProtocolF.MQ | ProtocolF.CONFIG)
            peer.send(F.SET_PROTOCOL_FEATURES, U64(chosen))
            peer.protocol = chosen
            if chosen & ProtocolF.MQ:
                self.queues = _lenient(peer, F.GET_QUEUE_NUM)
        self.device = self.device or _guess(self.offered)
        if self.device == "blk" and self.protocol & ProtocolF.CONFIG:
            with contextlib.suppress(Failed):
                self.blk = BlkConfig.unpack(self.config(peer))

    def as_dict(self) -> dict[str, Any]:
        """What it offers, as plain data."""
        return {
            "socket": self.path,
            "device": self.device,
            "features": f"{self.offered:#x}",
            "protocol_features": f"{self.protocol:#x}",
            "queues": self.queues,
        }

    def config(self, peer: Peer) -> bytes:
        """As much of the configuration space as it gives; Failed if it gives none."""
        error: Failed | None = None
        for size in (60, 36, 24, 8):
            try:
                got = Config.unpack(peer.ask(F.GET_CONFIG, Config(0, size, 0, bytes(size))).payload)
                if len(got.payload) == size:
                    return got.payload
            except Failed as failed:
                error = failed
                if isinstance(failed, PeerClosed):
                    raise
            except Exception as bad:  # a payload that is no Config
                error = Failed(str(bad))
        raise error or Failed("GET_CONFIG: no answer of the size that was asked for")

    def pid(self) -> int | None:
        """The process behind the socket, if it can be known and is not ours."""
        if self.program is not None and self.program.pid is not None:
            return self.program.pid
        if not self.peers:
            return None
        data = self.peers[-1].socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid: int = struct.unpack("3i", data)[0]
        return pid if pid not in (0, os.getpid(), os.getppid()) else None

    def open_fds(self) -> int:
        """How many descriptors the back-end has; Skipped where that cannot be seen."""
        pid = self.pid()
        if pid is None:
            raise Skipped("which process it is cannot be told from here")
        try:
            return len(list(Path(f"/proc/{pid}/fd").iterdir()))
        except OSError as error:
            raise Skipped(f"/proc/{pid}/fd: {error.strerror}") from None

    def alive(self) -> str:
        """Whether it still answers on a new connection: "" if so, else what happened."""
        try:
            self.connect().ask(F.GET_FEATURES)
        except Failed as error:
            return f"and it serves no new connection afterwards: {error}"
        finally:
            self.end_rule()
        return ""


def _lenient(peer: Peer, number: F) -> int:
    """The number in the answer, whatever else is wrong with it: that is for the rules to say."""
    peer.send(number)
    return int.from_bytes(peer.receive().payload[:8], "little")


def _guess(features: int) -> str:
    """vhost-user does not say what kind of device it is."""
    if features & (NetF.MRG_RXBUF | NetF.CTRL_VQ):
        return "net"
    if features & BlkF.FLUSH and features & (BlkF.BLK_SIZE | BlkF.SEG_MAX):
        return "blk"
    return ""
