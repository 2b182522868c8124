# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A queue that notes what is in flight, and those that come after it. The moments between are tested in C."""

from __future__ import annotations

import os
import random

import pytest

from rig import Rig
from vhost.errors import IncorrectFds, InvalidGuestMemory, InvalidQueue
from vhost.inflight import QUEUE_SIZE_MAX, InflightRegion, inflight_size
from vhost.virtqueue import DeviceQueue

FORMATS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


@FORMATS
def test_sizes(packed: bool) -> None:
    """Header and entries of the specification's structs, each queue's part rounded up to 64 bytes."""
    header, entry = (32, 32) if packed else (16, 16)
    for num in (1, 2, 3, 4, 128, 255, 1024, QUEUE_SIZE_MAX):
        part = -(-(header + num * entry) // 64) * 64
        assert inflight_size(1, num, packed=packed) == part
        assert inflight_size(7, num, packed=packed) == 7 * part


@pytest.mark.parametrize(("queues", "size"), [(0, 8), (-1, 8), (65536, 8), (1, 0), (1, 32769), (1, -8)])
def test_sizes_of_nothing(queues: int, size: int) -> None:
    with pytest.raises(InvalidQueue, match="must be 1 to"):
        InflightRegion.allocate(queues, size)


@FORMATS
@pytest.mark.parametrize("in_order", [False, True])
def test_generations(packed: bool, in_order: bool) -> None:
    """Each queue dies with some in flight; the driver gets each chain back once, and none twice."""
    rnd = random.Random(7)
    rig = Rig(16, packed=packed, in_order=in_order)
    region = InflightRegion.allocate(2, 32, packed=packed)
    driver = rig.driver()
    out: dict[int, int] = {}  # by token, in the order of adding: the chain's length
    again = 0
    for serial in range(1, 400):
        queue = rig.device(inflight=region, index=1, base=0x80008000 if packed else None)
        assert queue.inflight is region
        assert queue.resubmits == len(out)
        chains = queue.pop_batch(64)
        assert queue.resubmits == 0
        assert [chain.readable_len for chain in chains] == list(out.values())
        again += len(chains)
        while len(out) < 12:
            serial += 1000
            out[serial] = serial % 997 + 1
            driver.add([(rig.data, out[serial])], [], serial)
        chains += queue.pop_batch(64)
        rnd.shuffle(chains)
        while chains and rnd.random() < 0.8:
            queue.push(chains.pop())
        for token, _ in driver.get_used_batch(64):
            del out[token]  # once
    assert again > 400


@FORMATS
def test_parts_apart(packed: bool) -> None:
    region = InflightRegion.allocate(3, 16, packed=packed)
    rig = Rig(16, packed=packed)
    part = region.size // 3
    rig.driver().add([(rig.data, 8)], [], 1)
    rig.device(inflight=region, index=1).pop()
    noted = memoryview(region.region)
    assert not any(noted[:part])
    assert any(noted[part : 2 * part])
    assert not any(noted[2 * part :])


@FORMATS
def test_no_part(packed: bool) -> None:
    rig = Rig(16, packed=packed)
    with pytest.raises(InvalidQueue, match="for 2 queues only"):
        rig.device(inflight=InflightRegion.allocate(2, 16, packed=packed), index=2)
    with pytest.raises(InvalidQueue, match="another queue size"):
        rig.device(inflight=InflightRegion.allocate(1, 8, packed=packed))


def test_packed_queues_need_more_room() -> None:
    region = InflightRegion.allocate(2, 16, packed=False)
    rig = Rig(16, packed=True)
    rig.device(inflight=region, index=0)
    with pytest.raises(InvalidQueue, match="2 packed queues of 16 need 0x480"):
        rig.device(inflight=region, index=1)


def test_what_it_was_of_the_other_format() -> None:
    region = InflightRegion.allocate(1, 16)
    split, packed = Rig(16), Rig(16, packed=True)
    split.driver().add([(split.data, 8)], [], 1)
    split.device(inflight=region).pop()
    with pytest.raises(InvalidQueue, match="in-flight region"):
        packed.device(inflight=region)


def test_files_that_are_none() -> None:
    region = InflightRegion.allocate(1, 16)
    fd = region.region.fd
    size = region.size
    same = InflightRegion.from_fd(fd, size, num_queues=1, queue_size=16)
    assert (same.num_queues, same.queue_size, same.size, same.broken) == (1, 16, size, False)
    with pytest.raises(InvalidQueue, match="need 0x140"):
        InflightRegion.from_fd(fd, 64, num_queues=1, queue_size=16)
    with pytest.raises(InvalidQueue, match="no multiple of 64"):
        InflightRegion.from_fd(fd, size - 8, num_queues=1, queue_size=16, offset=8)
    with pytest.raises(InvalidGuestMemory, match="the file has only"):
        InflightRegion.from_fd(fd, size, num_queues=1, queue_size=16, offset=64)
    event = os.eventfd(0)
    with pytest.raises(IncorrectFds):
        InflightRegion.from_fd(event, size, num_queues=1, queue_size=16)
    os.close(event)
    with pytest.raises(TypeError):
        InflightRegion()


@FORMATS
def test_after_the_end_nothing_is_noted(packed: bool) -> None:
    rig = Rig(16, packed=packed)
    region = InflightRegion.allocate(1, 16, packed=packed)
    driver = rig.driver()
    driver.add([(rig.data, 8)], [], "one")
    queue: DeviceQueue = rig.device(inflight=region)
    chain = queue.pop()
    queue.close()
    before = bytes(memoryview(region.region))
    for late in (lambda: queue.push(chain), lambda: queue.unpop(chain), queue.flush):
        with pytest.raises(InvalidQueue, match="closed"):
            late()
    assert bytes(memoryview(region.region)) == before
    assert not driver.get_used_batch(8)
