"""When each access key was used last, so that one that nobody uses can be seen and revoked.

Written once a minute beside the catalog, by every process for what it has seen: each merges the
file with what it knows, under a lock, and later times win.
"""

from __future__ import annotations

import json
from pathlib import Path

from xkiproxy.files import locked, replacing

Times = dict[str, dict[str, float]]
"""Seconds since the epoch, by key store and access key ID."""

_NAME = "last-use.json"


def last_use_path(catalog: Path) -> Path:
    """Where it is kept: beside the catalog."""
    return catalog.with_name(_NAME)


def read_last_use(path: Path) -> Times:
    """What was written; nothing if the file is not there or makes no sense."""
    try:
        found = json.loads(path.read_bytes())
        return {
            str(store): {str(name): float(at) for name, at in times.items()}
            for store, times in found.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


class LastUse:
    """What this process has seen of the use of access keys."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: Times = {}
        self._written: Times = {}

    def of(self, keystore: str) -> dict[str, float]:
        """The times of a key store, to be written to by who sees a request."""
        return self._seen.setdefault(keystore, {})

    def write(self) -> None:
        """Write what is new, whole or not at all; raises OSError."""
        seen = {store: dict(times) for store, times in self._seen.items() if times}
        if seen == self._written:
            return
        with locked(self._path.parent):
            self._merge(seen)
        self._written = seen

    def _merge(self, seen: Times) -> None:
        merged = read_last_use(self._path)
        for store, times in seen.items():
            known = merged.setdefault(store, {})
            for name, at in times.items():
                known[name] = max(at, known.get(name, 0.0))
        with replacing(self._path, durable=False) as file:
            json.dump(merged, file)
