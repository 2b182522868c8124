# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Do both network back-ends do what they are measured at? Looks at frames with our own driver, and at the
counters of both ends while the client runs.

Knows what comes out of each device; measures nothing.
"""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable

from benchmarks.facts import OURS
from benchmarks.net_peers import CIRCULATING, LOOP, PATIENCE, RECEIVE, RING, SEND, Link, Server
from vhost.devices.net_wires import SOURCE_TYPE
from vhost.drivers import Net
from vhost.user.frontend import Frontend

FRAMES = 600  # more than two rings hold
ETH_HEADER = 14
MOMENT = 0.05


def until(done: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        if time.monotonic() > deadline:
            raise RuntimeError(what())
        time.sleep(0.002)


# ---------------------------------------------------------------- frames, with our own driver


def frames(server: Server, direction: str, size: int, *, packed: bool) -> None:
    """Before the client connects: net_vhost serves one at a time."""
    server.go(direction, size)
    with Frontend.connect(server.path) as frontend, Net(frontend, packed=packed) as nic:
        server.settle()
        {SEND: _sends, RECEIVE: _receives, LOOP: _loops}[direction](server, nic, size)
    server.settle()
    server.halt()


def _different(size: int) -> list[bytes]:
    dice = random.Random(size)
    head = bytes.fromhex("020000000001020000000002") + SOURCE_TYPE
    return [head + i.to_bytes(4, "big") + dice.randbytes(size - len(head) - 4) for i in range(FRAMES)]


def _sends(server: Server, nic: Net, size: int) -> None:
    before = server.count()
    for frame in _different(size):
        nic.send(frame)

    def arrived() -> bool:
        now = server.count()
        return now.tx - before.tx == FRAMES and now.tx_bytes - before.tx_bytes == FRAMES * size

    until(arrived, lambda: f"{server.name} got {server.count()} after {before}: not {FRAMES} of {size} bytes")


def _loops(server: Server, nic: Net, size: int) -> None:
    sent = _different(size)
    # So few at a time that they find a buffer to come back in, whatever the device does first.
    for i in range(0, FRAMES, 60):
        for frame in sent[i : i + 60]:
            nic.send(frame)
        for frame in sent[i : i + 60]:
            if (got := nic.recv(PATIENCE)) != frame:
                raise RuntimeError(f"{server.name} sent {got!r} back, not {frame!r}")


def _receives(server: Server, nic: Net, size: int) -> None:
    right = _counted_up if server.name == OURS else _udp
    for _ in range(FRAMES):
        got = nic.recv(PATIENCE)
        if got is None or len(got) != size or not right(got):
            raise RuntimeError(f"{server.name} sent {got!r}: no frame of {size} bytes as it makes them")


def _counted_up(frame: bytes) -> bool:
    """What our `--source` is made of."""
    payload = frame[ETH_HEADER:]
    return frame[12:ETH_HEADER] == SOURCE_TYPE and payload == bytes(i & 0xFF for i in range(len(payload)))


def _udp(frame: bytes) -> bool:
    """What testpmd's txonly is made of: Ethernet, IPv4 and UDP that agree on how long they are; the sum over
    the header is right. What the payload is, it leaves open."""
    words = struct.unpack("!10H", frame[ETH_HEADER : ETH_HEADER + 20])
    total = sum(words)
    total = (total & 0xFFFF) + (total >> 16)
    (udp_length,) = struct.unpack("!H", frame[ETH_HEADER + 24 : ETH_HEADER + 26])
    return (
        frame[12:ETH_HEADER] == b"\x08\x00"
        and frame[ETH_HEADER] == 0x45
        and words[1] == len(frame) - ETH_HEADER
        and udp_length == words[1] - 20
        and total in (0xFFFF, 0x1FFFE)
    )


# ---------------------------------------------------------------- counters, with the client


def counts(link: Link, direction: str, size: int) -> None:
    """What one end sent is what the other end got, but for what lay in the receive ring before, and what lies
    there afterwards."""
    server = link.server
    before, client_before = server.count(), link.client.packets()
    with link.running(direction, size):
        time.sleep(MOMENT)
    client = link.client.packets()
    sent, received = client.tx - client_before.tx, client.rx - client_before.rx
    lost = client.rx_errors + client.tx_errors

    def agree() -> bool:
        now = server.count()
        tx, rx = now.tx - before.tx, now.rx - before.rx
        return (
            tx == sent
            and now.tx_bytes - before.tx_bytes == size * tx
            and abs(rx - received) <= RING
            and now.rx_bytes - before.rx_bytes == size * rx
            and (direction != LOOP or rx == tx)
            and not now.lost
            and not lost
        )

    def what() -> str:
        return (
            f"{server.name}, {direction}, {size} bytes: it counts {server.count()} after {before}, the "
            f"client {sent} sent, {received} received, {lost} errors"
        )

    moved = sent if direction == SEND else received
    if moved < 32 * CIRCULATING:
        raise RuntimeError(f"{server.name}, {direction}, {size} bytes: {moved} frames in {MOMENT} s")
    until(agree, what)
