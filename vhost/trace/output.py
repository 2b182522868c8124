# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Writes lines to a descriptor in a thread of its own, so that a terminal or pipe that nobody reads holds up
no traffic, and no end. What does not fit is dropped, and said so where it is missing."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

MAX_WAITING = 16 << 20
"""Characters that may wait."""


class Output:
    """``lost`` makes the line that says how many are missing. ``on_error`` is called, in the thread, when
    the descriptor, which stays the caller's, takes no more; lines after that are dropped."""

    def __init__(
        self,
        fd: int,
        lost: Callable[[int], str],
        on_error: Callable[[OSError], None],
        *,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        self._fd = fd
        self._lost = lost
        self._on_error = on_error
        self._max_waiting = max_waiting
        self._lines: list[str] = []
        self._waiting = 0
        self._dropped = 0
        self._closed = False
        self._failed = False
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="vhost-trace-output", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Have a line written, soon. Never blocks."""
        with self._news:
            if self._failed:
                return
            if self._waiting + len(line) > self._max_waiting:
                self._dropped += 1
                return
            if self._dropped:
                missing = self._lost(self._dropped)
                self._dropped = 0
                self._add(missing)
            self._add(line)
            self._news.notify()

    def _add(self, line: str) -> None:
        self._lines.append(line)
        self._waiting += len(line)

    def close(self, timeout: float | None = 5.0) -> None:
        """Write what waits, if it is taken within so many seconds."""
        with self._news:
            if self._dropped:
                self._add(self._lost(self._dropped))
                self._dropped = 0
            self._closed = True
            self._news.notify()
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._lines or self._closed)
                lines, self._lines = self._lines, []
                self._waiting = 0
                closed = self._closed
            try:
                self._write(lines)
            except OSError as error:
                with self._news:
                    self._failed = True
                    self._lines.clear()
                self._on_error(error)
                return
            if closed and not self._lines:
                return

    def _write(self, lines: list[str]) -> None:
        view = memoryview("".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))
        while view:
            view = view[os.write(self._fd, view) :]
