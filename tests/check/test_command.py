# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The command line of `vhost check`: exit codes, JSON, JUnit, selection."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from vhost.check.spawn import Program

VHOST = (sys.executable, "-m", "vhost")


def check(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*VHOST, "check", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def rng(path: Path) -> tuple[str | Path, ...]:
    return ("--run", *VHOST, "serve", "rng", "--socket-path", path)


def test_list() -> None:
    rules = json.loads(check("--list", "--json").stdout)
    assert {rule["role"] for rule in rules} == {"back-end", "front-end"}
    assert len(rules) > 330
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert f"{len(rules)} rules for back-ends and front-ends" in readme
    assert {"id", "title", "section", "severity", "needs"} <= rules[0].keys()
    lines = check("--list", "--only", "ring").stdout.splitlines()
    assert len(lines) > 15
    assert all(line.startswith("ring.") for line in lines)
    front = check("--list", "--listen", "x").stdout
    assert "order.stop" in front
    assert "ring.num" not in front


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    """Known before the first rule is judged, not after the last."""
    path = tmp_path / "s"
    for where in (tmp_path / "none" / "j.xml", tmp_path):
        done = check(path, "--only", "header", "--junit", where, *rng(path))
        assert done.returncode == 2, done.stderr
        assert str(where) in done.stderr
        assert not done.stdout


def test_a_file_that_is_not_needed(tmp_path: Path) -> None:
    """There is none of a run that could not begin; one that was there is as it was."""
    old, new = tmp_path / "old.xml", tmp_path / "new.xml"
    old.write_text("kept")
    for where in (old, new):
        done = check(tmp_path / "nobody", "--junit", where)
        assert done.returncode == 2, done.stderr
    assert old.read_text() == "kept"
    assert not new.exists()


def test_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "s"
    done = check(path, "--only", "features", "--junit", tmp_path / "j.xml", *rng(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("9 rules: ")
    suite = ElementTree.parse(tmp_path / "j.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == ("9", "0")
    assert len(suite.findall("testcase")) == 9


def test_a_failure_in_json_and_junit(tmp_path: Path) -> None:
    """A disk that takes no writes to its capacity is asked whether it is a file system."""
    path = tmp_path / "s"
    options = ("--device", "fs", "--timeout", "0.5", "--only", "state.start", "--junit", tmp_path / "j.xml")
    done = check(path, "--json", *options, *rng(path))
    assert done.returncode == 1, done.stderr
    (result,) = json.loads(done.stdout)["results"]
    assert result["verdict"] == "fail"
    assert result["evidence"]
    failure = ElementTree.parse(tmp_path / "j.xml").getroot().find(".//failure")
    assert failure is not None
    assert failure.get("type") == "must"
    assert "SET_VRING_NUM" in (failure.text or "")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "a SOCKET is needed"),
        (("s", "--only", "nothing.*"), "no rule matches nothing.*"),
        (("s", "--device", "toaster"), "must be one of blk"),
        (("--listen", "s", "--device", "toaster"), "must be one of blk"),
    ],
)
def test_cannot_run(arguments: tuple[str, ...], complaint: str) -> None:
    done = check(*arguments)
    assert done.returncode == 2
    assert complaint in done.stderr


def test_nobody_there(tmp_path: Path) -> None:
    done = check(tmp_path / "none")
    assert done.returncode == 2
    assert "No such file" in done.stderr
    done = check("--listen", tmp_path / "s", "--wait", "0.2")
    assert done.returncode == 2
    assert "no front-end" in done.stderr
    done = check(tmp_path / "t", "--run", "false")
    assert done.returncode == 2
    assert "ended with 1" in done.stderr


def test_a_command_keeps_its_own_dashes(tmp_path: Path) -> None:
    path = tmp_path / "s"
    wrapper = ("sh", "-c", 'shift; exec "$@"', "sh", "--", *VHOST, "serve", "rng", "--socket-path", path)
    assert check(path, "--only", "features.get", "--run", *wrapper).returncode == 0


def test_an_interrupted_reader(tmp_path: Path) -> None:
    """`vhost check --list | head -1` is no error."""
    command = f"{' '.join(VHOST)} check --list | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_cannot_be_used(tmp_path: Path) -> None:
    """1 would say that a rule failed."""
    for arguments in (
        (tmp_path / "s", "--run", tmp_path / "none"),
        ("--listen", tmp_path / "none" / "s"),
        ("--listen", tmp_path / "s", "--run", tmp_path / "none"),
    ):
        done = check(*arguments)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("vhost check: ")
        assert "none" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ended_while_its_program_starts(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """The signal comes when there is a process that nobody has been told of."""

    class Started(subprocess.Popen[bytes]):
        def __init__(self, *words: Any, **options: Any) -> None:
            super().__init__(*words, **options)
            signal.raise_signal(number)

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(number, leave)
    program = Program(["sleep", "600"])
    try:
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "Popen", Started)
            with pytest.raises(SystemExit):
                program.start()
        assert signal.getsignal(number) is leave
        assert program.alive
    finally:
        program.close()
        signal.signal(number, before)
    assert not program.alive


@pytest.mark.parametrize(
    ("number", "code", "words"), [(signal.SIGINT, 130, "vhost: interrupted\n"), (signal.SIGTERM, 143, "")]
)
def test_a_check_that_is_ended(tmp_path: Path, number: int, code: int, words: str) -> None:
    """Nothing of it is left, its program neither."""
    path, pid = tmp_path / "s", tmp_path / "pid"
    os.mkfifo(pid)
    program = ("sh", "-c", f"echo $$ > {pid}; exec sleep 600")
    with subprocess.Popen(
        [*VHOST, "check", "--listen", str(path), "--run", *program],
        stderr=subprocess.PIPE,
        text=True,
        # A shell has it ignored by what it starts in the background, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    ) as running:
        started = int(pid.read_text())
        running.send_signal(number)
        assert running.stderr is not None
        assert running.stderr.read() == words
        assert running.wait(20) == code
    with pytest.raises(ProcessLookupError):
        os.kill(started, 0)
    assert not path.exists()
