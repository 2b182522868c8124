# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""One listener, many sessions: devices from a factory, limits, and what remains afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import socket
import threading
import time
import weakref
from pathlib import Path

import pytest

import vhost
import vhost.aio
from user import hostile as h
from user.hostile import RawFrontend


def test_one_device_each_from_a_factory(tmp_path: Path, no_leaks: None) -> None:
    made: list[Counting] = []

    class Counting(vhost.devices.Rng):
        closed = False

        def __init__(self) -> None:
            made.append(self)

        def close(self) -> None:
            self.closed = True

    path = tmp_path / "s"
    with h.served(Counting, path):
        with contextlib.ExitStack() as stack:
            drivers = []
            for _ in range(5):
                frontend = stack.enter_context(vhost.Frontend.connect(path))
                drivers.append(stack.enter_context(vhost.drivers.Rng(frontend)))
            assert all(len(rng.read(32)) == 32 for rng in drivers * 3)
            assert len(made) == 5
        with contextlib.closing(RawFrontend(path)) as raw:
            raw.ask(h.GET_FEATURES)  # by then the server has seen the others go
    assert all(device.closed for device in made)
    assert len({id(device) for device in made}) == 6


def test_factory_that_fails_costs_one_session(tmp_path: Path, no_leaks: None) -> None:
    calls = iter(range(10))

    def factory() -> vhost.Device:
        if next(calls) == 0:
            raise vhost.DeviceBusy("not now")
        return vhost.devices.Rng()

    with h.served(factory, tmp_path / "s"):
        with contextlib.closing(RawFrontend(tmp_path / "s")) as raw:
            assert raw.ended()
        with vhost.Frontend.connect(tmp_path / "s") as frontend, vhost.drivers.Rng(frontend) as rng:
            assert rng.read(8)


def test_a_device_whose_hooks_fail_costs_its_session_only(
    tmp_path: Path, no_leaks: None, caplog: pytest.LogCaptureFixture
) -> None:
    class Faulty(vhost.devices.Rng):
        def stop_queue(self, queue: vhost.DeviceQueue) -> None:
            raise RuntimeError("stop_queue")

        def close(self) -> None:
            raise RuntimeError("close")

    made = iter(range(10))

    def factory() -> vhost.Device:
        if next(made) == 1:
            raise RuntimeError("factory")
        return Faulty()

    path = tmp_path / "s"
    with h.served(factory, path), contextlib.closing(RawFrontend(path)) as good:
        good.negotiate()
        with contextlib.closing(RawFrontend(path)) as raw:
            assert raw.ended()
        with contextlib.closing(RawFrontend(path)) as raw:
            raw.start()
            raw.send(h.GET_VRING_BASE, h.state(0, 0))
            assert raw.ended()
        with contextlib.closing(RawFrontend(path)) as raw:
            raw.start()
        assert good.ask(h.GET_FEATURES)
    caplog.clear()  # the records have the frames


def test_device_of_a_session_that_could_not_begin_is_closed(
    tmp_path: Path, no_leaks: None, caplog: pytest.LogCaptureFixture
) -> None:
    closed: list[vhost.Device] = []

    class Odd(vhost.devices.Rng):
        @property
        def num_queues(self) -> int:
            raise RuntimeError("nobody knows")

        def close(self) -> None:
            closed.append(self)

    with h.served(Odd, tmp_path / "s"), contextlib.closing(RawFrontend(tmp_path / "s")) as raw:
        assert raw.ended()
    assert len(closed) == 1
    caplog.clear()  # the records have the frames


def test_client_of_a_front_end_that_does_not_accept(tmp_path: Path, no_leaks: None) -> None:
    """A connection to a full backlog would wait."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(path))
        listener.listen(0)
        first.connect(str(path))
        with vhost.Server(vhost.devices.Rng(), path, client=True, reconnect=0.0) as server:
            assert not server.backends
            server.step()
            assert not server.backends
            listener.accept()[0].close()
            server.step()
            assert server.backends


def test_only_who_runs_the_rings_changes_the_device(tmp_path: Path, no_leaks: None) -> None:
    class Counting(vhost.devices.Rng):
        resets = 0

        def reset(self) -> None:
            self.resets += 1

        def set_status(self, status: int) -> None:
            self.resets += 1

    path, device = tmp_path / "s", Counting()
    with (
        h.served(device, path),
        contextlib.closing(RawFrontend(path)) as runs,
        contextlib.closing(RawFrontend(path)) as other,
    ):
        other.negotiate()
        runs.start()
        for number, payload in ((h.SET_STATUS, h.u64(0)), (h.SET_STATUS, h.u64(1)), (h.RESET_DEVICE, b"")):
            assert other.status(number, payload) != 0
        assert device.resets == 0
        assert runs.status(h.SET_STATUS, h.u64(0)) == 0
        assert other.status(h.RESET_DEVICE) == 0
        assert device.resets == 1, "a status of 0 stops the rings, and lets go of the device"


def test_channel_that_is_closed_while_the_configuration_changes(tmp_path: Path, no_leaks: None) -> None:
    path, device = tmp_path / "s", vhost.devices.Blk(null_size=1 << 20)
    with h.served(device, path), contextlib.closing(RawFrontend(path)) as raw:
        raw.negotiate()
        for size in range(2, 50):
            ours, theirs = socket.socketpair()
            with ours, theirs:
                assert raw.status(h.SET_BACKEND_REQ_FD, descriptors=[theirs.fileno()]) == 0
            device.resize(size << 20)
        assert raw.ask(h.GET_FEATURES)
    device.close()


def test_shared_device_relies_on_what_all_its_drivers_know(tmp_path: Path, no_leaks: None) -> None:
    path, device = tmp_path / "s", vhost.devices.Blk(null_size=1 << 20, share=True)
    with h.served(device, path), vhost.Frontend.connect(path) as one, vhost.Frontend.connect(path) as two:
        flush = int(vhost.features.BlkF.FLUSH)
        with vhost.drivers.Blk(one, without=flush), vhost.drivers.Blk(two):
            assert device.writethrough
        with vhost.drivers.Blk(two):
            assert not device.writethrough
    device.close()


def test_no_more_sessions_than_allowed(tmp_path: Path, no_leaks: None) -> None:
    path = tmp_path / "s"
    with h.served(vhost.devices.Rng(), path, max_connections=2):
        first, second, third = (RawFrontend(path) for _ in range(3))
        with contextlib.closing(second), contextlib.closing(third):
            with contextlib.closing(first):
                assert first.ask(h.GET_FEATURES)
                assert second.ask(h.GET_FEATURES)
                third.send(h.GET_FEATURES)
                assert second.ask(h.GET_FEATURES)
                third.sock.setblocking(False)
                with pytest.raises(BlockingIOError):
                    third.sock.recv(1)
            third.sock.settimeout(20)
            assert third.reply().number == h.GET_FEATURES, "a place became free"


def test_a_hundred_sessions_at_once(tmp_path: Path, no_leaks: None) -> None:
    path = tmp_path / "s"
    with vhost.Server(vhost.devices.Rng(), path) as server:
        with contextlib.ExitStack() as stack:
            for _ in range(100):
                stack.callback(RawFrontend(path).close)
                server.step()
            assert len(server.backends) == 100


def test_out_of_descriptors(tmp_path: Path) -> None:
    """Those who are served go on; the one who came too early is served once there are some again."""
    path = tmp_path / "s"
    device = vhost.devices.Rng()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with h.served(device, path, reconnect=0.05), contextlib.closing(RawFrontend(path)) as good:
        assert good.ask(h.GET_FEATURES)
        late = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        late.settimeout(20)
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
        fillers = []
        try:
            with contextlib.suppress(OSError):
                while True:
                    fillers.append(os.dup(0))
            late.connect(str(path))
            for _ in range(100):
                assert good.ask(h.GET_FEATURES)
        finally:
            for fd in fillers:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        late.sendall(h.HEADER.pack(h.GET_FEATURES, h.VERSION, 0))
        assert len(late.recv(20)) == 20
        late.close()


def test_socket_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    server = vhost.Server(vhost.devices.Rng(), path)
    path.unlink()
    with vhost.Server(vhost.devices.Rng(), path):
        server.close()
        assert path.exists()
    assert not path.exists()


def test_asyncio_serves_and_connects(tmp_path: Path, no_leaks: None) -> None:
    path = tmp_path / "s"

    async def one_client() -> int:
        async with await vhost.aio.connect(path, retry=20) as frontend:
            rng = await frontend.run(vhost.drivers.Rng, frontend.sync)
            data = await frontend.run(rng.read, 5000)
            await frontend.run(rng.close)
            return len(data)

    async def main() -> list[int]:
        async with vhost.aio.start_server(vhost.devices.Rng, path):
            return await asyncio.gather(*(one_client() for _ in range(4)))

    assert asyncio.run(main()) == [5000] * 4
    assert not path.exists()


def test_asyncio_client_mode_reconnects(tmp_path: Path, no_leaks: None) -> None:
    path = tmp_path / "s"
    sizes: list[int] = []

    def listen_twice() -> None:
        for _ in range(2):
            with vhost.Frontend.listen(path, timeout=20) as frontend, vhost.drivers.Rng(frontend) as rng:
                sizes.append(len(rng.read(16)))

    async def main() -> None:
        serving = asyncio.ensure_future(vhost.aio.serve(vhost.devices.Rng(), path, client=True))
        await asyncio.get_running_loop().run_in_executor(None, listen_twice)
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving

    asyncio.run(main())
    assert sizes == [16, 16]


def test_config_changes_from_any_thread(tmp_path: Path, no_leaks: None) -> None:
    device = vhost.devices.Blk(null_size=1 << 20)
    with (
        h.served(device, tmp_path / "s"),
        vhost.Frontend.connect(tmp_path / "s") as frontend,
        vhost.drivers.Blk(frontend),
    ):
        seen: list[int] = []

        def look() -> None:
            seen.append(int.from_bytes(frontend.get_config(0, 8), "little"))

        frontend.on_config_change = look
        frontend.get_queue_num()
        threads = [threading.Thread(target=device.resize, args=(i << 20,)) for i in range(2, 10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        last = device.capacity
        while not seen or seen[-1] != last:
            assert frontend.step()
    device.close()


@pytest.mark.parametrize("order", ["channel first", "session first"])
def test_what_a_session_had_goes_with_it(tmp_path: Path, order: str) -> None:
    """Not when the garbage collector comes by: an idle server would keep threads and descriptors."""
    made: list[weakref.ref[vhost.Device]] = []

    def make() -> vhost.Device:
        device = vhost.devices.Blk(null_size=1 << 20)
        made.append(weakref.ref(device))
        return device

    gc.collect()
    gc.disable()
    try:
        with h.served(make, tmp_path / "s") as server:
            with vhost.Frontend.connect(tmp_path / "s") as frontend:
                with vhost.drivers.Blk(frontend) as disk:
                    assert disk.read(0, 1)
                assert frontend.channel is not None
                (frontend.channel if order == "channel first" else frontend.transport).close()
                if order == "channel first":
                    frontend.get_queue_num()
            deadline = time.monotonic() + 20
            while server.backends or made[0]() is not None:
                assert time.monotonic() < deadline
                os.sched_yield()
    finally:
        gc.enable()
