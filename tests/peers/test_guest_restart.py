# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The back-end is killed and started again under a guest that goes on writing, without in-flight tracking.

QEMU then takes the split ring's used index as the place to go on, which is right for a device that
completes in the ring's order, as ours does. A packed ring has no such index, so there QEMU cannot know where
to go on. With tracking, and out of order: test_guest_inflight.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from guest.machine import Guest, vhost_user_blk
from peers.conftest import Boot
from peers.support import Serve, make_disk, run

pytestmark = pytest.mark.guest

MIB = 1 << 20
SIZE = 16 * MIB
KILLS = 4
REQUESTS_BETWEEN = 300
COMPLETED = "awk '{print $1 + $5}' /sys/block/vda/stat"  # reads and writes, in the guest


def wait_for_progress(guest: Guest) -> None:
    enough = f"[ $({COMPLETED}) -ge {int(guest.run(COMPLETED).text) + REQUESTS_BETWEEN} ]"
    guest.run(f"until {enough}; do usleep 5000; done", timeout=60)


@pytest.mark.parametrize("queues", [1, 2])
def test_killed_and_restarted_under_load(boot: Boot, iocheck: Path, tmp_path: Path, queues: int) -> None:
    disk = make_disk(tmp_path / "disk.raw", SIZE)
    path = tmp_path / "s"

    def start() -> Serve:
        more = ("--num-queues", str(queues), "--without", "inflight-shmfd")
        return Serve("blk", path, "--blk-file", str(disk), *more)

    serve = start()
    try:
        with boot(vhost_user_blk(path, queues=queues, reconnect_ms=50), cpus=queues) as guest:
            churn = guest.start(f"iocheck churn /dev/vda 21 0 {SIZE} 16 /tmp/stop")
            for _ in range(KILLS):
                wait_for_progress(guest)
                serve.kill()
                serve = start()
            wait_for_progress(guest)
            guest.run("touch /tmp/stop")
            churn.wait()
            # The last thing that each writer wrote.
            run(iocheck, "verify", disk, "21", "0", str(SIZE))
    except BaseException as error:
        error.add_note(f"--- back-end\n{serve.errors()}")
        raise
    finally:
        serve.kill()
