# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The control path of the kernel's vhost devices: what goes, and what each error says."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator

import pytest

from kernel.wires import frame, packet_socket
from vhost.dirty_log import DirtyLog
from vhost.driver_queue import DriverQueue
from vhost.errors import (
    InactiveFeature,
    InvalidGuestMemory,
    InvalidLogAddress,
    InvalidQueue,
    IoctlError,
    UnsupportedRequest,
    VhostError,
)
from vhost.features import BackendF, NetF, VhostF, VirtioF, VringF
from vhost.kernel import KernelVhost, VhostNet, VhostScsi, VhostVsock
from vhost.kernel import ioctls as k
from vhost.memory import GuestMemory, Region

pytestmark = [pytest.mark.kernel("net", "vsock", "scsi"), pytest.mark.usefixtures("no_leaks")]

MODERN = int(VirtioF.VERSION_1)
GUEST = 1 << 32
NUM = 64
DESC, AVAIL, USED = GUEST, GUEST + 0x1000, GUEST + 0x2000


@pytest.fixture(params=[VhostNet, VhostVsock, VhostScsi])
def unowned(request: pytest.FixtureRequest) -> Iterator[KernelVhost]:
    with request.param(owner=False) as device:
        yield device


@pytest.fixture
def net() -> Iterator[VhostNet]:
    with VhostNet() as device:
        yield device


def make_memory() -> GuestMemory:
    return GuestMemory([Region.allocate(1 << 16, guest_addr=GUEST)])


def set_up(device: KernelVhost, memory: GuestMemory, ring: int = 0) -> None:
    device.set_mem_table(memory)
    device.set_vring_num(ring, NUM)
    device.set_vring_base(ring, 0)
    device.set_vring_addr(ring, DESC, AVAIL, USED)


def refused(call: Callable[[], object], number: int, *words: str) -> None:
    with pytest.raises(IoctlError) as failed:
        call()
    assert failed.value.errno == number, failed.value
    for word in words:
        assert word in str(failed.value)


def test_nothing_goes_before_set_owner(unowned: KernelVhost) -> None:
    memory = make_memory()
    refused(lambda: unowned.set_vring_num(0, NUM), errno.EPERM, "VHOST_SET_VRING_NUM", "ring 0, num 0x40",
            "SET_OWNER comes first")  # fmt: skip
    refused(lambda: unowned.set_mem_table(memory), errno.EPERM, "VHOST_SET_MEM_TABLE", "1 regions")
    unowned.set_owner()
    unowned.set_mem_table(memory)
    unowned.set_vring_num(0, NUM)


def test_second_owner(net: VhostNet) -> None:
    net.set_owner()  # the constructor's; told twice it is told once
    refused(lambda: k.SET_OWNER(net.fd), errno.EBUSY, "VHOST_SET_OWNER", "has an owner already")
    net.reset_owner()
    refused(lambda: net.set_vring_num(0, NUM), errno.EPERM)
    net.set_owner()
    net.set_vring_num(0, NUM)


def test_closed() -> None:
    net = VhostNet()
    net.close()
    net.close()
    refused(net.get_features, errno.EBADF, "/dev/vhost-net", "it was closed")
    refused(lambda: net.set_vring_num(0, NUM), errno.EBADF)
    assert net.step() is False


def test_features(net: VhostNet) -> None:
    offered = net.get_features()
    wanted = VirtioF.VERSION_1 | VirtioF.ACCESS_PLATFORM | VirtioF.RING_EVENT_IDX | VirtioF.RING_INDIRECT_DESC
    assert offered & wanted == wanted
    assert offered & NetF.MRG_RXBUF
    assert not offered & (VirtioF.RING_PACKED | VhostF.LOG_ALL | VirtioF.ANY_LAYOUT)
    net.set_features(MODERN)
    refused(lambda: k.SET_FEATURES(net.fd, MODERN | int(VirtioF.RING_PACKED)), errno.EOPNOTSUPP,
            "VHOST_SET_FEATURES", "0x500000000", "not offered")  # fmt: skip
    assert net.backend_features & BackendF.IOTLB_MSG_V2
    with pytest.raises(InactiveFeature, match="RING_PACKED"):
        net.set_features(MODERN | int(VirtioF.RING_PACKED))
    refused(lambda: net.set_backend_features(1 << 40), errno.EOPNOTSUPP, "VHOST_SET_BACKEND_FEATURES")


def test_features_array(net: VhostNet, kernel_release: str) -> None:
    if int(kernel_release.split(".")[0]) < 7:
        with pytest.raises(IoctlError, match="VHOST_GET_FEATURES_ARRAY"):
            net.get_features_array()
        return
    every = net.get_features_array()
    assert every & ((1 << 64) - 1) == k.GET_FEATURES(net.fd)
    net.set_features_array(MODERN)
    refused(lambda: net.set_features_array(1 << 127), errno.EOPNOTSUPP, "not offered")


def test_fork_from_owner(unowned: KernelVhost, kernel_release: str) -> None:
    if kernel_release.startswith("6.1."):
        with pytest.raises(IoctlError, match="FORK_FROM_OWNER"):
            unowned.get_fork_from_owner()
        return
    unowned.set_fork_from_owner(0)
    assert unowned.get_fork_from_owner() == 0
    unowned.set_fork_from_owner(1)
    assert unowned.get_fork_from_owner() == 1
    refused(lambda: unowned.set_fork_from_owner(2), errno.EINVAL, "must be 0 or 1")
    unowned.set_owner()
    refused(lambda: unowned.set_fork_from_owner(0), errno.EBUSY, "has an owner already")


def test_rings(net: VhostNet) -> None:
    memory = make_memory()
    net.set_features(MODERN)
    with pytest.raises(InvalidQueue, match="ring 2, must be below 2"):
        net.set_vring_num(2, NUM)
    refused(lambda: net.set_vring_num(0, 100), errno.EINVAL, "ring 0, num 0x64")
    with pytest.raises(InvalidQueue, match="its size comes before"):
        net.set_vring_addr(0, DESC, AVAIL, USED)
    net.set_vring_num(0, NUM)
    with pytest.raises(InvalidQueue, match="not wholly within one of 0 memory regions"):
        net.set_vring_addr(0, DESC, AVAIL, USED)
    net.set_mem_table(memory)
    end = GUEST + (1 << 16)
    for areas in ((end, AVAIL, USED), (DESC, end - 2, USED), (DESC, AVAIL, end - 16), (0, AVAIL, USED)):
        with pytest.raises(InvalidQueue, match="not wholly within"):
            net.set_vring_addr(0, *areas)
    with pytest.raises(InvalidQueue, match="no multiple of 16"):
        net.set_vring_addr(0, DESC + 8, AVAIL, USED)
    with pytest.raises(InvalidQueue, match="overlaps"):
        net.set_vring_addr(0, DESC, DESC, USED)
    net.set_vring_addr(0, DESC, AVAIL, USED)
    net.set_vring_base(0, 17)
    assert net.get_vring_base(0) == 17
    refused(lambda: net.set_vring_base(0, 0x10000), errno.EINVAL, "base 0x10000")
    net.set_vring_busyloop_timeout(1, 50)
    assert net.get_vring_busyloop_timeout(1) == 50
    refused(lambda: net.set_vring_endian(0, True), errno.ENOTTY, "VHOST_SET_VRING_ENDIAN")


def test_ring_that_runs(net: VhostNet) -> None:
    memory = make_memory()
    net.set_features(MODERN)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind(("lo", 0))
        with pytest.raises(VhostError, match="attach\\(\\) comes first"):
            net.set_vring_enable(1, True)
        with pytest.raises(VhostError, match="2 backends for 1 pairs"):
            net.attach(raw, raw)
        net.attach(raw)
        net.set_mem_table(memory)
        refused(lambda: net.set_vring_enable(1, True), errno.EFAULT, "VHOST_NET_SET_BACKEND", "ring 1",
                "the ring is not set up")  # fmt: skip
        set_up(net, memory, ring=1)
        net.set_vring_enable(1, True)
        refused(lambda: net.set_vring_num(1, NUM), errno.EBUSY, "the ring runs")
        refused(lambda: net.set_vring_base(1, 0), errno.EBUSY, "the ring runs")
        assert net.get_vring_base(1) == 0  # stops it
        net.set_vring_num(1, NUM)


def test_wrong_backends(net: VhostNet) -> None:
    memory = make_memory()
    net.set_features(MODERN)
    set_up(net, memory)
    reader, writer = os.pipe()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        for fd in (reader, udp.fileno(), net.fd):
            with pytest.raises(IoctlError, match="neither a tap nor a packet socket") as failed:
                net.set_backend(0, fd)
            assert f"ring 0, fd {fd}" in str(failed.value)
    refused(lambda: net.set_backend(0, 9999), errno.ENOTSOCK, "fd 9999")
    os.close(reader)
    os.close(writer)


def test_events(net: VhostNet) -> None:
    reader, writer = os.pipe()
    for call in (net.set_vring_kick, net.set_vring_call, net.set_vring_err):
        with pytest.raises(IoctlError, match="is no eventfd"):
            call(0, reader)
        call(0, None)
    os.close(reader)
    os.close(writer)


def test_memory(net: VhostNet) -> None:
    regions = [Region.allocate(4096, guest_addr=GUEST + i * 4096) for i in range(65)]
    net.set_mem_table(GuestMemory(regions[:64]))
    refused(lambda: net.set_mem_table(GuestMemory(regions)), errno.E2BIG, "65 regions", "max_mem_regions")
    net.set_mem_table(GuestMemory())


def test_dirty_log_covers_memory(net: VhostNet) -> None:
    memory = make_memory()
    net.set_features(MODERN)
    net.set_mem_table(memory)
    small = DirtyLog(GUEST)
    with pytest.raises(
        InvalidLogAddress, match="0x100000000 bytes of guest memory, which ends at 0x100010000"
    ):
        net.start_log(small)
    log = DirtyLog.for_memory(memory)
    assert log.limit >= GUEST + (1 << 16)
    net.start_log(log)
    more = memory.add(Region.allocate(1 << 20, guest_addr=log.limit))
    with pytest.raises(InvalidLogAddress):
        net.set_mem_table(more)
    net.set_vring_num(0, NUM)
    net.set_vring_addr(0, DESC, AVAIL, USED)
    refused(lambda: k.SET_VRING_ADDR(net.fd, 0, 0x10000, 0x20000, 0x30000, log=1, flags=VringF.LOG),
            errno.EINVAL, "log 0x1", "flags 0x1")  # fmt: skip
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    net.set_log_fd(fd)
    net.set_log_fd(None)
    os.close(fd)
    net.stop_log()
    net.set_mem_table(more)


def test_no_configuration_space(net: VhostNet) -> None:
    with pytest.raises(UnsupportedRequest, match="vhost-net has no configuration space"):
        net.get_config(0, 6)
    with pytest.raises(UnsupportedRequest):
        net.set_config(0, b"x")


@pytest.mark.parametrize("cid", [0, 1, 2, 0xFFFFFFFF, 1 << 40])
def test_bad_cid(cid: int) -> None:
    refused(lambda: VhostVsock(cid), errno.EINVAL, "VHOST_VSOCK_SET_GUEST_CID", f"{cid:#x}", "must be 3 to")


def test_cid_in_use() -> None:
    with VhostVsock(77) as vsock:
        assert vsock.guest_cid == 77
        refused(lambda: VhostVsock(77), errno.EADDRINUSE, "has this CID")
        refused(lambda: vsock.set_running(True), errno.EFAULT, "VHOST_VSOCK_SET_RUNNING", "not set up")
    with VhostVsock(77, owner=False) as vsock:
        assert vsock.guest_cid == 77


def test_foreign_mapping_is_our_address(net: VhostNet) -> None:
    """A region that came from somebody else: the kernel gets where it is here, not where it is there."""
    own = Region.allocate(1 << 16)
    region = Region.from_fd(own.fd, 1 << 16, guest_addr=GUEST, user_addr=0x1234_0000)
    net.set_features(MODERN)
    set_up(net, GuestMemory([region]))
    with pytest.raises(InvalidGuestMemory):
        net.memory.read(GUEST + (1 << 16), 1)


def test_a_ring_that_runs_moves_with_its_memory(net: VhostNet) -> None:
    memory = make_memory()
    net.set_features(MODERN)
    with packet_socket("lo") as wire:
        net.attach(wire)
        set_up(net, memory, ring=1)
        net.set_vring_enable(1, True)
        with pytest.raises(InvalidQueue, match="not wholly within one of 0 memory regions"):
            net.set_mem_table(GuestMemory())
        assert net.memory is memory
        # The same file mapped again is another place here, and the ring goes there.
        (region,) = memory
        moved = GuestMemory([Region.from_fd(region.fd, 1 << 16, guest_addr=GUEST, user_addr=GUEST)])
        kick, call = (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2))
        net.set_vring_kick(1, kick)
        net.set_vring_call(1, call)
        net.set_mem_table(moved)
        queue = DriverQueue(moved, NUM, desc=DESC, avail=AVAIL, used=USED, kick=kick, call=call)
        moved.write(GUEST + 0x4000, bytes(12) + frame(1))
        del memory, region
        queue.add([(GUEST + 0x4000, 12 + len(frame(1)))], (), None)
        queue.kick()
        assert wire.recv(2000) == frame(1)
        assert queue.wait(10)
        net.set_vring_enable(1, False)
        net.set_mem_table(GuestMemory())  # now it is not in the way
        os.close(kick)
        os.close(call)


def test_a_child_does_not_keep_the_rings_running() -> None:
    reader, writer = os.pipe()
    vsock = VhostVsock(52)
    memory = make_memory()
    vsock.set_features(MODERN)
    for ring in range(2):
        set_up(vsock, memory, ring)
    vsock.set_running(True)
    child = os.fork()
    if not child:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    other = os.dup(vsock.fd)
    vsock.close()
    # It does not run: its size may be changed again, by who has the descriptor and is the owner.
    k.SET_VRING_NUM(other, 0, NUM)
    os.close(other)
    os.close(writer)
    os.close(reader)
    assert os.waitpid(child, 0)[1] == 0


def test_rings_of_a_device_have_bounds() -> None:
    with VhostScsi(num_queues=2) as scsi:
        scsi.set_vring_num(3, NUM)
        with pytest.raises(InvalidQueue, match="ring 4, must be below 4"):
            scsi.set_vring_num(4, NUM)
        with pytest.raises(UnsupportedRequest, match="cannot give its owner up"):
            scsi.reset_owner()
    with VhostNet(queue_pairs=2) as net:
        net.set_vring_num(3, NUM)
        assert net.get_vring_base(3) == 0
        net.set_vring_enable(3, False)


def test_one_address_space(net: VhostNet) -> None:
    net.set_features(MODERN | int(VirtioF.ACCESS_PLATFORM))
    with pytest.raises(UnsupportedRequest, match="address space 1"):
        net.iotlb_update(0, 4096, make_memory()[0].host_addr, asid=1)
    with pytest.raises(VhostError, match="open the device anew"):
        net.set_features(MODERN)
    net.reset_owner()
    net.set_owner()
    net.set_features(MODERN)


def test_wrong_ring_says_so(net: VhostNet) -> None:
    refused(lambda: k.SET_VRING_NUM(net.fd, 9, NUM), errno.ENOBUFS, "ring 9", "no such ring")
