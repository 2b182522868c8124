# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Structures of integers: compiled from the words of the specification, read from chains, answered."""

from __future__ import annotations

import gc
import struct
from enum import IntEnum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rig import Rig, error_event, eventfds, signals
from vhost import Struct
from vhost.errors import InvalidQueue, QueueBroken
from vhost.virtqueue import Chain

both = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
HEADER = Struct("le32 type; le32 reserved; le64 sector")
KINDS = {"u8": "B", "le16": "<H", "le32": "<I", "le64": "<Q", "be16": ">H", "be32": ">I", "be64": ">Q"}

# ---------------------------------------------------------------------- the structure itself


def test_what_a_structure_is() -> None:
    assert (HEADER.size, HEADER.fields) == (16, ("type", "reserved", "sector"))
    assert repr(HEADER) == "Struct('le32 type; le32 reserved; le64 sector')"
    assert Struct("\n u8 a;\n  be16 b ;\n").fields == ("a", "b")
    assert Struct(";".join(f"le64 m{i}" for i in range(64))).size == 512


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ("", "without members"),
        (" ; ", "without members"),
        ("u16 a", "'u16 a' is no member"),
        ("le24 a", "no member"),
        ("le32", "no member"),
        ("le32 a b", "no member"),
        ("le32 0a", "no member"),
        ("u8 mac[6]", "no member"),
        ("u8 a; le16 a", "'a' is there twice"),
        (";".join(f"u8 m{i}" for i in range(65)), "more than 64"),
    ],
)
def test_what_is_no_structure(members: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Struct(members)


@given(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=64), st.randoms())
def test_as_the_struct_module_does(kinds: list[str], random: object) -> None:
    values = [random.randrange(1 << 8 * struct.calcsize(KINDS[kind])) for kind in kinds]  # type: ignore[attr-defined]
    data = b"".join(struct.pack(KINDS[kind], value) for kind, value in zip(kinds, values, strict=True))
    one = Struct("; ".join(f"{kind} m{i}" for i, kind in enumerate(kinds)))
    assert one.size == len(data)
    assert one.pack(*values) == data
    assert one.unpack(data) == tuple(values)
    room = bytearray(b"\xaa" * (len(data) + 2))
    one.pack_into(room, 1, *values)
    assert room == b"\xaa" + data + b"\xaa"


def test_a_tuple_that_somebody_has_is_his() -> None:
    """One that nobody has is filled again."""
    pair = Struct("le16 a; le64 b")
    kept = pair.unpack(pair.pack(1, 1 << 40))
    in_a_set = {pair.unpack(pair.pack(2, 2 << 40))}
    hashed = pair.unpack(pair.pack(3, 3 << 40))
    hash(hashed)
    del hashed
    assert [pair.unpack(pair.pack(i, i << 40)) for i in range(4, 8)] == [(i, i << 40) for i in range(4, 8)]
    a, b = pair.unpack(pair.pack(8, 8 << 40))
    last = pair.unpack(pair.pack(9, 9 << 40))
    assert (a, b, last, hash(last)) == (8, 8 << 40, (9, 9 << 40), hash((9, 9 << 40)))
    assert (kept, in_a_set) == ((1, 1 << 40), {(2, 2 << 40)})


def test_values_and_sizes_that_do_not_fit() -> None:
    one = Struct("u8 a; be16 b")
    for values in [(), (1,), (1, 2, 3)]:
        with pytest.raises(ValueError, match=f"{len(values)} values for the 2 members"):
            one.pack(*values)
    beyond = [(256, 0, "a is 0x100"), (0, 1 << 16, "b is"), (0, -1, "b is -0x1"), (0, 1 << 70, "b is")]
    for a, b, reason in beyond:
        room = bytearray(3)
        with pytest.raises(ValueError, match=reason):
            one.pack_into(room, 0, a, b)
        assert room == bytes(3)
    with pytest.raises(TypeError):
        one.pack(1, "2")  # type: ignore[arg-type]
    for data in (b"", b"ab", b"abcd"):
        with pytest.raises(ValueError, match=f"{len(data)} bytes for the 3"):
            one.unpack(data)
    for offset in (-1, 1, 3, 1 << 62):
        with pytest.raises(ValueError, match="are not within 3"):
            one.pack_into(bytearray(3), offset, 1, 2)
    with pytest.raises(BufferError):
        one.pack_into(bytes(3), 0, 1, 2)


# ---------------------------------------------------------------------- chains


def popped(rig: Rig, readable: list[tuple[int, int]], writable: list[tuple[int, int]]) -> Chain:
    rig.model_driver().add(readable, writable)
    chain = rig.device().pop()
    assert chain is not None
    return chain


@both
@pytest.mark.parametrize("cut", range(1, 33))
def test_a_structure_is_read_wherever_it_was_cut(packed: bool, cut: int) -> None:
    rig = Rig(16, packed=packed)
    data = HEADER.pack(1, 0xFFFF_FFFF, 1 << 63) + HEADER.pack(2, 3, 4)
    rig.ram.write(rig.data, data[:cut])
    rig.ram.write(rig.data + 999, data[cut:] + b"rest")
    chain = popped(rig, [(rig.data, cut), (rig.data + 999, len(data) - cut + 4)], [])
    assert chain.unpack(HEADER) == (1, 0xFFFF_FFFF, 1 << 63)
    assert chain.unpack(HEADER) == (2, 3, 4)
    assert chain.read() == b"rest"


@both
def test_in_pieces_of_one_byte_and_after_a_read(packed: bool) -> None:
    rig = Rig(32, packed=packed)
    rig.ram.write(rig.data, b"x" + HEADER.pack(5, 6, 7))
    chain = popped(rig, [(rig.data + i, 1) for i in range(17)], [])
    assert chain.read(1) == b"x"
    assert chain.unpack(HEADER) == (5, 6, 7)
    assert chain.read() == b""


@both
def test_what_was_unpacked_stays(packed: bool) -> None:
    """Each tuple is the caller's: no later request shows in it."""
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device()
    kept = []
    for i in range(8):
        rig.ram.write(rig.data, HEADER.pack(i, i << 16, i << 40))
        driver.add([(rig.data, 16)], [(rig.data + 64, 1)])
        for chain in queue:
            kept.append(chain.unpack(HEADER))
            chain.finish(0)
        driver.get_used()
    assert kept == [(i, i << 16, i << 40) for i in range(8)]


@both
@pytest.mark.parametrize("size", [1, 15])
def test_too_short_a_header_breaks_the_queue(packed: bool, size: int) -> None:
    rig = Rig(16, packed=packed)
    driver = rig.model_driver()
    with error_event() as err:
        queue = rig.device(err=err)
        driver.add([(rig.data, size)], [(rig.data + 64, 1)])
        driver.add([(rig.data, 16)], [(rig.data + 64, 1)])
        served = 0
        with pytest.raises(QueueBroken, match=f"shorter than its header .*value {size:#x}, limit 0x10"):
            for chain in queue:
                served += 1
                chain.unpack(HEADER)
        assert served == 1
        assert "shorter than its header" in (queue.broken or "")
        assert signals(err) == 1
        with pytest.raises(QueueBroken):
            queue.pop()
        with pytest.raises(QueueBroken):
            chain.unpack(HEADER)
    assert driver.get_used() == []


@both
def test_no_room_for_a_status_breaks_the_queue(packed: bool) -> None:
    for call in (lambda chain: chain.data_room, lambda chain: chain.finish(0)):
        rig = Rig(16, packed=packed)
        driver, queue = rig.model_driver(), rig.device()
        driver.add([(rig.data, 16)], [])
        chain = queue.pop()
        assert chain is not None
        chain.unpack(HEADER)
        with pytest.raises(QueueBroken, match="no room for its status"):
            call(chain)
        assert queue.broken
        assert driver.get_used() == []


@both
def test_a_status_is_the_last_byte_and_what_was_written_is_said(packed: bool) -> None:
    class Status(IntEnum):
        BAD = 7

    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device()
    for status, told, expected in [
        (0, None, 4),
        (255, None, 4),
        (Status.BAD, 0, 1),
        (1, 2, 3),
        (1, 8, 9),
        (True, True, 2),
    ]:
        rig.ram.write(rig.data, b"\xee" * 9)
        driver.add([], [(rig.data, 4), (rig.data + 4, 5)])
        chain = queue.pop()
        assert chain is not None
        assert chain.data_room == 8
        chain.write(b"abc")
        chain.finish(status, told)
        assert driver.get_used() == [(chain.id, expected)]
        assert rig.ram.read(rig.data, 9) == b"abc" + b"\xee" * 5 + bytes([status])


@both
def test_what_finish_refuses_changes_nothing(packed: bool) -> None:
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device()
    rig.ram.write(rig.data, b"\xee" * 9)
    driver.add([], [(rig.data, 9)])
    chain = queue.pop()
    assert chain is not None
    for status in (-1, 256, 1 << 32, 1 << 70):
        with pytest.raises(ValueError, match="is no byte"):
            chain.finish(status)
    for written in (9, -1, 1 << 32, 1 << 64):
        with pytest.raises(ValueError, match="only 8 are writable before the status"):
            chain.finish(0, written)
    with pytest.raises(TypeError):
        chain.finish("0")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        chain.finish(None)  # type: ignore[arg-type]
    assert (driver.get_used(), rig.ram.read(rig.data, 9)) == ([], b"\xee" * 9)
    chain.write(b"012345678")
    with pytest.raises(ValueError, match="9 bytes of data written"):
        chain.finish(0)
    chain.finish(0, 8)
    assert driver.get_used() == [(chain.id, 9)]


@both
def test_a_chain_is_finished_once(packed: bool) -> None:
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device()
    driver.add([(rig.data, 32)], [(rig.data, 8)])
    chain = queue.pop()
    assert chain is not None
    chain.finish(0)
    for late in (
        lambda: chain.finish(0),
        lambda: chain.unpack(HEADER),
        lambda: chain.data_room,
        lambda: queue.push(chain),
    ):
        with pytest.raises(InvalidQueue, match=f"chain {chain.id} was given back"):
            late()
    assert driver.get_used() == [(chain.id, 1)]
    assert not queue.broken


@both
def test_finish_notifies_as_push_does(packed: bool) -> None:
    rig = Rig(16, packed=packed)
    driver = rig.model_driver()
    with eventfds(1) as (call,):
        queue = rig.device(call=call)
        for _ in range(3):
            driver.add([], [(rig.data, 1)])
        chain = queue.pop()
        assert chain is not None
        chain.finish(0)
        assert signals(call) == 1
        for chain in queue:
            chain.finish(0)
            assert signals(call) == 0
        assert signals(call) == 1


@both
def test_a_chain_outlives_its_queue_and_its_memory(packed: bool) -> None:
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device()
    rig.ram.write(rig.data, HEADER.pack(1, 2, 3))
    driver.add([(rig.data, 16)], [(rig.data + 64, 1)])
    chain = queue.pop()
    assert chain is not None
    queue.close()
    del queue, driver, rig
    gc.collect()
    assert chain.unpack(HEADER) == (1, 2, 3)
    with pytest.raises(InvalidQueue, match="closed"):
        chain.finish(0)
