# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""vhost-net behind its IOTLB: what is not mapped is missed, stops nothing else, and goes on once it is."""

from __future__ import annotations

import errno
import select

import pytest

from kernel.wires import HEADER, TX, BareNic, frame, packet_socket
from vhost.errors import IoctlError
from vhost.features import Status, VirtioF
from vhost.kernel import Access, IotlbMessage, IotlbType, KernelVhost, VhostNet, VhostVsock
from vhost.memory import GuestMemory

pytestmark = pytest.mark.kernel("net")

PAGE = 4096


class RingsOnly(KernelVhost):
    """With the rings mapped, and no buffer."""

    transport_features = int(VirtioF.ACCESS_PLATFORM)

    def set_mem_table(self, memory: GuestMemory) -> None:
        super().set_mem_table(memory)
        (region,) = memory
        self.iotlb_update(region.guest_addr, 4 * PAGE, region.host_addr)
        assert self.get_status() & Status.FEATURES_OK


class Translated(RingsOnly, VhostNet):
    pass


class TranslatedVsock(RingsOnly, VhostVsock):
    pass


def wait_for_miss(net: KernelVhost, misses: list[IotlbMessage]) -> IotlbMessage:
    net.on_iotlb_miss = misses.append
    while not misses:
        assert select.select([net], [], [], 10)[0], "no miss"
        net.step()
    return misses[0]


def test_a_miss_waits_and_recovers(no_leaks: None) -> None:
    with Translated() as net, packet_socket("lo") as wire:
        net.attach(wire)
        with BareNic(net) as nic:
            assert nic.negotiated & VirtioF.ACCESS_PLATFORM
            (region,) = nic.memory
            at = nic.data_addr + 16 * PAGE
            nic.send(at, frame(1))
            miss = wait_for_miss(net, [])
            assert miss.type is IotlbType.MISS
            assert miss.iova == at
            assert miss.access & Access.RO
            assert not nic.queues[1].wait(0.2), "sent from memory that was not mapped"
            # Read-only is enough to send from.
            net.iotlb_update(at, PAGE, region.host_addr + (at - region.guest_addr), Access.RO)
            assert wire.recv(2000) == frame(1)
            assert nic.queues[1].wait(10)
            assert nic.queues[1].get_used() == (at, 0)

            # The same again after an invalidation.
            net.iotlb_invalidate(at, PAGE)
            nic.send(at, frame(2))
            assert wait_for_miss(net, []).iova == at
            net.iotlb_update(at, PAGE, region.host_addr + (at - region.guest_addr))
            assert wire.recv(2000) == frame(2)


@pytest.mark.kernel("vsock")
def test_vsock_has_one_too(no_leaks: None) -> None:
    with TranslatedVsock(99) as vsock, BareNic(vsock) as driver:
        (region,) = driver.memory
        at = driver.data_addr + 16 * PAGE
        driver.send(at, bytes(44 - HEADER))  # no packet that anybody would take, but a buffer to give back
        assert wait_for_miss(vsock, []).iova == at
        vsock.iotlb_update(at, PAGE, region.host_addr + (at - region.guest_addr))
        assert driver.queues[TX].wait(10)
        assert driver.queues[TX].get_used() == (at, 0)


def test_a_buffer_across_two_mappings(no_leaks: None) -> None:
    with Translated() as net, packet_socket("lo") as wire:
        net.attach(wire)
        with BareNic(net) as nic:
            (region,) = nic.memory
            at = nic.data_addr + 16 * PAGE - 50
            with net.iotlb_batch():
                for page in (15, 16):
                    iova = nic.data_addr + page * PAGE
                    net.iotlb_update(iova, PAGE, region.host_addr + (iova - region.guest_addr))
            nic.send(at, frame(3))
            assert wire.recv(2000) == frame(3)


def test_a_ring_that_is_not_mapped_is_no_ring(no_leaks: None) -> None:
    class Unmapped(VhostNet):
        transport_features = int(VirtioF.ACCESS_PLATFORM)

    with Unmapped() as net, packet_socket("lo") as wire:
        net.attach(wire)
        with pytest.raises(IoctlError) as failed:
            BareNic(net)
        assert failed.value.errno == errno.EFAULT
        assert "VHOST_NET_SET_BACKEND" in str(failed.value)
        assert "the ring is not set up" in str(failed.value)


def test_messages_that_are_refused() -> None:
    with VhostNet() as net:
        with pytest.raises(IoctlError) as failed:
            net.iotlb_update(0x1000, PAGE, 0x1000)
        assert failed.value.errno in (errno.EFAULT, errno.EINVAL)
        assert "/dev/vhost-net: IOTLB UPDATE" in str(failed.value)
        assert "IOVA 0x1000, size 0x1000" in str(failed.value)
        net.set_features(int(VirtioF.VERSION_1 | VirtioF.ACCESS_PLATFORM))
        with pytest.raises(IoctlError, match="IOTLB UPDATE"):
            net.iotlb_update(0x1000, PAGE, 0xFFFF_8000_0000_0000)
        with pytest.raises(IoctlError, match="IOTLB BATCH_BEGIN"):
            IotlbMessage(IotlbType.BATCH_BEGIN).write(net.fd, v2=True, name=net.name)
        with pytest.raises(ValueError, match="IOTLB_MSG_V2"):
            IotlbMessage(IotlbType.UPDATE, asid=1).write(net.fd, v2=False, name=net.name)


def test_messages_of_version_1(no_leaks: None) -> None:
    with Translated() as net, packet_socket("lo") as wire:
        net.set_backend_features(0)
        net.attach(wire)
        with BareNic(net) as nic:
            (region,) = nic.memory
            at = nic.data_addr + 16 * PAGE
            nic.send(at, frame(7))
            miss = wait_for_miss(net, [])
            assert (miss.iova, miss.asid) == (at, 0)
            net.iotlb_update(at, PAGE, region.host_addr + (at - region.guest_addr))
            assert wire.recv(2000) == frame(7)
