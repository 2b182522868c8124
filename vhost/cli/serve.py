# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vhost serve``: a device as a vhost-user back-end, or for this kernel.

Follows the back-end program conventions of the vhost-user specification ("Backend program
conventions").
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import selectors
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from vhost.cli import serve_net
from vhost.cli.arguments import Masks, cpus, features, size, wakeup_on

if TYPE_CHECKING:
    from vhost.cli.arguments import Commands
    from vhost.devices.base import Device
    from vhost.user.server import DeviceSource, Server

# What --print-capabilities says: QEMU's vhost-user.json, BackendCapabilities.
CAPABILITIES = {
    "blk": {"type": "block", "features": ["read-only", "blk-file"]},
    "net": {"type": "net"},
    "rng": {"type": "rng"},
}

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""What ``vhost serve`` reacts to: its end, for the first two; look again at what is served; say what was
counted."""


def add_commands(commands: Commands) -> None:
    serve = commands.add_parser(
        "serve", help="run a device as a vhost-user back-end, or for this kernel by VDUSE"
    )
    devices = serve.add_subparsers(dest="device", required=True, metavar="DEVICE")
    blk = devices.add_parser("blk", help="a disk on a file or block device")
    rng = devices.add_parser("rng", help="an entropy source")
    net = devices.add_parser("net", help="a network interface")
    for device in (blk, rng, net):
        where = device.add_mutually_exclusive_group()
        where.add_argument("--socket-path", metavar="PATH", help="listen on this Unix socket")
        where.add_argument("--fd", type=int, metavar="FDNUM", help="serve this inherited socket")
        where.add_argument("--vduse", metavar="NAME", help="serve this kernel, as the VDUSE device NAME")
        device.add_argument(
            "--without",
            type=features,
            default=Masks(),
            metavar="FEATURE,...",
            help="features not to offer over vhost-user, e.g. inflight-shmfd,access-platform",
        )
        device.add_argument("--print-capabilities", action="store_true", help="print them as JSON and exit")
    blk.add_argument("--blk-file", metavar="PATH", help="file or block device to serve")
    blk.add_argument("--null-size", type=size, metavar="BYTES", help="serve a null device instead")
    blk.add_argument("--read-only", action="store_true", help="refuse writes")
    blk.add_argument("--num-queues", type=int, default=1, metavar="N", help="queues offered (default 1)")
    blk.add_argument("--queue-size", type=int, default=1024, metavar="N", help="largest ring (default 1024)")
    blk.add_argument("--python", action="store_true", help="run requests in Python")
    blk.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="workers of all sessions (default: one a CPU; with --python the thread that has the socket)",
    )
    blk.add_argument("--cpus", type=cpus, default=(), metavar="N,...", help="CPUs to run the workers on")
    blk.add_argument(
        "--aio",
        choices=("auto", "io_uring", "threads", "sync"),
        default="auto",
        help="who waits for what the page cache does not have (default: the best that this kernel allows)",
    )
    blk.add_argument(
        "--cache",
        choices=("writeback", "writethrough"),
        default="writeback",
        help="writethrough: a write is on stable storage when it is completed (default writeback)",
    )
    blk.add_argument("--serial", default="", help="what GET_ID answers, at most 20 bytes")
    blk.add_argument("--share", action="store_true", help="let several sessions write at the same time")
    blk.set_defaults(factory=blk_factory)
    rng.set_defaults(factory=rng_factory)
    serve_net.add_options(net)
    serve.set_defaults(run=run_serve)


def only_capabilities(arguments: Sequence[str]) -> list[str]:
    """The conventions want all other arguments ignored with --print-capabilities, however wrong they are."""
    words = list(arguments)
    if "serve" not in words[:3] or "--print-capabilities" not in words:
        return words
    return [*words[: words.index("serve") + 2], "--print-capabilities"]


def blk_factory(args: argparse.Namespace) -> Callable[[], Device]:
    from vhost.devices._blk_engine import BlkEngine
    from vhost.devices.blk import Blk

    if (args.blk_file is None) == (args.null_size is None):
        raise SystemExit("vhost serve blk: one of --blk-file and --null-size is needed")

    engine: BlkEngine | None = None

    def make() -> Device:
        return Blk(
            args.blk_file,
            null_size=args.null_size,
            read_only=args.read_only,
            num_queues=args.num_queues,
            queue_size=args.queue_size,
            threads=None if engine else args.threads,
            cpus=() if engine else args.cpus,
            aio=args.aio,
            cache=args.cache,
            serial=args.serial,
            share=args.share,
            handler="python" if args.python else "c",
            engine=engine,
        )

    try:
        make().close()  # what cannot be served is an error now, not at the first connection
    except ValueError as error:
        raise SystemExit(f"vhost serve blk: {error}") from None
    if not args.python and args.aio != "sync":  # there, a session that waits would keep the others waiting
        threads = args.threads or len(args.cpus or os.sched_getaffinity(0))
        engine = BlkEngine(threads, "vhost-blk", args.cpus)
    return make


def rng_factory(args: argparse.Namespace) -> Callable[[], Device]:
    from vhost.devices.rng import Rng

    return Rng


def run_serve(args: argparse.Namespace) -> int:
    if args.print_capabilities:
        print(json.dumps(CAPABILITIES[args.device], indent=2))
        return 0
    where = [args.socket_path, args.fd, args.vduse, getattr(args, "bridge", None)]
    if where.count(None) != len(where) - 1:
        raise SystemExit("vhost serve: one of --socket-path, --fd, --vduse and a bridge's sockets is needed")

    from vhost.devices.base import Device
    from vhost.memory import install_sigbus_handler

    install_sigbus_handler()
    if getattr(args, "bridge", None):
        return serve_vhost_user(args, serve_net.bridge(args))
    source = args.factory(args)
    if args.vduse:
        return serve_vduse(args, source if isinstance(source, Device) else source())
    return serve_vhost_user(args, [(args.socket_path, source)])


def serve_vhost_user(args: argparse.Namespace, sources: Sequence[tuple[str | None, DeviceSource]]) -> int:
    """Each device on its path, or the only one on the descriptor that was inherited."""
    from vhost.devices.base import Device
    from vhost.user.server import Server

    with contextlib.ExitStack() as stack:
        for _, source in sources:
            if isinstance(source, Device):
                stack.callback(source.close)
        wakeup = stack.enter_context(wakeup_on(*SIGNALS))
        servers = [
            stack.enter_context(
                Server(
                    source,
                    path,
                    fd=args.fd,
                    without=args.without.protocol,
                    without_features=args.without.virtio,
                )
            )
            for path, source in sources
        ]
        where = " and ".join(path or f"fd {args.fd}" for path, _ in sources)
        print(f"vhost: serving {args.device} on {where}", file=sys.stderr, flush=True)

        def signalled() -> None:
            if react(wakeup, [device for server in servers for device in server.devices]):
                for server in servers:
                    server.close()

        servers[0].add_reader(wakeup.fileno(), signalled)
        if len(servers) == 1:
            servers[0].serve_forever()
        else:
            serve_together(servers)
    return 0


def serve_together(servers: Sequence[Server]) -> None:
    """Until they are closed, which happens to all of them at once."""
    with selectors.DefaultSelector() as selector:
        for server in servers:
            selector.register(server, selectors.EVENT_READ)
        while not servers[0].closed:
            waits = [server.timeout for server in servers if server.timeout is not None]
            selector.select(min(waits, default=None))
            for server in servers:
                server.step()


def serve_vduse(args: argparse.Namespace, device: Device) -> int:
    from vhost.kernel.vduse import VduseBackend

    with wakeup_on(*SIGNALS) as wakeup, contextlib.closing(device):
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
                    elif react(wakeup, [device]):
                        serving = False
    if backend.left_behind:
        print(f"vhost: {backend.left_behind}", file=sys.stderr, flush=True)
    if backend.error:
        raise backend.error
    return 0


def react(wakeup: socket.socket, devices: Iterable[Device]) -> bool:
    """Do what the signals that came ask for; is it the end?"""
    came = set(wakeup.recv(64))
    if signal.SIGUSR1 in came:
        for device in list(devices):
            print(json.dumps(device.counters()), file=sys.stderr, flush=True)
    if signal.SIGHUP in came:
        refresh(devices)
    return bool(came & {signal.SIGTERM, signal.SIGINT})


def refresh(devices: Iterable[Device]) -> None:
    for device in list(devices):
        try:
            device.refresh()
        except OSError as error:
            print(f"vhost: {error}", file=sys.stderr, flush=True)
