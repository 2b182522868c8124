# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What several commands share: sizes as arguments, signals as something to wait for."""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from vhost.features import ProtocolF, VirtioF

if TYPE_CHECKING:
    # The type of what add_subparsers returns has no public name.
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def size(text: str) -> int:
    """Bytes, with an optional K, M, G or T (powers of 1024)."""
    units = {"K": 10, "M": 20, "G": 30, "T": 40}
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in units else (text, "")
    try:
        value = int(number) << units.get(unit, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 1073741824 or 1G") from None
    if value <= 0:
        raise argparse.ArgumentTypeError(f"size {text!r} is not positive")
    return value


def cpus(text: str) -> tuple[int, ...]:
    """Numbers with commas between them."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are no CPUs such as 0,2") from None


class Masks(NamedTuple):
    """Feature bits of either word."""

    protocol: int = 0
    virtio: int = 0


def features(text: str) -> Masks:
    """vhost-user protocol features, and virtio's that no device type has for itself, by their names with
    commas between them."""
    protocol = virtio = 0
    for name in text.split(","):
        key = name.strip().upper().replace("-", "_")
        if key in ProtocolF.__members__:
            protocol |= int(ProtocolF[key])
        elif key in VirtioF.__members__:
            virtio |= int(VirtioF[key])
        else:
            names = [*ProtocolF.__members__, *VirtioF.__members__]
            known = ", ".join(member.lower().replace("_", "-") for member in names)
            raise argparse.ArgumentTypeError(f"{name!r} is no feature; they are {known}")
    return Masks(protocol, virtio)


@contextlib.contextmanager
def wakeup_on(*signals: signal.Signals) -> Iterator[socket.socket]:
    """A socket that becomes readable with the number of each of these signals."""
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    old = {number: signal.signal(number, lambda *_: None) for number in signals}
    old_fd = signal.set_wakeup_fd(writer.fileno())
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(old_fd)
        for number, handler in old.items():
            signal.signal(number, handler)
        reader.close()
        writer.close()
