# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The net suite's programs work together, and what comes out is verified: one cell, for a moment."""

from __future__ import annotations

import pytest

from benchmarks import net, net_verify
from benchmarks.facts import DPDK, OURS
from benchmarks.net_peers import LOOP
from benchmarks.suite import Suite, again, cell
from peers.support import require

pytestmark = pytest.mark.peer


def test_a_cell_of_it() -> None:
    require("dpdk")
    suite = Suite("net", quick=True)
    where = cell(format=net.PACKED, direction=LOOP, size=64)
    net.measure(suite, [where], 1, 1, warm_up=0.01, window=0.02)
    assert [series.subject for series in suite.series] == [OURS, DPDK, again(OURS)]
    assert all(series.cell == where and series.samples.median() > 0 for series in suite.series)


@pytest.mark.parametrize("spoil", [b"\x00", b""])
def test_frames_that_are_not_as_made(spoil: bytes) -> None:
    """What it is to notice."""
    payload = bytes(i & 0xFF for i in range(50))
    frame = bytes(12) + net_verify.SOURCE_TYPE + payload
    assert net_verify._counted_up(frame)
    assert not net_verify._counted_up(frame[:-1] + spoil if spoil else frame[:12] + bytes(2) + payload)
    udp = bytes(12) + b"\x08\x00" + bytes.fromhex("4500003200000000401100000000000000000000") + bytes(30)
    sum_ = sum(int.from_bytes(udp[i : i + 2], "big") for i in range(14, 34, 2))
    sum_ = 0xFFFF - ((sum_ & 0xFFFF) + (sum_ >> 16))
    udp = udp[:24] + sum_.to_bytes(2, "big") + udp[26:38] + (30).to_bytes(2, "big") + udp[40:]
    assert net_verify._udp(udp)
    assert not net_verify._udp(udp[:20] + b"\x01" + udp[21:] if spoil else udp + b"x")
