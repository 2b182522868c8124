# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What the tests of vhost-net share: a bare driver on it, and the far end of the wire.

Without drivers.Net, so that what is tested here is the kernel's control interface and the rings alone.
"""

from __future__ import annotations

import socket
import struct

from vhost.drivers.base import Driver
from vhost.features import NetF
from vhost.ops import VhostOps

ETHERTYPE = 0x88B5  # for experiments: nothing else speaks it
HEADER = 12
RX, TX = 0, 1


def frame(number: int, size: int = 100) -> bytes:
    """A frame whose payload says which it is."""
    body = struct.pack(">I", number) * (size // 4)
    return bytes(range(2, 14)) + struct.pack(">H", ETHERTYPE) + body[: size - 14]


def packet_socket(interface: str) -> socket.socket:
    """Sees, and sends, what goes over an interface; ours alone of it."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE))
    sock.bind((interface, ETHERTYPE))
    sock.settimeout(10)
    return sock


class BareNic(Driver):
    """Two rings and room for buffers; what is posted where is the test's matter."""

    features = int(NetF.MRG_RXBUF)
    names = NetF

    def __init__(self, ops: VhostOps, **options: int) -> None:
        super().__init__(
            ops, num_queues=2, queue_size=64, indirect_max=0, data_size=1 << 20, packed=False, **options
        )

    def post(self, addr: int, size: int = 2048) -> None:
        """A buffer for what arrives."""
        self.queues[RX].add((), [(addr, size)], addr)
        self.queues[RX].kick()

    def send(self, addr: int, data: bytes) -> None:
        self.memory.write(addr, bytes(HEADER) + data)
        self.queues[TX].add([(addr, HEADER + len(data))], (), addr)
        self.queues[TX].kick()

    def received(self, timeout: float = 10) -> tuple[int, bytes] | None:
        """Where it was posted, and the frame."""
        queue = self.queues[RX]
        if not queue.wait(timeout):
            return None
        ((addr, written),) = queue.get_used_batch(1)
        return addr, self.memory.read(addr + HEADER, written - HEADER)
