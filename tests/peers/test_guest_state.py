# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A device's own state goes along with a live migration: QEMU's vhost-user-fs, and a file system whose files
live in our device (fs_device.py). What the guest sees there after the migration is what the source's device
had, down to a file that was open.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from guest.machine import Guest, GuestError, vhost_user_fs
from guest.migration import POSTCOPY, RETURN_PATH, Migration, migrate
from peers.conftest import Boot
from peers.support import Process

pytestmark = pytest.mark.guest

DEVICE = Path(__file__).with_name("fs_device.py")


class Fs(Process):
    def __init__(self, path: Path, kind: str = "stateful") -> None:
        super().__init__([sys.executable, str(DEVICE), str(path), kind], ready="serving")
        self.path = path

    @property
    def secret(self) -> str:
        return self.errors().partition("serving ")[2].split()[0]


@contextmanager
def fs(path: Path, kind: str = "stateful") -> Iterator[Fs]:
    process = Fs(path, kind)
    try:
        yield process
    except BaseException as error:
        error.add_note(f"--- {path.name}\n{process.errors()}")
        raise
    finally:
        process.kill()


def mounted(guest: Guest) -> Guest:
    guest.run("mkdir /tmp/fs; mount -t virtiofs test /tmp/fs")
    return guest


def test_what_the_device_holds(boot: Boot, tmp_path: Path) -> None:
    with (
        fs(tmp_path / "a") as here,
        fs(tmp_path / "b") as there,
        boot(vhost_user_fs(here.path)) as source,
        boot(vhost_user_fs(there.path), incoming=True) as target,
    ):
        mounted(source)
        assert here.secret != there.secret
        assert source.read("/tmp/fs/secret") == here.secret
        assert [source.read("/tmp/fs/counter") for _ in range(3)] == ["1", "2", "3"]
        source.run("mkfifo /tmp/opened /tmp/gate")
        job = source.start("exec 5</tmp/fs/counter; echo >/tmp/opened; read -r word </tmp/gate; cat <&5")
        source.run("read -r word </tmp/opened")
        outcome = migrate(source, target, tmp_path / "m")
        assert outcome["status"] == "completed"
        job.move(target)
        assert target.read("/tmp/fs/counter") == "5", "the fourth is open still"
        assert target.read("/tmp/fs/secret") == here.secret
        target.run("echo >/tmp/gate")
        assert job.wait().text == "4\n"


def test_a_device_without_a_state_stays_where_it_is(boot: Boot, tmp_path: Path) -> None:
    """Seen to fail without DEVICE_STATE; and the guest goes on."""
    with (
        fs(tmp_path / "a", "plain") as here,
        fs(tmp_path / "b", "plain") as there,
        boot(vhost_user_fs(here.path)) as source,
        boot(vhost_user_fs(there.path), incoming=True) as target,
    ):
        mounted(source)
        assert source.read("/tmp/fs/counter") == "1"
        with pytest.raises(GuestError, match="does not support migration through qemu"):
            migrate(source, target, tmp_path / "m")
        assert source.read("/tmp/fs/counter") == "2"


def test_a_state_that_is_refused(boot: Boot, tmp_path: Path) -> None:
    """CHECK_DEVICE_STATE tells QEMU, the migration fails, and the source goes on where it was."""
    with (
        fs(tmp_path / "a") as here,
        fs(tmp_path / "b", "picky") as there,
        boot(vhost_user_fs(here.path)) as source,
        boot(vhost_user_fs(there.path), incoming=True) as target,
    ):
        mounted(source)
        assert source.read("/tmp/fs/counter") == "1"
        with pytest.raises(GuestError, match="migration: source: failed"):
            migrate(source, target, tmp_path / "m", capabilities=[RETURN_PATH])
        assert "bytes that are not good enough" in there.errors()
        assert source.read("/tmp/fs/counter") == "2"
        assert source.read("/tmp/fs/secret") == here.secret
        # Another attempt, elsewhere.
        with (
            fs(tmp_path / "c") as elsewhere,
            boot(vhost_user_fs(elsewhere.path), incoming=True) as other,
        ):
            migrate(source, other, tmp_path / "m2")
            assert other.read("/tmp/fs/counter") == "3"
            assert other.read("/tmp/fs/secret") == here.secret


def test_post_copy_with_a_state(boot: Boot, tmp_path: Path) -> None:
    """A device in Python, which waits for pages with the GIL."""
    with (
        fs(tmp_path / "a") as here,
        fs(tmp_path / "b") as there,
        boot(vhost_user_fs(here.path)) as source,
        boot(vhost_user_fs(there.path), incoming=True) as target,
    ):
        mounted(source)
        assert source.read("/tmp/fs/counter") == "1"
        slow = {"max-bandwidth": 4 << 20, "max-postcopy-bandwidth": 4 << 20}
        migration = Migration(source, target, tmp_path / "m", capabilities=[POSTCOPY], parameters=slow)
        migration.start()
        migration.wait_status("active")
        migration.start_postcopy()
        migration.wait_status("postcopy-active")
        target.become(source)
        assert target.read("/tmp/fs/counter") == "2"
        assert target.read("/tmp/fs/secret") == here.secret
        assert migration.wait()["status"] == "completed"
        assert target.read("/tmp/fs/counter") == "3"
