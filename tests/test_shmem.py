# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Shared memory regions: what may be mapped where, and that nothing that is not mapped can be touched."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhost.errors import IncorrectFds, InvalidGuestMemory
from vhost.shmem import MAX_MAPPINGS, ShmemRegion

PAGE = mmap.PAGESIZE
SIZE = 16 * PAGE


@pytest.fixture
def region(no_leaks: None) -> Iterator[ShmemRegion]:
    region = ShmemRegion(3, SIZE)
    yield region
    region.close()
    region.close()


@pytest.fixture
def fd() -> Iterator[int]:
    """A file of 8 pages, each full of its number."""
    fd = os.memfd_create("theirs")
    for i in range(8):
        os.write(fd, bytes([i]) * PAGE)
    yield fd
    os.close(fd)


def test_reading_and_writing(region: ShmemRegion, fd: int) -> None:
    region.map(4 * PAGE, 2 * PAGE, fd, PAGE, writable=True)
    region.map(6 * PAGE, PAGE, fd, 5 * PAGE)
    assert region.mappings == ((4 * PAGE, 2 * PAGE, True), (6 * PAGE, PAGE, False))
    assert region.read(5 * PAGE - 1, 2) == b"\x01\x02"
    assert region.read(4 * PAGE, 3 * PAGE) == b"".join(bytes([i]) * PAGE for i in (1, 2, 5))
    region.write(6 * PAGE - 2, b"ab")
    assert os.pread(fd, 2, 3 * PAGE - 2) == b"ab"
    with pytest.raises(InvalidGuestMemory, match="at 0x6000"):
        region.write(6 * PAGE, b"read-only")
    assert os.pread(fd, 1, 5 * PAGE) == b"\x05"
    # It is really there, for who has the address.
    maps = Path("/proc/self/maps").read_text()
    assert f"{region.host_addr + 4 * PAGE:x}-{region.host_addr + 6 * PAGE:x} rw-s" in maps
    assert f"{region.host_addr + 6 * PAGE:x}-{region.host_addr + 7 * PAGE:x} r--s" in maps
    assert "ShmemRegion 3: 2 mappings" in repr(region)


def test_the_descriptor_may_be_closed(region: ShmemRegion) -> None:
    fd = os.memfd_create("gone")
    os.ftruncate(fd, PAGE)
    region.map(0, PAGE, fd, writable=True)
    os.close(fd)
    region.write(0, b"still here")
    assert region.read(0, 10) == b"still here"


@pytest.mark.parametrize(
    ("offset", "length", "fd_offset", "why"),
    [
        (SIZE, PAGE, 0, "end within"),
        (SIZE - PAGE, 2 * PAGE, 0, "end within"),
        ((1 << 64) - PAGE, 2 * PAGE, 0, "end within"),
        (PAGE, (1 << 64) - PAGE, 0, "end within"),
        (0, 0, 0, "more than 0"),
        (1, PAGE, 0, "offset 0x1: no multiple"),
        (0, PAGE + 1, 0, "size 0x1001: no multiple"),
        (0, PAGE, 7, "file offset 0x7: no multiple"),
        (0, PAGE, 1 << 63, "no file is that large"),
        (0, PAGE, (1 << 64) - PAGE, "no file is that large"),
        (0, PAGE, 8 * PAGE, "file of 0x8000 bytes"),
        (0, 2 * PAGE, 7 * PAGE, "file of 0x8000 bytes"),
    ],
)
def test_mappings_that_are_refused(
    region: ShmemRegion, fd: int, offset: int, length: int, fd_offset: int, why: str
) -> None:
    with pytest.raises(InvalidGuestMemory, match=why):
        region.map(offset, length, fd, fd_offset)
    assert region.mappings == ()


def test_mappings_do_not_overlap(region: ShmemRegion, fd: int) -> None:
    region.map(4 * PAGE, 4 * PAGE, fd)
    for offset, length in ((4, 4), (3, 2), (7, 1), (5, 2), (3, 6), (0, 16), (4, 1)):
        with pytest.raises(InvalidGuestMemory, match="overlaps what is mapped at 0x4000"):
            region.map(offset * PAGE, length * PAGE, fd)
    region.map(3 * PAGE, PAGE, fd, 6 * PAGE)
    region.map(8 * PAGE, PAGE, fd, 7 * PAGE)
    assert region.read(4 * PAGE - 1, 1) + region.read(4 * PAGE, 1) == b"\x06\x00"
    assert [start // PAGE for start, _, _ in region.mappings] == [3, 4, 8]


def test_only_whole_mappings_are_unmapped(region: ShmemRegion, fd: int) -> None:
    region.map(2 * PAGE, 2 * PAGE, fd)
    region.map(4 * PAGE, 2 * PAGE, fd)
    for offset, length in ((2, 1), (3, 1), (2, 4), (0, 2), (0, 16), (8, 1)):
        with pytest.raises(InvalidGuestMemory, match="no mapping is exactly that"):
            region.unmap(offset * PAGE, length * PAGE)
    region.unmap(2 * PAGE, 2 * PAGE)
    with pytest.raises(InvalidGuestMemory, match="nothing is mapped"):
        region.read(2 * PAGE, 1)
    assert region.read(4 * PAGE, 1) == b"\x00"
    region.map(2 * PAGE, PAGE, fd, 7 * PAGE)
    assert region.read(2 * PAGE, 1) == b"\x07"
    region.unmap_all()
    assert region.mappings == ()
    with pytest.raises(InvalidGuestMemory, match="at 0x4000"):
        region.read(4 * PAGE, 1)


def test_descriptors_that_do_not_allow_it(region: ShmemRegion, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(PAGE))
    for flags, writable, why in (
        (os.O_RDONLY, True, "cannot be written"),
        (os.O_WRONLY, False, "cannot be read"),
        (os.O_WRONLY, True, "cannot be written"),
    ):
        fd = os.open(file, flags)
        try:
            with pytest.raises(IncorrectFds, match=why):
                region.map(0, PAGE, fd, writable=writable)
        finally:
            os.close(fd)
    fd = os.open(file, os.O_RDONLY)
    region.map(0, PAGE, fd)
    os.close(fd)
    with pytest.raises(IncorrectFds, match="Bad file descriptor"):
        region.map(PAGE, PAGE, fd)
    for other in (*os.pipe(), os.eventfd(0)):
        with pytest.raises((InvalidGuestMemory, IncorrectFds)):
            region.map(PAGE, PAGE, other)
        os.close(other)
    assert region.mappings == ((0, PAGE, False),)
    with pytest.raises(InvalidGuestMemory):
        region.read(PAGE, 1)


def test_a_file_that_is_shortened(region: ShmemRegion, fd: int) -> None:
    """Whoever has the address would be killed; ``read`` is told."""
    region.map(0, 4 * PAGE, fd, writable=True)
    os.ftruncate(fd, PAGE)
    assert region.read(0, PAGE) == bytes(PAGE)
    for access in (lambda: region.read(PAGE, 1), lambda: region.write(2 * PAGE, b"x")):
        with pytest.raises(InvalidGuestMemory):
            access()
    with pytest.raises(InvalidGuestMemory, match="at 0x1000"):
        region.read(0, 2 * PAGE)


def test_nothing_can_be_touched_that_is_not_mapped() -> None:
    """By the address it is a fault, and not somebody else's memory."""
    code = (
        "import ctypes, mmap; from vhost.shmem import ShmemRegion; r = ShmemRegion(0, mmap.PAGESIZE);"
        "print('there', flush=True); ctypes.string_at(r.host_addr, 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("there\n", -11)


def test_limits(region: ShmemRegion) -> None:
    for size in (0, 1, PAGE + 1, -PAGE, 1 << 63, 1 << 64, 1 << 62):
        with pytest.raises(InvalidGuestMemory, match="size"):
            ShmemRegion(0, size)
    many = ShmemRegion(0, (MAX_MAPPINGS + 1) * PAGE)
    fd = os.memfd_create("page")
    os.ftruncate(fd, PAGE)
    for i in range(MAX_MAPPINGS):
        many.map(i * PAGE, PAGE, fd)
    with pytest.raises(InvalidGuestMemory, match="which is the limit"):
        many.map(MAX_MAPPINGS * PAGE, PAGE, fd)
    many.unmap(PAGE, PAGE)
    many.map(MAX_MAPPINGS * PAGE, PAGE, fd)
    os.close(fd)
    many.close()
    for use in (lambda: many.read(0, 1), lambda: many.unmap_all(), lambda: many.map(0, PAGE, 0)):
        with pytest.raises(InvalidGuestMemory, match="closed"):
            use()


def test_a_file_of_huge_pages_takes_no_more_than_was_asked_for(no_leaks: None) -> None:
    """The kernel rounds its mappings up, over whatever is behind them."""
    try:
        fd = os.memfd_create("theirs", os.MFD_HUGETLB)
    except OSError as error:
        pytest.skip(f"no huge pages: {error}")
    huge = os.fstatvfs(fd).f_bsize
    region = ShmemRegion(0, 2 * huge)
    try:
        os.ftruncate(fd, huge)
        with pytest.raises(InvalidGuestMemory, match=f"size {PAGE:#x}: no multiple of {huge:#x}"):
            region.map(0, PAGE, fd)
        assert region.mappings == ()
    finally:
        region.close()
        os.close(fd)
