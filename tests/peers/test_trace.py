# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""`vhost trace` between programs that do not know of it: what they do works as without it, and it says
what passed and calls none of their habits a violation."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from peers.dpdk import Testpmd
from peers.support import Serve, StorageDaemon, make_disk, require, run
from peers.trace import Trace
from vhost import Frontend, drivers

pytestmark = pytest.mark.peer

MIB = 1 << 20
SIZE = 32 * MIB


def names(trace: Trace) -> list[str]:
    return [event["name"] for event in trace.events() if event["event"] == "message"]


def test_libblkio_on_ours(tmp_path: Path, blkio_verify: Path, iocheck: Path) -> None:
    disk = make_disk(tmp_path / "disk.raw", SIZE)
    options = ("--blk-file", str(disk), "--num-queues", "2")
    with Serve("blk", tmp_path / "s", *options) as serve, Trace(serve.path) as trace:
        run(blkio_verify, trace.path, "256", "2", "16", "event", "7", str(SIZE))
        run(iocheck, "verify", disk, "7", "0", str(SIZE))
        run(blkio_verify, trace.path, "256", "1", "4", "poll", "8", str(SIZE))
        run(iocheck, "verify", disk, "8", "0", str(SIZE))
    assert not trace.violations()
    assert {"GET_CONFIG", "ADD_MEM_REG", "SET_VRING_KICK"} <= set(names(trace))
    assert {event["fds"][0]["kind"] for event in trace.messages("SET_VRING_KICK")} == {"eventfd"}
    assert {event["fds"][0]["kind"] for event in trace.messages("ADD_MEM_REG")} == {"memfd"}
    assert [event["session"] for event in trace.events() if event["text"] == "session closed"] == [1, 2]


def test_ours_on_qemu_storage_daemon(tmp_path: Path) -> None:
    require("qsd")
    disk = make_disk(tmp_path / "disk.raw", SIZE)
    data = random.Random(5).randbytes(MIB)
    with StorageDaemon(disk, tmp_path / "s") as daemon, Trace(daemon.path) as trace:
        with Frontend.connect(trace.path) as frontend, drivers.Blk(frontend, num_queues=2) as blk:
            blk.write(2048, data)
            blk.flush()
            assert disk.read_bytes()[MIB : 2 * MIB] == data
            assert blk.read(2048, MIB // 512) == data
            # A request of the back-end goes the way back through the channel in between.
            changed: list[int] = []
            frontend.on_config_change = lambda: changed.append(1)
            daemon.resize(2 * SIZE)
            while not changed:
                assert frontend.step()
            assert blk.read_config().capacity == 2 * SIZE // 512
    assert not trace.violations()
    (change,) = trace.messages("BACKEND_CONFIG_CHANGE_MSG")
    assert (change["channel"], change["sender"]) == ("back-end requests", "back-end")
    (connected,) = trace.messages("SET_BACKEND_REQ_FD")
    assert connected["fds"] == [{"kind": "socket", "name": "", "size": None}]


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_dpdk_on_dpdk(tmp_path: Path, packed: bool) -> None:
    require("dpdk")
    with Testpmd.backend(tmp_path / "s") as back, Trace(tmp_path / "s") as trace:
        with Testpmd.frontend(trace.path, packed=packed) as front:
            back.wait_for("new device status(0x0000000f)")
            back.command("set fwd rxonly")
            back.command("start")
            front.command("set fwd txonly")
            front.command("start")
            back.wait_for_packets(rx=10_000)
            front.command("stop")
            front.quit()
        back.wait_for("vhost peer closed")
    assert not trace.violations()
    # Packed: it knows the index of the available ring alone, and says so in SET_VRING_BASE.
    assert (("ring-half", "SET_VRING_BASE") in trace.findings()) == packed
    (table,) = trace.messages("SET_MEM_TABLE")
    assert table["need_reply"]
    assert [fd["kind"] for fd in table["fds"]] == ["memfd"]
    (answer,) = trace.messages("SET_MEM_TABLE", reply=True)
    assert answer["payload"] == {"value": 0}
    assert answer["latency"] > 0


def test_dpdk_backend_as_the_client(tmp_path: Path) -> None:
    """The front-end listens: the tracer connects to it whenever a back-end comes, here twice."""
    require("dpdk")
    with Testpmd.frontend(tmp_path / "s", server=True) as front:
        front.wait_for("waiting for client connection")
        with Trace(tmp_path / "s", "--reverse") as trace:
            for _ in range(2):
                with Testpmd.backend(trace.path, client=True) as back:
                    back.wait_for("new device status(0x0000000f)")
                    back.command("set fwd rxonly")
                    back.command("start")
                    front.command("set fwd txonly")
                    front.command("start")
                    back.wait_for_packets(rx=10_000)
                    front.command("stop")
        assert {event["sender"] for event in trace.messages("SET_MEM_TABLE")} == {"front-end"}
        assert {event["session"] for event in trace.messages("SET_MEM_TABLE")} == {1, 2}
        assert not trace.violations()
