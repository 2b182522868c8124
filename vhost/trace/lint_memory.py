# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The linter on memory: the table, the dirty log, the IOTLB, the in-flight region."""

from __future__ import annotations

from typing import Any

from vhost.features import ProtocolF
from vhost.trace import rules
from vhost.trace.lint_base import LintBase, Seen
from vhost.trace.records import FdInfo
from vhost.trace.state import MAX_REGIONS
from vhost.user.payloads import TABLE_REGIONS, U64, Inflight, Iotlb, Log, MemTable

LOG_PAGE = 4096
_TOP = 1 << 64


class MemoryRules(LintBase):
    def front_set_mem_table(self, seen: Seen) -> None:
        if not isinstance(seen.payload, MemTable):
            return
        regions = seen.payload.regions
        if len(regions) > TABLE_REGIONS:
            self.report(rules.REGIONS, f"{len(regions)} regions")
        self.state.regions = []
        for number, region in enumerate(regions):
            self._add(region, seen.fds[number] if number < len(seen.fds) else None)

    def front_add_mem_reg(self, seen: Seen) -> None:
        if self.state.regions is None:
            self.state.regions = []
        self._add(seen.payload.region, seen.fds[0] if seen.fds else None)
        limit = self.state.max_slots
        if limit is not None and len(self.state.regions) > limit:
            self.report(rules.SLOTS, f"{len(self.state.regions)} regions, GET_MAX_MEM_SLOTS said {limit}")

    def front_rem_mem_reg(self, seen: Seen) -> None:
        gone = seen.payload.region
        for region in self.state.regions or ():
            if _identity(region) == _identity(gone):
                self.state.regions = [other for other in self.state.regions or () if other is not region]
                return
        self.report(rules.NO_REGION, f"no region has {gone}")

    def front_get_max_mem_slots_reply(self, seen: Seen) -> None:
        self.state.max_slots = seen.payload.value

    def _add(self, region: Any, fd: FdInfo | None) -> None:
        regions = self.state.regions
        assert regions is not None
        for what, start in (("guest", region.guest_addr), ("user", region.user_addr)):
            if not region.size or start + region.size > _TOP:
                self.report(rules.REGION, f"{what} address {start:#x}, size {region.size:#x}")
        if self.state.has_protocol(ProtocolF.GPA_ADDRESSES) and region.user_addr != region.guest_addr:
            text = f"user address {region.user_addr:#x} of the region at {region.guest_addr:#x}"
            self.report(rules.REGION_GPA, text)
        for other in regions:
            for what, start, there in (
                ("guest", region.guest_addr, other.guest_addr),
                ("user", region.user_addr, other.user_addr),
            ):
                if start < there + other.size and there < start + region.size:
                    text = f"{start:#x} to {start + region.size:#x} overlaps the region at {there:#x}"
                    self.report(rules.OVERLAP, f"{what} address {text}")
        self._file(fd, region.mmap_offset + region.size)
        if len(regions) < MAX_REGIONS:
            regions.append(region)

    def _file(self, fd: FdInfo | None, needed: int) -> None:
        """What is mapped beyond a file's end is a SIGBUS for whoever touches it."""
        if fd is not None and fd.size is not None and fd.kind in ("memfd", "file") and fd.size < needed:
            self.report(rules.FILE_SIZE, f"{fd} is shorter than offset and size, {needed:#x}")

    # -- the dirty log -----------------------------------------------------------------------------

    def front_set_log_base(self, seen: Seen) -> None:
        if not isinstance(seen.payload, Log):
            return
        log = seen.payload
        self.state.log_bytes = log.size
        if self.state.has_protocol(ProtocolF.LOG_SHMFD) and not seen.fd_count:
            self.report(rules.LOG_FD, "no descriptor with SET_LOG_BASE")
        self._file(seen.fds[0] if seen.fds else None, log.offset + log.size)
        top = max((region.guest_addr + region.size for region in self.state.regions or ()), default=0)
        if log.size * 8 * LOG_PAGE < top:
            self.report(
                rules.LOG_SIZE,
                f"{log.size} bytes cover addresses to {log.size * 8 * LOG_PAGE:#x}, regions end at {top:#x}",
            )

    # -- IOTLB -------------------------------------------------------------------------------------

    def front_iotlb_msg(self, seen: Seen) -> None:
        entry = seen.payload
        if entry.type not in (Iotlb.UPDATE, Iotlb.INVALIDATE):
            self.report(rules.IOTLB, f"type {entry.type} from the front-end, must be 2 or 3")
        elif entry.type == Iotlb.UPDATE:
            self._permission(entry)
            gpa = self.state.has_protocol(ProtocolF.GPA_ADDRESSES)
            if not gpa and self.state.regions and not self.state.covers(entry.user_addr, entry.size):
                self.report(
                    rules.UNMAPPED,
                    f"user address {entry.user_addr:#x}, size {entry.size:#x}",
                    "IOMMU support",
                )

    def back_iotlb_msg(self, seen: Seen) -> None:
        if seen.payload.type not in (Iotlb.MISS, Iotlb.ACCESS_FAIL):
            self.report(rules.IOTLB, f"type {seen.payload.type} from the back-end, must be 1 or 4")
        else:
            self._permission(seen.payload)

    def _permission(self, entry: Iotlb) -> None:
        if entry.perm > 3:
            self.report(rules.IOTLB, f"permissions {entry.perm}, must be 0 to 3")

    # -- requests in flight ------------------------------------------------------------------------

    def front_get_inflight_fd_reply(self, seen: Seen) -> None:
        self._inflight(seen)

    def front_set_inflight_fd(self, seen: Seen) -> None:
        self._inflight(seen)
        if self.state.running:
            self.report(rules.RING_RUNS, "SET_INFLIGHT_FD while rings run")

    def _inflight(self, seen: Seen) -> None:
        region = seen.payload
        if not isinstance(region, Inflight):
            return
        if bool(region.mmap_size) != bool(seen.fd_count):
            self.report(rules.INFLIGHT, f"mmap_size {region.mmap_size}, but {seen.fd_count} descriptors")
        self._file(seen.fds[0] if seen.fds else None, region.mmap_offset + region.mmap_size)
        self.state.inflight = region

    # -- postcopy ----------------------------------------------------------------------------------

    def front_postcopy_advise(self, seen: Seen) -> None:
        self.state.advised = True
        if self.state.has_protocol(ProtocolF.CONFIGURE_MEM_SLOTS):
            self.report(rules.POSTCOPY_SLOTS, "POSTCOPY_ADVISE, but CONFIGURE_MEM_SLOTS was negotiated")

    def front_postcopy_listen(self, seen: Seen) -> None:
        if not self.state.advised:
            self.report(rules.POSTCOPY, "POSTCOPY_LISTEN before POSTCOPY_ADVISE")
        self.state.postcopy = True

    def front_postcopy_end(self, seen: Seen) -> None:
        if not self.state.postcopy:
            self.report(rules.POSTCOPY, "POSTCOPY_END before POSTCOPY_LISTEN")
        self.state.postcopy = self.state.advised = False
        self.state.table_answers = 0

    def front_set_mem_table_reply(self, seen: Seen) -> None:
        if not isinstance(seen.payload, U64):
            self.state.table_answers += 1

    front_add_mem_reg_reply = front_set_mem_table_reply


def _identity(region: Any) -> tuple[int, int, int]:
    return region.guest_addr, region.user_addr, region.size
