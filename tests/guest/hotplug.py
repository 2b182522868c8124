# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Devices and memory that come and go while a guest runs.

Knows QMP's commands for it, and what a Linux guest shows when it has noticed. Knows no back-end.

    with boot([*PORT, *ROOM, *vhost_user_blk(path, bus=PORT_NAME)]) as guest:
        unplug_disk(guest)
        plug_disk(guest, path, packed=True)
        plug_memory(guest, "dimm0")
"""

from __future__ import annotations

import time
from pathlib import Path

from guest.machine import Guest, GuestError

PORT_NAME = "port0"
PORT = ["-device", f"pcie-root-port,id={PORT_NAME},chassis=1,slot=1"]
"""Where a disk can be plugged: q35's own bus takes nothing once it runs."""
ROOM = ["-m", "slots=8,maxmem=4G"]
"""For memory to come."""
BLOCK_MIB = 128
"""What a Linux guest of this size takes or gives at a time."""
HOTPLUG_SECONDS = 120.0
_MEMORY = "awk '/MemTotal/ { print $2 }' /proc/meminfo"


def plug_disk(guest: Guest, path: Path, *, name: str = "disk", queues: int = 1, packed: bool = False) -> None:
    """Returns when the guest can read /dev/vda, which it cannot as soon as there is one. Nobody may have a
    predecessor open, which would have that name."""
    address = {"type": "unix", "data": {"path": str(path)}}
    backend = {"type": "socket", "data": {"addr": address, "server": False}}
    guest.qmp.command("chardev-add", {"id": f"c-{name}", "backend": backend})
    device = {"driver": "vhost-user-blk-pci", "id": name, "chardev": f"c-{name}", "bus": PORT_NAME}
    guest.qmp.command("device_add", {**device, "num-queues": queues, "packed": packed})
    read = "dd if=/dev/vda of=/dev/null count=1 2>/dev/null"
    guest.run(f"until {read}; do usleep 10000; done", timeout=HOTPLUG_SECONDS)


def unplug_disk(guest: Guest, *, name: str = "disk") -> None:
    """Returns when the guest has let go of it, and QEMU of its socket."""
    guest.qmp.command("device_del", {"id": name})
    guest.qmp.wait_event(
        "DEVICE_DELETED",
        timeout=HOTPLUG_SECONDS,
        matches=lambda event: event["data"].get("device") == name,
    )
    guest.qmp.command("chardev-remove", {"id": f"c-{name}"})


def prefer_plugged_memory(guest: Guest) -> None:
    """Memory that comes is used for what can be moved, such as the buffers of programs, before any other,
    and can be taken away again."""
    guest.run("echo online_movable >/sys/devices/system/memory/auto_online_blocks")


def plug_memory(guest: Guest, name: str, *, mib: int = BLOCK_MIB) -> None:
    """Returns when the guest uses it."""
    before = int(guest.run(_MEMORY).text)
    backend = {"qom-type": "memory-backend-memfd", "id": f"m-{name}", "size": mib << 20, "share": True}
    guest.qmp.command("object-add", backend)
    guest.qmp.command("device_add", {"driver": "pc-dimm", "id": name, "memdev": f"m-{name}"})
    wanted = before + mib * 1024 * 3 // 4  # the guest's own tables for it are taken off
    guest.run(f"until [ $({_MEMORY}) -ge {wanted} ]; do usleep 10000; done", timeout=HOTPLUG_SECONDS)


def unplug_memory(guest: Guest, name: str) -> None:
    """Returns when the guest has given it back. A page with I/O on it cannot be moved away, so a guest that
    works may refuse a few times."""
    deadline = time.monotonic() + HOTPLUG_SECONDS
    while True:
        guest.qmp.command("device_del", {"id": name})
        event = guest.qmp.wait_event(
            "DEVICE_DELETED",
            "MEM_UNPLUG_ERROR",
            timeout=HOTPLUG_SECONDS,
            matches=lambda event: event["data"].get("device") == name,
        )
        if event["event"] == "DEVICE_DELETED":
            break
        if time.monotonic() > deadline:
            raise GuestError(f"the guest keeps {name}: {event['data']}\n{guest.log()}")
    guest.qmp.command("object-del", {"id": f"m-{name}"})
