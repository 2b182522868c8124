# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Fixtures that any test may use."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

import fds
from rig import eventfds

NOTES = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NOTES] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[NOTES]:
        terminalreporter.section("notes")
    for line in config.stash[NOTES]:
        terminalreporter.line(line)


@pytest.fixture
def note(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Say something at the end of the run, whatever came of the test."""
    return pytestconfig.stash[NOTES].append


@pytest.fixture
def events() -> Iterator[list[int]]:
    """Eventfds for a queue: to kick, to call, and for errors."""
    with eventfds(3) as made:
        yield made


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Descriptors, shared mappings and threads are the same after the test as before."""
    with fds.no_leaks():
        yield
