"""A keyring in a folder of its own, and a way to plant known material in it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import pytest

from xkiproxy.crypto.algorithms import KeySpec
from xkiproxy.kmi.software import Keyring, SoftwareLane, create_keyring, new_master_key

Plant = Callable[[str, KeySpec, Mapping[int, bytes]], None]


@pytest.fixture
def master_key() -> str:
    return new_master_key()


@pytest.fixture
def path(tmp_path: Path, master_key: str) -> Path:
    create_keyring(tmp_path / "keyring.db", master_key)
    return tmp_path / "keyring.db"


@pytest.fixture
def keyring(path: Path, master_key: str) -> Iterator[Keyring]:
    opened = Keyring(path, master_key, "the test")
    yield opened
    opened.close()


@pytest.fixture
def plant(path: Path, keyring: Keyring) -> Iterator[Plant]:
    """Write a key with the given material: what the product has no way to do."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:

        def write(key_id: str, spec: KeySpec, materials: Mapping[int, bytes]) -> None:
            connection.execute("BEGIN")
            connection.execute("INSERT INTO keys VALUES (?, ?, 1.0)", (key_id, spec))
            for version, material in materials.items():
                row = (key_id, version, keyring.wrap(key_id, spec, version, material), 1.0)
                connection.execute("INSERT INTO versions VALUES (?, ?, ?, ?)", row)
            connection.execute("COMMIT")

        yield write


@pytest.fixture
def lane(path: Path, master_key: str) -> Iterator[SoftwareLane]:
    opened = SoftwareLane(Keyring(path, master_key, "the test"))
    yield opened
    opened.close()
