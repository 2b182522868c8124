# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vhost serve net`` with DPDK's virtio_user as its client: both count the same."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from peers.dpdk import Testpmd
from peers.support import require
from test_cli import serving

pytestmark = pytest.mark.peer
KINDS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
PAIRS = pytest.mark.parametrize("pairs", [1, 2])

ENOUGH = 20_000


class Served:
    """A ``vhost serve net``, and the testpmd that is its guest."""

    def __init__(self, server: subprocess.Popen[str], front: Testpmd) -> None:
        self.server = server
        self.front = front

    def counters(self) -> dict[str, int]:
        assert self.server.stderr is not None
        self.server.send_signal(signal.SIGUSR1)
        found: dict[str, int] = json.loads(self.server.stderr.readline())
        return found

    def dropped(self) -> dict[str, int]:
        return {name: n for name, n in self.counters().items() if name.startswith("dropped") and n}

    def by_queue(self, direction: str) -> list[int]:
        said = self.front.command("show port xstats 0")
        return [int(n) for n in re.findall(rf"{direction}_q\d+_good_packets: (\d+)", said)]


@contextlib.contextmanager
def guest_on(path: Path, *options: object, packed: bool, pairs: int = 1, vdev: str = "") -> Iterator[Served]:
    require("dpdk")
    with (
        serving("net", "--socket-path", path, "--queue-pairs", pairs, *options) as server,
        Testpmd.frontend(path, packed=packed, queues=pairs, vdev=vdev) as front,
    ):
        yield Served(server, front)
        assert "Bye..." in front.quit()


@KINDS
@PAIRS
def test_what_it_sends(tmp_path: Path, packed: bool, pairs: int) -> None:
    with guest_on(tmp_path / "s", "--drop", packed=packed, pairs=pairs) as guest:
        guest.front.command("set fwd txonly")
        guest.front.command("start")
        guest.front.wait_for_packets(tx=ENOUGH)
        guest.front.command("stop")
        sent = guest.by_queue("tx")
        assert len(sent) == pairs
        assert all(sent)
        while (counters := guest.counters())["tx_frames"] < sum(sent):
            pass
        assert counters["tx_frames"] == sum(sent)
        assert counters["tx_bytes"] == 64 * sum(sent)
        assert not guest.dropped()


@KINDS
@PAIRS
def test_what_it_receives(tmp_path: Path, packed: bool, pairs: int) -> None:
    with guest_on(tmp_path / "s", "--source", 64, packed=packed, pairs=pairs) as guest:
        guest.front.command("set fwd rxonly")
        guest.front.command("start")
        packets = guest.front.wait_for_packets(rx=ENOUGH)
        assert packets.rx_errors == 0
        guest.front.command("stop")
        assert all(guest.by_queue("rx"))
        assert not guest.dropped()


@KINDS
@PAIRS
def test_an_echo(tmp_path: Path, packed: bool, pairs: int) -> None:
    with guest_on(tmp_path / "s", "--echo", packed=packed, pairs=pairs) as guest:
        guest.front.command("set fwd io")
        guest.front.command("start tx_first 2")
        assert guest.front.wait_for_packets(rx=ENOUGH, tx=ENOUGH).rx_errors == 0
        guest.front.command("stop")
        assert all(guest.by_queue("rx"))
        assert not guest.dropped()


@KINDS
@pytest.mark.parametrize("vdev", ["", "mrg_rxbuf=0,in_order=0"])
def test_frames_in_pieces(tmp_path: Path, packed: bool, vdev: str) -> None:
    """Of several mbufs, behind a header of its own: in a packed ring they are in an indirect table, some
    of them marked as writable."""
    with guest_on(tmp_path / "s", "--echo", packed=packed, vdev=vdev) as guest:
        guest.front.command("set txpkts 100,60,300")
        guest.front.command("set fwd txonly")
        guest.front.command("start")
        guest.front.wait_for_packets(tx=ENOUGH)
        guest.front.command("stop")
        counters = guest.counters()
        assert counters["tx_frames"] > 1000
        assert counters["tx_bytes"] == 460 * counters["tx_frames"]
        assert set(guest.dropped()) <= {"dropped_no_buffer"}  # nobody there receives
