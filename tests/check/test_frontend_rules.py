# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""`vhost check --listen`: front-ends that each break one rule, and one that breaks none."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from vhost.check import rules_frontend
from vhost.check.front_runner import judge, run_frontend
from vhost.check.rule import RULES, Verdict
from vhost.check.runner import Result
from vhost.check.spawn import Program
from vhost.check.stage import Stage
from vhost.drivers import Rng
from vhost.errors import VhostError
from vhost.user.frontend import Frontend
from vhost.user.messages import FrontendMsg as F
from vhost.user.payloads import U64, VringState

CHECKED = {rule.id: rule for rule in RULES.select(role=rules_frontend.FRONTEND)}
Play = Callable[[Path, threading.Event], None]


def good(path: Path, leave: threading.Event) -> None:
    with Frontend.connect(path, retry=20) as frontend, Rng(frontend) as rng:
        assert len(rng.read(16)) == 16
        while not leave.wait(0.01):
            frontend.step()


def does_not_stop(path: Path, leave: threading.Event) -> None:
    with Frontend.connect(path, retry=20) as frontend:
        rng = Rng(frontend)
        rng.read(16)
        while not leave.wait(0.01):
            frontend.step()
        frontend.transport.close()
        with contextlib.suppress(VhostError, OSError):
            rng.close()


def owns_twice(path: Path, leave: threading.Event) -> None:
    with Frontend.connect(path, retry=20) as frontend, contextlib.suppress(VhostError):
        with Rng(frontend) as rng:
            rng.read(16)
            frontend._send(F.SET_OWNER)


def takes_what_is_not_offered(path: Path, leave: threading.Event) -> None:
    with Frontend.connect(path, retry=20) as frontend, contextlib.suppress(VhostError):
        frontend._send(F.SET_FEATURES, U64(frontend.offered_features | 1 << 41))


def wrong_ring_size(path: Path, leave: threading.Event) -> None:
    with Frontend.connect(path, retry=20) as frontend, contextlib.suppress(VhostError):
        frontend.set_features(frontend.get_features() & 1 << 32)
        frontend._send(F.SET_VRING_NUM, VringState(0, 100))


def status_goes_back(path: Path, leave: threading.Event) -> None:
    with Frontend.connect(path, retry=20) as frontend:
        frontend.set_status(3)
        frontend.set_status(1)


def deaf(path: Path, leave: threading.Event) -> None:
    """It has a channel and never looks at it."""
    with Frontend.connect(path, retry=20) as frontend:
        assert frontend.channel is not None
        frontend.transport.serve_meanwhile(frontend.channel.fileno(), None)
        with Rng(frontend) as rng:
            rng.read(16)
            leave.wait(60)


def goes_on_when_refused(path: Path, leave: threading.Event) -> None:
    with Frontend.connect(path, retry=20) as frontend, contextlib.suppress(VhostError):
        with contextlib.suppress(VhostError):
            frontend._send(F.SET_VRING_NUM, VringState(0, 16))
        event = os.eventfd(0)
        with contextlib.suppress(VhostError):
            frontend.set_vring_kick(0, event)
        os.close(event)


def outcome(path: Path, play: Play, name: str, *, refuses: frozenset[str] = frozenset()) -> Result:
    """The verdict on one rule once the front-end has played (and, for what is asked, while it plays)."""
    leave = threading.Event()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            play(path, leave)
        except BaseException as error:
            failed.append(error)

    rule = CHECKED[name]
    with Stage(str(path), "rng", timeout=1.0, settle=0.05) as stage:
        stage.refuses = refuses
        thread = threading.Thread(target=run)
        thread.start()
        try:
            assert stage.until(lambda: stage.messages("SET_VRING_ENABLE") or not thread.is_alive(), 30)
            result = judge(rule, stage) if rule.topic == "ask" else None
            leave.set()
            assert stage.until(lambda: not thread.is_alive(), 30)
            assert stage.until(lambda: all(stage.over(session) for session in stage.sessions), 30)
        finally:
            leave.set()
            stage.until(lambda: not thread.is_alive(), 30)
            thread.join()
        result = result or judge(rule, stage)
    assert not failed, failed
    return result


@pytest.mark.parametrize(
    ("name", "play"),
    [
        ("order.stop", does_not_stop),
        ("order.owner", owns_twice),
        ("order.status", status_goes_back),
        ("lint.owner", owns_twice),
        ("lint.not-offered", takes_what_is_not_offered),
        ("lint.ring-size", wrong_ring_size),
        ("ask.unknown", deaf),
    ],
)
def test_a_deviant_is_noticed(tmp_path: Path, name: str, play: Play) -> None:
    result = outcome(tmp_path / "s", play, name)
    assert result.verdict is Verdict.FAIL, result
    assert result.reason
    good_one = outcome(tmp_path / "t", good, name)
    assert good_one.verdict is Verdict.PASS, good_one


def test_one_that_goes_on_when_refused(tmp_path: Path) -> None:
    result = outcome(
        tmp_path / "s", goes_on_when_refused, "refusal.ring", refuses=frozenset({"SET_VRING_NUM"})
    )
    assert result.verdict is Verdict.FAIL, result
    assert any("SET_VRING_KICK" in line for line in result.evidence)


def test_ours_keeps_all_rules(tmp_path: Path) -> None:
    """As a program, which is told to end, and started again for each refusal."""
    path = tmp_path / "s"
    code = (
        "import sys, signal, time\nfrom vhost import Frontend, drivers\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit())\n"
        "with Frontend.connect(sys.argv[1], retry=20) as f, drivers.Rng(f) as rng:\n"
        "    rng.read(16)\n"
        "    f.on_config_change = lambda: f.get_config(0, 8)\n"
        "    while True: f.step(), time.sleep(0.01)\n"
    )
    program = Program([sys.executable, "-c", code, str(path)])
    try:
        with Stage(str(path), "rng", timeout=5.0, settle=0.05) as stage:
            rules = list(CHECKED.values())
            results = run_frontend(stage, program, rules, lambda result: None, wait=60, watch=0.2)
    finally:
        program.close()
    failing = [(result.rule.id, result.reason) for result in results if result.verdict is Verdict.FAIL]
    assert failing == []
    assert sum(result.verdict is Verdict.PASS for result in results) > 40
