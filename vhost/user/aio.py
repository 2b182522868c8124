# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""vhost-user in asyncio programs; exported as ``vhost.aio``.

The same objects as everywhere: a ``Server`` never blocks, so the loop steps it when its descriptor is
readable; a ``Frontend`` waits for answers, so its calls run in a thread of its own, one at a time and
in their order.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from vhost.user.frontend import Frontend
from vhost.user.server import DeviceSource, Server

P = ParamSpec("P")
T = TypeVar("T")


class AsyncServer:
    """A ``Server`` that the running loop steps until ``close()``; ``wait_closed()`` waits for that."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._loop = asyncio.get_running_loop()
        self._fd = server.fileno()
        self._closed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._loop.add_reader(self._fd, self._step)
        self._schedule()

    def _step(self) -> None:
        self.server.step()
        self._schedule()

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.server.closed:
            self.close()
        elif self.server.timeout is not None:
            self._timer = self._loop.call_later(self.server.timeout, self._step)

    def close(self) -> None:
        """End all sessions. Idempotent."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._fd)
        self.server.close()

    async def wait_closed(self) -> None:
        await self._closed.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def start_server(
    device: DeviceSource,
    path: str | os.PathLike[str] | None = None,
    *,
    fd: int | None = None,
    client: bool = False,
) -> AsyncServer:
    """Serve a device in the running loop; what ``vhost.Server`` takes."""
    return AsyncServer(Server(device, path, fd=fd, client=client))


async def serve(
    device: DeviceSource,
    path: str | os.PathLike[str] | None = None,
    *,
    fd: int | None = None,
    client: bool = False,
) -> None:
    """Serve a device until cancelled."""
    async with start_server(device, path, fd=fd, client=client) as server:
        await server.wait_closed()


class AsyncFrontend:
    """A ``Frontend`` whose calls are awaited: ``await frontend.run(frontend.sync.get_features)``.

    Drivers work the same way, for all that they do is call the front-end:
    ``disk = await frontend.run(vhost.drivers.Blk, frontend.sync)``.
    """

    def __init__(self, sync: Frontend, executor: ThreadPoolExecutor) -> None:
        self.sync = sync
        self._executor = executor

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call it in the front-end's thread, after what was started there before."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, functools.partial(function, *args, **kwargs))

    async def close(self) -> None:
        """End the session. Idempotent."""
        await self.run(self.sync.close)
        self._executor.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def connect(path: str | os.PathLike[str], **options: Any) -> AsyncFrontend:
    """Connect to a back-end; options as for ``Frontend.connect``."""
    executor = ThreadPoolExecutor(1, "vhost-frontend")
    connecting = functools.partial(Frontend.connect, path, **options)
    try:
        sync = await asyncio.get_running_loop().run_in_executor(executor, connecting)
    except BaseException:
        executor.shutdown(wait=False)
        raise
    return AsyncFrontend(sync, executor)


__all__ = ["AsyncFrontend", "AsyncServer", "connect", "serve", "start_server"]
