# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhost.features import (
    DEVICE_FEATURES,
    BlkF,
    DeviceId,
    NetF,
    ProtocolF,
    Status,
    VhostF,
    VirtioF,
    VringF,
    VsockF,
    bits,
    feature_names,
)

PROTOCOL_FEATURES = """
    MQ LOG_SHMFD RARP REPLY_ACK MTU BACKEND_REQ CROSS_ENDIAN CRYPTO_SESSION PAGEFAULT
    CONFIG BACKEND_SEND_FD HOST_NOTIFIER INFLIGHT_SHMFD RESET_DEVICE INBAND_NOTIFICATIONS CONFIGURE_MEM_SLOTS
    STATUS XEN_MMAP SHARED_OBJECT DEVICE_STATE GET_VRING_BASE_INFLIGHT GPA_ADDRESSES SHMEM_MAP
    GET_VRING_BASE_SKIP_DRAIN""".split()  # noqa: SIM905


def test_protocol_features_are_bits_0_to_23_in_order() -> None:
    assert [feature.name for feature in ProtocolF] == PROTOCOL_FEATURES
    assert [feature.value for feature in ProtocolF] == [1 << bit for bit in range(24)]


def test_old_names_find_the_new_ones() -> None:
    assert ProtocolF.SLAVE_REQ is ProtocolF.BACKEND_REQ
    assert ProtocolF.SLAVE_SEND_FD is ProtocolF.BACKEND_SEND_FD
    assert ProtocolF.SHMEM is ProtocolF.SHMEM_MAP
    assert VirtioF.IOMMU_PLATFORM is VirtioF.ACCESS_PLATFORM


@pytest.mark.parametrize("flags", [VirtioF, VhostF, VringF, ProtocolF, Status, BlkF, NetF, VsockF])
def test_every_feature_is_one_bit(flags: type) -> None:
    for feature in flags:  # type: ignore[attr-defined]
        assert feature.value.bit_count() == 1, feature
        assert feature.value < 1 << 64


def test_bits_the_ring_depends_on() -> None:
    assert VirtioF.RING_PACKED == 1 << 34
    assert VirtioF.IN_ORDER == 1 << 35
    assert VirtioF.RING_EVENT_IDX == 1 << 29
    assert VirtioF.RING_INDIRECT_DESC == 1 << 28
    assert VhostF.PROTOCOL_FEATURES == 1 << 30
    assert VhostF.LOG_ALL == 1 << 26


def test_device_bits_leave_the_transport_bits_alone() -> None:
    """VIRTIO 2.2: 0 to 23 and 50 to 63 belong to the device type."""
    for flags in DEVICE_FEATURES.values():
        for feature in flags:
            bit = feature.value.bit_length() - 1
            assert bit < 24 or bit >= 50, feature
    for feature in (*VirtioF, *VhostF):
        assert 24 <= feature.value.bit_length() - 1 < 50, feature


def test_names_are_in_order_and_unknown_bits_are_numbers() -> None:
    value = VirtioF.VERSION_1 | VhostF.PROTOCOL_FEATURES | 1 << 57 | BlkF.FLUSH
    assert feature_names(value, VirtioF, VhostF, BlkF) == [
        "FLUSH",
        "PROTOCOL_FEATURES",
        "VERSION_1",
        "bit 57",
    ]
    assert feature_names(0, VirtioF) == []


def test_the_first_enum_names_a_bit_that_two_know() -> None:
    assert feature_names(1 << 12, BlkF, NetF) == ["MQ"]
    assert feature_names(1 << 12, NetF, BlkF) == ["HOST_TSO6"]


def test_complement_keeps_the_bits_of_other_enums() -> None:
    value = VirtioF.VERSION_1 | VhostF.LOG_ALL | BlkF.FLUSH | 1 << 63
    assert value & ~VhostF.LOG_ALL == (1 << 32) | (1 << 9) | (1 << 63)
    assert value & ~VirtioF.VERSION_1 & ~BlkF.FLUSH == (1 << 26) | (1 << 63)


def test_device_ids() -> None:
    assert DeviceId.BLK is DeviceId.BLOCK == 2
    assert DeviceId.NET == 1
    assert DeviceId.RNG == 4
    assert DeviceId.FS == 26


@given(st.integers(0, (1 << 64) - 1))
def test_bits_add_up_to_the_value(value: int) -> None:
    numbers = list(bits(value))
    assert sum(1 << number for number in numbers) == value
    assert numbers == sorted(set(numbers))
    assert len(feature_names(value)) == len(numbers)
