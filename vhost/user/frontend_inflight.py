# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""In-flight tracking, as a front-end asks for it (vhost-user, "Inflight I/O tracking").

The buffer is kept, and given to the back-end that comes after one that died. What is in it is the
back-ends' business: it is not even mapped here.
"""

from __future__ import annotations

from vhost.errors import InvalidMessage, ProtocolError
from vhost.features import ProtocolF
from vhost.ops import InflightBuffer
from vhost.user.frontend_base import FrontendBase
from vhost.user.messages import FrontendMsg as F
from vhost.user.payloads import Inflight


class FrontendInflight(FrontendBase):
    @property
    def tracks_inflight(self) -> bool:
        return self._has(ProtocolF.INFLIGHT_SHMFD)

    def get_inflight_fd(self, num_queues: int, queue_size: int) -> InflightBuffer | None:
        """Set the features first: split and packed rings need buffers of their own kind."""
        if not self.tracks_inflight:
            return None
        message = self._call(self.session.request(F.GET_INFLIGHT_FD, Inflight(0, 0, num_queues, queue_size)))
        if message is None:
            raise ProtocolError("the message table knows no reply", request=F.GET_INFLIGHT_FD.name)
        try:
            reply: Inflight = message.payload
            if not reply.mmap_size:
                return None
            fd = message.take_fd()
            if fd is None:
                raise InvalidMessage(
                    f"a buffer of {reply.mmap_size} bytes, but no descriptor", request=F.GET_INFLIGHT_FD.name
                )
            # What was asked for: it is what the buffer was made for, whatever the answer says of it.
            return InflightBuffer(fd, reply.mmap_size, reply.mmap_offset, num_queues, queue_size)
        finally:
            message.close()

    def set_inflight_fd(self, buffer: InflightBuffer) -> None:
        where = Inflight(buffer.size, buffer.offset, buffer.num_queues, buffer.queue_size)
        self._send(F.SET_INFLIGHT_FD, where, [buffer.fd])
