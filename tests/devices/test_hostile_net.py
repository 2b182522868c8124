# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Frames that no honest driver sends, or that few do, on each wire. Whatever comes, its head is given back,
nothing is held on to, and a good driver finds a device that works. Each reason for a frame to be dropped is
tests/c/test_net.c's; buffers to receive into, and what wires say, are test_hostile_net_receive.py's."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import random
from collections.abc import Iterator

import pytest

from devices.disks import wait_for
from devices.nets import HEADER, SOURCE_SIZE, WIRES, Raw, World, session
from drivers.net_device import frame
from rig import error_event
from vhost.features import NetF
from vhost.virtio_net import NetGso, NetHdrF, NetHeader

pytestmark = pytest.mark.usefixtures("no_leaks")
BOTH = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
ON_ALL = pytest.mark.parametrize("wire", WIRES)
OFFLOADS = int(NetF.CSUM | NetF.HOST_TSO4 | NetF.HOST_TSO6 | NetF.HOST_USO | NetF.HOST_ECN)
LONGEST = 9018
MUCH = 0xF0000  # bytes of memory from where frames are sent on


def accounted(there: World, raw: Raw) -> None:
    """Each chain that was sent was a frame, or is counted as to why it was none. (An echo, a tap or a socket
    counts as dropped in the same way what it cannot pass on.)"""
    counters = there.device.counters()
    dropped = sum(counters[f"dropped_{why}"] for why in ("short", "long", "csum", "gso"))
    assert counters["tx_frames"] <= raw.sent <= counters["tx_frames"] + dropped
    if there.name in ("drop", "source", "bridge"):
        assert counters["tx_frames"] + dropped == raw.sent


# -- what is sent ----------------------------------------------------------------------------------


@ON_ALL
@BOTH
def test_the_header_is_split_anywhere(wire: str, packed: bool) -> None:
    sent = frame(60)
    whole = HEADER + len(sent)
    with session(wire, packed) as (there, raw):
        ways = [[cut] for cut in range(1, whole)]
        ways += [[a, b] for a, b in itertools.combinations(range(1, HEADER + 4), 2)]
        ways += [
            list(range(1, whole)),
            list(range(1, HEADER)),
            list(range(2, whole, 2)),
            list(range(5, whole, 5)),
        ]
        for cuts in ways:
            if wire == "echo":
                raw.post(2000)
            raw.send(sent, cuts=cuts)
            there.expect(raw, sent)
        assert there.received() == len(ways) == raw.sent
        assert there.device.dropped == 0


@ON_ALL
@BOTH
def test_pieces_that_are_marked_as_writable(wire: str, packed: bool) -> None:
    """In a queue that nobody receives with, that is a slip: what comes is a frame all the same."""
    sent = frame(60)
    with session(wire, packed) as (there, raw):
        raw.put(NetHeader().pack() + sent)
        whole = HEADER + len(sent)
        for readable in (0, 1, HEADER, HEADER + 1, whole - 1):
            if wire == "echo":
                raw.post(2000)
            first = [(raw.at, readable)] if readable else []
            raw.send_chain(first, [(raw.at + readable, whole - readable)])
            there.expect(raw, sent)
        assert there.device.dropped == 0


@ON_ALL
@BOTH
def test_chains_of_any_length(wire: str, packed: bool) -> None:
    """From a byte to 75 MiB, of descriptors for the same memory again and again."""
    with session(wire, packed) as (there, raw):
        for size in range(1, HEADER + 14):
            raw.send_chain([(raw.at, size)])
            raw.send_chain([(raw.at, 1)] * size)
        short = there.device.counters()["dropped_short"]
        assert short == raw.sent == 2 * (HEADER + 13)
        for size in (LONGEST + 1, 65535, 65536, 65550, 65554, 65555, 65566, 65567, 80000, 1 << 17):
            raw.send_chain([(raw.at, size + HEADER)])
        for size, count in ((1 << 17, 32), (MUCH, 64), (MUCH, 80)):
            raw.send_chain([(raw.at, size)] * count)
        assert there.device.counters()["dropped_long"] == raw.sent - short
        assert there.received() == 0
        accounted(there, raw)


def headers() -> Iterator[NetHeader]:
    numbers = (0, 1, 13, 14, 34, 58, 59, 60, 100, 0x7FFF, 0xFFFE, 0xFFFF)
    for start, offset in itertools.product(numbers, numbers):
        yield NetHeader(NetHdrF.NEEDS_CSUM, csum_start=start, csum_offset=offset)
    for gso, size, length in itertools.product(
        (*range(8), 0x80, 0x81, 0x85, 0xFF), (0, 1, 63, 64, 0xFFFF), numbers
    ):
        yield NetHeader(1, gso, length, size, 34, 16)
        yield NetHeader(0, gso, length, size, 34, 16)
        yield NetHeader(0xFF, gso, length, size, 0xFFFF, 0xFFFF, 0xFFFF)
    pick = random.Random(7)
    for _ in range(300):
        yield NetHeader.unpack(pick.randbytes(HEADER))


@ON_ALL
@BOTH
@pytest.mark.parametrize("features", [0, OFFLOADS], ids=["plain", "offloads"])
def test_headers_that_say_what_is_not(wire: str, packed: bool, features: int) -> None:
    with session(wire, packed, drain=True, features=features | int(NetF.MRG_RXBUF)) as (there, raw):
        features = raw.negotiated
        sent, good = frame(100), 0
        for header in headers():
            raw.send(sent, header)
            csum = bool(header.flags & NetHdrF.NEEDS_CSUM)
            gso = {
                NetGso.NONE: 1,
                NetGso.TCPV4: features & NetF.HOST_TSO4,
                NetGso.TCPV6: features & NetF.HOST_TSO6,
                NetGso.UDP_L4: features & NetF.HOST_USO,
                NetGso.TCPV4 | NetGso.ECN: features & NetF.HOST_TSO4 and features & NetF.HOST_ECN,
                NetGso.TCPV6 | NetGso.ECN: features & NetF.HOST_TSO6 and features & NetF.HOST_ECN,
                NetGso.UDP_L4 | NetGso.ECN: features & NetF.HOST_USO and features & NetF.HOST_ECN,
            }.get(header.gso_type, 0)
            fits = features & NetF.CSUM and header.csum_start + header.csum_offset + 2 <= len(sent)
            right = fits if csum else True
            if header.gso_type:
                right = right and gso and csum and header.gso_size
            good += bool(right)
            assert there.received() == good, header
        accounted(there, raw)


@ON_ALL
@BOTH
def test_what_breaks_a_ring(wire: str, packed: bool) -> None:
    """It is reported, and the other queue goes on."""
    for queue in (0, 1):
        with session(wire, packed) as (there, raw), error_event() as error:
            raw.ops.set_vring_err(queue, error)
            if queue == 0 and wire == "drop":
                continue  # nobody looks at its buffers
            bad = (0xFFFF_FFFF_0000, 100)
            raw.queues[queue].add(*(([bad], []) if queue else ([], [bad])), None)
            raw.queues[queue].kick()
            if queue == 0:
                if wire == "echo":
                    raw.send(frame(60))
                elif there.gives:
                    there.give(frame(60))
            wait_for(error)
            if queue == 0:
                settled = frame(60)
                raw.send(settled)
                if there.gives:
                    there.expect(raw, settled)
            elif wire == "source":
                raw.post(300)
                got = raw.recv()
                assert got is not None
                assert len(got[1]) == SOURCE_SIZE
            elif there.gives:
                raw.post(300)
                there.give(sent := frame(61))
                got = raw.recv()
                assert got is not None
                assert got[1] == sent


# -- anything at all -------------------------------------------------------------------------------


def anything(
    pick: random.Random, raw: Raw, queue: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """A chain that is one, whatever else it is."""
    size = pick.choice((1, 5, 11, 12, 13, 14, 26, 60, 700, 3000))
    pieces = [
        (raw.at + pick.randrange(0xF0000), 1 + pick.randrange(size))
        for _ in range(1 + pick.randrange(pick.choice((1, 4, 40))))
    ]
    readable = pick.choice((0, len(pieces), pick.randrange(len(pieces) + 1), len(pieces) if queue else 0))
    return pieces[:readable], pieces[readable:]


def storm(there: World, raw: Raw, seed: int, rounds: int = 300) -> None:
    """Chains of any kind in both queues, over memory of any content that they share."""
    pick = random.Random(seed)
    given = [0, 0]
    back = [0, 0]
    for number in range(rounds):
        at = pick.randrange(0xF0000)
        raw.put(pick.randbytes(200), at)
        if number % 3:
            raw.put(bytes(HEADER), at)
        for queue in (0, 1):
            ring = raw.queues[queue]
            for _ in range(pick.randrange(8)):
                readable, writable = anything(pick, raw, queue)
                with contextlib.suppress(BufferError):
                    ring.add(readable, writable, queue)
                    given[queue] += 1
            ring.kick()
            back[queue] += sum(1 for token, _ in ring.get_used_batch(64) if token == queue)
        if there.gives and number % 4 == 0:
            there.give(frame(pick.choice((14, 60, 1514, 5000))))
        if there.name == "bridge":
            there.far.recv_batch(64)
    tx = raw.queues[1]
    while back[1] < given[1]:
        assert tx.wait(10), f"{given[1] - back[1]} chains did not come back"
        back[1] += len(tx.get_used_batch(64))
        if there.name == "bridge":
            there.far.recv_batch(64)
    assert not tx.in_flight
    assert [queue.broken for queue in raw.queues] == [None, None]
    counters = there.device.counters()
    assert (
        counters["tx_frames"] + sum(counters[f"dropped_{why}"] for why in ("short", "long", "csum", "gso"))
        >= given[1]
    )


@ON_ALL
@BOTH
@pytest.mark.parametrize(
    "features", [0, int(NetF.MRG_RXBUF), int(NetF.MRG_RXBUF) | OFFLOADS], ids=["0", "merge", "all"]
)
def test_anything(wire: str, packed: bool, features: int) -> None:
    with session(wire, packed, drain=True, features=features) as (there, raw):
        storm(there, raw, seed=features % 97 + packed)


class _Mallinfo(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )


def allocated() -> int:
    """Bytes that the C library has given away."""
    gc.collect()
    info = ctypes.CDLL(None).mallinfo2
    info.restype = _Mallinfo
    found = info()
    return int(found.uordblks + found.hblkhd)


@pytest.mark.parametrize("wire", ["echo", "bridge", "socket"])
def test_memory_does_not_grow(wire: str) -> None:
    def once(seed: int) -> None:
        with session(wire, bool(seed % 2), drain=True) as (there, raw):
            storm(there, raw, seed, rounds=60)

    for seed in range(4):
        once(seed)
    before = allocated()
    for seed in range(12):
        once(seed)
    assert allocated() - before < 100_000  # less than a pair's, of which there were a dozen
