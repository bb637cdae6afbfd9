"""The keyring: an SQLite file of key versions, each wrapped under one master key.

    KEK     = HKDF-SHA256(master key, salt, "xkiproxy keyring v1")            RFC 5869, 32 bytes
    check   = HKDF-SHA256(master key, salt, "xkiproxy keyring v1 check")      32 bytes
    wrapped = nonce || AES-256-GCM(KEK, nonce, material, AAD)                 NIST SP 800-38D
    AAD     = len(key ID) || key ID || len(spec) || spec || version           lengths 2, version 4

The salt (32 random bytes) and the check are in the file. The check tells a wrong master key from a
damaged row, and tells nothing about the KEK. The nonce is 12 random bytes, so one keyring is good
for 2**32 versions. The AAD ties a row to its place: a row that is moved to another key or version
does not unwrap. What it cannot show is a row that is gone, or a file put back as it was: whoever
can write the file can do that, and must be kept from it by the file's mode.

A rewrap makes salt, check and every wrapping anew, in one transaction. Another process may do so at
any time, so whatever is read or written is compared with the check of that moment: a version that
is wrapped under a master key of the past would be lost.
"""

from __future__ import annotations

import base64
import hmac
import os
import sqlite3
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from xkiproxy.config.models import SoftwareSettings
from xkiproxy.config.secrets import parse_key
from xkiproxy.crypto.algorithms import KEY_SIZES, KeySpec
from xkiproxy.kmi.base import KeyInfo, KeyManagerError, check_key_id
from xkiproxy.storage import Database, FileKind, new_database

_MASTER_KEY_SIZE = 32
_SALT_SIZE = 32
_NONCE_SIZE = 12
_KEK_INFO = b"xkiproxy keyring v1"
_CHECK_INFO = b"xkiproxy keyring v1 check"
_GIVEN = "the given text"
_LENGTH = struct.Struct(">H")
_VERSION = struct.Struct(">I")

_KIND = FileKind(
    name="keyring",
    application_id=0x584B_4B52,  # "XKKR"
    format=1,
    schema="""
        CREATE TABLE meta (
            name TEXT NOT NULL PRIMARY KEY,
            value BLOB NOT NULL CHECK (typeof(value) = 'blob')
        );
        CREATE TABLE keys (
            id TEXT NOT NULL PRIMARY KEY,
            spec TEXT NOT NULL CHECK (spec IN ('AES_256', 'AES_192', 'AES_128', 'SM4')),
            created REAL NOT NULL CHECK (typeof(created) = 'real')
        );
        CREATE TABLE versions (
            key_id TEXT NOT NULL REFERENCES keys (id),
            version INTEGER NOT NULL
                CHECK (typeof(version) = 'integer' AND version BETWEEN 1 AND 4294967295),
            wrapped BLOB NOT NULL CHECK (typeof(wrapped) = 'blob'),
            created REAL NOT NULL CHECK (typeof(created) = 'real'),
            PRIMARY KEY (key_id, version)
        );
    """,
    error=KeyManagerError,
    if_missing="restore it from a backup, or make a new one with: xkiproxy keyring create",
)

_SELECT = """
    SELECT keys.id, keys.spec, keys.created, versions.version, versions.wrapped
    FROM keys LEFT JOIN versions ON versions.key_id = keys.id
    WHERE ?1 IS NULL OR keys.id = ?1
    ORDER BY keys.id, versions.version
"""

_REWRAP = "UPDATE versions SET wrapped = ? WHERE key_id = ? AND version = ?"

_BESIDE = "new master key beside"
_ELSEWHERE = "new master key elsewhere"
"""Rows of `meta` that say where the last rewrap wrote its master key: one of them is there."""


class MasterKeyChanged(KeyManagerError):
    """The keyring is under another master key than the one at hand; nothing else is wrong."""


@dataclass(frozen=True, slots=True)
class UnwrappedKey:
    """A key with the material of its versions; none where `info.problem` is set."""

    info: KeyInfo
    spec: KeySpec
    materials: Mapping[int, bytes] = field(repr=False)


class Keyring:
    """An open keyring; see `xkiproxy.kmi.base.KeyManager`. Every method raises KeyManagerError."""

    def __init__(self, path: Path, master_key: str, source: str = _GIVEN) -> None:
        """Open a keyring that is there already.

        `master_key` is 32 bytes in Base64 or hex; `source` says where it came from, in messages.

        Raises:
            KeyManagerError: no such file, not a keyring, damaged, or another master key's.
        """
        secret = _parse_master_key(master_key, source)
        self._source = source
        self._database = Database(path, _KIND)
        try:
            salt, check = self._meta("salt"), self._meta("check")
            self._check = _derive(secret, salt, _CHECK_INFO)
            self._compare(check)
        except BaseException:
            self._database.close()
            raise
        self._cipher = AESGCM(_derive(secret, salt, _KEK_INFO))

    def create(self, key_id: str, spec: KeySpec) -> KeyInfo:
        """Make a key of `spec` with version 1; refuses an ID that is taken."""
        check_key_id(key_id)
        now = time.time()
        with self._database.writing() as connection:
            if self._read(connection, key_id):
                raise KeyManagerError(f"{self._place(key_id)}: there is a key of this name already")
            connection.execute("INSERT INTO keys VALUES (?, ?, ?)", (key_id, spec.value, now))
            self._add_version(connection, key_id, spec, 1, now)
        return KeyInfo(key_id, spec, (1,), now)

    def get(self, key_id: str) -> KeyInfo | None:
        """What is known of a key, or None."""
        with self._database.reading() as connection:
            keys = self._read(connection, key_id)
        return keys[0].info if keys else None

    def list(self) -> list[KeyInfo]:
        """All keys, by ID."""
        return [key.info for key in self.unwrap_all()]

    def rotate(self, key_id: str) -> KeyInfo:
        """Add a version; the older ones go on decrypting."""
        with self._database.writing() as connection:
            info = self._existing(connection, key_id)
            if info.problem or info.spec is None:
                raise KeyManagerError(f"{self._place(key_id)}: {info.problem}")
            self._add_version(connection, key_id, info.spec, info.version + 1, time.time())
            return self._existing(connection, key_id)

    def destroy(self, key_id: str) -> None:
        """Delete every version and overwrite it in the file; copies elsewhere are not reached."""
        with self._database.writing() as connection:
            self._existing(connection, key_id)
            connection.execute("DELETE FROM versions WHERE key_id = ?", (key_id,))
            connection.execute("DELETE FROM keys WHERE id = ?", (key_id,))
        self._cut_log()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def unwrap_all(self) -> Sequence[UnwrappedKey]:
        """Every key with its material, by ID."""
        with self._database.reading() as connection:
            return self._read(connection, None)

    def generation(self) -> tuple[int, int]:
        """Something that changes whenever the keyring does, by whatever process: cheap."""
        return self._database.generation()

    def check_master_key(self) -> None:
        """Compare the master key with the file once more, as a sign that it can be read."""
        self._compare(self._meta("check"))

    def rewrap(self, master_key: str, place: Path, *, beside: bool) -> int:
        """Wrap every version anew under another master key, whole or not at all; returns how many.

        `master_key` must be in the file `place`, durably: a moment later nothing else opens the
        keyring. `beside`: from there it goes to the place of the old one.

        Raises:
            KeyManagerError: it is the same master key, or a version does not unwrap.
        """
        secret = _parse_master_key(master_key, str(place))
        salt = os.urandom(_SALT_SIZE)
        check, cipher = _derive(secret, salt, _CHECK_INFO), AESGCM(_derive(secret, salt, _KEK_INFO))
        self._refuse_same(secret, place)
        with self._database.writing() as connection:
            rows = [
                (_wrapped(cipher, name, spec, number, material), name, number)
                for name, spec, materials in self._all_sound(connection)
                for number, material in materials.items()
            ]
            connection.executemany(_REWRAP, rows)
            connection.execute("DELETE FROM meta")
            where = (_BESIDE if beside else _ELSEWHERE, os.fsencode(place))
            meta = [("salt", salt), ("check", check), where]
            connection.executemany("INSERT INTO meta VALUES (?, ?)", meta)
        self._check, self._cipher, self._source = check, cipher, str(place)
        with suppress(KeyManagerError):  # it is done: what fails now must not hide where the key is
            self._cut_log()
        return len(rows)

    def wrap(self, key_id: str, spec: KeySpec, version: int, material: bytes) -> bytes:
        """Wrap the material of one version: 12 bytes of nonce, ciphertext, 16 bytes of tag."""
        return _wrapped(self._cipher, key_id, spec, version, material)

    def _unwrap(self, key_id: str, spec: KeySpec, version: int, wrapped: bytes) -> bytes:
        nonce, ciphertext = wrapped[:_NONCE_SIZE], wrapped[_NONCE_SIZE:]
        if len(nonce) != _NONCE_SIZE:
            raise InvalidTag
        return self._cipher.decrypt(nonce, ciphertext, _binding(key_id, spec, version))

    def _add_version(
        self,
        connection: sqlite3.Connection,
        key_id: str,
        spec: KeySpec,
        version: int,
        created: float,
    ) -> None:
        wrapped = self.wrap(key_id, spec, version, os.urandom(KEY_SIZES[spec]))
        connection.execute(
            "INSERT INTO versions VALUES (?, ?, ?, ?)", (key_id, version, wrapped, created)
        )

    def _cut_log(self) -> None:
        """Have what was deleted or overwritten leave the file's log, too."""
        with self._database.reading() as connection:
            # The log still holds the rows until it is carried over and cut off. While another
            # process reads, this does nothing, and the next one to write does it.
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _refuse_same(self, secret: bytes, place: Path) -> None:
        if hmac.compare_digest(_derive(secret, self._meta("salt"), _CHECK_INFO), self._check):
            raise KeyManagerError(
                f"keyring {self._database.path}: {place} holds the master key that it has already;"
                " nothing was changed"
            )

    def _all_sound(
        self, connection: sqlite3.Connection
    ) -> Iterator[tuple[str, KeySpec, Mapping[int, bytes]]]:
        """Every key; refuses if one does not unwrap, which a rewrap would put beyond repair."""
        for key in self._read(connection, None):
            if key.info.problem:
                raise KeyManagerError(
                    f"{self._place(key.info.key_id)}: {key.info.problem}, or delete the key;"
                    " nothing was changed"
                )
            yield key.info.key_id, key.spec, key.materials

    def _existing(self, connection: sqlite3.Connection, key_id: str) -> KeyInfo:
        keys = self._read(connection, key_id)
        if not keys:
            raise KeyManagerError(f"{self._place(key_id)}: there is no such key")
        return keys[0].info

    def _read(self, connection: sqlite3.Connection, key_id: str | None) -> Sequence[UnwrappedKey]:
        # One statement, so that keys and versions are of the same moment.
        rows = connection.execute(_SELECT, (key_id,)).fetchall()
        # A rewrap never goes back: if the check is ours now, the rows were ours.
        self._compare(self._meta("check"))
        groups = groupby(rows, key=itemgetter(0, 1, 2))
        return [self._key(name, KeySpec(spec), made, g) for (name, spec, made), g in groups]

    def _key(
        self, key_id: str, spec: KeySpec, created: float, rows: Iterable[tuple[Any, ...]]
    ) -> UnwrappedKey:
        versions: dict[int, bytes] = {row[3]: row[4] for row in rows if row[3] is not None}
        # 0 stands for a version that is gone: with a problem, nothing uses it.
        numbers = tuple(versions) or (0,)
        problem = "" if versions else "its versions are gone; restore the keyring from a backup"
        materials = {}
        for number, wrapped in versions.items():
            try:
                materials[number] = self._unwrap(key_id, spec, number, wrapped)
            except InvalidTag:
                problem = f"version {number} was altered; restore the keyring from a backup"
        info = KeyInfo(key_id, spec, numbers, created, problem=problem)
        return UnwrappedKey(info, spec, {} if problem else materials)

    def _meta(self, name: str) -> bytes:
        value = self._meta_or_none(name)
        if value is None:
            raise KeyManagerError(
                f"keyring {self._database.path}: its {name} is gone; restore it from a backup"
            )
        return value

    def _meta_or_none(self, name: str) -> bytes | None:
        with self._database.reading() as connection:
            row = connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if row is None else bytes(row[0])

    def _compare(self, check: bytes) -> None:
        if not hmac.compare_digest(check, self._check):
            raise MasterKeyChanged(
                f"keyring {self._database.path}: the master key in {self._source} is not the one"
                f" that this keyring is wrapped under{self._whereabouts()}"
            )

    def _whereabouts(self) -> str:
        """Where the master key is that the last rewrap has made, as far as the keyring knows."""
        beside, elsewhere = self._meta_or_none(_BESIDE), self._meta_or_none(_ELSEWHERE)
        if beside is not None and os.path.lexists(beside):
            return (
                f"; a rewrap that was interrupted left that in {os.fsdecode(beside)}:"
                " finish it with: xkiproxy keyring rewrap"
            )
        if elsewhere is not None:
            return (
                f"; the last rewrap wrote that to {os.fsdecode(elsewhere)}:"
                f" it belongs into {self._source}"
            )
        return ""

    def _place(self, key_id: str) -> str:
        return f"keyring {self._database.path}: key {key_id}"


def open_keyring(settings: SoftwareSettings) -> Keyring:
    """Open the keyring of a KMI; raises KeyManagerError, or SecretError for the master key.

    A worker process was handed the master key that its server was started with. If a rewrap has put
    another in its place since then, that is the one: the keyring itself tells whether it is.
    """
    source = settings.master_key
    try:
        return Keyring(settings.keyring, source.read(), str(source))
    except MasterKeyChanged:
        return Keyring(settings.keyring, source.read_anew(), str(source))


def create_keyring(path: Path, master_key: str) -> None:
    """Make an empty keyring of mode 0600; `master_key` is 32 bytes in Base64 or hex.

    Raises:
        KeyManagerError: the file is there already, or cannot be made.
    """
    secret = _parse_master_key(master_key, _GIVEN)
    salt = os.urandom(_SALT_SIZE)
    rows = [("salt", salt), ("check", _derive(secret, salt, _CHECK_INFO))]
    try:
        with new_database(path, _KIND) as connection:
            connection.executemany("INSERT INTO meta VALUES (?, ?)", rows)
    except FileExistsError:
        raise KeyManagerError(f"keyring {path}: is there already; it was left as it is") from None


def new_master_key() -> str:
    """A new master key: 32 random bytes in Base64, 44 characters."""
    return base64.b64encode(os.urandom(_MASTER_KEY_SIZE)).decode()


def _parse_master_key(text: str, source: str) -> bytes:
    try:
        return parse_key(text)
    except ValueError as error:
        raise KeyManagerError(f"master key in {source}: {error}") from None


def _derive(secret: bytes, salt: bytes, info: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=salt, info=info).derive(secret)


def _wrapped(cipher: AESGCM, key_id: str, spec: KeySpec, version: int, material: bytes) -> bytes:
    nonce = os.urandom(_NONCE_SIZE)
    return nonce + cipher.encrypt(nonce, material, _binding(key_id, spec, version))


def _binding(key_id: str, spec: KeySpec, version: int) -> bytes:
    name, kind = key_id.encode(), spec.value.encode()
    parts = (_LENGTH.pack(len(name)), name, _LENGTH.pack(len(kind)), kind, _VERSION.pack(version))
    return b"".join(parts)
