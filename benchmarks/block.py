# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""4 KiB random I/O through three vhost-user-blk back-ends, driven by one client that nobody here wrote.

Back-ends: `python -m vhost serve blk`, qemu-storage-daemon in the best of its modes (found out by a
short pilot), QEMU's contrib/vhost-user-blk. Client: libblkio's example blkio-bench, one queue. The
client is on one core, the back-end on the other. The file is on tmpfs, so that what is compared is
the back-ends and not a disk; contrib/vhost-user-blk has no null device and is compared on the file only.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Aim, Samples

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
catalogue = importlib.import_module("peers.catalogue")

OURS, QSD, CONTRIB = "pyvhost", "qemu-storage-daemon", "contrib/vhost-user-blk"
NULL, FILE = "null", "tmpfs file"
DEPTHS = (1, 32, 128)
WAITS = ("event", "poll")
KINDS = ("randread", "randwrite")
NULL_BYTES = 1 << 30
FILE_BYTES = 256 << 20

# The client is compiled as it is, with two of the functions that it calls renamed: --runtime shall
# count milliseconds, and the default queue of 256 descriptors has no room for 128 requests.
WRAPPERS = """
#include <blkio.h>
#include <time.h>

unsigned int sleep_ms(unsigned int ms)
{
	struct timespec t = {ms / 1000, (ms % 1000) * 1000000l};

	nanosleep(&t, 0);
	return 0;
}

int start_long_queues(struct blkio *b)
{
	int rc = blkio_set_int(b, "queue-size", 1024);

	return rc ? rc : blkio_start(b);
}
"""


def build_client(scratch: Path) -> Path:
    base = catalogue.LIBBLKIO / "usr"
    source = base / "share/doc/libblkio-dev/examples/blkio-bench.c"
    library = next(base.glob("lib/*/libblkio.so*")).parent
    program, wrappers, client = scratch / "blkio-bench", scratch / "wrappers.c", scratch / "client.o"
    wrappers.write_text(WRAPPERS)
    flags = ["-O2", "-w", "-D_GNU_SOURCE", f"-I{base / 'include'}"]
    renamed = ["-Dsleep=sleep_ms", "-Dblkio_start=start_long_queues"]
    link = [f"-L{library}", f"-Wl,-rpath,{library}", "-lblkio", "-lpthread"]
    subprocess.run(["gcc", *flags, *renamed, "-c", str(source), "-o", str(client)], check=True)
    subprocess.run(["gcc", *flags, str(client), str(wrappers), "-o", str(program), *link], check=True)
    return program


def cpu_seconds(pid: int) -> float:
    """User and system time of a whole process, threads that ended included, to the nanosecond:
    its CPU-time clock, named as clock_getcpuclockid(3) does."""
    return time.clock_gettime((~pid << 3) | 2)


# The arguments that serve a socket path (or, for one connection, an inherited descriptor).
Command = Callable[[str], list[str]]


class Backend:
    """One back-end program, started in a session of its own on the back-end's core."""

    def __init__(
        self, name: str, command: Callable[[str], list[str]], path: Path, *, once: bool = False
    ) -> None:
        self.name, self.command, self.path = name, command, path
        self.once = once  # serves one connection, on a listening socket that it inherits
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, core: int | None = None) -> None:
        if core is None:
            core = harness.cores()[1]
        listener = None
        argument = str(self.path)
        self.path.unlink(missing_ok=True)
        if self.once:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(self.path))
            listener.listen()
            argument = str(listener.fileno())
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            self.command(argument),
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            pass_fds=[listener.fileno()] if listener else [],
            start_new_session=True,
            cwd=ROOT,
            preexec_fn=lambda: harness.pin([core]),
        )
        harness.autogroup_first(self.process.pid)
        if listener:
            listener.close()
        else:
            self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(self.path))
                return
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} does not serve {self.path}\n{self.output()}")
            time.sleep(0.01)

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def stop(self) -> None:
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process = None
        self.log.close()


def run_client(
    program: Path, backend: Backend, depth: int, wait: str, kind: str, ms: int
) -> tuple[float, float]:
    """Thousand I/Os a second, and CPU microseconds of the back-end per I/O."""
    if backend.once:
        backend.start()
    pid = backend.process.pid
    command = [str(program), f"--iodepth={depth}", f"--readwrite={kind}", f"--runtime={ms}"]
    command += ["--poll"] if wait == "poll" else []
    command += ["virtio-blk-vhost-user", f"path={backend.path}"]
    before = cpu_seconds(pid)
    client = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: harness.pin([harness.cores()[0]]),
    )
    harness.autogroup_first(client.pid)
    out, err = client.communicate(timeout=30 + ms / 1000)
    if client.returncode:
        state = "" if backend.process.poll() is None else f" (exit {backend.process.returncode})"
        raise RuntimeError(f"blkio-bench on {backend.name}{state}: {err.strip()}\n{backend.output()}")
    used = cpu_seconds(pid) - before
    if backend.once:
        backend.stop()
    kiops = json.loads(out)["aggregate"]["kiops"]
    return kiops, used * 1e6 / (kiops * ms)


# ---------------------------------------------------------------- who takes part


def qsd_modes(device: str, file: Path) -> dict[str, Command]:
    if device == NULL:
        nodes = {"null-co": f"driver=null-co,node-name=n,size={NULL_BYTES},read-zeroes=off"}
    else:
        base = f"driver=file,node-name=n,filename={file},locking=off"
        nodes = {
            "direct, native": f"{base},cache.direct=on,aio=native",
            "direct, io_uring": f"{base},cache.direct=on,aio=io_uring",
            "cached, threads": f"{base},aio=threads",
        }
    modes: dict[str, Command] = {}
    for name, node in nodes.items():
        for thread, extra in (("main loop", []), ("iothread", ["--object", "iothread,id=t0"])):

            def command(path: str, node: str = node, extra: list[str] = extra) -> list[str]:
                export = f"type=vhost-user-blk,id=e,addr.type=unix,addr.path={path},node-name=n,writable=on"
                export += ",iothread=t0" if extra else ""
                return ["qemu-storage-daemon", *extra, "--blockdev", node, "--export", export]

            modes[f"{name}, {thread}"] = command
    return modes


def best_qsd(program: Path, device: str, file: Path, path: Path, ms: int) -> tuple[Backend | None, str]:
    """A short pilot over what it can do: the best product of depth 1 and depth 32, polled."""
    best, best_name, score = None, "", 0.0
    for name, command in qsd_modes(device, file).items():
        backend = Backend(QSD, command, path)
        try:
            backend.start()
            value = 1.0
            for depth, wait in ((1, "event"), (32, "poll")):
                value *= run_client(program, backend, depth, wait, "randread", ms)[0]
        except RuntimeError:  # a mode that this build or this kernel does not have
            continue
        finally:
            backend.stop()
        if value > score:
            best, best_name, score = Backend(QSD, command, path), name, value
    return best, best_name


def ours(device: str, file: Path) -> Command:
    disk = ["--null-size", str(NULL_BYTES)] if device == NULL else ["--blk-file", str(file)]
    return lambda path: [sys.executable, "-m", "vhost", "serve", "blk", "--socket-path", path, *disk]


def contrib(file: Path) -> Command:
    return lambda fd: [str(catalogue.CONTRIB_BLK), f"--fd={fd}", "-b", str(file)]


Found = dict[str, list[Backend]]


@contextlib.contextmanager
def backends(
    program: Path, scratch: Path, file: Path, ms: int, notes: list[str]
) -> Iterator[dict[str, list[Backend]]]:
    found: dict[str, list[Backend]] = {NULL: [], FILE: []}
    try:
        for i, (device, list_) in enumerate(found.items()):
            list_.append(Backend(OURS, ours(device, file), scratch / f"ours{i}"))
            if missing := catalogue.PEERS["qsd"].missing():
                notes.append(f"{device}: without {QSD}: {missing}")
            else:
                qsd, mode = best_qsd(program, device, file, scratch / f"qsd{i}", ms)
                if qsd is None:
                    notes.append(f"{device}: no mode of {QSD} works here")
                else:
                    list_.append(qsd)
                    notes.append(f"{device}: best mode of {QSD}: {mode}")
            if device == NULL:
                notes.append(f"{device}: {CONTRIB} has no null device")
            elif missing := catalogue.PEERS["contrib-vhost-user-blk"].missing():
                notes.append(f"{device}: without {CONTRIB}: {missing} (make peers)")
            else:
                list_.append(Backend(CONTRIB, contrib(file), scratch / f"contrib{i}", once=True))
        for list_ in found.values():
            for backend in list_:
                if not backend.once:
                    backend.start()
        yield found
    finally:
        for list_ in found.values():
            for backend in list_:
                backend.stop()


# ---------------------------------------------------------------- measuring

Cell = tuple[str, str, str, int]  # device, kind, wait, depth
Result = dict[tuple[Cell, str], Samples]


def measure(
    program: Path, found: Found, cells: list[Cell], rounds: int, ms: int, budget: float
) -> tuple[Result, Result]:
    kiops: Result = {}
    cpu: Result = {}
    progress = harness.show_progress("block")
    start = time.monotonic()
    for done in range(rounds):
        if done >= 3 and time.monotonic() - start > budget:
            break
        for cell in cells:
            device, kind, wait, depth = cell
            # Every other round backwards, so that nobody always runs behind the same neighbour.
            order = found[device] if done % 2 == 0 else found[device][::-1]
            for backend in order:
                rate, cost = run_client(program, backend, depth, wait, kind, ms)
                kiops.setdefault((cell, backend.name), Samples()).values.append(rate)
                cpu.setdefault((cell, backend.name), Samples()).values.append(cost)
        progress(done + 1, rounds)
    return kiops, cpu


def run(*, quick: bool) -> dict[str, Any]:
    if missing := catalogue.PEERS["libblkio"].missing():
        print(f"skipped: no client: {missing} (tests/install_peers.py)")
        return {"skipped": missing}
    ms = 150 if quick else 250
    depths, kinds = ((1, 32), KINDS[:1]) if quick else (DEPTHS, KINDS)
    cells = [(d, k, w, n) for d in (NULL, FILE) for k in kinds for w in WAITS for n in depths]
    notes: list[str] = []
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vhost-bench-")))
        shm = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vhost-bench-", dir="/dev/shm")))
        file = shm / "disk"
        with file.open("wb") as disk:
            for _ in range(FILE_BYTES >> 20):
                disk.write(os.urandom(1 << 20))
        program = build_client(scratch)
        found = stack.enter_context(backends(program, scratch, file, ms, notes))
        kiops, cpu = measure(program, found, cells, 5 if quick else 7, ms, 30 if quick else 150)
    return report(cells, kiops, cpu, notes)


def report(cells: list[Cell], kiops: Result, cpu: Result, notes: list[str]) -> dict[str, Any]:
    rows, as_json, verdicts = [], [], {True: 0, False: 0}
    for cell in cells:
        device, kind, wait, depth = cell
        mine = kiops[cell, OURS]
        row = [f"{device}, {kind}, {wait}, depth {depth}", harness.number(mine.median())]
        row.append(harness.number(cpu[cell, OURS].median()))
        entry: dict[str, Any] = {"device": device, "kind": kind, "wait": wait, "depth": depth, "backends": {}}
        entry["backends"][OURS] = {"kiops": mine.as_json(), "cpu_us": cpu[cell, OURS].as_json()}
        worst = []
        for peer in (QSD, CONTRIB):
            theirs = kiops.get((cell, peer), Samples())
            if not theirs.values:
                row += ["", "", ""]
                continue
            pair = harness.ratio(mine, theirs)
            aim = Aim(f"ours / {peer}", 1.0, at_least=True)
            met = aim.met(pair.median())
            verdicts[met] += 1
            worst.append(met)
            row += [harness.number(theirs.median()), harness.number(cpu[cell, peer].median())]
            row.append(f"{pair.median():.2f}")
            entry["backends"][peer] = {
                "kiops": theirs.as_json(),
                "cpu_us": cpu[cell, peer].as_json(),
                "aim": aim.as_json(pair),
            }
        row.append("" if not worst else "met" if all(worst) else "NOT MET")
        rows.append(row)
        as_json.append(entry)
    headers = [
        "thousand I/Os a second; back-end CPU us",
        "ours",
        "us",
        "qsd",
        "us",
        "ratio",
        "contrib",
        "us",
        "ratio",
        ">= 1",
    ]
    print(harness.table(headers, rows, "4 KiB, one queue, client on one core, back-end on the other"))
    for note in notes:
        print(note)
    print(f"aim, ours / theirs >= 1.0 in every cell: met in {verdicts[True]}, not met in {verdicts[False]}")
    return {"cells": as_json, "notes": notes, "met": verdicts[True], "not_met": verdicts[False]}
