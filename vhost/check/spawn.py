# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The program under test as a process of ours: started, started again when it ended, and how it ended.

Many back-ends serve one connection and exit; some die of what a rule sends. Knows processes and nothing of
vhost-user.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

END_WAIT = 5.0
"""Seconds from SIGTERM to SIGKILL."""
_TAIL = 2000
_CRASHES = frozenset(
    {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP}
)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """What would end us does so afterwards: a program that was started and is not known yet would be left."""
    came: list[int] = []
    main = threading.current_thread() is threading.main_thread()  # no other has handlers
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if main}
    # What is ignored stays so, for that is inherited.
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for one in came:
        signal.raise_signal(one)


class Program:
    """``command`` is run without a shell; what it prints is kept for evidence."""

    def __init__(self, command: Sequence[str], listens: str | None = None) -> None:
        self.command = list(command)
        self.path = None if listens is None else Path(listens)
        self.crashes: list[str] = []
        """How it crashed, each time."""
        self._process: subprocess.Popen[bytes] | None = None
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the object

    def start(self) -> None:
        """Start it unless it runs. The socket on which its predecessor listened is removed."""
        if self.alive:
            return
        self.note_crash()
        if self.path is not None and self.path.is_socket():
            self.path.unlink()
        self._output.seek(0)
        self._output.truncate()
        with _undisturbed():
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._output
            )

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self.alive else None

    def note_crash(self) -> None:
        """If it crashed since it was looked at last, that is in ``crashes`` now."""
        code = None if self._process is None else self._process.poll()
        if code is not None and -code in _CRASHES:
            how = f"the program was killed by {signal.Signals(-code).name}"
            self.crashes.append(how + self._printed())
            self._process = None

    def ended(self, timeout: float) -> bool:
        """It ends by itself within the time."""
        if self._process is None:
            return True
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def how(self) -> str:
        """Its state in words."""
        if self._process is None:
            return "not started"
        code = self._process.poll()
        if code is None:
            return f"runs as process {self._process.pid}"
        how = f"ended with {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        return how + self._printed()

    def ask_to_end(self) -> None:
        """SIGTERM, without waiting."""
        if self._process is not None and self.alive:
            self._process.terminate()

    def stop(self) -> None:
        """SIGTERM, then SIGKILL. Idempotent."""
        if self._process is not None and self.alive:
            self._process.terminate()
            if not self.ended(END_WAIT):
                self._process.kill()
                self._process.wait()

    def close(self) -> None:
        self.stop()
        self._output.close()

    def _printed(self) -> str:
        size = os.fstat(self._output.fileno()).st_size
        text = os.pread(self._output.fileno(), _TAIL, max(0, size - _TAIL)).decode(errors="replace").strip()
        return f"; it printed last: {text[-400:]}" if text else ""
