# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Importing this registers every rule for back-ends, in the order in which they are checked."""

from __future__ import annotations

from vhost.check import (
    rules_config,
    rules_data,
    rules_features,
    rules_header,
    rules_hostile,
    rules_inflight,
    rules_lifecycle,
    rules_memory,
    rules_migration,
    rules_optional,
    rules_reply,
    rules_rings,
    rules_states,
    rules_status,
)

__all__ = [
    "rules_config",
    "rules_data",
    "rules_features",
    "rules_header",
    "rules_hostile",
    "rules_inflight",
    "rules_lifecycle",
    "rules_memory",
    "rules_migration",
    "rules_optional",
    "rules_reply",
    "rules_rings",
    "rules_states",
    "rules_status",
]
