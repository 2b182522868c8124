# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""DPDK's testpmd as a vhost-user back-end (its net_vhost) or front-end (its virtio_user).

Knows testpmd's command line, its prompt and its counters. Does not know what is tested with it.

    with Testpmd.backend(path) as back, Testpmd.frontend(path, packed=True) as front:
        back.command("set fwd rxonly"), back.command("start")
        front.command("set fwd txonly"), front.command("start")
        back.wait_for_packets(rx=100_000)

It needs no hugepages. A forwarding core polls, so each program keeps one CPU busy while it forwards.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

# Only to tell slow from stuck: a start takes two seconds on an idle machine.
DEADLINE = 90.0
# Each character of it is a write of its own, and what other threads print comes between them: lines of
# the log, which therefore have their own pipe, and news of a port, each as an empty line and the line itself.
PROMPT = re.compile(r"\n*".join("testpmd> "))
EVENT = re.compile(r"Port \d+: [\w ]+ event\n")
MEMORY_MIB = 256
MBUFS = 16384


@dataclass(frozen=True)
class Packets:
    """What a port counted."""

    rx: int
    tx: int
    rx_errors: int
    tx_errors: int
    rx_bytes: int
    tx_bytes: int
    rx_rate: int
    """A second, since the last look; by the program's own clock. Of the first, nothing can be said."""
    tx_rate: int


class Testpmd:
    """A running testpmd with one port on ``vdev``, controlled by its interactive commands."""

    __test__ = False  # the name is the program's, and no test for pytest

    def __init__(self, vdev: str, *, cpu: int = 0, queues: int = 1, options: tuple[str, ...] = ()) -> None:
        """``cpu`` is the one that it runs on, ``options`` are testpmd's own."""
        self._runtime = tempfile.TemporaryDirectory(prefix="testpmd-")
        cpus = sorted(os.sched_getaffinity(0))
        self.arguments = [
            # The prompt is written at once, but all else would wait in a buffer of 4 KiB.
            *("stdbuf", "-oL", "dpdk-testpmd"),
            *("--lcores", f"(0,1)@{cpus[cpu % len(cpus)]}", "--no-pci", "--no-telemetry"),
            *("--no-huge", "-m", str(MEMORY_MIB), "--file-prefix", "testpmd", "--vdev", vdev),
            *("--", "-i", f"--total-num-mbufs={MBUFS}", "--disable-link-check"),
            *(f"--rxq={queues}", f"--txq={queues}", *options),
        ]
        self._output = ""
        """All that it wrote, its log too."""
        self._answer = ""
        """What it wrote to its standard output since the last prompt."""
        self._prompted = False
        self._news = threading.Condition()
        self.process = subprocess.Popen(
            self.arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Where it keeps what identifies it: each has its own, so that any number can run.
            env={**os.environ, "RUNTIME_DIRECTORY": self._runtime.name},
            # For the scheduler a group of its own, which one who measures may prefer.
            start_new_session=True,
        )
        pipes = (self.process.stdout, self.process.stderr)
        self._open = len(pipes)
        self._readers = [threading.Thread(target=self._read, args=(pipe,), daemon=True) for pipe in pipes]
        for reader in self._readers:
            reader.start()

    @classmethod
    def backend(
        cls,
        path: Path,
        *,
        queues: int = 1,
        client: bool = False,
        cpu: int = 0,
        vdev: str = "",
        options: tuple[str, ...] = (),
    ) -> Self:
        """net_vhost: a server on ``path``, or a client that keeps trying. ``vdev`` adds to its arguments,
        such as "iommu-support=1"; ``options`` are testpmd's own."""
        device = f"net_vhost0,iface={path},queues={queues},client={int(client)}"
        return cls(_join(device, vdev), cpu=cpu, queues=queues, options=options)._started(wait=True)

    @classmethod
    def frontend(
        cls,
        path: Path,
        *,
        queues: int = 1,
        packed: bool = False,
        server: bool = False,
        cpu: int = 1,
        vdev: str = "",
        options: tuple[str, ...] = (),
    ) -> Self:
        """virtio_user: a client of ``path``, or its server, which does nothing before a back-end comes.
        ``vdev`` adds to its arguments, such as "mrg_rxbuf=0,in_order=0"; ``options`` are testpmd's own."""
        control = int(queues > 1)  # the control queue, by which it asks for more than one pair
        device = f"net_virtio_user0,path={path},queues={queues},cq={control},packed_vq={int(packed)}"
        device += ",server=1" if server else ""
        return cls(_join(device, vdev), cpu=cpu, queues=queues, options=options)._started(wait=not server)

    def _started(self, *, wait: bool) -> Self:
        if wait:
            try:
                self.wait_ready()
            except BaseException:
                self.close()
                raise
        return self

    def wait_ready(self) -> None:
        """Until it takes commands: a server listens then, a client is connected."""
        if not self._prompted:
            self._wait_prompt()
            self._prompted = True

    def command(self, line: str) -> str:
        """Give a command and return what it wrote, until the next prompt."""
        self.wait_ready()
        self._write(line)
        return self._wait_prompt()

    def packets(self) -> Packets:
        """What the port has counted so far."""
        text = self.command("show port stats 0")

        def number(name: str) -> int:
            match = re.search(rf"{name}:\s+(\d+)", text)
            assert match, f"no {name} in {text!r}"
            return int(match[1])

        names = ("packets", "errors", "bytes")
        counts = (number(f"{way}-{name}") for name in names for way in ("RX", "TX"))
        return Packets(*counts, number("Rx-pps"), number("Tx-pps"))

    def wait_for_packets(self, *, rx: int = 0, tx: int = 0, timeout: float = DEADLINE) -> Packets:
        """Until so many were received and sent."""
        deadline = time.monotonic() + timeout
        while True:
            packets = self.packets()
            if packets.rx >= rx and packets.tx >= tx:
                return packets
            assert time.monotonic() < deadline, (
                f"{packets} after {timeout} s, wanted {rx} and {tx}\n{self.log()}"
            )

    def wait_for(self, text: str, timeout: float = DEADLINE, *, times: int = 1) -> None:
        """Until its whole output so far holds ``text``, such as "new device status(0x0000000f)"."""
        with self._news:
            self._until(lambda: self._output.count(text) >= times, text, timeout)

    def log(self) -> str:
        """The end of all that it wrote, for people."""
        return f"--- {' '.join(self.arguments)}\n{self._output[-6000:]}"

    def quit(self) -> str:
        """End it in its own way, with the messages that it has for that; returns its whole output."""
        self.wait_ready()
        self._write("quit")
        try:
            code = self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"testpmd did not quit\n{self.log()}") from None
        self.close()
        assert code == 0, f"testpmd exited with {code}\n{self.log()}"
        return self._output

    def close(self) -> None:
        """Kill it if it still runs. Idempotent."""
        self.process.kill()
        self.process.wait(DEADLINE)
        for reader in self._readers:
            reader.join(DEADLINE)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        self._runtime.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if value is not None:
            value.add_note(self.log())

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()

    def _wait_prompt(self) -> str:
        """Until the next prompt; returns what comes before it."""
        with self._news:
            self._until(lambda: PROMPT.search(self._answer) is not None, "testpmd> ", DEADLINE)
            prompt = PROMPT.search(self._answer)
            assert prompt is not None
            answer, self._answer = self._answer[: prompt.start()], self._answer[prompt.end() :]
            return answer

    def _until(self, condition: Callable[[], bool], what: str, timeout: float) -> None:
        self._news.wait_for(lambda: not self._open or condition(), timeout)
        if not condition():
            why = f"did not do so in {timeout} s" if self._open else "ended"
            raise AssertionError(f"testpmd was to say {what!r} and {why}\n{self.log()}")

    def _read(self, pipe: IO[bytes]) -> None:
        while data := os.read(pipe.fileno(), 65536):
            text = data.decode(errors="replace")
            with self._news:
                self._output += text
                if pipe is self.process.stdout:
                    self._answer = EVENT.sub("", self._answer + text)
                self._news.notify_all()
        with self._news:
            self._open -= 1
            self._news.notify_all()


def _join(device: str, more: str) -> str:
    return f"{device},{more}" if more else device
