# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A virtio network device (VIRTIO 1.2, 5.1) on a wire: see net_wires.py.

Knows what the driver is told and what was negotiated. Frames are moved by the C engine (_net_engine).
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Sequence

from vhost.device_queue import DeviceQueue
from vhost.devices._net_engine import DROPS, VLAN_TAG, NetEngine, NetPair
from vhost.devices.base import Attached, Device
from vhost.devices.net_control import FEATURES, LONGEST, ControlError, NetControl
from vhost.devices.net_wires import Wire
from vhost.errors import VhostError
from vhost.features import DeviceId, NetF
from vhost.virtio_net import (
    CTRL_ERR,
    CTRL_OK,
    ETH_HEADER,
    ETH_MIN_MTU,
    NetConfig,
    NetGso,
    NetStatus,
    header_size,
    rarp_request,
)

log = logging.getLogger("vhost.net")

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

    The last queue is the driver's for commands; a vhost-user front-end such as QEMU's has one of its own
    instead, and tells by rings that it enables how many pairs are used.

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
        self.queues = (*("rx", "tx") * queue_pairs, "ctrl")
        self.max_queue_size = queue_size
        self.mac = mac or random_mac()
        self.mtu = mtu or wire.max_mtu
        self.control = NetControl(queue_pairs, self.mac)
        """What the driver asked for."""
        self._commanded = False
        """The driver has a queue for commands, and it runs."""
        self._session: Attached | None = None
        self._receiving: dict[int, DeviceQueue] = {}
        """Receive queues that run, by their pair; the driver need not use all of them."""
        # Of what the engine has, and held while a queue is: another device's session may want to give the
        # driver a frame.
        self._lock_served = threading.RLock()
        self._served: set[DeviceQueue] = set()
        self.pairs: Sequence[NetPair] = [NetPair() for _ in range(queue_pairs)]
        self.engine: NetEngine | None = wire.make_engine(queue_pairs, threads)
        self._workers = self.engine.workers
        wire.connect(self)
        self.notice = self.engine.notice
        self.features = wire.features | int(NetF.MAC | NetF.STATUS | NetF.MRG_RXBUF) | FEATURES
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
        status = NetStatus.LINK_UP | (NetStatus.ANNOUNCE if self.control.announce else 0)
        return NetConfig(
            self.control.mac,
            status=int(status),
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

    def claim(self, session: Attached) -> None:
        super().claim(session)
        if session is not self._session:
            self._session = session
            self.control.reset()

    def release(self, session: Attached) -> None:
        super().release(session)
        self._commanded = False

    def reset(self) -> None:
        self.control.reset()

    def _is_control(self, queue: DeviceQueue) -> bool:
        """The one behind the last pair, of which there is one without MQ (5.1.2)."""
        pairs = self.queue_pairs if self.negotiated & NetF.MQ else 1
        return queue.index == 2 * self.queue_pairs or (
            queue.index == 2 * pairs and bool(self.negotiated & NetF.CTRL_VQ)
        )

    def start_queue(self, queue: DeviceQueue) -> bool:
        if self.engine is None:
            return False
        if self._is_control(queue):
            self._commanded = True
            self._update()
            return False
        pair, transmit = queue.index // 2, bool(queue.index % 2)
        queue.read_only = transmit
        if transmit:
            self._serve(queue, pair, transmit)
        else:
            self._receiving[pair] = queue
            self._update()
        return True

    def stop_queue(self, queue: DeviceQueue) -> None:
        if self._is_control(queue):
            return
        if not queue.index % 2:
            self._receiving.pop(queue.index // 2, None)
        self._leave(queue)

    def _update(self) -> None:
        """Receive on as many pairs as the driver wants. Who was not asked for commands has those that run."""
        for pair, queue in self._receiving.items():
            if pair < self.control.pairs or not self._commanded:
                self._serve(queue, pair, False)
            else:
                self._leave(queue)

    def _serve(self, queue: DeviceQueue, pair: int, transmit: bool) -> None:
        if queue in self._served or self.engine is None:
            return
        if not self._served:
            self._configure()
        if not transmit:
            self.wire.set_receiving(pair, True)
        with self._lock_served:
            self.engine.attach(queue, self.pairs[pair], pair % self._workers, transmit)
            self._served.add(queue)

    def _leave(self, queue: DeviceQueue) -> None:
        if queue not in self._served or self.engine is None:
            return
        with self._lock_served:
            self.engine.detach(queue)
            self._served.remove(queue)
        if not queue.index % 2:
            self.wire.set_receiving(queue.index // 2, False)

    def hold_queue(self, queue: DeviceQueue) -> bool:
        if self.engine is None or queue not in self._served:
            return False
        self._lock_served.acquire()
        self.engine.hold(queue)
        return True

    def release_queue(self, queue: DeviceQueue, look: bool) -> None:
        if self.engine is not None:
            self.engine.release(queue, look)
        self._lock_served.release()

    def rx(self, queue: DeviceQueue) -> None:
        """Buffers wait until the ring is enabled."""

    def tx(self, queue: DeviceQueue) -> None:
        """What is sent while the ring is disabled goes nowhere (vhost-user, "Ring states")."""
        queue.read_only = True
        for chain in queue:
            queue.push(chain, 0)
            self.pairs[queue.index // 2].drop_disabled(1)

    def ctrl(self, queue: DeviceQueue) -> None:
        for chain in queue:
            if not chain.writable_len:
                queue.push(chain, 0)  # nobody waits for an answer
                continue
            try:
                if chain.readable_len > LONGEST:
                    raise ControlError(f"command of {chain.readable_len} bytes, limit {LONGEST}")
                self.control.run(chain.read(), self.negotiated)
                answer = CTRL_OK
            except ControlError as error:
                log.info("%s: refused: %s", queue.name, error)
                answer = CTRL_ERR
            self._update()
            queue.push(chain, chain.write(bytes([answer])))

    def handle(self, queue: DeviceQueue) -> None:
        if self._is_control(queue):
            self.ctrl(queue)
        elif queue.index % 2:
            self.tx(queue)

    def handle_disabled(self, queue: DeviceQueue) -> None:
        if not self._is_control(queue):
            self.handle(queue)

    # -- after a migration -------------------------------------------------------------------------

    def announce(self) -> None:
        """Have the network learn where the driver is now: it says so itself, if it can; if not, this device
        says so in its name (RARP). In the thread that steps the session."""
        if self._commanded and self.negotiated & NetF.GUEST_ANNOUNCE:
            self.control.announce = True
            self.config_changed()
        else:
            self.send_rarp(self.control.mac)

    def send_rarp(self, mac: bytes) -> None:
        self.wire.send(rarp_request(mac))

    def deliver(self, frame: bytes) -> bool:
        """Give the driver a frame, from any thread. False: it has no receive queue. Without room for it, it
        is dropped, and counted."""
        with self._lock_served:
            queue = next((one for one in self._served if not one.index % 2), None)
            if queue is None or self.engine is None:
                return False
            self.engine.deliver(queue, frame)
        return True

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
