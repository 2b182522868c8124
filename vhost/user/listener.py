# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A listening Unix socket on a path: takes the place of one that nobody listens on any more, and removes
its own. Knows nothing of who connects."""

from __future__ import annotations

import contextlib
import os
import socket
import stat

from vhost.user.transport import naming


class Listener:
    """Listens when the constructor returns; ``socket`` never blocks."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._inode: tuple[int, int] | None = None
        try:
            with naming(self.path):
                self._bind()
            found = os.stat(self.path)
            self._inode = (found.st_dev, found.st_ino)
            self.socket.listen()
            self.socket.setblocking(False)
        except BaseException:
            self.close()
            raise

    def _bind(self) -> None:
        try:
            self.socket.bind(self.path)
        except OSError:
            if not _is_stale(self.path):
                raise
            os.unlink(self.path)
            self.socket.bind(self.path)

    def fileno(self) -> int:
        return self.socket.fileno()

    def close(self) -> None:
        """Close it; remove the path, if what is there is still ours. Idempotent."""
        if self._inode is not None:
            with contextlib.suppress(FileNotFoundError):
                found = os.stat(self.path)
                if (found.st_dev, found.st_ino) == self._inode:
                    os.unlink(self.path)
            self._inode = None
        self.socket.close()


def _is_stale(path: str) -> bool:
    """A socket that nobody listens on any more."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
    except FileNotFoundError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except BlockingIOError:
            return False  # its backlog is full: it is alive
    return False
