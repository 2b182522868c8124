# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a descriptor is that somebody passed: kind, name, size.

Asks the kernel and changes nothing: neither flags nor position, which belong to whoever sent it.
"""

from __future__ import annotations

import os
import stat

from vhost.trace.records import FdInfo, printable

_ANONYMOUS = {"[eventfd]": "eventfd", "[userfaultfd]": "userfaultfd", "[timerfd]": "timerfd"}
_PREFIXES = (("/memfd:", "memfd"), ("/dmabuf:", "dmabuf"))
_NAME_LIMIT = 80


def describe(fd: int) -> FdInfo:
    """Never raises for a descriptor that is open."""
    try:
        link = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        link = ""
    status = os.fstat(fd)
    mode = status.st_mode
    if link.startswith("anon_inode:"):
        name = link.removeprefix("anon_inode:")
        return FdInfo(_ANONYMOUS.get(name, name.strip("[]")))
    for prefix, kind in _PREFIXES:
        if link.startswith(prefix):
            name = link.removeprefix(prefix).removesuffix(" (deleted)")
            return FdInfo(kind, _name(name), status.st_size)
    if stat.S_ISSOCK(mode):
        return FdInfo("socket")
    if stat.S_ISFIFO(mode):
        return FdInfo("pipe")
    if stat.S_ISREG(mode):
        return FdInfo("file", _name(link), status.st_size)
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        return FdInfo("device", _name(link))
    return FdInfo("directory" if stat.S_ISDIR(mode) else "other", _name(link))


def _name(text: str) -> str:
    """A name that its owner chose, fit to be printed."""
    shown = printable(text)
    return shown if len(shown) <= _NAME_LIMIT else shown[:_NAME_LIMIT] + "..."
