# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Block requests that no honest driver makes, or that few do: both handlers answer alike, touch nothing
outside the disk, and give up a ring only if there is no answering."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from devices.disks import (
    BASE,
    HANDLERS,
    REGION,
    Ring,
    header,
    how,
    pattern,
    ring,
    segments,
    serving,
    wait_for,
)
from vhost.devices._blk_engine import MAX_RANGES, BlkEngine
from vhost.devices.blk import Blk
from vhost.devices.blk_python import MAX_DISCARD_SECTORS, MAX_ZEROES_SECTORS
from vhost.drivers import Blk as BlkDriver
from vhost.errors import QueueBroken
from vhost.virtio_blk import BlkStatus, BlkType

OK, IOERR, UNSUPP = BlkStatus.OK, BlkStatus.IOERR, BlkStatus.UNSUPP
SECTORS = 256
SIZE = SECTORS * 512
CONTENT = pattern(SIZE)


@pytest.fixture(params=HANDLERS)
def handler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    return how(request.param, monkeypatch)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture(params=["split", "packed"])
def disk(
    request: pytest.FixtureRequest, image: Path, handler: dict[str, str], no_leaks: None
) -> Iterator[Ring]:
    """After every test here the ring still serves, and the file has its size."""
    device = Blk(image, **handler, serial="0123456789abcdefghij")
    with ring(device, packed=request.param == "packed") as one:
        yield one
        if one.queue.broken is None:
            assert one.request(BlkType.IN, 0, room=512)[0] == OK
    assert image.stat().st_size == SIZE


# -- requests that are answered --------------------------------------------------------------------


@pytest.mark.parametrize("cut", range(1, 16))
def test_header_in_two_descriptors(disk: Ring, cut: int) -> None:
    disk.memory.write(disk.free, header(BlkType.IN, 3))
    readable = [(disk.free, cut), (disk.free + cut, 16 - cut)]
    data = disk.free + 4096
    assert disk.run(readable, [(data, 1024), (disk.free + 64, 1)]) == (OK, 1025)
    assert disk.memory.read(data, 1024) == CONTENT[3 * 512 : 5 * 512]


def test_header_in_sixteen_descriptors_of_one_byte(disk: Ring) -> None:
    for i, byte in enumerate(header(BlkType.IN, 1)):
        disk.memory.write(disk.free + 100 * i, bytes([byte]))
    readable = [(disk.free + 100 * i, 1) for i in range(16)]
    assert disk.run(readable, [(disk.free + 4096, 512), (disk.free + 8192, 1)]) == (OK, 513)
    assert disk.memory.read(disk.free + 4096, 512) == CONTENT[512:1024]


def test_everything_in_two_descriptors(disk: Ring) -> None:
    """Header and data in the one, data and status in the other."""
    new = pattern(1024, seed=2)
    disk.memory.write(disk.free, header(BlkType.OUT, 9) + new)
    assert disk.run([(disk.free, 16 + 1024)], [(disk.free + 4096, 1)]) == (OK, 1)
    disk.memory.write(disk.free, header(BlkType.IN, 9))
    assert disk.run([(disk.free, 16)], [(disk.free + 4096, 1024 + 1)]) == (OK, 1025)
    assert disk.memory.read(disk.free + 4096, 1024) == new


def test_header_and_data_share_a_descriptor_that_others_go_on(disk: Ring) -> None:
    new = pattern(1536, seed=3)
    blob = header(BlkType.OUT, 20) + new
    disk.memory.write(disk.free, blob)
    readable = [(disk.free, 7), (disk.free + 7, 300), (disk.free + 307, len(blob) - 307)]
    assert disk.run(readable, [(disk.free + 8192, 1)]) == (OK, 1)
    assert disk.request(BlkType.IN, 20, room=1536) == (OK, 1537, new)


def test_status_behind_data_in_pieces(disk: Ring) -> None:
    disk.memory.write(disk.free, header(BlkType.IN, 0))
    at = disk.free + 4096
    writable = [(at, 1), (at + 1, 510), (at + 511, 513), (at + 1024, 1)]
    assert disk.run([(disk.free, 16)], writable) == (OK, 1025)
    assert disk.memory.read(at, 1024) == CONTENT[:1024]


@pytest.mark.parametrize("length", [1, 511, 513, 4095])
def test_length_is_no_multiple_of_512(disk: Ring, length: int) -> None:
    before = bytes(length)
    assert disk.request(BlkType.IN, 0, room=length) == (IOERR, 1, before)
    assert disk.request(BlkType.OUT, 0, data=b"x" * length)[:2] == (IOERR, 1)
    assert disk.request(BlkType.IN, 0, room=512) == (OK, 513, CONTENT[:512])


@pytest.mark.parametrize(
    ("sector", "count"),
    [
        (SECTORS, 1),
        (SECTORS - 1, 2),
        (SECTORS + 1, 1),
        (1 << 32, 1),
        ((1 << 55) - 1, 1),  # byte offset of 2^64 - 512
        (1 << 55, 1),  # byte offset wraps to 0
        ((1 << 55) + 3, 1),
        ((1 << 64) - 1, 1),  # sector + length wraps to 0
        ((1 << 64) - 8, 16),
        (1 << 63, 2),
    ],
)
def test_beyond_the_end(disk: Ring, image: Path, sector: int, count: int) -> None:
    assert disk.request(BlkType.IN, sector, room=count * 512) == (IOERR, 1, bytes(count * 512))
    assert disk.request(BlkType.OUT, sector, data=b"x" * count * 512)[:2] == (IOERR, 1)
    assert image.read_bytes() == CONTENT


def test_the_last_sector(disk: Ring) -> None:
    assert disk.request(BlkType.IN, SECTORS - 1, room=512) == (OK, 513, CONTENT[-512:])


def test_no_data_at_all(disk: Ring, image: Path) -> None:
    """Nothing is asked, and nothing can go wrong; but only on the disk."""
    assert disk.request(BlkType.IN, 0)[:2] == (OK, 1)
    assert disk.request(BlkType.OUT, 0)[:2] == (OK, 1)
    assert disk.request(BlkType.IN, SECTORS)[:2] == (OK, 1)
    assert disk.request(BlkType.IN, SECTORS + 1)[:2] == (IOERR, 1)
    assert disk.request(BlkType.OUT, 1 << 63)[:2] == (IOERR, 1)
    assert image.read_bytes() == CONTENT


@pytest.mark.parametrize("kind", [2, 3, 5, 6, 7, 9, 10, 12, 14, 0x80000000, 0x80000001, 0xFFFFFFFF])
def test_unknown_type(disk: Ring, image: Path, kind: int) -> None:
    assert disk.request(kind, 0, data=b"x" * 512, room=512) == (UNSUPP, 1, b"x" * 512)
    assert disk.request(kind, 1 << 60)[:2] == (UNSUPP, 1)
    assert image.read_bytes() == CONTENT


@pytest.mark.parametrize("room", [0, 1, 19, 20, 21, 512])
def test_get_id_with_any_buffer(disk: Ring, room: int) -> None:
    want = b"0123456789abcdefghij"[:room]
    status, written, data = disk.request(BlkType.GET_ID, 77, room=room)
    assert (status, written, data) == (OK, len(want) + 1, want.ljust(room, b"\0"))


def test_get_id_in_pieces(disk: Ring) -> None:
    disk.memory.write(disk.free, header(BlkType.GET_ID))
    at = disk.free + 4096
    writable = [(at, 3), (at + 100, 16), (at + 200, 5)]
    assert disk.run([(disk.free, 16)], writable) == (OK, 21)
    assert disk.memory.read(at, 3) + disk.memory.read(at + 100, 16) == b"0123456789abcdefghi"
    assert disk.memory.read(at + 200, 1) == b"j"


def test_data_spans_regions(disk: Ring) -> None:
    new = pattern(4 * 512, seed=4)
    for at in (disk.border - 1, disk.border - 512, disk.border - 700):
        assert disk.request(BlkType.OUT, 8, data=new, at=at)[:2] == (OK, 1)
        disk.memory.write(at, bytes(len(new)))
        assert disk.request(BlkType.IN, 8, room=len(new), at=at) == (OK, len(new) + 1, new)
        new = new[::-1]


def test_header_and_status_span_regions(disk: Ring) -> None:
    at = disk.border - 5
    disk.memory.write(at, header(BlkType.IN, 2))
    status = disk.border + REGION - 512
    assert disk.run([(at, 16)], [(status, 513)]) == (OK, 513)
    assert disk.memory.read(status, 512) == CONTENT[1024:1536]


def test_one_descriptor_over_three_regions(disk: Ring) -> None:
    at = disk.border - 512
    size = REGION + 1024
    assert disk.request(BlkType.IN, 0, room=size, at=at) == (OK, size + 1, CONTENT[:size])


def test_header_is_overwritten_by_its_own_data(disk: Ring) -> None:
    """The header is read once, so what comes over it changes nothing."""
    disk.memory.write(disk.free, header(BlkType.IN, 5))
    assert disk.run([(disk.free, 16)], [(disk.free, 512), (disk.free + 512, 1)]) == (OK, 513)
    assert disk.memory.read(disk.free, 512) == CONTENT[5 * 512 : 6 * 512]


def test_status_lies_in_the_header(disk: Ring) -> None:
    disk.memory.write(disk.free, header(BlkType.FLUSH))
    at = disk.free + 15
    disk.send([(disk.free, 16)], [(at, 1)])
    assert disk.driver.wait(10)
    assert disk.driver.get_used() == (([(disk.free, 16)], [(at, 1)]), 1)
    assert disk.memory.read(at, 1)[0] == OK


def test_status_lies_in_the_data(disk: Ring) -> None:
    """Written and read at the same place: what counts is that nothing outside of it changes."""
    at = disk.free + 4096
    disk.memory.write(at, b"w" * 512 + b"guard")
    disk.memory.write(disk.free, header(BlkType.OUT, 0))
    assert disk.run([(disk.free, 16), (at, 512)], [(at + 100, 1)]) == (OK, 1)
    assert disk.memory.read(at + 512, 5) == b"guard"
    assert disk.request(BlkType.IN, 0, room=512, at=at + 8192)[2].count(b"w") == 511


def test_same_memory_as_source_of_one_and_target_of_another(disk: Ring) -> None:
    at = disk.free + 4096
    for kind in (BlkType.IN, BlkType.OUT) * 8:
        disk.memory.write(disk.free, header(kind, 7))
        readable, writable = [(disk.free, 16)], [(disk.free + 64, 1)]
        if kind == BlkType.IN:
            writable.insert(0, (at, 512))
        else:
            readable.append((at, 512))
        assert disk.run(readable, writable)[0] == OK
    assert disk.memory.read(at, 512) == CONTENT[7 * 512 : 8 * 512]


def test_answer_goes_into_the_ring_itself(disk: Ring) -> None:
    """A driver may harm itself, not us: its own descriptors get the data."""
    disk.memory.write(disk.free, header(BlkType.IN, 0))
    disk.send([(disk.free, 16)], [(BASE, 512), (disk.free + 64, 1)])
    wait_for(disk.call)
    assert disk.memory.read(disk.free + 64, 1)[0] == OK
    disk.queue.mark_broken("the test is done with it")  # if it is not broken already


def test_the_file_ends_below_the_capacity(disk: Ring, image: Path) -> None:
    assert disk.request(BlkType.IN, SECTORS - 12, room=6144)[0] == OK
    os.truncate(image, SIZE - 4096)
    status, written, _ = disk.request(BlkType.IN, SECTORS - 12, room=6144)
    assert status == IOERR
    assert 1 <= written <= 2049
    # What is written there, there is again.
    assert disk.request(BlkType.OUT, SECTORS - 8, data=b"x" * 4096)[:2] == (OK, 1)
    assert image.read_bytes() == CONTENT[: SIZE - 4096] + b"x" * 4096


# -- discard and write-zeroes ----------------------------------------------------------------------

RANGES = (BlkType.DISCARD, BlkType.WRITE_ZEROES)


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize(
    "data",
    [
        b"",
        segments((0, 1, 0))[:15],
        segments((0, 1, 0)) + b"\0",
        segments((0, 1, 0)) + bytes(15),
        segments(*[(i, 1, 0) for i in range(MAX_RANGES + 1)]),
        segments(*[(0, 1, 0)] * 2000),
        segments((SECTORS, 1, 0)),
        segments((0, SECTORS + 1, 0)),
        segments(((1 << 64) - 1, 1, 0)),
        segments(((1 << 64) - 1, 2, 0)),
        segments((1 << 55, 1, 0)),
        segments((0, 0xFFFFFFFF, 0)),
        segments((0, 8, 0), (SECTORS, 8, 0)),
    ],
    ids=lambda data: f"{len(data)}-{data[:12].hex()}" if isinstance(data, bytes) else None,
)
def test_bad_ranges(disk: Ring, image: Path, kind: int, data: bytes) -> None:
    """Refused as a whole: also what was good of it is not done."""
    assert disk.request(kind, 0, data=data)[:2] == (IOERR, 1)
    assert image.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("kind", "flags"),
    [(BlkType.DISCARD, f) for f in (1, 2, 3, 1 << 31)] + [(BlkType.WRITE_ZEROES, f) for f in (2, 3, 1 << 31)],
)
def test_unknown_flags(disk: Ring, image: Path, kind: int, flags: int) -> None:
    assert disk.request(kind, 0, data=segments((0, 8, flags)))[:2] == (UNSUPP, 1)
    assert disk.request(kind, 0, data=segments((0, 8, 0), (8, 8, flags)))[:2] == (UNSUPP, 1)
    assert disk.request(kind, 0, data=segments((SECTORS, 8, flags)))[:2] == (UNSUPP, 1)
    assert image.read_bytes() == CONTENT


@pytest.mark.parametrize("flags", [0, 1])
def test_write_zeroes(disk: Ring, image: Path, flags: int) -> None:
    data = segments((8, 8, flags), (0, 0, flags), (100, 1, flags), (SECTORS - 1, 1, flags))
    assert disk.request(BlkType.WRITE_ZEROES, 0, data=data)[:2] == (OK, 1)
    want = bytearray(CONTENT)
    for sector, count in ((8, 8), (100, 1), (SECTORS - 1, 1)):
        want[sector * 512 : (sector + count) * 512] = bytes(count * 512)
    assert image.read_bytes() == want


def test_discard_makes_a_hole(disk: Ring, image: Path) -> None:
    before = image.stat().st_blocks
    status, written, _ = disk.request(BlkType.DISCARD, 0, data=segments((0, 64, 0), (128, 64, 0)))
    assert (status, written) == (OK, 1)
    got = image.read_bytes()
    assert got[64 * 512 : 128 * 512] == CONTENT[64 * 512 : 128 * 512]
    assert got[192 * 512 :] == CONTENT[192 * 512 :]
    assert got[: 64 * 512] == bytes(64 * 512)
    assert image.stat().st_blocks < before


def test_most_segments(disk: Ring, image: Path) -> None:
    data = segments(*[(i * 2, 1, 0) for i in range(MAX_RANGES)])
    assert disk.request(BlkType.WRITE_ZEROES, 0, data=data)[:2] == (OK, 1)
    got = image.read_bytes()
    for i in range(MAX_RANGES):
        assert got[i * 1024 : i * 1024 + 512] == bytes(512)
        assert got[i * 1024 + 512 : i * 1024 + 1024] == CONTENT[i * 1024 + 512 : i * 1024 + 1024]


@pytest.mark.parametrize(
    ("kind", "most"),
    [(BlkType.DISCARD, MAX_DISCARD_SECTORS), (BlkType.WRITE_ZEROES, MAX_ZEROES_SECTORS)],
)
def test_longest_segment(tmp_path: Path, handler: dict[str, str], kind: int, most: int) -> None:
    """The limit is below the capacity here, so that nothing else refuses what is beyond it."""
    big = tmp_path / "big"
    big.write_bytes(CONTENT)
    os.truncate(big, (most + 8) * 512)
    with ring(Blk(big, **handler)) as disk:
        assert disk.request(kind, 0, data=segments((0, most + 1, 0)))[:2] == (IOERR, 1)
        assert disk.request(kind, 0, data=segments((0, 1, 0), (0, 0xFFFFFFFF, 0)))[:2] == (IOERR, 1)
        assert disk.request(BlkType.IN, 0, room=SIZE // 2)[2] == CONTENT[: SIZE // 2]
        assert disk.request(kind, 0, data=segments((0, most, 0)))[:2] == (OK, 1)
        assert disk.request(BlkType.IN, 0, room=SIZE // 2)[2] == bytes(SIZE // 2)


def test_segments_split_over_descriptors_and_regions(disk: Ring, image: Path) -> None:
    blob = header(BlkType.WRITE_ZEROES) + segments((0, 1, 0), (2, 1, 0), (4, 1, 0))
    at = disk.border - 21
    disk.memory.write(at, blob)
    readable = [(at, 13), (at + 13, 9), (at + 22, 30), (at + 52, len(blob) - 52)]
    assert disk.run(readable, [(disk.free, 1)]) == (OK, 1)
    got = image.read_bytes()
    assert [got[i * 512 : i * 512 + 512] == bytes(512) for i in range(6)] == [True, False] * 3


# -- a read-only disk ------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_read_only(image: Path, handler: dict[str, str], packed: bool, no_leaks: None) -> None:
    image.chmod(0o444)
    with ring(Blk(image, read_only=True, **handler), packed=packed) as disk:
        assert disk.request(BlkType.OUT, 0, data=b"x" * 512)[:2] == (IOERR, 1)
        assert disk.request(BlkType.OUT, 0)[:2] == (IOERR, 1)
        for kind in RANGES:
            assert disk.request(kind, 0, data=segments((0, 8, 0)))[:2] == (IOERR, 1)
            assert disk.request(kind, 0, data=segments((0, 8, 2)))[:2] == (UNSUPP, 1)
        assert disk.request(BlkType.FLUSH)[:2] == (OK, 1)
        assert disk.request(BlkType.IN, 0, room=512) == (OK, 513, CONTENT[:512])
    assert image.read_bytes() == CONTENT


# -- the null device -------------------------------------------------------------------------------


def test_null_device(handler: dict[str, str], no_leaks: None) -> None:
    with ring(Blk(null_size=SIZE, **handler)) as disk:
        at = disk.free + 4096
        disk.memory.write(at, b"as it was")
        assert disk.request(BlkType.IN, 0, room=512) == (OK, 513, b"as it was".ljust(512, b"\0"))
        assert disk.request(BlkType.OUT, 0, data=b"x" * 512)[:2] == (OK, 1)
        assert disk.request(BlkType.IN, SECTORS, room=512)[0] == IOERR
        assert disk.request(BlkType.IN, 0, room=511)[0] == IOERR
        assert disk.request(BlkType.FLUSH)[:2] == (OK, 1)
        assert disk.request(BlkType.DISCARD, data=segments((0, SECTORS, 0)))[:2] == (OK, 1)
        assert disk.request(BlkType.DISCARD, data=segments((1, SECTORS, 0)))[:2] == (IOERR, 1)
        assert disk.request(BlkType.WRITE_ZEROES, data=segments((0, SECTORS, 1)))[:2] == (OK, 1)


# -- what cannot be answered -----------------------------------------------------------------------

Shape = tuple[list[tuple[int, int]], list[tuple[int, int]]]
MALFORMED: dict[str, Shape] = {
    "no header": ([], [(0, 513)]),
    "no header, room for a status": ([], [(0, 1)]),
    "header of 15 bytes": ([(0, 15)], [(64, 1)]),
    "header of 15 bytes in pieces": ([(0, 7), (7, 8)], [(64, 512), (600, 1)]),
    "no status": ([(0, 16)], []),
    "no status, data": ([(0, 16), (64, 512)], []),
    "no status, one descriptor for everything": ([(0, 16 + 512 + 1)], []),
    "one byte to read": ([(0, 1)], []),
}


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("packed", [False, True])
def test_malformed(image: Path, handler: dict[str, str], packed: bool, name: str, no_leaks: None) -> None:
    """The ring breaks, says why, and signals err once; what came before is answered, nothing after is."""
    with ring(Blk(image, **handler), packed=packed) as disk:
        assert disk.request(BlkType.IN, 0, room=512)[0] == OK
        disk.memory.write(disk.free, header(BlkType.OUT, 0))
        readable, writable = ([(disk.free + at, size) for at, size in part] for part in MALFORMED[name])
        disk.send(readable, writable)
        reason = disk.wait_broken()
        assert ("header" if sum(size for _, size in readable) < 16 else "status") in reason
        assert os.eventfd_read(disk.err) == 1
        disk.send([(disk.free, 16)], [(disk.free + 64, 1)])
        assert not disk.driver.wait(0.05)
        assert disk.queue.broken == reason
        with pytest.raises(BlockingIOError):
            os.eventfd_read(disk.err)
    assert image.read_bytes() == CONTENT


@pytest.mark.parametrize("packed", [False, True])
def test_malformed_in_a_batch(image: Path, handler: dict[str, str], packed: bool, no_leaks: None) -> None:
    with ring(Blk(image, **handler), packed=packed) as disk:
        disk.memory.write(disk.free, header(BlkType.IN, 1))
        data = disk.free + 4096
        good = ([(disk.free, 16)], [(data, 512), (disk.free + 64, 1)])
        bad = ([(disk.free, 16)], [])
        after = ([(disk.free, 16)], [(data + 512, 512), (disk.free + 65, 1)])
        disk.memory.write(disk.free + 64, b"\xee\xee")
        requests = [(*good, "good"), (*bad, "bad"), (*after, "after")]
        assert disk.driver.add_batch(requests) == 3
        disk.driver.kick()
        if not disk.threaded:
            with pytest.raises(QueueBroken, match="status"):
                disk.device.handle(disk.queue)
        assert "status" in disk.wait_broken()
        assert disk.driver.wait(10)
        assert disk.driver.get_used_batch() == [("good", 513)]
        assert disk.memory.read(disk.free + 64, 2) == b"\x00\xee"
        assert disk.memory.read(data, 1024) == CONTENT[512:1024] + bytes(512)


def test_all_handlers_say_the_same(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons: dict[str, set[str]] = {}
    for handler in ("sync", "threads", "python"):
        for name, (readable, writable) in MALFORMED.items():
            with ring(Blk(image, **how(handler, monkeypatch))) as disk:
                disk.send(*([(disk.free + at, size) for at, size in part] for part in (readable, writable)))
                reasons.setdefault(name, set()).add(disk.wait_broken())
    assert all(len(found) == 1 for found in reasons.values()), reasons


def test_malformed_under_a_server(
    image: Path, tmp_path: Path, handler: dict[str, str], caplog: pytest.LogCaptureFixture, no_leaks: None
) -> None:
    """That ring is given up. The other ring of the session goes on, and so does the other session; and
    the session itself, so that the ring can be set up anew."""
    other_image = tmp_path / "other"
    other_image.write_bytes(CONTENT)
    images = iter([image, other_image])
    caplog.set_level(logging.WARNING, "vhost.backend")
    err = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    with (
        serving(lambda: Blk(next(images), **handler, num_queues=2), tmp_path / "s") as server,
        server.connect() as first,
        BlkDriver(first, num_queues=2) as disk,
    ):
        first.set_vring_err(1, err)
        with server.connect() as second, BlkDriver(second) as other:
            disk.queues[1].add([(disk.data_addr, 16)], [], None)
            disk.queues[1].kick()
            wait_for(err)
            assert disk.read(0, 8) == CONTENT[:4096]  # the first ring
            assert other.read(0, 8) == CONTENT[:4096]
            assert first.get_queue_num() == 2
            disk.submit_read(0, 1, queue=1)
            assert disk.poll(0.05, queue=1) == []
        assert any("ring broken" in line and "status" in line for line in caplog.messages)
        first.get_vring_base(1)
    assert os.eventfd_read(err) == 1
    os.close(err)


@pytest.mark.parametrize("packed", [False, True])
def test_a_queue_is_taken_back_in_the_middle_of_a_batch(tmp_path: Path, packed: bool, no_leaks: None) -> None:
    """Each request reads some 20 MiB, as a guest can ask for with little memory. Whoever takes the queue
    back waits for one of them, and a successor finds the others."""
    big = tmp_path / "big.raw"
    with big.open("wb") as file:
        file.truncate(64 << 20)
    count = 30
    with ring(Blk(big), packed=packed, num=4096, regions=8) as one:
        header_at, status, data = one.free, one.free + 64, one.free + 512
        one.memory.write(header_at, header(BlkType.IN))
        room = (BASE + 8 * REGION - data) // 512 * 512
        writable = [(data, room)] * (20 * (1 << 20) // room) + [(status, 1)]
        for number in range(count):
            one.driver.add([(header_at, 16)], writable, number)
        one.driver.kick()
        assert one.driver.wait(20)
        one.device.stop_queue(one.queue)
        early = [token for token, _ in one.driver.get_used_batch(count)]
        assert 0 < len(early) < count
        assert one.queue.in_flight == 0
        one.device.start_queue(one.queue)
        late: list[int] = []
        while len(early) + len(late) < count:
            assert one.driver.wait(20), one.queue.broken
            late += [token for token, _ in one.driver.get_used_batch(count)]
        assert early + late == list(range(count))


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_of_large_requests_keeps_no_other_queue_waiting(
    tmp_path: Path, packed: bool, no_leaks: None
) -> None:
    """Two guests of one worker. What the second writes, the last of the first's reads find: it had its turn
    before those were done, although they were there first."""
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(16 << 20)
    engine = BlkEngine(1, "vhost-blk")
    count = 30
    with (
        ring(Blk(disk, engine=engine, share=True), packed=packed, num=4096, regions=8) as large,
        ring(Blk(disk, engine=engine, share=True), packed=packed) as small,
    ):
        large.device.hold_queue(large.queue)
        header_at, status, first, data = (large.free + at for at in (0, 64, 512, 32 << 10))
        large.memory.write(header_at, header(BlkType.IN))
        rest = [(data, (BASE + 8 * REGION - data) // 512 * 512)] * 16
        for number in range(count):
            writable = [(first + number * 512, 512), *rest, (status, 1)]
            large.driver.add([(header_at, 16)], writable, number)
        large.driver.kick()
        small.memory.write(small.free, header(BlkType.OUT) + b"w" * 512)
        small.driver.add([(small.free, 16 + 512)], [(small.free + 1024, 1)], None)
        small.driver.kick()
        large.device.release_queue(large.queue, True)
        done = 0
        while done < count:
            assert large.driver.wait(20), large.queue.broken
            done += len(large.driver.get_used_batch(count))
        found = [large.memory.read(first + number * 512, 512) for number in range(count)]
        assert found[0] == bytes(512)
        assert found[-1] == b"w" * 512
