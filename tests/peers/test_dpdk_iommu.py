# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Our front-end as the IOMMU of DPDK's vhost: its IOTLB is filled by us, all at once or page by page."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peers.dpdk import Testpmd
from peers.support import require
from vhost.drivers import Net
from vhost.features import NetF, VirtioF
from vhost.iotlb import Access, IotlbMessage
from vhost.memory import GuestMemory, Region
from vhost.user.frontend import Frontend

pytestmark = pytest.mark.peer

PAGE = 4096
FRAMES = 100
FRAMES_BY_PAGE = 20  # each costs DPDK several misses, one after the other


def frame(number: int) -> bytes:
    # To everybody, so that nobody minds whose it is; an EtherType for experiments (IEEE 802, 9.2.3).
    return b"\xff" * 6 + b"\x02\0\0\0\0\x01" + b"\x88\xb5" + number.to_bytes(4, "big") + bytes(60)


class Pages(Frontend):
    """Maps a page for each miss."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.missed: Counter[int] = Counter()
        self.shared: tuple[Region, ...] = ()
        super().__init__(*arguments, **options)

    def set_mem_table(self, memory: GuestMemory) -> None:
        self.shared = tuple(memory)
        super().set_mem_table(memory)

    def miss(self, miss: IotlbMessage) -> None:
        (region,) = self.shared
        page = miss.iova & -PAGE
        self.missed[page] += 1
        self.iotlb_update(page, PAGE, region.user_addr + (page - region.guest_addr), Access.RW)


@contextlib.contextmanager
def stepping(frontend: Frontend) -> Iterator[None]:
    """Somebody answers misses; whoever uses the rings meanwhile makes no requests."""
    end = os.eventfd(0)

    def run() -> None:
        while True:
            ready, _, _ = select.select([frontend, end], [], [])
            if end in ready:
                return
            frontend.step()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        os.eventfd_write(end, 1)
        thread.join()
        os.close(end)


def there_and_back(nic: Net, data: bytes, *, patient: bool) -> None:
    """A frame that comes while a mapping for it is missed is dropped, for a NIC may do that."""
    deadline = time.monotonic() + 60
    while True:
        nic.send(data)
        wait = 0.1 if patient else 60.0
        while (got := nic.recv(timeout=wait)) is not None:
            if got == data:
                return
        assert patient, "the frame did not come back"
        assert time.monotonic() < deadline, "nothing comes back"


@pytest.mark.parametrize(
    ("packed", "by_page"),
    [(False, False), (True, False), (False, True)],
    ids=["split-whole", "packed-whole", "split-page-by-page"],
)
def test_frames_come_back(tmp_path: Path, packed: bool, by_page: bool) -> None:
    require("dpdk")
    path = tmp_path / "s"
    with Testpmd.backend(path, vdev="iommu-support=1") as back:
        back.command("set fwd io")
        back.command("start")
        with Pages.connect(path) as frontend:
            if by_page:
                frontend.on_iotlb_miss = frontend.miss
            frontend.behind_iommu = True
            with Net(frontend, packed=packed, without=int(NetF.MRG_RXBUF)) as nic:
                assert nic.negotiated & VirtioF.ACCESS_PLATFORM
                with stepping(frontend):
                    for number in range(FRAMES_BY_PAGE if by_page else FRAMES):
                        there_and_back(nic, frame(number), patient=by_page)
            # Rings and buffers are more than a few pages, and each was asked for.
            assert (len(frontend.missed) > 8) == by_page
