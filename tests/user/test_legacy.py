# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Rings of legacy drivers that have the other byte order (SET_VRING_ENDIAN)."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

import model
import vhost
from rig import Rig
from user import hostile as h
from user.hostile import RawFrontend
from user.test_lifecycle import Guest
from vhost.errors import InvalidQueue
from vhost.features import ProtocolF

SET_VRING_ENDIAN = 23
EVENT_IDX = 1 << 29
LITTLE, BIG = 0, 1


class Mute(vhost.Device):
    device_id = vhost.DeviceId.BLOCK
    queues = ("requestq",)


@contextlib.contextmanager
def legacy_on(path: Path, features: int = 0) -> Iterator[RawFrontend]:
    with (
        h.served(vhost.devices.Rng(), path),
        contextlib.closing(RawFrontend(path)) as raw,
    ):
        offered = raw.ask(h.GET_PROTOCOL_FEATURES).u64
        raw.send(h.SET_PROTOCOL_FEATURES, h.u64(offered & ~h.GPA_ADDRESSES))
        assert raw.status(h.SET_OWNER) == 0
        assert raw.status(h.SET_FEATURES, h.u64(features | h.PROTOCOL_FEATURES)) == 0
        assert raw.share_memory() == 0
        yield raw


@pytest.mark.parametrize("features", [0, EVENT_IDX])
@pytest.mark.parametrize("order", [LITTLE, BIG])
def test_ring_in_the_order_of_its_guest(tmp_path: Path, order: int, features: int, no_leaks: None) -> None:
    with legacy_on(tmp_path / "s", features) as raw:
        region = vhost.Region.from_fd(raw.memfd, h.SIZE, guest_addr=h.GUEST, user_addr=h.USER)
        ram = model.Ram([(h.GUEST, memoryview(region))], ">" if order == BIG else "<")
        areas = model.Areas(h.GUEST, h.GUEST + 0x1000, h.GUEST + 0x2000)
        driver = model.SplitDriver(ram, h.NUM, areas, event_idx=bool(features), start=0xFFF0)
        assert raw.status(SET_VRING_ENDIAN, h.state(0, order)) == 0
        assert raw.status(h.SET_VRING_NUM, h.state(0, h.NUM)) == 0
        assert raw.status(h.SET_VRING_BASE, h.state(0, 0xFFF0)) == 0
        assert raw.status(h.SET_VRING_ADDR, h.address(0)) == 0
        assert raw.status(h.SET_VRING_CALL, h.u64(0), [raw.call]) == 0
        assert raw.status(h.SET_VRING_KICK, h.u64(0), [raw.kick]) == 0
        assert raw.status(h.SET_VRING_ENABLE, h.state(0, 1)) == 0
        data = h.GUEST + 0x4000
        for _ in range(40):
            ram.write(data, bytes(0x300))
            head = driver.add([], [(data, 0x100), (data + 0x200, 0x100)])
            if driver.need_kick():
                os.eventfd_write(raw.kick, 1)
            used: list[tuple[int, int]] = []
            while not used:
                assert select.select([raw.call], [], [], 20)[0]
                os.eventfd_read(raw.call)
                used = driver.get_used()
                driver.want_call(0)
            assert used == [(head, 0x200)]
            assert ram.read(data, 0x100) != bytes(0x100), "filled"
            assert ram.read(data + 0x100, 0x100) == bytes(0x100), "and nothing else"
        assert raw.ask(h.GET_VRING_BASE, h.state(0, 0)).payload == h.state(0, (0xFFF0 + 40) & 0xFFFF)


def test_orders_that_are_refused(tmp_path: Path, no_leaks: None) -> None:
    with legacy_on(tmp_path / "s") as raw:
        assert raw.status(SET_VRING_ENDIAN, h.state(0, 2)) != 0
        assert raw.status(SET_VRING_ENDIAN, h.state(1, BIG)) != 0, "there is no ring 1"
        raw.start_ring()
        assert raw.status(SET_VRING_ENDIAN, h.state(0, BIG)) != 0, "it has started"
        assert raw.ask(h.GET_VRING_BASE, h.state(0, 0))
        assert raw.status(SET_VRING_ENDIAN, h.state(0, BIG)) == 0


def test_rings_are_little_endian_since_virtio_1(tmp_path: Path, no_leaks: None) -> None:
    """Whatever a guest before this one said."""
    with legacy_on(tmp_path / "s") as raw:
        assert raw.status(SET_VRING_ENDIAN, h.state(0, BIG)) == 0
        assert raw.status(h.SET_FEATURES, h.u64(h.VERSION_1 | h.PROTOCOL_FEATURES)) == 0
        assert raw.status(SET_VRING_ENDIAN, h.state(0, BIG)) != 0
        assert raw.status(SET_VRING_ENDIAN, h.state(0, LITTLE)) == 0
    with legacy_on(tmp_path / "s") as raw, contextlib.closing(Guest(raw)) as guest:
        assert raw.status(SET_VRING_ENDIAN, h.state(0, BIG)) == 0
        assert raw.status(h.SET_FEATURES, h.u64(h.VERSION_1 | h.PROTOCOL_FEATURES)) == 0
        raw.start_ring()
        guest.offer()
        guest.kick()
        guest.wait_used(1)


def test_a_reset_forgets_the_order(tmp_path: Path, no_leaks: None) -> None:
    with legacy_on(tmp_path / "s") as raw, contextlib.closing(Guest(raw)) as guest:
        assert raw.status(SET_VRING_ENDIAN, h.state(0, BIG)) == 0
        assert raw.status(h.RESET_DEVICE) == 0
        raw.start_ring()
        guest.offer()
        guest.kick()
        guest.wait_used(1)


def test_devices_that_do_not_say_so_are_not_asked(tmp_path: Path, no_leaks: None) -> None:
    """The numbers in a disk's requests would be read in the wrong order."""
    with h.served(Mute(), tmp_path / "s"), contextlib.closing(RawFrontend(tmp_path / "s")) as raw:
        offered = raw.ask(h.GET_PROTOCOL_FEATURES).u64
        assert not offered & ProtocolF.CROSS_ENDIAN
        raw.send(h.SET_PROTOCOL_FEATURES, h.u64(offered))
        assert raw.status(SET_VRING_ENDIAN, h.state(0, BIG)) != 0
    with h.served(vhost.devices.Rng(), tmp_path / "s"), vhost.Frontend.connect(tmp_path / "s") as frontend:
        assert frontend.protocol_features & ProtocolF.CROSS_ENDIAN
        frontend.set_vring_endian(0, big=True)
        with pytest.raises(vhost.ProtocolError, match="SET_VRING_ENDIAN"):
            frontend.set_vring_endian(1, big=False)


def test_no_legacy_driver_has_packed_rings() -> None:
    rig = Rig(8, packed=True)
    with pytest.raises(InvalidQueue, match="little-endian"):
        rig.device(big_endian=True)
    assert not rig.device().big_endian
    assert Rig(8, big_endian=True).device().big_endian
