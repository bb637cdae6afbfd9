"""What happens to keys beside the server, for the audit log: made, rotated, disabled, destroyed.

Commands change the catalog in processes of their own; the server, which has the audit log, sees
what is different. What changed while no server ran it cannot know.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from xkiproxy.crypto.algorithms import Usage
from xkiproxy.keystores.catalog import Catalog, CatalogEntry, Rotation
from xkiproxy.keystores.lifecycle import UNREGISTERED, destruction_time

EVENT = "key_changed"

_Known = CatalogEntry | Rotation
_Keys = dict[tuple[str, str], _Known]


class KeyChanges:
    """Compares the catalog with what it was when all of it had been written down."""

    def __init__(self, catalog: Catalog) -> None:
        """The catalog as it is now needs no record."""
        self._catalog = catalog
        self._written = (catalog.revision, _keys(catalog))

    def records(self) -> Iterator[dict[str, Any]]:
        """A record for each key that is different; call `forget` once they are written."""
        revision, before = self._written
        if self._catalog.revision == revision:
            return
        after = _keys(self._catalog)
        for place in sorted(before.keys() | after.keys()):
            was, now = before.get(place), after.get(place)
            if was != now:
                kmi, key = place
                yield {
                    "time": datetime.now(UTC),
                    "event": EVENT,
                    "kmi": kmi,
                    "key": key,
                    "before": _described(was),
                    "after": _described(now),
                    "by": (now and now.changed_by) or None,
                }

    def forget(self) -> None:
        """What `records` gave has been written."""
        self._written = (self._catalog.revision, _keys(self._catalog))


def _keys(catalog: Catalog) -> _Keys:
    """What a server writes each time it has looked at a key that is due is no change."""
    entries = (replace(entry, watched_until=None) for entry in catalog.entries())
    known: tuple[_Known, ...] = (*catalog.rotations(), *entries)
    return {(one.kmi, one.key_id): one for one in known}


def _described(entry: _Known | None) -> dict[str, Any] | None:
    """What the catalog says of a key; None: nothing, so it cannot be used."""
    if entry is None:
        return None
    if isinstance(entry, Rotation):
        return {"state": UNREGISTERED, "version": entry.version}
    found: dict[str, Any] = {
        "state": entry.state.value,
        "usage": [usage.name.lower() for usage in Usage if usage & entry.usage and usage.name],
    }
    if entry.version is not None:
        found["version"] = entry.version
    if entry.labels:
        found["labels"] = dict(entry.labels)
    if entry.deletion_time is not None:
        found["deletion_time"] = datetime.fromtimestamp(entry.deletion_time, UTC)
    if (when := destruction_time(entry)) is not None:
        found["destruction_time"] = datetime.fromtimestamp(when, UTC)
    return found
