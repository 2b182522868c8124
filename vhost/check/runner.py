# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""All rules in a row: one verdict each, with the evidence."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from vhost.check import rules_all
from vhost.check.rule import RULES, Failed, NotOffered, Rule, Skipped, Verdict
from vhost.check.target import CannotRun, Target
from vhost.errors import VhostError
from vhost.features import ProtocolF, VhostF, VirtioF, feature_names

EVIDENCE = 24
"""Lines of a conversation that are kept, its end."""


@dataclass(frozen=True, slots=True)
class Result:
    """The verdict on one rule. ``reason`` says in a phrase why it is not "pass"."""

    rule: Rule
    verdict: Verdict
    reason: str = ""
    evidence: list[str] = field(default_factory=list)
    """What was said, decoded; of failures only."""
    seconds: float = 0.0


def missing(rule: Rule, target: Target) -> str:
    """What the back-end would have to offer for the rule to apply."""
    names = feature_names(rule.protocol & ~target.protocol, ProtocolF)
    names += feature_names(rule.features & ~target.offered, VirtioF, VhostF)
    if rule.device not in ("", "any") and rule.device != target.device:
        names.append(f"not a {rule.device} device")
    return " ".join(names)


def judge(rule: Rule, target: Target) -> Result:
    """One rule on connections of its own."""
    start = time.monotonic()
    absent = missing(rule, target)
    if absent:
        return Result(rule, Verdict.NOT_OFFERED, absent)
    if rule.writes and not target.write:
        return Result(rule, Verdict.SKIPPED, "it changes data: only with --write")
    verdict, reason = Verdict.PASS, ""
    crashes = len(target.program.crashes) if target.program is not None else 0
    try:
        rule.check(target)
    except Failed as error:
        verdict, reason = Verdict.FAIL, str(error)
    except NotOffered as error:
        verdict, reason = Verdict.NOT_OFFERED, str(error)
    except Skipped as error:
        verdict, reason = Verdict.SKIPPED, str(error)
    except VhostError as error:
        verdict, reason = Verdict.FAIL, f"what came cannot be taken for an answer: {error}"
    except OSError as error:
        raise CannotRun(f"{rule.id}: {error}") from error
    finally:
        said = target.end_rule()
    died = _aftermath(target, crashes)
    if died:
        verdict, reason = Verdict.FAIL, f"{reason}; {died}" if reason else died
    return Result(
        rule,
        verdict,
        reason,
        said[-EVIDENCE:] if verdict is Verdict.FAIL else [],
        time.monotonic() - start,
    )


def _aftermath(target: Target, crashes: int) -> str:
    """What became of the back-end: a crash may show only with the next connection."""
    program = target.program
    if program is not None and target.once:
        if not program.ended(target.timeout):
            program.stop()
        died = ""
    else:
        died = target.alive()
    if program is not None:
        program.note_crash()
        if len(program.crashes) > crashes:
            return program.crashes[crashes]
    return died


def run(
    target: Target, rules: Iterable[Rule], tell: Callable[[Result], None] = lambda result: None
) -> list[Result]:
    """All of them; ``tell`` hears each verdict as it falls. CannotRun if there is nobody to ask."""
    target.learn()
    results: list[Result] = []
    gone = False
    for rule in rules:
        if gone:
            result = Result(rule, Verdict.SKIPPED, "the back-end is gone")
        else:
            result = judge(rule, target)
            gone = result.verdict is Verdict.FAIL and target.program is None and bool(target.alive())
        results.append(result)
        tell(result)
    return results


assert rules_all

__all__ = ["RULES", "CannotRun", "Result", "judge", "run"]
