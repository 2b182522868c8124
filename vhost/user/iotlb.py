# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The IOTLB, as a back-end has it (vhost-user, "IOMMU support").

Knows what the front-end mapped, what is asked for and what became of it. With VIRTIO_F_ACCESS_PLATFORM,
rings and buffers are named by IOVAs: a ring starts once all of it is mapped, and one that misses a mapping
waits, which it does by itself (csrc/virtqueue.h, VQ_MISS). Here is who asks, and who lets it go on.

Each change is made while no ring is used, so when the front-end has our answer to an invalidation, nobody
uses what it took away. (But for chains that a device of its own threads has out: what those threads do
until they give them back is theirs to end, in ``Device.stop_queue``.)

The front-end may well ask us something while we wait for its answer: nothing here ever blocks.
"""

from __future__ import annotations

import socket
from functools import partial

from vhost._iotlb import MAX_ENTRIES, Iotlb
from vhost._ring import ring_misses, signal_eventfd
from vhost.devices.base import Device
from vhost.devices.rings import Ring
from vhost.errors import InvalidMessage, InvalidState, VhostError
from vhost.features import ProtocolF, VirtioF
from vhost.iotlb import Access, IotlbType
from vhost.memory import GuestMemory
from vhost.user.handlers import Handlers
from vhost.user.messages import BackendMsg
from vhost.user.payloads import U64
from vhost.user.payloads import Iotlb as IotlbPayload
from vhost.user.session import Message
from vhost.user.transport import readable

# Plain integers: an operation on an IntFlag costs as much as a system call.
_ACCESS_PLATFORM = int(VirtioF.ACCESS_PLATFORM)
_RING_PACKED = int(VirtioF.RING_PACKED)
_NEEDED = int(ProtocolF.BACKEND_REQ | ProtocolF.REPLY_ACK)
_GPA_ADDRESSES = int(ProtocolF.GPA_ADDRESSES)

MISSES_AT_ONE_PLACE = 2 * MAX_ENTRIES

Miss = tuple[int, int]
"""An IOVA, and the access that lacks there."""


class IotlbHandlers(Handlers):
    def __init__(self, device: Device, sock: socket.socket, *, without: int = 0) -> None:
        self._asked: dict[Miss, bool] = {}
        """What we asked for and was not mapped yet; True once the front-end said that it dealt with it."""
        self._dealt_with: list[Miss] = []
        """What it has just said so of."""
        self._stuck: dict[int, tuple[int, int]] = {}
        """By ring: where it stands, and how many misses it had there."""
        super().__init__(device, sock, without=without)

    # -- what is offered ---------------------------------------------------------------------------

    def offered_features(self) -> int:
        # Without these two there is no way to ask; QEMU refuses a back-end that offers it all the same.
        return super().offered_features() | (0 if self.without & _NEEDED else _ACCESS_PLATFORM)

    def _device_features(self) -> int:
        return super()._device_features() & ~_ACCESS_PLATFORM

    def offered_protocol_features(self) -> int:
        return super().offered_protocol_features() | _GPA_ADDRESSES

    def _use_features(self, features: int) -> None:
        super()._use_features(features)
        if not features & _ACCESS_PLATFORM:
            self.iotlb = None
            self._asked.clear()
        elif self.iotlb is None:
            self.iotlb = Iotlb(self.memory)

    # -- what the front-end says -------------------------------------------------------------------

    def iotlb_msg(self, message: Message) -> U64:
        change: IotlbPayload = message.payload
        iotlb = self.iotlb
        if iotlb is None:
            raise InvalidState("ACCESS_PLATFORM was not negotiated", request=message.name)
        if change.type == IotlbType.UPDATE:
            with self.held(look=True):
                iotlb.update(change.iova, change.size, change.user_addr, change.perm)
                self._asked = {
                    miss: dealt_with for miss, dealt_with in self._asked.items() if self._lacks(miss)
                }
                self._translate_rings()
                self._retry_rings()
            self._start_rings()
        elif change.type == IotlbType.INVALIDATE:
            with self.held(look=False):
                iotlb.invalidate(change.iova, change.size)
                self._translate_rings()
        else:
            raise InvalidMessage(
                f"type {change.type}, must be {IotlbType.UPDATE} (update) or {IotlbType.INVALIDATE}",
                request=message.name,
            )
        self._ask_for_misses()
        return U64(0)

    def _lacks(self, miss: Miss) -> bool:
        assert self.iotlb is not None
        return self.iotlb.missing(miss[0], 1, miss[1]) is not None

    def _translate_rings(self) -> None:
        for ring in self.rings:
            if ring.queue is not None:
                ring.queue.translate()

    def _retry_rings(self) -> None:
        # Only those that can go on, and not after an invalidation: an engine has told us of what it misses,
        # and would have to be told to look again.
        for ring in self.rings:
            if ring.queue is not None and ring.queue.miss is not None and not self._lacks(ring.queue.miss):
                ring.queue.retry()

    def _end_step(self) -> None:
        super()._end_step()
        # A mapping that was sent before we were told that it was may be on its way still: the two sockets
        # have no order.
        if self._dealt_with and not self.session.in_message and not readable(self.transport.fileno()):
            self._settle()

    def _settle(self) -> None:
        """The front-end has done what it will about these."""
        misses, self._dealt_with = self._dealt_with, []
        for miss in misses:
            if self.iotlb is None or miss not in self._asked:
                continue
            if self.iotlb.allows(miss[0]) is None:
                self._asked[miss] = True
            else:
                del self._asked[miss]
                self._deny(miss)

    def _deny(self, miss: Miss) -> None:
        """It is mapped, but not to be accessed in the way that it has to be."""
        why = f"IOTLB: {_words(miss)}: not allowed"
        rings = [ring for ring in self.rings if miss in self._misses(ring)]
        if rings:
            self._tell(IotlbType.ACCESS_FAIL, miss)
            with self.held(look=True):
                for ring in rings:
                    if ring.queue is not None:
                        ring.queue.deny(why)
        for ring in rings:
            self._ring_broken(ring, f"{ring.name}[{ring.index}]: {why}")

    # -- what rings lack ---------------------------------------------------------------------------

    def _misses(self, ring: Ring) -> list[Miss]:
        """The areas of the ring, as far as it is known where they are; or what its next chain needs."""
        if self.iotlb is None or not ring.num or ring.areas is None or not ring.kick_known:
            return []
        if ring.queue is None or not ring.queue.broken:
            lacking = ring_misses(self.iotlb, ring.num, bool(self.features & _RING_PACKED), *ring.areas)
            if lacking:
                return lacking
            if ring.queue is not None and ring.queue.miss is not None:
                return [ring.queue.miss]
        return []

    def _ask_for_misses(self) -> None:
        for ring in self.rings:
            for miss in self._misses(ring):
                if miss not in self._asked and self._gets_on(ring, miss):
                    self._tell(IotlbType.MISS, miss)

    def _gets_on(self, ring: Ring, miss: Miss) -> bool:
        """A chain may need more mappings than there can be, and would be missed for ever."""
        if ring.queue is None:
            return True
        base, count = self._stuck.get(ring.index, (-1, 0))
        count = count + 1 if base == ring.queue.base else 1
        self._stuck[ring.index] = ring.queue.base, count
        if count <= MISSES_AT_ONE_PLACE:
            return True
        why = f"IOTLB: {_words(miss)}: {count} misses in a row, limit {MISSES_AT_ONE_PLACE}"
        with self.held(look=True):
            ring.queue.deny(why)
        self._ring_broken(ring, f"{ring.queue.name}: {why}")
        return False

    def _tell(self, kind: IotlbType, miss: Miss) -> None:
        if self.channel is None:
            self._complain(f"IOTLB {kind.name}", f"{_words(miss)}, and no channel to ask on")
            return
        then = None
        if kind is IotlbType.MISS:
            self._asked[miss] = False
            then = partial(self._answered, miss)
        payload = IotlbPayload(iova=miss[0], size=0, user_addr=0, perm=miss[1], type=int(kind))
        self.channel.request(BackendMsg.BACKEND_IOTLB_MSG, payload, then=then)

    def _answered(self, miss: Miss, answer: Message | None) -> None:
        """It has mapped that, or will not. If it is not mapped, a kick is a reason to ask once more."""
        if answer is None or miss not in self._asked:
            return
        if answer.status:
            self._asked[miss] = True
            self._complain("IOTLB miss", f"{_words(miss)}: the front-end says {answer.status:#x}")
        else:
            self._dealt_with.append(miss)

    def _forget_unanswered(self) -> None:
        self._asked = {miss: dealt_with for miss, dealt_with in self._asked.items() if not dealt_with}

    # -- when to look ------------------------------------------------------------------------------

    def start_if_ready(self, ring: Ring) -> None:
        if ring.can_start() and self._misses(ring):
            self._ask_for_misses()
        else:
            super().start_if_ready(ring)

    def _start_rings(self) -> None:
        for ring in self.rings:
            try:
                self.start_if_ready(ring)
            except VhostError as error:
                # Not the fault of who maps it.
                self._ring_broken(ring, str(error))
                if ring.err >= 0:
                    signal_eventfd(ring.err)

    def _kicked(self, ring: Ring) -> None:
        self._forget_unanswered()
        super()._kicked(ring)

    def _woken(self) -> None:
        super()._woken()
        if self.iotlb is not None:
            self._forget_unanswered()  # an engine tells us of kicks of rings that miss something
            self._ask_for_misses()

    def _serve(self, ring: Ring) -> None:
        super()._serve(ring)
        if self.iotlb is not None:
            self._ask_for_misses()

    def _wants_look(self, ring: Ring) -> bool:
        return super()._wants_look(ring) or bool(self._misses(ring))

    def replace_memory(self, memory: GuestMemory) -> None:
        super().replace_memory(memory)
        if self.iotlb is not None:
            self._ask_for_misses()

    def set_backend_req_fd(self, message: Message) -> None:
        super().set_backend_req_fd(message)
        self._asked.clear()  # that was on another one
        self._ask_for_misses()

    def _release_if_idle(self) -> None:
        super()._release_if_idle()
        if self.iotlb is not None and not any(ring.started for ring in self.rings):
            # From here on a front-end need not tell us what it takes away.
            self.iotlb.clear()
            self._asked.clear()
            self._stuck.clear()

    def _let_go(self) -> None:
        self.iotlb = None  # it holds the front-end's memory
        super()._let_go()


def _words(miss: Miss) -> str:
    return f"IOVA {miss[0]:#x}, access {Access(miss[1])!s}"
