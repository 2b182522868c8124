# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Buffers to receive into that no honest driver offers, or too few of them, and wires that bring what they
should not. What is sent is test_hostile_net.py's."""

from __future__ import annotations

import os
import random
import time

import pytest

from devices.nets import HEADER, SOURCE_SIZE, TX_ROOM, WIRES, Raw, World, session
from drivers.net_device import frame
from vhost.features import NetF

pytestmark = pytest.mark.usefixtures("no_leaks")
BOTH = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
RECEIVING = pytest.mark.parametrize("wire", [wire for wire in WIRES if wire != "drop"])
LONGEST = 9018


def bring(there: World, raw: Raw, data: bytes) -> None:
    """Have a frame come for the driver, if the wire does not bring its own anyway."""
    if there.name == "echo":
        raw.send(data)
    elif there.gives:
        there.give(data)


@RECEIVING
@BOTH
@pytest.mark.parametrize("size", [12, 13, 20, 26, 100, 211, 212, 213])
def test_num_buffers_is_right(wire: str, packed: bool, size: int) -> None:
    """One that a frame fills to the last byte is its last; the next is left to the next frame."""
    with session(wire, packed) as (there, raw):
        need = -(-(SOURCE_SIZE + HEADER) // size)
        for _ in range(3):
            raw.post(*[size] * need)
            bring(there, raw, sent := frame(SOURCE_SIZE))
            came = raw.recv()
            assert came is not None
            assert came[0].num_buffers == need
            assert len(came[1]) == SOURCE_SIZE
            if wire != "source":
                assert came[1] == sent
        assert there.device.counters()["rx_frames"] == 3


@RECEIVING
@BOTH
def test_buffers_of_all_sizes_at_once(wire: str, packed: bool) -> None:
    """Those that hold no header come back empty; the others are filled one after the other."""
    pick = random.Random(5)
    with session(wire, packed) as (there, raw):
        for _ in range(50):
            # The first of a frame has to hold the header; any other may be as small as it likes.
            sizes = [pick.randrange(HEADER, 40), *(pick.choice((12, 30, 99)) for _ in range(20))]
            total = SOURCE_SIZE + HEADER
            while sum(sizes[:-1]) >= total:
                sizes.pop()
            sizes[-1] += max(0, total - sum(sizes))
            raw.post(*[pick.randrange(1, HEADER) for _ in range(pick.randrange(3))], *sizes)
            bring(there, raw, sent := frame(SOURCE_SIZE))
            came = raw.recv()
            assert came is not None
            assert came[0].num_buffers == len(sizes)
            if wire != "source":
                assert came[1] == sent
            assert raw.queues[0].in_flight == 0


@RECEIVING
@BOTH
def test_buffers_that_cannot_be_written(wire: str, packed: bool) -> None:
    """Only readable, or with too little that is not: given back empty. What is readable besides stays as it
    is."""
    with session(wire, packed) as (there, raw):
        rx, extra = raw.queues[0], raw.extra - raw.data_addr
        useless = (
            ([(raw.extra, 2000)], []),
            ([(raw.extra, 2000)], [(raw.rx, 11)]),
            ([(raw.extra, 1)] * 30, []),
        )
        for readable, writable in useless:
            rx.add(readable, writable, (0, 0))
        rx.add([(raw.extra, 500)], [(raw.rx, 2000)], (raw.rx, 2000))
        rx.kick()
        raw.view[extra : extra + 2000] = b"\xee" * 2000
        bring(there, raw, sent := frame(SOURCE_SIZE))
        came = raw.recv()
        assert came is not None
        if wire != "source":
            assert came[1] == sent
        assert there.device.counters()["dropped_bad_buffer"] == len(useless)
        assert bytes(raw.view[extra : extra + 2000]) == b"\xee" * 2000
        assert rx.in_flight == 0


@RECEIVING
@BOTH
@pytest.mark.parametrize("mergeable", [True, False], ids=["mergeable", "one buffer"])
def test_no_room(wire: str, packed: bool, mergeable: bool) -> None:
    """Buffers that do not hold the frame: nothing of it is written, none of them is used up, and nobody looks
    again and again."""
    features = int(NetF.MRG_RXBUF) if mergeable else 0
    with session(wire, packed, features=features) as (there, raw):
        count, size = (3, 50) if mergeable else (60, 100)
        raw.view[:] = b"\xee" * len(raw.view)
        raw.post(*[size] * count)
        bring(there, raw, sent := frame(SOURCE_SIZE))
        if wire != "echo":
            while not (there.device.dropped or mergeable):
                time.sleep(0.01)
        assert raw.recv(0.1) is None
        assert bytes(raw.view[TX_ROOM : TX_ROOM + size * count]) == b"\xee" * (size * count)
        assert cpu_of(0.3) < 0.15
        if not mergeable:
            assert there.device.counters()["dropped_no_room"] == there.device.dropped > 0
            if wire != "source":  # its frames are all the same
                bring(there, raw, sent := frame(size - HEADER))
                came = raw.recv()
                assert came is not None
                assert came[1] == sent
            return
        assert there.device.counters()["dropped_no_buffer"] == (1 if wire in ("echo", "bridge") else 0)
        raw.queues[0].add([], [(raw.rx + size * count, 100)], (raw.rx + size * count, 100))
        raw.queues[0].kick()
        if wire in ("echo", "bridge"):  # there it was dropped
            bring(there, raw, sent)
        came = raw.recv()
        assert came is not None
        assert came[0].num_buffers == 4
        if wire != "source":
            assert came[1] == sent


def cpu_of(seconds: float) -> float:
    """CPU seconds that this process takes while nobody does anything."""
    before = os.times()
    time.sleep(seconds)
    after = os.times()
    return after.user + after.system - before.user - before.system


@RECEIVING
@BOTH
def test_too_little_room_in_a_whole_ring(wire: str, packed: bool) -> None:
    """A frame that the driver can never take does not keep those behind it from coming."""
    with session(wire, packed, queue_size=8) as (there, raw):
        raw.post(*[20] * 8)
        bring(there, raw, frame(SOURCE_SIZE))
        while not there.device.dropped:
            time.sleep(0.01)
        assert there.device.counters()["dropped_no_room"] == there.device.dropped
        assert cpu_of(0.3) < 0.15
        if wire != "source":
            bring(there, raw, sent := frame(60))
            came = raw.recv()
            assert came is not None
            assert came[1] == sent
            assert came[0].num_buffers == 4


@pytest.mark.parametrize("wire", ["socket", "bridge", "tap"])
@BOTH
def test_frames_from_the_wire_that_are_too_long(wire: str, packed: bool) -> None:
    with session(wire, packed) as (there, raw):
        lengths = {
            "socket": (LONGEST + 1, 65554, 65555, 65566, 65567, 65568, 150_000),
            "bridge": (LONGEST + 1, 9100),
            "tap": (LONGEST + 1, 9100),
        }[wire]
        raw.post(*[1024] * 60)
        expected = 0
        for size in lengths:
            try:
                there.give(frame(size))
                expected += 1
            except (OSError, ValueError):
                assert wire != "socket"  # the kernel, or our driver, keeps to the MTU
        there.give(sent := frame(60))
        came = raw.recv()
        assert came is not None
        assert came[1] == sent
        if wire == "socket":
            counters = there.device.counters()
            assert (counters["dropped_mtu"], counters["dropped_long"]) == (2, 5)
        assert there.device.dropped <= expected
