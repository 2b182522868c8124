# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Lines that are written in a thread of their own: in order, and at nobody's expense."""

from __future__ import annotations

import errno
import os

import pytest

from vhost.trace.output import Output

pytestmark = pytest.mark.usefixtures("no_leaks")


def lost(count: int) -> str:
    return f"{count} lost"


def test_all_in_order() -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader) as source:
        output = Output(writer, lost, lambda error: pytest.fail(str(error)))
        for number in range(5000):
            output.put(str(number))
            if number % 1000 == 999:
                assert [source.readline() for _ in range(1000)][-1] == f"{number}\n"
        output.close()
    os.close(writer)


def test_nobody_reads() -> None:
    """It never waits; once somebody reads, it is said how much is missing, where it is."""
    reader, writer = os.pipe()
    output = Output(writer, lost, lambda error: pytest.fail(str(error)), max_waiting=1 << 17)
    text = "x" * 1023
    for _ in range(1000):
        output.put(text)
    got = b""
    while b"lost" not in got:
        got += os.read(reader, 1 << 20)
        output.put("now")
    output.close(timeout=None)
    os.close(writer)
    while data := os.read(reader, 1 << 20):
        got += data
    os.close(reader)
    lines = got.decode().splitlines()
    count = lines.count(text)
    (missing,) = (line for line in lines if line.endswith("lost"))
    assert 0 < count < 1000
    assert int(missing.split()[0]) >= 1000 - count
    assert lines.index(missing) == count


def test_nobody_reads_at_the_end_either() -> None:
    reader, writer = os.pipe()
    output = Output(writer, lost, lambda error: None)
    output.put("x" * (1 << 20))
    output.close(timeout=0.01)
    os.close(reader)  # which frees the thread
    output.close()
    os.close(writer)


def test_whoever_read_is_gone() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    failed: list[int | None] = []
    output = Output(writer, lost, lambda error: failed.append(error.errno))
    output.put("a")
    output.close(timeout=None)
    assert failed == [errno.EPIPE]
    for _ in range(100):
        output.put("b" * (1 << 20))
    assert not output._lines
    os.close(writer)
