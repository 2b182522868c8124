# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Live migration: what runs in one machine goes on in another, on the same host.

Knows QMP's migration commands and events, precopy and postcopy. Knows neither devices nor back-ends: both
machines were started with the same devices, the destination with ``incoming=True``.

    with boot(devices) as source, boot(devices, incoming=True) as target:
        churn = source.start("...")
        migrate(source, target, tmp_path / "migration")
        churn.move(target)                       # a job that the guest took along
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guest.machine import Guest, GuestError
from guest.qmp import Event, QmpError

MIGRATION_SECONDS = 300.0
EVENTS = "events"
POSTCOPY = "postcopy-ram"
RETURN_PATH = "return-path"
"""The source hears how it went at the target, and goes on with the guest if it went wrong."""


class Migration:
    """One journey from ``source`` to ``target``, through a socket at ``path``.

    ``capabilities`` are set in both machines, ``parameters`` (``{"max-bandwidth": 1 << 24}``) in the source.
    """

    def __init__(
        self,
        source: Guest,
        target: Guest,
        path: Path,
        *,
        capabilities: Sequence[str] = (),
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        self.source = source
        self.target = target
        self.uri = f"unix:{path}"
        wanted = [{"capability": name, "state": True} for name in (EVENTS, *capabilities)]
        for guest in (source, target):
            guest.qmp.command("migrate-set-capabilities", {"capabilities": wanted})
        if parameters:
            source.qmp.command("migrate-set-parameters", dict(parameters))

    def start(self) -> None:
        """Returns when it is under way; ``QmpError`` says why QEMU refuses."""
        self.target.qmp.command("migrate-incoming", {"uri": self.uri})
        self.source.qmp.command("migrate", {"uri": self.uri})

    def start_postcopy(self) -> None:
        """Stop the guest here and let it go on there now, whatever is still missing."""
        self.source.qmp.command("migrate-start-postcopy")

    def wait(self, *, timeout: float = MIGRATION_SECONDS) -> dict[str, Any]:
        """Until the guest runs in the target and all of it is there. What ``query-migrate`` says then; a
        GuestError with its reason if the migration failed."""
        deadline = time.monotonic() + timeout
        for guest, name in ((self.source, "source"), (self.target, "target")):
            self._until(guest, name, ("completed",), deadline)
        self.target.become(self.source)
        outcome: dict[str, Any] = self.source.qmp.command("query-migrate")
        return outcome

    def wait_status(self, *states: str, timeout: float = MIGRATION_SECONDS) -> None:
        """Until the source's migration is in one of these states ("active", "postcopy-active" ...)."""
        self._until(self.source, "source", states, time.monotonic() + timeout)

    def _until(self, guest: Guest, name: str, states: Sequence[str], deadline: float) -> None:
        ends = (*states, "failed", "cancelled", "postcopy-paused")

        def ended(event: Event) -> bool:
            return event["data"]["status"] in ends

        left = max(deadline - time.monotonic(), 0.1)
        status, reason = "it ended", "see its log"
        with contextlib.suppress(QmpError, ConnectionError):  # what a target does whose migration failed
            status = guest.qmp.wait_event("MIGRATION", timeout=left, matches=ended)["data"]["status"]
            if status in states:
                return
            reason = guest.qmp.command("query-migrate").get("error-desc", "no reason given")
        raise GuestError(
            f"migration: {name}: {status}: {reason}\n"
            f"=== source\n{self.source.log()}\n=== target\n{self.target.log()}"
        )


def migrate(source: Guest, target: Guest, path: Path, **options: Any) -> dict[str, Any]:
    """Move a running guest, precopy; the source stays behind, stopped. Returns what the source's
    ``query-migrate`` says: times in milliseconds, RAM in bytes."""
    migration = Migration(source, target, path, **options)
    migration.start()
    return migration.wait()
