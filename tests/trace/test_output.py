# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Lines that are written in a thread of their own: in order, and at nobody's expense."""

from __future__ import annotations

import os
import select

import pytest

from vhost.trace.output import Output

pytestmark = pytest.mark.usefixtures("no_leaks")


def lost(count: int) -> str:
    return f"{count} lost"


def test_all_in_order() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as file, os.fdopen(reader) as source:
        output = Output(file, lost, lambda error: pytest.fail(str(error)))
        for number in range(5000):
            output.put(str(number))
            if number % 1000 == 999:
                assert [source.readline() for _ in range(1000)][-1] == f"{number}\n"
        output.close()


def test_nobody_reads() -> None:
    """It never waits; once somebody reads, it is said how much is missing, where it is."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as file:
        output = Output(file, lost, lambda error: pytest.fail(str(error)), max_waiting=1 << 17)
        text = "x" * 1023
        for _ in range(1000):
            output.put(text)
        got = b""
        while b"lost" not in got:
            got += os.read(reader, 1 << 20)
            output.put("now")
        output.close(timeout=None)
    while data := os.read(reader, 1 << 20):
        got += data
    os.close(reader)
    lines = got.decode().splitlines()
    count = lines.count(text)
    (missing,) = (line for line in lines if line.endswith("lost"))
    assert 0 < count < 1000
    assert int(missing.split()[0]) >= 1000 - count
    assert lines.index(missing) == count


def test_whoever_read_is_gone() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    told, tell = os.pipe()
    file = os.fdopen(writer, "w")
    output = Output(file, lost, lambda error: os.write(tell, bytes([error.errno or 0])) and None)
    output.put("a")
    select.select([told], [], [])
    assert os.read(told, 9) == bytes([32])  # EPIPE
    for _ in range(100):
        output.put("b" * (1 << 20))
    output.close()
    with pytest.raises(BrokenPipeError):
        file.close()  # it tries again what it has
    os.close(told)
    os.close(tell)
