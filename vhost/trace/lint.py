# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The linter: what breaks the specification in a message that passes, by all of its parts.

Passive: it sees both directions and changes neither. What it looks for is in rules.py.
"""

from __future__ import annotations

from vhost.trace import rules
from vhost.trace.lint_base import LintBase, Seen
from vhost.trace.lint_device import DeviceRules
from vhost.trace.lint_features import FeatureRules
from vhost.trace.lint_memory import MemoryRules
from vhost.trace.lint_rings import RingRules
from vhost.user.spec import Channel, Role


class Linter(FeatureRules, MemoryRules, RingRules, DeviceRules):
    """One for a session: all its channels."""

    def request(self, seen: Seen) -> None:
        """A request that was decoded."""
        spec = seen.spec
        self.gate(spec)
        self.ring_index(seen)
        if spec.sender is Role.FRONTEND:
            self.owner(spec)
        elif seen.channel is Channel.BACKEND_REQ:
            self.back_request(seen)
        self._descriptors(seen)
        self._call(seen, "")
        if spec.sender is Role.BACKEND and not (seen.need_reply or seen.own_reply):
            self.back_unanswered(seen)

    def reply(self, seen: Seen) -> None:
        """A reply that was decoded, with the request that it answers."""
        self._descriptors(seen)
        self._call(seen, "_reply")

    def _descriptors(self, seen: Seen) -> None:
        spec = seen.spec
        if seen.is_ack:
            complaint = f"{seen.fd_count} file descriptors, must be 0" if seen.fd_count else None
        else:
            rule = spec.reply_fds if seen.is_reply else spec.fds
            complaint = rule.complaint(seen.fd_count, seen.payload)
            if not complaint and rule.discard and seen.fd_count:
                self.report(rules.FD_UNUSED, f"{seen.fd_count} descriptors, should be none", spec.section)
        if complaint:
            self.report(rules.FDS, complaint, spec.section)

    def _call(self, seen: Seen, suffix: str) -> None:
        side = "front" if seen.spec.sender is Role.FRONTEND else "back"
        method = getattr(self, f"{side}_{seen.spec.handler}{suffix}", None)
        if method is not None:
            method(seen)


__all__ = ["LintBase", "Linter", "Seen"]
