# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""asyncio: sessions that are cancelled, closed twice, or told something that nobody asked for."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

import vhost
import vhost.aio
from user import hostile as h


def test_close_is_idempotent(tmp_path: Path, no_leaks: None) -> None:
    path = tmp_path / "s"

    async def main() -> None:
        async with vhost.aio.start_server(vhost.devices.Rng, path) as server:
            async with await vhost.aio.connect(path) as frontend:
                await frontend.close()
                await frontend.close()
            server.close()

    asyncio.run(main())


def test_configuration_changes_are_heard_between_calls(tmp_path: Path, no_leaks: None) -> None:
    path, device = tmp_path / "s", vhost.devices.Blk(null_size=1 << 20)

    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        sizes: asyncio.Queue[int] = asyncio.Queue()
        async with vhost.aio.start_server(device, path), await vhost.aio.connect(path) as frontend:

            def look() -> None:
                capacity = int.from_bytes(frontend.sync.get_config(0, 8), "little")
                loop.call_soon_threadsafe(sizes.put_nowait, capacity)

            frontend.sync.on_config_change = look
            # A device that runs no ring says nothing.
            disk = await frontend.run(vhost.drivers.Blk, frontend.sync)
            seen = []
            for size in (2, 3, 4):
                device.resize(size << 20)
                seen.append(await asyncio.wait_for(sizes.get(), 20))
            await frontend.run(disk.close)
            return seen

    assert asyncio.run(main()) == [size << 11 for size in (2, 3, 4)]
    device.close()


def test_callback_that_fails_is_reported(tmp_path: Path, no_leaks: None) -> None:
    path, device = tmp_path / "s", vhost.devices.Blk(null_size=1 << 20)

    async def main() -> list[str]:
        reports: asyncio.Queue[str] = asyncio.Queue()
        asyncio.get_running_loop().set_exception_handler(
            lambda loop, context: reports.put_nowait(str(context["exception"]))
        )
        async with vhost.aio.start_server(device, path), await vhost.aio.connect(path) as frontend:

            def look() -> None:
                raise RuntimeError("do not look")

            frontend.sync.on_config_change = look
            # A device that runs no ring says nothing.
            disk = await frontend.run(vhost.drivers.Blk, frontend.sync)
            seen = []
            for size in (2, 3):
                device.resize(size << 20)
                seen.append(await asyncio.wait_for(reports.get(), 20))
            await frontend.run(disk.close)
            return seen

    assert asyncio.run(main()) == ["do not look"] * 2
    device.close()


def test_back_end_that_goes_away_keeps_the_loop_asleep(tmp_path: Path, no_leaks: None) -> None:
    path = tmp_path / "s"

    async def main() -> None:
        server = vhost.aio.start_server(vhost.devices.Rng, path)
        async with await vhost.aio.connect(path) as frontend:
            server.close()
            with pytest.raises(vhost.ProtocolError):
                await frontend.run(frontend.sync.reset_device)

    asyncio.run(main())


@pytest.mark.filterwarnings("error")
def test_connect_that_is_cancelled_lets_go(tmp_path: Path, no_leaks: None) -> None:
    """The front-end's thread is in the handshake then, and completes it."""
    path = tmp_path / "s"

    async def main() -> bytes:
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            listener.setblocking(False)
            connecting = asyncio.ensure_future(vhost.aio.connect(path))
            peer, _ = await loop.sock_accept(listener)
            with peer:
                assert len(await loop.sock_recv(peer, 12)) == 12  # GET_FEATURES
                connecting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await connecting
                await loop.sock_sendall(peer, h.HEADER.pack(h.GET_FEATURES, 5, 8) + h.u64(0))
                assert len(await loop.sock_recv(peer, 12)) == 12  # SET_OWNER, the last of it
                return await asyncio.wait_for(loop.sock_recv(peer, 1), 20)

    assert asyncio.run(main()) == b""
