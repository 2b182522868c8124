# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The block device: what it says of itself, whose it is, and that nothing is lost when rings are stopped,
started and moved under load."""

from __future__ import annotations

import errno
import gc
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import fds
from devices.disks import HANDLERS, SEGMENT, Ring, how, pattern, ring, serving, wait_for
from devices.load import Load
from rig import Rig
from vhost.devices._blk_engine import MAX_RANGES, BlkEngine
from vhost.devices.blk import Blk
from vhost.devices.blk_python import MAX_DISCARD_SECTORS, MAX_ZEROES_SECTORS
from vhost.drivers import Blk as BlkDriver
from vhost.errors import DeviceBusy, RequestFailed
from vhost.features import BlkF, DeviceId, ProtocolF, VirtioF
from vhost.memory import GuestMemory, Region
from vhost.user.frontend import WANTED, Frontend
from vhost.virtio_blk import BlkConfig, BlkStatus, BlkType

SECTORS = 2048
SIZE = SECTORS * 512


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(pattern(SIZE))
    return path


@pytest.fixture(params=HANDLERS)
def handler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    return how(request.param, monkeypatch)


class Session:
    """Claims a device as a session would."""

    def config_changed(self) -> None:
        raise AssertionError("nobody asked")

    wake = config_changed


# -- what it says of itself ------------------------------------------------------------------------


def test_close_waits_for_no_collector(tmp_path: Path) -> None:
    """A device that a cycle keeps alive holds neither descriptors nor threads once it was closed: a server
    makes one for each connection."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    Blk(path).close()  # what the process opens once
    before = fds.holdings()
    disk = Blk(path, num_queues=4)
    disk.cycle = disk  # type: ignore[attr-defined]
    disk.close()
    assert not fds.holdings() - before


@pytest.mark.parametrize("read_only", [False, True])
def test_config_space(image: Path, tmp_path: Path, read_only: bool, no_leaks: None) -> None:
    want = BlkConfig(
        capacity=SECTORS,
        seg_max=126,
        blk_size=512,
        physical_block_exp=3,
        min_io_size=8,
        writeback=1,
        num_queues=5,
        max_discard_sectors=0 if read_only else MAX_DISCARD_SECTORS,
        max_discard_seg=0 if read_only else MAX_RANGES,
        discard_sector_alignment=1,
        max_write_zeroes_sectors=0 if read_only else MAX_ZEROES_SECTORS,
        max_write_zeroes_seg=0 if read_only else MAX_RANGES,
        write_zeroes_may_unmap=int(not read_only),
    )
    device = Blk(image, num_queues=5, read_only=read_only)
    assert device.device_id == DeviceId.BLOCK
    with serving(device, tmp_path / "s") as server, server.connect() as frontend:
        assert BlkConfig.unpack(frontend.get_config(0, BlkConfig.SIZE)) == want
        assert frontend.get_config(20, 4) == (512).to_bytes(4, "little")
        assert frontend.get_queue_num() == 5
        assert frontend.get_config(0, 100) == want.pack().ljust(100, b"\0")
        with pytest.raises(RequestFailed):
            frontend.set_config(0, b"\1")  # read-only, and there is no CONFIG_WCE
        assert frontend.get_config(0, 8) == SECTORS.to_bytes(8, "little")
    assert len(want.pack()) == BlkConfig.SIZE == 72


@pytest.mark.parametrize(("queue_size", "seg_max"), [(1024, 126), (128, 126), (127, 125), (16, 14), (2, 1)])
def test_segments_fit_the_ring(image: Path, queue_size: int, seg_max: int) -> None:
    device = Blk(image, queue_size=queue_size)
    assert BlkConfig.unpack(device.config).seg_max == seg_max
    device.close()


@pytest.mark.parametrize("read_only", [False, True])
def test_features(image: Path, read_only: bool) -> None:
    device = Blk(image, read_only=read_only)
    offered = device.offered_features()
    common = BlkF.SEG_MAX | BlkF.BLK_SIZE | BlkF.TOPOLOGY | BlkF.FLUSH | BlkF.MQ
    rings = VirtioF.VERSION_1 | VirtioF.RING_PACKED | VirtioF.RING_INDIRECT_DESC | VirtioF.RING_EVENT_IDX
    own = BlkF.RO if read_only else BlkF.DISCARD | BlkF.WRITE_ZEROES
    assert offered & ~int(VirtioF.IN_ORDER) == int(common | own) | int(rings)
    device.close()


def test_a_file_that_is_no_whole_number_of_sectors(tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(b"x" * (512 * 3 + 511))
    device = Blk(tmp_path / "odd")
    assert device.capacity == 3
    device.close()


def test_bad_arguments(image: Path, tmp_path: Path, no_leaks: None) -> None:
    for wrong in (
        {},
        {"path": image, "null_size": 512},
        {"path": image, "num_queues": 0},
        {"path": image, "num_queues": 257},
        {"path": image, "threads": 0},
        {"path": image, "handler": "rust"},
        {"path": image, "serial": "x" * 21},
    ):
        with pytest.raises(ValueError, match=r"."):
            Blk(**wrong)
    with pytest.raises(FileNotFoundError):
        Blk(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        Blk(tmp_path)
    with pytest.raises(OSError, match="neither a file nor a block device") as caught:
        Blk("/dev/zero")
    assert caught.value.errno == errno.ENOTBLK
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="neither"):
        Blk(tmp_path / "fifo")


def test_writethrough_without_flush(image: Path, handler: dict[str, str]) -> None:
    """A driver that cannot flush finds writes on stable storage: such a file was synced."""
    with ring(Blk(image, **handler)) as disk:
        assert disk.device.writethrough is False
        disk.device.negotiated = 0
        assert disk.device.writethrough is True
        disk.device.stop_queue(disk.queue)
        disk.device.start_queue(disk.queue)
        data = pattern(4096, seed=2)
        assert disk.request(BlkType.OUT, 8, data=data)[:2] == (0, 1)
    assert image.read_bytes()[4096:8192] == data


# -- a file as memory ------------------------------------------------------------------------------


def maps_of(image: Path) -> int:
    with open("/proc/self/maps") as maps:
        return sum(line.rstrip().endswith(str(image)) for line in maps)


@pytest.mark.parametrize("read_only", [False, True])
def test_one_map_for_all_who_share_a_file(
    image: Path, monkeypatch: pytest.MonkeyPatch, read_only: bool, no_leaks: None
) -> None:
    """And it goes with the last of them, or with the file's size."""
    options = how("mapped", monkeypatch)
    devices = [Blk(image, share=True, read_only=read_only, **options) for _ in range(3)]
    assert maps_of(image) == 1
    os.truncate(image, SIZE * 2)
    devices.append(Blk(image, share=True, read_only=read_only, **options))
    assert maps_of(image) == 2
    with ring(devices[0]) as disk:
        assert disk.request(BlkType.IN, SECTORS - 8, room=4096)[2] == pattern(SIZE)[-4096:]
    for device in devices:
        device.close()
    del device, devices, disk
    gc.collect()
    assert maps_of(image) == 0


def test_a_file_that_others_truncated_is_mapped_anew(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = how("mapped", monkeypatch)
    with ring(Blk(image, share=True, **options)) as disk:
        os.truncate(image, 0)
        os.truncate(image, SIZE)
        image.write_bytes(pattern(SIZE, seed=3))  # which truncates it, too
        assert disk.request(BlkType.IN, SECTORS - 8, room=4096)[2] == pattern(SIZE, seed=3)[-4096:]
        os.truncate(image, SIZE // 2)
        assert disk.request(BlkType.IN, SECTORS - 8, room=4096)[0] == BlkStatus.IOERR
        image.write_bytes(pattern(SIZE, seed=4))
        # By system calls, as before; a session that begins now has a map of its own.
        assert disk.request(BlkType.IN, SECTORS - 8, room=4096)[2] == pattern(SIZE, seed=4)[-4096:]
        before = maps_of(image)
        with ring(Blk(image, share=True, **options)) as other:
            assert maps_of(image) == before + 1
            assert other.request(BlkType.IN, SECTORS - 8, room=4096)[2] == pattern(SIZE, seed=4)[-4096:]


@pytest.mark.parametrize("kind", [BlkType.DISCARD, BlkType.WRITE_ZEROES])
def test_what_is_read_of_a_hole_does_not_fill_it(
    image: Path, handler: dict[str, str], kind: int, no_leaks: None
) -> None:
    with ring(Blk(image, **handler)) as disk:
        assert disk.request(BlkType.IN, 0, room=32768)[0] == 0
        before = image.stat().st_blocks
        assert disk.request(kind, 0, data=SEGMENT.pack(0, 64, kind == BlkType.WRITE_ZEROES))[0] == 0
        holes = image.stat().st_blocks
        assert holes < before
        assert disk.request(BlkType.IN, 0, room=32768)[2] == bytes(32768)
        assert image.stat().st_blocks == holes


def test_not_mapped_where_a_truncated_file_would_end_the_process(image: Path) -> None:
    """That is, in any program that does not ask for it (vhost.memory.install_sigbus_handler)."""
    script = """
import sys
from vhost.devices.blk import Blk
from vhost.memory import install_sigbus_handler
Blk._pace = "memory"
def mapped():
    device = Blk(sys.argv[1], share=True)
    with open("/proc/self/maps") as maps:
        return sys.argv[1] in maps.read()
assert not mapped()
install_sigbus_handler()
assert mapped()
"""
    subprocess.run([sys.executable, "-c", script, str(image)], check=True, timeout=60)


# -- another size ----------------------------------------------------------------------------------


def wait_for_news(frontend: Frontend, news: list[int]) -> None:
    while not news:
        wait_for(frontend.fileno())
        assert frontend.step()


@pytest.mark.parametrize("kind", ["file", "null", "from outside"])
def test_resize(image: Path, tmp_path: Path, handler: dict[str, str], kind: str, no_leaks: None) -> None:
    device = Blk(null_size=SIZE, **handler) if kind == "null" else Blk(image, **handler)
    with (
        serving(device, tmp_path / "s") as server,
        server.connect() as frontend,
        server.connect() as looker,
        BlkDriver(frontend) as disk,
    ):
        news: list[int] = []
        frontend.on_config_change = lambda: news.append(disk.read_config().capacity)
        looked: list[int] = []
        looker.on_config_change = lambda: looked.append(1)
        with pytest.raises(OSError, match="IN of 1 sectors"):
            disk.read(SECTORS, 1)
        for sectors in (SECTORS * 2, 16):
            if kind == "from outside":
                os.truncate(image, sectors * 512)
                device.refresh()
            else:
                device.resize(sectors * 512)
            wait_for_news(frontend, news)
            assert news == [sectors]
            assert disk.capacity == device.capacity == sectors
            disk.write(sectors - 1, b"e" * 512)
            assert kind == "null" or disk.read(sectors - 1, 1) == b"e" * 512
            with pytest.raises(OSError, match="OUT of 1 sectors"):
                disk.write(sectors, b"e" * 512)
            news.clear()
        device.refresh()
        assert looker.get_status() == 0
        assert not news  # nothing changed, nobody was told
        assert not looked  # nor is a session that runs no ring, ever


# -- whose it is -----------------------------------------------------------------------------------


def test_a_second_session_may_look_but_not_run(image: Path, tmp_path: Path, no_leaks: None) -> None:
    with serving(Blk(image), tmp_path / "s") as server, server.connect() as first:
        disk = BlkDriver(first)
        with server.connect() as second:
            assert second.get_config(0, 8) == SECTORS.to_bytes(8, "little")
            with pytest.raises(RequestFailed):
                BlkDriver(second)
        assert disk.read(0, 1) == pattern(SIZE)[:512]
        disk.close()
        with server.connect() as third, BlkDriver(third) as other:
            assert other.read(0, 1) == pattern(SIZE)[:512]
            with pytest.raises(RequestFailed):
                BlkDriver(first)


@pytest.mark.parametrize(
    ("held", "wanted", "allowed"),
    [
        ({}, {}, False),
        ({}, {"read_only": True}, False),
        ({"read_only": True}, {}, False),
        ({"read_only": True}, {"read_only": True}, True),
        ({"share": True}, {"share": True}, True),
        ({}, {"share": True}, True),
        ({"share": True}, {}, True),
    ],
)
@pytest.mark.parametrize("elsewhere", [False, True], ids=["same process", "other process"])
def test_who_may_share_a_file(
    image: Path,
    held: dict[str, bool],
    wanted: dict[str, bool],
    allowed: bool,
    elsewhere: bool,
    no_leaks: None,
) -> None:
    first = Blk(image, **held)
    session = Session()
    first.claim(session)
    if elsewhere:
        program = (
            "import sys; from vhost.devices.blk import Blk; from vhost.errors import DeviceBusy\n"
            f"try: Blk({str(image)!r}, **{wanted!r}).claim(object())\n"
            "except DeviceBusy as error: sys.exit(str(error))\n"
        )
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert (run.returncode == 0) is allowed, run.stderr
        assert allowed or "in use by another session (--share allows that)" in run.stderr
    else:
        second = Blk(image, **wanted)
        other = Session()
        if allowed:
            second.claim(other)
            second.release(other)
        else:
            with pytest.raises(DeviceBusy, match=r"in use by another session \(--share allows that\)"):
                second.claim(other)
            first.release(session)
            second.claim(other)  # nothing of the refusal is left behind
            second.release(other)
        second.close()
    first.release(session)
    first.close()


@pytest.mark.parametrize("how", [{"share": True}, {"read_only": True}])
def test_sessions_that_share_one_device(
    image: Path, tmp_path: Path, handler: dict[str, str], how: dict[str, bool], no_leaks: None
) -> None:
    with (
        serving(Blk(image, **handler, **how), tmp_path / "s") as server,
        server.connect() as a,
        server.connect() as b,
        BlkDriver(a) as first,
        BlkDriver(b) as second,
    ):
        assert first.read(0, 8) == second.read(0, 8) == pattern(SIZE)[:4096]
        if "share" in how:
            first.write(3, b"f" * 512)
            assert second.read(3, 1) == b"f" * 512


def test_claim_is_held_while_any_ring_runs(image: Path, tmp_path: Path, no_leaks: None) -> None:
    other = Blk(image)
    session = Session()
    with serving(Blk(image, num_queues=2), tmp_path / "s") as server, server.connect() as frontend:
        with BlkDriver(frontend, num_queues=2):
            for index in (0, 1):
                with pytest.raises(DeviceBusy):
                    other.claim(session)
                frontend.get_vring_base(index)
            other.claim(session)
            other.release(session)
        with server.connect() as looker:
            assert looker.get_config(0, 8)
            other.claim(session)  # looking does not claim
            other.release(session)
    other.close()


# -- under load ------------------------------------------------------------------------------------


def restart(frontend: Frontend, disk: BlkDriver, index: int) -> None:
    """What was popped was published, so what the base counts and the driver has not got back is what is
    left in the ring."""
    base = frontend.get_vring_base(index)
    frontend.set_vring_base(index, base)
    frontend.set_vring_kick(index, disk.queues[index].kick_fd)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("in_order", [False, True], ids=["", "in_order"])
def test_queues_stop_and_start_under_load(
    image: Path,
    tmp_path: Path,
    handler: dict[str, str],
    packed: bool,
    threads: int,
    in_order: bool,
    no_leaks: None,
) -> None:
    device = Blk(image, **handler, num_queues=3, threads=threads)
    without = 0 if in_order else int(VirtioF.IN_ORDER)
    with (
        serving(device, tmp_path / "s") as server,
        server.connect() as frontend,
        BlkDriver(frontend, num_queues=3, packed=packed, depth=24, queue_size=64, without=without) as disk,
    ):
        load = Load(disk)
        for turn in range(60):
            load.fill()
            restart(frontend, disk, turn % 3)
            load.reap()
            if turn % 10 == 9:
                frontend.set_vring_enable(turn % 3, False)
                load.fill()
                load.reap()
                frontend.set_vring_enable(turn % 3, True)
        load.check(image)
        assert load.done >= 60 * 3


@pytest.mark.parametrize("slots", [False, True], ids=["table", "slots"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_memory_is_replaced_under_load(
    image: Path, tmp_path: Path, handler: dict[str, str], packed: bool, slots: bool, no_leaks: None
) -> None:
    wanted = WANTED if slots else WANTED & ~ProtocolF.CONFIGURE_MEM_SLOTS
    extra = Region.allocate(1 << 20, guest_addr=1 << 40)
    with (
        serving(Blk(image, **handler, num_queues=2), tmp_path / "s") as server,
        server.connect(protocol_features=int(wanted)) as frontend,
        BlkDriver(frontend, num_queues=2, packed=packed, depth=24) as disk,
    ):
        load = Load(disk)
        for turn in range(60):
            load.fill()
            frontend.set_mem_table(GuestMemory([disk.region, extra] if turn % 2 else [disk.region]))
            load.reap()
        load.check(image)
        assert load.done >= 60


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_eventfds_are_replaced_under_load(
    image: Path, tmp_path: Path, handler: dict[str, str], packed: bool, no_leaks: None
) -> None:
    with (
        serving(Blk(image, **handler), tmp_path / "s") as server,
        server.connect() as frontend,
        BlkDriver(frontend, packed=packed, depth=24) as disk,
    ):
        load = Load(disk)
        (queue,) = disk.queues
        for turn in range(60):
            load.fill()
            # None: the device polls, or calls nobody; both are given again before we rely on them.
            frontend.set_vring_kick(0, None if turn % 3 == 1 else queue.kick_fd)
            frontend.set_vring_call(0, None if turn % 5 == 1 else queue.call_fd)
            load.reap()
        frontend.set_vring_call(0, queue.call_fd)
        os.eventfd_write(queue.call_fd, 1)  # what was used while nobody was to be called
        load.check(image)


def test_a_reset_with_requests_in_flight(
    image: Path, tmp_path: Path, handler: dict[str, str], no_leaks: None
) -> None:
    with serving(Blk(image, **handler), tmp_path / "s") as server, server.connect() as frontend:
        for turn in range(20):
            with BlkDriver(frontend, packed=bool(turn % 2)) as disk:
                load = Load(disk, seed=turn)
                load.fill()
                if turn % 3 == 0:
                    frontend.reset_device()
        with BlkDriver(frontend) as disk:
            load = Load(disk)
            load.fill()
            load.check(image)


def test_a_session_dies_with_requests_in_flight(
    image: Path, tmp_path: Path, handler: dict[str, str], no_leaks: None
) -> None:
    with serving(Blk(image, **handler, num_queues=2), tmp_path / "s") as server:
        for turn in range(20):
            frontend = server.connect()
            disk = BlkDriver(frontend, num_queues=2, packed=bool(turn % 2))
            Load(disk, seed=turn).fill()
            frontend.close()
            disk._close_events()
            del frontend, disk
        while True:  # the last one may not have been seen to end
            with server.connect() as frontend:
                try:
                    disk = BlkDriver(frontend)
                except RequestFailed:
                    continue
                load = Load(disk)
                load.fill()
                load.check(image)
                disk.close()
                break
        del load, disk, frontend


# -- what it holds, and what it uses ---------------------------------------------------------------


def engine_threads() -> dict[int, int]:
    """The engine's threads, and how often each slept: a thread that is never woken sleeps once."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().startswith("vhost-blk"):
            lines = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
            found[int(task.name)] = int(lines["voluntary_ctxt_switches"])
    return found


def test_threads_run_while_rings_do(image: Path, no_leaks: None) -> None:
    device = Blk(image, num_queues=4, threads=2)
    rings = [Ring(Blk(null_size=SIZE), num=16) for _ in range(2)]
    assert len(engine_threads()) == 2
    for one in rings:
        one.device.stop_queue(one.queue)
        one.device.start_queue(one.queue)
        one.close()
    rings.clear()
    gone(lambda: not engine_threads())
    device.close()
    with pytest.raises(ValueError, match="attached already"), ring(Blk(image, threads=1)) as one:
        one.device.start_queue(one.queue)


def test_devices_that_share_workers(image: Path, tmp_path: Path, no_leaks: None) -> None:
    """Each has its own disk and its own notice; queues go to the worker that has fewest."""
    engine = BlkEngine(2, "vhost-blk")
    other = tmp_path / "other"
    other.write_bytes(pattern(SIZE, 2))
    rings = []
    for path in (image, other, image, other):
        device = Blk(path, engine=engine, share=True)
        device.claim(Session())
        rings.append(Ring(device))
        assert len(engine_threads()) == min(len(rings), 2)
    for one, seed in zip(rings, (1, 2, 1, 2), strict=True):
        assert one.request(BlkType.IN, 0, room=512)[2] == pattern(SIZE, seed)[:512]
    notices = [one.device.notice for one in rings]
    assert len(set(notices)) == 4
    rings[1].send([(rings[1].free, 1)], [])
    assert "header" in rings[1].wait_broken()
    assert not any(select.select(notices[:1] + notices[2:], [], [], 0)[0]), "it is told to who has it"
    for one in rings:
        if one is not rings[1]:
            assert one.request(BlkType.IN, 8, room=512)[0] == 0
        device = one.device
        one.close()
        device.close()


def test_threads_end_with_a_device_that_nobody_has(no_leaks: None) -> None:
    """Dropped while its ring runs, as part of a cycle, with every order in which a collector may look."""
    for engine_first in (False, True):
        one = Ring(Blk(null_size=SIZE))
        assert len(engine_threads()) == 1
        cycle: list[object] = [one.device.engine] if engine_first else []
        cycle += [cycle, one.queue, one.device, one]
        events = one.kick, one.call, one.err
        del cycle, one
        gc.collect()
        gone(lambda: not engine_threads())
        for fd in events:
            os.close(fd)


def test_a_child_of_the_process_can_end(image: Path) -> None:
    """It has a copy of the device, but none of the threads; and the parent's go on."""
    script = f"""
import os, signal, sys
from devices.disks import BASE, Ring
from vhost.devices.blk import Blk
from vhost.virtqueue import DeviceQueue

one = Ring(Blk({str(image)!r}))
if not os.fork():
    signal.alarm(20)
    try:
        one.device.start_queue(DeviceQueue(one.memory, 8, BASE, BASE + 256, BASE + 512, name="other"))
    except OSError as error:
        assert str(error).endswith("other: cannot be attached to the engine: it belongs to the process"
                                   " that this one was forked from"), error
        del one
        sys.exit(7)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
assert one.request(0, 0, room=512)[:2] == (0, 513)
device = one.device
one.close()
device.close()
"""
    path = os.pathsep.join(map(str, Path(__file__).parents[1:3]))
    env = {**os.environ, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=env)


def gone(condition: Callable[[], bool]) -> None:
    """The kernel may list a thread for an instant after it was joined."""
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        os.sched_yield()
    assert condition()


def test_many_starts_hold_nothing(image: Path, no_leaks: None) -> None:
    with ring(Blk(image, threads=1)) as disk:
        gc.collect()
        before = fds.holdings()
        for _ in range(300):
            disk.device.stop_queue(disk.queue)
            assert disk.device.start_queue(disk.queue)
        after = fds.holdings()
        assert after.fds == before.fds
        assert after.maps == before.maps
        gone(lambda: len(fds.holdings().threads) == len(before.threads))
        assert disk.request(BlkType.IN, 0, room=512)[0] == 0


def test_an_idle_engine_sleeps(image: Path, tmp_path: Path, no_leaks: None) -> None:
    with (
        serving(Blk(image, num_queues=2, threads=2), tmp_path / "s") as server,
        server.connect() as frontend,
        BlkDriver(frontend, num_queues=2) as disk,
    ):
        load = Load(disk)
        for _ in range(20):
            load.fill()
            load.reap()
        load.check(image)
        threading.Event().wait(0.1)  # those who look for more work give up
        slept, used = engine_threads(), time.process_time()
        assert len(slept) == 2
        threading.Event().wait(1.0)
        assert time.process_time() - used < 0.02
        assert engine_threads() == slept


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_without_kicks(
    image: Path, tmp_path: Path, handler: dict[str, str], packed: bool, no_leaks: None
) -> None:
    """SET_VRING_KICK without a descriptor: the device looks by itself."""
    with (
        serving(Blk(image, **handler), tmp_path / "s") as server,
        server.connect() as frontend,
        BlkDriver(frontend, packed=packed) as disk,
    ):
        frontend.set_vring_kick(0, None)
        load = Load(disk)
        for _ in range(30):
            load.fill()
            load.reap(wait=True)
        load.check(image)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_engine_asks_for_kicks_of_a_queue_that_was_at_work(packed: bool) -> None:
    """Whoever served it was taken off in the middle, with notifications off, and the ring is empty now."""
    rig = Rig(packed=packed)
    device, queue = Blk(null_size=SIZE), rig.device()
    flags = rig.memory.view(rig.areas.used + 2 * packed, 2)
    queue.disable_notification()
    assert flags[0] == 1
    assert device.start_queue(queue)
    try:
        deadline = time.monotonic() + 20
        while flags[0]:
            assert time.monotonic() < deadline, "nobody would ever kick"
            time.sleep(0.001)
    finally:
        device.stop_queue(queue)
        device.close()
