# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vhost probe``, ``vhost messages``, ``vhost ioctls``: what there is, as text or JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vhost.cli.arguments import Commands

IOCTL_COLUMNS = ("type", "nr", "name", "direction", "size", "devices", "feature", "doc")
MESSAGE_COLUMNS = ("id", "name", "sender", "request", "reply", "fds", "feature", "doc")
"""What fits a terminal; --json has all of a row."""


def add_commands(commands: Commands) -> None:
    probe = commands.add_parser("probe", help="show what a back-end offers")
    probe.add_argument(
        "socket", metavar="SOCKET", help="of a vhost-user back-end, or a node such as /dev/vhost-net"
    )
    probe.add_argument("--json", action="store_true", help="as JSON")
    probe.add_argument("--timeout", type=float, default=5.0, metavar="SECONDS", help="default 5")
    probe.set_defaults(run=run_probe)

    messages = commands.add_parser("messages", help="show the table of vhost-user messages")
    messages.add_argument("--json", action="store_true", help="as JSON")
    messages.set_defaults(run=run_messages)

    ioctls = commands.add_parser("ioctls", help="show the table of the kernel's vhost, vDPA and VDUSE ioctls")
    ioctls.add_argument("--json", action="store_true", help="as JSON")
    ioctls.set_defaults(run=run_ioctls)


def run_probe(args: argparse.Namespace) -> int:
    from vhost.kernel.probe import format_node, probe_node
    from vhost.probe import format_report, probe

    if Path(args.socket).is_char_device():
        report = probe_node(args.socket)
        text = format_node(report)
    else:
        report = probe(args.socket, timeout=args.timeout)
        text = format_report(report)
    print(json.dumps(report, indent=2) if args.json else text)
    return 0


def run_messages(args: argparse.Namespace) -> int:
    from vhost.user.messages import table_rows

    show_table(table_rows(), MESSAGE_COLUMNS, args.json)
    return 0


def run_ioctls(args: argparse.Namespace) -> int:
    from vhost.kernel.ioctls import table_rows

    show_table(table_rows(), IOCTL_COLUMNS, args.json)
    return 0


def show_table(rows: list[dict[str, Any]], columns: Sequence[str], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    widths = {name: max(len(name), *(len(_cell(row[name])) for row in rows)) for name in columns[:-1]}
    for row in ({name: name for name in columns}, *rows):
        cells = [_cell(row[name]).ljust(widths[name]) for name in columns[:-1]]
        print("  ".join([*cells, _cell(row[columns[-1]])]).rstrip())


def _cell(value: object) -> str:
    """For the eye: yes or nothing, and features without the prefix that all of them have."""
    if isinstance(value, bool):
        return "yes" if value else ""
    return str(value).removeprefix("VHOST_USER_").removeprefix("PROTOCOL_F_").removeprefix("VHOST_BACKEND_F_")
