# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Packets through two vhost-user-net back-ends, driven by one client that nobody here wrote.

Back-ends: `python -m vhost serve net`, and the net_vhost of DPDK's testpmd. Client: the virtio_user of
another testpmd, with the same commands for both, one pair of queues. Back-ends are on one core, clients on
the other; no huge pages. A rate is the client's own, over a window of its own clock.

What a device does: takes what is sent (`--drop`; rxonly), sends (`--source`; txonly), or sends back what it
takes (`--echo`; io). The first is not the same work: net_vhost copies each frame before it is dropped, ours
looks at its header alone. A loop has that copy in both.

What is verified, in each cell and with each back-end, before it is measured: our own driver sends frames that
are all different, which come back as they were and in their order (loop), or are counted by number and bytes
(sends), and looks at what a device makes up, to the last byte (ours) or at its headers (net_vhost's). Then
testpmd runs for a moment, and both ends must have counted the same frames and bytes, none of them lost.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks import harness, limits, net_verify
from benchmarks.block_peers import missing
from benchmarks.facts import DPDK, OURS
from benchmarks.harness import MPPS, NS, Case, Samples, Suite, Table, again, cell
from benchmarks.net_peers import LOOP, RECEIVE, SEND, Link, NetVhost, Ours, wire
from benchmarks.suite import Cell

FORMATS = SPLIT, PACKED = "split", "packed"
SIZES = (64, 1500)

TITLE = (
    "Packets from DPDK's virtio_user on a core of its own, one pair of queues, through back-ends on the "
    "other: what a guest sends, what it receives, and a loop."
)
TABLES = tuple(
    Table(f"{size} bytes", MPPS, rows=("format", "direction"), columns=("subject",), where={"size": size})
    for size in SIZES
)
CELLS = tuple(
    cell(format=kind, direction=direction, size=size)
    for kind in FORMATS
    for direction in (SEND, RECEIVE, LOOP)
    for size in SIZES
)


def run(suite: Suite) -> None:
    if why := missing("dpdk"):
        suite.skip(f"neither client nor peer: {why}")
        return
    suite.note(f"{OURS} drops what a guest sends without a copy of it, {DPDK} with one")
    # Where memory lies differs from process to process: a long run has several of each.
    lives, rounds = (1, 5) if suite.quick else (3, 5)
    with ExitStack() as stack:
        # A virtual machine's cores are elsewhere some seconds later: to be looked at among the rest.
        ((line, line_cost),) = harness.limit_cases(stack, limits.LINE).items()
        seen = Samples()

        def look() -> None:
            with harness.pinned_to(harness.cores()[0]):
                seen.values.append(line_cost())

        measure(suite, CELLS, lives, rounds, each_round=look)
        suite.add(NS, line, seen)
        low, high = min(seen.values), max(seen.values)
        suite.note(f"a cache line to the other core and back took {low:.0f} to {high:.0f} ns meanwhile")
        stack.enter_context(harness.pinned_to(harness.cores()[0]))
        cases = harness.limit_cases(stack, limits.COPY_64, limits.COPY_1500)
        suite.interleave(cases, NS, 9, budget=10, doing="limits")


def measure(
    suite: Suite,
    cells: Sequence[Cell],
    lives: int,
    rounds: int,
    *,
    warm_up: float = 0.1,
    window: float = 0.25,
    each_round: Callable[[], None] = lambda: None,
) -> None:
    """In turns, by hand: a program is started once for a number of rounds, and then anew."""
    found: dict[Case, Samples] = {}
    steps, step = lives * rounds * len(cells), 0
    for _ in range(lives):
        for kind in FORMATS:
            here = [where for where in cells if dict(where)["format"] == kind]
            suite.progress(step, steps, f"{kind}: starting, verifying")
            with linked(here) as links:
                for done in range(rounds):
                    each_round()
                    for where in here:
                        names = [(links[OURS, where], OURS), (links[DPDK, where], DPDK)]
                        names.append((links[OURS, where], again(OURS)))
                        # Every other round backwards, so that nobody always runs behind the same neighbour.
                        for link, name in names if done % 2 == 0 else names[::-1]:
                            rate = link.rate(*way(where), warm_up, window)
                            found.setdefault(Case(name, where), Samples()).values.append(rate)
                        step += 1
                        suite.progress(step, steps, kind)
    for case, values in found.items():
        suite.add(MPPS, case, values)


def way(where: Cell) -> tuple[str, int]:
    axes = dict(where)
    return str(axes["direction"]), int(axes["size"])


@contextlib.contextmanager
def linked(cells: Sequence[Cell]) -> Iterator[dict[tuple[str, Cell], Link]]:
    """Both back-ends with a client, for cells of one kind of ring: verified. Ours is one for each wire."""
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for where in cells:
        groups.setdefault((OURS, *wire(*way(where))), []).append(where)
        groups.setdefault((DPDK,), []).append(where)
    links: dict[tuple[str, Cell], Link] = {}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vhost-bench-")))
        for i, ((who, *options), group) in enumerate(groups.items()):
            packed = dict(group[0])["format"] == PACKED
            path = scratch / str(i)
            server = Ours(path, options) if who == OURS else NetVhost(path)
            stack.callback(server.close)
            for where in group:
                net_verify.frames(server, *way(where), packed=packed)
            link = Link(server, packed=packed)
            stack.callback(link.close)
            for where in group:
                net_verify.counts(link, *way(where))
                links[who, where] = link
        yield links
