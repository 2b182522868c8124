# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vhost`` as users do not run it: with faults that a test has to notice, or with another request handler.

    python variant.py WHAT,... serve blk ...

``unlogged``: nothing is marked in the dirty log; ``unlogged-rings``: rings are not. ``python``: requests are
run in Python.
"""

from __future__ import annotations

import sys

from vhost.cli import main
from vhost.devices.blk import Blk
from vhost.devices.rings import Ring
from vhost.user.log import LogHandlers


def forget_log(self: LogHandlers, ring: Ring) -> None:
    assert ring.queue is not None
    ring.queue.set_log(None)


def forget_ring_log(self: LogHandlers, ring: Ring) -> None:
    assert ring.queue is not None
    ring.queue.set_log(self._log if self._logs else None, ring=False)


for what in sys.argv.pop(1).split(","):
    if what == "unlogged":
        LogHandlers._tell_log = forget_log  # type: ignore[method-assign]
    elif what == "unlogged-rings":
        LogHandlers._tell_log = forget_ring_log  # type: ignore[method-assign]
    elif what == "python":
        assert Blk.__init__.__kwdefaults__ is not None
        Blk.__init__.__kwdefaults__["handler"] = "python"
    else:
        sys.exit(f"variant {what!r} is not known")
sys.exit(main())
