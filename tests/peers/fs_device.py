# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A file system of two files that lives in the device: what a migration has to carry over.

    python fs_device.py SOCKET stateful|plain|picky

``counter`` says how often it was opened, ``secret`` what this process made up when it began; both, and what
is open, are the state of the ``stateful`` device. ``plain``: no save, no load. ``picky``: takes no state.

Speaks just as much FUSE (linux/fuse.h, version 7.31) over virtio-fs (VIRTIO 5.11) as Linux asks for when it
mounts, lists nothing, opens and reads.
"""

from __future__ import annotations

import errno
import json
import logging
import secrets
import stat
import struct
import sys
from collections.abc import Callable

import vhost
from vhost.errors import VhostError
from vhost.memory import install_sigbus_handler

IN = struct.Struct("<IIQQIIIHH")  # fuse_in_header
OUT = struct.Struct("<IiQ")  # fuse_out_header
INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
ATTR = struct.Struct("<6Q10I")
ENTRY_OUT = struct.Struct("<QQQQII")  # and an attr
ATTR_OUT = struct.Struct("<QII")  # and an attr
OPEN_OUT = struct.Struct("<QII")
READ_IN = struct.Struct("<QQI")
STATFS_OUT = struct.Struct("<5Q4I24x")

LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE, FLUSH, INIT = 1, 2, 3, 14, 15, 17, 18, 25, 26
DESTROY, INTERRUPT, BATCH_FORGET = 38, 36, 42
UNANSWERED = (FORGET, INTERRUPT, BATCH_FORGET)
FOPEN_DIRECT_IO = 1
ROOT, COUNTER, SECRET = 1, 2, 3
NODES = {b"counter": COUNTER, b"secret": SECRET}
MOST = 1 << 16


class Errno(Exception):
    """What a request is answered with."""


def attributes(node: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if node == ROOT else stat.S_IFREG | 0o444
    return ATTR.pack(node, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


class Plain(vhost.Device):
    device_id = vhost.DeviceId.FS
    queues = ("requestq", "requestq")  # hiprio, and one for requests

    def __init__(self) -> None:
        self.count = 0
        self.secret = secrets.token_hex(16)
        self.open: dict[int, str] = {}
        self.next_handle = 1
        self.answers: dict[int, Callable[[int, bytes], bytes]] = {
            INIT: self.init,
            LOOKUP: self.lookup,
            GETATTR: lambda node, data: ATTR_OUT.pack(0, 0, 0) + attributes(node),
            OPEN: self.open_file,
            READ: self.read,
            FLUSH: lambda node, data: b"",
            RELEASE: self.close_file,
            STATFS: lambda node, data: STATFS_OUT.pack(0, 0, 0, 0, 0, 512, 255, 512, 0),
            DESTROY: lambda node, data: b"",
        }

    def requestq(self, queue: vhost.DeviceQueue) -> None:
        for chain in queue:
            request = chain.read(min(chain.readable_len, MOST))
            if len(request) < IN.size:
                queue.push(chain, 0)
                continue
            _, opcode, unique, node, *_ = IN.unpack_from(request)
            if opcode in UNANSWERED:
                queue.push(chain, 0)
                continue
            error, answer = 0, b""
            try:
                if opcode not in self.answers:
                    raise Errno(errno.ENOSYS)
                answer = self.answers[opcode](node, request[IN.size :])
            except Errno as refusal:
                error = -refusal.args[0]
            queue.push(chain, chain.write(OUT.pack(OUT.size + len(answer), error, unique) + answer))

    def init(self, node: int, data: bytes) -> bytes:
        return INIT_OUT.pack(7, 31, 0, 0, 16, 12, MOST, 1, 0, 0, 0)

    def lookup(self, node: int, data: bytes) -> bytes:
        found = NODES.get(data.rstrip(b"\0"))
        if found is None:
            raise Errno(errno.ENOENT)
        return ENTRY_OUT.pack(found, 0, 0, 0, 0, 0) + attributes(found)

    def open_file(self, node: int, data: bytes) -> bytes:
        if node == COUNTER:
            self.count += 1
        handle, self.next_handle = self.next_handle, self.next_handle + 1
        self.open[handle] = f"{self.count}\n" if node == COUNTER else f"{self.secret}\n"
        return OPEN_OUT.pack(handle, FOPEN_DIRECT_IO, 0)

    def read(self, node: int, data: bytes) -> bytes:
        handle, offset, size = READ_IN.unpack_from(data)
        if handle not in self.open:
            raise Errno(errno.EBADF)
        return self.open[handle].encode()[offset : offset + size]

    def close_file(self, node: int, data: bytes) -> bytes:
        self.open.pop(struct.unpack_from("<Q", data)[0], None)
        return b""


class Stateful(Plain):
    def save(self) -> bytes:
        return json.dumps([self.count, self.secret, self.open, self.next_handle]).encode()

    def load(self, state: bytes) -> None:
        self.count, self.secret, handles, self.next_handle = json.loads(state)
        self.open = {int(handle): text for handle, text in handles.items()}


class Picky(Stateful):
    def load(self, state: bytes) -> None:
        raise VhostError(f"{len(state)} bytes that are not good enough")


KINDS = {"stateful": Stateful, "plain": Plain, "picky": Picky}

if __name__ == "__main__":
    path, kind = sys.argv[1], sys.argv[2]
    logging.basicConfig(level=logging.INFO)
    install_sigbus_handler()
    device = KINDS[kind]()
    with vhost.Server(device, path) as server:
        print(f"serving {device.secret}", file=sys.stderr, flush=True)
        server.serve_forever()
