# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Post-copy: memory that comes page by page, phases in the wrong order, front-ends that never bring a page.

Back-ends that really wait for pages are processes of their own: one that waits with the GIL would keep the
test from bringing them.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vhost
from peers.support import Serve, make_disk
from rig import BASE, USER, Rig, eventfds
from user import hostile as h
from user.hostile import RawFrontend
from user.test_frontend import RawBackend, backend
from vhost.errors import InactiveFeature, IncorrectFds, InvalidMessage, ProtocolError
from vhost.features import ProtocolF, VirtioF
from vhost.memory import GuestMemory, Region
from vhost.user import frontend_postcopy
from vhost.user._userfault import PageFaults
from vhost.user.frontend import WANTED
from vhost.user.frontend_postcopy import PageServer

POSTCOPY_ADVISE, POSTCOPY_LISTEN, POSTCOPY_END = 28, 29, 30
PAGE = 4096
SIZE = 1 << 20
REQUESTS = 8
HEADERS, STATUSES, DATA = BASE + 0x10000, BASE + 0x20000, BASE + 0x40000
BLK_T_IN = 0


def why_not() -> str:
    try:
        PageFaults().close()
    except OSError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = make_disk(tmp_path / "disk.raw", SIZE)
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def serve(disk: Path, tmp_path: Path) -> Iterator[Serve]:
    with Serve("blk", tmp_path / "s", "--blk-file", str(disk)) as serve:
        yield serve


def guest(packed: bool) -> tuple[Rig, bytes]:
    """A driver that has asked for some sectors, and its memory, in which nothing is done yet."""
    rig = Rig(32, packed=packed, sizes=(SIZE,))
    driver = rig.model_driver()
    for i in range(REQUESTS):
        header = HEADERS + i * 16
        rig.memory.write(header, struct.pack("<IIQ", BLK_T_IN, 0, 8 * i))
        rig.memory.write(STATUSES + i, b"\xff")
        driver.add([(header, 16)], [(DATA + i * 2 * PAGE, PAGE), (STATUSES + i, 1)])
    return rig, bytes(rig.memory[0])


class Bringer(threading.Thread):
    """Brings each page that somebody waits for."""

    def __init__(self, pages: PageServer, image: bytes) -> None:
        super().__init__()
        self.pages = pages
        self.image = image
        self.asked: list[int] = []
        self.stop = os.eventfd(0)

    def run(self) -> None:
        with select.epoll() as both:
            both.register(self.pages.fileno(), select.EPOLLIN)
            both.register(self.stop, select.EPOLLIN)
            while all(fd != self.stop for fd, _ in both.poll()):
                for region, offset in self.pages.faults():
                    self.asked.append(offset)
                    self.pages.place(region, offset, self.image[offset : offset + PAGE])

    def finish(self) -> None:
        os.eventfd_write(self.stop, 1)
        self.join(20)
        os.close(self.stop)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_disk_whose_memory_comes_page_by_page(packed: bool, serve: Serve, disk: Path) -> None:
    source, image = guest(packed)
    features = int(WANTED & ~ProtocolF.CONFIGURE_MEM_SLOTS)
    region = Region.allocate(SIZE, guest_addr=BASE, user_addr=USER)
    with (
        vhost.Frontend.connect(serve.path, protocol_features=features) as frontend,
        eventfds(2) as (kick, call),
    ):
        assert frontend.protocol_features & ProtocolF.PAGEFAULT
        frontend.set_features(int(VirtioF.VERSION_1) | (int(VirtioF.RING_PACKED) if packed else 0))
        pages = frontend.postcopy_advise()
        frontend.postcopy_listen()
        bringer = Bringer(pages, image)
        bringer.start()
        try:
            frontend.set_mem_table(GuestMemory([region]))
            frontend.set_vring_num(0, source.num)
            frontend.set_vring_base(0, source.start(0)[1])
            areas = source.areas
            frontend.set_vring_addr(0, areas.desc, areas.avail, areas.used)
            frontend.set_vring_call(0, call)
            frontend.set_vring_kick(0, kick)
            frontend.set_vring_enable(0, True)
            os.eventfd_write(kick, 1)
            deadline = time.monotonic() + 30
            done = b""
            while done != bytes(REQUESTS):
                assert select.select([call], [], [], deadline - time.monotonic())[0], bringer.asked
                os.eventfd_read(call)
                # That page was placed, for the device has written to it.
                done = bytes(memoryview(region)[STATUSES - BASE : STATUSES - BASE + REQUESTS])
        finally:
            bringer.finish()
        assert set(bringer.asked) >= {address // PAGE * PAGE - BASE for address in (HEADERS, STATUSES, DATA)}
        assert len(bringer.asked) < SIZE // PAGE // 2, "who asks for nothing gets nothing"
        placed = [
            pages.place(region, offset, image[offset : offset + PAGE]) for offset in range(0, SIZE, PAGE)
        ]
        assert placed.count(False) == len(set(bringer.asked))
        frontend.get_vring_base(0)
        frontend.postcopy_end()
        content = disk.read_bytes()
        for i in range(REQUESTS):
            assert source_page(region, DATA - BASE + i * 2 * PAGE) == content[i * PAGE : (i + 1) * PAGE]
        untouched = DATA - BASE + PAGE
        assert source_page(region, untouched) == image[untouched : untouched + PAGE]
        # And as usual from here on.
        frontend.set_mem_table(GuestMemory([Region.allocate(SIZE, guest_addr=BASE, user_addr=USER)]))


def source_page(region: Region, offset: int) -> bytes:
    return bytes(memoryview(region)[offset : offset + PAGE])


# -- by hand -------------------------------------------------------------------------------------------


def with_fd(raw: RawFrontend, number: int) -> int:
    raw.send(number)
    data, ancillary, _, _ = raw.sock.recvmsg(12, 64)
    assert h.HEADER.unpack(data) == (number, h.VERSION | h.REPLY, 0)
    (fd,) = array.array("i", ancillary[0][2])
    return int(fd)


@contextlib.contextmanager
def raw_on(serve: Serve, *, listen: bool = False) -> Iterator[tuple[RawFrontend, int]]:
    """Advised; -1 as the userfaultfd if not."""
    with contextlib.closing(RawFrontend(serve.path)) as raw:
        raw.negotiate()
        if not listen:
            yield raw, -1
            return
        fault = with_fd(raw, POSTCOPY_ADVISE)
        try:
            assert raw.status(POSTCOPY_LISTEN) == 0
            yield raw, fault
        finally:
            os.close(fault)


TABLE = (h.GUEST, h.SIZE, h.USER, 0)


def announce(raw: RawFrontend, fd: int = -1) -> int:
    """SET_MEM_TABLE: where the back-end has the memory."""
    raw.send(h.SET_MEM_TABLE, h.table(TABLE), [raw.memfd if fd < 0 else fd])
    answer = raw.reply()
    assert answer.number == h.SET_MEM_TABLE
    count, _, guest, size, user, offset = struct.unpack("=IIQQQQ", answer.payload)
    assert (count, guest, size, offset) == (1, h.GUEST, h.SIZE, 0)
    return int(user)


def ring(raw: RawFrontend) -> None:
    """Everything but the answers: the one who would give them may wait for a page."""
    raw.send(h.SET_VRING_NUM, h.state(0, h.NUM))
    raw.send(h.SET_VRING_BASE, h.state(0, 0))
    raw.send(h.SET_VRING_ADDR, h.address(0))
    raw.send(h.SET_VRING_CALL, h.u64(0), [raw.call])
    raw.send(h.SET_VRING_KICK, h.u64(0), [raw.kick])
    raw.send(h.SET_VRING_ENABLE, h.state(0, 1))
    os.eventfd_write(raw.kick, 1)


def test_phases(serve: Serve) -> None:
    with raw_on(serve) as (raw, _):
        assert raw.status(POSTCOPY_LISTEN) == 1, "not advised"
        assert raw.ask(POSTCOPY_END).u64 == 1
        assert raw.share_memory() == 0
        os.close(with_fd(raw, POSTCOPY_ADVISE))
        assert raw.status(POSTCOPY_LISTEN) == 1, "our addresses are not known"
        assert raw.ask(POSTCOPY_END).u64 == 0
        assert raw.status(h.SET_FEATURES, h.u64(h.VERSION_1 | h.PROTOCOL_FEATURES)) == 0
    with raw_on(serve, listen=True) as (raw, _):
        assert raw.status(POSTCOPY_LISTEN) == 1, "twice"
        assert raw.ask(POSTCOPY_ADVISE).payload == b"", "and without a descriptor"
        announce(raw)
        raw.send(h.SET_MEM_TABLE, h.u64(0))
        assert raw.status(h.SET_VRING_NUM, h.state(0, h.NUM)) == 0
        assert raw.status(h.SET_VRING_ADDR, h.address(0)) == 0
        assert raw.ask(POSTCOPY_END).u64 == 0
        assert raw.ask(POSTCOPY_END).u64 == 1
        assert raw.share_memory() == 0, "with a status, as before"
        # Another time.
        os.close(with_fd(raw, POSTCOPY_ADVISE))
        os.close(with_fd(raw, POSTCOPY_ADVISE))


def test_new_memory_is_used_when_the_front_end_says_so(serve: Serve) -> None:
    with raw_on(serve, listen=True) as (raw, _):
        announce(raw)
        assert raw.status(h.SET_VRING_NUM, h.state(0, h.NUM)) == 0
        assert raw.status(h.SET_VRING_ADDR, h.address(0)) == 1, "it was not acknowledged"
        raw.send(h.SET_MEM_TABLE, h.u64(0))
        assert raw.status(h.SET_VRING_ADDR, h.address(0)) == 0
        announce(raw)
        assert raw.ask(POSTCOPY_END).u64 == 1, "nor was this"
    for ack in (h.u64(1), h.u64(1 << 63)):
        with raw_on(serve, listen=True) as (raw, _):
            announce(raw)
            raw.send(h.SET_MEM_TABLE, ack)
            assert raw.ended(), "it failed to make use of our addresses"


@pytest.mark.parametrize("number", [h.ADD_MEM_REG, h.REM_MEM_REG, 0])
def test_how_qemu_acknowledges_slots(number: int, serve: Serve) -> None:
    """With the request that it sent last, or none at all (vhost_user_add_remove_regions)."""
    with raw_on(serve, listen=True) as (raw, _):
        raw.send(h.ADD_MEM_REG, h.slot(*TABLE), [raw.memfd])
        answer = raw.reply()
        assert answer.number == h.ADD_MEM_REG
        _, guest, size, user, _ = struct.unpack("=QQQQQ", answer.payload)
        assert (guest, size) == (h.GUEST, h.SIZE)
        assert user != h.USER
        raw.send(number, h.u64(0))
        assert raw.status(h.SET_VRING_NUM, h.state(0, h.NUM)) == 0
        assert raw.status(h.SET_VRING_ADDR, h.address(0)) == 0
        assert raw.status(h.REM_MEM_REG, h.slot(*TABLE)) == 0
        raw.send(h.REM_MEM_REG, h.u64(0))
        assert raw.status(h.SET_VRING_ADDR, h.address(0)) == 1
        assert raw.ask(POSTCOPY_END).u64 == 0
        raw.send(number, h.u64(0))
        assert raw.ended(), "there is nothing to acknowledge any more"


def test_memory_that_cannot_come_later(serve: Serve) -> None:
    with raw_on(serve, listen=True) as (raw, _), open("/var/tmp/pyvhost-postcopy", "w+b") as file:
        os.unlink(file.name)
        file.truncate(h.SIZE)
        raw.send(h.SET_MEM_TABLE, h.table(TABLE), [file.fileno()])
        assert raw.ended()
    assert "only memory of tmpfs, memfd and hugetlbfs" in serve.errors()


def descriptors_of(serve: Serve) -> list[str]:
    return os.listdir(f"/proc/{serve.process.pid}/fd")


@pytest.mark.parametrize("device", ["blk", "rng"])
@pytest.mark.parametrize("end", ["closed", "ended"])
def test_a_page_that_never_comes(device: str, end: str, disk: Path, tmp_path: Path) -> None:
    """Whoever waits for it goes on when the front-end is gone, though its userfaultfd is still open here."""
    options = ("--blk-file", str(disk)) if device == "blk" else ()
    with Serve(device, tmp_path / "s", *options) as serve:
        before = set(descriptors_of(serve))
        for _ in range(3):
            with raw_on(serve, listen=True) as (raw, fault):
                ours = announce(raw)
                raw.send(h.SET_MEM_TABLE, h.u64(0))
                ring(raw)
                assert select.select([fault], [], [], 20)[0], "somebody waits"
                event, _, address = struct.unpack("=B7xQQ8x", os.read(fault, 32))
                assert event == 0x12
                assert ours <= address < ours + h.SIZE
                if end == "ended":
                    raw.send(POSTCOPY_END)
                raw.sock.close()
                with raw_on(serve) as (other, _):
                    assert other.ask(h.GET_FEATURES).u64
        # Its end is seen some time after ours.
        deadline = time.monotonic() + 20
        while set(descriptors_of(serve)) - before and time.monotonic() < deadline:
            os.sched_yield()
        assert not set(descriptors_of(serve)) - before


def test_it_ends_with_pages_missing(serve: Serve) -> None:
    with raw_on(serve, listen=True) as (raw, fault):
        region = Region.allocate(h.SIZE, guest_addr=h.GUEST, user_addr=h.USER)
        with contextlib.closing(PageServer(os.dup(fault))) as pages:
            pages.know(region, announce(raw, region.fd))
            raw.send(h.SET_MEM_TABLE, h.u64(0))
            ring(raw)
            assert select.select([fault], [], [], 20)[0]
            # The session's own thread may wait for pages, and answers when it has them.
            raw.send(POSTCOPY_END)
            brought = 0
            while raw.sock not in select.select([fault, raw.sock], [], [], 20)[0]:
                for missing in pages.faults():
                    brought += pages.place(missing.region, missing.offset, bytes(PAGE))
            assert 0 < brought < h.SIZE // PAGE
        answer = raw.reply()
        assert (answer.number, answer.u64) == (POSTCOPY_END, 0)
        assert raw.ask(h.GET_VRING_BASE, h.state(0, 0)).number == h.GET_VRING_BASE


def test_not_offered_where_a_lost_page_would_end_the_process(tmp_path: Path) -> None:
    """That is, in any program that does not ask for it: a library installs no signal handler
    (vhost.memory.install_sigbus_handler)."""
    script = """
import os, sys, threading, vhost
from vhost.features import ProtocolF
threading.Thread(target=vhost.serve, args=(vhost.devices.Rng(), sys.argv[1]), daemon=True).start()
with vhost.Frontend.connect(sys.argv[1], retry=20) as frontend:
    assert frontend.offered_protocol_features
    os._exit(bool(frontend.offered_protocol_features & ProtocolF.PAGEFAULT))
"""
    subprocess.run([sys.executable, "-c", script, tmp_path / "s"], check=True, timeout=60)


# -- the front-end on back-ends that misbehave ---------------------------------------------------------


def advised(
    fd: Callable[[], int], then: Callable[[RawBackend], None]
) -> contextlib.AbstractContextManager[socket.socket]:
    def script(raw: RawBackend) -> None:
        raw.handshake(h.PROTOCOL_FEATURES, int(ProtocolF.PAGEFAULT | ProtocolF.REPLY_ACK))
        assert raw.receive()[0] == POSTCOPY_ADVISE
        theirs = fd()
        message = h.HEADER.pack(POSTCOPY_ADVISE, h.VERSION | h.REPLY, 0)
        socket.send_fds(raw.sock, [message], [theirs] if theirs >= 0 else [])
        if theirs >= 0:
            os.close(theirs)
        then(raw)

    return backend(script)


def userfaultfd() -> int:
    faults = PageFaults()
    return os.dup(faults.fileno())


@pytest.mark.parametrize("fd", [lambda: -1, lambda: os.eventfd(0)], ids=["none", "eventfd"])
def test_no_userfaultfd(fd: Callable[[], int], no_leaks: None) -> None:
    with advised(fd, lambda raw: None) as sock, vhost.Frontend(sock) as frontend:
        with pytest.raises(ProtocolError, match="userfaultfd"):
            frontend.postcopy_advise()


@pytest.mark.parametrize(
    "rows, text",
    [
        ([(h.GUEST, SIZE, 0x1001, 0)], "answer for 1 regions, asked for 2"),
        ([(h.GUEST, SIZE, 0x1001, 0), (h.GUEST, SIZE, 0x1000, 0)], "asked for guest_addr"),
        ([(h.GUEST, SIZE // 2, 0x1000, 0), (h.GUEST + SIZE, SIZE, 0x1000, 0)], "asked for guest_addr"),
        ([(h.GUEST, SIZE, 0x1001, 0), (h.GUEST + SIZE, SIZE, 0x1000, 0)], "not in pages of 4096"),
    ],
)
def test_answers_that_do_not_fit(rows: list[tuple[int, int, int, int]], text: str, no_leaks: None) -> None:
    def then(raw: RawBackend) -> None:
        assert raw.receive()[0] == POSTCOPY_LISTEN
        raw.reply(POSTCOPY_LISTEN, h.u64(0))
        number, flags, _ = raw.receive()
        assert (number, flags) == (h.SET_MEM_TABLE, h.VERSION), "an answer is due anyway"
        raw.reply(h.SET_MEM_TABLE, h.table(*rows))

    regions = [
        Region.allocate(SIZE, guest_addr=h.GUEST + i * SIZE, user_addr=h.USER + i * SIZE) for i in (0, 1)
    ]
    with advised(userfaultfd, then) as sock, vhost.Frontend(sock) as frontend:
        frontend.postcopy_advise()
        frontend.postcopy_listen()
        with pytest.raises((InvalidMessage, vhost.errors.InvalidGuestMemory), match=text):
            frontend.set_mem_table(GuestMemory(regions))
    del regions


def test_a_userfaultfd_that_blocks(no_leaks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The back-end may make its open file block at any time, and has the last word here; who looks for faults
    does not wait."""
    make_blocking = os.set_blocking
    monkeypatch.setattr(os, "set_blocking", lambda fd, _: make_blocking(fd, True))
    theirs = PageFaults()
    found: list[object] = []
    with contextlib.closing(theirs), contextlib.closing(PageServer(os.dup(theirs.fileno()))) as pages:
        make_blocking(theirs.fileno(), True)
        looking = threading.Thread(target=lambda: found.append(pages.faults()), daemon=True)
        looking.start()
        looking.join(20)
        assert found == [[]]


def test_no_post_copy_with_slots(no_leaks: None) -> None:
    """What the back-end would do is unspecified, so it is not asked."""

    def script(raw: RawBackend) -> None:
        raw.handshake(h.PROTOCOL_FEATURES, int(ProtocolF.PAGEFAULT | ProtocolF.CONFIGURE_MEM_SLOTS))
        with pytest.raises(EOFError):
            raw.receive()

    with backend(script) as sock, vhost.Frontend(sock) as frontend:
        with pytest.raises(InactiveFeature, match="without CONFIGURE_MEM_SLOTS"):
            frontend.postcopy_advise()


def test_advice_that_fails_leaves_the_older_one(no_leaks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def then(raw: RawBackend) -> None:
        assert raw.receive()[0] == POSTCOPY_ADVISE
        with contextlib.closing(PageFaults()) as theirs:
            message = h.HEADER.pack(POSTCOPY_ADVISE, h.VERSION | h.REPLY, 0)
            socket.send_fds(raw.sock, [message], [theirs.fileno()])

    with advised(userfaultfd, then) as sock, vhost.Frontend(sock) as frontend:
        pages = frontend.postcopy_advise()
        monkeypatch.setattr(frontend_postcopy, "PageFaults", no_userfaultfd)
        with pytest.raises(OSError, match="none left"):
            frontend.postcopy_advise()
        assert frontend.pages is pages
        assert pages.faults() == []


def no_userfaultfd() -> PageFaults:
    raise OSError(errno.EMFILE, "none left")


FORKER = """
import ctypes, mmap, os, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
UFFD_API, UFFDIO_API, UFFDIO_REGISTER, EVENT_FORK, MISSING = 0xAA, 0xC018AA3F, 0xC020AA00, 1 << 1, 1
fd = libc.syscall({number}, os.O_CLOEXEC | os.O_NONBLOCK)
api = ctypes.create_string_buffer(struct.pack("=QQQ", UFFD_API, EVENT_FORK, 0))
memory = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
area = ctypes.create_string_buffer(struct.pack("=QQQQ", start, 4096, MISSING, 0))
ok = fd >= 0 and not libc.ioctl(fd, UFFDIO_API, api) and not libc.ioctl(fd, UFFDIO_REGISTER, area)
socket.send_fds(socket.socket(fileno=int(sys.argv[1])), [b"y" if ok else b"n"], [max(fd, 0)])
if ok and not os.fork():
    os._exit(0)
"""
"""A process that has its forks told by its userfaultfd."""
SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}


def test_the_forks_of_a_back_end_are_not_kept(no_leaks: None) -> None:
    """Who reads of a fork gets a descriptor for it."""
    number = SYS_USERFAULTFD.get(os.uname().machine)
    if number is None:
        pytest.skip("userfaultfd has another number here")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        program = [sys.executable, "-c", FORKER.format(number=number), str(theirs.fileno())]
        with subprocess.Popen(program, pass_fds=[theirs.fileno()]) as process:
            word, fds, _, _ = socket.recv_fds(ours, 1, 1)
            with contextlib.closing(PageServer(fds[0])) as pages:
                if word == b"n":
                    pytest.skip("the kernel tells us of no forks")
                with select.epoll() as poll:
                    poll.register(pages.fileno(), select.EPOLLIN)
                    assert poll.poll(20)
                assert pages.faults() == []
            assert process.wait(20) == 0


def test_a_userfaultfd_that_was_not_set_up(no_leaks: None) -> None:
    number = SYS_USERFAULTFD.get(os.uname().machine)
    if number is None:
        pytest.skip("userfaultfd has another number here")
    raw = ctypes.CDLL(None).syscall
    sock = advised(lambda: raw(number, os.O_CLOEXEC), lambda _: None)
    with sock as end, vhost.Frontend(end) as frontend:
        with pytest.raises(IncorrectFds, match="userfaultfd"):
            frontend.postcopy_advise()
        assert frontend.pages is None


def test_pages_that_are_none(no_leaks: None) -> None:
    region = Region.allocate(SIZE, guest_addr=h.GUEST, user_addr=h.USER)
    with advised(userfaultfd, lambda raw: None) as sock, vhost.Frontend(sock) as frontend:
        pages = frontend.postcopy_advise()
        for offset, size in ((1, PAGE), (0, PAGE - 1), (-PAGE, PAGE), (SIZE, PAGE), (SIZE - PAGE, 2 * PAGE)):
            with pytest.raises(ValueError, match="not in it, or not in pages"):
                pages.place(region, offset, bytes(size))
        for base in (1 << 63, (1 << 64) - PAGE):  # where no process has memory
            text = f"at {base:#x} of the back-end: UFFDIO_WAKE"
            with pytest.raises(vhost.errors.InvalidGuestMemory, match=text):
                pages.know(region, base)
        assert pages.place(region, 0, b"\1" * PAGE), "before it is shared"
        assert not pages.place(region, 0, b"\2" * PAGE), "what is there stays"
        assert bytes(memoryview(region)[:1]) == b"\1"
    del region
