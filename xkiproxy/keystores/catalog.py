"""The catalog: what the proxy itself keeps of a key (its state, usage, KMI and dates)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from xkiproxy.crypto.algorithms import Usage
from xkiproxy.crypto.operations import KeyState

__all__ = ["Catalog", "CatalogEntry", "CatalogError", "KeyState", "Rotation"]


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """What the catalog holds of one key; times are seconds since the epoch.

    `deletion_time` is set while the state is PENDING_DELETION: from then on the key is due. It is
    destroyed once servers have watched it for long enough, as they have from `watched_since` to
    `watched_until` (`lifecycle.watch_due`).
    `labels` are names and values that policies can ask for, by name. `version` is the newest that a
    command made here, None if that is not known; `changed_by` is who made the last change.
    """

    kmi: str
    key_id: str
    state: KeyState
    usage: Usage
    created: float
    deletion_time: float | None = None
    labels: tuple[tuple[str, str], ...] = ()
    version: int | None = None
    changed_by: str = ""
    watched_since: float | None = None
    watched_until: float | None = None


@dataclass(frozen=True, slots=True)
class Rotation:
    """The last rotation of a key that has no entry: the key is not used, and this is to be told."""

    kmi: str
    key_id: str
    version: int
    changed_by: str


class CatalogError(Exception):
    """The catalog cannot be read or written; the text names the file and what to do."""


class Catalog(Protocol):
    """States of keys, shared by all processes on a host; reads come from memory.

    `revision` grows with every change that was taken over, by whomever it was made.
    """

    revision: int

    def get(self, kmi: str, key_id: str) -> CatalogEntry | None:
        """From memory, as of the last refresh: cheap enough for every request."""
        ...

    def entries(self) -> list[CatalogEntry]: ...

    def put(self, entry: CatalogEntry) -> None:
        """Write durably before returning; raises CatalogError."""
        ...

    def rotations(self) -> list[Rotation]:
        """Of keys without an entry, as of the last refresh."""
        ...

    def note_rotation(self, rotation: Rotation) -> None:
        """Write durably, as `put` does, until the key has an entry."""
        ...

    def remove(self, kmi: str, key_id: str) -> None: ...

    def refresh(self) -> None:
        """Take over what other processes changed; raises CatalogError if it cannot be read."""
        ...

    def locked(self) -> AbstractContextManager[None]:
        """Refresh, and let no other process write until the end of the block.

        For changes that depend on what is there. Raises CatalogError.
        """
        ...

    def close(self) -> None: ...
