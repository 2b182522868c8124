# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Taps on this machine: made, opened, used by read and write, and refused."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import select
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhost.errors import IoctlError
from vhost.features import NetF
from vhost.kernel import Tap

ETHERTYPE = 0x88B5
FRAME = bytes.fromhex("ffffffffffff 020304050607 88b5") + b"pyvhost" * 10


def allowed() -> bool:
    try:
        Tap().close()
    except IoctlError as error:
        if error.errno not in (errno.EPERM, errno.ENOENT, errno.EACCES):
            raise
        return False
    return True


pytestmark = pytest.mark.usefixtures("taps", "no_leaks")


@pytest.fixture(scope="module")
def taps() -> None:
    if not allowed():
        text = "needs /dev/net/tun and CAP_NET_ADMIN"
        if os.environ.get("CI") == "true":
            pytest.fail(text, pytrace=False)
        pytest.skip(text)


@pytest.fixture
def name() -> Iterator[str]:
    name = f"pv{os.getpid() % 100000}"
    yield name
    assert not Path(f"/sys/class/net/{name}").exists(), "left behind"


def wire(tap: Tap) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE))
    sock.bind((tap.name, ETHERTYPE))
    sock.settimeout(5)
    return sock


def read(fd: int, header: int) -> bytes:
    """The next frame that is for us; the kernel has things of its own to say."""
    while True:
        assert select.select([fd], [], [], 5)[0]
        frame = os.read(fd, 4096)[header:]
        if frame[12:14] == ETHERTYPE.to_bytes(2, "big"):
            return frame


@pytest.mark.parametrize("header", [0, 10, 12])
def test_frames_both_ways(name: str, header: int) -> None:
    with Tap(name, vnet_hdr=bool(header)) as tap:
        assert tap.name == name
        assert tap.index == socket.if_nametoindex(name)
        tap.set_vnet_hdr_size(header)
        assert tap.vnet_hdr_size == header
        assert not tap.is_up
        tap.up()
        assert tap.is_up
        with wire(tap) as far:
            os.write(tap.fileno(), bytes(header) + FRAME)
            assert far.recv(4096) == FRAME
            far.send(FRAME)
            assert read(tap.fileno(), header) == FRAME
        tap.down()
        assert not tap.is_up


def test_what_it_is() -> None:
    with Tap("pvtest%d") as tap, Tap() as other:
        assert re.fullmatch(r"pvtest\d+", tap.name)
        assert other.name != tap.name
        assert len(tap.fds) == 1
        assert tap.features & (NetF.CSUM | NetF.GUEST_TSO4) == NetF.CSUM | NetF.GUEST_TSO4
        tap.mtu = 9000
        assert tap.mtu == 9000
        tap.mac = bytes.fromhex("020000001234")
        assert tap.mac == bytes.fromhex("020000001234")
        assert Path(f"/sys/class/net/{tap.name}/address").read_text().strip() == "02:00:00:00:12:34"
        tap.set_sndbuf(1 << 20)
        tap.up()
        tap.set_carrier(False)
        assert Path(f"/sys/class/net/{tap.name}/carrier").read_text().strip() == "0"
        tap.set_carrier(True)
        tap.set_features(tap.features)
        tap.set_features(int(NetF.GUEST_CSUM))
        with pytest.raises(IoctlError, match="offloads 0x2") as failed:
            tap.set_features(int(NetF.GUEST_TSO4))  # segments without checksums
        assert failed.value.ioctl == "TUNSETOFFLOAD"
    with Tap(vnet_hdr=False) as plain:
        assert plain.features == 0


def test_queues(name: str) -> None:
    with Tap(name, queue_pairs=3) as tap:
        assert len(set(tap.fds)) == 3
        assert len(list(Path(f"/sys/class/net/{name}/queues").glob("rx-*"))) == 3
        tap.set_queue(1, False)
        with pytest.raises(IoctlError, match="queue 1"):
            tap.set_queue(1, False)
        tap.set_queue(1, True)
        with pytest.raises(IoctlError, match="TUNSETIFF") as failed:
            Tap(name)
        assert failed.value.errno in (errno.EBUSY, errno.EINVAL)


def test_persistent(name: str) -> None:
    with Tap(name) as tap:
        tap.set_persistent(True)
    with Tap(name) as tap:
        assert tap.name == name
        tap.set_persistent(False)


def test_from_fd(name: str) -> None:
    with Tap(name, queue_pairs=2) as tap:
        again = Tap.from_fd(*(os.dup(fd) for fd in tap.fds))
        with again:
            assert again.name == name
            assert again.vnet_hdr
            assert again.features == tap.features
        reader, writer = os.pipe()
        with pytest.raises(IoctlError, match="not a descriptor of /dev/net/tun"):
            Tap.from_fd(reader)
        os.close(reader)
        os.close(writer)
        fresh = os.open("/dev/net/tun", os.O_RDWR)
        with pytest.raises(IoctlError, match="no interface belongs to it yet"):
            Tap.from_fd(fresh)
        os.close(fresh)
        with Tap() as other, pytest.raises(ValueError, match="queues of two taps"):
            Tap.from_fd(tap.fds[0], other.fds[0])
    with pytest.raises(ValueError, match="at least one"):
        Tap.from_fd()


def test_wrong_kinds(name: str) -> None:
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(
        fd, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1001)
    )  # TUNSETIFF, IFF_TUN | IFF_NO_PI
    with pytest.raises(IoctlError, match="it is a tun"):
        Tap.from_fd(fd)
    with pytest.raises(IoctlError, match="is no tap"):
        Tap(name)
    os.close(fd)
    with pytest.raises(IoctlError, match="is no tap"):
        Tap("lo")
    with Tap(name) as tap:
        with pytest.raises(IoctlError, match="another process has it") as failed:
            Tap(name)
        assert failed.value.errno == errno.EBUSY
        with pytest.raises(IoctlError, match="not an MTU"):
            tap.mtu = 1 << 20
        with pytest.raises(IoctlError):
            tap.mac = bytes.fromhex("010000000000")  # a group's address is nobody's
        with pytest.raises(ValueError, match="5 bytes"):
            tap.mac = bytes(5)
    with pytest.raises(ValueError, match="closed"):
        tap.fileno()
    with pytest.raises(ValueError, match="limit 15"):
        Tap("a" * 16)
    with pytest.raises(ValueError, match="at least 1"):
        Tap(queue_pairs=0)
    with pytest.raises(IoctlError, match="more queues"):
        Tap(queue_pairs=300)
