# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The command line: ``python -m vhost``, installed as ``vhost``.

Knows how to turn arguments into the library's objects and its answers into text; everything else
is in the library. `serve` follows the back-end program conventions of the vhost-user
specification ("Backend program conventions").
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import selectors
import signal
import socket
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vhost.check.command import add_parser as add_check_parser
from vhost.errors import VhostError

if TYPE_CHECKING:
    from vhost.devices.base import Device

# What --print-capabilities says: QEMU's vhost-user.json, BackendCapabilities.
CAPABILITIES = {
    "blk": {"type": "block", "features": ["read-only", "blk-file"]},
    "rng": {"type": "rng"},
}

IOCTL_COLUMNS = ("type", "nr", "name", "direction", "size", "devices", "feature", "doc")
MESSAGE_COLUMNS = ("id", "name", "sender", "request", "reply", "fds", "feature", "live", "doc")
"""What fits a terminal; --json has all of a row."""


def size(text: str) -> int:
    """Bytes, with an optional K, M, G or T (powers of 1024)."""
    units = {"K": 10, "M": 20, "G": 30, "T": 40}
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in units else (text, "")
    try:
        value = int(number) << units.get(unit, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 1073741824 or 1G") from None
    if value <= 0:
        raise argparse.ArgumentTypeError(f"size {text!r} is not positive")
    return value


def parser() -> argparse.ArgumentParser:
    about = "vhost for Python: serve, probe and drive virtio devices."
    top = argparse.ArgumentParser(prog="vhost", description=about)
    top.add_argument("-v", "--verbose", action="count", default=0, help="log more; twice: every message")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser(
        "serve", help="run a device as a vhost-user back-end, or for this kernel by VDUSE"
    )
    devices = serve.add_subparsers(dest="device", required=True, metavar="DEVICE")
    blk = devices.add_parser("blk", help="a disk on a file or block device")
    rng = devices.add_parser("rng", help="an entropy source")
    for device in (blk, rng):
        where = device.add_mutually_exclusive_group()
        where.add_argument("--socket-path", metavar="PATH", help="listen on this Unix socket")
        where.add_argument("--fd", type=int, metavar="FDNUM", help="serve this inherited socket")
        where.add_argument("--vduse", metavar="NAME", help="serve this kernel, as the VDUSE device NAME")
        device.add_argument("--print-capabilities", action="store_true", help="print them as JSON and exit")
    blk.add_argument("--blk-file", metavar="PATH", help="file or block device to serve")
    blk.add_argument("--null-size", type=size, metavar="BYTES", help="serve a null device instead")
    blk.add_argument("--read-only", action="store_true", help="refuse writes")
    blk.add_argument("--num-queues", type=int, default=1, metavar="N", help="queues offered (default 1)")
    blk.add_argument("--queue-size", type=int, default=1024, metavar="N", help="largest ring (default 1024)")
    blk.add_argument("--threads", type=int, metavar="N", help="workers (default: one a queue or CPU)")
    blk.add_argument("--serial", default="", help="what GET_ID answers, at most 20 bytes")
    blk.add_argument("--share", action="store_true", help="let several sessions write at the same time")
    blk.set_defaults(factory=blk_factory)
    rng.set_defaults(factory=rng_factory)
    serve.set_defaults(run=run_serve)

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

    add_check_parser(commands)

    demo = commands.add_parser("demo", help="serve a disk and drive it from another process, no VM needed")
    demo.add_argument("--size", type=size, default=64 << 20, metavar="BYTES", help="disk size (default 64M)")
    demo.add_argument("--seconds", type=float, default=2.0, metavar="N", help="measure this long (default 2)")
    demo.set_defaults(run=run_demo)
    return top


def blk_factory(args: argparse.Namespace) -> Callable[[], Device]:
    from vhost.devices.blk import Blk

    if (args.blk_file is None) == (args.null_size is None):
        raise SystemExit("vhost serve blk: one of --blk-file and --null-size is needed")

    def make() -> Device:
        return Blk(
            args.blk_file,
            null_size=args.null_size,
            read_only=args.read_only,
            num_queues=args.num_queues,
            queue_size=args.queue_size,
            threads=args.threads,
            serial=args.serial,
            share=args.share,
        )

    try:
        make().close()  # what cannot be served is an error now, not at the first connection
    except ValueError as error:
        raise SystemExit(f"vhost serve blk: {error}") from None
    return make


def rng_factory(args: argparse.Namespace) -> Callable[[], Device]:
    from vhost.devices.rng import Rng

    return Rng


@contextlib.contextmanager
def wakeup_on(*signals: signal.Signals) -> Iterator[socket.socket]:
    """A socket that becomes readable with the number of each of these signals."""
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    old = {number: signal.signal(number, lambda *_: None) for number in signals}
    old_fd = signal.set_wakeup_fd(writer.fileno())
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(old_fd)
        for number, handler in old.items():
            signal.signal(number, handler)
        reader.close()
        writer.close()


def run_serve(args: argparse.Namespace) -> int:
    if args.print_capabilities:
        print(json.dumps(CAPABILITIES[args.device], indent=2))
        return 0
    if args.socket_path is None and args.fd is None and args.vduse is None:
        raise SystemExit("vhost serve: one of --socket-path, --fd and --vduse is needed")

    from vhost.memory import install_sigbus_handler

    install_sigbus_handler()
    make = args.factory(args)
    return serve_vduse(args, make()) if args.vduse else serve_vhost_user(args, make)


def serve_vhost_user(args: argparse.Namespace, make: Callable[[], Device]) -> int:
    from vhost.user.server import Server

    alive: weakref.WeakSet[Device] = weakref.WeakSet()

    def factory() -> Device:
        device: Device = make()
        alive.add(device)
        return device

    with (
        wakeup_on(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as wakeup,
        Server(factory, args.socket_path, fd=args.fd) as server,
    ):
        where = args.socket_path or f"fd {args.fd}"
        print(f"vhost: serving {args.device} on {where}", file=sys.stderr, flush=True)

        def signalled() -> None:
            if set(wakeup.recv(64)) & {signal.SIGTERM, signal.SIGINT}:
                server.close()
            refresh(alive)

        server.add_reader(wakeup.fileno(), signalled)
        server.serve_forever()
    return 0


def serve_vduse(args: argparse.Namespace, device: Device) -> int:
    from vhost.kernel.vduse import VduseBackend

    with wakeup_on(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as wakeup, contextlib.closing(device):
        with VduseBackend(device, args.vduse) as backend, selectors.DefaultSelector() as selector:
            selector.register(backend, selectors.EVENT_READ)
            selector.register(wakeup, selectors.EVENT_READ)
            todo = f"now `vdpa dev add name {args.vduse} mgmtdev vduse`"
            if backend.taken_over:
                todo = "going on where a predecessor stopped"
            print(f"vhost: serving {args.device} as {backend.path}; {todo}", file=sys.stderr, flush=True)
            serving = True
            while serving:
                for key, _ in selector.select():
                    if key.fileobj is backend:
                        serving = backend.step() and serving
                    elif set(wakeup.recv(64)) & {signal.SIGTERM, signal.SIGINT}:
                        serving = False
                    else:
                        refresh([device])
    if backend.left_behind:
        print(f"vhost: {backend.left_behind}", file=sys.stderr, flush=True)
    if backend.error:
        raise backend.error
    return 0


def refresh(devices: Iterable[Device]) -> None:
    for device in list(devices):
        try:
            device.refresh()
        except OSError as error:
            print(f"vhost: {error}", file=sys.stderr, flush=True)


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


def run_demo(args: argparse.Namespace) -> int:
    from vhost.demo import demo

    demo(size=args.size, seconds=args.seconds)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(args.verbose, 2)]
    logging.basicConfig(level=level, format="%(name)s: %(message)s", stream=sys.stderr)
    try:
        result: int = args.run(args)
        sys.stdout.flush()
        return result
    except BrokenPipeError:
        # `vhost messages | head` is no error; keep the interpreter from flushing into the pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (VhostError, OSError) as error:
        print(f"vhost: {error}", file=sys.stderr)
        return 1
