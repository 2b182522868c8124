# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Rules as data: what each is called, where the specification has it, and who has to keep it.

A rule is a function that returns when the rule was kept, and raises one of the outcomes below when it
was not or cannot be judged. Knows nothing of connections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from vhost.features import ProtocolF, VirtioF


class Severity(Enum):
    """What stands behind a rule."""

    MUST = "must"
    """The specification demands it, in these words or by saying how a message works."""
    SHOULD = "should"
    """The specification recommends it, or good sense does where it leaves both ways open."""
    ROBUST = "robust"
    """The specification does not speak of it: nothing that a peer sends may take the other side down."""


class Verdict(Enum):
    """The outcome of one rule."""

    PASS = "pass"
    FAIL = "fail"
    NOT_OFFERED = "not offered"
    SKIPPED = "skipped"


class Outcome(Exception):
    """How a rule says anything but "kept"."""


class Failed(Outcome):
    """The rule was broken; the text says how."""


class Evidence(Failed):
    """Failed, with lines that show it."""

    def __init__(self, text: str, lines: list[str]) -> None:
        super().__init__(text)
        self.lines = lines


class PeerClosed(Failed):
    """The connection ended where an answer was due."""


class NoReply(Failed):
    """Nothing came within the time allowed."""


class NotOffered(Outcome):
    """The peer does not have what the rule is about."""


class Skipped(Outcome):
    """Something else, which is a rule of its own, has to work first; or it was not allowed."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule."""

    id: str
    """``topic.name``, stable: people select rules by it, and tests pin what fails."""
    title: str
    """The rule itself, as a statement that is true of a peer which keeps it."""
    section: str
    """Of the vhost-user specification, or "VIRTIO ..."."""
    severity: Severity
    check: Callable[..., None] = field(repr=False)
    protocol: int = 0
    """Protocol features that it needs; not offered otherwise."""
    features: int = 0
    """Virtio and vhost features that it needs."""
    device: str = ""
    """The kind of device that it is about; "any" is one for which a harmless request is known."""
    writes: bool = False
    """It changes data or sends packets: only on demand."""
    role: str = "back-end"
    """Whose rule it is."""

    @property
    def topic(self) -> str:
        return self.id.split(".", 1)[0]

    def needs(self) -> list[str]:
        """What it takes, for people."""
        names = [f.name or "" for kind, mask in ((ProtocolF, self.protocol), (VirtioF, self.features))
                 for f in kind if int(f) & mask]  # fmt: skip
        return names + ([f"device {self.device}"] if self.device else []) + ["--write"] * self.writes


class Registry:
    """The rules in the order of their files."""

    def __init__(self) -> None:
        self._rules: dict[str, Rule] = {}

    def __iter__(self) -> Iterator[Rule]:
        return iter(self._rules.values())

    def __len__(self) -> int:
        return len(self._rules)

    def add(self, rule: Rule) -> None:
        if rule.id in self._rules:
            raise ValueError(f"two rules are called {rule.id}")
        self._rules[rule.id] = rule

    def select(self, patterns: list[str] | None = None, *, role: str = "back-end") -> list[Rule]:
        """Those whose id matches one of the patterns (``*`` and ``?`` as in file names, or a whole topic)."""
        chosen = [rule for rule in self if rule.role == role]
        if not patterns:
            return chosen
        return [
            rule
            for rule in chosen
            if any(fnmatchcase(rule.id, pattern) or rule.topic == pattern for pattern in patterns)
        ]


RULES = Registry()


def rule(
    id: str,
    title: str,
    *,
    section: str,
    severity: Severity = Severity.MUST,
    protocol: int = 0,
    features: int = 0,
    device: str = "",
    writes: bool = False,
    role: str = "back-end",
    **arguments: Any,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a rule. ``arguments`` are passed on to it, so that one function can be
    several rules."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        def check(target: Any) -> None:
            function(target, **arguments)

        RULES.add(
            Rule(id, title, section, severity, check, int(protocol), int(features), device, writes, role)
        )
        return function

    return register


@contextmanager
def prerequisite(what: str) -> Iterator[None]:
    """What fails in here is another rule's business: this one cannot be judged."""
    try:
        yield
    except Failed as error:
        raise Skipped(f"{what}: {error}") from error


def expect(condition: object, complaint: str) -> None:
    """The rule is broken unless this is true."""
    if not condition:
        raise Failed(complaint)
