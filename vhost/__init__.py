# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""vhost for Python: a virtio device's data plane in any process."""

from __future__ import annotations

from vhost.errors import VhostError

__all__ = ["VhostError"]
