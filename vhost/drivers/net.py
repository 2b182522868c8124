# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A virtio-net driver in user space (VIRTIO 1.2, 5.1), on any VhostOps.

Sends and receives Ethernet frames, one or many at a time. Frames are copied through the memory that the
driver shares; what is done to each frame is C (``_net_queue``), what is said once is here.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from vhost.driver_queue import DriverQueue
from vhost.drivers._net_queue import SLOT_ALIGN, NetError, NetRx, NetTx
from vhost.drivers.base import Driver, QueuePlan
from vhost.drivers.net_control import ROOM, NetControl, NetControlError
from vhost.drivers.net_features import (
    CONTROL,
    DEVICE,
    OFFLOADS,
    check_header,
    receive_size,
    send_size,
    without_unmet,
)
from vhost.errors import InactiveFeature, ReplyTimeout, VhostError
from vhost.features import NetF, VirtioF
from vhost.ops import VhostOps
from vhost.virtio_net import ETH_MIN_MTU, NetConfig, NetCtrlRx, NetHeader, NetStatus, header_size

if TYPE_CHECKING:
    from typing_extensions import Buffer

_CONFIG_SIZES = (24, 12, 10, 8, 6)
"""What to ask for, from all fields to the address alone: a back-end may refuse more than it has."""


class Frame(NamedTuple):
    """A frame as it came."""

    data: bytes
    header: NetHeader


class Counts(NamedTuple):
    """What ``pump_recv`` saw."""

    frames: int
    lost: int
    """Sequence numbers that were passed over."""
    repeated: int
    """Sequence numbers that came late, or again."""
    others: int
    """Frames that are different ones."""


@runtime_checkable
class HasAttach(Protocol):
    """A back-end that is given what it runs on: the kernel's vhost-net."""

    def attach(self, *backends: object) -> None: ...


class Net(Driver):
    """``backend``: what the kernel's vhost-net runs on, a ``Tap`` or sockets (a tuple: one for each pair).
    ``mac``: the address of an interface whose device has none; a random one if it is not given. ``mtu``: how
    long frames may be without segmentation; the device may say less. ``offloads``: take and give frames
    whose checksum and segmentation are left to the other side, as far as the device can.
    ``rx_buffer``: bytes of one receive buffer, with MRG_RXBUF. ``timeout`` seconds (None: for ever) is what
    ``send`` waits for room, and commands for their answer.

    One thread may send on a pair while another receives on it, not two.
    """

    names = NetF
    legacy = True

    def __init__(
        self,
        ops: VhostOps,
        *,
        backend: object = None,
        packed: bool | None = None,
        queue_pairs: int = 1,
        queue_size: int = 256,
        mac: bytes | None = None,
        mtu: int = 1500,
        offloads: bool = True,
        rx_buffer: int = 2048,
        timeout: float | None = 30.0,
        without: int = int(VirtioF.IN_ORDER),
    ) -> None:
        if queue_pairs < 1:
            raise ValueError(f"queue_pairs {queue_pairs}: must be 1 or more")
        if not ETH_MIN_MTU <= mtu <= 65535:
            raise ValueError(f"mtu {mtu}: must be {ETH_MIN_MTU} to 65535")
        if mac is not None and len(mac) != 6:
            raise ValueError(f"mac of {len(mac)} bytes: must be 6")
        if not 64 <= rx_buffer <= 1 << 20:
            raise ValueError(f"rx_buffer {rx_buffer}: must be 64 to {1 << 20}")
        self.queue_pairs = queue_pairs
        self.timeout = timeout
        self.mtu = mtu
        self.features = DEVICE | CONTROL | int(NetF.MRG_RXBUF | NetF.CTRL_VQ)
        if offloads:
            self.features |= OFFLOADS
        if queue_pairs > 1:
            self.features |= int(NetF.MQ)
        self._rx_buffer = rx_buffer
        self.config: NetConfig | None = None
        """The configuration space when it was last read; None: the device has none."""
        self.control: NetControl | None = None
        """The control queue; None: the device has none."""
        self._turn = 0
        self._poll = select.epoll()
        if backend is not None:
            _attach(ops, backend)
        super().__init__(ops, packed=packed, queue_size=queue_size, without=without)
        self.mac = mac or (bytes([random.randrange(256) & 0xFC | 2]) + random.randbytes(5))
        if self.config is not None and self.negotiated & NetF.MAC:
            self.mac = self.config.mac

    # -- coming up ---------------------------------------------------------------------------------

    def _agree(self, features: int) -> int:
        self.read_config()
        if self.config is None:
            # The front-end of a vhost-user device is the one who has the control queue: there is none here.
            features &= ~(DEVICE | int(NetF.CTRL_VQ))
        elif not features & NetF.CTRL_VQ:
            features &= ~int(NetF.MQ)
        features = without_unmet(features)
        if self.config is not None:
            most = self.config.max_virtqueue_pairs if features & NetF.MQ else 1
            if self.queue_pairs > most:
                raise InactiveFeature(f"the device has {most} pairs of queues, not {self.queue_pairs}")
            if features & NetF.MTU:
                if self.config.mtu < ETH_MIN_MTU:
                    raise VhostError(f"the device's mtu is {self.config.mtu}, less than {ETH_MIN_MTU}")
                self.mtu = min(self.mtu, self.config.mtu)
        return features

    def _plan(self) -> tuple[Sequence[QueuePlan], int]:
        plans = [QueuePlan(index, self.queue_size, 0) for index in range(2 * self.queue_pairs)]
        self._header_size = header_size(self.negotiated)
        self.mergeable = bool(self.negotiated & NetF.MRG_RXBUF)
        receive = self._rx_buffer if self.mergeable else receive_size(self.negotiated, self.mtu)
        self._tx_slot, self._rx_slot = _rounded(send_size(self.negotiated, self.mtu)), _rounded(receive)
        data = self.queue_pairs * self.queue_size * (self._tx_slot + self._rx_slot)
        if self.negotiated & NetF.CTRL_VQ:
            # Behind the last pair that the device has (5.1.2), of which there is one without MQ.
            assert self.config is not None
            pairs = self.config.max_virtqueue_pairs if self.negotiated & NetF.MQ else 1
            plans.append(QueuePlan(2 * pairs, 4))
            data += ROOM
        return plans, data

    def _fill(self) -> None:
        num, header = self.queue_size, self._header_size
        at = self.data_addr
        self._rx: list[NetRx] = []
        self._tx: list[NetTx] = []
        for pair in range(self.queue_pairs):
            rx, tx = self.queues[2 * pair : 2 * pair + 2]
            size = self._rx_slot
            self._rx.append(NetRx(rx, addr=at, size=size, num=num, hdr_len=header, mergeable=self.mergeable))
            at += num * size
            self._tx.append(NetTx(tx, addr=at, size=self._tx_slot, num=num, hdr_len=header))
            at += num * self._tx_slot
            self._rx[pair].fill()
        if self.negotiated & NetF.CTRL_VQ:
            self.control = NetControl(self.queues[-1], at, self.timeout)

    def _make_queue(self, index: int) -> DriverQueue:
        queue = super()._make_queue(index)
        if index < 2 * self.queue_pairs and index % 2 == 0:
            self._poll.register(queue.call_fd, select.EPOLLIN)
        return queue

    def _close_events(self) -> None:
        self._poll.close()
        super()._close_events()

    def _start(self, *, resume: bool = False) -> None:
        super()._start(resume=resume)
        if self.control is not None and self.queue_pairs > 1:
            self.control.set_pairs(self.queue_pairs)

    def restart(self, ops: VhostOps) -> bool:
        """Go on with another session after the back-end died. Frames that it had not sent are lost."""
        resumed = super().restart(ops)
        self.read_config()
        return resumed

    def attach(self, backend: object) -> None:
        """Run on another backend from now on; it has to be able to do what was negotiated. Frames wait in
        the rings meanwhile."""
        for queue in self.queues:
            self.ops.set_vring_enable(queue.index, False)
        try:
            _attach(self.ops, backend)
        finally:  # on the old one, if the new one was refused
            for queue in self.queues:
                self.ops.set_vring_enable(queue.index, True)

    # -- what the device is ------------------------------------------------------------------------

    def read_config(self) -> NetConfig | None:
        """The configuration space as it is now; also kept in ``config``."""
        for size in _CONFIG_SIZES:
            with contextlib.suppress(VhostError):
                self.config = NetConfig.unpack(self.ops.get_config(0, size))
                break
        return self.config

    @property
    def link_up(self) -> bool:
        """What the device says now; True of one that does not say."""
        if not self.negotiated & NetF.STATUS:
            return True
        config = self.read_config()
        return config is not None and bool(config.status & NetStatus.LINK_UP)

    @property
    def longest(self) -> int:
        """Bytes of the longest frame that can be sent."""
        return self._tx[0].longest

    @property
    def dropped(self) -> int:
        """Frames that were received and that the device had spoiled."""
        return sum(rx.dropped for rx in self._rx)

    def set_mac(self, mac: bytes) -> None:
        """Have the device filter for another address (CTRL_MAC_ADDR), if it has one at all."""
        if len(mac) != 6:
            raise ValueError(f"mac of {len(mac)} bytes: must be 6")
        if self.negotiated & NetF.MAC:
            self._require(NetF.CTRL_MAC_ADDR).set_mac(mac)
        self.mac = bytes(mac)

    def set_promiscuous(self, on: bool) -> None:
        """Receive whatever is on the wire (CTRL_RX)."""
        self._require(NetF.CTRL_RX).set_rx(NetCtrlRx.PROMISC, on)

    def set_allmulti(self, on: bool) -> None:
        """Receive all multicast frames (CTRL_RX)."""
        self._require(NetF.CTRL_RX).set_rx(NetCtrlRx.ALLMULTI, on)

    def _require(self, feature: NetF) -> NetControl:
        if self.control is None or not self.negotiated & feature:
            raise InactiveFeature(f"the device does not offer {feature.name}")
        return self.control

    # -- sending -----------------------------------------------------------------------------------

    def send(self, frame: Buffer, header: NetHeader | None = None, *, pair: int = 0) -> None:
        """Send one frame, from its destination address on. ReplyTimeout: the device does not take any.

        ``header``: a checksum or segmentation that is left to the device, see ``NetHeader``."""
        raw = None if header is None else check_header(header, self.negotiated)
        tx = self._tx[pair]
        if not tx.send(frame, raw):
            self._send_late(tx, frame, raw)

    def _send_late(self, tx: NetTx, frame: Buffer, raw: bytes | None) -> None:
        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        while not tx.send(frame, raw):
            left = None if deadline is None else max(deadline - time.monotonic(), 0)
            if not tx.queue.wait(left):
                raise ReplyTimeout(f"{tx.queue.name}: the device took no frame within {self.timeout} s")

    def send_batch(
        self,
        frames: Sequence[Buffer],
        headers: Sequence[NetHeader | None] | None = None,
        *,
        pair: int = 0,
    ) -> int:
        """Send as many as fit into the ring now: how many."""
        if headers is None:
            return self._tx[pair].send_batch(frames)
        raw = [None if header is None else check_header(header, self.negotiated) for header in headers]
        return self._tx[pair].send_batch(frames, raw)

    def flush(self, timeout: float | None = None) -> None:
        """Wait until the device has taken all that was sent."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for tx in self._tx:
            while tx.reap() < tx.queue.num:
                left = None if deadline is None else max(deadline - time.monotonic(), 0)
                if not tx.queue.wait(left):
                    left_over = tx.queue.num - tx.free
                    raise ReplyTimeout(f"{tx.queue.name}: {left_over} frames not taken within {timeout} s")

    # -- receiving ---------------------------------------------------------------------------------

    def recv(self, timeout: float | None = None, *, pair: int | None = None) -> bytes | None:
        """One frame, from this pair or any. Waits up to ``timeout`` seconds (None: for ever), then None.

        A checksum that the device left open is filled in; a frame that it did not segment comes in one.
        NetError: the device spoiled a frame, which is gone."""
        if pair is None and self.queue_pairs > 1:
            frames = self.recv_batch(1, timeout)
            return frames[0] if frames else None
        rx = self._rx[pair or 0]
        frame = rx.recv()
        if frame is None:
            deadline = None if timeout is None else time.monotonic() + timeout
            while frame is None and self.wait(_left(deadline), pair=pair or 0):
                frame = rx.recv()
        return frame

    def recv_batch(self, n: int = 32, timeout: float | None = 0.0, *, pair: int | None = None) -> list[bytes]:
        """Up to ``n`` frames that are there, or the first to come within ``timeout`` seconds; all of them
        from one pair, and from another the next time."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            for rx in self._in_turn(pair):
                frames = rx.recv_batch(n)
                if frames:
                    return frames
            if not self.wait(_left(deadline), pair=pair):
                return []

    def recv_frames(
        self, n: int = 32, timeout: float | None = 0.0, *, pair: int | None = None
    ) -> list[Frame]:
        """The same, with headers, and with checksums as they came."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            for rx in self._in_turn(pair):
                frames = rx.recv_batch(n, False, True)
                if frames:
                    return [Frame(data, NetHeader.unpack(header)) for data, header in frames]
            if not self.wait(_left(deadline), pair=pair):
                return []

    def _in_turn(self, pair: int | None) -> Sequence[NetRx]:
        if pair is not None:
            return (self._rx[pair],)
        if self.queue_pairs == 1:
            return self._rx
        self._turn = (self._turn + 1) % self.queue_pairs
        return self._rx[self._turn :] + self._rx[: self._turn]

    def wait(self, timeout: float | None = None, *, pair: int | None = None) -> bool:
        """Wait until a frame is there; False after ``timeout`` seconds without. ``fileno()`` is not readable
        afterwards unless there is one."""
        if pair is None and self.queue_pairs > 1:
            return self._wait_for_any(timeout)
        return self._rx[pair or 0].queue.wait(timeout)

    def _wait_for_any(self, timeout: float | None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        queues = [rx.queue for rx in self._rx]
        while True:
            for queue in queues:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(queue.call_fd)
            # Asked for after the events were taken, so that none of them is for what comes now.
            there = [queue.enable_callbacks() for queue in queues]
            if any(there):
                return True
            left = _left(deadline)
            if not self._poll.poll(left) and left is not None:
                return any(queue.has_used() for queue in queues)

    def fileno(self) -> int:
        """Readable when a frame came, or may have come: call ``recv_batch()`` until it gives none."""
        return self._poll.fileno()

    # -- pumps -------------------------------------------------------------------------------------

    def pump_send(
        self,
        frame: Buffer,
        count: int | None = None,
        timeout: float | None = None,
        *,
        seq_at: int | None = None,
        seq: int = 0,
        pair: int = 0,
    ) -> int:
        """Send a frame ``count`` times, as fast as the ring takes it, without the GIL: how often it was done
        within ``timeout`` seconds. ``seq_at``: eight bytes there count from ``seq``, little-endian."""
        return self._tx[pair].pump(frame, count, timeout, seq_at=seq_at, seq=seq)

    def pump_recv(
        self,
        frame: Buffer,
        count: int | None = None,
        timeout: float | None = None,
        *,
        seq_at: int | None = None,
        seq: int = 0,
        pair: int = 0,
    ) -> Counts:
        """Receive, without the GIL, until ``count`` frames were this one, or ``timeout`` seconds are over.
        Each byte is compared, those of the sequence number aside."""
        return Counts(*self._rx[pair].pump(frame, count, timeout, seq_at=seq_at, seq=seq))


def _attach(ops: VhostOps, backend: object) -> None:
    if not isinstance(ops, HasAttach):
        raise TypeError(f"{type(ops).__name__} takes no backend: it has its own")
    if isinstance(backend, (tuple, list)):
        ops.attach(*backend)
    else:
        ops.attach(backend)


def _rounded(size: int) -> int:
    return -(-size // SLOT_ALIGN) * SLOT_ALIGN


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(deadline - time.monotonic(), 0.0)


__all__ = ["Counts", "Frame", "HasAttach", "Net", "NetConfig", "NetControlError", "NetError", "NetHeader"]
