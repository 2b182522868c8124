# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Chain and Buffer as their users meet them."""

from __future__ import annotations

import gc
import os
import socket
from pathlib import Path

import pytest

import fds
from rig import BASE, Rig
from vhost.virtqueue import Buffer, Chain

pytestmark = pytest.mark.usefixtures("no_leaks")
both = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


@both
def test_a_chain_reads_and_writes_across_its_pieces(packed: bool) -> None:
    rig = Rig(32, packed=packed, sizes=(1 << 16, 1 << 16))
    driver, queue = rig.model_driver(), rig.device()
    border = BASE + (1 << 16)
    readable = [(rig.data, 3), (border - 5, 10), *((rig.data + 64 * i, 1) for i in range(1, 11))]
    writable = [(rig.data + 0x1000, 2), (border + 0x100, 5), (rig.data + 0x1100, 1)]
    text = b"abc0123456789ABCDEFGHIJ"
    at = 0
    for addr, size in readable:
        rig.ram.write(addr, text[at : at + size])
        at += size
    driver.add(readable, writable)
    chain = queue.pop()
    assert chain is not None
    assert (chain.readable_len, chain.writable_len, chain.written) == (23, 8, 0)
    assert [bytes(b) for b in chain.readable] == [
        b"abc",
        b"01234",
        b"56789",
        *(bytes([c]) for c in b"ABCDEFGHIJ"),
    ]
    assert [len(b) for b in chain.writable] == [2, 5, 1]
    assert chain.readable is chain.readable

    assert (chain.read(0), chain.read(2), chain.read(5)) == (b"", b"ab", b"c0123")
    into = bytearray(6)
    assert chain.readinto(into) == 6
    assert into == b"456789"
    assert chain.read() == b"ABCDEFGHIJ"
    assert (chain.read(), chain.read(5), chain.readinto(bytearray(5))) == (b"", b"", 0)
    assert (chain.read_at(1, 4), chain.read_at(23, 0), chain.read_at(0, 23)) == (b"bc01", b"", text)

    assert chain.write(b"1") == 1
    assert chain.write(bytearray(b"2345")) == 4
    assert chain.written == 5
    with pytest.raises(ValueError, match="4 bytes do not fit into the 3 that are left of 8"):
        chain.write(b"6789")
    assert chain.written == 5
    assert chain.write(memoryview(b"xx678xx")[2:5]) == 3
    assert chain.write(b"") == 0
    assert b"".join(map(bytes, chain.writable)) == b"12345678"
    chain.write_at(7, b"!")
    chain.write_at(8, b"")
    chain.write_at(1, b"()")
    assert chain.written == 8
    queue.push(chain)
    assert driver.get_used() == [(chain.id, 8)]
    assert rig.ram.read(writable[0][0], 2) + rig.ram.read(writable[1][0], 5) == b"1()4567"


@both
def test_parts_of_a_chain(packed: bool) -> None:
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device()
    rig.ram.write(rig.data, b"0123456789")
    driver.add(
        [(rig.data, 4), (rig.data + 4, 1), (rig.data + 5, 5)], [(rig.data + 32, 3), (rig.data + 35, 3)]
    )
    chain = queue.pop()
    assert chain is not None
    for offset in range(11):
        for size in range(11 - offset):
            parts = chain.readable_part(offset, size)
            assert b"".join(map(bytes, parts)) == b"0123456789"[offset : offset + size]
            assert all(len(p) for p in parts)
    assert [len(p) for p in chain.readable_part(3, 3)] == [1, 1, 1]
    assert [len(p) for p in chain.writable_part(2)] == [1, 3]
    assert not chain.writable_part(0)[0].readonly
    for offset, size in [(-1, 2), (0, 11), (10, 1), (11, 0), (11, -1), (0, -2), (1 << 62, 1), (5, 1 << 62)]:
        with pytest.raises(ValueError, match="are not within its 10 readable bytes"):
            chain.readable_part(offset, size)
        if size != -1:
            with pytest.raises(ValueError, match="readable"):
                chain.read_at(offset, size)
    with pytest.raises(ValueError, match="are not within its 6 writable bytes"):
        chain.writable_part(0, 7)
    for offset in (-1, 5, 7):
        with pytest.raises(ValueError, match=r"2 bytes at .* are not within its 6 writable bytes"):
            chain.write_at(offset, b"ab")


def test_copying_between_overlapping_parts_of_guest_memory() -> None:
    rig = Rig(16)
    driver, queue = rig.model_driver(), rig.device()
    rig.ram.write(rig.data, bytes(range(100)))
    driver.add([(rig.data, 90)], [(rig.data + 10, 90)])
    chain = queue.pop()
    assert chain is not None
    chain.write(chain.readable[0])
    assert rig.ram.read(rig.data + 10, 90) == bytes(range(90))


def test_buffers_speak_the_buffer_protocol() -> None:
    rig = Rig(16)
    driver, queue = rig.model_driver(), rig.device()
    driver.add([(rig.data, 16)], [(rig.data + 0x100, 16)])
    chain = queue.pop()
    assert chain is not None
    (readable,), (writable,) = chain.readable, chain.writable
    for buffer, readonly in ((readable, True), (writable, False)):
        view = memoryview(buffer)
        assert (view.format, view.itemsize, view.ndim, view.nbytes) == ("B", 1, 1, 16)
        assert view.readonly == buffer.readonly == readonly
        assert view.c_contiguous
        assert view.obj is buffer
        assert len(buffer) == 16
    assert readable.address == rig.memory[0].host_addr + rig.data - BASE
    with pytest.raises(TypeError):
        memoryview(readable)[0] = 1
    with pytest.raises((TypeError, BufferError)):
        os.readv(0, [readable])
    memoryview(writable)[3] = 7
    assert rig.ram.read(rig.data + 0x103, 1) == b"\x07"
    for kind in (Buffer, Chain):
        with pytest.raises(TypeError, match="come from a"):
            kind()


def test_buffers_go_straight_into_system_calls(tmp_path: Path) -> None:
    rig = Rig(16)
    driver, queue = rig.model_driver(), rig.device()
    rig.ram.write(rig.data, b"guest to file")
    driver.add([(rig.data, 6), (rig.data + 6, 7)], [(rig.data + 0x100, 4), (rig.data + 0x200, 9)])
    chain = queue.pop()
    assert chain is not None
    fd = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    near, far = socket.socketpair()
    try:
        assert os.pwritev(fd, chain.readable, 3) == 13
        assert os.preadv(fd, chain.writable, 3) == 13
        assert rig.ram.read(rig.data + 0x100, 4) + rig.ram.read(rig.data + 0x200, 9) == b"guest to file"
        assert near.sendmsg(chain.readable) == 13
        assert far.recv(100) == b"guest to file"
        far.send(b"file to guest")
        assert near.recvmsg_into(chain.writable)[0] == 13
        assert rig.ram.read(rig.data + 0x100, 4) + rig.ram.read(rig.data + 0x200, 9) == b"file to guest"
    finally:
        near.close()
        far.close()
        os.close(fd)


# ---------------------------------------------------------------------- lifetimes


@both
def test_a_held_buffer_is_not_moved_by_the_next_chain(packed: bool) -> None:
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device()
    driver.add([(rig.data, 4)], [])
    for chain in queue:
        (kept,) = chain.readable
        queue.push(chain)
    del chain
    driver.get_used()
    rig.ram.write(rig.data, b"kept")
    for i in range(1, 10):
        driver.add([(rig.data + 64 * i, 8)], [])
        for chain in queue:
            assert len(chain.readable[0]) == 8
            queue.push(chain)
        del chain
        driver.get_used()
    assert bytes(kept) == b"kept"


@both
def test_views_outlive_queue_memory_table_and_file(packed: bool, tmp_path: Path) -> None:
    before = fds.shared_maps()
    rig = Rig(16, packed=packed)
    driver, queue = rig.model_driver(), rig.device()
    rig.ram.write(rig.data, b"still here")
    driver.add([(rig.data, 10)], [(rig.data + 64, 10)])
    chain = queue.pop()
    assert chain is not None
    source, target = chain.readable[0], memoryview(chain.writable[0])[2:5]
    other = Rig(16, packed=packed)
    queue.set_memory(other.memory)
    queue.close()
    copy = memoryview(rig.memory[0])
    del rig, driver, queue, other
    gc.collect()
    assert chain.read() == b"still here"
    del chain
    gc.collect()
    assert bytes(source) == b"still here"
    target[:] = b"abc"
    assert bytes(copy).count(b"abc") == 1
    del source, target, copy
    gc.collect()
    assert fds.shared_maps() == before
