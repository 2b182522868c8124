# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Tables of exercises: one for each bit that a back-end may offer.

Knows how to tell a bit that is offered and has no exercise; what an exercise does is its table's matter.

    EXERCISES = Table(BlkF, VirtioF, VhostF)

    @EXERCISES.of(BlkF.FLUSH)
    def flush(peer): ...
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntFlag
from typing import Any

import pytest

from vhost.features import bits, feature_names

Exercise = Callable[[Any], None]


class Table:
    """Exercises by bit. ``enums`` name the bits."""

    def __init__(self, *enums: type[IntFlag]) -> None:
        self._enums = enums
        self._rows: dict[int, Exercise] = {}

    def of(self, *features: IntFlag) -> Callable[[Exercise], Exercise]:
        """The decorated function exercises these, each of which has no other."""

        def add(exercise: Exercise) -> Exercise:
            for feature in features:
                for bit in bits(int(feature)):
                    assert bit not in self._rows, self.name(bit)
                    self._rows[bit] = exercise
            return exercise

        return add

    def name(self, bit: int) -> str:
        (name,) = feature_names(1 << bit, *self._enums)
        return name

    def missing(self, offered: int) -> list[str]:
        """What is offered, and exercised by nothing."""
        return [self.name(bit) for bit in bits(offered) if bit not in self._rows]

    def parametrize(self) -> pytest.MarkDecorator:
        """``exercise``: a test for each row."""
        rows = sorted(self._rows.items())
        return pytest.mark.parametrize(("bit", "exercise"), rows, ids=[self.name(bit) for bit, _ in rows])

    def run(self, bit: int, exercise: Exercise, offered: int, peer: object) -> None:
        """Another version may offer less than the one that the table was written for."""
        if not offered >> bit & 1:
            pytest.skip(f"{self.name(bit)} is not offered")
        exercise(peer)
