# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Back-ends that each break one rule: ours, with one thing bent. By the rule that has to notice.

A rule that no deviant breaks could be one that cannot fail.
"""

from __future__ import annotations

import os
import select
from typing import Any

from vhost.devices.rings import Ring
from vhost.errors import VhostError
from vhost.features import Status
from vhost.user.backend import Backend
from vhost.user.payloads import U64, Config, VringState
from vhost.user.session import Message
from vhost.user.spec import HEADER, REPLY_FLAG, Outgoing

DEVIANTS: dict[str, type[Backend]] = {}


def breaks(*rules: str) -> Any:
    def register(cls: type[Backend]) -> type[Backend]:
        for rule in rules:
            assert rule not in DEVIANTS
            DEVIANTS[rule] = cls
        return cls

    return register


class Bent(Backend):
    """What is sent passes through ``bend``, which gives the messages that go instead."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        send = self.transport.send

        def bent(outgoing: Outgoing | None) -> None:
            if outgoing is None:
                return
            for data in self.bend(outgoing.data):
                outgoing.data = data
                send(outgoing)

        self.transport.send = bent  # type: ignore[method-assign]

    def bend(self, data: bytes) -> list[bytes]:
        return [data]


def _head(data: bytes) -> tuple[int, int, int]:
    number, flags, size = HEADER.unpack_from(data)
    return number, flags, size


@breaks("header.version")
class OtherVersion(Bent):
    def bend(self, data: bytes) -> list[bytes]:
        number, flags, size = _head(data)
        return [HEADER.pack(number, flags & ~3 | 2, size) + data[12:]]


@breaks("header.reply-flag")
class NoReplyFlag(Bent):
    def bend(self, data: bytes) -> list[bytes]:
        number, flags, size = _head(data)
        return [HEADER.pack(number, flags & ~REPLY_FLAG, size) + data[12:]]


@breaks("header.request-id")
class OtherRequest(Bent):
    def bend(self, data: bytes) -> list[bytes]:
        number, flags, size = _head(data)
        return [HEADER.pack(number + 1, flags, size) + data[12:]]


@breaks("header.u64-size")
class ShortReply(Bent):
    def bend(self, data: bytes) -> list[bytes]:
        number, flags, size = _head(data)
        return [HEADER.pack(number, flags, size - 4) + data[12:-4]]


@breaks("reply-ack.SET_VRING_NUM")
class AckTwice(Bent):
    def bend(self, data: bytes) -> list[bytes]:
        return [data, data] if _head(data)[0] == 8 else [data]


@breaks("reply-ack.SET_VRING_BASE")
class NoAck(Bent):
    def bend(self, data: bytes) -> list[bytes]:
        return [] if _head(data)[0] == 10 else [data]


@breaks("reply-ack.failure", "slots.remove-unknown", "queues.beyond", "ring.num-zero", "memory.fewer-fds")
class AlwaysYes(Bent):
    def bend(self, data: bytes) -> list[bytes]:
        number, flags, size = _head(data)
        if number in (5, 8, 38):
            return [HEADER.pack(number, flags, size) + bytes(size)]
        return [data]


@breaks("reply-ack.GET_QUEUE_NUM")
class GetAckedToo(Bent):
    asked = False

    def _dispatch(self, message: Message) -> None:
        self.asked = message.need_reply
        super()._dispatch(message)

    def bend(self, data: bytes) -> list[bytes]:
        extra = HEADER.pack(17, REPLY_FLAG | 1, 8) + bytes(8)
        return [data, extra] if _head(data)[0] == 17 and self.asked else [data]


@breaks("reply-ack.only-on-demand", "header.no-unasked-reply")
class AcksAll(Backend):
    def _dispatch(self, message: Message) -> None:
        message.need_reply |= message.name == "SET_VRING_NUM"
        super()._dispatch(message)


@breaks("header.unknown-need-reply")
class SilentOnUnknown(Backend):
    def _refuse(self, message: Message, error: VhostError) -> None:
        message.close()


@breaks("features.stable")
class Fickle(Backend):
    def get_features(self, message: Message) -> U64:
        more = 1 << 50 if self.features else 0
        return U64(self.offered_features() | more)


@breaks("features.foreign")
class TakesAll(Backend):
    def set_features(self, message: Message) -> None:
        message.payload = U64(message.payload.value & self.offered_features())
        super().set_features(message)


@breaks("features.enable-all", "state.enabled-later")
class NeverEnables(Backend):
    def enable_ring(self, ring: Any, enabled: bool) -> None:
        super().enable_ring(ring, False)


@breaks("state.disabled", "state.disabled-again")
class NeverDisables(Backend):
    def enable_ring(self, ring: Any, enabled: bool) -> None:
        super().enable_ring(ring, True)

    def set_vring_kick(self, message: Message) -> None:
        self.enable_ring(self._ring(message), True)
        super().set_vring_kick(message)


@breaks("owner.reset")
class ForgetsAll(Backend):
    def reset_owner(self, message: Message) -> None:
        self.reset(message.name)


@breaks("config.size")
class ShortConfig(Backend):
    def get_config(self, message: Message) -> Config:
        asked = message.payload
        size = 2 if asked.size == 4 else asked.size
        return Config(asked.offset, size, 0, self.read_config(asked.offset, size))


@breaks("config.offset")
class NoOffset(Backend):
    def get_config(self, message: Message) -> Config:
        asked = message.payload
        return Config(asked.offset, asked.size, 0, self.read_config(0, asked.size))


@breaks("config.read-only")
class TakesCapacity(Backend):
    def set_config(self, message: Message) -> None:
        pass


@breaks("status.echo", "status.features-ok")
class NoStatus(Backend):
    def get_status(self, message: Message) -> U64:
        return U64(int(Status.ACKNOWLEDGE))


@breaks("reset.stops")
class NoReset(Backend):
    def reset_device(self, message: Message) -> None:
        pass


@breaks("state.stop", "state.suspended-quiet", "ring.base-index")
class NeverStops(Backend):
    def get_vring_base(self, message: Message) -> VringState:
        return VringState(message.payload.index, 0)


@breaks("ring.base-reserved")
class HighBits(Bent):
    def bend(self, data: bytes) -> list[bytes]:
        return [data[:18] + b"\1\0"] if _head(data)[0] == 11 else [data]


@breaks("ring.call", "ring.call-replaced", "data.event-idx-calls")
class NeverCalls(Backend):
    def set_vring_call(self, message: Message) -> None:
        message.close()
        message.fds = [os.eventfd(0, os.EFD_CLOEXEC)]
        super().set_vring_call(message)


@breaks("ring.kick-replaced")
class OldKick(Backend):
    def set_vring_kick(self, message: Message) -> None:
        if not self._ring(message).started:
            super().set_vring_kick(message)


@breaks("state.kick-not-needed")
class WaitsForAKick(Backend):
    def start_if_ready(self, ring: Ring) -> None:
        if ring.kick < 0 or select.select([ring.kick], [], [], 0)[0]:
            super().start_if_ready(ring)
        else:
            self._watch_kick(ring)


@breaks("ring.kick-nofd")
class NeverPolls(Backend):
    def set_vring_kick(self, message: Message) -> None:
        if not message.payload.nofd:
            super().set_vring_kick(message)


@breaks("memory.offset")
class NoMmapOffset(Backend):
    def set_mem_table(self, message: Message) -> None:
        for region in message.payload.regions:
            object.__setattr__(region, "mmap_offset", 0)
        super().set_mem_table(message)


@breaks("slots.remove-offset")
class MindsOffset(Backend):
    def rem_mem_reg(self, message: Message) -> None:
        if message.payload.region.mmap_offset:
            raise VhostError("no such region")
        super().rem_mem_reg(message)


@breaks("log.marks")
class NoLog(Backend):
    def set_log_base(self, message: Message) -> U64:
        return U64(0)


@breaks("lifecycle.half-with-fd")
class KeepsFds(Backend):
    """The transport's session is told that nothing came, and what came is kept."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        receive = self.session.receive

        def keeping(data: bytes, fds: Any = (), truncated: bool = False) -> Message | None:
            for fd in fds:
                KEPT.append(os.dup(fd))
            return receive(data, fds, truncated)

        self.session.receive = keeping  # type: ignore[method-assign]


KEPT: list[int] = []
"""To be closed by the test."""
