"""The catalog: shared between processes, durable, and refusing what is damaged."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from xkiproxy.crypto.algorithms import Usage
from xkiproxy.crypto.operations import KeyState
from xkiproxy.keystores.catalog import CatalogEntry, CatalogError, Rotation
from xkiproxy.keystores.sqlite_catalog import SqliteCatalog

ENTRY = CatalogEntry("local", "k", KeyState.ENABLED, Usage.BOTH, 1000.5)
DUE = CatalogEntry("hsm", "gone", KeyState.PENDING_DELETION, Usage.DECRYPT, 1.0, 2000.25)

_WRITER = """
import itertools, sys
from pathlib import Path
from xkiproxy.crypto.algorithms import Usage
from xkiproxy.crypto.operations import KeyState
from xkiproxy.keystores.catalog import CatalogEntry
from xkiproxy.keystores.sqlite_catalog import SqliteCatalog

catalog = SqliteCatalog(Path(sys.argv[1]))
for number in itertools.count():
    name = f"{sys.argv[2]}-{number}"
    catalog.put(CatalogEntry("local", name, KeyState.ENABLED, Usage.BOTH, 1.0))
    print(name, "ENABLED", flush=True)
    catalog.put(CatalogEntry("local", name, KeyState.DISABLED, Usage.BOTH, 1.0))
    print(name, "DISABLED", flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalog.db"


@pytest.fixture
def catalog(path: Path) -> Iterator[SqliteCatalog]:
    opened = SqliteCatalog(path)
    yield opened
    opened.close()


@pytest.fixture
def other(path: Path) -> Iterator[SqliteCatalog]:
    """Another connection: what another process has."""
    opened = SqliteCatalog(path)
    yield opened
    opened.close()


def start(path: Path, turn: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path), turn], stdout=subprocess.PIPE, text=True
    )


def test_a_new_catalog_is_empty_and_private(path: Path) -> None:
    before = os.umask(0)
    try:
        catalog = SqliteCatalog(path)
        catalog.put(ENTRY)
        modes = {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
        catalog.close()
    finally:
        os.umask(before)
    assert modes == {0o600}


def test_entries(catalog: SqliteCatalog, path: Path) -> None:
    assert catalog.entries() == []
    assert catalog.get("local", "k") is None
    catalog.put(ENTRY)
    catalog.put(DUE)
    assert catalog.get("local", "k") == ENTRY
    assert catalog.get("hsm", "k") is None
    assert catalog.entries() == [DUE, ENTRY]
    catalog.put(replace(ENTRY, state=KeyState.DISABLED, usage=Usage.ENCRYPT))
    catalog.remove("hsm", "gone")
    catalog.remove("hsm", "never there")
    again = SqliteCatalog(path)
    assert again.entries() == [replace(ENTRY, state=KeyState.DISABLED, usage=Usage.ENCRYPT)]
    again.close()


def test_another_ones_change_is_seen_after_refresh(
    catalog: SqliteCatalog, other: SqliteCatalog
) -> None:
    other.put(ENTRY)
    assert catalog.get("local", "k") is None
    catalog.refresh()
    assert catalog.get("local", "k") == ENTRY
    before = catalog._snapshot
    catalog.refresh()
    assert catalog._snapshot is before  # nothing changed, nothing was read


def test_another_process(catalog: SqliteCatalog, path: Path) -> None:
    child = start(path, "other")
    assert child.stdout is not None
    line = child.stdout.readline()
    catalog.refresh()
    assert catalog.get("local", line.split()[0]) is not None
    catalog.put(ENTRY)  # both write
    child.kill()
    child.communicate()
    catalog.refresh()
    assert catalog.get("local", "k") == ENTRY


def test_kill_at_any_moment(path: Path) -> None:
    promised: dict[str, str] = {}
    chance = random.Random()
    for turn in range(10):
        child = start(path, f"turn{turn}")
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(chance.randint(1, 30))]
        child.send_signal(signal.SIGKILL)
        lines += child.communicate()[0].splitlines(keepends=True)
        promised |= dict(line.split() for line in lines if line.endswith("\n"))
        catalog = SqliteCatalog(path)
        for name, state in promised.items():
            entry = catalog.get("local", name)
            assert entry is not None
            # What was acknowledged last holds, or what was being written after it.
            assert entry.state in {KeyState(state), KeyState.DISABLED}
        catalog.close()


def test_the_lock_keeps_others_out(
    catalog: SqliteCatalog, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xkiproxy.storage.BUSY_TIMEOUT_SECONDS", 0.01)
    impatient = SqliteCatalog(path)
    with catalog.locked():
        catalog.put(ENTRY)
        with pytest.raises(CatalogError, match="locked by another process"):
            impatient.put(DUE)
        impatient.refresh()
        assert impatient.entries() == []
    impatient.refresh()
    assert impatient.entries() == [ENTRY]
    impatient.close()


def test_the_lock_starts_with_a_refresh(catalog: SqliteCatalog, other: SqliteCatalog) -> None:
    other.put(ENTRY)
    with catalog.locked():
        assert catalog.get("local", "k") == ENTRY


def test_a_failed_block_changes_nothing(catalog: SqliteCatalog) -> None:
    catalog.put(replace(ENTRY, state=KeyState.DISABLED))

    def fail() -> None:
        with catalog.locked():
            catalog.put(ENTRY)
            catalog.put(DUE)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    for _ in range(2):
        assert catalog.entries() == [replace(ENTRY, state=KeyState.DISABLED)]
        catalog.refresh()


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE entries SET state = 'enabled'",
        "UPDATE entries SET usage = 0",
        "UPDATE entries SET usage = 4",
        "UPDATE entries SET created = 'today'",
        "UPDATE entries SET deletion_time = 5.0",
        "UPDATE entries SET watched_since = 'today'",
        "UPDATE entries SET watched_until = 'today'",
    ],
)
def test_no_one_can_write_nonsense(change: str, catalog: SqliteCatalog, path: Path) -> None:
    catalog.put(ENTRY)
    with closing(sqlite3.connect(path)) as connection, pytest.raises(sqlite3.IntegrityError):
        connection.execute(change)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute(change)
        connection.commit()
    with pytest.raises(CatalogError, match="damaged"):
        SqliteCatalog(path)


def test_nonsense_is_refused_on_refresh(catalog: SqliteCatalog, path: Path) -> None:
    catalog.put(ENTRY)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute("UPDATE entries SET state = 'enabled'")
        connection.commit()
    for _ in range(2):
        with pytest.raises(CatalogError, match="damaged"):
            catalog.refresh()


def test_damaged_files(path: Path) -> None:
    catalog = SqliteCatalog(path)
    for number in range(50):
        catalog.put(replace(ENTRY, key_id=f"k{number}"))
    catalog.close()
    good = path.read_bytes()
    for start_ in range(0, len(good), 4096):
        path.write_bytes(good[:start_] + os.urandom(4096) + good[start_ + 4096 :])
        with pytest.raises(CatalogError, match=r"not a catalog|damaged") as caught:
            SqliteCatalog(path)
        assert str(path) in str(caught.value)
    path.write_bytes(good)
    catalog = SqliteCatalog(path)
    assert len(catalog.entries()) == 50
    catalog.close()


def test_what_is_no_catalog(path: Path) -> None:
    path.write_bytes(b"")
    path.chmod(0o600)
    with pytest.raises(CatalogError, match="not a catalog"):
        SqliteCatalog(path)
    path.write_text("text" * 1000)
    with pytest.raises(CatalogError, match="not a catalog"):
        SqliteCatalog(path)


def test_a_newer_format(path: Path) -> None:
    SqliteCatalog(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 5")
    with pytest.raises(CatalogError, match="newer xkiproxy"):
        SqliteCatalog(path)


OLD_TABLE = """
    CREATE TABLE entries (
        kmi TEXT NOT NULL, key_id TEXT NOT NULL, state TEXT NOT NULL, usage INTEGER NOT NULL,
        created REAL NOT NULL, deletion_time REAL, PRIMARY KEY (kmi, key_id)
    );
    INSERT INTO entries VALUES ('local', 'old', 'ENABLED', 3, 1.0, NULL);
    PRAGMA application_id = 0x584B4354;
    PRAGMA user_version = 1;
"""


def test_a_catalog_without_labels_is_taken_over(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(OLD_TABLE)
    path.chmod(0o600)
    for _ in range(2):
        catalog = SqliteCatalog(path)
        assert catalog.entries() == [
            CatalogEntry("local", "old", KeyState.ENABLED, Usage.BOTH, 1.0, None, ())
        ]
        catalog.put(ENTRY)
        catalog.remove(ENTRY.kmi, ENTRY.key_id)
        catalog.close()


TABLE_OF_FORMAT_2 = """
    CREATE TABLE entries (
        kmi TEXT NOT NULL,
        key_id TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('ENABLED', 'DISABLED', 'PENDING_DELETION')),
        usage INTEGER NOT NULL CHECK (typeof(usage) = 'integer' AND usage BETWEEN 1 AND 3),
        created REAL NOT NULL CHECK (typeof(created) = 'real'),
        deletion_time REAL CHECK (typeof(deletion_time) IN ('null', 'real')),
        labels TEXT NOT NULL DEFAULT '{}',
        PRIMARY KEY (kmi, key_id),
        CHECK (state = 'PENDING_DELETION' OR deletion_time IS NULL)
    );
    INSERT INTO entries VALUES ('hsm', 'gone', 'PENDING_DELETION', 2, 1.0, 2000.25, '{"a": "b"}');
    INSERT INTO entries VALUES ('local', 'k', 'ENABLED', 3, 1000.5, NULL, '{}');
    PRAGMA application_id = 0x584B4354;
    PRAGMA user_version = 2;
"""


def test_a_catalog_without_versions_is_taken_over(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(TABLE_OF_FORMAT_2)
    path.chmod(0o600)
    for _ in range(2):
        catalog = SqliteCatalog(path)
        assert catalog.entries() == [replace(DUE, labels=(("a", "b"),)), ENTRY]
        catalog.close()
    catalog = SqliteCatalog(path)
    catalog.put(replace(ENTRY, version=2, changed_by="me (1000)"))
    catalog.close()
    reopened = SqliteCatalog(path)
    assert reopened.get("local", "k") == replace(ENTRY, version=2, changed_by="me (1000)")
    reopened.close()


def test_a_catalog_without_rotations_is_taken_over(path: Path) -> None:
    catalog = SqliteCatalog(path)
    catalog.put(ENTRY)
    catalog.close()
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("DROP TABLE rotations; PRAGMA user_version = 3;")
    for _ in range(2):
        catalog = SqliteCatalog(path)
        assert (catalog.entries(), catalog.rotations()) == ([ENTRY], [])
        catalog.close()


def test_a_rotation_is_noted_until_the_key_has_an_entry(
    catalog: SqliteCatalog, other: SqliteCatalog
) -> None:
    for rotation in (Rotation("local", "k", 2, "me"), Rotation("local", "other", 2, "me")):
        catalog.note_rotation(rotation)
    catalog.note_rotation(Rotation("local", "k", 3, "you"))
    other.refresh()
    assert other.rotations() == [
        Rotation("local", "k", 3, "you"),
        Rotation("local", "other", 2, "me"),
    ]
    assert (other.entries(), other.get("local", "k")) == ([], None)

    def fail() -> None:
        with catalog.locked():
            catalog.put(ENTRY)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert len(catalog.rotations()) == 2
    catalog.put(ENTRY)
    assert [rotation.key_id for rotation in catalog.rotations()] == ["other"]


def test_labels_are_kept(catalog: SqliteCatalog, path: Path) -> None:
    labelled = replace(ENTRY, labels=(("environment", "production"), ("team", "pay roll")))
    catalog.put(labelled)
    assert SqliteCatalog(path).get("local", "k") == labelled


def test_since_when_a_key_is_watched_is_kept(catalog: SqliteCatalog, path: Path) -> None:
    watched = replace(DUE, watched_since=3000.5, watched_until=3060)
    catalog.put(watched)
    assert SqliteCatalog(path).get("hsm", "gone") == watched


@pytest.mark.parametrize("labels", ["{", "[]", "3"])
def test_damaged_labels(catalog: SqliteCatalog, path: Path, labels: str) -> None:
    catalog.put(ENTRY)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE entries SET labels = ?", (labels,))
        connection.commit()
    with pytest.raises(CatalogError, match="damaged"):
        catalog.refresh()


def test_an_open_mode_is_refused(path: Path) -> None:
    SqliteCatalog(path).close()
    path.chmod(0o602)
    with pytest.raises(CatalogError, match="chmod 0600"):
        SqliteCatalog(path)


def test_a_catalog_that_goes_away(catalog: SqliteCatalog, path: Path) -> None:
    catalog.put(ENTRY)
    path.rename(path.with_name("elsewhere"))
    with pytest.raises(CatalogError, match="no such file"):
        catalog.refresh()
    with pytest.raises(CatalogError, match="no such file"):
        catalog.put(DUE)
    path.touch(0o600)
    with pytest.raises(CatalogError, match="replaced"):
        catalog.refresh()


def test_a_folder_that_is_not_there(path: Path) -> None:
    with pytest.raises(CatalogError, match="No such file"):
        SqliteCatalog(path.parent / "none" / "catalog.db")
