# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vhost serve net``: what a network device is connected to, as options. Most devices are made anew for each
session; what is there once (a tap, a socket, the two devices of a bridge) has one for all of them."""

from __future__ import annotations

import argparse
import os
import socket
from typing import TYPE_CHECKING, Any

from vhost.cli.arguments import size

if TYPE_CHECKING:
    from vhost.devices.net import Net
    from vhost.devices.net_wires import Wire
    from vhost.user.server import DeviceSource


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
    wires.add_argument("--tap", metavar="NAME", help="a tap of this machine, which is made if there is none")
    wires.add_argument(
        "--socket-pair",
        type=int,
        metavar="FDNUM",
        help="an inherited Unix socket of messages, each of which is a frame",
    )
    wires.add_argument(
        "--bridge", nargs=2, metavar="SOCKET", help="two interfaces, connected; listen on these Unix sockets"
    )
    net.add_argument("--queue-pairs", type=int, default=1, metavar="N", help="pairs offered (default 1)")
    net.add_argument("--queue-size", type=int, default=1024, metavar="N", help="largest ring (default 1024)")
    net.add_argument("--threads", type=int, metavar="N", help="workers (default: one a pair or CPU)")
    net.add_argument("--mac", type=mac, metavar="MAC", help="the guest's address (default: a random one)")
    net.add_argument("--mtu", type=int, metavar="N", help="the MTU that the guest is told")
    net.set_defaults(factory=factory)


def factory(args: argparse.Namespace) -> DeviceSource:
    from vhost.devices.net import random_mac
    from vhost.errors import IoctlError

    mac = args.mac or random_mac()  # the same for each session: a guest may come back
    try:
        if args.tap is not None or args.socket_pair is not None:
            return _device(args, _only_wire(args), mac=mac)
        _device(args, _wire(args), mac=mac).close()  # an error now, not at the first connection
    except (ValueError, IoctlError) as error:
        raise SystemExit(f"vhost serve net: {error}") from None
    return lambda: _device(args, _wire(args), mac=mac)


def bridge(args: argparse.Namespace) -> list[tuple[str, DeviceSource]]:
    """The two devices, and where each listens."""
    from vhost.devices.net_wires import Bridge

    if args.mac is not None:
        raise SystemExit("vhost serve net: --mac is for one interface, --bridge has two")
    try:
        ends = Bridge(threads=1 if args.threads is None else args.threads).ends
        return [(path, _device(args, end, threads=None)) for path, end in zip(args.bridge, ends, strict=True)]
    except ValueError as error:
        raise SystemExit(f"vhost serve net: {error}") from None


def _device(args: argparse.Namespace, wire: Wire, **options: Any) -> Net:
    from vhost.devices.net import Net

    given = {name: getattr(args, name) for name in ("queue_pairs", "queue_size", "mac", "mtu", "threads")}
    try:
        return Net(wire, **{**given, **options})
    except BaseException:
        wire.close()
        raise


def _wire(args: argparse.Namespace) -> Wire:
    from vhost.devices.net_wires import Drop, Echo, Source

    if args.source is not None:
        return Source(args.source)
    if args.echo:
        return Echo()
    if args.drop:
        return Drop()
    raise SystemExit(
        "vhost serve net: one of --echo, --drop, --source, --tap, --socket-pair and --bridge is needed"
    )


def _only_wire(args: argparse.Namespace) -> Wire:
    from vhost.devices.net_wires import Packets, TapWire
    from vhost.kernel.tap import Tap

    if args.tap is None:
        try:
            return Packets(socket.socket(fileno=os.dup(args.socket_pair)))
        except OSError as error:
            raise ValueError(f"fd {args.socket_pair}: {error.strerror}") from None
    tap = Tap(args.tap, queue_pairs=max(args.queue_pairs, 1))
    try:
        if args.mtu is not None and args.mtu != tap.mtu:
            tap.mtu = args.mtu
        if not tap.is_up:
            tap.up()
        return TapWire(tap)
    except BaseException:
        tap.close()
        raise
