# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""DPDK's net_vhost marks in our log what it writes: frames, and its rings."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from peers.dpdk import Testpmd
from peers.support import DEADLINE, require
from user.log_check import contents
from vhost import Frontend, drivers
from vhost.dirty_log import DirtyLog
from vhost.features import ProtocolF

pytestmark = pytest.mark.peer

OURS, ALL = bytes.fromhex("020000000001"), b"\xff" * 6
ARP = struct.Struct("!HHBBH6s4s6s4s")


def arp_request(last: int) -> bytes:
    ask = ARP.pack(1, 0x0800, 6, 4, 1, OURS, bytes((10, 0, 0, 1)), bytes(6), bytes((10, 0, 0, last)))
    return (ALL + OURS + b"\x08\x06" + ask).ljust(60, b"\0")


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_frames_are_in_our_log(tmp_path: Path, packed: bool) -> None:
    require("dpdk")
    path = tmp_path / "s"
    with (
        Testpmd.backend(path) as back,
        Frontend.connect(path, timeout=DEADLINE) as frontend,
        drivers.Net(frontend, packed=packed) as nic,
    ):
        assert frontend.protocol_features & ProtocolF.LOG_SHMFD
        back.wait_for("new device status(0x0000000f)")
        back.command("set fwd icmpecho")
        back.command("start")

        def answered(last: int) -> bytes:
            nic.send(arp_request(last))
            reply = nic.recv(DEADLINE)
            assert reply is not None
            assert ARP.unpack(reply[14:42])[4::2] == (2, bytes((10, 0, 0, last)), bytes((10, 0, 0, 1)))
            return reply

        log = DirtyLog.for_memory(nic.memory)
        answered(9)
        frontend.start_log(log)
        log.take()
        for last in range(10, 20):
            reply = answered(last)
            marked = set(log.take())
            written = {page for page, data in contents(nic.memory).items() if reply[:42] in data}
            assert written
            assert written <= marked
        frontend.stop_log()
        log.take()
        answered(20)
        assert log.take() == []
