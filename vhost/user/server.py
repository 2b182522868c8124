# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Server: any number of sessions on one socket, in one thread.

Listens (or connects, with ``client=True``), and steps each session's Backend when it has something to
do, so that a peer that is slow, silent or never reads its replies keeps nobody else waiting. Knows
sockets and paths; knows neither messages nor rings.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from vhost.devices.base import Device
from vhost.errors import IncorrectFds, VhostError
from vhost.user.backend import Backend
from vhost.user.listener import Listener
from vhost.user.transport import naming

log = logging.getLogger("vhost.server")

DeviceSource = Device | Callable[[], Device]
"""One device for all sessions, or what makes one for each."""


class Server:
    """Serves a device on ``path``, or on the socket ``fd`` (listening or connected).

    ``client``: connect to a front-end that listens on ``path``, and again ``reconnect`` seconds after
    a session ended or could not begin. ``max_connections``: more than that many wait to be accepted.
    ``without``: protocol features, a mask of ProtocolF, that its sessions do not offer;
    ``without_features``: feature bits, such as ACCESS_PLATFORM for a front-end that passes on what it does
    not know.
    """

    def __init__(
        self,
        device: DeviceSource,
        path: str | os.PathLike[str] | None = None,
        *,
        fd: int | None = None,
        client: bool = False,
        max_connections: int = 256,
        reconnect: float = 0.5,
        without: int = 0,
        without_features: int = 0,
    ) -> None:
        if (path is None) == (fd is None):
            raise ValueError("one of path and fd is needed")
        if client and path is None:
            raise ValueError("a client needs a path to connect to")
        self._device = device
        self.path = "" if path is None else os.fspath(path)
        self.client = client
        self.max_connections = max_connections
        self.reconnect = reconnect
        self.without = int(without)
        self.without_features = int(without_features)
        self.backends: dict[int, Backend] = {}
        """The sessions, by the descriptor that each is polled by."""
        self.closed = False
        self._readers: dict[int, Callable[[], None]] = {}
        self._epoll = select.epoll()
        self._listener: socket.socket | None = None
        self._accepting = False
        self._starved = False
        self._bound: Listener | None = None
        self._next_try = time.monotonic()
        try:
            if client:
                self._connect()
            elif fd is not None:
                self._adopt(fd)
            else:
                self._listen()
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        return self._epoll.fileno()

    @property
    def timeout(self) -> float | None:
        """Seconds after which ``step()`` is due even if ``fileno()`` is not readable; None: never.
        There is one while a client waits to connect again, or a listener for descriptors."""
        waits = (self.client and not self.backends) or self._starved
        if self.closed or not waits:
            return None
        return max(0.0, self._next_try - time.monotonic())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- where sessions come from ------------------------------------------------------------------

    def _listen(self) -> None:
        self._bound = Listener(self.path)
        self._listener = self._bound.socket
        self._accept_more()

    def _adopt(self, fd: int) -> None:
        """A socket that was inherited: a listening one, or one session."""
        if fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), f"fd {fd}")
        with naming(f"fd {fd}"):
            sock = socket.socket(fileno=fd)
        if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            sock.close()
            raise IncorrectFds(f"fd {fd} is no Unix stream socket")
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            self._listener = sock
            sock.setblocking(False)
            self._accept_more()
        else:
            self._begin(sock)

    def _connect(self) -> None:
        self._next_try = time.monotonic() + self.reconnect
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)  # a front-end with a full backlog would keep us waiting
        try:
            sock.connect(self.path)
        except (ConnectionError, FileNotFoundError, BlockingIOError) as error:
            sock.close()
            log.info("%s: %s", self.path, error.strerror)
            return
        except BaseException:
            sock.close()
            raise
        self._begin(sock)

    def _connect_again(self) -> None:
        """What stands in the way now may be gone the next time."""
        try:
            self._connect()
        except (VhostError, OSError) as error:
            log.warning("%s: no session for now: %s", self.path, str(error))
        except Exception:
            log.exception("%s: no session for now", self.path)

    def _accept_more(self) -> None:
        """Watch the listening socket exactly while there is room for another session."""
        if self._listener is None:
            return
        room = len(self.backends) < self.max_connections and not self._starved
        if room and not self._accepting:
            self._epoll.register(self._listener, select.EPOLLIN)
        elif self._accepting and not room:
            self._epoll.unregister(self._listener)
        self._accepting = room

    def _begin(self, sock: socket.socket) -> None:
        device: Device | None = None
        try:
            device = self._device if isinstance(self._device, Device) else self._device()
            backend = Backend(device, sock, without=self.without, without_features=self.without_features)
        except BaseException:
            sock.close()
            if device is not None:
                self._close_device(device)
            raise
        self.backends[backend.fileno()] = backend
        self._epoll.register(backend.fileno(), select.EPOLLIN)

    # -- the loop ----------------------------------------------------------------------------------

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        """Have ``step()`` call this, too, when the descriptor is readable: for what else the program's
        only thread has to wait for."""
        self._readers[fd] = callback
        self._epoll.register(fd, select.EPOLLIN)

    def step(self, timeout: float | None = 0.0) -> None:
        """Do what there is to do now, without blocking; or wait up to ``timeout`` seconds for something
        first (None: for ever)."""
        if self.closed:
            return
        if self.timeout == 0.0:
            if self.client:
                self._connect_again()
            else:
                self._starved = False
                self._accept_more()
        for fd, _ in self._epoll.poll(timeout):
            backend = self.backends.get(fd)
            if backend is not None:
                if not backend.step():
                    self._end(fd)
            elif fd in self._readers:
                self._readers[fd]()
                if self.closed:
                    return
            else:
                self._accept()

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:
            self._starve(error)
            return
        try:
            self._begin(sock)
        except VhostError as error:
            log.warning("no device for a new session: %s", str(error))
        except OSError as error:
            self._starve(error)
        except Exception:
            # Whoever wrote the factory wants to know; those who are served need not.
            log.exception("no device for a new session")
        self._accept_more()

    def _starve(self, error: OSError) -> None:
        """Out of descriptors or memory: those who are served go on, the next one has to wait."""
        log.warning("no new session for now: %s", error.strerror or str(error))
        self._starved = True
        self._next_try = time.monotonic() + self.reconnect
        self._accept_more()

    def _end(self, fd: int) -> None:
        # The backend has closed its epoll descriptor, which took it out of ours.
        self._close_device(self.backends.pop(fd).device)
        self._accept_more()
        if self._listener is None and not self.client and not self.backends:
            self.close()

    def _close_device(self, device: Device) -> None:
        """If it was made for one session."""
        if isinstance(self._device, Device):
            return
        try:
            device.close()
        except Exception:
            log.exception("%s: close", type(device).__name__)

    @property
    def devices(self) -> list[Device]:
        """Those that are served now: one for each session, or the one for all of them."""
        if isinstance(self._device, Device):
            return [self._device]
        return [backend.device for backend in self.backends.values()]

    def serve_forever(self) -> None:
        """Until ``close()``, or the end of the one session of a connected ``fd``."""
        while not self.closed:
            self.step(self.timeout)

    def close(self) -> None:
        """End all sessions; remove the socket, if it is still ours. Idempotent."""
        if self.closed:
            return
        self.closed = True
        for backend in self.backends.values():
            backend.close()
            self._close_device(backend.device)
        self.backends.clear()
        if self._bound is not None:
            self._bound.close()
        if self._listener is not None:
            self._listener.close()
        self._epoll.close()


def serve(
    device: DeviceSource,
    path: str | os.PathLike[str] | None = None,
    *,
    fd: int | None = None,
    client: bool = False,
) -> None:
    """Serve a device until interrupted: the shortest way to a working back-end."""
    with Server(device, path, fd=fd, client=client) as server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
