# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The other end of a vsock driver, by hand: a back-end in the same thread that does nothing by itself. A
test reads what the driver put on the wire, and puts there what it likes.

Knows the wire format from the specification, on its own: nothing of ``vhost.virtio_vsock``.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from vhost.features import VirtioF
from vhost.memory import GuestMemory
from vhost.ops import VhostOps
from vhost.virtqueue import Chain, DeviceQueue

US, HOST = 42, 2
REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
STREAM, SEQPACKET = 1, 2


class Packet(NamedTuple):
    """struct virtio_vsock_hdr (5.10.6), little-endian, 44 bytes, and what came behind it."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    len: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int
    data: bytes = b""

    def pack(self) -> bytes:
        return b"".join(
            value.to_bytes(size, "little")
            for value, size in zip(self[:10], (8, 8, 4, 4, 4, 2, 2, 4, 4, 4), strict=True)
        ) + bytes(self.data)

    @classmethod
    def parse(cls, raw: bytes) -> Packet:
        return cls(*struct.unpack("<QQIIIHHIII", raw[:44]), raw[44:])  # type: ignore[call-arg]


class Ends(VhostOps):
    """Rings whose device side is the test's: ``rx``, ``tx`` and ``events``."""

    def __init__(
        self, *, features: int = 0, packed: bool = False, queues: int = 2, event_idx: bool = True
    ) -> None:
        self.offered = int(features | VirtioF.VERSION_1 | VirtioF.RING_INDIRECT_DESC)
        self.offered |= VirtioF.RING_PACKED * packed | VirtioF.RING_EVENT_IDX * event_idx
        self.negotiated = self.status = 0
        self.queue_num = queues
        self.config = (US).to_bytes(8, "little")
        self.memory = GuestMemory()
        self.rings: dict[int, dict[str, int]] = {}
        self.queues: dict[int, DeviceQueue] = {}
        self.alive = True
        self._gone = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    # -- what a test does ----------------------------------------------------------------------

    def sent(self) -> list[Packet]:
        """What the driver has sent since the last look."""
        packets = []
        for chain in self.queues[1]:
            assert chain.writable_len == 0
            packets.append(Packet.parse(chain.read()))
            self.queues[1].push(chain, 0)
        return packets

    def take_sent(self) -> list[Chain]:
        """The same, and nothing is given back: the device is slow."""
        return self.queues[1].pop_batch(256)

    def give(self, *packets: Packet | bytes, written: int | None = None) -> None:
        for packet in packets:
            raw = packet if isinstance(packet, bytes) else packet.pack()
            chain = self.queues[0].pop()
            assert chain is not None, "the driver has no buffer for it"
            assert chain.readable_len == 0
            size = chain.write(raw)
            self.queues[0].push(chain, size if written is None else written)

    def event(self, number: int) -> None:
        chain = self.queues[2].pop()
        assert chain is not None
        self.queues[2].push(chain, chain.write(number.to_bytes(4, "little")))

    def die(self) -> None:
        self.alive = False
        os.eventfd_write(self._gone, 1)

    # -- VhostOps ------------------------------------------------------------------------------

    def get_features(self) -> int:
        return self.offered

    def set_features(self, features: int) -> None:
        assert not features & ~self.offered
        self.negotiated = features

    def set_owner(self) -> None: ...
    def reset_owner(self) -> None: ...
    def get_queue_num(self) -> int:
        return self.queue_num

    def get_config(self, offset: int, size: int) -> bytes:
        assert (offset, size) == (0, 8)
        return self.config

    def set_config(self, offset: int, data: bytes) -> None:
        raise AssertionError("a driver of sockets writes no configuration")

    def get_status(self) -> int:
        return self.status

    def set_status(self, status: int) -> None:
        self.status = status

    def reset_device(self) -> None: ...
    def set_mem_table(self, memory: GuestMemory) -> None:
        self.memory = memory

    def set_vring_num(self, index: int, num: int) -> None:
        self.rings[index] = {"num": num}

    def set_vring_addr(
        self, index: int, desc: int, avail: int, used: int, *, log: int = 0, flags: int = 0
    ) -> None:
        self.rings[index] |= {"desc": desc, "avail": avail, "used": used}

    def set_vring_base(self, index: int, base: int) -> None:
        self.rings[index]["base"] = base

    def get_vring_base(self, index: int) -> int:
        queue = self.queues.pop(index)
        queue.close()
        return queue.base

    def set_vring_kick(self, index: int, fd: int | None) -> None:
        assert fd is not None
        self.rings[index]["kick"] = fd

    def set_vring_call(self, index: int, fd: int | None) -> None:
        assert fd is not None
        self.rings[index]["call"] = fd

    def set_vring_err(self, index: int, fd: int | None) -> None: ...
    def set_vring_enable(self, index: int, enable: bool) -> None:
        ring = dict(self.rings[index])
        num, desc, avail, used = (ring.pop(name) for name in ("num", "desc", "avail", "used"))
        self.queues[index] = DeviceQueue(
            self.memory,
            num,
            desc,
            avail,
            used,
            packed=bool(self.negotiated & VirtioF.RING_PACKED),
            indirect=bool(self.negotiated & VirtioF.RING_INDIRECT_DESC),
            event_idx=bool(self.negotiated & VirtioF.RING_EVENT_IDX),
            index=index,
            **ring,
        )

    def fileno(self) -> int:
        return self._gone

    def step(self) -> bool:
        return self.alive

    def close(self) -> None:
        fd, self._gone = self._gone, -1
        if fd >= 0:
            os.close(fd)
