# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Each feature that qemu-storage-daemon's vhost-user-blk export offers, exercised by our front-end.

An offered bit that no row has fails ``test_each_bit_has_an_exercise``. Where a bit alone has no effect that
could be seen, the row says why; that it can be acknowledged, and the disk then works, is tested for all.
"""

from __future__ import annotations

import os
import random
import select
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from peers.offered import Exercise, Table
from peers.support import DEADLINE, StorageDaemon, make_disk, require, wait_until
from vhost import Frontend, drivers
from vhost.dirty_log import DirtyLog
from vhost.drivers.base import RING_FEATURES
from vhost.features import BlkF, ProtocolF, VhostF, VirtioF, bits
from vhost.memory import GuestMemory, Region
from vhost.user._userfault import wake
from vhost.user.frontend_base import WANTED
from vhost.user.frontend_postcopy import FAULT, PAGEFAULT
from vhost.virtio_blk import HEADER, SECTOR, BlkType

pytestmark = pytest.mark.peer

MIB = 1 << 20
SIZE = 32 * MIB
WRITEBACK = 32
"""Where the field is in struct virtio_blk_config."""
FEATURES = Table(BlkF, VirtioF, VhostF)
PROTOCOL = Table(ProtocolF)


class ExactBlk(drivers.Blk):
    """Acknowledges VERSION_1 and ``features``, which have to be offered, and nothing else."""

    def __init__(self, ops: Frontend, features: int, **options: Any) -> None:
        self.features = features & ~int(RING_FEATURES)
        super().__init__(ops, without=int(RING_FEATURES) & ~features, **options)
        assert self.negotiated == features | VirtioF.VERSION_1

    def raw_read(self, sector: int, at: int, view: memoryview, segments: int, *, wait: bool = True) -> None:
        """Read so many sectors into pages of their own, from the guest address ``at`` on, where ``view`` is;
        its first page is for header and status."""
        (queue,) = self.queues
        HEADER.pack_into(view, 0, int(BlkType.IN), 0, sector)
        view[32] = 0xFF
        data = [(at + 4096 * (i + 1), SECTOR) for i in range(segments)]
        queue.add([(at, HEADER.size)], [*data, (at + 32, 1)], None)
        queue.kick()
        if wait:
            assert queue.wait(DEADLINE)
            assert queue.get_used() == (None, segments * SECTOR + 1)
            assert view[32] == 0


@dataclass
class Peer:
    """A daemon for one exercise, and what it offers."""

    daemon: StorageDaemon
    disk: Path
    stack: ExitStack
    session: ExitStack = field(default_factory=ExitStack)
    seed: int = 0

    def connect(self, **options: Any) -> Frontend:
        """It has one session at a time, so this ends the one before."""
        self.session.close()
        return self.session.enter_context(Frontend.connect(self.daemon.path, retry=DEADLINE, **options))

    def blk(self, *features: int, frontend: Frontend | None = None, **options: Any) -> ExactBlk:
        mask = 0
        for feature in features:
            mask |= int(feature)
        return self.session.enter_context(ExactBlk(frontend or self.connect(), mask, **options))

    def data(self, size: int) -> bytes:
        self.seed += 1
        return random.Random(self.seed).randbytes(size)

    def file(self, offset: int, size: int) -> bytes:
        with self.disk.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def check(self, blk: drivers.Blk, queue: int | None = None) -> None:
        """What is written is in the file, and what is in the file is read."""
        data = self.data(64 << 10)
        sector = 2 * random.Random(self.seed).randrange(SIZE // SECTOR // 4)
        if queue is None:
            blk.write(sector, data)
            assert blk.read(sector, len(data) // SECTOR) == data
        else:
            blk.submit_write(sector, data, queue=queue)
            (done,) = blk.poll(DEADLINE, queue=queue)
            assert done.error is None
            blk.submit_read(sector, len(data) // SECTOR, queue=queue)
            (done,) = blk.poll(DEADLINE, queue=queue)
            assert done.data == data
        assert self.file(sector * SECTOR, len(data)) == data


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start(stack: ExitStack, folder: Path, name: str = "s", **options: Any) -> Peer:
    require("qsd")
    disk = make_disk(folder / f"{name}.raw", SIZE)
    peer = Peer(stack.enter_context(StorageDaemon(disk, folder / name, **options)), disk, stack)
    stack.callback(peer.session.close)
    return peer


@pytest.fixture
def peer(stack: ExitStack, tmp_path: Path) -> Peer:
    return start(stack, tmp_path)


# -- what the disk is --------------------------------------------------------------------------------


@FEATURES.of(BlkF.SIZE_MAX)
def size_max(peer: Peer) -> None:
    """It offers the bit and leaves the field 0: there is no limit that one could keep or break."""
    blk = peer.blk(BlkF.SIZE_MAX, max_transfer=MIB)
    assert blk.read_config().size_max == 0
    data = peer.data(MIB)
    blk.write(0, data)
    assert peer.file(0, MIB) == data


@FEATURES.of(BlkF.SEG_MAX)
def seg_max(peer: Peer) -> None:
    """As many segments as it allows, in a chain as long as the ring."""
    blk = peer.blk(BlkF.SEG_MAX)
    segments = blk.read_config().seg_max
    assert segments == blk.queue_size - 2
    data = peer.data(segments * SECTOR)
    blk.write(0, data)
    view = blk.memory.view(blk.data_addr, 4096 * (segments + 1))
    blk.raw_read(0, blk.data_addr, view, segments)
    got = b"".join(bytes(view[4096 * i : 4096 * i + SECTOR]) for i in range(1, segments + 1))
    assert got == data


@FEATURES.of(BlkF.RO)
def read_only(peer: Peer) -> None:
    blk = peer.blk(BlkF.RO)
    assert blk.read_only
    with pytest.raises(OSError, match="OUT"):
        blk.write(0, bytes(SECTOR))
    with peer.disk.open("r+b") as file:
        file.write(data := peer.data(4096))
    assert blk.read(0, 8) == data


@FEATURES.of(BlkF.BLK_SIZE)
def block_size(peer: Peer) -> None:
    assert peer.blk(BlkF.BLK_SIZE).block_size == SECTOR
    other = start(peer.stack, peer.disk.parent, "large", more=",logical-block-size=4096")
    blk = other.blk(BlkF.BLK_SIZE)
    assert blk.block_size == 4096
    with pytest.raises(OSError, match="IN"):
        blk.read(1, 1)
    data = other.data(4096)
    blk.write(8, data)
    assert other.file(4096, 4096) == data


@FEATURES.of(BlkF.TOPOLOGY)
def topology(peer: Peer) -> None:
    config = peer.blk(BlkF.TOPOLOGY).read_config()
    assert config.min_io_size >= 1
    assert config.opt_io_size >= 1


@FEATURES.of(BlkF.MQ)
def queues(peer: Peer) -> None:
    blk = peer.blk(BlkF.MQ, num_queues=2)
    assert blk.read_config().num_queues == 2
    for queue in (0, 1, 1, 0):
        peer.check(blk, queue)


# -- what the disk does ------------------------------------------------------------------------------


@FEATURES.of(BlkF.FLUSH)
def flush(peer: Peer) -> None:
    blk = peer.blk(BlkF.FLUSH)
    peer.check(blk)
    blk.flush()


@FEATURES.of(BlkF.CONFIG_WCE)
def write_cache(peer: Peer) -> None:
    """The one field that a driver can write."""
    blk = peer.blk(BlkF.CONFIG_WCE, BlkF.FLUSH)
    for value in (1, 0, 1):
        blk.ops.set_config(WRITEBACK, bytes([value]))
        assert blk.read_config().writeback == value
        peer.check(blk)


@FEATURES.of(BlkF.DISCARD)
def discard(peer: Peer) -> None:
    blk = peer.blk(BlkF.DISCARD)
    data = peer.data(MIB)
    blk.write(0, data)
    blocks = peer.disk.stat().st_blocks
    blk.discard(512, 1024)
    assert peer.file(0, MIB) == data[: 512 * SECTOR] + bytes(1024 * SECTOR) + data[1536 * SECTOR :]
    assert peer.disk.stat().st_blocks < blocks


@FEATURES.of(BlkF.WRITE_ZEROES)
def write_zeroes(peer: Peer) -> None:
    blk = peer.blk(BlkF.WRITE_ZEROES)
    data = peer.data(MIB)
    blk.write(0, data)
    blk.write_zeroes(3, 5)
    blk.write_zeroes(64, 128, unmap=True)
    image = bytearray(data)
    image[3 * SECTOR : 8 * SECTOR] = bytes(5 * SECTOR)
    image[64 * SECTOR : 192 * SECTOR] = bytes(128 * SECTOR)
    assert peer.file(0, MIB) == image


# -- rings -------------------------------------------------------------------------------------------


@FEATURES.of(VirtioF.VERSION_1)
def version_1(peer: Peer) -> None:
    """Nothing but it."""
    peer.check(peer.blk())


@FEATURES.of(VirtioF.RING_INDIRECT_DESC)
def indirect(peer: Peer) -> None:
    """Requests of three descriptors each, as many as the ring has."""
    with pytest.raises(BufferError):
        submit_ring_full(peer, peer.blk(queue_size=8, depth=8))
    submit_ring_full(peer, peer.blk(VirtioF.RING_INDIRECT_DESC, queue_size=8, depth=8))


def submit_ring_full(peer: Peer, blk: ExactBlk) -> None:
    data = peer.data(8 * SECTOR)
    for i in range(8):
        blk.submit_write(i, data[i * SECTOR : (i + 1) * SECTOR])
    while blk.in_flight:
        assert all(done.error is None for done in blk.poll(DEADLINE))
    assert peer.file(0, len(data)) == data


@FEATURES.of(VirtioF.RING_EVENT_IDX)
def event_idx(peer: Peer) -> None:
    """avail_event, behind the used ring, tells up to where it has seen; without the feature it does not."""
    for features, wanted in ((VirtioF(0), 0), (VirtioF.RING_EVENT_IDX, 6)):
        blk = peer.blk(features)
        for _ in range(3):
            peer.check(blk)
        place = blk._places[0]
        view = blk.memory.view(place.addr + place.layout.used + 4 + 8 * place.size, 2)
        wait_until(lambda view=view, wanted=wanted: int.from_bytes(view, "little") == wanted)


@FEATURES.of(VirtioF.NOTIFY_ON_EMPTY)
def notify_on_empty(peer: Peer) -> None:
    """A call although the driver wants none, for it has nothing more to do."""
    for features, called in ((VirtioF(0), False), (VirtioF.NOTIFY_ON_EMPTY, True)):
        blk = peer.blk(features)
        (queue,) = blk.queues
        peer.check(blk)
        with suppress(BlockingIOError):
            os.eventfd_read(queue.call_fd)
        queue.disable_callbacks()
        view = blk.memory.view(blk.data_addr, 8192)
        blk.raw_read(0, blk.data_addr, view, 1, wait=False)
        wait_until(queue.has_used)
        blk.ops.get_config(0, 8)  # it had its turn
        assert bool(select.select([queue.call_fd], [], [], DEADLINE if called else 0)[0]) == called


@FEATURES.of(VhostF.PROTOCOL_FEATURES)
def protocol_features(peer: Peer) -> None:
    """None negotiated, some, all. That rings have to be enabled then cannot be shown: this back-end processes
    disabled ones as well, other than the specification has it ("Ring states")."""
    for wanted in (0, int(ProtocolF.REPLY_ACK | ProtocolF.CONFIG), ~0):
        frontend = peer.connect(protocol_features=wanted)
        assert frontend.protocol_features & ~wanted == 0
        if wanted:
            peer.check(peer.blk(frontend=frontend))
        frontend.set_vring_enable(0, True)


@FEATURES.of(VhostF.LOG_ALL)
@PROTOCOL.of(ProtocolF.LOG_SHMFD)
def dirty_log(peer: Peer) -> None:
    """What it writes into memory is in the log: data, status, and the used ring."""
    frontend = peer.connect()
    blk = peer.blk(frontend=frontend)
    view = blk.memory.view(blk.data_addr, 4096 * 4)
    blk.raw_read(0, blk.data_addr, view, 3)
    log = DirtyLog.for_memory(blk.memory)
    frontend.start_log(log)
    assert log.take() == []
    blk.raw_read(0, blk.data_addr, view, 3)
    place = blk._places[0]
    ring = (place.addr + place.layout.used) // 4096 * 4096
    assert log.take() == [ring, *(blk.data_addr + 4096 * i for i in range(4))]
    frontend.stop_log()
    blk.raw_read(0, blk.data_addr, view, 3)
    assert log.take() == []


# -- the protocol ------------------------------------------------------------------------------------


@PROTOCOL.of(ProtocolF.MQ)
def queue_number(peer: Peer) -> None:
    assert peer.connect().get_queue_num() == 2
    assert start(peer.stack, peer.disk.parent, "seven", queues=7).connect().get_queue_num() == 7


@PROTOCOL.of(ProtocolF.REPLY_ACK)
def acks(peer: Peer) -> None:
    """Asked for, each request is answered; not negotiated, none is."""
    for features, wanted in ((~0, True), (~int(ProtocolF.REPLY_ACK), False)):
        frontend = peer.connect(protocol_features=features)
        seen: list[str] = []
        frontend.session.trace = lambda way, message, seen=seen: seen.append(f"{way} {message.name}")
        peer.check(peer.blk(frontend=frontend))
        assert ("recv SET_VRING_KICK" in seen) == wanted
        assert "send SET_VRING_KICK" in seen


@PROTOCOL.of(ProtocolF.BACKEND_REQ)
def news(peer: Peer) -> None:
    """Of a resize; without a channel there are none."""
    frontend = peer.connect(protocol_features=~int(ProtocolF.BACKEND_REQ))
    assert frontend.channel is None
    peer.check(peer.blk(frontend=frontend))
    frontend = peer.connect()
    blk = peer.blk(frontend=frontend)
    heard: list[int] = []
    frontend.on_config_change = lambda: heard.append(blk.read_config().capacity)
    for size in (2 * SIZE, SIZE):
        peer.daemon.resize(size)
        while not heard:
            assert select.select([frontend.fileno()], [], [], DEADLINE)[0]
            assert frontend.step()
        assert heard == [size // SECTOR]
        heard.clear()


@PROTOCOL.of(ProtocolF.CONFIG)
def config_space(peer: Peer) -> None:
    """Any length up to the space's own; longer is an error, and one that leaves the session as it was."""
    frontend = peer.connect()
    whole = frontend.get_config(0, 60)
    assert int.from_bytes(whole[:8], "little") == SIZE // SECTOR
    assert frontend.get_config(0, 24) == whole[:24]
    with pytest.raises(Exception, match="GET_CONFIG: no 257 bytes"):
        frontend.get_config(0, 257)
    assert frontend.get_config(0, 60) == whole


@PROTOCOL.of(ProtocolF.CONFIGURE_MEM_SLOTS)
def memory_slots(peer: Peer) -> None:
    """More regions than SET_MEM_TABLE can tell, coming and going while requests are made in them."""
    frontend = peer.connect()
    blk = peer.blk(frontend=frontend)
    assert frontend.get_max_mem_slots() >= 32
    data = peer.data(SECTOR)
    blk.write(7, data)
    regions = [Region.allocate(8192, guest_addr=(16 + i) << 32) for i in range(31)]
    for region in regions:
        frontend.add_mem_region(region)
    for region in regions:
        view = GuestMemory([region]).view(region.guest_addr, 8192)
        blk.raw_read(7, region.guest_addr, view, 1)
        assert view[4096 : 4096 + SECTOR] == data
        frontend.remove_mem_region(region)
        peer.check(blk)


@PROTOCOL.of(ProtocolF.BACKEND_SEND_FD, ProtocolF.HOST_NOTIFIER)
def descriptors_of_its_own(peer: Peer) -> None:
    """libvhost-user can send doorbells, but this export has none. They are negotiated, and nothing comes."""
    frontend = peer.connect()
    wanted = ProtocolF.BACKEND_SEND_FD | ProtocolF.HOST_NOTIFIER
    assert frontend.protocol_features & wanted == wanted
    peer.check(peer.blk(frontend=frontend))
    assert frontend.host_notifiers == {}


@PROTOCOL.of(ProtocolF.PAGEFAULT)
def postcopy(peer: Peer) -> None:
    """It waits for a page that is not there yet, and goes on when it is. Where that page is, it does not
    tell: the answer to SET_MEM_TABLE has our addresses instead of its own, other than the specification has
    it ("Migration"), and with memory slots it takes no acknowledgement. So all pages come when it waits."""
    wanted = int(WANTED | ProtocolF.PAGEFAULT) & ~int(ProtocolF.CONFIGURE_MEM_SLOTS)
    frontend = peer.connect(protocol_features=wanted)
    pages = frontend.postcopy_advise()
    frontend.postcopy_listen()
    data = peer.data(64 << 10)
    with peer.disk.open("r+b") as file:
        file.write(data)
    blk = peer.blk(frontend=frontend, max_transfer=64 << 10)
    blk.submit_read(0, len(data) // SECTOR)
    assert blk.poll(0) == []
    assert select.select([pages], [], [], DEADLINE)[0]
    event, _, address = FAULT.unpack(os.read(pages.fileno(), FAULT.size))
    assert event == PAGEFAULT
    there = [pages.place(blk.region, at, bytes(4096)) for at in range(0, blk.region.size, 4096)]
    assert sum(there) >= 15, "of the request all but the first, which our header is in"
    wake(pages.fileno(), address & ~4095, 4096)
    (done,) = blk.poll(DEADLINE)
    assert done.data == data
    frontend.postcopy_end()
    peer.check(blk)


# -- the tables --------------------------------------------------------------------------------------


def test_each_bit_has_an_exercise(stack: ExitStack, tmp_path: Path) -> None:
    for name, writable in (("rw", True), ("ro", False)):
        frontend = start(stack, tmp_path, name, writable=writable).connect()
        assert FEATURES.missing(frontend.offered_features) == []
        assert PROTOCOL.missing(frontend.offered_protocol_features) == []


@FEATURES.parametrize()
def test_feature(peer: Peer, tmp_path: Path, stack: ExitStack, bit: int, exercise: Exercise) -> None:
    if bit in bits(int(BlkF.RO)):
        peer = start(stack, tmp_path, "ro", writable=False)
    with Frontend.connect(peer.daemon.path) as frontend:
        offered = frontend.offered_features
    FEATURES.run(bit, exercise, offered, peer)


@PROTOCOL.parametrize()
def test_protocol_feature(peer: Peer, bit: int, exercise: Exercise) -> None:
    with Frontend.connect(peer.daemon.path) as frontend:
        offered = frontend.offered_protocol_features
    PROTOCOL.run(bit, exercise, offered, peer)


def test_each_feature_alone(peer: Peer) -> None:
    with Frontend.connect(peer.daemon.path) as frontend:
        offered = frontend.get_features() & ~int(VirtioF.VERSION_1 | VhostF.LOG_ALL | BlkF.RO)
    for mask in (0, *(1 << bit for bit in bits(offered)), offered):
        with Frontend.connect(peer.daemon.path, retry=DEADLINE) as frontend, ExactBlk(frontend, mask) as blk:
            peer.check(blk)
