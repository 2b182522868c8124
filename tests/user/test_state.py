# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Device state: saved, loaded, and every way in which the other side can spoil it."""

from __future__ import annotations

import array
import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

import vhost
from user import hostile as h
from user.hostile import RawFrontend
from user.test_frontend import RawBackend, backend
from vhost.errors import ProtocolError, ReplyTimeout, RequestFailed, VhostError
from vhost.features import ProtocolF

SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE = 42, 43
SAVE, LOAD = 0, 1
REFUSED = h.NOFD | 1
PIPE_BYTES = 1 << 16


class Counter(vhost.Device):
    """A device that remembers."""

    device_id = vhost.DeviceId.RNG
    queues = ("requestq",)
    max_state_size = 4 << 20

    def __init__(self, state: bytes = b"") -> None:
        self.state = state
        self.loaded = threading.Event()

    def requestq(self, queue: vhost.DeviceQueue) -> None:
        for chain in queue:
            queue.push(chain, 0)

    def save(self) -> bytes | Iterable[bytes]:
        if self.state == b"refuse":
            raise VhostError("not now")
        return self.state

    def load(self, state: bytes) -> None:
        if state.startswith(b"bad"):
            raise VhostError("this is bad")
        if state.startswith(b"bug"):
            raise IndexError("a bug")
        self.state = state
        self.loaded.set()


class Pieces(Counter):
    """Gives its state in pieces, and fails in the middle if it is told to."""

    fails = False
    taken = 0

    def save(self) -> Iterator[bytes]:
        for i in range(0, len(self.state), 1000):
            self.taken += 1
            yield self.state[i : i + 1000]
            if self.fails and i > len(self.state) // 2:
                raise VhostError("half of it is lost")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@contextlib.contextmanager
def raw_on(device: vhost.Device, path: Path, *, negotiate: bool = True) -> Iterator[RawFrontend]:
    with h.served(device, path), contextlib.closing(RawFrontend(path)) as raw:
        if negotiate:
            raw.negotiate()
        yield raw


def begin(raw: RawFrontend, direction: int, fd: int, *, phase: int = 0) -> int:
    return raw.ask(SET_DEVICE_STATE_FD, h.state(direction, phase), [fd]).u64


def check(raw: RawFrontend) -> int:
    return raw.ask(CHECK_DEVICE_STATE).u64


def drain(fd: int) -> bytes:
    data = b""
    while part := os.read(fd, 1 << 16):
        data += part
    return data


@contextlib.contextmanager
def pipe() -> Iterator[list[int]]:
    """Both ends; the test may close either, and put -1 in its place."""
    ends = list(os.pipe2(os.O_CLOEXEC))
    try:
        yield ends
    finally:
        for fd in ends:
            if fd >= 0:
                os.close(fd)


def close(ends: list[int], which: int) -> None:
    os.close(ends[which])
    ends[which] = -1


def save(raw: RawFrontend) -> bytes:
    with pipe() as ends:
        assert begin(raw, SAVE, ends[1]) == h.NOFD
        close(ends, 1)
        return drain(ends[0])


def load(raw: RawFrontend, state: bytes) -> None:
    with pipe() as ends:
        assert begin(raw, LOAD, ends[0]) == h.NOFD
        close(ends, 0)
        with open(ends[1], "wb", closefd=False) as file:
            file.write(state)
        close(ends, 1)


STATES = [b"", b"42", os.urandom(3 << 20)]


@pytest.mark.parametrize("state", STATES, ids=["empty", "short", "long"])
@pytest.mark.parametrize("kind", [Counter, Pieces])
def test_from_one_device_to_another(
    kind: type[Counter], state: bytes, tmp_path: Path, no_leaks: None
) -> None:
    source, target = kind(state), kind(b"nothing")
    with h.served(source, tmp_path / "a"), h.served(target, tmp_path / "b"):
        with vhost.Frontend.connect(tmp_path / "a") as a, vhost.Frontend.connect(tmp_path / "b") as b:
            assert a.protocol_features & b.protocol_features & ProtocolF.DEVICE_STATE
            b.load_device_state(a.save_device_state())
            assert a.save_device_state() == state, "the source may be asked again"
    assert target.state == state


def test_by_hand_through_a_pipe(path: Path, no_leaks: None) -> None:
    with raw_on(Counter(b"seven"), path) as raw:
        assert save(raw) == b"seven"
        assert check(raw) == 0
        load(raw, b"eight")
        assert check(raw) == 0
        assert save(raw) == b"eight"
        assert check(raw) == 0


def test_not_offered_by_a_device_without_a_state(path: Path, no_leaks: None) -> None:
    class OnlySaves(Counter):
        load = vhost.Device.load

    for device in (OnlySaves(), vhost.devices.Rng()):
        assert not device.has_state
        with raw_on(device, path) as raw, pipe() as ends:
            assert not raw.ask(h.GET_PROTOCOL_FEATURES).u64 & ProtocolF.DEVICE_STATE
            assert begin(raw, SAVE, ends[1]) == REFUSED
            assert check(raw) == 1


@pytest.mark.parametrize("direction, phase", [(2, 0), (1 << 31, 0), (SAVE, 1), (LOAD, 7)])
def test_directions_and_phases_there_are_none_of(
    direction: int, phase: int, path: Path, no_leaks: None
) -> None:
    with raw_on(Counter(b"1"), path) as raw, pipe() as ends:
        assert begin(raw, direction, ends[1], phase=phase) == REFUSED
        assert check(raw) == 1
        assert save(raw) == b"1"


@pytest.mark.parametrize("direction", [SAVE, LOAD])
def test_the_device_must_be_suspended(direction: int, path: Path, no_leaks: None) -> None:
    with raw_on(Counter(b"1"), path, negotiate=False) as raw, pipe() as ends:
        raw.start()
        assert begin(raw, direction, ends[direction == SAVE]) == REFUSED
        assert raw.ask(h.GET_VRING_BASE, h.state(0, 0)).number == h.GET_VRING_BASE
        assert begin(raw, direction, ends[direction == SAVE]) == h.NOFD


def test_another_session_runs_the_rings(path: Path, no_leaks: None) -> None:
    with raw_on(Counter(b"1"), path, negotiate=False) as first, contextlib.closing(RawFrontend(path)) as raw:
        first.start()
        raw.negotiate()
        with pipe() as ends:
            assert begin(raw, SAVE, ends[1]) == REFUSED


def test_another_session_starts_them_meanwhile(path: Path, no_leaks: None) -> None:
    device = Counter(b"old")
    with raw_on(device, path) as raw, contextlib.closing(RawFrontend(path)) as other, pipe() as ends:
        assert begin(raw, LOAD, ends[0]) == h.NOFD
        other.start()
        os.write(ends[1], b"new")
        close(ends, 1)
        assert check(raw) == 1
    assert device.state == b"old"


@pytest.mark.parametrize("direction", [SAVE, LOAD])
def test_rings_started_during_the_transfer(direction: int, path: Path, no_leaks: None) -> None:
    device = Counter(os.urandom(PIPE_BYTES * 3))
    before = device.state
    with raw_on(device, path) as raw, pipe() as ends:
        assert begin(raw, direction, ends[direction == SAVE]) == h.NOFD
        close(ends, direction == SAVE)
        assert raw.share_memory() == 0
        raw.start_ring()
        if direction == LOAD:
            assert select.select([], [ends[1]], [], 20)[1]
            with pytest.raises(BrokenPipeError):
                while True:
                    os.write(ends[1], b"more")
        else:
            assert len(drain(ends[0])) < len(before), "the end comes early"
        assert check(raw) == 1
        assert raw.ask(h.GET_VRING_BASE, h.state(0, 0)).number == h.GET_VRING_BASE
    assert device.state == before


def test_one_at_a_time(path: Path, no_leaks: None) -> None:
    device = Counter()
    with raw_on(device, path) as raw, pipe() as first, pipe() as second:
        assert begin(raw, LOAD, first[0]) == h.NOFD
        assert begin(raw, LOAD, second[0]) == REFUSED
        os.write(first[1], b"first")
        close(first, 1)
        assert check(raw) == 0
        assert device.state == b"first"
        # One that is over, but was never asked about, is none.
        assert begin(raw, LOAD, second[0]) == h.NOFD
        close(second, 1)
        with pipe() as third:
            assert begin(raw, SAVE, third[1]) == h.NOFD
            close(third, 1)
            assert drain(third[0]) == b""


def test_asked_when_nothing_was_transferred(path: Path, no_leaks: None) -> None:
    with raw_on(Counter(), path) as raw:
        assert check(raw) == 1


@pytest.mark.parametrize("state", [b"bad", b"bug"])
def test_the_device_refuses(state: bytes, path: Path, no_leaks: None) -> None:
    device = Counter(b"mine")
    with raw_on(device, path) as raw:
        load(raw, state)
        assert check(raw) == 1
        assert save(raw) == b"mine"
        assert check(raw) == 0
        device.state = b"refuse"
        with pipe() as ends:
            assert begin(raw, SAVE, ends[1]) == REFUSED
        device.state = b"mine"
        assert save(raw) == b"mine"
    with h.served(device, path), vhost.Frontend.connect(path) as frontend:
        with pytest.raises(RequestFailed, match="CHECK_DEVICE_STATE"):
            frontend.load_device_state(state)
        device.state = b"refuse"
        with pytest.raises(RequestFailed, match="SET_DEVICE_STATE_FD"):
            frontend.save_device_state()


def test_a_device_that_fails_in_the_middle(path: Path, no_leaks: None) -> None:
    device = Pieces(os.urandom(300_000))
    device.fails = True
    with raw_on(device, path) as raw:
        assert 0 < len(save(raw)) < 300_000
        assert check(raw) == 1
    with h.served(device, path), vhost.Frontend.connect(path) as frontend:
        with pytest.raises(RequestFailed, match="CHECK_DEVICE_STATE"):
            frontend.save_device_state()


def test_a_pipe_that_never_ends(path: Path, no_leaks: None) -> None:
    """It holds up nothing: neither this session, nor others, nor the end."""
    device = Counter(b"mine")
    with raw_on(device, path) as raw, pipe() as ends:
        assert begin(raw, LOAD, ends[0]) == h.NOFD
        os.write(ends[1], b"some")
        assert raw.ask(h.GET_FEATURES).u64
        with contextlib.closing(RawFrontend(path)) as other:
            other.negotiate()
        assert check(raw) == 1, "the writing end is still open"
        with pytest.raises(BrokenPipeError):
            close(ends, 0)
            os.write(ends[1], b"more")
        assert save(raw) == b"mine"
        with pipe() as again:
            assert begin(raw, LOAD, again[0]) == h.NOFD
            raw.sock.close()  # in the middle
    assert device.state == b"mine"


def test_too_much(path: Path, no_leaks: None) -> None:
    device = Counter(b"mine")
    with raw_on(device, path) as raw, pipe() as ends:
        assert begin(raw, LOAD, ends[0]) == h.NOFD
        close(ends, 0)
        with pytest.raises(BrokenPipeError):
            while True:
                os.write(ends[1], bytes(1 << 16))
        assert check(raw) == 1
        load(raw, bytes(device.max_state_size))
        assert check(raw) == 0
    assert device.state == bytes(device.max_state_size)


def test_a_reader_that_leaves_early(path: Path, no_leaks: None) -> None:
    device = Pieces(os.urandom(1 << 20))
    with raw_on(device, path) as raw:
        with pipe() as ends:
            assert begin(raw, SAVE, ends[1]) == h.NOFD
            close(ends, 1)
            os.read(ends[0], 100)
        assert check(raw) == 1
        with pipe() as ends:
            close(ends, 0)  # before it begins
            assert begin(raw, SAVE, ends[1]) == h.NOFD
        assert check(raw) == 1
        assert device.taken < len(device.state) // 1000, "pieces are made as they are read"
        assert save(raw) == device.state
        assert check(raw) == 0


def test_a_reader_that_never_reads(path: Path, no_leaks: None) -> None:
    with raw_on(Counter(os.urandom(1 << 20)), path) as raw:
        with pipe() as ends:
            assert begin(raw, SAVE, ends[1]) == h.NOFD
            assert raw.ask(h.GET_FEATURES).u64
            assert check(raw) == 1


def test_nobody_can_make_us_wait(path: Path, no_leaks: None) -> None:
    """Whether a descriptor blocks is the open file's matter, which both sides share."""
    with raw_on(Counter(os.urandom(1 << 20)), path) as raw:
        for direction in (SAVE, LOAD):
            with pipe() as ends:
                ours = ends[direction == SAVE]
                assert begin(raw, direction, ours) == h.NOFD
                os.set_blocking(ours, True)
                assert raw.ask(h.GET_FEATURES).u64
                assert check(raw) == 1


def test_the_wrong_end_of_a_pipe(path: Path, no_leaks: None) -> None:
    with raw_on(Counter(b"1"), path) as raw, pipe() as ends:
        assert begin(raw, SAVE, ends[0]) == REFUSED
        assert begin(raw, LOAD, ends[1]) == REFUSED
        assert save(raw) == b"1"


def receive_with_fd(raw: RawFrontend) -> tuple[h.Reply, int]:
    data, ancillary, _, _ = raw.sock.recvmsg(12 + 8, 64)
    number, flags, _ = h.HEADER.unpack(data[:12])
    (fd,) = array.array("i", ancillary[0][2])
    return h.Reply(number, flags, data[12:]), fd


@pytest.mark.parametrize("kind", ["memfd", "eventfd", "null", "datagram"])
def test_a_descriptor_that_cannot_be_used(kind: str, path: Path, no_leaks: None) -> None:
    """The back-end gives one of its own (SET_DEVICE_STATE_FD)."""
    with raw_on(Counter(os.urandom(300_000)), path) as raw, contextlib.ExitStack() as stack:
        if kind == "datagram":
            fds = [sock.detach() for sock in socket.socketpair(type=socket.SOCK_DGRAM)]
        else:
            make = {"memfd": lambda: os.memfd_create("x"), "eventfd": lambda: os.eventfd(0)}
            fds = [make.get(kind, lambda: os.open("/dev/null", os.O_RDWR))()]
        for fd in fds:
            stack.callback(os.close, fd)
        raw.send(SET_DEVICE_STATE_FD, h.state(SAVE, 0), fds[:1])
        answer, theirs = receive_with_fd(raw)
        assert answer.u64 == 0
        with socket.socket(fileno=theirs):
            assert drain(theirs) == raw_device_state(raw, path)
        assert check(raw) == 0


def raw_device_state(raw: RawFrontend, path: Path) -> bytes:
    with contextlib.closing(RawFrontend(path)) as other:
        other.negotiate()
        return save(other)


def test_a_socket_instead_of_a_pipe(path: Path, no_leaks: None) -> None:
    state = os.urandom(1 << 20)
    device = Counter(state)
    with raw_on(device, path) as raw:
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                assert begin(raw, SAVE, theirs.fileno()) == h.NOFD
            assert drain(ours.fileno()) == state
        assert check(raw) == 0
        ours, theirs = socket.socketpair()
        with ours, theirs:
            # Their end stays open here as well, which must not matter.
            assert begin(raw, LOAD, theirs.fileno()) == h.NOFD
            ours.sendall(b"through a socket")
            ours.shutdown(socket.SHUT_WR)
            assert check(raw) == 0
    assert device.state == b"through a socket"


def test_sessions_that_end_in_the_middle(path: Path, no_leaks: None) -> None:
    device = Counter(os.urandom(1 << 20))
    with h.served(device, path):
        for direction in (SAVE, LOAD):
            with pipe() as ends:
                with contextlib.closing(RawFrontend(path)) as raw:
                    raw.negotiate()
                    assert begin(raw, direction, ends[direction == SAVE]) == h.NOFD
                    close(ends, direction == SAVE)
                if direction == SAVE:
                    assert len(drain(ends[0])) < len(device.state)
                else:
                    assert select.select([], [ends[1]], [], 20)[1]
                    with pytest.raises(BrokenPipeError):
                        while True:
                            os.write(ends[1], bytes(1 << 10))


SIGPIPE = """
import os, signal, sys
from pathlib import Path
signal.signal(signal.SIGPIPE, signal.SIG_DFL)   # as a program that embeds us may have it
from user.test_state import Counter, begin, check, close, pipe, raw_on
from vhost.user.state_channel import PipeChannel
with raw_on(Counter(bytes(1 << 20)), Path(sys.argv[1])) as raw, pipe() as ends:
    begin(raw, 0, ends[1])
    close(ends, 1)
    os.read(ends[0], 1)
    close(ends, 0)
    print("check", check(raw))
"""


def test_no_sigpipe(path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SIGPIPE, str(path)],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, (signal.Signals(-run.returncode) if run.returncode < 0 else "", run.stderr)
    assert run.stdout == "check 1\n"


# -- the front-end on back-ends that misbehave ---------------------------------------------------------


def back_end(
    script: Callable[[RawBackend, int, int], None],
) -> contextlib.AbstractContextManager[socket.socket]:
    """The script gets the direction and the descriptor of the request, which it has to answer."""

    def run(raw: RawBackend) -> None:
        raw.handshake(h.PROTOCOL_FEATURES, int(ProtocolF.DEVICE_STATE))
        number, _, payload = raw.receive()
        assert number == SET_DEVICE_STATE_FD
        direction, phase = struct.unpack("=II", payload)
        assert phase == 0
        script(raw, direction, raw.fds.pop())
        with contextlib.suppress(EOFError, ConnectionError):
            assert raw.receive()[0] == CHECK_DEVICE_STATE
            raw.reply(CHECK_DEVICE_STATE, h.u64(0))

    return backend(run)


def test_front_end_is_not_kept_waiting(no_leaks: None) -> None:
    for act in ("save", "load"):
        held: list[int] = []

        def script(raw: RawBackend, direction: int, fd: int, held: list[int] = held) -> None:
            held.append(fd)
            raw.reply(SET_DEVICE_STATE_FD, h.u64(h.NOFD))

        with back_end(script) as sock, vhost.Frontend(sock) as frontend:
            with pytest.raises(ReplyTimeout, match="not through in time"):
                if act == "save":
                    frontend.save_device_state(timeout=0.05)
                else:
                    frontend.load_device_state(bytes(1 << 20), timeout=0.05)
        os.close(held[0])


def test_front_end_reads_only_so_much(no_leaks: None) -> None:
    def script(raw: RawBackend, direction: int, fd: int) -> None:
        raw.reply(SET_DEVICE_STATE_FD, h.u64(h.NOFD))
        with contextlib.suppress(BrokenPipeError), open(fd, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))

    with back_end(script) as sock, vhost.Frontend(sock) as frontend:
        with pytest.raises(ProtocolError, match="longer than 1048576 bytes"):
            frontend.save_device_state(limit=1 << 20)


def test_back_end_that_stops_to_read_and_says_all_is_well(no_leaks: None) -> None:
    def script(raw: RawBackend, direction: int, fd: int) -> None:
        assert direction == LOAD
        os.close(fd)
        raw.reply(SET_DEVICE_STATE_FD, h.u64(h.NOFD))

    with back_end(script) as sock, vhost.Frontend(sock) as frontend:
        with pytest.raises(ProtocolError, match="stopped to read"):
            frontend.load_device_state(bytes(1 << 20))


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_back_end_with_a_channel_of_its_own(kind: str, no_leaks: None) -> None:
    def script(raw: RawBackend, direction: int, fd: int) -> None:
        os.close(fd)
        if kind == "pipe":
            theirs, ours = os.pipe()
        else:
            theirs, ours = (sock.detach() for sock in socket.socketpair())
        socket.send_fds(raw.sock, [h.HEADER.pack(SET_DEVICE_STATE_FD, 5, 8) + h.u64(0)], [theirs])
        os.close(theirs)
        with open(ours, "wb") as file:
            file.write(b"by another way")

    with back_end(script) as sock, vhost.Frontend(sock) as frontend:
        assert frontend.save_device_state() == b"by another way"


def test_back_end_with_a_channel_that_is_none(no_leaks: None) -> None:
    def script(raw: RawBackend, direction: int, fd: int) -> None:
        os.close(fd)
        event = os.eventfd(0)
        socket.send_fds(raw.sock, [h.HEADER.pack(SET_DEVICE_STATE_FD, 5, 8) + h.u64(0)], [event])
        os.close(event)

    with back_end(script) as sock, vhost.Frontend(sock) as frontend:
        with pytest.raises(ProtocolError, match="neither pipe nor stream"):
            frontend.save_device_state()


def test_back_end_dies_in_the_middle(no_leaks: None) -> None:
    def script(raw: RawBackend, direction: int, fd: int) -> None:
        raw.reply(SET_DEVICE_STATE_FD, h.u64(h.NOFD))
        os.write(fd, b"half")
        os.close(fd)
        raw.sock.shutdown(socket.SHUT_RDWR)

    with back_end(script) as sock, vhost.Frontend(sock) as frontend:
        with pytest.raises(ProtocolError):
            frontend.save_device_state()
