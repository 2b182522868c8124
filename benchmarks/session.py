# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What talking vhost-user costs: set-up of a session, and round trips of single messages.

Our front-end against our back-end (`python -m vhost serve`, another process) and against the back-ends
that nobody here wrote, beside a bare socket ping-pong in C with the same message sizes. Once with a core
for each process, which the kernel has to wake for each message, and once with both on one core, which
finds its caches and its TLB cold after each switch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import block_peers, harness, limits
from benchmarks.facts import BARE, BARE_PYTHON, BLK, CONTRIB, NULL, QSD, RNG
from benchmarks.harness import US, Case, Cases, Suite, Table, again, cell
from vhost.features import VirtioF
from vhost.memory import GuestMemory, Region
from vhost.user.frontend import Frontend
from vhost.user.messages import FrontendMsg
from vhost.virtqueue import DriverQueue

TITLE = (
    "What talking vhost-user costs our front-end against back-ends, and ours among them: messages, and a "
    "whole session; once with a core for each side, once with one for both."
)
PLACEMENTS = ("two cores", "one core")
TABLES = tuple(
    Table(placement, US, rows=("what",), columns=("subject",), where={"placement": placement})
    for placement in PLACEMENTS
)
NUM = 256
SETUP = "session set-up"

Steps = list[tuple[int, int]]  # sizes of request and reply


class Step(ctypes.Structure):
    _fields_ = [("request", ctypes.c_uint32), ("reply", ctypes.c_uint32)]


# ---------------------------------------------------------------- the bare ping-pong


def build() -> ctypes.CDLL:
    u32, u64, path = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_char_p
    steps = ctypes.POINTER(Step)
    return harness.declare(
        harness.library("session", [harness.HERE / "session_floor.c"]),
        ("floor_serve", ctypes.c_int, ctypes.c_int, steps, u32),
        ("floor_round_trips", u64, path, steps, u32, u32),
        ("floor_sessions", u64, path, steps, u32, u32),
    )


def serve_python(listener: socket.socket, steps: Steps) -> None:
    while True:
        peer, _ = listener.accept()
        with peer:
            i = 0
            while peer.recv(steps[i][0]):
                if steps[i][1]:
                    peer.send(bytes(steps[i][1]))
                i = (i + 1) % len(steps)


class Bare:
    """A child that answers ping-pong with given sizes, and our side of it."""

    def __init__(
        self, lib: ctypes.CDLL, path: Path, steps: Steps, core: int, *, python: bool = False
    ) -> None:
        self.lib, self.path, self.steps, self.python = lib, path, steps, python
        self.c_steps = (Step * len(steps))(*(Step(*step) for step in steps))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            self.pid = os.fork()
            if self.pid == 0:
                try:
                    os.setsid()
                    harness.autogroup_first()
                    harness.pin([core])
                    if python:
                        serve_python(listener, steps)
                    lib.floor_serve(listener.fileno(), self.c_steps, len(steps))
                finally:
                    os._exit(1)

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def round_trip(self, rounds: int) -> float:
        """Microseconds for all steps, on one connection."""
        if self.python:
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(str(self.path))
                self._talk(peer)
                start = time.perf_counter_ns()
                for _ in range(rounds):
                    self._talk(peer)
                return (time.perf_counter_ns() - start) / 1e3 / rounds
        ns = self.lib.floor_round_trips(str(self.path).encode(), self.c_steps, len(self.steps), rounds)
        if not ns:
            raise RuntimeError("the bare ping-pong failed")
        return float(ns) / 1e3 / rounds

    def _talk(self, peer: socket.socket) -> None:
        for request, reply in self.steps:
            peer.send(bytes(request))
            if reply:
                peer.recv(reply)

    def session(self, rounds: int) -> float:
        """Microseconds for a conversation on a connection of its own."""
        if self.python:
            start = time.perf_counter_ns()
            for _ in range(rounds):
                with socket.socket(socket.AF_UNIX) as peer:
                    peer.connect(str(self.path))
                    self._talk(peer)
            return (time.perf_counter_ns() - start) / 1e3 / rounds
        ns = self.lib.floor_sessions(str(self.path).encode(), self.c_steps, len(self.steps), rounds)
        if not ns:
            raise RuntimeError("the bare ping-pong failed")
        return float(ns) / 1e3 / rounds


# ---------------------------------------------------------------- our front-end


class Recorder(socket.socket):
    """A socket that notes how many bytes go which way."""

    def __init__(self) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self.steps: Steps = []

    def sendmsg(self, *arguments: Any) -> int:
        sent = super().sendmsg(*arguments)
        self.steps.append((sent, 0))
        return sent

    def send(self, *arguments: Any) -> int:
        sent = super().send(*arguments)
        self.steps.append((sent, 0))
        return sent

    def recvmsg(self, *arguments: Any) -> Any:
        received = super().recvmsg(*arguments)
        request, reply = self.steps[-1]
        self.steps[-1] = (request, reply + len(received[0]))
        return received


class Setup:
    """What a driver does from connecting to a running ring, with memory and eventfds made before."""

    def __init__(self) -> None:
        layout = DriverQueue.layout(NUM, packed=False)
        region = Region.allocate(1 << 20, guest_addr=1 << 32)
        self.memory = GuestMemory([region])
        self.areas = [region.guest_addr + at for at in (layout.desc, layout.avail, layout.used)]
        self.kick, self.call = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))

    def start(self, frontend: Frontend) -> None:
        frontend.set_features(frontend.get_features() & VirtioF.VERSION_1)
        frontend.get_queue_num()
        frontend.set_mem_table(self.memory)
        frontend.set_vring_num(0, NUM)
        frontend.set_vring_base(0, 0)
        frontend.set_vring_addr(0, *self.areas)
        frontend.set_vring_call(0, self.call)
        frontend.set_vring_kick(0, self.kick)
        frontend.set_vring_enable(0, True)

    def sessions(self, path: Path, rounds: int) -> float:
        start = time.perf_counter_ns()
        for _ in range(rounds):
            with Frontend.connect(path) as frontend:
                self.start(frontend)
        return (time.perf_counter_ns() - start) / 1e3 / rounds

    def record(self, path: Path) -> Steps:
        recorder = Recorder()
        recorder.connect(str(path))
        with Frontend(recorder) as frontend:
            self.start(frontend)
        return recorder.steps


def get_features(frontend: Frontend) -> None:
    """The method answers from memory: this is the message."""
    frontend.transport.call(frontend.session.request(FrontendMsg.GET_FEATURES), 10)


CALLS: dict[str, Callable[[Frontend], object]] = {
    "GET_FEATURES": get_features,
    "GET_QUEUE_NUM": Frontend.get_queue_num,
    "SET_VRING_NUM, ack": lambda frontend: frontend.set_vring_num(0, NUM),
    "GET_CONFIG, 60 bytes": lambda frontend: frontend.get_config(0, 60),
}


def call_sizes(path: Path) -> dict[str, Steps]:
    recorder = Recorder()
    recorder.connect(str(path))
    single: dict[str, Steps] = {}
    with Frontend(recorder) as frontend:
        for name, call in CALLS.items():
            recorder.steps.clear()
            call(frontend)
            single[name] = list(recorder.steps)
            if len(single[name]) != 1 or not single[name][0][1]:
                raise RuntimeError(f"{name} is not one round trip: {single[name]}")
    return single


def round_trips_at(path: Path, call: Callable[[Frontend], object], rounds: int) -> float:
    """On a connection of its own, for the sake of back-ends that serve one at a time."""
    with Frontend.connect(path) as frontend:
        call(frontend)
        return round_trips(frontend, call, rounds)


def round_trips(frontend: Frontend, call: Callable[[Frontend], object], rounds: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(rounds):
        call(frontend)
    return (time.perf_counter_ns() - start) / 1e3 / rounds


# ---------------------------------------------------------------- measuring


def backends(scratch: Path, suite: Suite) -> Iterator[block_peers.Backend]:
    serve = [sys.executable, "-m", "vhost", "serve"]
    yield block_peers.Backend(RNG, lambda path: [*serve, "rng", "--socket-path", path], scratch / "rng")
    yield block_peers.Backend(BLK, block_peers.ours(NULL, scratch), scratch / "blk")
    if missing := block_peers.missing("qsd"):
        suite.leave_out(QSD, missing)
    else:
        qsd = block_peers.qsd_modes(NULL, scratch)["null-co, main loop"]
        yield block_peers.Backend(QSD, qsd, scratch / "qsd")
    if missing := block_peers.missing("contrib-vhost-user-blk"):
        suite.leave_out(CONTRIB, missing)
    else:
        disk = scratch / "disk"
        disk.write_bytes(bytes(1 << 20))
        yield block_peers.Backend(CONTRIB, block_peers.contrib(disk), scratch / "contrib", once=True)


def make_cases(stack: contextlib.ExitStack, scratch: Path, suite: Suite, placement: str, core: int) -> Cases:
    lib, setup = build(), Setup()
    found = list(backends(scratch, suite))
    for backend in found:
        stack.callback(backend.stop)
        backend.start([core])
    sizes = {SETUP: setup.record(found[0].path), **call_sizes(found[1].path)}
    suite.note(f"{SETUP}: {len(sizes[SETUP])} messages, connecting and closing included")

    cases: Cases = {}
    for i, (what, steps) in enumerate(sizes.items()):
        here = cell(what=what, placement=placement)
        for name in (BARE, BARE_PYTHON):
            python = name == BARE_PYTHON
            pong = Bare(lib, scratch / f"bare{i}{python:d}", steps, core, python=python)
            stack.callback(pong.close)
            session = what == SETUP
            measure = (
                functools.partial(pong.session, 20) if session else functools.partial(pong.round_trip, 200)
            )
            cases[Case(name, here)] = measure
            if not python:
                cases[Case(again(name), here)] = measure
    for backend in found:
        if not backend.once:
            case = Case(backend.name, cell(what=SETUP, placement=placement))
            cases[case] = functools.partial(setup.sessions, backend.path, 5)
            trips = functools.partial(round_trips_at, backend.path)
        else:
            frontend = stack.enter_context(Frontend.connect(backend.path))
            trips = functools.partial(round_trips, frontend)
        for what, call in CALLS.items():
            if backend.name == RNG and what.startswith("GET_CONFIG"):
                continue  # an entropy source has no configuration space
            cases[Case(backend.name, cell(what=what, placement=placement))] = functools.partial(
                trips, call, 50
            )
    whats = list(sizes)
    return {
        case: cases[case]
        for case in sorted(cases, key=lambda case: whats.index(str(dict(case.cell)["what"])))
    }


def run(suite: Suite) -> None:
    ours, other = harness.cores()
    for placement, core in zip(PLACEMENTS, (other, ours), strict=True):
        with contextlib.ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vhost-bench-")))
            stack.enter_context(harness.pinned_to(ours))
            cases = make_cases(stack, scratch, suite, placement, core)
            if placement == PLACEMENTS[0]:
                cases |= harness.limit_cases(stack, limits.SOCKET, limits.SYSCALL)
            rounds, budget = (7, 10) if suite.quick else (21, 25)
            suite.interleave(cases, US, rounds, budget=budget, doing=placement)
