# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The dirty log on the wire: a front-end by hand, logging that begins, moves and ends under a ring that
runs, and logs that lie."""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import vhost
from user import hostile as h
from user.hostile import RawFrontend
from user.test_lifecycle import DATA, USED, Guest, Hoarder, guest_on
from vhost.features import ProtocolF, VhostF

SET_LOG_BASE, SET_LOG_FD = 6, 7
LOG_ALL, VRING_LOG = int(VhostF.LOG_ALL), 1
PAGE = 4096
END = h.GUEST + h.SIZE
LOG_SIZE = END // PAGE // 8
"""As small as it may be."""
FEATURES = h.VERSION_1 | h.PROTOCOL_FEATURES
ELSEWHERE = 0x0123_4000
"""Where the used ring is logged, below END, but in no memory."""


class LogFile:
    """A front-end's log, in a file of its own from ``offset`` on."""

    def __init__(self, size: int = LOG_SIZE, offset: int = 0) -> None:
        self.fd = os.memfd_create("log")
        os.ftruncate(self.fd, offset + size + 64)
        self.size, self.offset = size, offset
        self.map = mmap.mmap(self.fd, offset + size + 64)

    @property
    def payload(self) -> bytes:
        return struct.pack("=QQ", self.size, self.offset)

    def take(self) -> set[int]:
        """Guest addresses of the pages that are marked, relative to the memory's begin where they lie in it;
        what lies around the log has to be as it was."""
        data = self.map[:]
        log = data[self.offset : self.offset + self.size]
        self.map[:] = bytes(len(data))
        assert not any(data[: self.offset])
        assert not any(data[self.offset + self.size :])
        pages = {
            (i * 8 + bit) * PAGE for i, byte in enumerate(log) if byte for bit in range(8) if byte >> bit & 1
        }
        return {page - h.GUEST if h.GUEST <= page < END else page for page in pages}

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)


def address(*, flags: int = 0, log: int = 0, index: int = 0) -> bytes:
    user = h.USER
    return struct.pack("=IIQQQQ", index, flags, user, user + USED, user + 0x1000, log)


def switch(raw: RawFrontend, on: bool) -> int:
    return raw.status(h.SET_FEATURES, h.u64(FEATURES | (LOG_ALL if on else 0)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@pytest.fixture
def logs() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def log_file(stack: contextlib.ExitStack, size: int = LOG_SIZE, offset: int = 0) -> LogFile:
    return stack.enter_context(contextlib.closing(LogFile(size, offset)))


def done(raw: RawFrontend, guest: Guest, page: int) -> None:
    """One chain of the device's, into this page of the data."""
    guest.offer(addr=h.GUEST + DATA + page * PAGE)
    guest.kick()
    guest.wait_used(guest.idx)
    raw.ask(h.GET_FEATURES)  # what it did after publishing is done, too


# -- what a migration does -----------------------------------------------------------------------------


def test_from_start_to_stop(path: Path, no_leaks: None, logs: contextlib.ExitStack) -> None:
    """On a ring that runs all the time; its used area is marked where SET_VRING_ADDR says that it is."""
    log = log_file(logs)
    with h.served(vhost.devices.Rng(), path), guest_on(path) as (raw, guest):
        assert raw.ask(h.GET_FEATURES).u64 & LOG_ALL
        assert raw.ask(h.GET_PROTOCOL_FEATURES).u64 & ProtocolF.LOG_SHMFD
        raw.start()
        done(raw, guest, 0)
        assert raw.ask(SET_LOG_BASE, log.payload, [log.fd]).u64 == 0
        done(raw, guest, 1)
        assert log.take() == set(), "there is a log, but no LOG_ALL yet"
        assert switch(raw, True) == 0
        done(raw, guest, 2)
        assert log.take() == {DATA + 2 * PAGE}, "data alone"
        assert raw.status(h.SET_VRING_ADDR, address(flags=VRING_LOG, log=ELSEWHERE)) == 0
        log.take()
        done(raw, guest, 3)
        assert log.take() == {DATA + 3 * PAGE, ELSEWHERE}
        assert raw.status(h.SET_VRING_ADDR, address(flags=VRING_LOG, log=h.GUEST + USED)) == 0
        log.take()
        done(raw, guest, 4)
        assert log.take() == {DATA + 4 * PAGE, USED}
        assert raw.status(h.SET_VRING_ADDR, address()) == 0
        done(raw, guest, 5)
        assert log.take() == {DATA + 5 * PAGE}
        assert switch(raw, False) == 0
        done(raw, guest, 6)
        assert log.take() == set()
        assert switch(raw, True) == 0, "again, with the same log"
        done(raw, guest, 7)
        assert log.take() == {DATA + 7 * PAGE}


def test_only_logging_changes_on_the_fly(path: Path, no_leaks: None) -> None:
    with h.served(vhost.devices.Rng(), path), guest_on(path) as (raw, guest):
        raw.start()
        done(raw, guest, 1)
        event_idx = 1 << 29
        assert raw.status(h.SET_FEATURES, h.u64(FEATURES | event_idx)) != 0
        assert raw.status(h.SET_FEATURES, h.u64(FEATURES | event_idx | LOG_ALL)) != 0
        assert switch(raw, True) == 0
        moved = struct.pack("=IIQQQQ", 0, VRING_LOG, h.USER + 0x8000, h.USER + USED, h.USER + 0x1000, 0)
        assert raw.status(h.SET_VRING_ADDR, moved) != 0
        done(raw, guest, 0)


def test_popped_before_and_pushed_after(path: Path, no_leaks: None, logs: contextlib.ExitStack) -> None:
    log = log_file(logs)
    with contextlib.closing(Hoarder()) as device, h.served(device, path), guest_on(path) as (raw, guest):
        raw.start()
        for page in (1, 2):
            guest.offer(addr=h.GUEST + DATA + page * PAGE)
        guest.kick()
        device.wait_for(2)
        (queue, first), (_, second) = device.chains
        first.write(b"before")
        assert raw.ask(SET_LOG_BASE, log.payload, [log.fd])
        assert switch(raw, True) == 0
        assert log.take() == set()
        queue.push(first)
        assert log.take() == {DATA + PAGE}
        assert second.writable, "somebody may write there"
        queue.push(second, 0)
        assert log.take() == {DATA + 2 * PAGE}
        queue.mark_written(h.GUEST + DATA + 9 * PAGE - 1, 2)
        assert log.take() == {DATA + 8 * PAGE, DATA + 9 * PAGE}
        device.chains.clear()
        del queue, first, second


def test_the_log_moves(path: Path, no_leaks: None, logs: contextlib.ExitStack) -> None:
    """QEMU replaces it when memory grows, and copies what is in the old one after the answer."""
    old, new = log_file(logs), log_file(logs, size=LOG_SIZE + 3, offset=4097)
    with h.served(vhost.devices.Rng(), path), guest_on(path) as (raw, guest):
        raw.start()
        assert raw.ask(SET_LOG_BASE, old.payload, [old.fd])
        assert switch(raw, True) == 0
        done(raw, guest, 0)
        assert raw.ask(SET_LOG_BASE, new.payload, [new.fd])
        done(raw, guest, 1)
        assert old.take() == {DATA}
        assert new.take() == {DATA + PAGE}


def test_a_ring_that_starts_with_logging_on(path: Path, no_leaks: None, logs: contextlib.ExitStack) -> None:
    """A guest that reboots while it migrates: LOG_ALL comes first, the log last. What nobody noted down in
    between may be anything."""
    log = log_file(logs)
    with h.served(vhost.devices.Rng(), path), guest_on(path) as (raw, guest):
        raw.negotiate()
        assert switch(raw, True) == 0
        assert raw.share_memory() == 0
        raw.set_ring()
        assert raw.status(h.SET_VRING_ADDR, address(flags=VRING_LOG, log=h.GUEST + USED)) == 0
        assert raw.status(h.SET_VRING_KICK, h.u64(0), [raw.kick]) == 0
        assert raw.ask(SET_LOG_BASE, log.payload, [log.fd])
        assert log.take() == {USED}, "not enabled: all that was written is what the device wants of kicks"
        assert raw.status(h.SET_VRING_ENABLE, h.state(0, 1)) == 0
        log.take()
        done(raw, guest, 1)
        assert log.take() == {USED, DATA + PAGE}


def test_a_ring_that_ran_without_a_log(path: Path, no_leaks: None, logs: contextlib.ExitStack) -> None:
    log, other = log_file(logs), log_file(logs)
    with h.served(vhost.devices.Rng(), path), guest_on(path) as (raw, guest):
        raw.negotiate()
        assert switch(raw, True) == 0
        assert raw.share_memory() == 0
        raw.start_ring()
        done(raw, guest, 1)
        assert raw.ask(SET_LOG_BASE, log.payload, [log.fd])
        assert log.take() == set(range(0, h.SIZE, PAGE)), "all of it"
        assert raw.ask(SET_LOG_BASE, other.payload, [other.fd])
        assert other.take() == set()


def test_a_migration_that_never_got_its_log(path: Path, no_leaks: None, logs: contextlib.ExitStack) -> None:
    log = log_file(logs)
    with h.served(vhost.devices.Rng(), path), guest_on(path) as (raw, guest):
        raw.start()
        assert switch(raw, True) == 0
        done(raw, guest, 1)
        assert switch(raw, False) == 0
        assert raw.ask(SET_LOG_BASE, log.payload, [log.fd])
        assert switch(raw, True) == 0
        done(raw, guest, 2)
        assert log.take() == {DATA + 2 * PAGE}


def test_the_front_end_is_told(path: Path, no_leaks: None, logs: contextlib.ExitStack) -> None:
    log = log_file(logs)
    changed = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
    for fd in changed:
        logs.callback(os.close, fd)

    def told(which: int) -> bool:
        return bool(select.select([changed[which]], [], [], 0)[0])

    image = path.with_name("disk")
    image.write_bytes(bytes(PAGE))
    for device in (vhost.devices.Rng(), vhost.devices.Blk(image)):
        with h.served(device, path), guest_on(path) as (raw, guest):
            raw.start()
            assert raw.status(SET_LOG_FD, b"", [changed[0]]) == 0
            assert raw.ask(SET_LOG_BASE, log.payload, [log.fd])
            for fd in changed:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
            if isinstance(device, vhost.devices.Rng):
                done(raw, guest, 0)
                assert not told(0)
                assert switch(raw, True) == 0
                done(raw, guest, 1)
                assert told(0)
                assert not told(1)
                os.eventfd_read(changed[0])
                assert raw.status(SET_LOG_FD, b"", [changed[1]]) == 0
                done(raw, guest, 2)
            else:
                assert raw.status(SET_LOG_FD, b"", [changed[1]]) == 0
                assert switch(raw, True) == 0
                assert raw.status(h.SET_VRING_ADDR, address(flags=VRING_LOG, log=h.GUEST + USED)) == 0
            assert select.select([changed[1]], [], [], 10)[0]
            assert not told(0)
        if isinstance(device, vhost.devices.Blk):
            device.close()


class Lender(vhost.Device):
    """What comes on the first ring is given back when the second goes on."""

    device_id = vhost.DeviceId.RNG
    queues = ("taking", "giving")

    def __init__(self) -> None:
        self.chains: list[tuple[vhost.DeviceQueue, vhost.Chain]] = []
        self.taken = threading.Semaphore(0)

    def taking(self, queue: vhost.DeviceQueue) -> None:
        for chain in queue:
            self.chains.append((queue, chain))
            self.taken.release()

    def giving(self, _: vhost.DeviceQueue) -> None:
        for queue, chain in self.chains:
            queue.push(chain, 1)
        self.chains.clear()


def test_another_ring_goes_on_first(path: Path, no_leaks: None, logs: contextlib.ExitStack) -> None:
    """A ring that does not have the new descriptor yet is used when another one has it."""
    log = log_file(logs)
    kick, *changed = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3))
    for fd in (kick, *changed):
        logs.callback(os.close, fd)
    device = Lender()
    with h.served(device, path), guest_on(path) as (raw, guest):
        raw.start()
        raw.set_ring(1)
        assert raw.status(h.SET_VRING_KICK, h.u64(1), [kick]) == 0
        assert raw.status(h.SET_VRING_ENABLE, h.state(1, 1)) == 0
        assert raw.status(SET_LOG_FD, b"", [changed[0]]) == 0
        assert raw.ask(SET_LOG_BASE, log.payload, [log.fd])
        assert switch(raw, True) == 0
        guest.offer(addr=h.GUEST + DATA)
        guest.kick()
        assert device.taken.acquire(timeout=20)
        assert raw.status(SET_LOG_FD, b"", [changed[1]]) == 0
        guest.wait_used(guest.idx)
        assert DATA in log.take()


def test_sessions_that_end_while_they_log(path: Path, no_leaks: None, logs: contextlib.ExitStack) -> None:
    log = log_file(logs)
    changed = os.eventfd(0)
    logs.callback(os.close, changed)
    with h.served(vhost.devices.Rng(), path):
        for _ in range(3):
            with guest_on(path) as (raw, guest):
                raw.start()
                assert raw.ask(SET_LOG_BASE, log.payload, [log.fd])
                assert raw.status(SET_LOG_FD, b"", [changed]) == 0
                assert switch(raw, True) == 0
                done(raw, guest, 0)
                assert raw.status(h.RESET_DEVICE) == 0
                raw.start_ring()
                guest.map[:] = bytes(len(guest.map))


# -- old front-ends ------------------------------------------------------------------------------------


def test_without_log_shmfd_there_is_an_ack(path: Path, no_leaks: None, logs: contextlib.ExitStack) -> None:
    log = log_file(logs)
    with h.served(vhost.devices.Rng(), path), contextlib.closing(RawFrontend(path)) as raw:
        raw.ask(h.GET_FEATURES)
        protocol = raw.ask(h.GET_PROTOCOL_FEATURES).u64 & ~int(ProtocolF.LOG_SHMFD)
        raw.send(h.SET_PROTOCOL_FEATURES, h.u64(protocol))
        assert raw.status(SET_LOG_BASE, h.u64(0x7F00_0000_0000)) == 1, "an address of its own"
        assert raw.status(SET_LOG_BASE, log.payload) == 1, "a log that was not passed"
        assert raw.status(SET_LOG_BASE, log.payload, [log.fd]) == 0
        raw.send(SET_LOG_BASE, log.payload, [log.fd])
        assert raw.ask(h.GET_FEATURES), "no answer, where none was asked for"


def test_a_device_without_a_log_does_not_pretend(path: Path, no_leaks: None) -> None:
    without = int(ProtocolF.LOG_SHMFD)
    with vhost.Server(vhost.devices.Rng(), path, without=without) as server:
        raw = RawFrontend(path)
        with contextlib.closing(raw):
            server.step()
            raw.send(h.GET_FEATURES)
            server.step()
            assert not raw.reply().u64 & LOG_ALL


# -- logs that lie -------------------------------------------------------------------------------------

WRONG = {
    "size 0": (0, 0),
    "too small for the memory": (LOG_SIZE - 1, 0),
    "larger than its file": (LOG_SIZE * 2, 0),
    "huge": (1 << 62, 0),
    "all there is": ((1 << 64) - 1, 0),
    "beyond its file": (LOG_SIZE, LOG_SIZE * 2),
    "wraps": (LOG_SIZE, (1 << 64) - LOG_SIZE),
    "wraps, almost": (LOG_SIZE, (1 << 64) - LOG_SIZE - 1),
    "offset that no file has": (LOG_SIZE, 1 << 63),
}


@pytest.mark.parametrize("size, offset", WRONG.values(), ids=WRONG)
def test_wrong_sizes(path: Path, no_leaks: None, logs: contextlib.ExitStack, size: int, offset: int) -> None:
    """SET_LOG_BASE has a reply that cannot say no, so the session ends; the others go on."""
    log = log_file(logs)
    with h.served(vhost.devices.Rng, path), contextlib.closing(RawFrontend(path)) as other:
        other.negotiate()
        with guest_on(path) as (raw, _):
            raw.start()
            raw.send(SET_LOG_BASE, struct.pack("=QQ", size, offset), [log.fd])
            assert raw.ended()
        assert other.ask(h.GET_FEATURES)
    assert log.take() == set()


@pytest.mark.parametrize("kind", ["pipe", "eventfd", "folder", "none", "number"])
def test_what_is_no_log(path: Path, no_leaks: None, logs: contextlib.ExitStack, kind: str) -> None:
    def make() -> list[int]:
        if kind == "pipe":
            return list(os.pipe())
        return [os.eventfd(0) if kind == "eventfd" else os.open(path.parent, os.O_RDONLY)]

    fds = [] if kind == "none" else make()
    for fd in fds:
        logs.callback(os.close, fd)
    payload = h.u64(LOG_SIZE) if kind == "number" else struct.pack("=QQ", LOG_SIZE, 0)
    with h.served(vhost.devices.Rng, path), guest_on(path) as (raw, _):
        raw.start()
        raw.send(SET_LOG_BASE, payload, fds[:1])
        assert raw.ended()


def test_a_log_of_two_descriptors(path: Path, no_leaks: None, logs: contextlib.ExitStack) -> None:
    log = log_file(logs)
    with h.served(vhost.devices.Rng, path), guest_on(path) as (raw, _):
        raw.start()
        raw.send(SET_LOG_BASE, log.payload, [log.fd, log.fd])
        assert raw.ended()


def test_log_fd_that_is_no_eventfd(path: Path, no_leaks: None) -> None:
    with h.served(vhost.devices.Rng, path), guest_on(path) as (raw, _):
        raw.start()
        assert raw.status(SET_LOG_FD, b"", [raw.memfd]) == 1
        assert raw.status(SET_LOG_FD) == 1


def test_rings_beyond_the_log(path: Path, no_leaks: None, logs: contextlib.ExitStack) -> None:
    """The last byte of the used area has to be covered; wherever it is said to be, nothing else is hurt."""
    log = log_file(logs)
    used_size = 6 + 8 * h.NUM
    end = LOG_SIZE * 8 * PAGE
    with h.served(vhost.devices.Rng(), path), guest_on(path) as (raw, guest):
        raw.start()
        assert raw.ask(SET_LOG_BASE, log.payload, [log.fd])
        assert switch(raw, True) == 0
        for beyond in (end, end - used_size + 1, 1 << 63, (1 << 64) - 4, (1 << 64) - 1):
            assert raw.status(h.SET_VRING_ADDR, address(flags=VRING_LOG, log=beyond)) == 1
            done(raw, guest, 1)
            assert log.take() == {DATA + PAGE}, "as before"
        assert raw.status(h.SET_VRING_ADDR, address(flags=VRING_LOG, log=end - used_size)) == 0
        log.take()
        done(raw, guest, 2)
        assert log.take() == {DATA + 2 * PAGE, END - PAGE - h.GUEST}


def test_a_ring_that_starts_beyond_the_log(path: Path, no_leaks: None, logs: contextlib.ExitStack) -> None:
    log = log_file(logs)
    with h.served(vhost.devices.Rng(), path), guest_on(path) as (raw, guest):
        raw.negotiate()
        assert raw.share_memory() == 0
        assert raw.ask(SET_LOG_BASE, log.payload, [log.fd])
        assert switch(raw, True) == 0
        raw.set_ring()
        assert raw.status(h.SET_VRING_ADDR, address(flags=VRING_LOG, log=1 << 60)) == 0, "its size may change"
        assert raw.status(h.SET_VRING_KICK, h.u64(0), [raw.kick]) == 1
        assert raw.status(h.SET_VRING_ADDR, address()) == 0
        assert raw.status(h.SET_VRING_KICK, h.u64(0), [raw.kick]) == 0
        assert raw.status(h.SET_VRING_ENABLE, h.state(0, 1)) == 0
        done(raw, guest, 1)
        assert DATA + PAGE in log.take()


def test_memory_that_outgrows_the_log(path: Path, no_leaks: None, logs: contextlib.ExitStack) -> None:
    log, large = log_file(logs), log_file(logs, size=LOG_SIZE + h.SIZE // PAGE // 8)
    more = h.slot(END, h.SIZE, h.USER + h.SIZE, 0)
    with h.served(vhost.devices.Rng(), path), guest_on(path) as (raw, guest):
        raw.start()
        assert raw.ask(SET_LOG_BASE, log.payload, [log.fd])
        assert switch(raw, True) == 0
        assert raw.status(h.ADD_MEM_REG, more, [raw.memfd]) == 1
        assert raw.ask(SET_LOG_BASE, large.payload, [large.fd])
        assert raw.status(h.ADD_MEM_REG, more, [raw.memfd]) == 0
        large.take()
        guest.offer(addr=END + 0x8000)
        guest.kick()
        guest.wait_used(1)
        assert large.take() == {END + 0x8000}


def test_a_log_of_an_earlier_migration(path: Path, no_leaks: None, logs: contextlib.ExitStack) -> None:
    """It was large enough then. With more memory now, it is none until there is another one."""
    log, large = log_file(logs), log_file(logs, size=LOG_SIZE + h.SIZE // PAGE // 8)
    with h.served(vhost.devices.Rng(), path), guest_on(path) as (raw, guest):
        raw.start()
        assert raw.ask(SET_LOG_BASE, log.payload, [log.fd])
        more = h.slot(END, h.SIZE, h.USER + h.SIZE, 0)
        assert raw.status(h.ADD_MEM_REG, more, [raw.memfd]) == 0, "nobody logs"
        assert switch(raw, True) == 0
        done(raw, guest, 1)
        assert log.take() == set()
        assert raw.ask(SET_LOG_BASE, large.payload, [large.fd])
        assert DATA + PAGE in large.take()


TRUNCATE = """
import contextlib, os, sys
from pathlib import Path
import vhost
sys.path.insert(0, {tests!r})
from user import hostile as h
from vhost.memory import install_sigbus_handler
from user.test_log import SET_LOG_BASE, LogFile, address, guest_on, switch
install_sigbus_handler()
path = Path({path!r})
device = vhost.devices.Rng() if {kind!r} == "rng" else vhost.devices.Blk({image!r}, share=True)
with h.served(device, path), contextlib.closing(LogFile()) as log:
    with guest_on(path) as (other, _):
        other.negotiate()
        with guest_on(path) as (raw, guest):
            raw.start()
            assert raw.ask(SET_LOG_BASE, log.payload, [log.fd]).u64 == 0
            assert switch(raw, True) == 0
            os.ftruncate(log.fd, 0)
            if {kind!r} == "rng":
                guest.offer()
                guest.kick()
            else:
                raw.send(h.SET_VRING_ADDR, address(flags=1, log=h.GUEST + 0x2000))
            assert raw.ended()
        assert other.ask(h.GET_FEATURES).u64
print("alive")
"""


@pytest.mark.parametrize("kind", ["rng", "blk"])
def test_a_log_that_is_truncated(tmp_path: Path, kind: str) -> None:
    """In a process of its own, for the handler is the process's."""
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    tests = str(Path(__file__).parent.parent)
    code = TRUNCATE.format(tests=tests, path=str(tmp_path / "s"), kind=kind, image=str(image))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "alive\n", done.stderr
    assert "truncated the file behind the dirty log" in done.stderr
