"""SQLite files that hold what must not be lost: keyring, catalog, count of encryptions.

All are opened the same way: in WAL mode with `synchronous = FULL` (a write that returned survives
a power cut), marked with their own `application_id` and format number, checked for damage, and made
readable by their owner alone. A file appears under its name complete or not at all.

SQLite keeps POSIX locks on a file, and a process loses them when it closes any other descriptor of
that file: so nothing here or elsewhere opens these files past SQLite.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from xkiproxy.files import sync_directory

BUSY_TIMEOUT_SECONDS = 5.0
"""How long to wait for another process's write."""


@dataclass(frozen=True, slots=True)
class FileKind:
    """What a file is for: `name` in messages, how it is marked, its tables, and how it fails."""

    name: str
    application_id: int
    format: int
    schema: str
    error: type[Exception]
    if_missing: str
    """What to do when there is no such file."""
    upgrades: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """How a file of an older format becomes one of the next: SQL, by the older number."""


_ADVICE = {
    sqlite3.SQLITE_FULL: "the disk is full; nothing was changed, make room and try again",
    sqlite3.SQLITE_IOERR: "the disk refused to read or write; check its space, quota and health",
    sqlite3.SQLITE_CORRUPT: "is damaged; keep a copy of it, and restore it from a backup",
    sqlite3.SQLITE_BUSY: "is locked by another process; try again",
    sqlite3.SQLITE_LOCKED: "is locked by another process; try again",
    sqlite3.SQLITE_READONLY: "cannot be written; check its owner, its mode and its file system",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened; this user must be able to write it and beside it",
    sqlite3.SQLITE_PERM: "cannot be opened; this user must be able to write it and beside it",
}


class Database:
    """An open file of one kind; safe to use from several threads, one at a time.

    Every method raises `kind.error`, with a text that says what, where and what to do.
    """

    def __init__(self, path: Path, kind: FileKind) -> None:
        """Open a file that is there already, and check it whole."""
        self.path = path
        self._kind = kind
        self._lock = threading.RLock()
        self._identity = _identity(path, kind)
        with translated(path, kind):
            self._connection = sqlite3.connect(
                f"file:{quote(str(path.absolute()))}?mode=rw",
                uri=True,
                timeout=BUSY_TIMEOUT_SECONDS,
                isolation_level=None,
                check_same_thread=False,
            )
            # A damaged name must not keep the undamaged ones from being read.
            self._connection.text_factory = lambda data: data.decode("utf-8", "replace")
            try:
                _check(self._connection, path, kind)
                _configure(self._connection)
                _upgrade(self._connection, kind)
            except BaseException:
                self._connection.close()
                raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The connection, for reading."""
        with self._lock, translated(self.path, self._kind):
            if _identity(self.path, self._kind) != self._identity:
                raise self._kind.error(
                    f"{self._kind.name} {self.path}: was replaced by another file; restart"
                )
            yield self._connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """The connection in a write transaction, committed durably at the end.

        Within another `writing` of the same thread it becomes a part of that one.
        """
        with self.reading() as connection:
            if connection.in_transaction:
                yield connection
                return
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def generation(self) -> tuple[int, int]:
        """Something that changes when anyone, in any process, commits a change: cheap."""
        with self.reading() as connection:
            # data_version counts the commits of others, total_changes our own.
            (others,) = connection.execute("PRAGMA data_version").fetchone()
            return others, connection.total_changes

    def close(self) -> None:
        """Close the file."""
        with self._lock, translated(self.path, self._kind):
            self._connection.close()


@contextmanager
def new_database(path: Path, kind: FileKind) -> Iterator[sqlite3.Connection]:
    """Make a file of mode 0600 with its tables; it gets its name when the block has filled it.

    Raises:
        FileExistsError: the name is taken; that file is as it was.
        Exception: `kind.error`, for whatever else goes wrong.
    """
    with translated(path, kind):
        temporary = _temporary(path, kind)
        try:
            with closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
                _configure(connection)
                connection.execute(f"PRAGMA application_id = {kind.application_id}")
                connection.execute(f"PRAGMA user_version = {kind.format}")
                connection.executescript(kind.schema)
                yield connection
            _publish(temporary, path, kind)
        finally:
            for suffix in ("", "-wal", "-shm", "-journal"):
                Path(f"{temporary}{suffix}").unlink(missing_ok=True)


@contextmanager
def translated(path: Path, kind: FileKind) -> Iterator[None]:
    """Turn an error of SQLite into one that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary code of an extended one
        what = f"is not a {kind.name}" if code == sqlite3.SQLITE_NOTADB else _ADVICE.get(code)
        raise kind.error(f"{kind.name} {path}: {what or 'failed'} (SQLite: {error})") from None


def _temporary(path: Path, kind: FileKind) -> Path:
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise kind.error(
            f"{kind.name} {path}: cannot be made in {path.parent}: {error.strerror}"
        ) from None
    os.close(descriptor)
    return Path(name)


def _publish(temporary: Path, path: Path, kind: FileKind) -> None:
    try:
        os.link(temporary, path)  # unlike a rename, this never replaces a file
        sync_directory(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise kind.error(f"{kind.name} {path}: cannot be made: {error.strerror}") from None


def _identity(path: Path, kind: FileKind) -> tuple[int, int]:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise kind.error(f"{kind.name} {path}: there is no such file; {kind.if_missing}") from None
    except OSError as error:
        raise kind.error(f"{kind.name} {path}: {error.strerror}") from None
    if status.st_mode & 0o007:
        raise kind.error(f"{kind.name} {path}: its mode lets everyone in; run: chmod 0600 {path}")
    return status.st_dev, status.st_ino


def _check(connection: sqlite3.Connection, path: Path, kind: FileKind) -> None:
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    if application_id != kind.application_id:
        raise kind.error(f"{kind.name} {path}: is not a {kind.name}")
    version = _format(connection)
    if version > kind.format:
        raise kind.error(
            f"{kind.name} {path}: has format {version}, and this xkiproxy knows {kind.format};"
            " use the newer xkiproxy that made it"
        )
    if version != kind.format and version not in kind.upgrades:
        raise kind.error(f"{kind.name} {path}: has an unknown format ({version})")
    (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if found != "ok":
        advice = _ADVICE[sqlite3.SQLITE_CORRUPT]
        raise kind.error(f"{kind.name} {path}: {advice} (SQLite: {found})")


def _upgrade(connection: sqlite3.Connection, kind: FileKind) -> None:
    """Bring a file of an older format to this one, whole or not at all."""
    if _format(connection) == kind.format:
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        # Asked again under the lock: another process may have done it meanwhile.
        while (version := _format(connection)) != kind.format:
            for statement in kind.upgrades[version]:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {version + 1}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _format(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)


def _configure(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA secure_delete = ON")  # what is deleted is overwritten with zeros
