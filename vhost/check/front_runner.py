# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The rules for front-ends: let one play, act on it, let it leave, then judge.

1. it connects, negotiates, starts its rings: watched
2. the topic "ask": what a back-end may ask, while the rings run
3. it ends (a program of ours is told to)
4. what was seen is judged: the topics "lint" and "order"
5. the topic "refusal": the program is started once more for each
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from vhost.check import rules_frontend
from vhost.check.rule import Evidence, Failed, NotOffered, Rule, Skipped, Verdict
from vhost.check.runner import Result
from vhost.check.spawn import Program
from vhost.check.stage import Stage
from vhost.check.target import CannotRun

Tell = Callable[[Result], None]


def run_frontend(
    stage: Stage, program: Program | None, rules: Sequence[Rule], tell: Tell, *, wait: float, watch: float
) -> list[Result]:
    """One verdict for each of the rules. ``wait`` seconds for the front-end to start a ring, which is then
    watched for ``watch`` seconds. CannotRun if none comes."""
    results: dict[str, Result] = {}

    def judged(rule: Rule, result: Result | None = None) -> None:
        results[rule.id] = result or judge(rule, stage)
        tell(results[rule.id])

    _play(stage, program, wait)
    stage.pause(watch)
    for rule in rules:
        if rule.topic == "ask":
            judged(rule)
    crash = _leave(stage, program, watch)
    for rule in rules:
        if rule.topic not in ("ask", "refusal"):
            judged(rule)
    for rule in rules:
        if rule.topic != "refusal":
            continue
        if program is None:
            reason = "it needs a front-end that can be started again (--run)"
            judged(rule, Result(rule, Verdict.SKIPPED, reason))
            continue
        stage.refuses = rules_frontend.REFUSALS[rule.id]
        try:
            _play(stage, program, wait, refused=True)
            stage.pause(watch)
            judged(rule)
        finally:
            stage.refuses = frozenset()
            crash = _leave(stage, program, watch) or crash
    if crash:
        raise CannotRun(crash)
    return [results[rule.id] for rule in rules]


def judge(rule: Rule, stage: Stage) -> Result:
    """One rule on what was seen, or is seen now."""
    start = time.monotonic()
    channel = next((actor.raw for actor in stage.actors if actor.raw is not None), None)
    said = len(channel.transcript) if channel is not None else 0
    verdict, reason, evidence = Verdict.PASS, "", list[str]()
    try:
        rule.check(stage)
    except Evidence as error:
        verdict, reason, evidence = Verdict.FAIL, str(error), error.lines
    except Failed as error:
        verdict, reason = Verdict.FAIL, str(error)
        evidence = channel.transcript[said:] if channel is not None else []
    except NotOffered as error:
        verdict, reason = Verdict.NOT_OFFERED, str(error)
    except Skipped as error:
        verdict, reason = Verdict.SKIPPED, str(error)
    return Result(rule, verdict, reason, evidence, time.monotonic() - start)


def _play(stage: Stage, program: Program | None, wait: float, *, refused: bool = False) -> None:
    """Until it has started a ring, or, where something is refused, until it asked for that."""
    before = len(stage.sessions)
    if program is not None:
        program.start()

    def ready() -> bool:
        if len(stage.sessions) <= before:
            return False
        session = stage.sessions[-1]
        if refused:
            return bool(stage.messages(*stage.refuses, session=session)) or stage.over(session)
        return bool(stage.started_rings(session)) or stage.over(session)

    if stage.until(ready, wait) or len(stage.sessions) > before:
        return
    how = f" ({program.how()})" if program is not None else ""
    raise CannotRun(f"{stage.path}: no front-end said anything within {wait:g} s{how}")


def _leave(stage: Stage, program: Program | None, watch: float) -> str:
    """It ends, if that can be had: a program is told to. Returns how it crashed, if it did."""
    session = stage.sessions[-1]
    if program is None:
        stage.until(lambda: stage.over(session), watch)
        return ""
    program.ask_to_end()
    # It may need us to answer while it ends.
    stage.until(lambda: not program.alive, stage.timeout * 4)
    program.note_crash()
    crash = program.crashes[-1] if program.crashes else ""
    program.stop()
    stage.until(lambda: stage.over(session), stage.timeout)
    return crash
