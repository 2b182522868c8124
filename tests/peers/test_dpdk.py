# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""DPDK's two ends on each other: that the harness counts what testpmd does, before anything of ours is
between or instead of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from peers.dpdk import Testpmd
from peers.support import require

pytestmark = pytest.mark.peer

ENOUGH = 10_000


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_packets_pass(tmp_path: Path, packed: bool) -> None:
    require("dpdk")
    path = tmp_path / "s"
    with Testpmd.backend(path) as back, Testpmd.frontend(path, packed=packed) as front:
        back.wait_for("new device status(0x0000000f)")
        back.command("set fwd rxonly")
        back.command("start")
        front.command("set fwd txonly")
        front.command("start")
        assert back.wait_for_packets(rx=ENOUGH).rx_errors == 0
        front.command("stop")
        assert front.packets().tx >= ENOUGH
        assert "Bye..." in front.quit()
        back.wait_for("vhost peer closed")
        assert "Bye..." in back.quit()


def test_server_and_client_the_other_way_round(tmp_path: Path) -> None:
    """The front-end listens, and a second back-end takes over from one that was killed."""
    require("dpdk")
    path = tmp_path / "s"
    with Testpmd.frontend(path, server=True) as front:
        front.wait_for("waiting for client connection")
        for _ in range(2):
            with Testpmd.backend(path, client=True) as back:
                back.wait_for("new device status(0x0000000f)")
                back.command("set fwd rxonly")
                back.command("start")
                front.command("set fwd txonly")
                front.command("start")
                back.wait_for_packets(rx=ENOUGH)
                front.command("stop")


def test_two_queue_pairs(tmp_path: Path) -> None:
    require("dpdk")
    path = tmp_path / "s"
    with Testpmd.backend(path, queues=2) as back, Testpmd.frontend(path, queues=2) as front:
        back.command("set fwd rxonly")
        back.command("start")
        front.command("set fwd txonly")
        front.command("start")
        back.wait_for_packets(rx=ENOUGH)
        front.command("stop")
        sent = front.command("show port xstats 0")
        for queue in range(2):
            assert re.search(rf"tx_q{queue}_good_packets: [1-9]", sent), sent
