# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What the benchmarks compile of csrc is complete: loading it finds every symbol."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import ring, virtqueue


@pytest.mark.parametrize("suite", [ring, virtqueue])
def test_the_rings_alone_link(suite: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # compiled anew
    assert suite.build().virtqueue_pop_batch  # type: ignore[attr-defined]
