# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Crypto sessions, MTU, and memory tables of Xen: what is passed on to a device, and what is not."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

import vhost
from user import hostile as h
from user.hostile import RawFrontend
from vhost.errors import InactiveFeature, RequestFailed, VhostError
from vhost.features import ProtocolF
from vhost.user.backend import Backend
from vhost.user.crypto import MAX_SESSIONS
from vhost.user.payloads import CryptoSession

CREATE, CLOSE, SET_MTU, SEND_RARP = 26, 27, 20, 19
CIPHER = 0x104


class Crypto(vhost.Device):
    device_id = vhost.DeviceId.CRYPTO
    queues = ("dataq", "controlq")

    def __init__(self) -> None:
        self.sessions: dict[int, tuple[int, bytes]] = {}
        self.made = 0

    def create_crypto_session(self, op_code: int, setup: bytes) -> int:
        if op_code != CIPHER:
            raise VhostError(f"op_code {op_code:#x} is none that we know")
        self.made += 1
        self.sessions[self.made - 1] = op_code, setup
        return self.made - 1

    def close_crypto_session(self, session_id: int) -> None:
        del self.sessions[session_id]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


def test_sessions_come_and_go(path: Path, no_leaks: None) -> None:
    device = Crypto()
    with h.served(device, path), vhost.Frontend.connect(path) as frontend:
        assert frontend.create_crypto_session(CIPHER, b"key") == 0
        assert frontend.create_crypto_session(CIPHER, bytes(1056)) == 1
        assert device.sessions[0] == (CIPHER, b"key".ljust(1056, b"\0"))
        with pytest.raises(RequestFailed, match="no session: -1"):
            frontend.create_crypto_session(7, b"")
        frontend.close_crypto_session(0)
        with pytest.raises(RequestFailed, match="CLOSE_CRYPTO_SESSION"):
            frontend.close_crypto_session(0)
        with vhost.Frontend.connect(path) as other, pytest.raises(RequestFailed):
            other.close_crypto_session(1)  # somebody else's
        assert list(device.sessions) == [1]
        frontend.reset_device()
        assert not device.sessions
        assert frontend.create_crypto_session(CIPHER, b"") == 2
    assert not device.sessions, "closed with their front-end"


def test_too_many_sessions(path: Path, no_leaks: None) -> None:
    device = Crypto()
    with h.served(device, path), vhost.Frontend.connect(path) as frontend:
        for number in range(MAX_SESSIONS):
            assert frontend.create_crypto_session(CIPHER, b"") == number
        with pytest.raises(RequestFailed):
            frontend.create_crypto_session(CIPHER, b"")
        frontend.close_crypto_session(5)
        assert frontend.create_crypto_session(CIPHER, b"") == MAX_SESSIONS


def test_sizes_and_devices(path: Path, no_leaks: None) -> None:
    with h.served(Crypto(), path), contextlib.closing(RawFrontend(path)) as raw:
        raw.negotiate()
        for size in (0, 8, 1071, 1073):
            raw.send(CREATE, bytes(size), flags=h.VERSION | h.NEED_REPLY)
            if size == 1073:
                break
            answer = raw.reply()
            assert CryptoSession.unpack(answer.payload).session_id == -1
        assert raw.ended(), "longer than any: what follows could be anything"
    with h.served(vhost.devices.Rng(), path), vhost.Frontend.connect(path) as frontend:
        with pytest.raises(InactiveFeature):
            frontend.create_crypto_session(CIPHER, b"")


# -- network devices ---------------------------------------------------------------------------------


class Nic(vhost.Device):
    device_id = vhost.DeviceId.NET
    queues = ("rx", "tx")

    def __init__(self) -> None:
        self.told: list[int | bytes] = []

    def set_mtu(self, mtu: int) -> None:
        self.told.append(mtu)

    def send_rarp(self, mac: bytes) -> None:
        self.told.append(mac)


def test_mtu_and_rarp(path: Path, no_leaks: None) -> None:
    device = Nic()
    with h.served(device, path), contextlib.closing(RawFrontend(path)) as raw:
        raw.negotiate()
        for mtu in (0, 67, 65536, 1 << 32, (1 << 64) - 1):
            assert raw.status(SET_MTU, h.u64(mtu)) != 0
        for mtu in (68, 65535):
            assert raw.status(SET_MTU, h.u64(mtu)) == 0
        assert raw.status(SEND_RARP, bytes.fromhex("525400123456") + b"\xff\xff") == 0
    assert device.told == [68, 65535, bytes.fromhex("525400123456")]
    with h.served(Nic(), path), vhost.Frontend.connect(path) as frontend:
        for wrong in (lambda: frontend.net_set_mtu(67), lambda: frontend.send_rarp(bytes(8))):
            with pytest.raises(ValueError, match="must be"):
                wrong()


# -- Xen ---------------------------------------------------------------------------------------------


class XenBackend(Backend):
    """Offers what no back-end of ours does: front-ends that acknowledge all bits would break."""

    def offered_protocol_features(self) -> int:
        return super().offered_protocol_features() | int(ProtocolF.XEN_MMAP)


@pytest.fixture
def xen() -> Iterator[tuple[XenBackend, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    device = vhost.devices.Rng()
    back = XenBackend(device, theirs)
    yield back, ours
    back.close()
    ours.close()


def ask(back: XenBackend, sock: socket.socket, number: int, payload: bytes, fds: list[int]) -> int:
    data = h.HEADER.pack(number, h.VERSION | h.NEED_REPLY, len(payload)) + payload
    socket.send_fds(sock, [data], fds)
    assert back.step()
    return int.from_bytes(sock.recv(20)[12:], "little")


@pytest.mark.parametrize("flags", [1, 2, 0x100, 0x101, 0x102, 3, 4, 0xFFFFFFFF])
def test_xen_mappings_are_refused(
    xen: tuple[XenBackend, socket.socket], flags: int, caplog: pytest.LogCaptureFixture
) -> None:
    back, sock = xen
    assert (
        ask(
            back,
            sock,
            h.SET_PROTOCOL_FEATURES,
            h.u64(int(ProtocolF.XEN_MMAP | ProtocolF.REPLY_ACK | ProtocolF.CONFIGURE_MEM_SLOTS)),
            [],
        )
        == 0
    )
    fd = os.memfd_create("guest")
    os.ftruncate(fd, h.SIZE)
    region = struct.pack("=QQQQII", h.GUEST, h.SIZE, h.USER, 0, flags, 5)
    assert ask(back, sock, h.SET_MEM_TABLE, struct.pack("=II", 1, 0) + region, [fd]) != 0
    assert f"xen mmap flags {flags:#x}, domid 5" in caplog.text
    assert "need Xen, which is not supported" in caplog.text
    assert ask(back, sock, h.ADD_MEM_REG, bytes(8) + region, [fd]) != 0
    assert len(back.memory) == 0
    # Without a flag it is a mapping like any other.
    region = struct.pack("=QQQQII", h.GUEST, h.SIZE, h.USER, 0, 0, 0)
    assert ask(back, sock, h.SET_MEM_TABLE, struct.pack("=II", 1, 0) + region, [fd]) == 0
    assert back.memory[0].size == h.SIZE
    os.close(fd)


def test_xen_is_never_offered(path: Path, no_leaks: None) -> None:
    with h.served(vhost.devices.Rng(), path), contextlib.closing(RawFrontend(path)) as raw:
        offered = raw.ask(h.GET_PROTOCOL_FEATURES).u64
        assert not offered & ProtocolF.XEN_MMAP
        assert raw.status(h.SET_PROTOCOL_FEATURES, h.u64(offered | int(ProtocolF.XEN_MMAP))) != 0
