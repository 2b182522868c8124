# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""`vhost trace` as a process between two programs, and what it printed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from peers.support import Process

VHOST = [sys.executable, "-m", "vhost"]


class Trace(Process):
    """Listens on ``path`` and connects to ``connect``. Leaving the context ends it and checks that what it
    recorded reads as what it printed."""

    def __init__(self, connect: Path, *options: str, name: str = "trace") -> None:
        self.path = connect.with_name(f"{name}.s")
        self._shown = connect.with_name(f"{name}.json")
        self._recording = connect.with_name(f"{name}.rec")
        command = [*VHOST, "trace", str(self.path), str(connect), "--json"]
        with self._shown.open("w") as output:
            super().__init__(
                [*command, "--write", str(self._recording), *options], ready="tracing", stdout=output
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is not None:
            self.kill()
            value.add_note(f"--- trace\n{self.errors()}{self.text()[-8000:]}")
            return
        errors = self.terminate()
        assert "Traceback" not in errors, errors
        assert not self.path.exists(), f"{self.path} was left behind"
        again = subprocess.run(
            [*VHOST, "trace", "--json", "--read", str(self._recording)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert again.stdout == self._shown.read_text()

    def events(self) -> list[dict[str, Any]]:
        """What it printed; all of it once it has ended."""
        return [
            json.loads(line)
            for line in self._shown.read_text().splitlines(keepends=True)
            if line[-1:] == "\n"
        ]

    def messages(self, name: str, *, reply: bool = False) -> list[dict[str, Any]]:
        return [event for event in self.events() if event.get("name") == name and event["reply"] == reply]

    def findings(self) -> list[tuple[str, str]]:
        """Rule and message of each finding."""
        return [
            (finding["rule"], event.get("name", event["event"]))
            for event in self.events()
            for finding in event["findings"]
        ]

    def violations(self) -> list[str]:
        """What it took for a violation, in words."""
        return [
            f"{event['text']}: {finding['text']}"
            for event in self.events()
            for finding in event["findings"]
            if finding["severity"] == "violation"
        ]

    def text(self) -> str:
        """The recording for people."""
        done = subprocess.run(
            [*VHOST, "trace", "--read", str(self._recording)], capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr
