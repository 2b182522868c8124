# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Regions and tables of them: what is refused, how addresses translate, and that no view dangles."""

from __future__ import annotations

import errno
import fcntl
import gc
import mmap
import os
import random
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import fds
from vhost.errors import IncorrectFds, InvalidGuestMemory
from vhost.memory import MAX_REGIONS, GuestMemory, Region

PAGE = mmap.PAGESIZE
MIB = 1 << 20

pytestmark = pytest.mark.usefixtures("no_leaks")


def region(guest_addr: int, size: int = PAGE, user_addr: int | None = None) -> Region:
    return Region.allocate(size, guest_addr=guest_addr, user_addr=user_addr)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """A file of 4 pages that says in each byte which page it is of."""
    path = tmp_path / "memory"
    path.write_bytes(b"".join(bytes([i]) * PAGE for i in range(4)))
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


# ---------------------------------------------------------------------- Region.allocate


def test_allocated_memory_is_zero_shared_and_cannot_change_its_size() -> None:
    memory = Region.allocate(3 * PAGE, guest_addr=0x1000, name="a name")
    assert (memory.size, memory.guest_addr, memory.mmap_offset) == (3 * PAGE, 0x1000, 0)
    assert memory.user_addr == memory.host_addr != 0
    assert bytes(memory) == bytes(3 * PAGE)
    assert "a name" in os.readlink(f"/proc/self/fd/{memory.fd}")
    memoryview(memory)[5] = 77
    assert os.pread(memory.fd, 1, 5) == b"\x4d"
    for size in (PAGE, 4 * PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(memory.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert not os.get_inheritable(memory.fd)


def test_allocate_takes_any_size_and_address() -> None:
    odd = Region.allocate(100, guest_addr=(1 << 64) - 100, user_addr=7)
    assert len(memoryview(odd)) == 100
    assert odd.user_addr == 7


@pytest.mark.parametrize(
    ("size", "guest_addr", "user_addr"),
    [
        (0, 0, 0),
        (-1, 0, 0),
        (PAGE, -1, 0),
        (PAGE, (1 << 64) - PAGE + 1, 0),
        (PAGE, 0, (1 << 64) - 1),
        (1 << 63, 0, 0),
        (1 << 64, 0, 0),
        (1 << 100, 0, 0),
    ],
)
def test_allocate_refuses_what_does_not_fit_64_bits(size: int, guest_addr: int, user_addr: int) -> None:
    with pytest.raises(InvalidGuestMemory, match=r"size -?0x"):
        Region.allocate(size, guest_addr=guest_addr, user_addr=user_addr)


def test_a_region_comes_from_its_constructors_only() -> None:
    with pytest.raises(TypeError, match=r"Region\.allocate"):
        Region()
    empty = Region.__new__(Region)
    assert (empty.size, empty.fd, len(memoryview(empty))) == (0, -1, 0)
    with pytest.raises(InvalidGuestMemory):
        GuestMemory([empty])


# ---------------------------------------------------------------------- Region.from_fd


def test_a_file_is_mapped_and_its_fd_not_kept(file: int) -> None:
    other = os.dup(file)
    memory = Region.from_fd(other, 2 * PAGE, guest_addr=1, user_addr=2, mmap_offset=PAGE)
    os.close(other)
    assert (memory.fd, memory.size, memory.mmap_offset) == (-1, 2 * PAGE, PAGE)
    assert bytes(memory) == b"\x01" * PAGE + b"\x02" * PAGE
    memoryview(memory)[0] = 99
    assert os.pread(file, 1, PAGE) == b"c"
    assert not memory.broken


@pytest.mark.parametrize("offset", [1, 16, PAGE - 1, PAGE + 8, 3 * PAGE])
def test_an_offset_needs_no_alignment(file: int, offset: int) -> None:
    memory = Region.from_fd(file, 4 * PAGE - offset, guest_addr=0, user_addr=0, mmap_offset=offset)
    assert bytes(memory) == os.pread(file, 4 * PAGE, offset)


@pytest.mark.parametrize(
    ("size", "offset"),
    [
        (4 * PAGE + 1, 0),
        (1, 4 * PAGE),
        (2 * PAGE, 3 * PAGE),
        (PAGE, 1 << 63),
        (PAGE, (1 << 64) - PAGE),
        ((1 << 64) - 1, 0),
        ((1 << 64) - PAGE, PAGE),  # the sum wraps
        (0, 0),
        (PAGE, -PAGE),
    ],
)
def test_a_range_that_is_not_in_the_file_is_refused(file: int, size: int, offset: int) -> None:
    with pytest.raises(InvalidGuestMemory, match=r"mmap offset|size"):
        Region.from_fd(file, size, guest_addr=0, user_addr=0, mmap_offset=offset)


def wrong_fds() -> Iterator[tuple[str, int]]:
    yield "directory", os.open("/", os.O_RDONLY)
    yield "/dev/zero", os.open("/dev/zero", os.O_RDWR)
    yield "eventfd", os.eventfd(0)
    near, far = socket.socketpair()
    far.close()
    yield "socket", near.detach()
    reader, writer = os.pipe()
    os.close(writer)
    yield "pipe", reader
    yield "/proc", os.open("/proc/self/maps", os.O_RDONLY)


def test_only_files_are_memory() -> None:
    for what, fd in wrong_fds():
        try:
            # A file of /proc is regular, but empty.
            with pytest.raises(InvalidGuestMemory if what == "/proc" else IncorrectFds):
                Region.from_fd(fd, PAGE, guest_addr=0, user_addr=0)
        finally:
            os.close(fd)
    for fd in (100000, (1 << 31) - 1):
        with pytest.raises(IncorrectFds, match="Bad file descriptor"):
            Region.from_fd(fd, PAGE, guest_addr=0, user_addr=0)


def test_a_file_that_is_open_read_only_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(bytes(PAGE))
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(InvalidGuestMemory, match=os.strerror(errno.EACCES)):
            Region.from_fd(fd, PAGE, guest_addr=0, user_addr=0)
    finally:
        os.close(fd)


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


TRUNCATED = """
    import mmap, os, sys
    from vhost.memory import GuestMemory, Region, install_sigbus_handler
    if {install}:
        install_sigbus_handler()
        install_sigbus_handler()  # again is fine
    fd = os.memfd_create("m", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4 * mmap.PAGESIZE)
    good = Region.allocate(mmap.PAGESIZE, guest_addr=1 << 40)
    shrunk = Region.from_fd(fd, 4 * mmap.PAGESIZE, guest_addr=0, user_addr=0)
    memory = GuestMemory([good, shrunk])
    memory.write(0, b"x" * 4 * mmap.PAGESIZE)
    assert not memory.broken
    os.ftruncate(fd, mmap.PAGESIZE)
    assert memory.read(0, 4 * mmap.PAGESIZE) == b"x" * mmap.PAGESIZE + bytes(3 * mmap.PAGESIZE)
    assert memory.broken and shrunk.broken and not good.broken
    assert GuestMemory([shrunk]).broken and not GuestMemory([good]).broken
    memory.write(2 * mmap.PAGESIZE, b"still memory")
    print("alive")
"""


def test_a_truncated_file_breaks_the_region_and_not_the_process() -> None:
    done = run(TRUNCATED.format(install=True))
    assert (done.stdout, done.stderr) == ("alive\n", "")


def test_without_the_handler_a_truncated_file_is_fatal() -> None:
    """So that the test above shows the handler at work."""
    done = run(TRUNCATED.format(install=False))
    assert done.returncode == -7
    assert not done.stdout


def test_sealed_huge_pages_that_do_not_exist_break_the_region_and_not_the_process() -> None:
    """A seal against shrinking is no promise of memory."""
    done = run(
        """
        import fcntl, os
        from vhost.memory import GuestMemory, Region, install_sigbus_handler
        install_sigbus_handler()
        try:
            fd = os.memfd_create("m", os.MFD_ALLOW_SEALING | os.MFD_HUGETLB)
        except OSError as error:
            print("none here:", error)
            raise SystemExit(77)
        huge = next(int(l.split()[1]) << 10 for l in open("/proc/meminfo") if l.startswith("Hugepagesize"))
        free = next(int(l.split()[1]) for l in open("/proc/meminfo") if l.startswith("HugePages_Total"))
        size = (free + 1) * huge  # one more than there are
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        memory = GuestMemory([Region.from_fd(fd, size, guest_addr=0, user_addr=0)])
        assert all(memory.read(at, 4) == bytes(4) for at in range(0, size, huge))
        assert memory.broken
        print("alive")
        """
    )
    if done.returncode == 77:
        pytest.skip(done.stdout)
    assert (done.stdout, done.stderr) == ("alive\n", "")


def test_a_bus_error_elsewhere_stays_fatal() -> None:
    done = run(
        """
        import mmap, os
        from vhost.memory import Region, install_sigbus_handler
        install_sigbus_handler()
        keep = Region.allocate(mmap.PAGESIZE)
        fd = os.memfd_create("m")
        os.ftruncate(fd, mmap.PAGESIZE)
        mine = mmap.mmap(fd, mmap.PAGESIZE)
        os.ftruncate(fd, 0)
        mine[0]
        print("not reached")
        """
    )
    assert done.returncode == -7
    assert not done.stdout


def test_the_constructor_does_not_install_a_handler() -> None:
    done = run(
        """
        import signal
        from vhost.memory import GuestMemory, Region
        GuestMemory([Region.allocate(4096)])
        assert signal.getsignal(signal.SIGBUS) == signal.SIG_DFL
        line = next(l for l in open("/proc/self/status") if l.startswith("SigCgt"))
        assert not int(line.split()[1], 16) & 1 << signal.SIGBUS - 1
        print("alive")
        """
    )
    assert (done.stdout, done.stderr) == ("alive\n", "")


# ---------------------------------------------------------------------- tables


def test_a_table_is_an_immutable_sequence() -> None:
    a, b = region(0), region(0x10000)
    memory = GuestMemory([b, a])
    assert isinstance(memory, Sequence)
    assert list(memory) == [b, a]
    assert memory.regions == (b, a) == memory[:]
    assert (memory[0], memory[-1], len(memory)) == (b, a, 2)
    assert a in memory
    assert region(0x20000) not in memory
    assert (memory.index(a), memory.count(a)) == (1, 1)
    assert list(reversed(memory)) == [a, b]
    with pytest.raises(AttributeError):
        memory.regions = ()  # type: ignore[misc]
    with pytest.raises(TypeError):
        GuestMemory([a, "no region"])  # type: ignore[list-item]


def test_add_and_remove_make_new_tables() -> None:
    a, b = region(0, user_addr=0x100000), region(0x10000, user_addr=0x200000)
    one = GuestMemory([a])
    two = one.add(b)
    assert (len(one), len(two)) == (1, 2)
    back = two.remove(guest_addr=0, user_addr=0x100000, size=PAGE)
    assert back.regions == (b,)
    assert len(two) == 2
    for changed in (
        {"guest_addr": 1, "user_addr": 0x100000, "size": PAGE},
        {"guest_addr": 0, "user_addr": 0x100001, "size": PAGE},
        {"guest_addr": 0, "user_addr": 0x100000, "size": PAGE + 1},
    ):
        with pytest.raises(InvalidGuestMemory, match="no region"):
            two.remove(**changed)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    ("guest_addr", "user_addr", "field"),
    [
        (0x1000, 0x900000, "guest_addr"),
        (0x1000 + PAGE - 1, 0x900000, "guest_addr"),
        (0x1000 - PAGE + 1, 0x900000, "guest_addr"),
        (0x900000, 0x100000, "user_addr"),
        (0x900000, 0x100000 + PAGE - 1, "user_addr"),
        (0x900000, 0x100000 - PAGE + 1, "user_addr"),
    ],
)
def test_overlap_is_refused_in_both_kinds_of_address(
    guest_addr: int, user_addr: int, field: str, first: int
) -> None:
    pair = [region(0x1000, user_addr=0x100000), region(guest_addr, user_addr=user_addr)]
    if first:
        pair.reverse()
    unrelated = region(0x10_0000_0000, user_addr=0x10_0000_0000)
    with pytest.raises(InvalidGuestMemory, match=rf"region \d: {field} 0x.* overlaps region \d: {field} 0x"):
        GuestMemory([unrelated, *pair])


def test_the_same_region_twice_is_refused() -> None:
    a = region(0)
    with pytest.raises(InvalidGuestMemory, match=r"region 1: guest_addr 0x0.*overlaps region 0"):
        GuestMemory([a, a])
    with pytest.raises(InvalidGuestMemory, match="overlaps"):
        GuestMemory([a]).add(a)


def test_neighbours_and_the_last_page_are_fine() -> None:
    top = (1 << 64) - PAGE
    memory = GuestMemory([region(top, user_addr=0), region(top - PAGE, user_addr=PAGE)])
    memory.write(top - 2, b"abcd")
    assert memory.read(top - 2, 4) == b"abcd"
    memory.write((1 << 64) - 1, b"z")
    for size in (2, PAGE + 1, (1 << 64) - 1):
        with pytest.raises(InvalidGuestMemory):
            memory.read((1 << 64) - 1, size)


def test_the_largest_table_and_one_more() -> None:
    rows = [region(i * 2 * PAGE, user_addr=i * 2 * PAGE) for i in range(MAX_REGIONS + 1)]
    random.Random(1).shuffle(rows)
    memory = GuestMemory(rows[:-1])
    assert MAX_REGIONS == len(memory) == 509
    for row in rows[:-1]:
        memory.write(row.guest_addr, row.guest_addr.to_bytes(8, "little"))
    for row in rows[:-1]:
        assert memory.read(row.guest_addr, 8) == row.guest_addr.to_bytes(8, "little") == bytes(row)[:8]
        assert memory.user_to_guest(row.user_addr + 5) == row.guest_addr + 5
    with pytest.raises(InvalidGuestMemory, match="510 regions: at most 509"):
        GuestMemory(rows)
    with pytest.raises(InvalidGuestMemory, match="510 regions"):
        memory.add(rows[-1])


def test_an_empty_table_holds_nothing() -> None:
    memory = GuestMemory()
    assert len(memory) == 0
    assert not memory.broken
    assert memory.read(5, 0) == b""
    for call in (memory.user_to_guest, memory.guest_to_user):
        for addr in (0, 1, (1 << 64) - 1):
            with pytest.raises(InvalidGuestMemory, match="in none of 0 regions"):
                call(addr)
    with pytest.raises(InvalidGuestMemory):
        memory.read(0, 1)


def test_both_translations() -> None:
    memory = GuestMemory([region(0x4000, user_addr=0x7000_0000), region(0x9000, user_addr=0x1000)])
    for guest, user in [(0x4000, 0x7000_0000), (0x4FFF, 0x7000_0FFF), (0x9001, 0x1001)]:
        assert memory.guest_to_user(guest) == user
        assert memory.user_to_guest(user) == guest
    for addr in (0x3FFF, 0x5000, 0x8FFF, 0xA000):
        with pytest.raises(InvalidGuestMemory, match=f"{addr:#x}"):
            memory.guest_to_user(addr)
    for addr in (0xFFF, 0x2000, 0x6FFF_FFFF, 0x7000_1000):
        with pytest.raises(InvalidGuestMemory, match=f"user address {addr:#x}"):
            memory.user_to_guest(addr)


def test_reads_and_writes_cross_regions_or_do_nothing() -> None:
    memory = GuestMemory([region(0), region(PAGE), region(3 * PAGE)])
    data = bytes(range(256)) * (2 * PAGE // 256)
    memory.write(0, data)
    assert memory.read(0, 2 * PAGE) == data
    assert memory.read(PAGE - 1, 2) == data[PAGE - 1 : PAGE + 1]
    with pytest.raises(InvalidGuestMemory, match=f"{2 * PAGE:#x} is in none of 3 regions"):
        memory.write(PAGE, b"?" * (PAGE + 1))
    assert memory.read(0, 2 * PAGE) == data
    memory.write(0, memoryview(b"abcdef")[::1])
    assert memory.read(0, 6) == b"abcdef"
    with pytest.raises(InvalidGuestMemory):
        memory.read(0, 1 << 63)  # refused before anything is allocated for it
    for call in (lambda: memory.read(-1, 1), lambda: memory.read(0, -1), lambda: memory.read(1 << 64, 1)):
        with pytest.raises(OverflowError):
            call()


def test_views_are_the_memory() -> None:
    memory = GuestMemory([region(0), region(PAGE), region(3 * PAGE)])
    view = memory.view(10, 20)
    assert (view.format, view.readonly, view.nbytes) == ("B", False, 20)
    view[:] = b"v" * 20
    assert memory.read(9, 22) == b"\0" + b"v" * 20 + b"\0"
    first, second = memory.views(PAGE - 3, 5)
    assert (len(first), len(second)) == (3, 2)
    second[1] = 200
    assert memory.read(PAGE + 1, 1) == b"\xc8"
    assert memory.views(0, 0) == []
    with pytest.raises(InvalidGuestMemory, match="in 2 pieces"):
        memory.view(PAGE - 3, 5)
    with pytest.raises(InvalidGuestMemory, match="is in none of 3 regions"):
        memory.view(2 * PAGE - 1, 2)


# ---------------------------------------------------------------------- lifetimes


def test_the_mapping_lives_as_long_as_anything_that_shows_it(file: int) -> None:
    before = fds.shared_maps()
    memory = GuestMemory([Region.from_fd(file, PAGE, guest_addr=0, user_addr=0)])
    assert fds.shared_maps() != before
    view = memory.view(0, 16)
    inner = view[4:8]
    del memory, view
    gc.collect()
    assert fds.shared_maps() != before
    inner[:] = b"last"
    assert os.pread(file, 8, 0) == bytes(4) + b"last"
    inner.release()
    del inner
    gc.collect()
    assert fds.shared_maps() == before


def test_tables_share_regions_and_the_last_one_unmaps() -> None:
    before = fds.holdings()
    memory = GuestMemory([region(0), region(PAGE)])
    tables = [memory]
    for i in range(50):
        memory = memory.add(region((2 + i) * PAGE)).remove(
            guest_addr=(i) * PAGE, user_addr=memory.guest_to_user(i * PAGE), size=PAGE
        )
        tables.append(memory)
    assert len(memory) == 2
    assert fds.holdings().fds.keys() - before.fds.keys()
    del tables, memory
    assert str(fds.holdings() - before) == ""


def test_a_refused_region_leaves_nothing_behind(file: int) -> None:
    before = fds.holdings()
    for _ in range(20):
        with pytest.raises(InvalidGuestMemory):
            Region.from_fd(file, 5 * PAGE, guest_addr=0, user_addr=0)
        with pytest.raises(InvalidGuestMemory):
            Region.allocate(PAGE, guest_addr=0, user_addr=1 << 64)
        with pytest.raises(InvalidGuestMemory):
            GuestMemory([region(0), region(1)])
    assert str(fds.holdings() - before) == ""
