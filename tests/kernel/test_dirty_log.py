# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The dirty log of vhost-net: exactly the pages that the kernel wrote, and none before or after."""

from __future__ import annotations

import os
import select

import pytest

from kernel.wires import HEADER, RX, TX, BareNic, frame, packet_socket
from vhost.dirty_log import DirtyLog
from vhost.kernel import VhostNet

pytestmark = pytest.mark.kernel("net")

PAGE = 4096


def used_page(nic: BareNic, index: int) -> int:
    """Each ring has pages of its own."""
    place = nic._places[index]
    return (place.addr + place.layout.used) // PAGE * PAGE


def test_exactly_the_pages_that_were_written(no_leaks: None) -> None:
    with VhostNet() as net, packet_socket("lo") as wire:
        net.attach(wire)
        with BareNic(net) as nic:
            log = DirtyLog.for_memory(nic.memory)
            buffers = [nic.data_addr + n * PAGE for n in (3, 70, 8, 40)]
            for addr in buffers:
                nic.post(addr)
            wire.send(frame(0))  # before there is a log
            assert nic.received() == (buffers[0], frame(0))
            changed = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            net.set_log_fd(changed)
            net.start_log(log)
            assert log.take() == []
            used = used_page(nic, RX)

            for number, addr in enumerate(buffers[1:3], 1):
                wire.send(frame(number))
                assert nic.received() == (addr, frame(number))
            assert log.take() == sorted([used, *buffers[1:3]])
            assert select.select([changed], [], [], 10)[0]
            assert log.take() == []

            # A frame across two pages, into a buffer that begins near the end of the first one.
            split = nic.data_addr + 100 * PAGE - HEADER - 20
            nic.post(split)
            wire.send(frame(4))
            assert nic.received() == (buffers[3], frame(4))
            assert log.take() == sorted([used, buffers[3]])
            wire.send(frame(5))
            assert nic.received() == (split, frame(5))
            assert log.take() == sorted([used, split // PAGE * PAGE, split // PAGE * PAGE + PAGE])

            # A driver that negotiates again does not end the log.
            net.set_features(nic.negotiated)

            # What is sent is only read: of memory, the rings alone change. (On lo the frame comes back, to
            # a ring without a buffer, where the kernel asks for kicks.)
            nic.send(nic.data_addr, frame(6))
            assert nic.queues[TX].wait(10)
            assert {used_page(nic, TX)} <= set(log.take()) <= {used_page(nic, TX), used}

            net.stop_log()
            nic.post(buffers[0])
            assert nic.received() == (buffers[0], frame(6))
            assert log.take() == []
            net.set_log_fd(None)
            os.close(changed)
