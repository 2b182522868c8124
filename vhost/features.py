# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Feature bits, device ids and status bits, named as the specifications name them.

Knows numbers and names, and nothing about who negotiates them. Values are masks, so that
``features & VirtioF.RING_PACKED`` reads as it should; ``feature_names`` turns a mask back into words.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum, IntFlag
from typing import TypeVar

_F = TypeVar("_F", bound=type[IntFlag])


def _plain_complement(flags: _F) -> _F:
    """IntFlag's own complement knows the bits of its members only, so that ``features & ~VhostF.LOG_ALL``
    would drop every bit which another enum, or none, has a name for. Enum replaces an inherited
    ``__invert__``, hence a decorator."""
    flags.__invert__ = lambda self: ~int(self)  # type: ignore[method-assign, assignment, return-value]
    return flags


@_plain_complement
class VirtioF(IntFlag):
    """Device-independent features (VIRTIO chapter 6)."""

    NOTIFY_ON_EMPTY = 1 << 24
    ANY_LAYOUT = 1 << 27
    RING_INDIRECT_DESC = 1 << 28
    RING_EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    SR_IOV = 1 << 37
    NOTIFICATION_DATA = 1 << 38
    NOTIF_CONFIG_DATA = 1 << 39
    RING_RESET = 1 << 40
    ADMIN_VQ = 1 << 41
    SUSPEND = 1 << 43
    IOMMU_PLATFORM = ACCESS_PLATFORM  # the name that the vhost-user text still uses


@_plain_complement
class VhostF(IntFlag):
    """Bits of the same word that belong to vhost, not to the driver."""

    LOG_ALL = 1 << 26
    PROTOCOL_FEATURES = 1 << 30


@_plain_complement
class BackendF(IntFlag):
    """What a kernel back-end's IOTLB and control interface can do (linux/vhost_types.h, where they are bit
    numbers: VHOST_BACKEND_F_*)."""

    IOTLB_MSG_V2 = 1 << 1
    IOTLB_BATCH = 1 << 2
    IOTLB_ASID = 1 << 3
    SUSPEND = 1 << 4
    RESUME = 1 << 5
    ENABLE_AFTER_DRIVER_OK = 1 << 6
    DESC_ASID = 1 << 7
    IOTLB_PERSIST = 1 << 8


@_plain_complement
class VringF(IntFlag):
    """Flags of SET_VRING_ADDR."""

    LOG = 1 << 0


@_plain_complement
class ProtocolF(IntFlag):
    """vhost-user protocol features (vhost-user, "Protocol features")."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    GET_VRING_BASE_INFLIGHT = 1 << 20
    GPA_ADDRESSES = 1 << 21
    SHMEM_MAP = 1 << 22
    GET_VRING_BASE_SKIP_DRAIN = 1 << 23
    # Other names for the same bits, older or elsewhere in the specification.
    NET_MTU = MTU
    SLAVE_REQ = BACKEND_REQ
    SLAVE_SEND_FD = BACKEND_SEND_FD
    SHMEM = SHMEM_MAP


PROTOCOL_COMPANIONS: dict[int, int] = {
    int(ProtocolF.INBAND_NOTIFICATIONS): int(ProtocolF.BACKEND_REQ | ProtocolF.REPLY_ACK),
    int(ProtocolF.GET_VRING_BASE_INFLIGHT): int(ProtocolF.INFLIGHT_SHMFD),
    int(ProtocolF.GET_VRING_BASE_SKIP_DRAIN): int(
        ProtocolF.INFLIGHT_SHMFD | ProtocolF.GET_VRING_BASE_INFLIGHT
    ),
}
"""Protocol features that must not be negotiated without these others, as masks."""


def missing_companions(protocol_features: int) -> dict[int, int]:
    """By protocol feature: which of its companions are not among these."""
    return {
        feature: needed & ~protocol_features
        for feature, needed in PROTOCOL_COMPANIONS.items()
        if protocol_features & feature and needed & ~protocol_features
    }


@_plain_complement
class GpuF(IntFlag):
    """Protocol features on the socket of GPU_SET_SOCKET (vhost-user-gpu, "Protocol features")."""

    EDID = 1 << 0
    DMABUF2 = 1 << 1


@_plain_complement
class Status(IntFlag):
    """Device status (VIRTIO 2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    SUSPEND = 16
    NEEDS_RESET = 64
    FAILED = 128


class DeviceId(IntEnum):
    """Virtio device types (VIRTIO chapter 5)."""

    NET = 1
    BLOCK = 2
    CONSOLE = 3
    RNG = 4
    BALLOON_TRADITIONAL = 5
    IOMEM = 6
    RPMSG = 7
    SCSI = 8
    P9 = 9
    MAC80211_WLAN = 10
    RPROC_SERIAL = 11
    CAIF = 12
    BALLOON = 13
    GPU = 16
    CLOCK = 17
    INPUT = 18
    VSOCK = 19
    CRYPTO = 20
    SIGNAL_DIST = 21
    PSTORE = 22
    IOMMU = 23
    MEM = 24
    SOUND = 25
    FS = 26
    PMEM = 27
    RPMB = 28
    MAC80211_HWSIM = 29
    VIDEO_ENCODER = 30
    VIDEO_DECODER = 31
    SCMI = 32
    NITRO_SEC_MOD = 33
    I2C = 34
    WATCHDOG = 35
    CAN = 36
    PARAM_SERV = 38
    AUDIO_POLICY = 39
    BLUETOOTH = 40
    GPIO = 41
    RDMA = 42
    CAMERA = 43
    ISM = 44
    SPI = 45
    TEE = 46
    CPU_BALLOON = 47
    MEDIA = 48
    USB = 49
    BLK = BLOCK


@_plain_complement
class BlkF(IntFlag):
    """Block device (VIRTIO 5.2.3)."""

    BARRIER = 1 << 0
    SIZE_MAX = 1 << 1
    SEG_MAX = 1 << 2
    GEOMETRY = 1 << 4
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    SCSI = 1 << 7
    FLUSH = 1 << 9
    TOPOLOGY = 1 << 10
    CONFIG_WCE = 1 << 11
    MQ = 1 << 12
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14
    LIFETIME = 1 << 15
    SECURE_ERASE = 1 << 16
    ZONED = 1 << 17
    WCE = FLUSH


@_plain_complement
class NetF(IntFlag):
    """Network device (VIRTIO 5.1.3)."""

    CSUM = 1 << 0
    GUEST_CSUM = 1 << 1
    CTRL_GUEST_OFFLOADS = 1 << 2
    MTU = 1 << 3
    MAC = 1 << 5
    GSO = 1 << 6
    GUEST_TSO4 = 1 << 7
    GUEST_TSO6 = 1 << 8
    GUEST_ECN = 1 << 9
    GUEST_UFO = 1 << 10
    HOST_TSO4 = 1 << 11
    HOST_TSO6 = 1 << 12
    HOST_ECN = 1 << 13
    HOST_UFO = 1 << 14
    MRG_RXBUF = 1 << 15
    STATUS = 1 << 16
    CTRL_VQ = 1 << 17
    CTRL_RX = 1 << 18
    CTRL_VLAN = 1 << 19
    CTRL_RX_EXTRA = 1 << 20
    GUEST_ANNOUNCE = 1 << 21
    MQ = 1 << 22
    CTRL_MAC_ADDR = 1 << 23
    DEVICE_STATS = 1 << 50
    HASH_TUNNEL = 1 << 51
    VQ_NOTF_COAL = 1 << 52
    NOTF_COAL = 1 << 53
    GUEST_USO4 = 1 << 54
    GUEST_USO6 = 1 << 55
    HOST_USO = 1 << 56
    HASH_REPORT = 1 << 57
    GUEST_HDRLEN = 1 << 59
    RSS = 1 << 60
    RSC_EXT = 1 << 61
    STANDBY = 1 << 62
    SPEED_DUPLEX = 1 << 63


@_plain_complement
class VsockF(IntFlag):
    """Socket device (VIRTIO 5.10.3)."""

    STREAM = 1 << 0
    SEQPACKET = 1 << 1
    NO_IMPLIED_STREAM = 1 << 2


DEVICE_FEATURES: dict[DeviceId, type[IntFlag]] = {
    DeviceId.BLOCK: BlkF,
    DeviceId.NET: NetF,
    DeviceId.VSOCK: VsockF,
}
"""Device-specific features by type, for those types whose bits are named here."""


def guess_device(features: int) -> DeviceId | None:
    """What kind of device offers these features, as far as they tell: vhost-user has no message for it."""
    if features & (NetF.MRG_RXBUF | NetF.CTRL_VQ):
        return DeviceId.NET
    if features & BlkF.FLUSH and features & (BlkF.BLK_SIZE | BlkF.SEG_MAX):
        return DeviceId.BLOCK
    return None


def bits(value: int) -> Iterator[int]:
    """The numbers of the bits that are set, lowest first."""
    while value > 0:
        low = value & -value
        yield low.bit_length() - 1
        value ^= low


def feature_names(value: int, *enums: type[IntFlag]) -> list[str]:
    """Names of the set bits, lowest first; what no enum knows is "bit 57"."""
    known: dict[int, str] = {}
    for enum in reversed(enums):
        known.update({member.value: member.name or "" for member in enum})
    return [known.get(1 << bit) or f"bit {bit}" for bit in bits(value)]
