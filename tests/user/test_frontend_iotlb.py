# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A front-end that is an IOMMU: misses in the middle of its own requests, and drivers behind it."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

import vhost
from user import hostile as h
from user.iommu import ACCESS_FAIL, ACCESS_PLATFORM, BACKEND_IOTLB_MSG, IOTLB_MSG, MISS
from user.test_frontend import RawBackend, backend
from vhost.errors import InvalidGuestMemory, RequestFailed
from vhost.features import ProtocolF
from vhost.iotlb import Access, IotlbMessage, IotlbType
from vhost.memory import GuestMemory, Region
from vhost.user.frontend import WANTED

BODY = struct.Struct("=QQQBB6x")
PROTOCOL = int(ProtocolF.REPLY_ACK | ProtocolF.BACKEND_REQ)
FEATURES = h.VERSION_1 | h.PROTOCOL_FEATURES | ACCESS_PLATFORM
PAGE = 4096


class Asking(RawBackend):
    """A back-end by hand that asks questions of its own."""

    def begin(self) -> None:
        self.handshake(FEATURES, PROTOCOL)
        self.channel = socket.socket(fileno=self.fds.pop())
        self.channel.settimeout(20)
        number, _, payload = self.receive()
        assert (number, payload) == (h.SET_FEATURES, h.u64(FEATURES))
        self.reply(number, h.u64(0))

    def ask(self, iova: int, access: int = 3, kind: int = MISS) -> None:
        body = BODY.pack(iova, 0, 0, access, kind)
        self.channel.sendall(h.HEADER.pack(BACKEND_IOTLB_MSG, h.VERSION | h.NEED_REPLY, len(body)) + body)

    def answer(self) -> int:
        data = b""
        while len(data) < 20:
            part = self.channel.recv(20 - len(data))
            assert part
            data += part
        number, flags, size = h.HEADER.unpack(data[:12])
        assert (number, flags & h.REPLY, size) == (BACKEND_IOTLB_MSG, h.REPLY, 8)
        return int.from_bytes(data[12:], "little")

    def update(self) -> tuple[int, int, int, int, int]:
        number, flags, payload = self.receive()
        assert number == IOTLB_MSG
        assert flags & h.NEED_REPLY  # DPDK's vhost answers only then
        iova, size, user, access, kind = BODY.unpack(payload)
        return iova, size, user, access, kind

    def close(self) -> None:
        with contextlib.suppress(AttributeError):
            self.channel.close()
        super().close()


@contextlib.contextmanager
def asking(script: object) -> Iterator[vhost.Frontend]:
    def run(raw: RawBackend) -> None:
        raw.__class__ = Asking
        assert isinstance(raw, Asking)
        raw.begin()
        script(raw)  # type: ignore[operator]

    with backend(run) as sock, vhost.Frontend(sock) as frontend:
        frontend.set_features(h.VERSION_1 | ACCESS_PLATFORM)
        yield frontend


def test_a_miss_while_our_own_request_waits(no_leaks: None) -> None:
    """The back-end answers neither before it has the other's: each reply still finds its request."""

    def script(raw: Asking) -> None:
        number, _, _ = raw.receive()
        assert number == h.GET_VRING_BASE
        raw.ask(0x5008, access=2)
        assert raw.update() == (0x5000, PAGE, 0x7000, 3, 2)
        # In the order of the requests: the outer one's comes first.
        raw.reply(h.GET_VRING_BASE, h.state(1, 99))
        raw.reply(IOTLB_MSG, h.u64(0))
        assert raw.answer() == 0
        number, _, _ = raw.receive()
        raw.reply(number, h.state(1, 100))

    with asking(script) as frontend:
        missed: list[IotlbMessage] = []

        def miss(message: IotlbMessage) -> None:
            missed.append(message)
            frontend.iotlb_update(message.iova & -PAGE, PAGE, 0x7000)

        frontend.on_iotlb_miss = miss
        assert frontend.get_vring_base(1) == 99
        assert missed == [IotlbMessage(IotlbType.MISS, 0x5008, access=Access.WO)]
        assert frontend.get_vring_base(1) == 100
        assert not frontend.session.outstanding


def test_a_failed_update_is_the_answer_to_the_miss_alone(no_leaks: None) -> None:
    def script(raw: Asking) -> None:
        raw.receive()
        raw.ask(0x5000)
        raw.update()
        raw.reply(h.GET_VRING_BASE, h.state(0, 3))
        raw.reply(IOTLB_MSG, h.u64(7))
        assert raw.answer() != 0

    with asking(script) as frontend:
        errors: list[RequestFailed] = []

        def miss(message: IotlbMessage) -> None:
            try:
                frontend.iotlb_update(message.iova, PAGE, 0x7000)
            except RequestFailed as error:
                errors.append(error)
                raise

        frontend.on_iotlb_miss = miss
        assert frontend.get_vring_base(0) == 3
        assert [error.status for error in errors] == [7]


def test_misses_without_end_do_not_nest(no_leaks: None) -> None:
    count = 2000  # deeper than Python goes

    def script(raw: Asking) -> None:
        raw.receive()
        for _ in range(64):
            raw.ask(0x5000)
        for n in range(count):
            raw.update()
            if n + 64 < count:
                raw.ask(0x5000)
            if not n:
                raw.reply(h.GET_VRING_BASE, h.state(0, 3))
            raw.reply(IOTLB_MSG, h.u64(0))
            assert raw.answer() == 0

    with asking(script) as frontend:
        frontend.on_iotlb_miss = lambda message: frontend.iotlb_update(message.iova, PAGE, 0x7000)
        assert frontend.get_vring_base(0) == 3
        while frontend.step():
            select.select([frontend], [], [], 20)


def test_what_is_no_question(no_leaks: None) -> None:
    def script(raw: Asking) -> None:
        raw.receive()
        for kind in (0, 2, 3, 5, 0xFF):
            raw.ask(0x5000, kind=kind)
            assert raw.answer() != 0
        raw.ask(0x5000, access=4)
        assert raw.answer() != 0
        raw.ask(0x5000, access=2, kind=ACCESS_FAIL)
        assert raw.answer() == 0
        raw.reply(h.GET_VRING_BASE, h.state(0, 3))

    with asking(script) as frontend:
        failed: list[IotlbMessage] = []
        frontend.on_iotlb_access_fail = failed.append
        frontend.on_iotlb_miss = lambda message: pytest.fail(f"{message} is no miss")
        assert frontend.get_vring_base(0) == 3
        assert failed == [IotlbMessage(IotlbType.ACCESS_FAIL, 0x5000, access=Access.WO)]


def test_nothing_is_mapped_there(no_leaks: None) -> None:
    """By default IOVAs are guest addresses, of which there are none here."""

    def script(raw: Asking) -> None:
        raw.receive()
        raw.ask(0x5000)
        assert raw.answer() != 0
        raw.reply(h.GET_VRING_BASE, h.state(0, 3))

    with asking(script) as frontend:
        assert frontend.get_vring_base(0) == 3


# -- drivers behind our own back-end -------------------------------------------------------------------


@pytest.fixture(params=["c", "python"])
def disk(request: pytest.FixtureRequest, tmp_path: Path, no_leaks: None) -> Iterator[Path]:
    image = tmp_path / "disk"
    image.write_bytes(b"\x5a" * 64 * 512)
    device = vhost.devices.Blk(image, handler=request.param)
    with contextlib.closing(device), h.served(device, tmp_path / "s"):
        yield tmp_path / "s"


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_driver_behind_an_iommu(disk: Path, packed: bool) -> None:
    with vhost.Frontend.connect(disk) as frontend:
        assert not frontend.get_features() & ACCESS_PLATFORM
        frontend.behind_iommu = True
        with vhost.drivers.Blk(frontend, packed=packed) as driver:
            assert driver.negotiated & ACCESS_PLATFORM
            assert bytes(driver.read(0, 8)) == b"\x5a" * 4096
            driver.write(8, b"\x11" * 512)
            assert bytes(driver.read(8, 1)) == b"\x11" * 512


class ByPage(vhost.Frontend):
    """Maps the page that was missed, when it is."""

    def set_mem_table(self, memory: GuestMemory) -> None:
        (self.region,) = memory
        super().set_mem_table(memory)

    def miss(self, message: IotlbMessage) -> None:
        page = message.iova & -PAGE
        self.missed.append(page)
        self.iotlb_update(page, PAGE, self.region.user_addr + page - self.region.guest_addr, message.access)

    missed: list[int]
    region: Region


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("gpa", [False, True], ids=["user addresses", "guest addresses"])
def test_page_by_page(disk: Path, packed: bool, gpa: bool) -> None:
    """Rings are missed while they are set up, in the middle of SET_VRING_KICK; buffers when they are used;
    and all of it again after it was taken away, under requests that the device has."""
    wanted = int(WANTED) & ~(0 if gpa else int(ProtocolF.GPA_ADDRESSES))
    with ByPage.connect(disk, protocol_features=wanted) as frontend:
        frontend.missed = []
        frontend.behind_iommu = True
        frontend.on_iotlb_miss = frontend.miss
        with vhost.drivers.Blk(frontend, packed=packed) as driver:
            ring = set(frontend.missed)
            assert len(ring) in (1, 2, 3)
            for _ in range(20):
                frontend.missed.clear()
                driver.submit_read(0, 8)
                call = driver.queues[0].call_fd
                while not (done := driver.poll()):
                    ready, _, _ = select.select([frontend, call], [], [], 20)
                    assert ready, "it hangs"
                    if call in ready:
                        os.eventfd_read(call)
                    frontend.step()
                assert [bytes(one.data) for one in done] == [b"\x5a" * 4096]
                assert frontend.missed
                frontend.iotlb_invalidate(0, 0)


def test_updates_that_the_back_end_refuses(disk: Path) -> None:
    with vhost.Frontend.connect(disk) as frontend:
        frontend.behind_iommu = True
        with vhost.drivers.Blk(frontend) as driver:
            (region,) = driver.memory
            with pytest.raises((RequestFailed, InvalidGuestMemory)):
                frontend.iotlb_update(0x1000, PAGE, region.user_addr - 1)
            with pytest.raises(RequestFailed, match="UPDATE of IOVA 0x1000, size 0x0"):
                frontend.iotlb_update(0x1000, 0, region.user_addr)
            assert bytes(driver.read(0, 1)) == b"\x5a" * 512
