# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What the other end of the socket can do: the process lives, other sessions go on, nothing leaks."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

import vhost
from user import hostile as h
from user.hostile import RawFrontend

DISK = 1 << 20


class Bench:
    """A served disk, a session that works, and connections to misuse."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.opened: list[RawFrontend] = []

    def connect(self, *, negotiated: bool = False) -> RawFrontend:
        raw = RawFrontend(self.path)
        self.opened.append(raw)
        if negotiated:
            raw.negotiate()
        return raw


@pytest.fixture
def bench(tmp_path: Path, no_leaks: None) -> Iterator[Bench]:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(DISK))
    bench = Bench(tmp_path / "disk.sock")
    device = vhost.devices.Blk(image, num_queues=2)
    # One instance for all, so that what one session does to it would show in the others.
    with contextlib.ExitStack() as stack:
        stack.callback(device.close)
        stack.enter_context(h.served(device, bench.path))
        good = stack.enter_context(vhost.Frontend.connect(bench.path))
        disk = stack.enter_context(vhost.drivers.Blk(good))
        disk.write(0, b"\x11" * 512)
        try:
            yield bench
        finally:
            for raw in bench.opened:
                raw.close()
        assert disk.read(0, 1) == b"\x11" * 512


# -- bytes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", range(20))
def test_cut_anywhere_then_eof(bench: Bench, cut: int) -> None:
    raw = bench.connect()
    raw.raw(h.HEADER.pack(h.SET_FEATURES, h.VERSION, 8)[:cut] + h.u64(0)[: max(0, cut - 12)])
    raw.sock.shutdown(socket.SHUT_WR)
    assert raw.ended()


def test_byte_by_byte_while_another_session_works(bench: Bench) -> None:
    slow = bench.connect()
    message = h.HEADER.pack(h.GET_FEATURES, h.VERSION, 0)
    for byte in message[:-1]:
        slow.raw(bytes([byte]))
        other = bench.connect()
        assert other.ask(h.GET_FEATURES).u64 & h.PROTOCOL_FEATURES
    slow.raw(message[-1:])
    assert slow.reply().u64 & h.PROTOCOL_FEATURES


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x80000000, 4097, 9, 7, 0])
def test_payload_sizes_that_are_wrong(bench: Bench, size: int) -> None:
    raw = bench.connect()
    with contextlib.suppress(BrokenPipeError):
        raw.raw(h.HEADER.pack(h.SET_FEATURES, h.VERSION, size))
        raw.raw(bytes(min(size, 8192)))
    assert raw.ended()


@pytest.mark.parametrize("flags", [0, 2, 3, h.VERSION | h.REPLY])
def test_flags_that_are_wrong(bench: Bench, flags: int) -> None:
    raw = bench.connect()
    raw.send(h.GET_FEATURES, flags=flags)
    assert raw.ended()


@pytest.mark.parametrize("number", [0, 46, 1000, 0xFFFFFFFF])
def test_unknown_requests(bench: Bench, number: int) -> None:
    raw = bench.connect()
    assert raw.status(number, bytes(24)) != 0
    assert raw.ask(h.GET_FEATURES).u64, "a refusal leaves the session in step"
    raw.send(number, bytes(24))
    assert raw.ended(), "without an answer the front-end would not know"


def test_requests_that_are_not_served(bench: Bench) -> None:
    """They are in the table, but this device has no use for them."""
    raw = bench.connect(negotiated=True)
    assert raw.status(20, h.u64(1500)) != 0, "the disk has no MTU"
    assert raw.ask(h.GET_FEATURES).u64


# -- descriptors -------------------------------------------------------------------------------------


def test_descriptors_nobody_asked_for(bench: Bench) -> None:
    raw = bench.connect(negotiated=True)
    assert raw.status(h.SET_VRING_NUM, h.state(0, 8), [raw.kick]) != 0
    assert raw.status(h.SET_VRING_NUM, h.state(0, 8), [raw.kick] * 8) != 0
    assert raw.status(h.SET_VRING_KICK, h.u64(h.NOFD), [raw.kick]) != 0
    assert raw.ask(h.GET_FEATURES).u64


def test_as_many_descriptors_as_go_through(bench: Bench) -> None:
    raw = bench.connect(negotiated=True)
    assert raw.status(h.SET_VRING_NUM, h.state(0, 8), [raw.kick] * 32) != 0
    # And again with each byte of a message.
    for byte in h.HEADER.pack(h.SET_OWNER, h.VERSION, 0):
        try:
            raw.raw(bytes([byte]), [raw.kick] * 253)
        except (BrokenPipeError, ConnectionResetError):
            break
        except OSError as error:
            # The kernel stops an ordinary user before we do.
            assert error.errno == errno.ETOOMANYREFS
            return
    assert raw.ended()


def test_missing_descriptors(bench: Bench) -> None:
    raw = bench.connect(negotiated=True)
    assert raw.status(h.SET_VRING_KICK, h.u64(0)) != 0
    assert raw.status(h.SET_BACKEND_REQ_FD) != 0
    assert raw.status(h.SET_MEM_TABLE, h.table((h.GUEST, h.SIZE, h.USER, 0))) != 0
    two = h.table((h.GUEST, 4096, h.USER, 0), (h.GUEST + 4096, 4096, h.USER + 4096, 4096))
    assert raw.status(h.SET_MEM_TABLE, two, [raw.memfd]) != 0
    assert raw.status(h.ADD_MEM_REG, h.slot(h.GUEST, h.SIZE, h.USER, 0)) != 0


@pytest.mark.parametrize("kind", ["directory", "/dev/zero", "socket", "file", "pipe"])
def test_descriptors_of_a_wrong_kind(bench: Bench, kind: str, tmp_path: Path) -> None:
    raw = bench.connect(negotiated=True)
    path = {"directory": tmp_path, "/dev/zero": Path("/dev/zero"), "file": Path(__file__)}.get(kind)
    fd = os.open(path, os.O_RDONLY) if path else os.dup(raw.sock.fileno())
    if kind == "pipe":
        os.close(fd)
        fd, other = os.pipe()
        os.close(other)
    try:
        for number in (h.SET_VRING_KICK, h.SET_VRING_CALL, h.SET_VRING_ERR):
            assert raw.status(number, h.u64(0), [fd]) != 0
        if kind != "socket":
            assert raw.status(h.SET_BACKEND_REQ_FD, b"", [fd]) != 0
        assert raw.status(h.SET_MEM_TABLE, h.table((h.GUEST, h.SIZE, h.USER, 0)), [fd]) != 0
        assert raw.status(h.ADD_MEM_REG, h.slot(h.GUEST, h.SIZE, h.USER, 0), [fd]) != 0
    finally:
        os.close(fd)
    assert raw.share_memory() == 0


def test_the_session_as_its_own_channel(bench: Bench) -> None:
    """The back-end then takes its own answers for the front-end's. Who does that harms itself alone."""
    raw = bench.connect(negotiated=True)
    raw.send(h.SET_BACKEND_REQ_FD, b"", [raw.sock.fileno()], flags=h.VERSION | h.NEED_REPLY)
    assert bench.connect(negotiated=True).ask(h.GET_FEATURES).u64


# -- fields ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [2, 255, 0x10000, 0x80000000, 0xFFFFFFFF])
def test_ring_indices(bench: Bench, index: int) -> None:
    raw = bench.connect(negotiated=True)
    assert raw.share_memory() == 0
    assert raw.status(h.SET_VRING_NUM, h.state(index, 8)) != 0
    assert raw.status(h.SET_VRING_BASE, h.state(index, 0)) != 0
    assert raw.status(h.SET_VRING_ADDR, h.address(index)) != 0
    assert raw.status(h.SET_VRING_ENABLE, h.state(index, 1)) != 0
    if 2 <= index < 256:
        assert raw.status(h.SET_VRING_KICK, h.u64(index), [raw.kick]) != 0
    raw.send(h.GET_VRING_BASE, h.state(index, 0))
    assert raw.ended(), "there is no answer that says no"


@pytest.mark.parametrize("num", [0, 3, 2048, 65536, 0xFFFFFFFF])
def test_ring_sizes(bench: Bench, num: int) -> None:
    """3 is refused when the ring starts: for a packed one it would be fine."""
    raw = bench.connect(negotiated=True)
    assert raw.share_memory() == 0
    refused = raw.status(h.SET_VRING_NUM, h.state(1, num))
    if num == 3:
        assert raw.status(h.SET_VRING_ADDR, h.address(1)) == 0
        refused = raw.status(h.SET_VRING_KICK, h.u64(1), [raw.kick])
    assert refused


@pytest.mark.parametrize(
    "areas",
    [
        (h.USER + 8, h.USER + 0x1000, h.USER + 0x2000),
        (h.USER, h.USER + 0x1001, h.USER + 0x2000),
        (h.USER, h.USER + 0x1000, h.USER + 0x2002),
        (h.USER, h.USER, h.USER + 0x2000),
        (h.USER, h.USER + 0x1000, h.USER + 0x1008),
        (h.USER + h.SIZE - 16, h.USER + 0x1000, h.USER + 0x2000),
        (h.USER, h.USER + 0x1000, h.USER + h.SIZE - 4),
        (0, h.USER + 0x1000, h.USER + 0x2000),
        (h.USER, h.USER + 0x1000, (1 << 64) - 4),
        (h.GUEST, h.GUEST + 0x1000, h.GUEST + 0x2000),
    ],
)
def test_ring_areas(tmp_path: Path, no_leaks: None, areas: tuple[int, int, int]) -> None:
    """Misaligned, overlapping, outside memory, or guest addresses where user addresses belong."""
    device = vhost.devices.Rng()
    with h.served(device, tmp_path / "s"), contextlib.closing(RawFrontend(tmp_path / "s")) as raw:
        raw.negotiate()
        assert raw.share_memory() == 0
        assert raw.status(h.SET_VRING_NUM, h.state(0, 8)) == 0
        refused = raw.status(h.SET_VRING_ADDR, h.address(0, *areas))
        if not refused:
            refused = raw.status(h.SET_VRING_KICK, h.u64(0), [raw.kick])
        assert refused
        assert raw.status(h.SET_VRING_ADDR, h.address(0)) == 0
        assert raw.status(h.SET_VRING_KICK, h.u64(0), [raw.kick]) == 0


def test_features_never_offered(bench: Bench) -> None:
    raw = bench.connect(negotiated=True)
    assert raw.status(h.SET_FEATURES, h.u64(h.VERSION_1 | 1 << 60)) != 0
    assert raw.status(h.SET_PROTOCOL_FEATURES, h.u64(1 << 17)) != 0
    raw.send(h.SET_FEATURES, h.u64(1 << 60))
    assert raw.ended()


def test_messages_of_features_that_were_not_negotiated(bench: Bench) -> None:
    raw = bench.connect()
    raw.ask(h.GET_FEATURES)
    assert raw.status(h.ADD_MEM_REG, h.slot(h.GUEST, h.SIZE, h.USER, 0), [raw.memfd]) != 0
    config = struct.pack("=III", 0, 8, 0) + bytes(8)
    assert raw.ask(h.GET_CONFIG, config).payload in (b"", bytes(12))


def test_second_owner(bench: Bench) -> None:
    raw = bench.connect(negotiated=True)
    assert raw.status(h.SET_OWNER) != 0
    raw.send(h.SET_OWNER)
    assert raw.ended()


def test_a_peer_that_never_reads(bench: Bench) -> None:
    raw = bench.connect()
    raw.sock.settimeout(0.5)
    question = h.HEADER.pack(h.GET_FEATURES, h.VERSION, 0) * 100
    # It stops listening to us once too much is pending, and is not kept for ever.
    with pytest.raises(OSError):
        for _ in range(10000):
            raw.sock.sendall(question)


@pytest.mark.parametrize("offset, size", [(0, 0), (0, 257), (0, 4097), (250, 20), (0xFFFFFFFF, 8)])
def test_config_ranges(bench: Bench, offset: int, size: int) -> None:
    raw = bench.connect(negotiated=True)
    raw.send(h.GET_CONFIG, struct.pack("=III", offset, size, 0) + bytes(size))
    try:
        reply = raw.reply()
    except (AssertionError, ConnectionResetError):
        assert size > 4096  # ending the session is a clear answer too
        return
    data = reply.payload[12:]
    assert not data or (len(data) == size and data[60:] == bytes(len(data[60:])))


def test_config_is_read_only(bench: Bench) -> None:
    raw = bench.connect(negotiated=True)
    assert raw.status(25, struct.pack("=III", 0, 8, 0) + h.u64(1)) != 0
    assert raw.status(25, struct.pack("=III", 0xFFFFFFF8, 8, 0) + h.u64(1)) != 0
