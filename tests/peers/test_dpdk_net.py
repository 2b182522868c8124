# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vhost serve net`` with DPDK's virtio_user as its client, and our network driver on DPDK's net_vhost: what
passes is the same at both ends, byte for byte, and both count the same. Each with both kinds of rings, one
pair of queues and two, and buffers that are merged and that are not; without hugepages."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from peers.dpdk import DEADLINE, Packets, Testpmd
from peers.support import require
from test_cli import serving
from vhost.drivers import Net as Driver
from vhost.features import NetF
from vhost.user.frontend import Frontend

pytestmark = pytest.mark.peer
KINDS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
PAIRS = pytest.mark.parametrize("pairs", [1, 2])
MERGEABLE = pytest.mark.parametrize("mergeable", [True, False], ids=["mergeable", "one buffer"])

ENOUGH = 20_000


class Served:
    """A ``vhost serve net``, and the testpmd that is its guest."""

    def __init__(self, server: subprocess.Popen[str], front: Testpmd, devices: int = 1) -> None:
        self.server = server
        self.front = front
        self.devices = devices

    def counters(self) -> dict[str, int]:
        """Those of all its devices together."""
        assert self.server.stderr is not None
        self.server.send_signal(signal.SIGUSR1)
        found: Counter[str] = Counter()
        for _ in range(self.devices):
            found.update(json.loads(self.server.stderr.readline()))
        return found

    def dropped(self) -> dict[str, int]:
        return {name: n for name, n in self.counters().items() if name.startswith("dropped") and n}

    def by_queue(self, direction: str) -> list[int]:
        return by_queue(self.front, direction)


def by_queue(pmd: Testpmd, direction: str) -> list[int]:
    """Frames that each of its queues has counted: direction "rx" or "tx"."""
    said = pmd.command("show port xstats 0")
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


# -- byte for byte -----------------------------------------------------------------------------------

BURSTS = (1, 2, 7, 32, 33, 60)
LONGEST = 1514


class Loop:
    """Our driver, and a testpmd that sends back on the same pair what it is sent."""

    def __init__(self, pmd: Testpmd, nic: Driver, ours: Callable[[], object] = str) -> None:
        """``ours``: what our back-end says of itself, should frames be missing."""
        self.pmd = pmd
        self.nic = nic
        self.ours = ours
        self.serial = 0
        for pair in range(nic.queue_pairs):
            self._wait_ready(pair)

    def frame(self, pair: int, size: int) -> bytes:
        self.serial += 1
        head = bytes.fromhex("0200000000ee") + self.nic.mac + b"\x88\xb5" + self.serial.to_bytes(4, "big")
        return (head + bytes([pair]) + random.Random(self.serial).randbytes(size))[:size]

    def _wait_ready(self, pair: int) -> None:
        """What is sent before testpmd looks may be lost; behind a frame that came, nothing is."""
        deadline = time.monotonic() + DEADLINE
        while True:
            assert time.monotonic() < deadline, self.pmd.log()
            self.nic.send(last := self.frame(pair, 60), pair=pair)
            if came := self.nic.recv(0.2, pair=pair):
                while came != last:
                    came = self.nic.recv(DEADLINE, pair=pair)
                    assert came is not None
                return

    def _settled(self) -> Packets:
        """What testpmd counted: it does so a moment after it sent a burst."""
        packets = self.pmd.packets()
        while True:
            time.sleep(0.05)
            packets, before = self.pmd.packets(), packets
            if packets == before:
                return packets

    def run(self, longest: int = LONGEST, *, by_pair: bool = True) -> None:
        """Bursts on all pairs at once. Each pair gives back its own, in order; testpmd counts as many."""
        nic, pick = self.nic, random.Random(longest)
        before = self._settled()
        by_queue_before = {direction: by_queue(self.pmd, direction) for direction in ("rx", "tx")}
        sent: Counter[int] = Counter()
        for number, burst in enumerate(BURSTS * 4):
            sizes = [pick.choice((60, longest, pick.randrange(60, longest))) for _ in range(burst)]
            frames = {
                pair: [self.frame(pair, size) for size in sizes]
                for pair in range(nic.queue_pairs)
            }
            for pair, some in frames.items():
                assert nic.send_batch(some, pair=pair) == burst
                sent[pair] += burst
            for pair, some in frames.items():
                got: list[bytes] = []
                while len(got) < burst:
                    more = nic.recv_batch(burst, DEADLINE, pair=pair)
                    where = f"burst {number}, pair {pair}: {len(got)} of {burst}"
                    assert more, f"{where}; {self.ours()}\n{self.pmd.log()}"
                    got += more
                assert got == some
        assert nic.recv_batch(1, 0) == []
        self.nic.flush(DEADLINE)
        total = sum(sent.values())
        after = self._settled()
        assert (after.rx - before.rx, after.tx - before.tx, after.rx_errors) == (total, total, 0)
        if by_pair:
            for direction, was in by_queue_before.items():
                grew = [b - a for a, b in zip(was, by_queue(self.pmd, direction), strict=True)]
                assert grew == [sent[pair] for pair in range(nic.queue_pairs)], direction


def driver(ops: Frontend, packed: bool, pairs: int, mergeable: bool, mtu: int = 1500) -> Driver:
    """Ours; with buffers that a frame takes several of, if they are merged, enough for a burst."""
    nic = Driver(
        ops,
        packed=packed,
        queue_pairs=pairs,
        mtu=mtu,
        queue_size=512,
        rx_buffer=512,
        timeout=DEADLINE,
        without=0 if mergeable else int(NetF.MRG_RXBUF),
    )
    assert (nic.packed, nic.mergeable, nic.queue_pairs) == (packed, mergeable, pairs)
    return nic


@KINDS
@PAIRS
@MERGEABLE
def test_our_backend_byte_for_byte(tmp_path: Path, packed: bool, pairs: int, mergeable: bool) -> None:
    """A bridge has testpmd at one end and our driver at the other, so that what our device gave testpmd, and
    what it took from it, can be compared."""
    require("dpdk")
    near, far = tmp_path / "near", tmp_path / "far"
    vdev = f"mrg_rxbuf={int(mergeable)}"
    with (
        serving("net", "--bridge", near, far, "--queue-pairs", pairs) as server,
        Testpmd.frontend(far, packed=packed, queues=pairs, vdev=vdev) as pmd,
        Frontend.connect(near) as frontend,
        driver(frontend, packed, pairs, mergeable, mtu=4000) as nic,
    ):
        served = Served(server, pmd, devices=2)
        pmd.command("set fwd io")
        pmd.command("start")
        loop = Loop(pmd, nic, served.counters)
        loop.run()
        if mergeable:
            loop.run(4014)  # two of its mbufs
        pmd.command("stop")
        assert set(served.dropped()) <= {"dropped_stopped"}  # before testpmd was there
        assert "Bye..." in pmd.quit()


Backends = Callable[[int], tuple[Testpmd, Path]]


@pytest.fixture(scope="module")
def backends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backends]:
    """net_vhost with so many pairs, which sends back what it gets; started once. It takes one session after
    the other."""
    require("dpdk")
    with contextlib.ExitStack() as stack:

        def start(pairs: int) -> tuple[Testpmd, Path]:
            path = tmp_path_factory.mktemp("dpdk") / "s"
            pmd = stack.enter_context(Testpmd.backend(path, queues=pairs))
            pmd.command("set fwd io")
            pmd.command("start")
            return pmd, path

        yield functools.cache(start)


@KINDS
@PAIRS
@MERGEABLE
def test_our_driver_byte_for_byte(backends: Backends, packed: bool, pairs: int, mergeable: bool) -> None:
    pmd, path = backends(pairs)
    with (
        Frontend.connect(path, retry=DEADLINE) as frontend,
        driver(frontend, packed, pairs, mergeable) as nic,
    ):
        Loop(pmd, nic).run()


@KINDS
def test_one_pair_of_two(backends: Backends, packed: bool) -> None:
    """A driver that uses fewer pairs than there are. (Of its queues, net_vhost says nothing then.)"""
    pmd, path = backends(2)
    with Frontend.connect(path, retry=DEADLINE) as frontend, driver(frontend, packed, 1, True) as nic:
        Loop(pmd, nic).run(by_pair=False)
