# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The linter on negotiation: features, protocol features, ownership, device status."""

from __future__ import annotations

from vhost.features import GpuF, ProtocolF, VhostF, VirtioF, feature_names, missing_companions
from vhost.trace import rules
from vhost.trace.lint_base import LintBase, Seen
from vhost.user.spec import Gate, Spec

_INBAND = int(ProtocolF.INBAND_NOTIFICATIONS)
_PROTOCOL_FEATURES = int(VhostF.PROTOCOL_FEATURES)
_LOG_ALL = int(VhostF.LOG_ALL)
_ONLY_LEGAL = frozenset({"GET_PROTOCOL_FEATURES", "SET_PROTOCOL_FEATURES"})


class FeatureRules(LintBase):
    def gate(self, spec: Spec) -> None:
        """Whether the row's feature allows the message now."""
        state = self.state
        if spec.feature is None:
            return
        if isinstance(spec.feature, GpuF):
            if not state.gpu & spec.feature_bit:
                self.report(rules.FEATURE, f"{spec.feature_name} was not negotiated", spec.section)
            return
        if spec.feature_bit == _PROTOCOL_FEATURES and isinstance(spec.feature, VhostF):
            self._gate_protocol(spec)
            return
        if spec.active(state.features or 0, state.protocol or 0, state.offered_protocol or 0):
            if spec.gate is not Gate.ADVICE:
                return
            if (state.protocol or 0) & spec.feature_bit:
                return
        rule = rules.FEATURE_HABIT if spec.gate is Gate.ADVICE else rules.FEATURE
        self.report(rule, f"{spec.feature_name} was not negotiated", spec.section)

    def _gate_protocol(self, spec: Spec) -> None:
        state = self.state
        if spec.name in _ONLY_LEGAL:
            if state.offered is not None and not state.offered & _PROTOCOL_FEATURES:
                self.report(rules.FEATURE, f"{spec.feature_name} was not offered", spec.section)
        elif state.features is not None and not state.features & _PROTOCOL_FEATURES:
            # Before SET_FEATURES it is QEMU's habit, and no harm.
            self.report(rules.FEATURE_HABIT, f"{spec.feature_name} was not negotiated", spec.section)

    def owner(self, spec: Spec) -> None:
        """Rings and memory belong to somebody."""
        state = self.state
        if not state.owned and not state.owner_missed and (spec.per_ring or spec.name == "SET_MEM_TABLE"):
            state.owner_missed = True
            self.report(rules.OWNER, f"{spec.name} before SET_OWNER")

    def front_set_owner(self, seen: Seen) -> None:
        if self.state.owned:
            self.report(rules.OWNER, "SET_OWNER again: the session has its owner")
        self.state.owned = True

    def front_reset_owner(self, seen: Seen) -> None:
        self.report(
            rules.RESET_OWNER, "deprecated: some back-ends disable all rings, some forget the session"
        )
        self.state.owned = False

    def front_get_features_reply(self, seen: Seen) -> None:
        self.state.offered = seen.payload.value

    def front_set_features(self, seen: Seen) -> None:
        state, features = self.state, seen.payload.value
        if state.offered is None:
            self.report(rules.NOT_ASKED, "SET_FEATURES before GET_FEATURES")
        else:
            self._foreign(features & ~state.offered, VirtioF, VhostF)
        changed = features ^ (features if state.features is None else state.features)
        if changed & ~_LOG_ALL and state.running:
            names = " ".join(feature_names(changed & ~_LOG_ALL, VirtioF, VhostF))
            self.report(rules.CHANGED, f"{names} changed while rings run")
        if features & _LOG_ALL and state.log_bytes is None:
            self.report(rules.LOG_EARLY, "LOG_ALL before SET_LOG_BASE")
        state.features = features

    def front_get_protocol_features_reply(self, seen: Seen) -> None:
        self.state.offered_protocol = seen.payload.value

    def front_set_protocol_features(self, seen: Seen) -> None:
        state, features = self.state, seen.payload.value
        if state.offered_protocol is None:
            self.report(rules.NOT_ASKED, "SET_PROTOCOL_FEATURES before GET_PROTOCOL_FEATURES")
        else:
            self._foreign(features & ~state.offered_protocol, ProtocolF)
        for feature, missing in missing_companions(features).items():
            (name,) = feature_names(feature, ProtocolF)
            rule = rules.INBAND if feature == _INBAND else rules.COMPANIONS
            self.report(rule, f"{name} without {' '.join(feature_names(missing, ProtocolF))}")
        state.protocol = features

    def _foreign(self, foreign: int, *names: type[VirtioF] | type[VhostF] | type[ProtocolF]) -> None:
        if foreign:
            words = " ".join(feature_names(foreign, *names))
            self.report(rules.NOT_OFFERED, f"{foreign:#x} ({words}) was not offered")

    def front_get_queue_num_reply(self, seen: Seen) -> None:
        self.state.queue_num = seen.payload.value

    def front_set_status(self, seen: Seen) -> None:
        if seen.payload.value > 0xFF:
            self.report(rules.STATUS, f"status {seen.payload.value:#x}")
        if not seen.payload.value:
            self.state.stop_all()

    def front_get_status_reply(self, seen: Seen) -> None:
        if seen.payload.value > 0xFF:
            self.report(rules.STATUS, f"status {seen.payload.value:#x}")
