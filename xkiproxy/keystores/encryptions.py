"""How often each version of a key has encrypted: a key of GCM is used up by it.

IVs are random, of 96 bits. NIST SP 800-38D (section 8.3) lets one key make at most 2**32
encryptions with such IVs: after that the chance that two have the same IV is no longer negligible,
and two with the same IV tell what their plaintexts have in common and how to forge. An HSM does not
count across its clients, and a cloud not at all. So the proxy does, for all modes alike, and people
are told when it is time to rotate.

Counts are added up once a minute in a file beside the catalog, by every process for what it has
seen. A process that is killed takes its last minute with it, and other hosts have files of their
own: the sum over all proxies, to within some millions, is what the limit is about. What a key
manager has done in vain (a hedge that lost, an answer that came too late) is not counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from xkiproxy.keystores.catalog import CatalogEntry
from xkiproxy.storage import Database, FileKind, new_database

Counts = Mapping[tuple[str, str, int], int]
"""Encryptions by KMI, key ID and version."""

_NAME = "encryptions.db"


class EncryptionsError(Exception):
    """The file cannot be read or written; the text names it and what to do."""


_KIND = FileKind(
    name="count of encryptions",
    application_id=0x584B_454E,  # "XKEN"
    format=1,
    schema="""
        CREATE TABLE encryptions (
            kmi TEXT NOT NULL,
            key_id TEXT NOT NULL,
            version INTEGER NOT NULL CHECK (typeof(version) = 'integer'),
            count INTEGER NOT NULL CHECK (typeof(count) = 'integer' AND count >= 0),
            PRIMARY KEY (kmi, key_id, version)
        );
    """,
    error=EncryptionsError,
    if_missing="restart: it is made anew, and counting begins at 0",
)

_ADD = """
    INSERT INTO encryptions (kmi, key_id, version, count) VALUES (?, ?, ?, ?)
    ON CONFLICT DO UPDATE SET count = count + excluded.count
"""


def encryptions_path(catalog: Path) -> Path:
    """Where it is kept: beside the catalog."""
    return catalog.with_name(_NAME)


class Encryptions:
    """What this process has counted, and the file in which all of a host add it up.

    `counted` is written to, by the thread of the event loop alone, for each encryption. What
    `take` gave is to be added to the file (in another thread) or given back.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, or make it (mode 0600); raises EncryptionsError."""
        if not path.exists():
            # Another process may make it at the same moment; either's is as empty.
            with suppress(FileExistsError), new_database(path, _KIND):
                pass
        self._database = Database(path, _KIND)
        self.counted: defaultdict[tuple[str, str, int], int] = defaultdict(int)

    def take(self) -> Counts:
        """What was counted since the last call."""
        taken, self.counted = self.counted, defaultdict(int)
        return taken

    def give_back(self, counts: Counts) -> None:
        """What was taken could not be added: it is to be taken again."""
        for place, count in counts.items():
            self.counted[place] += count

    def add(self, counts: Counts) -> None:
        """Add to the file, durably, all or nothing; raises EncryptionsError."""
        if counts:
            with self._database.writing() as connection:
                connection.executemany(_ADD, [(*place, n) for place, n in counts.items()])

    def read(self) -> Counts:
        """All that was added; raises EncryptionsError."""
        with self._database.reading() as connection:
            rows = connection.execute("SELECT kmi, key_id, version, count FROM encryptions")
            return {(kmi, key_id, version): count for kmi, key_id, version, count in rows}

    def forget(self, kmi: str, key_id: str) -> None:
        """The key was destroyed: another may get its name; raises EncryptionsError."""
        with self._database.writing() as connection:
            connection.execute(
                "DELETE FROM encryptions WHERE kmi = ? AND key_id = ?", (kmi, key_id)
            )

    def close(self) -> None:
        """Close the file."""
        self._database.close()


def read_encryptions(catalog: Path) -> Counts:
    """What the proxies of this host have added up beside a catalog; raises EncryptionsError."""
    path = encryptions_path(catalog)
    if not path.exists():  # nothing was served yet
        return {}
    found = Encryptions(path)
    try:
        return found.read()
    finally:
        found.close()


def most_used(counts: Counts, keys: Iterable[CatalogEntry]) -> dict[str, int]:
    """By KMI: the most encryptions that the current version of one of these keys has made."""
    current: dict[tuple[str, str], tuple[int, int]] = {}
    for (kmi, key_id, version), count in counts.items():
        current[kmi, key_id] = max(current.get((kmi, key_id), (0, 0)), (version, count))
    most: dict[str, int] = {}
    for entry in keys:
        _, count = current.get((entry.kmi, entry.key_id), (0, 0))
        most[entry.kmi] = max(most.get(entry.kmi, 0), count)
    return most
