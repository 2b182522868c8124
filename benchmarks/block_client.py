# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""libblkio's example client, blkio-bench, which nobody here wrote: built from where it is unpacked, and run.

Knows its options and what it prints. Does not know whom it talks to.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path

from benchmarks import harness
from benchmarks.block_peers import Backend, catalogue, qsd_modes
from benchmarks.facts import QSD

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


BASE = catalogue.LIBBLKIO / "usr"


def link(program: Path, *words: str) -> Path:
    """A program over libblkio, from C or object files and flags."""
    library = next(BASE.glob("lib/*/libblkio.so*")).parent
    flags = ["-O2", "-D_GNU_SOURCE", f"-I{BASE / 'include'}"]
    where = [f"-L{library}", f"-Wl,-rpath,{library}", "-lblkio", "-lpthread"]
    subprocess.run(["gcc", *flags, *words, "-o", str(program), *where], check=True)
    return program


def build_client(scratch: Path) -> Path:
    source = BASE / "share/doc/libblkio-dev/examples/blkio-bench.c"
    wrappers, client = scratch / "wrappers.c", scratch / "client.o"
    wrappers.write_text(WRAPPERS)
    flags = ["-O2", "-w", "-D_GNU_SOURCE", f"-I{BASE / 'include'}"]
    renamed = ["-Dsleep=sleep_ms", "-Dblkio_start=start_long_queues"]
    subprocess.run(["gcc", *flags, *renamed, "-c", str(source), "-o", str(client)], check=True)
    return link(scratch / "blkio-bench", str(client), str(wrappers))


def run_client(
    program: Path,
    backend: Backend,
    depth: int,
    wait: str,
    kind: str,
    ms: int,
    *,
    threads: int = 1,
    cores: Iterable[int] | None = None,
) -> tuple[float, float]:
    """Thousand I/Os a second, and CPU microseconds of the back-end per I/O. Each thread has a queue; they run
    on `cores`, or on that of clients."""
    cores = [harness.cores()[0]] if cores is None else list(cores)
    if backend.once:
        backend.start()
    assert backend.process is not None, "not started"
    pid = backend.process.pid
    command = [str(program), f"--iodepth={depth}", f"--readwrite={kind}", f"--runtime={ms}"]
    command.append(f"--num-threads={threads}")
    command += ["--poll"] if wait == "poll" else []
    command += ["virtio-blk-vhost-user", f"path={backend.path}"]
    before = harness.cpu_seconds(pid)
    client = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: harness.pin(cores),
    )
    harness.autogroup_first(client.pid)
    out, err = client.communicate(timeout=30 + ms / 1000)
    if client.returncode:
        state = "" if backend.process.poll() is None else f" (exit {backend.process.returncode})"
        raise RuntimeError(f"blkio-bench on {backend.name}{state}: {err.strip()}\n{backend.output()}")
    used = harness.cpu_seconds(pid) - before
    if backend.once:
        backend.stop()
    kiops = json.loads(out)["aggregate"]["kiops"]
    return kiops, used * 1e6 / (kiops * ms)


def best_qsd(program: Path, device: str, file: Path, path: Path, ms: int) -> tuple[Backend | None, str]:
    """A short pilot over what it can do: the best product of depth 1, woken, and depth 32, polled."""
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
