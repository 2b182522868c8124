# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What every part of the linter has: the session's state, the message it looks at, and its findings.

A part is a mixin with methods ``front_<handler>``, ``front_<handler>_reply``, ``back_<handler>`` and
``back_<handler>_reply``, named by the row and the sender of the request; whichever there are is called
once the message was decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from typing import Any

from vhost.trace.records import FdInfo
from vhost.trace.rules import Finding, Rule
from vhost.trace.state import SessionSeen
from vhost.user.payloads import EMPTY
from vhost.user.spec import Channel, Spec


@dataclass(slots=True)
class Seen:
    """A message that passed. ``request`` is what a reply answers."""

    spec: Spec
    time: int
    channel: Channel = Channel.MAIN
    payload: Any = EMPTY
    fds: tuple[FdInfo, ...] = ()
    fd_count: int = 0
    need_reply: bool = False
    own_reply: bool = False
    """It is answered by its row's reply payload rather than an ack."""
    request: Seen | None = None
    is_reply: bool = False
    is_ack: bool = False
    names: tuple[type[IntFlag], ...] = ()
    """Flags by which a u64 is shown: the row's, and those of the device that it seems to be."""
    optional: bool = False
    """Whether it is answered is up to the peer."""

    @property
    def failed(self) -> bool:
        """An ack that says so."""
        return self.is_ack and bool(self.payload.value)


class LintBase:
    def __init__(self) -> None:
        self.state = SessionSeen()
        self._findings: list[Finding] = []

    def report(self, rule: Rule, text: str, section: str | None = None) -> None:
        self._findings.append(Finding(rule, text, section or rule.section))

    def take_findings(self) -> tuple[Finding, ...]:
        """What was found since the last call."""
        found, self._findings = tuple(self._findings), []
        return found
