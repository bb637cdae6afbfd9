"""The keyring: what it keeps, and how it fails."""

from __future__ import annotations

import base64
import os
import random
import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import pytest

import xkiproxy.storage
from xkiproxy.config.models import SoftwareSettings
from xkiproxy.config.secrets import SecretError, SecretSource
from xkiproxy.crypto.algorithms import KEY_SIZES, KeySpec
from xkiproxy.kmi.base import KeyManagerError, check_key_id
from xkiproxy.kmi.software import Keyring, create_keyring, new_master_key, open_keyring


def fill(path: Path, master_key: str, count: int = 20) -> dict[str, dict[int, bytes]]:
    """Make keys, close the file, and return every material."""
    keyring = Keyring(path, master_key)
    for number in range(count):
        keyring.create(f"key-{number:02}", list(KeySpec)[number % 4])
        if number % 3 == 0:
            keyring.rotate(f"key-{number:02}")
    contents = materials(keyring)
    keyring.close()
    return contents


def materials(keyring: Keyring) -> dict[str, dict[int, bytes]]:
    return {key.info.key_id: dict(key.materials) for key in keyring.unwrap_all()}


def refused(path: Path, master_key: str, match: str) -> str:
    with pytest.raises(KeyManagerError, match=match) as caught:
        Keyring(path, master_key, "the source")
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("spec", KeySpec)
def test_life_of_a_key(spec: KeySpec, keyring: Keyring) -> None:
    made = keyring.create("k", spec)
    assert (made.key_id, made.spec, made.versions, made.problem) == ("k", spec, (1,), "")
    assert keyring.get("k") == made
    rotated = keyring.rotate("k")
    assert rotated.versions == (1, 2)
    assert rotated.version == 2
    assert keyring.list() == [rotated]
    (key,) = keyring.unwrap_all()
    assert {len(material) for material in key.materials.values()} == {KEY_SIZES[spec]}
    assert key.materials[1] != key.materials[2]
    keyring.destroy("k")
    assert keyring.get("k") is None
    assert keyring.list() == []


def test_keys_outlive_the_process(path: Path, master_key: str) -> None:
    contents = fill(path, master_key)
    keyring = Keyring(path, master_key)
    assert materials(keyring) == contents
    keyring.close()


def test_a_taken_id(keyring: Keyring) -> None:
    made = keyring.create("k", KeySpec.AES_256)
    with pytest.raises(KeyManagerError, match="already"):
        keyring.create("k", KeySpec.SM4)
    assert keyring.get("k") == made


def test_an_unknown_key(keyring: Keyring) -> None:
    for change in (keyring.rotate, keyring.destroy):
        with pytest.raises(KeyManagerError, match="no such key"):
            change("k")


@pytest.mark.parametrize("key_id", ["", ".", "..", "a/b", "a b", "a\n", "ключ", "a" * 129, "a\0"])
def test_refused_key_ids(key_id: str, keyring: Keyring) -> None:
    with pytest.raises(KeyManagerError, match="1 to 128"):
        keyring.create(key_id, KeySpec.AES_256)


@pytest.mark.parametrize("key_id", ["a", "...", ".a", "-", "A-Z_0.9", "a" * 128])
def test_accepted_key_ids(key_id: str) -> None:
    check_key_id(key_id)


def test_only_the_owner_can_read(tmp_path: Path, master_key: str) -> None:
    before = os.umask(0)
    try:
        path = tmp_path / "keyring.db"
        create_keyring(path, master_key)
        keyring = Keyring(path, master_key)
        keyring.create("k", KeySpec.AES_256)
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
        keyring.close()
    finally:
        os.umask(before)
    names = ("keyring.db", "keyring.db-shm", "keyring.db-wal")
    assert modes == dict.fromkeys(names, 0o600)


def test_an_open_mode_is_refused(path: Path, master_key: str) -> None:
    path.chmod(0o604)
    refused(path, master_key, "chmod 0600")


def test_the_file_holds_no_material(path: Path, master_key: str) -> None:
    contents = fill(path, master_key)
    raw = path.read_bytes()
    for versions in contents.values():
        assert not [material for material in versions.values() if material in raw]
    assert base64.b64decode(master_key) not in raw


def test_what_is_destroyed_is_overwritten(path: Path, master_key: str) -> None:
    keyring = Keyring(path, master_key)
    keyring.create("gone", KeySpec.AES_256)
    with keyring._database.reading() as connection:
        (wrapped,) = connection.execute("SELECT wrapped FROM versions").fetchone()
    keyring.destroy("gone")
    for file in (path, path.with_name("keyring.db-wal")):
        assert wrapped not in file.read_bytes()
    keyring.close()


# ---- the master key


def test_master_key_spellings(tmp_path: Path) -> None:
    text = new_master_key()
    assert len(text) == 44
    create_keyring(tmp_path / "keyring.db", text)
    hexadecimal = base64.b64decode(text).hex()
    for spelling in (text, hexadecimal, hexadecimal.upper()):
        Keyring(tmp_path / "keyring.db", spelling).close()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "secret",
        "A" * 44,
        "A" * 43,
        "A" * 43 + "\n",
        "B" * 43 + "=",
        "g" * 64,
        "a" * 63,
        "0" * 65,
        "A" * 42 + "==",
        " " + "A" * 43 + "=",
        "-" * 43 + "=",
    ],
)
def test_what_is_no_master_key(text: str, tmp_path: Path) -> None:
    with pytest.raises(KeyManagerError, match="32 bytes") as caught:
        create_keyring(tmp_path / "keyring.db", text)
    assert not text or text not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_master_key(path: Path, master_key: str) -> None:
    contents = fill(path, master_key)
    wrong = new_master_key()
    message = refused(path, wrong, "not the one")
    assert "the source" in message
    assert wrong not in message
    assert master_key not in message
    keyring = Keyring(path, master_key)
    assert materials(keyring) == contents
    keyring.close()


def test_the_master_key_comes_from_a_private_file(path: Path, master_key: str) -> None:
    file = path.with_name("master.key")
    file.write_text(master_key + "\n")
    file.chmod(0o600)
    source = SecretSource(file=file)
    settings = SoftwareSettings(name="local", type="software", keyring=path, master_key=source)
    open_keyring(settings).close()
    file.chmod(0o644)
    with pytest.raises(SecretError, match="chmod 0600") as caught:
        open_keyring(settings)
    assert master_key not in str(caught.value)
    file.unlink()
    with pytest.raises(SecretError):
        open_keyring(settings)


# ---- files that are not what they should be


def test_a_missing_keyring_is_not_made(tmp_path: Path, master_key: str) -> None:
    refused(tmp_path / "keyring.db", master_key, "xkiproxy keyring create")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_not_replaced(path: Path, master_key: str) -> None:
    before = path.read_bytes()
    with pytest.raises(KeyManagerError, match="there already"):
        create_keyring(path, new_master_key())
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["keyring.db"]


def test_a_folder_that_is_not_there(tmp_path: Path, master_key: str) -> None:
    with pytest.raises(KeyManagerError, match="No such file"):
        create_keyring(tmp_path / "none" / "keyring.db", master_key)


def test_not_a_keyring(tmp_path: Path, master_key: str) -> None:
    path = tmp_path / "file"
    for content in (b"", b"x", b"some text\n" * 1000):
        path.write_bytes(content)
        path.chmod(0o600)
        refused(path, master_key, "not a keyring")
        assert path.read_bytes() == content
    path.unlink()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE keys (id TEXT)")
    path.chmod(0o600)
    refused(path, master_key, "not a keyring")


@pytest.mark.parametrize(("version", "match"), [(2, "newer"), (0, "unknown format")])
def test_another_format(version: int, match: str, path: Path, master_key: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {version}")
    refused(path, master_key, match)


def test_a_header_that_is_overwritten(path: Path, master_key: str) -> None:
    fill(path, master_key)
    damaged = bytearray(path.read_bytes())
    damaged[:100] = os.urandom(100)
    path.write_bytes(damaged)
    refused(path, master_key, "not a keyring")


def test_each_page_destroyed(path: Path, master_key: str) -> None:
    """No page can be lost without a word: every key is there, or the opening says what is wrong."""
    contents = fill(path, master_key)
    good = path.read_bytes()
    for start in range(4096, len(good), 4096):
        path.write_bytes(good[:start] + os.urandom(4096) + good[start + 4096 :])
        refused(path, master_key, "damaged|is gone")
    path.write_bytes(good)
    keyring = Keyring(path, master_key)
    assert materials(keyring) == contents
    keyring.close()


def test_any_flipped_bit(path: Path, master_key: str) -> None:
    """An altered keyring is refused, or the altered key alone is; no key gets other material."""
    contents = fill(path, master_key)
    good = path.read_bytes()
    chance = random.Random(1)
    for _ in range(400):
        damaged = bytearray(good)
        damaged[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            keyring = Keyring(path, master_key)
        except KeyManagerError:
            continue
        found = keyring.unwrap_all()
        keyring.close()
        assert {key.info.key_id for key in found} == contents.keys()
        for key in found:
            assert key.info.problem or key.materials == contents[key.info.key_id]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE versions SET wrapped = zeroblob(60) WHERE key_id = 'a' AND version = 1",
        "UPDATE versions SET wrapped = x'' WHERE key_id = 'a' AND version = 1",
        "UPDATE versions SET wrapped = substr(wrapped, 1, 43) WHERE key_id = 'a' AND version = 2",
        "UPDATE versions SET version = 3 WHERE key_id = 'a' AND version = 2",
        "UPDATE keys SET spec = 'SM4' WHERE id = 'a'",
        "UPDATE versions SET wrapped = (SELECT wrapped FROM versions WHERE key_id = 'b')"
        " WHERE key_id = 'a' AND version = 1",
        "UPDATE versions SET wrapped = (SELECT v.wrapped FROM versions v WHERE v.key_id = 'a'"
        " AND v.version = 3 - versions.version) WHERE key_id = 'a'",
        "DELETE FROM versions WHERE key_id = 'a'",
    ],
)
def test_an_altered_row_makes_one_key_unusable(change: str, keyring: Keyring) -> None:
    keyring.create("a", KeySpec.AES_128)
    keyring.rotate("a")
    good = keyring.create("b", KeySpec.AES_128)
    with keyring._database.writing() as connection:
        connection.execute(change)
    altered = keyring.get("a")
    assert altered is not None
    assert "restore" in altered.problem
    assert keyring.list() == [altered, good]
    assert [len(key.materials) for key in keyring.unwrap_all()] == [0, 1]
    with pytest.raises(KeyManagerError, match="restore"):
        keyring.rotate("a")


def test_a_row_of_another_keyring(keyring: Keyring, tmp_path: Path, master_key: str) -> None:
    """The same master key, another salt: another KEK."""
    keyring.create("k", KeySpec.AES_256)
    create_keyring(tmp_path / "other.db", master_key)
    other = Keyring(tmp_path / "other.db", master_key)
    other.create("k", KeySpec.AES_256)
    with keyring._database.reading() as connection:
        row = connection.execute("SELECT wrapped FROM versions").fetchone()
    with other._database.writing() as connection:
        connection.execute("UPDATE versions SET wrapped = ?", row)
    assert other.list()[0].problem
    other.close()


# ---- what the machine refuses


def fill_up(keyring: Keyring) -> None:
    for number in range(200):
        keyring.create(f"k{number}" + "x" * 100, KeySpec.AES_256)


def test_a_full_database(keyring: Keyring) -> None:
    kept = keyring.create("kept", KeySpec.AES_256)
    with keyring._database.reading() as connection:
        connection.execute("PRAGMA max_page_count = 1")  # the current size, in fact
    with pytest.raises(KeyManagerError, match="the disk is full"):
        fill_up(keyring)
    with keyring._database.reading() as connection:
        connection.execute("PRAGMA max_page_count = 100000")
    keyring.create("later", KeySpec.AES_256)
    assert keyring.get("kept") == kept


def test_a_locked_keyring(path: Path, master_key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert xkiproxy.storage.BUSY_TIMEOUT_SECONDS == 5
    monkeypatch.setattr(xkiproxy.storage, "BUSY_TIMEOUT_SECONDS", 0.01)
    keyring = Keyring(path, master_key)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(KeyManagerError, match="locked by another process"):
            keyring.create("k", KeySpec.AES_256)
        assert keyring.list() == []  # reading goes on
    keyring.create("k", KeySpec.AES_256)
    keyring.close()


def test_a_read_only_keyring(keyring: Keyring) -> None:
    with keyring._database.reading() as connection:
        connection.execute("PRAGMA query_only = ON")
    with pytest.raises(KeyManagerError, match="cannot be written"):
        keyring.create("k", KeySpec.AES_256)


def test_durability_settings(keyring: Keyring) -> None:
    with keyring._database.reading() as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
