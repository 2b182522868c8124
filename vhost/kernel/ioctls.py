# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""THE table of ioctls: one row for each that the kernel's vhost, vDPA and VDUSE devices know.

A row is called with a descriptor and its arguments; ``vhost ioctls``, error messages and the
documentation read the rest of it. Numbers and structs stand in csrc/vhost_uapi.h alone, how an argument
is passed in _ioctl.pyx. ``errors`` says what an errno means where the kernel's own word does not help.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Flag, auto
from errno import (
    E2BIG,
    EADDRINUSE,
    EBUSY,
    EEXIST,
    EFAULT,
    EINVAL,
    ENOBUFS,
    ENODEV,
    ENOTSOCK,
    ENOTSUP,
    ENOTTY,
    EPERM,
    EPFNOSUPPORT,
    ESOCKTNOSUPPORT,
)
from typing import Any

from vhost.kernel import _ioctl as k
from vhost.kernel import _vduse as u


class Node(Flag):
    """The device nodes that take an ioctl."""

    NET = auto()
    VSOCK = auto()
    SCSI = auto()
    VDPA = auto()
    VDUSE_CONTROL = auto()
    VDUSE = auto()

    VHOST = NET | VSOCK | SCSI
    IOTLB = NET | VSOCK | VDPA
    ANY = VHOST | VDPA

    def __str__(self) -> str:
        return " ".join((node.name or "").lower().replace("_", "-") for node in self)


_NO_OWNER = "SET_OWNER comes first, and from this process"
_RUNS = "the ring runs: stop it first"
_NO_RING = "the device has no such ring"
_UNKNOWN = "this kernel, or this device, does not know it"


def _also(more: Mapping[int, str] | None = None) -> dict[int, str]:
    """What an errno means for all of vhost's ioctls, and for this one."""
    return {EPERM: _NO_OWNER, ENOTTY: _UNKNOWN, ENOBUFS: _NO_RING, **(more or {})}


_RING = _also({EBUSY: _RUNS, EINVAL: "no number for a ring, or the ring runs"})
_EVENT = _also({EINVAL: "the descriptor is no eventfd"})
_VDPA = _also({ENOTSUP: "the vDPA device's driver cannot do that"})
_GIVEN_UP = {EPERM: "the kernel gave the device up after a request that nobody answered: `vdpa dev del`"}
_VDUSE = {**_GIVEN_UP, EINVAL: "not allowed for this device, or in its state"}

# --------------------------------------------------------------------------- sessions and features

GET_FEATURES = k.Scalar("VHOST_GET_FEATURES", Node.ANY, "Feature bits that are offered.", errors=_also())
SET_FEATURES = k.Scalar(
    "VHOST_SET_FEATURES", Node.ANY, "Acknowledge feature bits.",
    errors=_also({ENOTSUP: "a feature that was not offered",
                  EFAULT: "the dirty log does not cover the memory table",
                  EINVAL: "not all that the device insists on, such as ACCESS_PLATFORM",
                  EBUSY: "too late: the driver has acknowledged its features"}),
)  # fmt: skip
GET_FEATURES_ARRAY = k.Features(
    "VHOST_GET_FEATURES_ARRAY", Node.NET, "Feature bits beyond 64, too.", errors=_also()
)
SET_FEATURES_ARRAY = k.Features(
    "VHOST_SET_FEATURES_ARRAY", Node.NET, "Acknowledge feature bits beyond 64, too.",
    errors=_also({ENOTSUP: "a feature that was not offered"}),
)  # fmt: skip
GET_BACKEND_FEATURES = k.Scalar(
    "VHOST_GET_BACKEND_FEATURES",
    Node.IOTLB,
    "What the IOTLB and the control interface can do.",
    errors=_also(),
)
SET_BACKEND_FEATURES = k.Scalar(
    "VHOST_SET_BACKEND_FEATURES", Node.IOTLB, "Use these of them.",
    errors=_also({ENOTSUP: "a backend feature that was not offered",
                  EINVAL: "one of these needs another one"}),
)  # fmt: skip
SET_OWNER = k.Plain(
    "VHOST_SET_OWNER", Node.ANY, "This process, and its memory, own the session.",
    errors=_also({EBUSY: "the session has an owner already"}),
)  # fmt: skip
RESET_OWNER = k.Plain("VHOST_RESET_OWNER", Node.NET, "Give the session up.", errors=_also())
SET_FORK_FROM_OWNER = k.Scalar(
    "VHOST_SET_FORK_FROM_OWNER", Node.ANY, "Workers are tasks of the owner (1) or kernel threads (0).",
    errors={EBUSY: "the session has an owner already", EINVAL: "must be 0 or 1", ENOTTY: _UNKNOWN,
            EPERM: _UNKNOWN},
)  # fmt: skip
GET_FORK_FROM_OWNER = k.Scalar(
    "VHOST_GET_FORK_FROM_OWNER", Node.ANY, "What workers are.", errors={ENOTTY: _UNKNOWN}
)

# --------------------------------------------------------------------------- memory and log

SET_MEM_TABLE = k.MemTable(
    "VHOST_SET_MEM_TABLE", Node.VHOST, "Replace the memory table.",
    errors=_also({EFAULT: "a region is empty, or not in this process, or not in the dirty log",
                  E2BIG: "more regions than vhost's module parameter max_mem_regions"}),
)  # fmt: skip
SET_LOG_BASE = k.Scalar(
    "VHOST_SET_LOG_BASE", Node.VHOST, "Where the dirty log is in this process.", feature="VHOST_F_LOG_ALL",
    errors=_also({EFAULT: "not in this process"}),
)  # fmt: skip
SET_LOG_FD = k.Scalar(
    "VHOST_SET_LOG_FD", Node.VHOST, "An eventfd that is signalled when the log changed; -1: none.",
    feature="VHOST_F_LOG_ALL", errors=_EVENT,
)  # fmt: skip

# --------------------------------------------------------------------------- rings

SET_VRING_NUM = k.VringState("VHOST_SET_VRING_NUM", Node.ANY, "Size of a ring.", errors=_RING)
SET_VRING_ADDR = k.VringAddr(
    "VHOST_SET_VRING_ADDR", Node.ANY, "Where a ring's areas are, in this process; vDPA: IOVAs.",
    errors=_also({EINVAL: "an address is misaligned, or a ring that runs is not in the memory table",
                  EFAULT: "an address that is none in this process", EBUSY: _RUNS}),
)  # fmt: skip
SET_VRING_BASE = k.VringState(
    "VHOST_SET_VRING_BASE", Node.ANY, "Where a ring continues; packed: both indices and wrap counters.",
    value="base", errors=_RING,
)  # fmt: skip
GET_VRING_BASE = k.VringState(
    "VHOST_GET_VRING_BASE", Node.ANY, "Where a ring stands.", gives=True, errors=_also()
)
SET_VRING_ENDIAN = k.VringState(
    "VHOST_SET_VRING_ENDIAN", Node.VHOST, "Byte order of a legacy ring: 0 little, 1 big.", value="endian",
    errors=_also({EBUSY: _RUNS, EINVAL: "must be 0 or 1"}),
)  # fmt: skip
GET_VRING_ENDIAN = k.VringState(
    "VHOST_GET_VRING_ENDIAN", Node.VHOST, "Byte order of a legacy ring.", gives=True, errors=_also()
)
SET_VRING_KICK = k.VringFile(
    "VHOST_SET_VRING_KICK", Node.ANY, "Eventfd by which the driver tells of new buffers.", errors=_EVENT
)
SET_VRING_CALL = k.VringFile(
    "VHOST_SET_VRING_CALL", Node.ANY, "Eventfd by which the device tells of used buffers.", errors=_EVENT
)
SET_VRING_ERR = k.VringFile(
    "VHOST_SET_VRING_ERR", Node.ANY, "Eventfd by which the device tells of an error.", errors=_EVENT
)
SET_VRING_BUSYLOOP_TIMEOUT = k.VringState(
    "VHOST_SET_VRING_BUSYLOOP_TIMEOUT", Node.VHOST, "Microseconds to poll before waiting for a kick.",
    value="microseconds", errors=_also(),
)  # fmt: skip
GET_VRING_BUSYLOOP_TIMEOUT = k.VringState(
    "VHOST_GET_VRING_BUSYLOOP_TIMEOUT", Node.VHOST, "How long a ring is polled.", gives=True, errors=_also()
)

# --------------------------------------------------------------------------- workers

_WORKER = _also(
    {
        ENOTTY: "this device, or kernel, has no workers of its own",
        ENODEV: "no such worker",
        EFAULT: "workers are kernel threads (FORK_FROM_OWNER 0), which are not made this way",
    }
)
NEW_WORKER = k.Scalar("VHOST_NEW_WORKER", Node.SCSI, "Start a worker; its id.", errors=_WORKER)
FREE_WORKER = k.Scalar(
    "VHOST_FREE_WORKER", Node.SCSI, "End a worker that has no ring.",
    errors={**_WORKER, EBUSY: "a ring is attached to it"},
)  # fmt: skip
ATTACH_VRING_WORKER = k.VringState(
    "VHOST_ATTACH_VRING_WORKER", Node.SCSI, "Have a worker serve a ring.", value="worker", errors=_WORKER
)
GET_VRING_WORKER = k.VringState(
    "VHOST_GET_VRING_WORKER", Node.SCSI, "Which worker serves a ring.", gives=True, errors=_WORKER
)

# --------------------------------------------------------------------------- net, scsi, vsock

_BACKEND = "neither a tap nor a packet socket"
NET_SET_BACKEND = k.VringFile(
    "VHOST_NET_SET_BACKEND", Node.NET, "Run a ring on a tap or packet socket; -1: stop it.",
    errors=_also({EFAULT: "the ring is not set up: memory, size, address and base come before",
                  ENOTSOCK: _BACKEND, ESOCKTNOSUPPORT: _BACKEND, EPFNOSUPPORT: _BACKEND, EINVAL: _BACKEND}),
)  # fmt: skip
_SCSI = {
    EEXIST: "this session, or another one, has the target already",
    EFAULT: "the rings are not set up: memory, size, address and base come before",
    ENODEV: "no such target that is free and has a nexus",
}
SCSI_SET_ENDPOINT = k.ScsiTarget(
    "VHOST_SCSI_SET_ENDPOINT", Node.SCSI, "Serve the target with this WWPN.",
    errors=_also(_SCSI),
)  # fmt: skip
SCSI_CLEAR_ENDPOINT = k.ScsiTarget(
    "VHOST_SCSI_CLEAR_ENDPOINT", Node.SCSI, "Stop serving it.",
    errors=_also({**_SCSI, EINVAL: "it is another target"}),
)  # fmt: skip
SCSI_GET_ABI_VERSION = k.Scalar(
    "VHOST_SCSI_GET_ABI_VERSION", Node.SCSI, "Version of the endpoint's struct.", gives=True, errors=_also()
)
SCSI_SET_EVENTS_MISSED = k.Scalar(
    "VHOST_SCSI_SET_EVENTS_MISSED", Node.SCSI, "Whether the event queue overran.", errors=_also()
)
SCSI_GET_EVENTS_MISSED = k.Scalar(
    "VHOST_SCSI_GET_EVENTS_MISSED", Node.SCSI, "Whether the event queue overran.", gives=True, errors=_also()
)
VSOCK_SET_GUEST_CID = k.Scalar(
    "VHOST_VSOCK_SET_GUEST_CID", Node.VSOCK, "The address of the guest.",
    errors=_also({EINVAL: "must be 3 to 0xfffffffe",
                  EADDRINUSE: "another session, or this machine, has this CID"}),
)  # fmt: skip
VSOCK_SET_RUNNING = k.Scalar(
    "VHOST_VSOCK_SET_RUNNING", Node.VSOCK, "Start (1) or stop (0) the rings.",
    errors=_also({EFAULT: "the rings are not set up: memory, size, address and base come before"}),
)  # fmt: skip

# --------------------------------------------------------------------------- vDPA

VDPA_GET_DEVICE_ID = k.Scalar("VHOST_VDPA_GET_DEVICE_ID", Node.VDPA, "The virtio device id.", errors=_VDPA)
VDPA_GET_STATUS = k.Scalar("VHOST_VDPA_GET_STATUS", Node.VDPA, "The device status.", errors=_VDPA)
VDPA_SET_STATUS = k.Scalar(
    "VHOST_VDPA_SET_STATUS", Node.VDPA, "Set the device status; 0 resets.",
    errors={**_VDPA, EINVAL: "a status bit cannot be taken back but by a reset"},
)  # fmt: skip
VDPA_GET_CONFIG = k.ConfigRange(
    "VHOST_VDPA_GET_CONFIG", Node.VDPA, "Read configuration space.",
    errors={**_VDPA, EINVAL: "not in the configuration space"},
)  # fmt: skip
VDPA_SET_CONFIG = k.ConfigRange(
    "VHOST_VDPA_SET_CONFIG", Node.VDPA, "Write configuration space.",
    errors={**_VDPA, EINVAL: "not in the configuration space"},
)  # fmt: skip
VDPA_SET_VRING_ENABLE = k.VringState(
    "VHOST_VDPA_SET_VRING_ENABLE", Node.VDPA, "Enable or disable a ring.", value="enable", errors=_VDPA
)
VDPA_GET_VRING_NUM = k.Scalar("VHOST_VDPA_GET_VRING_NUM", Node.VDPA, "The largest ring.", errors=_VDPA)
VDPA_GET_VRING_SIZE = k.VringState(
    "VHOST_VDPA_GET_VRING_SIZE", Node.VDPA, "The size of a ring.", gives=True, errors=_VDPA
)
VDPA_SET_CONFIG_CALL = k.Scalar(
    "VHOST_VDPA_SET_CONFIG_CALL", Node.VDPA, "Eventfd that tells of a new configuration; -1: none.",
    errors={**_VDPA, EINVAL: "the descriptor is no eventfd"},
)  # fmt: skip
VDPA_GET_IOVA_RANGE = k.IovaRange(
    "VHOST_VDPA_GET_IOVA_RANGE", Node.VDPA, "First and last address that can be mapped.", errors=_VDPA
)
VDPA_GET_CONFIG_SIZE = k.Scalar(
    "VHOST_VDPA_GET_CONFIG_SIZE", Node.VDPA, "Bytes of configuration space.", errors=_VDPA
)
VDPA_GET_VQS_COUNT = k.Scalar("VHOST_VDPA_GET_VQS_COUNT", Node.VDPA, "How many rings.", errors=_VDPA)
VDPA_GET_GROUP_NUM = k.Scalar(
    "VHOST_VDPA_GET_GROUP_NUM", Node.VDPA, "How many groups of rings.", feature="VHOST_BACKEND_F_IOTLB_ASID",
    errors=_VDPA,
)  # fmt: skip
VDPA_GET_AS_NUM = k.Scalar(
    "VHOST_VDPA_GET_AS_NUM", Node.VDPA, "How many address spaces.", feature="VHOST_BACKEND_F_IOTLB_ASID",
    errors=_VDPA,
)  # fmt: skip
VDPA_GET_VRING_GROUP = k.VringState(
    "VHOST_VDPA_GET_VRING_GROUP", Node.VDPA, "The group of a ring.", gives=True,
    feature="VHOST_BACKEND_F_IOTLB_ASID", errors=_VDPA,
)  # fmt: skip
VDPA_GET_VRING_DESC_GROUP = k.VringState(
    "VHOST_VDPA_GET_VRING_DESC_GROUP", Node.VDPA, "The group of a ring's own areas.", gives=True,
    feature="VHOST_BACKEND_F_DESC_ASID", errors=_VDPA,
)  # fmt: skip
VDPA_SET_GROUP_ASID = k.VringState(
    "VHOST_VDPA_SET_GROUP_ASID", Node.VDPA, "The address space of a group.",
    what="group", value="address space", feature="VHOST_BACKEND_F_IOTLB_ASID",
    errors={**_VDPA, EINVAL: "no such group or address space"},
)  # fmt: skip
VDPA_SUSPEND = k.Plain(
    "VHOST_VDPA_SUSPEND", Node.VDPA, "Stop processing; rings keep their place.",
    feature="VHOST_BACKEND_F_SUSPEND", errors=_VDPA,
)  # fmt: skip
VDPA_RESUME = k.Plain(
    "VHOST_VDPA_RESUME", Node.VDPA, "Go on after that.", feature="VHOST_BACKEND_F_RESUME", errors=_VDPA
)

# --------------------------------------------------------------------------- VDUSE

VDUSE_GET_API_VERSION = k.Scalar("VDUSE_GET_API_VERSION", Node.VDUSE_CONTROL, "What the kernel speaks.")
VDUSE_SET_API_VERSION = k.Scalar(
    "VDUSE_SET_API_VERSION", Node.VDUSE_CONTROL, "What this program speaks.",
    errors={EINVAL: "newer than the kernel's"},
)  # fmt: skip
VDUSE_CREATE_DEV = u.CreateDev(
    "VDUSE_CREATE_DEV", Node.VDUSE_CONTROL, "Make /dev/vduse/NAME.",
    errors={EEXIST: "there is a device of this name",
            EINVAL: "the kernel takes disks, and newer ones NICs, with VERSION_1 and ACCESS_PLATFORM, but"
            " neither CONFIG_WCE nor CTRL_VQ, and a page of configuration at most",
            EPERM: "needs CAP_NET_ADMIN for a NIC"},
)  # fmt: skip
VDUSE_DESTROY_DEV = u.DestroyDev(
    "VDUSE_DESTROY_DEV", Node.VDUSE_CONTROL, "Remove it.",
    errors={EBUSY: "it is open, or on the vDPA bus: close it, and `vdpa dev del` first",
            EINVAL: "no such device"},
)  # fmt: skip
VDUSE_IOTLB_GET_FD = u.IotlbFd(
    "VDUSE_IOTLB_GET_FD", Node.VDUSE, "The file behind the first mapping in a range.",
    errors={**_GIVEN_UP, EINVAL: "nothing is mapped there"},
)  # fmt: skip
VDUSE_IOTLB_GET_FD2 = u.IotlbFd(
    "VDUSE_IOTLB_GET_FD2", Node.VDUSE, "The same, of an address space.", feature="VDUSE_API_VERSION_1",
    errors={EINVAL: "nothing is mapped there", ENOTTY: _UNKNOWN},
)  # fmt: skip
VDUSE_DEV_GET_FEATURES = k.Scalar(
    "VDUSE_DEV_GET_FEATURES", Node.VDUSE, "What the driver acknowledged.", errors=_GIVEN_UP
)
VDUSE_DEV_SET_CONFIG = k.ConfigRange(
    "VDUSE_DEV_SET_CONFIG", Node.VDUSE, "Write configuration space.",
    errors={EINVAL: "not in the configuration space"},
)  # fmt: skip
VDUSE_DEV_INJECT_CONFIG_IRQ = k.Plain(
    "VDUSE_DEV_INJECT_CONFIG_IRQ", Node.VDUSE, "Tell the driver of a new configuration.", errors=_VDUSE
)
VDUSE_VQ_SETUP = u.VqConfig("VDUSE_VQ_SETUP", Node.VDUSE, "The size of a ring.", errors=_VDUSE)
VDUSE_VQ_GET_INFO = u.VqInfo(
    "VDUSE_VQ_GET_INFO", Node.VDUSE, "Size, addresses and place of a ring.", errors=_VDUSE
)
VDUSE_VQ_SETUP_KICKFD = k.VringFile(
    "VDUSE_VQ_SETUP_KICKFD", Node.VDUSE, "Eventfd by which the driver tells of new buffers.", errors=_VDUSE
)
VDUSE_VQ_INJECT_IRQ = k.Scalar(
    "VDUSE_VQ_INJECT_IRQ", Node.VDUSE, "Tell the driver of used buffers.", errors=_VDUSE
)
VDUSE_IOTLB_REG_UMEM = u.Umem(
    "VDUSE_IOTLB_REG_UMEM", Node.VDUSE, "Use our memory for the bounce buffer.", errors={ENOTTY: _UNKNOWN}
)
VDUSE_IOTLB_DEREG_UMEM = u.Umem(
    "VDUSE_IOTLB_DEREG_UMEM", Node.VDUSE, "Take our memory back.", errors={ENOTTY: _UNKNOWN}
)
VDUSE_IOTLB_GET_INFO = u.IovaInfo(
    "VDUSE_IOTLB_GET_INFO", Node.VDUSE, "The first mapping in a range, and what it can do.",
    errors={EINVAL: "nothing is mapped there", ENOTTY: _UNKNOWN},
)  # fmt: skip

IOCTLS: dict[str, k.Ioctl] = {row.name: row for row in list(globals().values()) if isinstance(row, k.Ioctl)}
"""All rows, by the kernel's names."""


def table_rows() -> list[dict[str, Any]]:
    """The table as plain data: ``vhost ioctls``, and whoever documents it."""
    return [
        {
            "type": f"{row.type:#04x}",
            "nr": f"{row.nr:#04x}",
            "name": row.name,
            "number": row.number,
            "direction": row.direction,
            "size": row.size,
            "argument": row.argument,
            "devices": str(row.devices),
            "feature": row.feature,
            "doc": row.doc,
        }
        for row in IOCTLS.values()
    ]
