# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""`vhost check`, which does whatever the specification forbids, comes to the same verdicts on a back-end
when there is a trace in between. What it did is seen, and leaves nothing behind in the trace."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

VHOST = [sys.executable, "-m", "vhost"]
# It looks into the process behind the socket.
OF_THE_PROCESS = "lifecycle."


@contextlib.contextmanager
def process(*arguments: str, ready: str) -> Iterator[subprocess.Popen[str]]:
    command = [*VHOST, *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as one:
        assert one.stderr is not None
        try:
            assert ready in one.stderr.readline()
            yield one
            one.terminate()
            one.stderr.read()
            assert one.wait(20) == 0
        finally:
            one.kill()


def verdicts(path: Path) -> dict[str, str]:
    command = [*VHOST, "check", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout, done.stderr
    results = json.loads(done.stdout)["results"]
    return {row["id"]: row["verdict"] for row in results if not row["id"].startswith(OF_THE_PROCESS)}


def test_the_same_verdicts(tmp_path: Path) -> None:
    back, between, recording = tmp_path / "b", tmp_path / "t", tmp_path / "recording"
    serve = ("serve", "blk", "--socket-path", str(back), "--null-size", "64M", "--num-queues", "2")
    trace = ("trace", str(between), str(back), "--write", str(recording))
    with process(*serve, ready="serving"), process(*trace, ready="tracing") as one:
        folder = f"/proc/{one.pid}/fd"
        before = os.listdir(folder)
        seen = verdicts(between)
        assert len(seen) > 200
        deadline = time.monotonic() + 60  # the ends of the last session are on their way
        while len(left := os.listdir(folder)) > len(before) and time.monotonic() < deadline:
            assert one.poll() is None
        assert len(left) == len(before)
        assert seen == verdicts(back)
    show = [*VHOST, "trace", "--read", str(recording), "--json"]
    shown = subprocess.run(show, capture_output=True, text=True, check=True).stdout.splitlines()
    broken = {finding["rule"] for line in shown for finding in json.loads(line)["findings"]}
    assert {"size", "fds", "feature", "version", "reply-flag", "not-offered", "overlap", "enable"} <= broken
