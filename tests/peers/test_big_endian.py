# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A guest of the other byte order: the firmware of QEMU's PowerPC machine, whose legacy drivers are
big-endian, looks for a server to boot from. QEMU says so with SET_VRING_ENDIAN."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import threading
from pathlib import Path

import pytest

import vhost
from peers.catalogue import QEMU_PPC
from peers.support import require
from user import hostile as h

pytestmark = pytest.mark.guest

MAC = bytes.fromhex("525400654321")
SERVER, CLIENT = bytes((10, 9, 8, 7)), bytes((10, 9, 8, 99))
NET_HEADER = bytes(10)  # struct virtio_net_hdr of a legacy driver; nothing in it is a number other than 0
DISCOVER, OFFER, REQUEST = 1, 2, 3
MAGIC = bytes.fromhex("63825363")
DHCP = slice(14 + 20 + 8, None)  # behind Ethernet, IP and UDP


class DhcpServer(vhost.Device):
    """A network with one server on it, that offers an address and hears whether it is wanted."""

    device_id = vhost.DeviceId.NET
    queues = ("rx", "tx")
    cross_endian = True

    def __init__(self) -> None:
        self.frames: list[tuple[bool, bytes]] = []
        self.outbox: list[bytes] = []
        self.receiver: vhost.DeviceQueue | None = None
        self.requested = threading.Event()

    def rx(self, queue: vhost.DeviceQueue) -> None:
        self.receiver = queue
        self.deliver()

    def deliver(self) -> None:
        while self.outbox and self.receiver is not None:
            chain = self.receiver.pop()
            if chain is None:
                return
            self.receiver.push(chain, chain.write(NET_HEADER + self.outbox.pop(0)))

    def stop_queue(self, queue: vhost.DeviceQueue) -> None:
        if queue is self.receiver:
            self.receiver = None

    def tx(self, queue: vhost.DeviceQueue) -> None:
        for chain in queue:
            frame = chain.read()[len(NET_HEADER) :]
            queue.push(chain, 0)
            self.frames.append((queue.big_endian, frame))
            kind = dhcp_type(frame)
            if kind == DISCOVER:
                self.outbox.append(offer(frame))
            elif kind == REQUEST and CLIENT in frame:
                self.requested.set()
        self.deliver()


def dhcp_type(frame: bytes) -> int | None:
    """Option 53 of a DHCP message."""
    options = frame[DHCP][240:]
    if frame[DHCP][236:240] != MAGIC:
        return None
    at = 0
    while at + 2 < len(options) and options[at] != 255:
        if options[at] == 53:
            return options[at + 2]
        at += 1 if options[at] == 0 else 2 + options[at + 1]
    return None


def offer(frame: bytes) -> bytes:
    """The answer to a DISCOVER (RFC 2131)."""
    asked = frame[DHCP]
    message = struct.pack(">BBBB4sHH4s4s4s4s16s64s128s", 2, 1, 6, 0, asked[4:8], 0, 0x8000, bytes(4), CLIENT,
                          SERVER, bytes(4), asked[28:44], b"", b"")  # fmt: skip
    options = bytes((53, 1, OFFER, 54, 4)) + SERVER + bytes((51, 4, 0, 0, 14, 16, 1, 4, 255, 0, 0, 0, 255))
    message += MAGIC + options.ljust(64, b"\0")
    udp = struct.pack(">HHHH", 67, 68, 8 + len(message), 0) + message
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0, SERVER, b"\xff\xff\xff\xff")
    total = sum(struct.unpack(">10H", head))
    head = head[:10] + struct.pack(">H", ~(total + (total >> 16)) & 0xFFFF) + head[12:]
    return b"\xff" * 6 + bytes.fromhex("525400000001") + b"\x08\x00" + head + udp


def command(socket_path: Path) -> list[str]:
    machine = "pseries,memory-backend=m0,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off"
    return [
        *(f"{QEMU_PPC}/usr/bin/qemu-system-ppc64", "-L", f"{QEMU_PPC}/usr/share/qemu", "-M", machine),
        *("-accel", "tcg", "-m", "256", "-nodefaults", "-nographic", "-serial", "stdio", "-no-reboot"),
        *("-object", "memory-backend-memfd,id=m0,size=256M,share=on"),
        *("-chardev", f"socket,id=c0,path={socket_path}", "-netdev", "vhost-user,id=n0,chardev=c0"),
        "-device",
        f"virtio-net-pci,netdev=n0,mac={MAC.hex(':')},disable-modern=on,disable-legacy=off,romfile=,bootindex=1",
    ]


def test_legacy_driver_of_a_big_endian_guest(tmp_path: Path) -> None:
    """It sends what we understand, and understands what we answer: it wants the address it was offered."""
    require("qemu", "qemu-ppc")
    device = DhcpServer()
    log = tmp_path / "console"
    with h.served(device, tmp_path / "s"), log.open("wb") as file:
        process = subprocess.Popen(
            command(tmp_path / "s"),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            requested = device.requested.wait(120)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    console = log.read_text(errors="replace")
    assert device.frames, console
    assert all(big_endian for big_endian, _ in device.frames)
    assert device.frames[0][1][:12] == b"\xff" * 6 + MAC
    assert dhcp_type(device.frames[0][1]) == DISCOVER
    assert requested, console
