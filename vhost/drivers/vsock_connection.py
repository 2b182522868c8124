# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""One vsock connection as a state machine (VIRTIO 1.2, 5.10.6): packets in, packets out, and the credit.

Sans-IO: it knows headers and payloads, and nothing of rings, threads or time. Whoever drives it hands
every packet of the connection to ``receive``, sends what ``next_control`` says for as long as ``wants``
is not 0, and sends as much data as ``credit`` allows; ``pack_into`` makes the headers. The peer is not
trusted: what breaks the rules ends the connection, and what is kept of it is bounded by ``buf_alloc``.
"""

from __future__ import annotations

import errno
from collections import deque
from enum import Enum

from vhost.errors import VhostError
from vhost.virtio_vsock import HEADER, SeqF, ShutdownF, VsockOp, VsockType

Address = tuple[int, int]
"""(CID, port), as sockets of AF_VSOCK have it"""

# Plain integers: an operation on an IntFlag costs as much as a system call.
_REQUEST, _RESPONSE, _RST, _SHUTDOWN = (
    int(op) for op in (VsockOp.REQUEST, VsockOp.RESPONSE, VsockOp.RST, VsockOp.SHUTDOWN)
)
_RW, _UPDATE, _ASK = int(VsockOp.RW), int(VsockOp.CREDIT_UPDATE), int(VsockOp.CREDIT_REQUEST)
_NO_RECEIVE, _NO_SEND = int(ShutdownF.RECEIVE), int(ShutdownF.SEND)
_BOTH = _NO_RECEIVE | _NO_SEND
_EOM, _EOR = int(SeqF.EOM), int(SeqF.EOR)
_M32 = 0xFFFF_FFFF

# The order in which they have to go out: nothing before the connection is asked for, and a shutdown last.
_CONTROL = (_REQUEST, _RESPONSE, _UPDATE, _ASK, _SHUTDOWN, _RST)
_OPENING = 1 << _REQUEST | 1 << _RESPONSE


class VsockReset(VhostError, ConnectionResetError):
    """The peer, or the device, ended the connection without ceremony; or broke the rules."""


class VsockRefused(VhostError, ConnectionRefusedError):
    """Nobody listens there, or whoever does has no room."""


class VsockBroken(VhostError, BrokenPipeError):
    """Nothing can be sent any more: one of the two sides was shut down."""


class State(Enum):
    CONNECTING = "connecting"
    ESTABLISHED = "established"
    CLOSED = "closed"
    """No packet belongs to it any more; what was received before may still be read."""


class Connection:
    """One flow between ``local`` and ``remote``. ``buf_alloc``: how many bytes the peer may send ahead of
    those who read them.

    ``request``: make a connection that asks the peer (``CONNECTING``). Otherwise the peer asked, with the
    credit given, and gets a RESPONSE.
    """

    __slots__ = (
        "_announced",
        "_asked",
        "_buffer",
        "_messages",
        "_partial",
        "buf_alloc",
        "error",
        "fwd_cnt",
        "in_flight",
        "kind",
        "local",
        "local_shut",
        "peer_buf_alloc",
        "peer_shut",
        "remote",
        "state",
        "tx_cnt",
        "wants",
    )

    def __init__(
        self,
        local: Address,
        remote: Address,
        buf_alloc: int,
        *,
        kind: int = VsockType.STREAM,
        request: bool = True,
        peer_buf_alloc: int = 0,
    ) -> None:
        self.local, self.remote, self.kind = local, remote, int(kind)
        self.state = State.CONNECTING if request else State.ESTABLISHED
        self.error: VhostError | None = None
        """Why it ended, if it did not end cleanly."""
        self.wants = 1 << (_REQUEST if request else _RESPONSE)
        """Control packets that have to be sent: a mask of ``1 << op``, so that none is owed twice."""
        self.local_shut = self.peer_shut = 0
        """What we, what the peer will not do any more: a mask of ``ShutdownF``."""
        # 5.10.6.3: free-running 32-bit counters of payload bytes. peer_fwd_cnt is tx_cnt - in_flight.
        self.tx_cnt = self.in_flight = 0
        self.peer_buf_alloc = peer_buf_alloc
        self.buf_alloc = buf_alloc
        self.fwd_cnt = self._announced = 0
        self._asked = False
        # One buffer, not a list of packets: a peer that sends single bytes must not cost more than those.
        self._buffer = bytearray()
        # Complete messages in it (length << 1 | ends a record), and bytes of the last, incomplete one.
        self._messages: deque[int] = deque()
        self._partial = 0

    # ------------------------------------------------------------------ what the peer sends

    def receive(self, op: int, flags: int, payload: memoryview, buf_alloc: int, fwd_cnt: int) -> None:
        """A packet of this connection. ``payload`` may be in shared memory; it is copied at once."""
        if self.state is State.CLOSED:
            return
        if op == _RST:
            self._reset()
            return
        if (self.state is State.CONNECTING) != (op == _RESPONSE):
            self.abort(f"sent {_name(op)} while the connection was {self.state.value}")
            return
        # It may only become less: a counter that runs backwards, or ahead of what was sent, makes it more.
        in_flight = (self.tx_cnt - fwd_cnt) & _M32
        if in_flight > self.in_flight:
            was = (self.tx_cnt - self.in_flight) & _M32
            self.abort(f"says fwd_cnt {fwd_cnt:#x}: must be {was:#x} to {self.tx_cnt:#x}")
            return
        self.in_flight, self.peer_buf_alloc = in_flight, buf_alloc
        if in_flight < buf_alloc:
            self._asked = False
        if op == _RW:
            self._data(flags, payload)
        elif op == _ASK:
            self.wants |= 1 << _UPDATE
        elif op == _SHUTDOWN:
            self.peer_shut |= flags & _BOTH
            if self.peer_shut == _BOTH:
                self._end(1 << _RST)  # the answer that completes a clean disconnect (5.10.6.5)
        elif op == _RESPONSE:
            self.state = State.ESTABLISHED
        elif op != _UPDATE:
            self.abort(f"sent {_name(op)} while the connection was {self.state.value}")

    def _data(self, flags: int, payload: memoryview) -> None:
        size = len(payload)
        if self.peer_shut & _NO_SEND:
            self.abort(f"sent {size} bytes after it had shut down sending")
        elif self.local_shut & _NO_RECEIVE:
            self.fwd_cnt = (self.fwd_cnt + size) & _M32  # on their way when we said so
        elif len(self._buffer) + size > self.buf_alloc:
            held = len(self._buffer)
            self.abort(f"sent {size} bytes for a buffer that holds {held} of {self.buf_alloc}")
        else:
            self._buffer += payload
            if self.kind == VsockType.SEQPACKET:
                self._partial += size
                # A message of nothing could not be told from the end, and would take no credit.
                if flags & _EOM and self._partial:
                    self._messages.append(self._partial << 1 | (flags & _EOR == _EOR))
                    self._partial = 0

    def _reset(self) -> None:
        if self.state is State.CONNECTING:
            self.error = VsockRefused(errno.ECONNREFUSED, f"{self}: refused")
        elif self.local_shut != _BOTH:
            self.error = VsockReset(errno.ECONNRESET, f"{self}: reset by the peer")
        self._end(0)

    def _end(self, wants: int) -> None:
        self.state = State.CLOSED
        self.wants = wants

    def abort(self, what: str) -> None:
        """End it with a RST, because the peer did ``what``."""
        self.fail(f"the peer {what}", 1 << _RST)

    def fail(self, why: str, wants: int = 0) -> None:
        """End it; the peer is not told."""
        if self.state is not State.CLOSED:
            self.error = VsockReset(errno.ECONNRESET, f"{self}: {why}")
            self._end(wants)

    # ------------------------------------------------------------------ what goes to the peer

    @property
    def credit(self) -> int:
        """How many bytes may be sent now (5.10.6.3): 0 as well before the opening packet has left."""
        if self.state is not State.ESTABLISHED or self.wants & _OPENING:
            return 0
        return max(self.peer_buf_alloc - self.in_flight, 0)

    def ask_credit(self) -> None:
        """Nothing more can be sent: have the peer say when it can. Once until it says that there is room."""
        if self.state is State.ESTABLISHED and not self._asked:
            self._asked = True
            self.wants |= 1 << _ASK

    def next_control(self) -> tuple[int, int] | None:
        """The (op, flags) of the packet that has to be sent next, which is then taken to be sent."""
        for op in _CONTROL:
            if self.wants & 1 << op:
                self.wants &= ~(1 << op)
                return op, self.local_shut if op == _SHUTDOWN else 0
        return None

    def pack_into(self, view: memoryview, at: int, op: int, size: int = 0, flags: int = 0) -> None:
        """Write the header of a packet that is sent now, with ``size`` bytes of payload: no more than
        ``credit``."""
        HEADER.pack_into(
            view,
            at,
            self.local[0],
            self.remote[0],
            self.local[1],
            self.remote[1],
            size,
            self.kind,
            op,
            flags,
            self.buf_alloc,
            self.fwd_cnt,
        )
        self._announced = self.fwd_cnt
        self.wants &= ~(1 << _UPDATE)  # every packet says it
        if size:
            self.tx_cnt = (self.tx_cnt + size) & _M32
            self.in_flight += size

    def shutdown(self, flags: int) -> None:
        """We will not receive and/or send any more (``ShutdownF``). For good."""
        if self.state is State.ESTABLISHED and flags & ~self.local_shut:
            self.wants |= 1 << _SHUTDOWN
        self.local_shut |= flags
        if flags & _NO_RECEIVE:
            self.fwd_cnt = (self.fwd_cnt + len(self._buffer)) & _M32
            self._buffer.clear()
            self._messages.clear()
            self._partial = 0

    def close(self) -> bool:
        """Shut down both ways. True: the peer has to answer with a RST before the flow is over."""
        self.shutdown(_BOTH)
        if self.state is State.CONNECTING:
            self._end(0)
        return self.state is State.ESTABLISHED

    # ------------------------------------------------------------------ what the reader gets

    @property
    def readable(self) -> bool:
        """Would ``take`` give bytes, or the end?"""
        if self.kind == VsockType.SEQPACKET:
            return bool(self._messages) or self.at_end
        return bool(self._buffer) or self.at_end

    @property
    def at_end(self) -> bool:
        """No more will come than is in the buffer, and the peer meant it so."""
        return bool(self.local_shut & _NO_RECEIVE or self.peer_shut & _NO_SEND)

    @property
    def available(self) -> int:
        """How many bytes there are: of the stream, or of the next message."""
        if self.kind == VsockType.SEQPACKET:
            return self._messages[0] >> 1 if self._messages else 0
        return len(self._buffer)

    def take(self, limit: int) -> bytes:
        """Up to ``limit`` bytes of the stream, or of the next message, whose rest is lost. Nothing at the
        end, or if there is nothing."""
        size = min(self.available, limit)
        with memoryview(self._buffer) as view:
            data = bytes(view[:size])
        self._consume(size)
        return data

    def take_into(self, target: memoryview) -> int:
        """The same, to where the caller wants it: how many bytes."""
        size = min(self.available, len(target))
        with memoryview(self._buffer) as view:
            target[:size] = view[:size]
        self._consume(size)
        return size

    @property
    def ends_record(self) -> bool:
        """Does the next message end a record?"""
        return bool(self._messages and self._messages[0] & 1)

    def _consume(self, size: int) -> None:
        if self._messages:
            size = self._messages.popleft() >> 1
        del self._buffer[:size]
        self._forward(size)

    def _forward(self, size: int) -> None:
        self.fwd_cnt = (self.fwd_cnt + size) & _M32
        if self.state is not State.ESTABLISHED or self.peer_shut & _NO_SEND:
            return
        # Often enough for a peer that is stopped by it, and not for every byte. A message may need the whole
        # buffer, of which a part may be in it: its sender hears of it before the reader waits for the rest.
        news = (self.fwd_cnt - self._announced) & _M32
        if news >= (self.buf_alloc + 1) // 2 or (self.kind == VsockType.SEQPACKET and not self._messages):
            self.wants |= 1 << _UPDATE

    def __str__(self) -> str:
        (cid, port), (peer_cid, peer_port) = self.local, self.remote
        return f"vsock {cid}:{port} - {peer_cid}:{peer_port}"

    def __repr__(self) -> str:
        return f"<{self}: {self.state.value}>"


def _name(op: int) -> str:
    known = {int(one): one.name for one in VsockOp}
    return known.get(op) or f"the unknown operation {op}"
