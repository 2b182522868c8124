# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The table of ioctls, and what a machine without these devices hears. What the devices do is tested in
guests (tests/kernel)."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vhost
from vhost.errors import IoctlError, VhostError
from vhost.kernel import VhostNet, VhostScsi, VhostVdpa, VhostVsock
from vhost.kernel import ioctls as k
from vhost.kernel._ioctl import Ioctl
from vhost.memory import GuestMemory


def test_every_ioctl_of_the_header_has_a_row() -> None:
    assert set(k.IOCTLS) == set(Ioctl.names())
    assert len({(row.number, row.direction) for row in k.IOCTLS.values()}) == len(k.IOCTLS) == 71
    for row in k.IOCTLS.values():
        assert row.doc.endswith("."), row
        assert row.type == (0x81 if row.name.startswith("VDUSE") else 0xAF), row
        assert row.devices
        assert bool(row.argument) == bool(row.size), row
        name = row.name.removeprefix("VHOST_")
        assert getattr(k, name) is row


def test_table_on_the_command_line() -> None:
    command = [sys.executable, "-m", "vhost", "ioctls"]
    rows = json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True).stdout)
    assert len(rows) == 71
    by_name = {row["name"]: row for row in rows}
    assert by_name["VHOST_SET_VRING_ADDR"]["number"] == 0x4028AF11
    assert by_name["VDUSE_IOTLB_GET_FD2"]["size"] == 80
    assert by_name["VHOST_NEW_WORKER"]["devices"] == "scsi"
    assert by_name["VHOST_VDPA_SUSPEND"]["feature"] == "VHOST_BACKEND_F_SUSPEND"
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 72
    assert lines[0].split() == ["type", "nr", "name", "direction", "size", "devices", "feature", "doc"]


@pytest.mark.parametrize("kind", [VhostNet, VhostVsock, VhostScsi, VhostVdpa])
def test_a_node_that_is_not_there(kind: type, tmp_path: Path, no_leaks: None) -> None:
    with pytest.raises(IoctlError) as failed:
        kind(path=tmp_path / "none")
    assert failed.value.errno == errno.ENOENT
    assert f"modprobe {kind.module}" in str(failed.value)
    assert isinstance(failed.value, OSError)
    assert isinstance(failed.value, VhostError)


def test_no_permission(tmp_path: Path) -> None:
    node = tmp_path / "node"
    node.touch(mode=0o600)
    code = f"""
import os, vhost.kernel
if os.geteuid() == 0:
    os.chmod({str(tmp_path)!r}, 0o755)
    os.seteuid(65534)
else:
    os.chmod({str(node)!r}, 0)
try:
    vhost.kernel.VhostNet({str(node)!r})
except vhost.IoctlError as error:
    print(error.errno, error)
"""
    for folder in (tmp_path, *tmp_path.parents):  # pytest's folders are its user's alone
        if os.geteuid() == 0 and folder != Path("/") and folder.owner() == "root":
            folder.chmod(folder.stat().st_mode | 0o011)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{errno.EACCES} "), done.stdout + done.stderr
    assert "be root, or of the node's group" in done.stdout


def test_a_file_that_is_no_device(no_leaks: None) -> None:
    with pytest.raises(IoctlError, match="VHOST_SET_OWNER") as failed:
        VhostNet("/dev/null")
    assert failed.value.errno == errno.ENOTTY
    assert failed.value.hint


def test_an_error_says_what_was_asked() -> None:
    null = os.open("/dev/null", os.O_RDWR)
    memory = GuestMemory()
    asked = {
        "ring 1, num 0x100": lambda: k.SET_VRING_NUM(null, 1, 256),
        "ring 2": lambda: k.GET_VRING_BASE(null, 2),
        "ring 0, fd None": lambda: k.SET_VRING_KICK(null, 0, None),
        "desc 0x1, avail 0x2, used 0x3, log 0x4, flags 0x1": lambda: k.SET_VRING_ADDR(
            null, 0, 1, 2, 3, log=4, flags=1
        ),
        "0 regions": lambda: k.SET_MEM_TABLE(null, memory),
        "0xffff": lambda: k.SET_FEATURES(null, 0xFFFF),
        "-0x1": lambda: k.SET_LOG_FD(null, -1),
        "target naa.1, ABI version 1": lambda: k.SCSI_SET_ENDPOINT(null, "naa.1"),
        "8 bytes at 4": lambda: k.VDPA_GET_CONFIG(null, 4, 8),
        "3 bytes at 1": lambda: k.VDPA_SET_CONFIG(null, 1, b"abc"),
        "group 1, address space 0x2": lambda: k.VDPA_SET_GROUP_ASID(null, 1, 2),
        "'disk', device id 2, features 0x3, 4 queues, 5 bytes of configuration": lambda: k.VDUSE_CREATE_DEV(
            null, "disk", device_id=2, features=3, vq_num=4, config=bytes(5)
        ),
        "IOVA 0x1000 to 0x1fff, address space 0": lambda: k.VDUSE_IOTLB_GET_FD(null, 0x1000, 0x1FFF),
    }
    for words, call in asked.items():
        with pytest.raises(IoctlError) as failed:
            call()
        assert words in str(failed.value)
        assert failed.value.errno in (errno.ENOTTY, errno.EINVAL)
        assert failed.value.ioctl in k.IOCTLS
    os.close(null)


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(OverflowError):
        k.SET_VRING_NUM(-1, 1 << 32, 0)
    with pytest.raises(OverflowError, match="does not fit 1 bytes"):
        k.VDPA_SET_STATUS(-1, 256)
    with pytest.raises(OverflowError):
        k.SET_FEATURES(-1, 1 << 64)
    with pytest.raises(ValueError, match="limit 223"):
        k.SCSI_SET_ENDPOINT(-1, "x" * 224)
    with pytest.raises(ValueError, match="must be 1 to 255"):
        k.VDUSE_DESTROY_DEV(-1, "x" * 256)
    with pytest.raises(ValueError, match="must be 1 to 255"):
        k.VDUSE_DESTROY_DEV(-1, "")


def test_the_package_knows_its_kernel_part() -> None:
    assert vhost.kernel.VhostNet is VhostNet
    assert issubclass(VhostNet, vhost.VhostOps)
