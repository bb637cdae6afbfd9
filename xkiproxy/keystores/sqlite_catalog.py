"""The catalog in an SQLite file, shared by all processes on a host.

Every request reads the catalog, so reads come from a snapshot in memory, which is replaced whole
when the file has changed. A catalog that is not there is made, empty: a key without an entry is not
used, so an empty catalog refuses everything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from xkiproxy.crypto.algorithms import Usage
from xkiproxy.crypto.operations import KeyState
from xkiproxy.keystores.catalog import CatalogEntry, CatalogError, Rotation
from xkiproxy.storage import Database, FileKind, new_database

_ROTATIONS = """
    CREATE TABLE rotations (
        kmi TEXT NOT NULL,
        key_id TEXT NOT NULL,
        version INTEGER NOT NULL CHECK (typeof(version) = 'integer'),
        changed_by TEXT NOT NULL,
        PRIMARY KEY (kmi, key_id)
    );
"""

_KIND = FileKind(
    name="catalog",
    application_id=0x584B_4354,  # "XKCT"
    format=4,
    schema="""
        CREATE TABLE entries (
            kmi TEXT NOT NULL,
            key_id TEXT NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('ENABLED', 'DISABLED', 'PENDING_DELETION')),
            usage INTEGER NOT NULL CHECK (typeof(usage) = 'integer' AND usage BETWEEN 1 AND 3),
            created REAL NOT NULL CHECK (typeof(created) = 'real'),
            deletion_time REAL CHECK (typeof(deletion_time) IN ('null', 'real')),
            labels TEXT NOT NULL DEFAULT '{}',
            version INTEGER CHECK (typeof(version) IN ('null', 'integer')),
            changed_by TEXT NOT NULL DEFAULT '',
            watched_since REAL CHECK (typeof(watched_since) IN ('null', 'real')),
            watched_until REAL CHECK (typeof(watched_until) IN ('null', 'real')),
            PRIMARY KEY (kmi, key_id),
            CHECK (state = 'PENDING_DELETION' OR deletion_time IS NULL)
        );
    """
    + _ROTATIONS,
    error=CatalogError,
    if_missing="restore it from a backup, or start again without: all keys are then unregistered",
    upgrades={
        1: ("ALTER TABLE entries ADD COLUMN labels TEXT NOT NULL DEFAULT '{}'",),
        2: (
            "ALTER TABLE entries ADD COLUMN version INTEGER"
            " CHECK (typeof(version) IN ('null', 'integer'))",
            "ALTER TABLE entries ADD COLUMN changed_by TEXT NOT NULL DEFAULT ''",
            "ALTER TABLE entries ADD COLUMN watched_since REAL",
            "ALTER TABLE entries ADD COLUMN watched_until REAL",
        ),
        3: (_ROTATIONS,),
    },
)

_COLUMNS = (
    "kmi, key_id, state, usage, created, deletion_time, labels, version, changed_by,"
    " watched_since, watched_until"
)
_SELECT = f"SELECT {_COLUMNS} FROM entries ORDER BY 1, 2"  # noqa: S608 - no text of others
_REPLACE = f"INSERT OR REPLACE INTO entries ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608

_SELECT_ROTATIONS = "SELECT kmi, key_id, version, changed_by FROM rotations ORDER BY 1, 2"
_FORGET_ROTATION = "DELETE FROM rotations WHERE kmi = ? AND key_id = ?"


def _entry(
    kmi: str, key_id: str, state: str, usage: int, created: float, deletion: float | None,
    labels: str, version: int | None, changed_by: str, *watched: float | None,
) -> CatalogEntry:  # fmt: skip
    """An entry of its row; raises AttributeError or ValueError if it is damaged."""
    named = tuple(sorted(json.loads(labels).items()))
    return CatalogEntry(
        kmi, key_id, KeyState(state), Usage(usage), created, deletion, named, version, changed_by,
        *watched,
    )  # fmt: skip


def _real(seconds: float | None) -> float | None:
    return None if seconds is None else float(seconds)


class SqliteCatalog:
    """An open catalog; see `xkiproxy.keystores.catalog.Catalog`."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it (mode 0600); raises CatalogError."""
        if not path.exists():
            # Another process may make it at the same moment; either's is as empty.
            with suppress(FileExistsError), new_database(path, _KIND):
                pass
        self._database = Database(path, _KIND)
        self.revision = 0
        self._snapshot: dict[tuple[str, str], CatalogEntry] = {}
        self._rotations: list[Rotation] = []
        self._generation: tuple[int, int] | None = None
        try:
            self.refresh()
        except BaseException:
            self._database.close()
            raise

    def get(self, kmi: str, key_id: str) -> CatalogEntry | None:
        """An entry as of the last refresh, from memory."""
        return self._snapshot.get((kmi, key_id))

    def entries(self) -> list[CatalogEntry]:
        """All entries as of the last refresh, by KMI and key ID."""
        return list(self._snapshot.values())

    def put(self, entry: CatalogEntry) -> None:
        """Write an entry durably, in place of the one that is there; raises CatalogError."""
        row = (
            entry.kmi,
            entry.key_id,
            entry.state.value,
            entry.usage.value,
            float(entry.created),
            _real(entry.deletion_time),
            json.dumps(dict(entry.labels)),
            entry.version,
            entry.changed_by,
            _real(entry.watched_since),
            _real(entry.watched_until),
        )
        with self.locked(), self._database.writing() as connection:
            connection.execute(_REPLACE, row)
            connection.execute(_FORGET_ROTATION, (entry.kmi, entry.key_id))

    def rotations(self) -> list[Rotation]:
        """Of keys without an entry, as of the last refresh, by KMI and key ID."""
        return self._rotations

    def note_rotation(self, rotation: Rotation) -> None:
        """Write durably that a key without an entry was rotated; raises CatalogError."""
        row = (rotation.kmi, rotation.key_id, rotation.version, rotation.changed_by)
        with self.locked(), self._database.writing() as connection:
            connection.execute("INSERT OR REPLACE INTO rotations VALUES (?, ?, ?, ?)", row)

    def remove(self, kmi: str, key_id: str) -> None:
        """Remove an entry durably, if it is there; raises CatalogError."""
        with self.locked(), self._database.writing() as connection:
            connection.execute("DELETE FROM entries WHERE kmi = ? AND key_id = ?", (kmi, key_id))

    def refresh(self) -> None:
        """Take over what other processes changed; raises CatalogError if it cannot be read."""
        generation = self._database.generation()
        if generation == self._generation:
            return
        with self._database.reading() as connection:
            rows = connection.execute(_SELECT).fetchall()
            rotations = connection.execute(_SELECT_ROTATIONS).fetchall()
        try:
            entries = [_entry(*row) for row in rows]
        except (AttributeError, ValueError):
            raise CatalogError(
                f"catalog {self._database.path}: an entry is damaged; restore it from a backup"
            ) from None
        self._snapshot = {(entry.kmi, entry.key_id): entry for entry in entries}
        self._rotations = [Rotation(*row) for row in rotations]
        self._generation = generation
        self.revision += 1

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Refresh, and let no other process write until the end of the block.

        What is written in the block is seen and durable when the block ends, or, if it fails, not
        at all. Raises CatalogError, also when another process holds the lock for 5 seconds.
        """
        before = self._snapshot, self._rotations
        try:
            with self._database.writing():
                self.refresh()
                yield
        except BaseException:
            # The snapshot may hold what was rolled back: forget it, and read again next time.
            (self._snapshot, self._rotations), self._generation = before, None
            raise
        self.refresh()

    def close(self) -> None:
        """Close the file."""
        self._database.close()
