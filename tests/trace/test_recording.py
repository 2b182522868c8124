# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A trace in a file: what was written is read, and what a stranger wrote is refused by name."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhost.trace.recording import MAX_LINE, RecordingError, dump, header, load
from vhost.trace.records import KEPT, FdInfo, Happening, Record, printable
from vhost.user.spec import Role

NUMBER = st.integers(0, (1 << 64) - 1)
TEXT = st.text(max_size=20).map(printable)
FD = st.builds(FdInfo, TEXT, TEXT, st.none() | NUMBER)
RECORDS = st.builds(
    Record,
    NUMBER,
    NUMBER,
    NUMBER,
    st.sampled_from(Happening),
    st.sampled_from(Role),
    st.binary(max_size=99),
    NUMBER,
    st.lists(FD, max_size=3).map(tuple),
    TEXT,
    st.booleans(),
)
OPEN = dump(Record(0, 1, 0, Happening.OPEN, text="main"))


def read(*lines: str) -> list[Record]:
    return list(load(io.StringIO("".join(line + "\n" for line in lines))))


@given(st.lists(RECORDS, max_size=5))
def test_what_was_written_is_read(records: list[Record]) -> None:
    lines = [header(), *map(dump, records)]
    assert all("\n" not in line for line in lines)
    assert read(*lines) == records


def test_the_longest_record_is_read() -> None:
    fds = (FdInfo("x" * 90, "y" * 90, 1 << 63),) * 253
    record = Record(1 << 63, 1, 0, Happening.DATA, Role.FRONTEND, bytes(KEPT + 12), 0, fds)
    assert len(dump(record)) < MAX_LINE
    assert read(header(), dump(record)) == [record]


def test_it_says_what_it_is() -> None:
    head = json.loads(header())
    assert (head["format"], head["version"]) == ("vhost-trace", 1)
    assert head["started"].startswith("20")


def test_a_line_that_was_cut_off_is_the_end() -> None:
    """Its writer was killed."""
    file = io.StringIO(f"{header()}\n{OPEN}\n{OPEN[:20]}")
    assert len(list(load(file))) == 1


@pytest.mark.parametrize(
    "lines, said",
    [
        ((), "line 1: no recording"),
        (("GIF89a",), "line 1: no recording"),
        (("[]",), "line 1: no recording"),
        (("[" * 100_000,), "line 1: no recording"),
        (('{"format": "pcap", "version": 1, "byteorder": "little"}',), "line 1: format 'pcap'"),
        (('{"format": "vhost-trace", "version": 2, "byteorder": "little"}',), "line 1: version 2"),
        (('{"format": "vhost-trace", "version": 1, "byteorder": "middle"}',), "line 1: byte order 'middle'"),
        ((header(), "{}"), "line 2: KeyError"),
        ((header(), "7"), "line 2: ValueError: not an object"),
        ((header(), OPEN, "[" * 100_000), "line 3: RecursionError"),
        ((header(), OPEN, OPEN.replace("open", "shut")), "line 3: ValueError: 'shut'"),
        ((header(), OPEN.replace('"t": 0', '"t": -1')), "line 2: ValueError: -1 is not a number"),
        ((header(), OPEN.replace('"t": 0', '"t": true')), "line 2: ValueError: True is not a number"),
        ((header(), OPEN.replace("open", "data")), 'line 2: ValueError: "from" is missing'),
        ((header(), OPEN.replace('"text"', '"data"')), "line 2: ValueError"),
        ((header(), OPEN.replace('"text": "main"', '"fds": [3]')), "line 2: TypeError"),
        ((header(), OPEN.replace("main", "m" * MAX_LINE)), f"line 2: longer than {MAX_LINE}"),
    ],
)
def test_what_is_none(lines: tuple[str, ...], said: str) -> None:
    with pytest.raises(RecordingError, match=r"^line") as error:
        read(*lines)
    assert str(error.value).startswith(said)


def test_what_a_terminal_would_obey() -> None:
    fd = FdInfo("\x1b]0;kind", "\x9b31m\r", 1)
    line = dump(Record(0, 1, 0, Happening.REMARK, fds=(fd,), text="\x1b[2Jgone\u202e"))
    (record,) = read(header(), line)
    assert record.text == "?[2Jgone?"
    assert record.fds == (FdInfo("?]0;kind", "?31m?", 1),)


def test_what_is_no_text() -> None:
    file = io.TextIOWrapper(io.BytesIO(b"\xff\xfe\0"), encoding="utf-8")
    with pytest.raises(RecordingError, match="line 1: not text"):
        list(load(file))
