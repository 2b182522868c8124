# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Backend and Frontend are made of many classes: two that happen to use the same name for different things
would break each other, so what overrides calls what it overrides, or has the same parameters."""

from __future__ import annotations

import inspect
import itertools

import pytest

from vhost.user.backend import Backend
from vhost.user.frontend import Frontend


@pytest.mark.parametrize("whole", [Backend, Frontend])
def test_names_mean_one_thing(whole: type) -> None:
    seen: dict[str, list[type]] = {}
    for part in whole.__mro__[:-1]:
        for name, value in vars(part).items():
            if inspect.isfunction(value) and not name.startswith("__"):
                seen.setdefault(name, []).append(part)
    assert sum(len(parts) > 1 for parts in seen.values()) > 5, "mixins do override each other"
    for name, parts in seen.items():
        for upper, lower in itertools.pairwise(parts):
            one, other = vars(upper)[name], vars(lower)[name]
            if f"super().{name}(" in inspect.getsource(one) or getattr(other, "__isabstractmethod__", False):
                continue
            assert list(inspect.signature(one).parameters) == list(inspect.signature(other).parameters), (
                f"{upper.__name__}.{name} hides {lower.__name__}.{name}"
            )
