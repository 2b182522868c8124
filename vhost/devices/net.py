# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A virtio network device (VIRTIO 1.2, 5.1) on a wire: see net_wires.py.

Knows what the driver is told and what was negotiated. Frames are moved by the C engine (_net_engine).
"""

from __future__ import annotations

import random

from vhost.device_queue import DeviceQueue
from vhost.devices._net_engine import DROPS, VLAN_TAG, NetEngine, NetPair
from vhost.devices.base import Device
from vhost.devices.net_wires import Wire
from vhost.errors import VhostError
from vhost.features import DeviceId, NetF
from vhost.virtio_net import ETH_HEADER, ETH_MIN_MTU, NetConfig, NetGso, NetStatus, header_size

PAIRS_MAX = 128

_HOST_GSO = {
    NetF.HOST_TSO4: 1 << NetGso.TCPV4,
    NetF.HOST_TSO6: 1 << NetGso.TCPV6,
    NetF.HOST_UFO: 1 << NetGso.UDP,
    NetF.HOST_USO: 1 << NetGso.UDP_L4,
    NetF.HOST_ECN: int(NetGso.ECN),
}
_GUEST_GSO = {
    NetF.GUEST_TSO4: 1 << NetGso.TCPV4,
    NetF.GUEST_TSO6: 1 << NetGso.TCPV6,
    NetF.GUEST_UFO: 1 << NetGso.UDP,
    NetF.GUEST_USO4 | NetF.GUEST_USO6: 1 << NetGso.UDP_L4,  # which does not tell one from the other
    NetF.GUEST_ECN: int(NetGso.ECN),
}


class Net(Device):
    """A network interface whose frames go to ``wire``, and come from it.

    ``queue_pairs``: the most that a driver may use. ``mac``: the driver's address; a random one if it is not
    given. ``mtu``: what the driver is told; the wire's largest if it is not given, of which it is not told.
    Frames are moved in ``threads`` threads without the GIL (default: one a pair, up to the number of CPUs),
    which are this process's: a fork makes a device of its own.
    """

    device_id = DeviceId.NET

    def __init__(
        self,
        wire: Wire,
        *,
        queue_pairs: int = 1,
        queue_size: int = 1024,
        mac: bytes | None = None,
        mtu: int | None = None,
        threads: int | None = None,
    ) -> None:
        if not 1 <= queue_pairs <= PAIRS_MAX:
            raise ValueError(f"queue_pairs {queue_pairs}, must be 1 to {PAIRS_MAX}")
        if not 1 <= queue_size <= 1 << 15:
            raise ValueError(f"queue_size {queue_size}, must be 1 to {1 << 15}")
        if mac is not None and (len(mac) != 6 or mac[0] & 1):
            raise ValueError(f"mac {mac.hex(':')}, must be 6 bytes, and no group's")
        if mtu is not None and not ETH_MIN_MTU <= mtu <= wire.max_mtu:
            raise ValueError(f"mtu {mtu}, must be {ETH_MIN_MTU} to {wire.max_mtu}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads {threads}, must be at least 1")
        self.wire = wire
        self.queue_pairs = queue_pairs
        self.queues = ("rx", "tx") * queue_pairs
        self.max_queue_size = queue_size
        self.mac = mac or random_mac()
        self.mtu = mtu or wire.max_mtu
        self._served: set[DeviceQueue] = set()
        self.pairs = [NetPair() for _ in range(queue_pairs)]
        self.engine: NetEngine | None = wire.make_engine(queue_pairs, threads)
        self._workers = self.engine.workers
        wire.connect(self.pairs, self.mac)
        self.notice = self.engine.notice
        self.features = wire.features | int(NetF.MAC | NetF.STATUS | NetF.MRG_RXBUF)
        if mtu is not None:
            self.features |= int(NetF.MTU)
        if queue_pairs > 1:
            self.features |= int(NetF.MQ)

    # -- what the driver is told -------------------------------------------------------------------

    @property
    def announced_queues(self) -> int:
        return self.queue_pairs

    @property
    def config(self) -> bytes:
        return NetConfig(
            self.mac,
            status=int(NetStatus.LINK_UP),
            max_virtqueue_pairs=self.queue_pairs,
            mtu=self.mtu,
        ).pack()

    def set_mtu(self, mtu: int) -> None:
        """What the front-end told the driver: from the next start on, longer frames are dropped."""
        if mtu > self.wire.max_mtu:
            raise VhostError(f"mtu {mtu}: the wire has {self.wire.max_mtu} at most")
        self.mtu = mtu

    def counters(self) -> dict[str, int]:
        """Frames and bytes that were moved since the device was made, "tx" what the driver sent, and
        ``dropped_*`` for each reason, of all pairs together; docs/net.md has what they mean."""
        total: dict[str, int] = {}
        for pair in self.pairs:
            for name, count in pair.counters().items():
                total[name] = total.get(name, 0) + count
        return total

    @property
    def dropped(self) -> int:
        """Frames that went nowhere, whatever the reason."""
        counters = self.counters()
        return sum(counters[f"dropped_{name}"] for name in DROPS)

    # -- rings -------------------------------------------------------------------------------------

    def _configure(self) -> None:
        negotiated = self.negotiated
        self.wire.configure(negotiated)
        longest = self.mtu + ETH_HEADER + VLAN_TAG
        for pair in self.pairs:
            pair.configure(
                hdr_len=header_size(negotiated),
                mergeable=bool(negotiated & NetF.MRG_RXBUF),
                longest=longest,
                host_csum=bool(negotiated & NetF.CSUM),
                host_gso=_types(_HOST_GSO, negotiated),
                guest_csum=bool(negotiated & NetF.GUEST_CSUM),
                guest_gso=_types(_GUEST_GSO, negotiated),
            )

    def start_queue(self, queue: DeviceQueue) -> bool:
        if self.engine is None:
            return False
        if not self._served:
            self._configure()
        pair, transmit = queue.index // 2, bool(queue.index % 2)
        queue.read_only = transmit
        if not transmit:
            self.wire.set_receiving(pair, True)
        self.engine.attach(queue, self.pairs[pair], pair % self._workers, transmit)
        self._served.add(queue)
        return True

    def stop_queue(self, queue: DeviceQueue) -> None:
        if self.engine is not None:
            self.engine.detach(queue)
        if queue in self._served:
            self._served.remove(queue)
            if not queue.index % 2:
                self.wire.set_receiving(queue.index // 2, False)

    def hold_queue(self, queue: DeviceQueue) -> bool:
        if self.engine is None:
            return False
        self.engine.hold(queue)
        return True

    def release_queue(self, queue: DeviceQueue, look: bool) -> None:
        if self.engine is not None:
            self.engine.release(queue, look)

    def rx(self, queue: DeviceQueue) -> None:
        """Buffers wait until the ring is enabled."""

    def tx(self, queue: DeviceQueue) -> None:
        """What is sent while the ring is disabled goes nowhere (vhost-user, "Ring states")."""
        queue.read_only = True
        for chain in queue:
            queue.push(chain, 0)
            self.pairs[queue.index // 2].drop_disabled(1)

    def handle_disabled(self, queue: DeviceQueue) -> None:
        self.handle(queue)

    def close(self) -> None:
        """Let the wire, and the engine's threads and descriptors go. No session may be running."""
        self.engine = None
        self.notice = -1
        self.wire.close()


def random_mac() -> bytes:
    """A locally administered address that is no group's."""
    return bytes([random.randrange(256) & 0xFC | 2]) + random.randbytes(5)


def _types(table: dict[NetF, int], features: int) -> int:
    """The segmentation types that these features stand for, as bits by their number."""
    types = 0
    for feature, bit in table.items():
        if features & feature == feature:
            types |= bit
    return types
