"""Encryptions under each version of a key: all processes of a host add up, none counts twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from xkiproxy.crypto.algorithms import Usage
from xkiproxy.crypto.operations import KeyState
from xkiproxy.keystores.catalog import CatalogEntry
from xkiproxy.keystores.encryptions import (
    Encryptions,
    EncryptionsError,
    encryptions_path,
    most_used,
    read_encryptions,
)


def entry(kmi: str, key_id: str) -> CatalogEntry:
    return CatalogEntry(kmi, key_id, KeyState.ENABLED, Usage.BOTH, 0.0)


def test_processes_add_up(tmp_path: Path) -> None:
    catalog = tmp_path / "catalog.db"
    assert read_encryptions(catalog) == {}
    assert not list(tmp_path.iterdir())  # who only looks makes nothing
    one, other = (Encryptions(encryptions_path(catalog)) for _ in range(2))
    one.counted["hsm", "a", 1] += 3
    other.counted["hsm", "a", 1] += 4
    other.counted["hsm", "b", 2] += 2**33
    one.add(one.take())
    other.add(other.take())
    one.add(one.take())  # nothing is counted twice
    assert read_encryptions(catalog) == {("hsm", "a", 1): 7, ("hsm", "b", 2): 2**33}
    one.close()
    other.close()
    assert encryptions_path(catalog).stat().st_mode & 0o777 == 0o600


def test_what_could_not_be_added_is_counted_still(tmp_path: Path) -> None:
    path = tmp_path / "encryptions.db"
    kept = Encryptions(path)
    kept.counted["hsm", "a", 1] += 3
    path.rename(tmp_path / "elsewhere")
    taken = kept.take()
    kept.counted["hsm", "a", 1] += 1  # while it was tried
    with pytest.raises(EncryptionsError, match="no such file; restart"):
        kept.add(taken)
    kept.give_back(taken)
    (tmp_path / "elsewhere").rename(path)
    kept.add(kept.take())
    assert kept.read() == {("hsm", "a", 1): 4}
    kept.close()


def test_a_destroyed_key_leaves_no_count_to_the_next_of_its_name(tmp_path: Path) -> None:
    kept = Encryptions(tmp_path / "encryptions.db")
    kept.add({("hsm", "a", 1): 3, ("hsm", "a", 2): 4, ("hsm", "b", 1): 5, ("other", "a", 1): 6})
    kept.forget("hsm", "a")
    assert kept.read() == {("hsm", "b", 1): 5, ("other", "a", 1): 6}
    kept.close()


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = encryptions_path(tmp_path / "catalog.db")
    path.write_bytes(b"none of ours" * 100)
    path.chmod(0o600)
    with pytest.raises(EncryptionsError, match=r"encryptions\.db: is not a count of encryptions"):
        read_encryptions(tmp_path / "catalog.db")


def test_the_current_version_of_the_most_used_key_counts() -> None:
    counts = {
        ("hsm", "rotated", 1): 900,
        ("hsm", "rotated", 2): 10,
        ("hsm", "plain", 1): 20,
        ("hsm", "destroyed", 1): 1000,
    }
    keys = [entry("hsm", "rotated"), entry("hsm", "plain"), entry("other", "new")]
    assert most_used(counts, keys) == {"hsm": 20, "other": 0}
