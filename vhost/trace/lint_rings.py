# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The linter on rings: indices, sizes, addresses, and the order in which they are told."""

from __future__ import annotations

from vhost.features import DeviceId, ProtocolF, VirtioF, VringF, guess_device
from vhost.trace import rules
from vhost.trace.lint_base import LintBase, Seen
from vhost.trace.state import RingSeen
from vhost.user.payloads import VringAddr

SPLIT_MAX = PACKED_MAX = 32768
_LOG = int(VringF.LOG)
_EVENT_KINDS = frozenset({"eventfd", "pipe"})


class RingRules(LintBase):
    def ring_index(self, seen: Seen) -> None:
        """Whether there can be a ring of this index."""
        index = seen.spec.ring_index(seen.payload)
        count = self.state.queue_num
        if index is None or count is None or index < count:
            return
        text = f"ring {index}, GET_QUEUE_NUM said {count}"
        # Back-ends of network devices have always told pairs; a control queue comes after them.
        if guess_device(self.state.offered or 0) is DeviceId.NET and index <= 2 * count:
            self.report(rules.RING_PAIRS, text)
        else:
            self.report(rules.RING_INDEX, text)

    def front_set_vring_num(self, seen: Seen) -> None:
        index, num = seen.payload.index, seen.payload.num
        limit = PACKED_MAX if self._packed else SPLIT_MAX
        if not 1 <= num <= limit:
            self.report(rules.RING_SIZE, f"ring {index}: size {num}, must be 1 to {limit}")
        elif not self._packed and num & (num - 1) and self.state.features is not None:
            self.report(rules.RING_SIZE, f"ring {index}: size {num} is no power of two")
        ring = self._stopped(seen, index)
        ring.num = num

    def front_set_vring_addr(self, seen: Seen) -> None:
        addr = seen.payload
        ring = self.state.ring(addr.index)
        before = ring.addr
        if before is not None and _areas(before) != _areas(addr):
            self._stopped(seen, addr.index)
        if addr.flags & ~_LOG:
            self.report(rules.RESERVED, f"ring {addr.index}: flags {addr.flags:#x}, only bit 0 has a meaning")
        ring.addr = addr
        self._alignment(addr)
        self._coverage(addr, ring)

    def _alignment(self, addr: VringAddr) -> None:
        aligns = (16, 4, 4) if self._packed else (16, 2, 4)
        for name, value, align in zip(("desc", "avail", "used"), _areas(addr), aligns, strict=True):
            if value % align:
                text = f"ring {addr.index}: {name} {value:#x} is not a multiple of {align}"
                self.report(rules.RING_ALIGN, text)

    def _coverage(self, addr: VringAddr, ring: RingSeen) -> None:
        state = self.state
        if state.has(VirtioF.ACCESS_PLATFORM):
            return  # addresses of the IOTLB
        if state.regions is None:
            self.report(rules.NO_TABLE, f"ring {addr.index}: addresses before a memory table")
            return
        num = ring.num or 1
        sizes = (16 * num, 4, 4) if self._packed else (16 * num, 6 + 2 * num, 6 + 8 * num)
        for name, value, size in zip(("desc", "avail", "used"), _areas(addr), sizes, strict=True):
            if not state.covers(value, size):
                text = f"ring {addr.index}: {name} {value:#x} to {value + size:#x} is not in the memory table"
                self.report(rules.UNMAPPED, text)
        if addr.flags & _LOG and state.log_bytes is not None:
            last = (addr.log + sizes[2] - 1) // 4096
            if last >= state.log_bytes * 8:
                self.report(rules.LOG_SIZE, f"ring {addr.index}: log {addr.log:#x} is beyond the log's end")

    def front_set_vring_base(self, seen: Seen) -> None:
        self._stopped(seen, seen.payload.index)
        self._indices(seen.payload.index, seen.payload.num)

    def front_get_vring_base(self, seen: Seen) -> None:
        if seen.payload.num:
            self.report(rules.RESERVED, f"num {seen.payload.num:#x} in {seen.spec.name}, must be 0")
        self.state.ring(seen.payload.index).started = False

    def front_get_vring_base_reply(self, seen: Seen) -> None:
        assert seen.request is not None
        asked = seen.request.payload
        if seen.payload.index != getattr(asked, "index", seen.payload.index):
            self.report(rules.INDEX_REPLY, f"ring {seen.payload.index}, asked for {asked.index}")
        self._indices(seen.payload.index, seen.payload.num)

    front_get_vring_base_skip_drain = front_get_vring_base
    front_get_vring_base_skip_drain_reply = front_get_vring_base_reply

    def _indices(self, index: int, num: int) -> None:
        if self.state.features is None:
            return
        if self._packed:
            if num and not num >> 16:
                self.report(rules.RING_HALF, f"ring {index}: {num:#x} has no index of the used ring")
        elif num >> 16:
            self.report(rules.RING_BASE, f"ring {index}: {num:#x}")

    def front_set_vring_kick(self, seen: Seen) -> None:
        self._event_fd(seen)
        index = seen.payload.index
        ring = self.state.ring(index)
        missing = [name for name, value in (("size", ring.num), ("addresses", ring.addr)) if value is None]
        if missing:
            text = f"ring {index} has a kick before its {' and '.join(missing)}"
            self.report(rules.RING_EARLY, text)
        ring.started = True
        self.state.ever_started = True

    def front_vring_kick(self, seen: Seen) -> None:
        self._reserved(seen)
        self.state.ring(seen.payload.index).started = True
        self.state.ever_started = True

    def front_set_vring_call(self, seen: Seen) -> None:
        self._event_fd(seen)

    def front_set_vring_err(self, seen: Seen) -> None:
        self._event_fd(seen)

    def front_set_vring_enable(self, seen: Seen) -> None:
        if seen.payload.num > 1:
            self.report(rules.ENABLE, f"ring {seen.payload.index}: {seen.payload.num}, must be 0 or 1")
        self.state.ring(seen.payload.index).enabled = bool(seen.payload.num)

    def front_set_vring_endian(self, seen: Seen) -> None:
        if seen.payload.num > 1:
            self.report(rules.ENDIAN, f"ring {seen.payload.index}: {seen.payload.num}, must be 0 or 1")
        self._stopped(seen, seen.payload.index)

    def front_reset_device(self, seen: Seen) -> None:
        self.state.stop_all()

    def back_vring_call(self, seen: Seen) -> None:
        self._reserved(seen)

    def back_vring_err(self, seen: Seen) -> None:
        self._reserved(seen)

    def back_request(self, seen: Seen) -> None:
        """Any request of the back-end."""
        state = self.state
        if state.ever_started and not state.running:
            self.report(rules.SUSPENDED, f"{seen.spec.name} while all rings are stopped")
        if seen.fd_count and not state.has_protocol(ProtocolF.BACKEND_SEND_FD):
            self.report(rules.SEND_FD, "descriptors, but BACKEND_SEND_FD was not negotiated")
        elif seen.fd_count > 8:
            self.report(rules.SEND_FD, f"{seen.fd_count} descriptors, limit 8")

    @property
    def _packed(self) -> bool:
        return self.state.has(VirtioF.RING_PACKED)

    def _stopped(self, seen: Seen, index: int) -> RingSeen:
        ring = self.state.ring(index)
        if ring.started:
            self.report(rules.RING_RUNS, f"{seen.spec.name} while ring {index} runs")
        return ring

    def _reserved(self, seen: Seen) -> None:
        if seen.payload.num:
            self.report(rules.RESERVED, f"num {seen.payload.num:#x} in {seen.spec.name}, must be 0")

    def _event_fd(self, seen: Seen) -> None:
        for fd in seen.fds:
            if fd.kind not in _EVENT_KINDS:
                self.report(rules.FD_KIND, f"{seen.spec.name} with a {fd}, must be an eventfd or a pipe")


def _areas(addr: VringAddr) -> tuple[int, int, int]:
    return addr.desc, addr.avail, addr.used
