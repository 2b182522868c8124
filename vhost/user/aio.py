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
from concurrent.futures import Future, ThreadPoolExecutor
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

    What the back-end says by itself is heard without a call; ``sync.on_config_change`` runs in the
    front-end's thread, where it may make requests.
    """

    def __init__(self, sync: Frontend, executor: ThreadPoolExecutor) -> None:
        self.sync = sync
        self._executor = executor
        self._loop = asyncio.get_running_loop()
        self._closed = False
        # Without a channel there is nothing to hear but the replies, which belong to the calls.
        self._fd = -1 if sync.channel is None else sync.fileno()
        self._listen()

    def _listen(self) -> None:
        if self._fd >= 0:
            self._loop.add_reader(self._fd, self._heard)

    def _heard(self) -> None:
        # Readable until the thread has come round to it: do not look again before.
        self._loop.remove_reader(self._fd)
        step = self._loop.run_in_executor(self._executor, self.sync.step)
        step.add_done_callback(self._stepped)

    def _stepped(self, step: asyncio.Future[bool]) -> None:
        error = None if step.cancelled() else step.exception()
        if error is not None:
            self._loop.call_exception_handler(
                {"message": "vhost front-end: on_config_change", "exception": error, "future": step}
            )
        # An end of the channel is no news for this object: the next call meets it.
        if not self._closed and not step.cancelled() and (error is not None or step.result()):
            self._listen()

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call it in the front-end's thread, after what was started there before."""
        call = functools.partial(function, *args, **kwargs)
        return await self._loop.run_in_executor(self._executor, call)

    async def close(self) -> None:
        """End the session. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
        try:
            await self.run(self.sync.close)
        finally:
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
    connecting = executor.submit(Frontend.connect, path, **options)
    try:
        return AsyncFrontend(await asyncio.wrap_future(connecting), executor)
    except BaseException:
        # Cancelled: the thread goes on until it is connected, or not.
        connecting.add_done_callback(_let_go)
        executor.shutdown(wait=False)
        raise


def _let_go(connecting: Future[Frontend]) -> None:
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().close()


__all__ = ["AsyncFrontend", "AsyncServer", "connect", "serve", "start_server"]
