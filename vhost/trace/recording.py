# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A trace in a file: records as lines of JSON, behind a line that says what they are.

    {"format": "vhost-trace", "version": 1, "started": "2026-01-31T12:00:00+00:00", "byteorder": "little"}
    {"t": 0, "session": 1, "channel": 0, "what": "open", "text": "main"}
    {"t": 812345, "session": 1, "channel": 0, "what": "data", "from": "front-end", "data": "0f000000..."}

``t`` is in ns since the trace began and ``data`` in hexadecimal. ``fds`` describes the descriptors that
came with the bytes, ``skipped`` counts bytes that followed and were not kept, ``delivered`` is false when
the other side was gone. What is absent has the default of ``Record``. vhost-user has the byte order of
its machine, which is why that is noted.

A file is read as what a stranger sent: line by line, and an error names the line.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Iterable, Iterator
from typing import IO, Any

from vhost.errors import VhostError
from vhost.trace.records import KEPT, FdInfo, Happening, Record, printable
from vhost.user.spec import Role

FORMAT = "vhost-trace"
VERSION = 1
MAX_LINE = 4 * KEPT + 64 * 1024


class RecordingError(VhostError):
    """A file that is no recording of this format, or a damaged one."""


def header() -> str:
    """The first line."""
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    head = {"format": FORMAT, "version": VERSION, "started": started, "byteorder": sys.byteorder}
    return json.dumps(head)


def dump(record: Record) -> str:
    """One record as a line, without its end."""
    line: dict[str, Any] = {
        "t": record.time,
        "session": record.session,
        "channel": record.channel,
        "what": record.happening.value,
    }
    if record.sender is not None:
        line["from"] = record.sender.value
    if record.data:
        line["data"] = record.data.hex()
    if record.skipped:
        line["skipped"] = record.skipped
    if record.fds:
        line["fds"] = [{"kind": fd.kind, "name": fd.name, "size": fd.size} for fd in record.fds]
    if record.text:
        line["text"] = record.text
    if not record.delivered:
        line["delivered"] = False
    return json.dumps(line)


def load(file: IO[str]) -> Iterator[Record]:
    """The records of a file. One that ends within a line, because its writer was killed, ends before it."""
    lines = _lines(file)
    number, first = next(lines, (1, ""))
    _check_header(first)
    for number, line in lines:
        try:
            yield _record(json.loads(line))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if not line.endswith("\n"):
                return
            raise RecordingError(f"line {number}: {type(error).__name__}: {error}") from None


def _lines(file: IO[str]) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        while line := file.readline(MAX_LINE):
            number += 1
            if len(line) == MAX_LINE and not line.endswith("\n"):
                raise RecordingError(f"line {number}: longer than {MAX_LINE} characters")
            yield number, line
    except UnicodeDecodeError as error:
        raise RecordingError(f"line {number + 1}: not text: {error.reason}") from None


def _check_header(line: str) -> None:
    try:
        head = json.loads(line)
        kind, version, order = head["format"], head["version"], head["byteorder"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RecordingError(f"line 1: no recording of vhost trace, which begins with {header()}") from None
    if kind != FORMAT:
        raise RecordingError(f"line 1: format {kind!r}, must be {FORMAT!r}")
    if version != VERSION:
        raise RecordingError(f"line 1: version {version!r}, this program knows {VERSION}")
    if order != sys.byteorder:
        raise RecordingError(f"line 1: byte order {order!r}, this machine's is {sys.byteorder!r}")


def _record(line: Any) -> Record:
    if not isinstance(line, dict):
        raise ValueError("not an object")
    sender = line.get("from")
    record = Record(
        time=_count(line["t"]),
        session=_count(line["session"]),
        channel=_count(line["channel"]),
        happening=Happening(line["what"]),
        sender=None if sender is None else Role(sender),
        data=bytes.fromhex(line.get("data", "")),
        skipped=_count(line.get("skipped", 0)),
        fds=tuple(_fds(line.get("fds", ()))),
        text=printable(str(line.get("text", ""))),
        delivered=bool(line.get("delivered", True)),
    )
    if record.happening in (Happening.DATA, Happening.EOF) and record.sender is None:
        raise ValueError(f'"from" is missing in {record.happening.value!r}')
    return record


def _fds(items: Iterable[Any]) -> Iterator[FdInfo]:
    for item in items:
        size = item["size"]
        kind, name = (printable(str(item[key])) for key in ("kind", "name"))
        yield FdInfo(kind, name, None if size is None else _count(size))


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ValueError(f"{value!r} is not a number from 0 to 2**64 - 1")
    return value
