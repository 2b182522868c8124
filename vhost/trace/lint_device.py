# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The linter on the device behind the rings: configuration space, state, shared memory, its sockets."""

from __future__ import annotations

from vhost.trace import rules
from vhost.trace.lint_base import LintBase, Seen
from vhost.trace.state import MAX_MAPS
from vhost.user.payloads import NOFD, U64, Config, DeviceState, MMap, ShmemConfig


class DeviceRules(LintBase):
    def front_get_config_reply(self, seen: Seen) -> None:
        assert seen.request is not None
        asked, answer = seen.request.payload, seen.payload
        if not isinstance(asked, Config) or not isinstance(answer, Config):
            return
        if answer.size not in (0, asked.size):
            self.report(rules.CONFIG_SIZE, f"{answer.size} bytes, asked for {asked.size}")

    def front_set_config(self, seen: Seen) -> None:
        if seen.payload.flags > 1:
            self.report(rules.CONFIG_FLAGS, f"flags {seen.payload.flags:#x}")

    def front_set_backend_req_fd(self, seen: Seen) -> None:
        self._socket(seen)

    def front_gpu_set_socket(self, seen: Seen) -> None:
        self._socket(seen)

    def _socket(self, seen: Seen) -> None:
        for fd in seen.fds:
            if fd.kind != "socket":
                self.report(
                    rules.FD_KIND, f"{seen.spec.name} with a {fd}, must be a socket", seen.spec.section
                )

    def back_gpu_set_protocol_features(self, seen: Seen) -> None:
        self.state.gpu = seen.payload.value

    # -- state -------------------------------------------------------------------------------------

    def front_set_device_state_fd(self, seen: Seen) -> None:
        if seen.payload.direction not in (DeviceState.SAVE, DeviceState.LOAD) or seen.payload.phase:
            text = f"direction {seen.payload.direction}, phase {seen.payload.phase}"
            self.report(rules.STATE_PHASE, text)
        if self.state.running:
            self.report(rules.STATE_RUNNING, "SET_DEVICE_STATE_FD while rings run")
        self.state.transferring = True

    def front_set_device_state_fd_reply(self, seen: Seen) -> None:
        value = seen.payload.value
        if value & 0xFF and not value & NOFD:
            self.report(rules.STATE_REPLY, f"{value:#x}: an error and a descriptor")

    def front_check_device_state(self, seen: Seen) -> None:
        if not self.state.transferring:
            self.report(rules.STATE_CHECK, "CHECK_DEVICE_STATE before SET_DEVICE_STATE_FD")
        self.state.transferring = False

    # -- shared memory -----------------------------------------------------------------------------

    def front_get_shmem_config_reply(self, seen: Seen) -> None:
        if isinstance(seen.payload, ShmemConfig):
            self.state.shmem = seen.payload.sizes

    def back_shmem_map(self, seen: Seen) -> None:
        state, wanted = self.state, seen.payload
        if state.shmem is not None:
            size = state.shmem[wanted.shmid] if wanted.shmid < len(state.shmem) else 0
            if not wanted.len or wanted.shm_offset + wanted.len > size:
                self.report(rules.SHMEM_RANGE, f"{wanted}: region {wanted.shmid} has {size:#x} bytes")
        for other in state.maps:
            if other.shmid == wanted.shmid and _overlap(other, wanted):
                self.report(rules.SHMEM_OVERLAP, f"{wanted} overlaps the mapping at {other.shm_offset:#x}")
                break

    def back_shmem_map_reply(self, seen: Seen) -> None:
        assert seen.request is not None
        if isinstance(seen.payload, U64) and not seen.payload.value:
            self._mapped(seen.request)

    def back_shmem_unmap(self, seen: Seen) -> None:
        gone = seen.payload
        for other in self.state.maps:
            if (other.shmid, other.shm_offset, other.len) == (gone.shmid, gone.shm_offset, gone.len):
                self.state.maps.remove(other)
                return
        self.report(rules.SHMEM_OVERLAP, f"{gone} is no mapping")

    def _mapped(self, seen: Seen) -> None:
        if isinstance(seen.payload, MMap) and len(self.state.maps) < MAX_MAPS:
            self.state.maps.append(seen.payload)

    def back_unanswered(self, seen: Seen) -> None:
        """A request of the back-end to which no answer will come."""
        if seen.spec.name == "BACKEND_SHMEM_MAP":
            self._mapped(seen)


def _overlap(one: MMap, other: MMap) -> bool:
    return one.shm_offset < other.shm_offset + other.len and other.shm_offset < one.shm_offset + one.len
