# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""asyncio: serve and connect. See ``vhost.user.aio``."""

from vhost.user.aio import AsyncFrontend, AsyncServer, connect, serve, start_server

__all__ = ["AsyncFrontend", "AsyncServer", "connect", "serve", "start_server"]
