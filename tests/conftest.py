# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Fixtures that any test may use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import fds


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Descriptors, shared mappings and threads are the same after the test as before."""
    with fds.no_leaks():
        yield
