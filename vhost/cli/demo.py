# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vhost demo``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from vhost.cli.arguments import size

if TYPE_CHECKING:
    from vhost.cli.arguments import Commands


def add_commands(commands: Commands) -> None:
    demo = commands.add_parser("demo", help="serve a disk and drive it from another process, no VM needed")
    demo.add_argument("--size", type=size, default=64 << 20, metavar="BYTES", help="disk size (default 64M)")
    demo.add_argument("--seconds", type=float, default=2.0, metavar="N", help="measure this long (default 2)")
    demo.set_defaults(run=run_demo)


def run_demo(args: argparse.Namespace) -> int:
    from vhost.demo import demo

    demo(size=args.size, seconds=args.seconds)
    return 0
