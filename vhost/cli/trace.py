# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vhost trace``: sit between a front-end and a back-end, and show what passes; or show a recording."""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vhost.cli.arguments import wakeup_on

if TYPE_CHECKING:
    from vhost.cli.arguments import Commands
    from vhost.trace.events import Event
    from vhost.trace.records import Record


def add_commands(commands: Commands) -> None:
    trace = commands.add_parser(
        "trace",
        help="show what passes between a front-end and a back-end, and what breaks the specification",
        description="Listen on LISTEN and connect to CONNECT for each front-end that comes; pass everything "
        "on, and show each message with what is wrong with it. Ends on SIGTERM or SIGINT.",
    )
    trace.add_argument("listen", metavar="LISTEN", nargs="?", help="where the front-end connects to")
    trace.add_argument("connect", metavar="CONNECT", nargs="?", help="where the back-end listens")
    trace.add_argument(
        "--reverse",
        action="store_true",
        help="the back-end connects to LISTEN, and the front-end listens on CONNECT",
    )
    trace.add_argument("--once", action="store_true", help="end with the first session")
    trace.add_argument("--read", metavar="FILE", help="show a recording instead")
    trace.add_argument("--write", metavar="FILE", help="record what passes, for --read")
    trace.add_argument("--json", action="store_true", help="one JSON object a line")
    trace.add_argument("--findings", action="store_true", help="show only what something is wrong with")
    trace.add_argument("--strict", action="store_true", help="exit with 1 if the specification was violated")
    trace.add_argument("--rules", action="store_true", help="list what is looked for, and exit")
    trace.set_defaults(run=run_trace)


@dataclass
class Summary:
    messages: int = 0
    violations: int = 0
    notes: int = 0

    def add(self, event: Event) -> None:
        self.messages += event.what == "message"
        self.violations += event.violations
        self.notes += event.notes

    def __str__(self) -> str:
        return f"{self.messages} messages, {self.violations} violations, {self.notes} notes"


def run_trace(args: argparse.Namespace) -> int:
    if args.rules:
        return show_rules(args)
    summary = Summary()
    if args.read is not None:
        if args.listen is not None or args.write is not None:
            raise SystemExit("vhost trace: --read takes neither sockets nor --write")
        read(args, summary)
    else:
        if args.connect is None:
            raise SystemExit("vhost trace: LISTEN and CONNECT are needed, or --read")
        proxy(args, summary)
    print(f"vhost: {summary}", file=sys.stderr, flush=True)
    return 1 if args.strict and summary.violations else 0


def show_rules(args: argparse.Namespace) -> int:
    from vhost.cli.show import show_table
    from vhost.trace.rules import RULES

    rows = [
        {"rule": rule.name, "severity": rule.severity.value, "section": rule.section, "doc": rule.doc}
        for rule in RULES.values()
    ]
    show_table(rows, ("rule", "severity", "section", "doc"), args.json)
    return 0


def lines(args: argparse.Namespace, event: Event) -> Iterator[str]:
    if args.findings and not event.findings:
        return
    if args.json:
        yield json.dumps(event.as_dict())
    else:
        yield from event.lines()


def read(args: argparse.Namespace, summary: Summary) -> None:
    from vhost.trace.recording import load
    from vhost.trace.tracer import Tracer

    tracer = Tracer()
    with open(args.read, encoding="utf-8") as file:
        for record in load(file):
            for event in tracer.feed(record):
                summary.add(event)
                for line in lines(args, event):
                    print(line)


def proxy(args: argparse.Namespace, summary: Summary) -> None:
    from vhost.trace.output import Output
    from vhost.trace.proxy import Proxy
    from vhost.trace.recording import dump, header
    from vhost.trace.tracer import Tracer

    more_descriptors()
    tracer = Tracer()

    with contextlib.ExitStack() as stack:
        wakeup = stack.enter_context(wakeup_on(signal.SIGTERM, signal.SIGINT))

        told, teller = (stack.enter_context(sock) for sock in socket.socketpair())

        def failed(error: OSError) -> None:
            with contextlib.suppress(OSError):  # this was the end anyway
                teller.send((error.strerror or "failed").encode())

        shown = Output(sys.stdout.fileno(), lambda count: lost_line(args, count), failed)
        stack.callback(shown.close)
        recorded: Output | None = None
        if args.write is not None:
            file = stack.enter_context(open(args.write, "wb"))
            recorded = Output(file.fileno(), lambda count: dump(lost_record(count)), failed)
            stack.callback(recorded.close)
            recorded.put(header())

        def emit(record: Record) -> None:
            if recorded is not None:
                recorded.put(dump(record))
            for event in tracer.feed(record):
                summary.add(event)
                for line in lines(args, event):
                    shown.put(line)

        between = stack.enter_context(
            Proxy(args.listen, args.connect, emit, reverse=args.reverse, once=args.once)
        )

        def not_written() -> None:
            # The traffic of those who are connected goes on; there is no use in more of them.
            print(f"vhost: output: {told.recv(100).decode()}", file=sys.stderr, flush=True)
            between.draining = True

        between.add_reader(wakeup.fileno(), between.close)
        between.add_reader(told.fileno(), not_written)
        print(f"vhost: tracing {args.listen} to {args.connect}", file=sys.stderr, flush=True)
        between.run()


def lost_record(count: int) -> Record:
    from vhost.trace.records import Happening, Record

    return Record(0, 0, 0, Happening.REMARK, text=f"{count} records are missing: the file was too slow")


def lost_line(args: argparse.Namespace, count: int) -> str:
    text = f"{count} lines are missing: whoever reads this was too slow"
    return json.dumps({"event": "remark", "text": text}) if args.json else f"... {text}"


def more_descriptors() -> None:
    """Each session needs two, and whatever it passes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
