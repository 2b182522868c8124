# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The command ``vhost check``: arguments to a target, verdicts to a terminal and to files."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vhost.check.report import Progress
    from vhost.check.rule import Rule
    from vhost.check.runner import Result
    from vhost.cli.arguments import Commands

    Judged = tuple[dict[str, Any], list[Result]]

ABOUT = """\
Judge a back-end by the rules of the vhost-user specification, one verdict each: pass, fail (with what was
said), not offered, skipped. Requests on rings are harmless (a disk's serial number, entropy); what would
change data or leave this machine is only done with --write.

With --listen it is a front-end that is judged, the one that connects to SOCKET, by a back-end that serves it
a device. A back-end that ends with its connection is started as often as it takes by what follows --run:

    vhost check /tmp/s --run vhost-user-blk -s /tmp/s -b disk.raw
    vhost check --listen /tmp/s --device blk --run qemu-system-x86_64 ... -chardev socket,id=c,path=/tmp/s ...
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
    check.add_argument("--listen", metavar="SOCKET", help="judge the front-end that connects here")
    check.add_argument(
        "--wait",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="for a front-end to start a ring (default 60)",
    )
    check.add_argument(
        "--watch",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="how long a front-end is watched (default 2)",
    )
    check.add_argument("--list", action="store_true", help="show the rules and their sections, and exit")
    check.add_argument(
        "--only",
        action="append",
        metavar="PATTERN",
        help="check rules whose id matches, such as 'ring.*' or a topic; repeat for more",
    )
    check.add_argument("--write", action="store_true", help="allow requests that change data or send packets")
    check.add_argument(
        "--device", default="", metavar="KIND", help="what it is, if its features do not tell; what to serve"
    )
    check.add_argument(
        "--timeout", type=float, default=5.0, metavar="SECONDS", help="for an answer (default 5)"
    )
    check.add_argument(
        "--settle",
        type=float,
        default=0.2,
        metavar="SECONDS",
        help="how long nothing must happen (default 0.2)",
    )
    check.add_argument("--json", action="store_true", help="verdicts as JSON")
    check.add_argument("--junit", type=Path, metavar="FILE", help="also as JUnit XML")
    check.add_argument("--quiet", action="store_true", help="show failures only")
    check.add_argument(
        "--run",
        nargs=argparse.REMAINDER,
        dest="program",
        default=argparse.SUPPRESS,
        metavar="COMMAND",
        help="starts what is judged; all that follows is the command",
    )
    check.set_defaults(run=run_check)


def split_command(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments of ours, and the command behind ``--run``, which argparse would look into: it takes a "--"
    there for its own."""
    if "check" not in arguments[:3] or "--run" not in arguments:
        return list(arguments), []
    at = list(arguments).index("--run")
    return list(arguments[:at]), list(arguments[at + 1 :])


def run_check(args: argparse.Namespace) -> int:
    from vhost.check import report
    from vhost.check.rule import Verdict
    from vhost.check.target import CannotRun

    rules = _rules(args)
    if args.list:
        shown = [report.rule_dict(rule) for rule in rules]
        print(json.dumps(shown, indent=2) if args.json else "\n".join(report.rule_lines(rules)))
        return 0
    if not rules:
        return _cannot(f"no rule matches {' '.join(args.only)} (see --list)")
    if (args.socket is None) == (args.listen is None):
        return _cannot("a SOCKET is needed, or --listen SOCKET")
    if args.junit:
        there = args.junit.exists()
        try:
            args.junit.open("ab").close()  # now, and not after the last rule
            if not there:
                args.junit.unlink()
        except OSError as error:
            return _cannot(str(error))
    stream = sys.stderr if args.json else sys.stdout
    progress = report.Progress(stream, len(rules), quiet=args.quiet or args.json)
    # What follows --run has to end with us.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        judge = _judge_frontend if args.listen else _judge_backend
        about, results = judge(args, rules, progress)
    except (CannotRun, OSError) as error:
        return _cannot(str(error))
    if args.junit:
        args.junit.write_bytes(report.junit(results, f"vhost check {args.socket or args.listen}"))
    if args.json:
        print(json.dumps(report.document(about, results), indent=2))
    else:
        print(report.summary(results))
    return int(any(result.verdict is Verdict.FAIL for result in results))


def _rules(args: argparse.Namespace) -> list[Rule]:
    from vhost.check import rules_all, rules_frontend
    from vhost.check.rule import RULES

    assert rules_all and rules_frontend  # which registers them
    if args.list and args.socket is None and args.listen is None:
        return [found for role in ("back-end", "front-end") for found in RULES.select(args.only, role=role)]
    return RULES.select(args.only, role="front-end" if args.listen else "back-end")


def _judge_backend(args: argparse.Namespace, rules: list[Rule], tell: Progress) -> Judged:
    from vhost.check.runner import run
    from vhost.check.spawn import Program
    from vhost.check.target import Target
    from vhost.check.work import DEVICES

    _check_device(args.device, ("", *DEVICES))
    program = Program(args.program, args.socket) if args.program else None
    target = Target(
        args.socket,
        program=program,
        timeout=args.timeout,
        settle=args.settle,
        write=args.write,
        device=args.device,
    )
    try:
        results = run(target, rules, tell)
        return target.as_dict(), results
    finally:
        if program is not None:
            program.close()


def _judge_frontend(args: argparse.Namespace, rules: list[Rule], tell: Progress) -> Judged:
    from vhost.check.front_runner import run_frontend
    from vhost.check.spawn import Program
    from vhost.check.stage import DEVICES, Stage

    device = args.device or "blk"
    _check_device(device, tuple(DEVICES))
    program = Program(args.program) if args.program else None
    try:
        with Stage(args.listen, device, timeout=args.timeout, settle=args.settle) as stage:
            results = run_frontend(stage, program, rules, tell, wait=args.wait, watch=args.watch)
            return {"socket": args.listen, "device": device, "sessions": len(stage.sessions)}, results
    finally:
        if program is not None:
            program.close()


def _check_device(device: str, known: tuple[str, ...]) -> None:
    from vhost.check.target import CannotRun

    if device not in known:
        raise CannotRun(f"--device {device}: must be one of {' '.join(filter(None, known))}")


def _cannot(why: str) -> int:
    print(f"vhost check: {why}", file=sys.stderr)
    return 2
