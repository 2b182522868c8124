# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The command ``vhost check``: arguments to a target, verdicts to a terminal and to files."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vhost.cli.arguments import Commands

ABOUT = """\
Judge a back-end by the rules of the vhost-user specification, one verdict each: pass, fail (with what was
said), not offered, skipped. Requests on rings are harmless (a disk's serial number, entropy); what would change
data or leave this machine is only done with --write.

A back-end that ends with its connection is started as often as it takes by what follows --run:

    vhost check /tmp/s --run vhost-user-blk -s /tmp/s -b disk.raw
"""
EXIT = "exit code: 0 nothing failed, 1 a rule failed, 2 the check could not run"


def add_commands(commands: Commands) -> None:
    check = commands.add_parser(
        "check",
        help="judge a back-end or a front-end by the rules of the specification",
        description=ABOUT,
        epilog=EXIT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("socket", nargs="?", metavar="SOCKET", help="of the back-end")
    check.add_argument("--list", action="store_true", help="show all rules and their sections, and exit")
    check.add_argument(
        "--only",
        action="append",
        metavar="PATTERN",
        help="check rules whose id matches, such as 'ring.*' or a topic; repeat for more",
    )
    check.add_argument("--write", action="store_true", help="allow requests that change data or send packets")
    check.add_argument("--device", default="", metavar="KIND", help="what it is, if its features do not tell")
    check.add_argument("--timeout", type=float, default=5.0, metavar="SECONDS", help="for an answer (default 5)")
    check.add_argument(
        "--settle", type=float, default=0.2, metavar="SECONDS", help="how long nothing must happen (default 0.2)"
    )
    check.add_argument("--json", action="store_true", help="verdicts as JSON")
    check.add_argument("--junit", type=Path, metavar="FILE", help="also as JUnit XML")
    check.add_argument("--quiet", action="store_true", help="show failures only")
    check.add_argument(
        "--run", nargs=argparse.REMAINDER, dest="program", metavar="COMMAND", help="starts the back-end; the last option"
    )
    check.set_defaults(run=run_check)


def run_check(args: argparse.Namespace) -> int:
    from vhost.check import report
    from vhost.check.rule import Verdict
    from vhost.check.runner import RULES, run
    from vhost.check.spawn import Program
    from vhost.check.target import CannotRun, Target
    from vhost.check.work import DEVICES

    rules = RULES.select(args.only)
    if args.list:
        shown = [report.rule_dict(rule) for rule in rules]
        print(json.dumps(shown, indent=2) if args.json else "\n".join(report.rule_lines(rules)))
        return 0
    if args.socket is None:
        return _cannot("a SOCKET is needed")
    if not rules:
        return _cannot(f"no rule matches {' '.join(args.only)} (see --list)")
    if args.device and args.device not in DEVICES:
        return _cannot(f"--device {args.device}: must be one of {' '.join(DEVICES)}")
    program = Program(args.program, args.socket) if args.program else None
    target = Target(
        args.socket,
        program=program,
        timeout=args.timeout,
        settle=args.settle,
        write=args.write,
        device=args.device,
    )
    progress = report.Progress(sys.stderr if args.json else sys.stdout, len(rules), quiet=args.quiet or args.json)
    try:
        results = run(target, rules, progress)
    except CannotRun as error:
        return _cannot(str(error))
    finally:
        if program is not None:
            program.close()
    if args.junit:
        args.junit.write_bytes(report.junit(results, f"vhost check {args.socket}"))
    if args.json:
        print(json.dumps(report.document(target, results), indent=2))
    else:
        print(report.summary(results))
    return int(any(result.verdict is Verdict.FAIL for result in results))


def _cannot(why: str) -> int:
    print(f"vhost check: {why}", file=sys.stderr)
    return 2
