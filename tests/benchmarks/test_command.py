# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What the benchmarks' command line takes."""

import pytest

from benchmarks.__main__ import SUITES, parse


def test_all_suites_unless_some_are_named() -> None:
    assert set(parse([]).suite) <= set(SUITES)
    assert "ring" in parse([]).suite
    assert parse(["block", "ring"]).suite == ["block", "ring"]


def test_a_suite_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["rings"])
    assert "'rings' is none of ring, " in capsys.readouterr().err


def test_help_names_suites_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in parse([]).suite)
    assert "[]" not in said
