# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""QEMU's machine protocol over a connected socket: commands, and events with a deadline.

Knows QMP's framing (a JSON object a line). Does not start or end any program.
"""

from __future__ import annotations

import json
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

Event = dict[str, Any]


class QmpError(Exception):
    """A command that QEMU refused, or a monitor that went away."""


class Qmp:
    def __init__(self, sock: socket.socket, *, timeout: float = 30) -> None:
        self._sock = sock
        self._buffer = b""
        self._events: deque[Event] = deque()
        greeting = self._message(time.monotonic() + timeout)
        if "QMP" not in greeting:
            raise QmpError(f"no greeting but {greeting}")
        self.command("qmp_capabilities")

    def command(
        self, execute: str, arguments: Mapping[str, Any] | None = None, *, timeout: float = 30
    ) -> Any:
        request = {"execute": execute, "arguments": arguments or {}}
        self._sock.sendall(json.dumps(request).encode() + b"\n")
        deadline = time.monotonic() + timeout
        while True:
            message = self._message(deadline)
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise QmpError(f"{execute}: {message['error']['desc']}")
            self._events.append(message)

    def wait_event(
        self, *names: str, timeout: float = 30, matches: Callable[[Event], bool] = lambda event: True
    ) -> Event:
        """The first event of these names, also one that came before the call; it is used up."""
        deadline = time.monotonic() + timeout
        while True:
            for event in self._events:
                if event["event"] in names and matches(event):
                    self._events.remove(event)
                    return event
            self._events.append(self._message(deadline))

    def close(self) -> None:
        self._sock.close()

    def _message(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"QMP: no message in time; events so far: {list(self._events)}")
            self._sock.settimeout(left)
            data = self._sock.recv(65536)
            if not data:
                raise QmpError("the monitor went away")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message
