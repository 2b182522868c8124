# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
from __future__ import annotations

import dataclasses
import struct
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from user.wire import SAMPLES, STRATEGIES
from vhost.errors import InvalidMessage
from vhost.user import gpu_payloads as g
from vhost.user import payloads as p

KINDS = sorted(STRATEGIES, key=lambda kind: kind.__name__)
LITTLE = pytest.mark.skipif(sys.byteorder != "little", reason="bytes are written out in little endian")


def test_every_payload_is_covered() -> None:
    defined = {
        value
        for value in (*vars(p).values(), *vars(g).values())
        if isinstance(value, type) and issubclass(value, p.Payload) and dataclasses.is_dataclass(value)
    }
    assert defined == set(STRATEGIES) == set(SAMPLES)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_round_trip(kind: type[p.Payload], data: st.DataObject) -> None:
    payload = data.draw(STRATEGIES[kind])
    packed = payload.pack()
    assert kind.MIN_SIZE <= len(packed) <= kind.MAX_SIZE
    assert kind.unpack(packed) == payload


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.binary(max_size=300))
def test_any_bytes_are_a_payload_or_an_error(kind: type[p.Payload], data: bytes) -> None:
    try:
        payload = kind.unpack(data)
    except InvalidMessage:
        return
    assert kind.MIN_SIZE <= len(data) <= kind.MAX_SIZE
    assert str(payload) is not None
    assert kind.unpack(payload.pack() if not isinstance(payload, p.MemTable) else data) == payload


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_out_of_range_name_the_payload_and_the_limit(kind: type[p.Payload]) -> None:
    for size in {kind.MIN_SIZE - 1, kind.MAX_SIZE + 1} - {-1}:
        with pytest.raises(InvalidMessage, match=rf"size {size}.*\d"):
            kind.unpack(bytes(size))


# Sizes as sizeof() in the C structs of QEMU and libvhost-user gives them.
@pytest.mark.parametrize(
    ("kind", "size"),
    [
        (p.U64, 8),
        (p.VringState, 8),
        (p.VringAddr, 40),
        (p.VringFd, 8),
        (p.MemoryRegion, 32),
        (p.XenMemoryRegion, 40),
        (p.SingleRegion, 40),
        (p.XenSingleRegion, 48),
        (p.Log, 16),
        (p.Iotlb, 32),
        (p.VringArea, 24),
        (p.Inflight, 24),
        (p.SharedObject, 16),
        (p.DeviceState, 8),
        (p.MMap, 40),
        (p.ShmemConfig, 2056),
        (p.CryptoSession, 1072),
        (p.MemTable, 8 + 2 * 32),
        (p.XenMemTable, 8 + 40),
        (p.Config, 12 + 4),
        (p.Empty, 0),
    ],
)
def test_size_on_the_wire(kind: type[p.Payload], size: int) -> None:
    assert len(SAMPLES[kind].pack()) == size


@LITTLE
@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (p.VringState(1, 0x80008000), "01000000 00800080"),
        (
            p.VringAddr(2, 1, 3, 4, 5, 6),
            "02000000 01000000" + "".join(f"0{n}" + "00" * 7 for n in (3, 4, 5, 6)),
        ),
        (p.VringFd(7, nofd=True), "0701000000000000"),
        (p.Iotlb(1, 2, 3, 3, 2), "01" + "00" * 7 + "02" + "00" * 7 + "03" + "00" * 7 + "0302" + "00" * 6),
        (p.MMap(9, 1, 2, 3, 1), "09" + "00" * 7 + "".join(f"0{n}" + "00" * 7 for n in (1, 2, 3, 1))),
        (p.Inflight(1, 2, 3, 4), "01" + "00" * 7 + "02" + "00" * 7 + "03000400" + "00000000"),
        (p.Config(1, 2, 3, b"\xaa\xbb"), "01000000 02000000 03000000 aabb"),
        (
            p.SingleRegion(p.MemoryRegion(1, 2, 3, 4)),
            "00" * 8 + "".join(f"0{n}" + "00" * 7 for n in (1, 2, 3, 4)),
        ),
        (SAMPLES[p.SharedObject], "00112233445566778899aabbccddeeff"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, p.Payload) else "",
)
def test_bytes_on_the_wire(payload: p.Payload, expected: str) -> None:
    assert payload.pack() == bytes.fromhex(expected)


@pytest.mark.parametrize("kind", [p.MemTable, p.XenMemTable])
def test_table_of_eight_sent_whole_is_accepted(kind: type[p.MemTable]) -> None:
    table = SAMPLES[kind]
    packed = table.pack()
    whole = packed + bytes(8 + 8 * kind.REGION.MAX_SIZE - len(packed))
    assert kind.unpack(whole) == table
    # Linux' virtio_uml has room for two, and one that it uses.
    one = kind(table.regions[:1]).pack()
    assert kind.unpack(one + bytes(kind.REGION.MAX_SIZE)).regions == table.regions[:1]
    for wrong in (one + bytes(7), one + bytes(8 * kind.REGION.MAX_SIZE), one[:-1]):
        with pytest.raises(InvalidMessage, match="num regions"):
            kind.unpack(wrong)
    with pytest.raises(InvalidMessage, match="num regions"):
        kind.unpack(whole[:-1] + b"\x01")
    with pytest.raises(InvalidMessage, match="num regions"):
        kind.unpack(packed + bytes(31))  # no whole rows


@pytest.mark.parametrize("count", [0, 33, 0xFFFFFFFF])
def test_table_with_a_count_that_no_table_has(count: int) -> None:
    with pytest.raises(InvalidMessage, match=f"num regions {count}, must be 1 to 32"):
        p.MemTable.unpack(struct.pack("=II", count, 0) + bytes(32))


def test_table_beyond_the_specification_is_read_but_not_sent() -> None:
    region = p.MemoryRegion(0, 4096, 0)
    wire = struct.pack("=II", 32, 0) + region.pack() * 32
    assert len(p.MemTable.unpack(wire).regions) == 32
    with pytest.raises(ValueError, match="9 regions, must be 1 to 8"):
        p.MemTable([region] * 9).pack()
    with pytest.raises(ValueError, match="0 regions"):
        p.MemTable([]).pack()


@pytest.mark.parametrize("value", [1 << 9, 1 << 16, (1 << 16) | 1, 1 << 63, p.U64_MAX])
def test_ring_index_with_stray_bits_is_not_truncated(value: int) -> None:
    with pytest.raises(InvalidMessage, match="bits 9 to 63"):
        p.VringFd.unpack(struct.pack("=Q", value))


@pytest.mark.parametrize("index", [-1, 256, 0x10000])
def test_ring_index_that_does_not_fit_is_not_sent(index: int) -> None:
    with pytest.raises(ValueError, match=f"index {index}"):
        p.VringFd(index).pack()


@pytest.mark.parametrize("size", [0, 3, 5, 0xFFFFFFFF])
def test_config_size_must_match_what_follows(size: int) -> None:
    with pytest.raises(InvalidMessage, match=f"field size {size}, but 4 bytes follow"):
        p.Config.unpack(struct.pack("=III", 0, size, 0) + b"abcd")


def test_config_is_not_sent_with_a_wrong_size() -> None:
    with pytest.raises(ValueError, match="size 5, payload 4 bytes"):
        p.Config(0, 5, 0, b"abcd").pack()
    with pytest.raises(ValueError, match="limit 4096"):
        p.Config(0, 4097, 0, bytes(4097)).pack()


def test_inflight_without_the_padding_of_c() -> None:
    packed = p.Inflight(1, 2, 3, 4).pack()
    assert p.Inflight.unpack(packed[:20]) == p.Inflight(1, 2, 3, 4)
    with pytest.raises(InvalidMessage, match="must be 20 or 24"):
        p.Inflight.unpack(packed[:22])


def test_shmem_config_counts_the_used_regions() -> None:
    packed = p.ShmemConfig((4096, 0, 8192)).pack()
    assert struct.unpack_from("=I", packed) == (2,)
    with pytest.raises(InvalidMessage, match="num regions 3"):
        p.ShmemConfig.unpack(struct.pack("=I", 3) + packed[4:])
    with pytest.raises(ValueError, match="257 sizes"):
        p.ShmemConfig((0,) * 257).pack()


@pytest.mark.parametrize(
    "payload", [p.U64(-1), p.U64(1 << 64), p.VringState(1 << 32), p.Inflight(0, 0, 1 << 16, 0)]
)
def test_values_that_do_not_fit_are_not_sent(payload: p.Payload) -> None:
    with pytest.raises(ValueError, match=type(payload).__name__):
        payload.pack()


def test_payloads_speak() -> None:
    assert str(p.VringState(1, 256)) == "index=1 num=256"
    assert str(SAMPLES[p.Config]) == "offset=8 size=4 flags=0 payload=<4 bytes>"
    assert "guest_addr=0x1000" in str(SAMPLES[p.MemTable])
    assert str(SAMPLES[p.CryptoSession]) == "op_code=260 setup=<1056 bytes> session_id=5"
    assert p.VringArea(0x103, 0, 0).index == 3
    assert p.VringArea(0x103, 0, 0).nofd
