# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The migration harness itself: a guest without any device of ours goes from one machine to another."""

from __future__ import annotations

from pathlib import Path

import pytest

from guest.migration import migrate
from peers.conftest import Boot

pytestmark = pytest.mark.guest


def test_a_guest_and_its_jobs_go_on(boot: Boot, tmp_path: Path) -> None:
    with boot([]) as source, boot([], incoming=True) as target:
        source.run("echo here >/tmp/note; mkfifo /tmp/gate")
        job = source.start("read -r word </tmp/gate; echo $word")
        outcome = migrate(source, target, tmp_path / "m")
        assert outcome["status"] == "completed"
        job.move(target)
        assert target.read("/tmp/note") == "here"
        target.run("echo there >/tmp/gate")
        assert job.wait().text.strip() == "there"
        assert source.qmp.command("query-status")["status"] == "postmigrate"
