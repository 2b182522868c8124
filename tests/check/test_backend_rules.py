# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Each rule that a deviant breaks fails on it, with evidence, and passes on the back-end that was bent."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from check.deviants import DEVIANTS, KEPT
from vhost.check.rule import RULES, Rule, Verdict
from vhost.check.runner import judge
from vhost.check.target import Target
from vhost.devices.blk import Blk
from vhost.user.backend import Backend
from vhost.user.listener import Listener

CHECKED = {rule.id: rule for rule in RULES.select()}


@contextmanager
def served(path: Path, make: type[Backend]) -> Iterator[Target]:
    """The back-end in a thread, one connection after the other; a target on it."""
    stop = os.eventfd(0)
    failed: list[BaseException] = []

    def serve(listener: Listener) -> None:
        backends: list[tuple[Backend, Blk]] = []
        try:
            while True:
                poll = select.poll()
                for fd in (stop, listener.fileno(), *(backend.fileno() for backend, _ in backends)):
                    poll.register(fd, select.POLLIN)
                ready = {fd for fd, _ in poll.poll()}
                if stop in ready:
                    break
                if listener.fileno() in ready:
                    sock, _ = listener.socket.accept()
                    device = Blk(null_size=1 << 20, num_queues=2)
                    backends.append((make(device, sock), device))
                for pair in list(backends):
                    if not pair[0].step():
                        backends.remove(pair)
                        pair[1].close()
        except BaseException as error:
            failed.append(error)
        finally:
            for backend, device in backends:
                backend.close()
                device.close()

    listener = Listener(path)
    thread = threading.Thread(target=serve, args=(listener,))
    thread.start()
    try:
        target = Target(str(path), timeout=0.5 if make is not Backend else 10, settle=0.1, write=True)
        # It is this process, which the target would not look into.
        target.pid = lambda: os.getpid()  # type: ignore[method-assign]
        target.learn()
        yield target
    finally:
        os.eventfd_write(stop, 1)
        thread.join(30)
        listener.close()
        os.close(stop)
    assert not failed, failed


def verdict(path: Path, make: type[Backend], rule: Rule) -> tuple[Verdict, str, list[str]]:
    with served(path, make) as target:
        result = judge(rule, target)
    while KEPT:
        os.close(KEPT.pop())
    return result.verdict, result.reason, result.evidence


@pytest.mark.parametrize("name", DEVIANTS)
def test_a_deviant_is_noticed(tmp_path: Path, name: str) -> None:
    found, reason, evidence = verdict(tmp_path / "s", DEVIANTS[name], CHECKED[name])
    assert found is Verdict.FAIL, f"{found}: {reason}"
    assert reason
    assert evidence, "nothing is shown of what was said"


@pytest.mark.parametrize("name", DEVIANTS)
def test_and_what_was_bent_is_not(tmp_path: Path, name: str) -> None:
    found, reason, _ = verdict(tmp_path / "s", Backend, CHECKED[name])
    assert found is Verdict.PASS, reason


def test_a_back_end_that_hangs_up_is_gone(tmp_path: Path) -> None:
    """It accepts, and closes: nothing can be judged, and that is said."""
    from vhost.check.target import CannotRun

    listener = Listener(tmp_path / "s")
    stop = threading.Event()

    def refuse() -> None:
        listener.socket.settimeout(0.1)
        while not stop.is_set():
            try:
                listener.socket.accept()[0].close()
            except TimeoutError:
                continue

    thread = threading.Thread(target=refuse)
    thread.start()
    try:
        with pytest.raises(CannotRun, match="closed the connection"):
            Target(str(tmp_path / "s"), timeout=0.2).learn()
    finally:
        stop.set()
        thread.join(10)
        listener.close()


def test_rules_are_well_formed() -> None:
    assert len(CHECKED) > 250
    for rule in RULES:
        assert not rule.title.endswith("."), rule.id
        assert rule.section
        assert rule.topic != rule.id
