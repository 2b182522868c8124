# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Network back-ends on one core, and DPDK's virtio_user as the client of each of them on the other.

Knows the command lines, how a direction is set going and stopped, and how both ends count. Does not know how
it is measured.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import harness
from benchmarks.block_peers import Backend
from benchmarks.facts import DPDK, OURS

# From tests/, which is a place to import from since block_peers was.
Testpmd: Any = importlib.import_module("peers.dpdk").Testpmd

SEND, RECEIVE, LOOP = "guest sends", "guest receives", "loop"
# Bursts of 32 that circulate: half of what a ring holds, so that none ever finds it full.
CIRCULATING = 4
RING = 256
PATIENCE = 20.0  # to tell slow from stuck
# What the client does, what net_vhost's testpmd does, and how ours is started.
CLIENT = {SEND: "txonly", RECEIVE: "rxonly", LOOP: "io"}
SERVER = {SEND: "rxonly", RECEIVE: "txonly", LOOP: "io"}


def wire(direction: str, size: int) -> tuple[str, ...]:
    """Which of our devices: one sends frames of one size only."""
    return {SEND: ("--drop",), RECEIVE: ("--source", str(size)), LOOP: ("--echo",)}[direction]


class Count(NamedTuple):
    """What a device has counted: "tx" is what the guest sent."""

    tx: int
    tx_bytes: int
    rx: int
    rx_bytes: int
    lost: int


class Ours:
    """`vhost serve net` on a wire of its own."""

    name = OURS

    def __init__(self, path: Path, options: Sequence[str]) -> None:
        command = [sys.executable, "-m", "vhost", "serve", "net", *options]
        self.backend = Backend(OURS, lambda at: [*command, "--socket-path", at], path)
        self.path = path
        self.lines = 0
        self.backend.start()

    def go(self, direction: str, size: int) -> None:
        """It always does the one thing that it was started for."""

    def halt(self) -> None:
        pass

    def settle(self) -> None:
        pass

    def count(self) -> Count:
        assert self.backend.process is not None
        self.backend.process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + PATIENCE
        while len(lines := self._said()) <= self.lines:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} counts nothing\n{self.backend.output()}")
            time.sleep(0.001)
        self.lines = len(lines)
        said: dict[str, int] = json.loads(lines[-1])
        lost = sum(n for name, n in said.items() if name.startswith("dropped"))
        return Count(said["tx_frames"], said["tx_bytes"], said["rx_frames"], said["rx_bytes"], lost)

    def _said(self) -> list[str]:
        """Whole lines of what it counted, one for each signal while it has one session."""
        lines = self.backend.output().splitlines(keepends=True)
        return [line for line in lines if line.startswith("{") and line.endswith("\n")]

    def close(self) -> None:
        self.backend.stop()


class NetVhost:
    """DPDK's net_vhost, in another testpmd."""

    name = DPDK

    def __init__(self, path: Path) -> None:
        self.path = path
        self.changes = 0
        self.testpmd = Testpmd.backend(path, cpu=1, options=("--no-flush-rx",))
        harness.autogroup_first(self.testpmd.process.pid)

    def go(self, direction: str, size: int) -> None:
        self.testpmd.command(f"set txpkts {size}")
        self.testpmd.command(f"set fwd {SERVER[direction]}")
        self.testpmd.command("start")

    def halt(self) -> None:
        self.testpmd.command("stop")

    def settle(self) -> None:
        """Somebody has come or gone: until it has noticed."""
        self.changes += 1
        self.testpmd.wait_for("link state change event", times=self.changes)

    def count(self) -> Count:
        n = self.testpmd.packets()
        return Count(n.rx, n.rx_bytes, n.tx, n.tx_bytes, n.rx_errors + n.tx_errors)

    def close(self) -> None:
        self.testpmd.close()


Server = Ours | NetVhost


class Link:
    """The client on one of them, which stays connected from one sample to the next."""

    def __init__(self, server: Server, *, packed: bool) -> None:
        self.server, self.name = server, server.name
        # What is left in a ring from before is emptied by hand: testpmd would try so for two seconds while
        # a source goes on filling it.
        self.client = Testpmd.frontend(server.path, packed=packed, cpu=0, options=("--no-flush-rx",))
        harness.autogroup_first(self.client.process.pid)
        server.settle()

    @contextlib.contextmanager
    def running(self, direction: str, size: int) -> Iterator[None]:
        if direction == LOOP:
            self._empty()
        self.server.go(direction, size)
        self.client.command(f"set txpkts {size}")
        self.client.command(f"set fwd {CLIENT[direction]}")
        self.client.command(f"start tx_first {CIRCULATING}" if direction == LOOP else "start")
        yield
        self.client.command("stop")
        self.server.halt()

    def _empty(self) -> None:
        """Take what the receive ring still has, so that the frames which circulate are those of this run."""
        self.client.command("set fwd rxonly")
        self.client.command("start")
        before = -1
        while (now := self.client.packets().rx) != before:
            before = now
            time.sleep(0.005)
        self.client.command("stop")

    def rate(self, direction: str, size: int, warm_up: float, window: float) -> float:
        """Million packets a second that the client sends, or that come to it, by its own clock."""
        with self.running(direction, size):
            time.sleep(warm_up)
            self.client.packets()
            time.sleep(window)
            seen = self.client.packets()
        return float(seen.tx_rate if direction == SEND else seen.rx_rate) / 1e6

    def close(self) -> None:
        self.client.close()
