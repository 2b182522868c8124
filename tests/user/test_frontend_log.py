# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The front-end starts and stops the dirty log of a back-end: ours, so this is about the two together."""

from __future__ import annotations

import os
import select
from pathlib import Path

import pytest

from devices.disks import HANDLERS, how, pattern, serving
from user.log_check import check_migration
from user.test_frontend import RawBackend, backend
from vhost.devices.blk import Blk as Device
from vhost.devices.rng import Rng as RngDevice
from vhost.dirty_log import DirtyLog
from vhost.drivers import Blk, Rng
from vhost.errors import InactiveFeature, InvalidLogAddress, RequestFailed, UnsupportedRequest
from vhost.features import ProtocolF, VhostF
from vhost.inprocess import InProcess
from vhost.memory import GuestMemory, Region
from vhost.user.frontend import Frontend
from vhost.user.frontend_base import WANTED

CONTENT = pattern(1 << 20)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(CONTENT)
    return path


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("handler", HANDLERS)
def test_both_roles(
    image: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_leaks: None,
    handler: str,
    packed: bool,
) -> None:
    with (
        serving(Device(image, **how(handler, monkeypatch)), tmp_path / "s") as server,
        server.connect() as frontend,
        Blk(frontend, packed=packed) as disk,
    ):
        check_migration(frontend, disk, CONTENT)


def test_a_driver_that_starts_meanwhile(image: Path, tmp_path: Path, no_leaks: None) -> None:
    """It negotiates and places its rings as if nobody logged."""
    with serving(Device(image), tmp_path / "s") as server, server.connect() as frontend:
        log = DirtyLog(1 << 40)
        frontend.start_log(log)
        with Blk(frontend) as disk:
            disk.read(0, 8)
            assert set(log.take()) > {disk.memory[0].guest_addr}
        assert not frontend.get_features() & VhostF.LOG_ALL


def test_a_ring_that_was_refused(image: Path, tmp_path: Path, no_leaks: None) -> None:
    """Where the back-end would not have it, it is not put again when logging starts."""
    with (
        serving(Device(image), tmp_path / "s") as server,
        server.connect() as frontend,
        Blk(frontend) as disk,
    ):
        (region,) = disk.memory
        with pytest.raises(RequestFailed):
            frontend.set_vring_addr(1, *[region.guest_addr] * 3)
        frontend.start_log(DirtyLog.for_memory(disk.memory))
        disk.read(0, 8)


def test_the_eventfd(tmp_path: Path, no_leaks: None) -> None:
    with serving(RngDevice(), tmp_path / "s") as server, server.connect() as frontend:
        changed = os.eventfd(0)
        frontend.set_log_fd(changed)
        with Rng(frontend) as rng:
            log = DirtyLog.for_memory(rng.memory)
            rng.read(16)
            assert not select.select([changed], [], [], 0)[0]
            frontend.start_log(log)
            rng.read(16)
            assert select.select([changed], [], [], 10)[0]
            assert log.take()
        with pytest.raises(UnsupportedRequest, match="SET_LOG_FD"):
            frontend.set_log_fd(None)
        os.close(changed)


def test_back_ends_that_cannot(image: Path, tmp_path: Path, no_leaks: None) -> None:
    log = DirtyLog(1 << 30)
    with serving(Device(image), tmp_path / "s") as server:
        wanted = int(WANTED) & ~int(ProtocolF.LOG_SHMFD)
        with server.connect(protocol_features=wanted) as frontend:
            with pytest.raises(InactiveFeature, match="SET_LOG_BASE"):
                frontend.start_log(log)
            frontend.set_features(0)

    def script(raw: RawBackend) -> None:
        raw.handshake(1 << 30 | 1 << 32, int(ProtocolF.LOG_SHMFD))
        with pytest.raises(EOFError):
            raw.receive()

    with backend(script) as sock, Frontend(sock) as frontend:
        with pytest.raises(InactiveFeature, match="LOG_ALL"):
            frontend.start_log(log)
    with InProcess(RngDevice()) as inside, pytest.raises(UnsupportedRequest, match="dirty log"):
        inside.start_log(log)


def test_a_log_that_does_not_cover(image: Path, tmp_path: Path, no_leaks: None) -> None:
    with serving(Device(image), tmp_path / "s") as server, server.connect() as frontend:
        low = Region.allocate(1 << 20, guest_addr=0)
        high = Region.allocate(1 << 20, guest_addr=1 << 30)
        frontend.set_mem_table(GuestMemory([low, high]))
        with pytest.raises(InvalidLogAddress, match="ends at 0x40100000"):
            frontend.start_log(DirtyLog(1 << 30))
        frontend.set_mem_table(GuestMemory([low]))
        frontend.start_log(DirtyLog(1 << 30))
        with pytest.raises(InvalidLogAddress):
            frontend.set_mem_table(GuestMemory([low, high]))
        frontend.set_log_base(DirtyLog(1 << 31))
        frontend.set_mem_table(GuestMemory([low, high]))


def test_what_is_sent(no_leaks: None) -> None:
    """The bytes, as the specification has them."""
    seen: list[tuple[int, bytes]] = []

    def script(raw: RawBackend) -> None:
        raw.handshake(1 << 26 | 1 << 30 | 1 << 32, int(ProtocolF.LOG_SHMFD))
        for _ in range(8):
            number, _, payload = raw.receive()
            seen.append((number, payload))
            if number == 6:
                raw.reply(6, bytes(8))

    with backend(script) as sock, Frontend(sock) as frontend:
        region = Region.allocate(1 << 16, guest_addr=1 << 20, user_addr=1 << 40)
        frontend.set_mem_table(GuestMemory([region]))
        frontend.set_features(1 << 32)
        at = 1 << 20
        frontend.set_vring_addr(0, at, at + 0x1000, at + 0x2000)
        frontend.start_log(DirtyLog.for_memory(GuestMemory([region])))
        frontend.stop_log()
    names = dict(seen)
    assert [number for number, _ in seen] == [5, 2, 9, 6, 2, 9, 2, 9]
    assert names[6] == (40).to_bytes(8, "little") + bytes(8), "64 KiB above 1 MiB are 272 pages, in words"
    first, again, last = (payload for number, payload in seen if number == 9)
    user = 1 << 40
    words = [int.from_bytes(again[at : at + 8], "little") for at in range(8, 40, 8)]
    assert int.from_bytes(first[4:8], "little") == 0
    assert int.from_bytes(again[:8], "little") == 1 << 32, "ring 0, flag 1"
    assert last[:8] == bytes(8)
    assert words == [user, user + 0x2000, user + 0x1000, at + 0x2000]
    features = [int.from_bytes(payload, "little") for number, payload in seen if number == 2]
    assert features == [1 << 30 | 1 << 32, 1 << 26 | 1 << 30 | 1 << 32, 1 << 30 | 1 << 32]
