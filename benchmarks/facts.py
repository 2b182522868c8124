# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The table of facts: who is compared with whom, and what is aimed at.

One row a comparison. A row holds in every cell in which both sides were measured, and is judged in each.
Knows the names of the subjects, which the suites take from here; measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.samples import COUNT, CPU_US, KIOPS, KPPS, MPPS, NS, US, Unit
from benchmarks.suite import Axis

# ring
FLOOR, PLAIN = "C floor, unchecked", "plain Python"
ENGINE, ENGINE_BATCH = "C engine", "C engine, pop_batch"
ITERATE, BATCH = "for chain in queue", "pop_batch, push_batch"
REQUEST = "full request in Python"
# virtqueue, ring
LIBVHOST_USER, RUST = "libvhost-user (C)", "virtio-queue (Rust)"
RUST_LTO = f"{RUST}, LTO"
# block, net
OURS, QSD, CONTRIB = "pyvhost", "qemu-storage-daemon", "contrib/vhost-user-blk"
NULL, FILE = "null", "tmpfs file"
DPDK = "DPDK net_vhost"
IDLE_SWITCHES, IDLE_CPU = "pyvhost, idle: voluntary switches", "pyvhost, idle: CPU"
# session
RNG, BLK = "ours, serve rng", "ours, serve blk"
BARE, BARE_PYTHON = "bare socket, C", "bare socket, Python"
# kernel
IOCTL, ROW, METHOD = "fcntl.ioctl", "row of the table", "method"
TAP_PYTHON, TAP_C = "tap, Python", "tap, C"
SINGLES, BATCHES, PUMP = "one by one", "batches", "pump (C)"


@dataclass(frozen=True)
class Fact:
    """`over` / `under` (or `over` itself, when there is no `under`) shall be at most, or at least, `limit`;
    without a limit it is only told.

    `where` picks cells of `over`; `beside` are the axes in which `under`'s cell differs from it.
    `some`: it is enough when one cell keeps to it.
    """

    suite: str
    over: str
    under: str | None
    unit: Unit
    at_most: float | None = None
    at_least: float | None = None
    where: Mapping[str, Axis] = field(default_factory=dict)
    beside: Mapping[str, Axis] = field(default_factory=dict)
    some: bool = False

    @property
    def limit(self) -> float | None:
        return self.at_most if self.at_most is not None else self.at_least

    @property
    def bound(self) -> str:
        if self.limit is None:
            return ""
        return f"{'<=' if self.at_most is not None else '>='} {self.limit:g}"

    @property
    def what(self) -> str:
        def axes(of: Mapping[str, Axis]) -> str:
            return ", ".join(
                f"{name} {value}" if isinstance(value, int) else value for name, value in of.items()
            )

        if self.under is None:
            text = f"{self.over}, {self.unit.name}"
        elif self.beside:
            text = (
                f"{self.over}: {axes({name: self.where[name] for name in self.beside})} / {axes(self.beside)}"
            )
        else:
            text = f"{self.over} / {self.under}"
        if self.unit is CPU_US:
            text = f"CPU an I/O: {text}"
        rest = axes({name: value for name, value in self.where.items() if name not in self.beside})
        return f"{text} ({rest})" if rest else text


ONE = {"regions": 1}
AT_32, AT_1 = {**ONE, "batch": 32}, {**ONE, "batch": 1}

FACTS = (
    # What a chain costs a device: 3 descriptors, popped, walked, translated, pushed.
    Fact("ring", ENGINE_BATCH, FLOOR, NS, at_most=2.5, where=AT_32),
    Fact("ring", BATCH, FLOOR, NS, at_most=5, where=AT_32),
    Fact("ring", ITERATE, FLOOR, NS, at_most=8, where=AT_32),
    Fact("ring", REQUEST, FLOOR, NS, at_most=22, where=AT_32),
    Fact("ring", ENGINE, FLOOR, NS, at_most=1.3, where=AT_1),
    Fact("ring", ITERATE, FLOOR, NS, at_most=8, where=AT_1),
    *(
        Fact("ring", subject, subject, NS, at_most=1.1, where={"regions": regions}, beside=ONE)
        for subject in (ENGINE_BATCH, BATCH, ITERATE)
        for regions in (64, 509)
    ),
    Fact("ring", PLAIN, ENGINE_BATCH, NS, where=AT_32),
    Fact("ring", PLAIN, ITERATE, NS, where=AT_32),
    Fact("ring", PLAIN, REQUEST, NS, where=AT_32),
    Fact("ring", LIBVHOST_USER, ENGINE_BATCH, NS, where=ONE),
    Fact("ring", LIBVHOST_USER, BATCH, NS, where=ONE),
    # The workloads of virtio-queue's own benchmark.
    Fact("virtqueue", RUST, ENGINE, NS, at_least=5),
    Fact("virtqueue", LIBVHOST_USER, ENGINE, NS, at_least=1.2),
    Fact("virtqueue", RUST, BATCH, NS, at_least=1),
    Fact("virtqueue", RUST_LTO, ENGINE, NS),
    Fact("virtqueue", RUST_LTO, BATCH, NS),
    # 4 KiB random read and write, depth 1, 32, 128, polling and eventfd.
    Fact("block", OURS, CONTRIB, KIOPS, at_least=1.1, where={"device": FILE}),
    Fact("block", OURS, QSD, KIOPS, at_least=2.5, where={"device": FILE}),
    Fact("block", OURS, QSD, KIOPS, at_least=1.2, where={"device": NULL}),
    Fact("block", OURS, CONTRIB, CPU_US, at_most=1, where={"device": FILE}),
    # CPU a request, for the client shares the two cores with the back-end.
    Fact("scale", OURS, OURS, CPU_US, at_most=1.3, where={"queues": 2}, beside={"queues": 1}),
    Fact("scale", OURS, OURS, CPU_US, at_most=1.3, where={"connections": 100}, beside={"connections": 1}),
    Fact("scale", IDLE_SWITCHES, None, COUNT, at_most=0),
    Fact("scale", IDLE_CPU, None, US, at_most=0),
    # 64 B and 1500 B, both directions and a loop, split and packed, the same virtio_user client.
    Fact("net", OURS, DPDK, MPPS, at_least=0.9),
    Fact("net", OURS, DPDK, MPPS, at_least=1, some=True),
    # A message, and all of a session's set-up, beside a socket that carries the same bytes.
    Fact("session", RNG, BARE, US, at_most=3),
    Fact("session", BLK, BARE, US, at_most=3),
    # The kernel's own vhost.
    Fact("kernel", ROW, IOCTL, US),
    Fact("kernel", METHOD, IOCTL, US),
    *(
        Fact("kernel", subject, under, KPPS)
        for under in (TAP_PYTHON, TAP_C)
        for subject in (SINGLES, BATCHES, PUMP)
    ),
)  # fmt: skip
