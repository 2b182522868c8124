# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The command line: ``python -m vhost``, installed as ``vhost``.

Knows how to turn arguments into the library's objects and its answers into text; everything else
is in the library. One file a group of commands; each adds its own parsers.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from vhost.cli import check, demo, serve, show, trace
from vhost.errors import VhostError

GROUPS = (serve, show, trace, check, demo)
"""In the order of the help text."""


def parser() -> argparse.ArgumentParser:
    about = "vhost for Python: serve, probe and drive virtio devices."
    top = argparse.ArgumentParser(prog="vhost", description=about)
    top.add_argument("-v", "--verbose", action="count", default=0, help="log more; twice: every message")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in GROUPS:
        group.add_commands(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    own, program = check.split_command(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(serve.only_capabilities(own), argparse.Namespace(program=program))
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(args.verbose, 2)]
    logging.basicConfig(level=level, format="%(name)s: %(message)s", stream=sys.stderr)
    try:
        result: int = args.run(args)
        print(end="", flush=True)  # there may be no sys.stdout
        return result
    except BrokenPipeError:
        # `vhost messages | head` is no error; keep the interpreter from flushing into the pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("vhost: interrupted", file=sys.stderr)
        return 130  # as a shell says it
    except (VhostError, OSError) as error:
        print(f"vhost: {error}", file=sys.stderr)
        return 1
