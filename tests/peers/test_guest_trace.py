# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A Linux guest whose disk is behind `vhost trace`: verified I/O, a reset, and a death of each side."""

from __future__ import annotations

from pathlib import Path

import pytest

from guest.machine import vhost_user_blk
from guest.migration import migrate
from peers.conftest import Boot
from peers.dpdk import Testpmd
from peers.support import Serve, make_disk, require, run
from peers.trace import Trace
from vhost.features import VirtioF

pytestmark = pytest.mark.guest

MIB = 1 << 20
SIZE = 64 * MIB


def serve(folder: Path, disk: Path, name: str = "s") -> Serve:
    return Serve("blk", folder / name, "--blk-file", str(disk), "--num-queues", "2")


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_guest(boot: Boot, iocheck: Path, tmp_path: Path, packed: bool) -> None:
    disk = make_disk(tmp_path / "disk.raw", SIZE)
    with serve(tmp_path, disk) as back, Trace(back.path) as trace:
        with boot(vhost_user_blk(trace.path, queues=2, packed=packed), cpus=2) as guest:
            assert bool(guest.features() & VirtioF.RING_PACKED) == packed
            guest.run(f"iocheck write /dev/vda 1 0 {32 * MIB}")
            run(iocheck, "verify", disk, "1", "0", str(32 * MIB))
            # The back-end's own request reaches the guest through the channel in between.
            with disk.open("r+b") as file:
                file.truncate(2 * SIZE)
            back.reload()
            guest.run(f"until [ $(cat /sys/block/vda/size) = {2 * SIZE // 512} ]; do usleep 10000; done")
            guest.reset()
            guest.run(f"iocheck write /dev/vda 2 {SIZE} {8 * MIB}")
            run(iocheck, "verify", disk, "2", str(SIZE), str(8 * MIB))
    assert not trace.violations()
    (table, *_) = trace.messages("ADD_MEM_REG") or trace.messages("SET_MEM_TABLE")
    assert table["fds"][0]["kind"] == "memfd"
    assert trace.messages("BACKEND_CONFIG_CHANGE_MSG")
    stops = trace.messages("GET_VRING_BASE", reply=True)
    assert {event["payload"]["index"] for event in stops} == {0, 1}
    assert any(event["payload"]["num"] for event in stops)


def test_backend_killed_under_a_guest(boot: Boot, iocheck: Path, tmp_path: Path) -> None:
    """QEMU sees the end, connects again until there is a back-end again, and the guest's I/O goes on."""
    disk = make_disk(tmp_path / "disk.raw", SIZE)
    first = serve(tmp_path, disk)
    with Trace(first.path) as trace:
        with boot(vhost_user_blk(trace.path, reconnect_ms=100), cpus=2) as guest:
            guest.run(f"iocheck write /dev/vda 1 0 {8 * MIB}")
            first.kill()
            writing = guest.start(f"iocheck write /dev/vda 2 0 {8 * MIB}")
            with serve(tmp_path, disk):
                writing.wait()
                run(iocheck, "verify", disk, "2", "0", str(8 * MIB))
                guest.close()
    assert not trace.violations()
    sessions = {event["session"] for event in trace.messages("SET_VRING_KICK")}
    assert len(sessions) == 2
    assert any(event["event"] == "remark" for event in trace.events()), "while there was no back-end"


def test_migration(boot: Boot, iocheck: Path, tmp_path: Path) -> None:
    """With a trace on either side: the dirty log passes, and where one back-end stops the other begins."""
    disk = make_disk(tmp_path / "disk.raw", SIZE)
    with (
        Serve("blk", tmp_path / "a", "--blk-file", str(disk), "--share") as first,
        Serve("blk", tmp_path / "b", "--blk-file", str(disk), "--share") as second,
        Trace(first.path, name="from") as here,
        Trace(second.path, name="to") as there,
    ):
        with (
            boot(vhost_user_blk(here.path, packed=True)) as source,
            boot(vhost_user_blk(there.path, packed=True), incoming=True) as target,
        ):
            source.run(f"iocheck write /dev/vda 3 0 {8 * MIB}")
            assert migrate(source, target, tmp_path / "m")["status"] == "completed"
            target.run(f"iocheck verify /dev/vda 3 0 {8 * MIB}")
            target.run(f"iocheck write /dev/vda 4 0 {8 * MIB}")
            run(iocheck, "verify", disk, "4", "0", str(8 * MIB))
    for trace in (here, there):
        assert not trace.violations()
    (log, *_) = here.messages("SET_LOG_BASE")
    assert [fd["kind"] for fd in log["fds"]] == ["memfd"]
    assert not there.messages("SET_LOG_BASE")
    assert any("LOG_ALL" in event["payload"]["names"] for event in here.messages("SET_FEATURES"))
    (stopped,) = here.messages("GET_VRING_BASE", reply=True)[-1:]
    (begun,) = there.messages("SET_VRING_BASE")[:1]
    assert stopped["payload"] == begun["payload"], "where one side stopped, the other went on"


def test_between_programs_of_others(boot: Boot, tmp_path: Path) -> None:
    """QEMU's network device on DPDK's back-end; no driver in the guest goes further than QEMU itself."""
    require("dpdk")
    with Testpmd.backend(tmp_path / "s") as back, Trace(tmp_path / "s") as trace:
        devices = [
            *("-chardev", f"socket,id=c0,path={trace.path}"),
            *("-netdev", "vhost-user,id=n0,chardev=c0"),
            *("-device", "virtio-net-pci,netdev=n0,romfile="),
        ]
        with boot(devices):
            back.wait_for("read message VHOST_USER_SET_VRING_ENABLE")
        back.wait_for("vhost peer closed")
    assert not trace.findings()
    (answer, *_) = trace.messages("GET_FEATURES", reply=True)
    assert {"MRG_RXBUF", "VERSION_1"} <= set(answer["payload"]["names"])
    closed = [event["channel"] for event in trace.events() if event["event"] == "closed"]
    assert sorted(closed) == ["back-end requests", "main"]
