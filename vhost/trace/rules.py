# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What the linter finds fault with: one row a rule, with the section of the specification that it is from.

A *violation* breaks what the specification demands. A *note* is unusual, or against a recommendation, or
a habit of peers that does no harm. Where the linter looks for them is in the lint_*.py files.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Severity(Enum):
    VIOLATION = "violation"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Rule:
    name: str
    severity: Severity
    section: str
    doc: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One breach of a rule."""

    rule: Rule
    text: str
    section: str

    def __str__(self) -> str:
        return f"{self.rule.severity.value}: {self.text} [{self.section}; {self.rule.name}]"

    def as_dict(self) -> dict[str, str]:
        return {
            "severity": self.rule.severity.value,
            "rule": self.rule.name,
            "text": self.text,
            "section": self.section,
        }


RULES: dict[str, Rule] = {}


def _violation(name: str, section: str, doc: str) -> Rule:
    return RULES.setdefault(name, Rule(name, Severity.VIOLATION, section, doc))


def _note(name: str, section: str, doc: str) -> Rule:
    return RULES.setdefault(name, Rule(name, Severity.NOTE, section, doc))


_HEADER = "Header"
_COMMUNICATION = "Communication"
_FRONT = "Front-end message types"
_ACK = "VHOST_USER_PROTOCOL_F_REPLY_ACK"
_MEMORY = "Memory access"
_STATES = "Ring states"
_MIGRATION = "Migration"
_STATE = "Migrating back-end state"
_BACK = "Back-end message types"

# -- any message ---------------------------------------------------------------------------------------
VERSION = _violation("version", _HEADER, "The version in a header's flags is 1.")
FLAGS = _note("flags", _HEADER, "Bits 4 to 31 of a header's flags are not used.")
REPLY_FLAG = _violation("reply-flag", _HEADER, "The REPLY flag is on replies and on nothing else.")
REPLY_TO_NOTHING = _violation("reply-to-nothing", _COMMUNICATION, "A reply belongs to a request.")
REPLY_MISSING = _violation("reply-missing", _COMMUNICATION, "A request that has a reply gets it, in order.")
ACK_MISSING = _violation("ack-missing", _ACK, "What has need_reply is answered when REPLY_ACK is negotiated.")
NEED_REPLY = _violation("need-reply", _ACK, "need_reply is set only when REPLY_ACK is negotiated.")
NEED_REPLY_HABIT = _note("need-reply-habit", _ACK, "need_reply changes nothing on a request with a reply.")
UNKNOWN = _note("unknown", _FRONT, "The message is one of the specification's.")
SIZE = _violation("size", "Payload", "The payload has the size of its type, and the fields are in range.")
FDS = _violation("fds", _FRONT, "As many descriptors come with a message as belong to it.")
FD_UNUSED = _note("fd-unused", _FRONT, "REM_MEM_REG brings no descriptor.")
FD_KIND = _violation(
    "fd-kind", "Support for platforms other than Linux", "The descriptor is of the right kind."
)
FEATURE = _violation("feature", "Protocol features", "The message's feature was negotiated.")
FEATURE_HABIT = _note("feature-habit", "Protocol features", "The message's feature was negotiated.")
CUT_OFF = _note("cut-off", _COMMUNICATION, "The connection does not end inside a message.")
UNANSWERED = _note("unanswered", _COMMUNICATION, "The connection does not end before a reply.")
UNDELIVERED = _note("undelivered", _COMMUNICATION, "The other side is there to get the message.")
BACKLOG = _note("backlog", _COMMUNICATION, "Requests are answered before thousands of them wait.")
# -- negotiation ---------------------------------------------------------------------------------------
NOT_OFFERED = _violation(
    "not-offered", _FRONT, "What is acknowledged was offered (VIRTIO 2.2.1 for features)."
)
NOT_ASKED = _note("not-asked", _FRONT, "What is acknowledged was asked for on this connection.")
INBAND = _violation(
    "inband", "In-band notifications", "INBAND_NOTIFICATIONS needs BACKEND_REQ and REPLY_ACK."
)
CHANGED = _note("changed", _FRONT, "Features stay what they are while rings run, but for LOG_ALL.")
OWNER = _note("owner", _FRONT, "SET_OWNER comes when a connection is new.")
RESET_OWNER = _note("reset-owner", _FRONT, "RESET_OWNER is deprecated.")
COMPANIONS = _violation(
    "companions", _FRONT, "GET_VRING_BASE_INFLIGHT needs INFLIGHT_SHMFD, and ..._SKIP_DRAIN needs both."
)
# -- memory --------------------------------------------------------------------------------------------
REGIONS = _note("regions", "Multiple Memory regions description", "A memory table has at most 8 regions.")
REGION = _violation("region", "Memory region description", "A region is not empty and does not wrap around.")
REGION_GPA = _violation(
    "region-gpa", "Memory region description", "With GPA_ADDRESSES the user address is the guest address too."
)
OVERLAP = _violation("overlap", _MEMORY, "Each address belongs to one region at most.")
FILE_SIZE = _note(
    "file-size", "Memory region description", "The file is as long as what is to be mapped of it."
)
NO_REGION = _violation("no-region", _FRONT, "REM_MEM_REG names a region of the table.")
SLOTS = _violation("slots", _FRONT, "There are no more regions than GET_MAX_MEM_SLOTS said.")
UNMAPPED = _violation("unmapped", _MEMORY, "Addresses are in the memory table.")
NO_TABLE = _note("no-table", _MEMORY, "The memory table comes before addresses in it.")
LOG_SIZE = _violation("log-size", _MIGRATION, "The log covers all guest addresses.")
LOG_FD = _violation("log-fd", _MIGRATION, "With LOG_SHMFD, the log comes as a descriptor.")
LOG_EARLY = _note("log-early", _MIGRATION, "The log is there before logging starts.")
IOTLB = _violation("iotlb", "An IOTLB message", "Front-ends update and invalidate, back-ends miss and fail.")
INFLIGHT = _violation("inflight", "Inflight I/O tracking", "The region's description fits its descriptor.")
# -- rings ---------------------------------------------------------------------------------------------
RING_INDEX = _violation(
    "ring-index", "Multiple queue support", "There are as many rings as GET_QUEUE_NUM said."
)
RING_PAIRS = _note("ring-pairs", "Multiple queue support", "GET_QUEUE_NUM counts rings, not pairs of them.")
RING_SIZE = _violation("ring-size", _FRONT, "A ring's size is one that VIRTIO allows (2.7, 2.8).")
RING_ALIGN = _violation(
    "ring-align", "A vring address description", "A ring's parts are aligned (VIRTIO 2.7, 2.8)."
)
RING_RUNS = _note("ring-runs", _STATES, "A ring is set up while it is stopped.")
RING_EARLY = _note("ring-early", _STATES, "A ring has its size and addresses before it can be started.")
RING_BASE = _violation("ring-base", "A vring descriptor index for split virtqueues", "Bits 16 to 31 are 0.")
RING_HALF = _note("ring-half", "Vring descriptor indices for packed virtqueues", "Both indices are given.")
RESERVED = _note("reserved", _FRONT, "A reserved field is 0.")
ENABLE = _violation("enable", _STATES, "A ring is enabled with 1 and disabled with 0.")
ENDIAN = _violation("endian", _FRONT, "The byte order is 0 or 1.")
INDEX_REPLY = _violation("index-reply", _FRONT, "A reply is about the ring that was asked for.")
# -- the rest ------------------------------------------------------------------------------------------
CONFIG_SIZE = _violation("config-size", "Virtio device config space", "A reply has the request's size, or 0.")
CONFIG_FLAGS = _note("config-flags", "Virtio device config space", "The flags are 0 or 1.")
STATUS = _violation("status", _FRONT, "A device status has 8 bits.")
POSTCOPY = _violation("postcopy", _MIGRATION, "POSTCOPY_ADVISE, then LISTEN, then END.")
POSTCOPY_SLOTS = _note(  # older texts say how ADD_MEM_REG is answered then, and QEMU 10.0 does it
    "postcopy-slots", _MIGRATION, "There is no post-copy where CONFIGURE_MEM_SLOTS was negotiated."
)
STATE_PHASE = _violation("state-phase", "Device state transfer parameters", "Direction 0 or 1, phase 0.")
STATE_RUNNING = _violation("state-running", _STATE, "State is transferred while the device is suspended.")
STATE_REPLY = _violation("state-reply", _FRONT, "A reply is not an error and a descriptor at once.")
STATE_CHECK = _note("state-check", _STATE, "CHECK_DEVICE_STATE follows a transfer.")
SHMEM_RANGE = _violation("shmem-range", _BACK, "A mapping is in a region that GET_SHMEM_CONFIG told of.")
SHMEM_OVERLAP = _violation(
    "shmem-overlap", _BACK, "A mapping is not over another; an unmapping is of a whole one."
)
SEND_FD = _violation(
    "send-fd", "Back-end communication", "BACKEND_SEND_FD is negotiated for descriptors; 8 at most."
)
SUSPENDED = _note(
    "suspended", "Suspended device state", "A suspended device sends the front-end no messages."
)
