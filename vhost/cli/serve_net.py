# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vhost serve net``: what a network device is connected to, as options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from vhost.cli.arguments import size

if TYPE_CHECKING:
    from vhost.devices.base import Device


def mac(text: str) -> bytes:
    try:
        address = bytes.fromhex(text.replace(":", ""))
    except ValueError:
        address = b""
    if len(address) != 6:
        raise argparse.ArgumentTypeError(f"{text!r} is no address such as 52:54:00:12:34:56")
    return address


def add_options(net: argparse.ArgumentParser) -> None:
    wires = net.add_mutually_exclusive_group()
    wires.add_argument("--echo", action="store_true", help="send back what the guest sends")
    wires.add_argument("--drop", action="store_true", help="count what the guest sends, and drop it")
    wires.add_argument(
        "--source", type=size, metavar="SIZE", help="frames of SIZE bytes, as fast as the guest takes them"
    )
    net.add_argument("--queue-pairs", type=int, default=1, metavar="N", help="pairs offered (default 1)")
    net.add_argument("--queue-size", type=int, default=1024, metavar="N", help="largest ring (default 1024)")
    net.add_argument("--threads", type=int, metavar="N", help="workers (default: one a pair or CPU)")
    net.add_argument("--mac", type=mac, metavar="MAC", help="the guest's address (default: a random one)")
    net.add_argument("--mtu", type=int, metavar="N", help="the MTU that the guest is told")
    net.set_defaults(factory=factory)


def factory(args: argparse.Namespace) -> Callable[[], Device]:
    from vhost.devices.net import Net, random_mac
    from vhost.devices.net_wires import Drop, Echo, Source, Wire

    def wire() -> Wire:
        if args.source is not None:
            return Source(args.source)
        return Echo() if args.echo else Drop()

    if not (args.echo or args.drop or args.source is not None):
        raise SystemExit("vhost serve net: one of --echo, --drop and --source is needed")

    address = args.mac or random_mac()  # the same for each session: a guest may come back

    def make() -> Device:
        return Net(
            wire(),
            queue_pairs=args.queue_pairs,
            queue_size=args.queue_size,
            mac=address,
            mtu=args.mtu,
            threads=args.threads,
        )

    try:
        make().close()  # what cannot be served is an error now, not at the first connection
    except ValueError as error:
        raise SystemExit(f"vhost serve net: {error}") from None
    return make
