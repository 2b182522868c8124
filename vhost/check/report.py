# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Verdicts for people, as JSON and as JUnit XML. Knows results; runs nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, TextIO
from xml.etree import ElementTree

from vhost.check.rule import Rule, Verdict
from vhost.check.runner import Result

_COLOURS = {Verdict.PASS: "32", Verdict.FAIL: "31", Verdict.NOT_OFFERED: "2", Verdict.SKIPPED: "33"}
_WIDTH = max(len(verdict.value) for verdict in Verdict)


def counts(results: Iterable[Result]) -> dict[str, int]:
    """How many of each verdict."""
    counted = Counter(result.verdict for result in results)
    return {verdict.value: counted[verdict] for verdict in Verdict}


def summary(results: Sequence[Result]) -> str:
    figures = ", ".join(f"{number} {name}" for name, number in counts(results).items())
    return f"{len(results)} rules: {figures}"


def line(result: Result, *, colour: bool = False) -> str:
    """One line, and for a failure what it takes to see why."""
    rule = result.rule
    word = result.verdict.value.ljust(_WIDTH)
    if colour:
        word = f"\033[{_COLOURS[result.verdict]}m{word}\033[0m"
    text = f"{word}  {rule.id:<36} {rule.title}"
    if result.verdict is Verdict.PASS:
        return text
    if result.verdict is not Verdict.FAIL:
        return f"{text}  ({result.reason})"
    pad = " " * (_WIDTH + 2)
    lines = [text, f"{pad}{rule.severity.value}, {rule.section}: {result.reason}"]
    lines += [f"{pad}  {said}" for said in result.evidence]
    return "\n".join(lines)


class Progress:
    """Tells verdicts as they fall: on a terminal the rule that is being judged too."""

    def __init__(self, stream: TextIO, total: int, *, quiet: bool) -> None:
        self.stream = stream
        self.total = total
        self.quiet = quiet
        """Failures only."""
        self.terminal = stream.isatty()
        self.done = 0

    def __call__(self, result: Result) -> None:
        self.done += 1
        if self.terminal:
            self.stream.write("\r\033[K")
        if not self.quiet or result.verdict is Verdict.FAIL:
            self.stream.write(line(result, colour=self.terminal) + "\n")
        if self.terminal and self.done < self.total:
            self.stream.write(f"{self.done}/{self.total} ...")
        self.stream.flush()


def as_dict(result: Result) -> dict[str, Any]:
    """One verdict as plain data."""
    return {
        **rule_dict(result.rule),
        "verdict": result.verdict.value,
        "reason": result.reason,
        "evidence": result.evidence,
        "seconds": round(result.seconds, 3),
    }


def document(about: dict[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """The whole run as plain data; ``about`` is what was judged."""
    return {**about, "counts": counts(results), "results": [as_dict(result) for result in results]}


def rule_dict(rule: Rule) -> dict[str, Any]:
    """A rule as plain data."""
    return {
        "id": rule.id,
        "title": rule.title,
        "section": rule.section,
        "severity": rule.severity.value,
        "role": rule.role,
        "needs": rule.needs(),
    }


def junit(results: Sequence[Result], name: str) -> bytes:
    """JUnit XML: a test case a rule; what is not offered, and what was skipped, is "skipped"."""
    figures = counts(results)
    attributes = {
        "name": name,
        "tests": str(len(results)),
        "failures": str(figures[Verdict.FAIL.value]),
        "errors": "0",
        "skipped": str(figures[Verdict.NOT_OFFERED.value] + figures[Verdict.SKIPPED.value]),
        "time": f"{sum(result.seconds for result in results):.3f}",
    }
    root = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(root, "testsuite", attributes)
    for result in results:
        rule = result.rule
        where = {"classname": f"vhost-user.{rule.topic}", "name": f"{rule.id}: {rule.title}"}
        case = ElementTree.SubElement(suite, "testcase", {**where, "time": f"{result.seconds:.3f}"})
        if result.verdict is Verdict.FAIL:
            kind = {"message": _printable(result.reason), "type": rule.severity.value}
            ElementTree.SubElement(case, "failure", kind).text = _printable(
                "\n".join([f"section: {rule.section}", *result.evidence])
            )
        elif result.verdict is not Verdict.PASS:
            reason = f"{result.verdict.value}: {result.reason}"
            ElementTree.SubElement(case, "skipped", {"message": _printable(reason)})
    ElementTree.indent(root)
    body: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return body + b"\n"


def _printable(text: str) -> str:
    """XML has no control characters."""
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def rule_lines(rules: Sequence[Rule]) -> list[str]:
    """``--list``."""
    width = max((len(rule.id) for rule in rules), default=0)
    lines = []
    for rule in rules:
        needs = f"  [{', '.join(rule.needs())}]" if rule.needs() else ""
        lines.append(f"{rule.id:<{width}}  {rule.severity.value:<6}  {rule.title} ({rule.section}){needs}")
    return lines
