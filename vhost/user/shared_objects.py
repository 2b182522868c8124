# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Which back-end exports which object (vhost-user, VHOST_USER_BACKEND_SHARED_OBJECT_*).

A table that all Frontends of a program may share, so that one back-end finds what another one exports. Knows
owners and UUIDs; the objects stay with their owners. One thread at a time, as with the Frontends.
"""

from __future__ import annotations

import uuid as _uuid
from typing import Protocol

from vhost.errors import InvalidState

MAX_PER_OWNER = 1024


class Exporter(Protocol):
    """Whoever has an object."""

    def get_shared_object(self, uuid: _uuid.UUID) -> int | None:
        """A descriptor for the caller to close; None: it has no such object any more."""


class SharedObjects:
    """UUIDs and their owners."""

    def __init__(self) -> None:
        self._owners: dict[_uuid.UUID, Exporter] = {}

    def __len__(self) -> int:
        return len(self._owners)

    def __contains__(self, uuid: object) -> bool:
        return uuid in self._owners

    def owner(self, uuid: _uuid.UUID) -> Exporter | None:
        return self._owners.get(uuid)

    def of(self, owner: Exporter) -> list[_uuid.UUID]:
        return [uuid for uuid, other in self._owners.items() if other is owner]

    def add(self, uuid: _uuid.UUID, owner: Exporter) -> None:
        """InvalidState if it has an owner, or this one has too many."""
        if uuid in self._owners:
            raise InvalidState(f"object {uuid} is exported already")
        if len(self.of(owner)) >= MAX_PER_OWNER:
            raise InvalidState(f"object {uuid}: {MAX_PER_OWNER} objects of one exporter, which is the limit")
        self._owners[uuid] = owner

    def remove(self, uuid: _uuid.UUID, owner: Exporter) -> None:
        """Only the owner may."""
        if self._owners.get(uuid) is not owner:
            raise InvalidState(f"object {uuid} is not exported by whoever wants to remove it")
        del self._owners[uuid]

    def drop(self, owner: Exporter) -> None:
        """The owner is gone."""
        for uuid in self.of(owner):
            del self._owners[uuid]
