# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Memory that goes away under a ring. In processes of their own: a SIGBUS handler is for ever."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

COMMON = """
    import os, sys
    import model
    from rig import BASE, USER, Rig, error_event, signals
    from vhost.errors import QueueBroken
    from vhost.memory import GuestMemory, Region, install_sigbus_handler

    install_sigbus_handler()
    rig = Rig(16, packed={packed})
    fd = os.memfd_create("theirs")
    os.ftruncate(fd, 1 << 18)
    theirs = Region.from_fd(fd, 1 << 18, guest_addr=BASE, user_addr=USER)
    rig.memory = GuestMemory([theirs])
    rig.ram = model.Ram([(BASE, memoryview(theirs))])
    driver = rig.model_driver()
    other = Rig(16, packed={packed})
    neighbour, neighbours_driver = other.device(), other.model_driver()
    with error_event() as err:
        queue = rig.device(err=err, name="victim")
"""

WHEN = {
    "while idle": """
        os.ftruncate(fd, 0)
        take(queue)
    """,
    "with work": """
        for i in range(5):
            driver.add([(rig.data, 8)], [(rig.data + 64, 8)])
        os.ftruncate(fd, 0)
        take(queue)
    """,
    "in the loop": """
        for i in range(5):
            driver.add([(rig.data, 8)], [(rig.data + 64, 8)])
        def halfway():
            for i, chain in enumerate(queue):
                if i == 1:
                    os.ftruncate(fd, 0)
                chain.read()
                chain.write(b"12345678")
                queue.push(chain)
        broken(halfway)
    """,
    "buffers only": """
        driver.add([(rig.data, 8)], [(rig.data + 64, 8)])
        os.ftruncate(fd, 4096)
        def serve():
            for chain in queue:
                assert chain.read() == bytes(8)
                queue.push(chain, chain.write(b"12345678"))
        broken(serve)
    """,
}

AFTER = """
        assert theirs.broken and rig.memory.broken and not other.memory.broken
        assert queue.broken == "a memory region's file was truncated"
        assert signals(err) == 1
        neighbours_driver.add([], [(other.data, 8)])
        for chain in neighbour:
            neighbour.push(chain, chain.write(b"fine"))
        assert neighbours_driver.get_used()[0][1] == 4
    print("alive")
"""

BROKEN = """
        def broken(call):
            try:
                call()
            except QueueBroken as error:
                assert "victim: a memory region's file was truncated" in str(error), error
            else:
                raise AssertionError("not broken")
        def take(queue):
            for call in (queue.pop, queue.pop_batch, lambda: list(queue)):
                broken(call)
"""


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_file_that_is_truncated_under_a_ring(packed: bool, when: str) -> None:
    script = textwrap.dedent(COMMON.format(packed=packed) + BROKEN + WHEN[when] + AFTER)
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent,
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("alive\n", "")
