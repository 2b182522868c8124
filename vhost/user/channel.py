# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""BackendChannel: the back-end's own requests (vhost-user, "Back-end communication").

Sends them without ever waiting: the front-end may be waiting for us on the other channel. Knows which
callback waits for which reply; knows neither what the requests mean nor who polls the socket.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence

from vhost.errors import ProtocolError
from vhost.user.messages import BackendMsg, GpuMsg
from vhost.user.payloads import EMPTY, Payload
from vhost.user.session import Message
from vhost.user.transport import Transport

REPLIES_PER_STEP = 16

Then = Callable[[Message | None], None]
"""Called with the answer, whose descriptors it may take; None: there will be none."""


class BackendChannel:
    """Owns the transport. Once something is wrong with the front-end's end, ``error`` says what, requests
    are dropped, and whoever owns the channel closes it."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.session = transport.session
        self.error: ProtocolError | None = None
        self._waiting: deque[Then | None] = deque()

    def fileno(self) -> int:
        return self.transport.fileno()

    @property
    def pending(self) -> bool:
        """Some bytes wait for the front-end to read: poll for POLLOUT, too."""
        return self.transport.pending > 0

    def request(
        self,
        number: BackendMsg | GpuMsg,
        payload: Payload = EMPTY,
        fds: Sequence[int] = (),
        *,
        then: Then | None = None,
    ) -> None:
        """Send a request; the descriptors stay the caller's. ``then`` gets the answer, from a later step:
        the row's reply, or the status that it asks for where REPLY_ACK was negotiated. Without ``then`` no
        status is asked for. Raises InactiveFeature if the request's feature was not negotiated."""
        if self.error is not None:
            if then is not None:
                then(None)
            return
        outgoing = self.session.request(number, payload, fds, need_reply=False if then is None else None)
        if outgoing.expects_reply:
            self._waiting.append(then)
        try:
            self.transport.send(outgoing)
        except ProtocolError as error:
            self.error = error.with_traceback(None)
        if then is not None and not outgoing.expects_reply:
            then(None)

    def step(self) -> bool:
        """Read the answers that are there, and send what is pending. False once it is over, see
        ``error``."""
        try:
            self.transport.flush()
            for _ in range(REPLIES_PER_STEP):
                message = self.transport.receive()
                if message is None:
                    break
                with contextlib.closing(message):
                    then = self._waiting.popleft()
                    if then is not None:
                        then(message)
        except ProtocolError as error:
            # Its frames hold this object, and all that the session has, until the collector comes by.
            self.error = error.with_traceback(None)
        return self.error is None

    def close(self) -> None:
        """Those who wait for an answer are told that there will be none."""
        waiting, self._waiting = self._waiting, deque()
        self.transport.close()
        for then in waiting:
            if then is not None:
                then(None)
