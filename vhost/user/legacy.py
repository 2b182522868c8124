# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What only legacy guests need of a back-end: rings in their own byte order (SET_VRING_ENDIAN).

Says which ring has which order; csrc/device_split_swapped.c reads it. The numbers in a legacy driver's
requests and in the configuration space have its order, too, which is why a device has to say that it can
do that (``Device.cross_endian``), and looks at ``queue.big_endian``.
"""

from __future__ import annotations

from vhost.errors import InvalidMessage, InvalidState
from vhost.features import ProtocolF, VirtioF
from vhost.user.handlers import Handlers
from vhost.user.messages import FrontendMsg
from vhost.user.session import Message

LITTLE, BIG = 0, 1

_CROSS_ENDIAN = int(ProtocolF.CROSS_ENDIAN)
_VERSION_1 = int(VirtioF.VERSION_1)


class LegacyHandlers(Handlers):
    def offered_protocol_features(self) -> int:
        return super().offered_protocol_features() | (_CROSS_ENDIAN if self.device.cross_endian else 0)

    def served_requests(self) -> set[int]:
        serves = super().served_requests()
        return serves if self.device.cross_endian else serves - {FrontendMsg.SET_VRING_ENDIAN}

    def set_vring_endian(self, message: Message) -> None:
        ring = self._ring(message)
        order = message.payload.num
        if order not in (LITTLE, BIG):
            raise InvalidMessage(
                f"ring {ring.index}: byte order {order}, must be {LITTLE} (little) or {BIG} (big)",
                request=message.name,
            )
        if order == BIG and self.features & _VERSION_1:
            raise InvalidState(
                f"ring {ring.index}: rings are little-endian with VERSION_1", request=message.name
            )
        ring.must_be_stopped(message.name)
        ring.big_endian = order == BIG
