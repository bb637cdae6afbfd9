"""When access keys were used last: merged, kept, and never in the way."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from xkiproxy.keystores.last_use import LastUse, last_use_path, read_last_use


def test_processes_merge_and_later_times_win(tmp_path: Path) -> None:
    path = last_use_path(tmp_path / "catalog.db")
    one, other = LastUse(path), LastUse(path)
    one.of("demo")["a"] = 5.0
    other.of("demo").update({"a": 3.0, "b": 4.0})
    other.of("second")
    one.write()
    other.write()
    assert read_last_use(path) == {"demo": {"a": 5.0, "b": 4.0}}
    assert path.stat().st_mode & 0o777 == 0o600
    one.of("demo")["a"] = 6.0
    one.write()
    assert read_last_use(path) == {"demo": {"a": 6.0, "b": 4.0}}
    assert [file.name for file in tmp_path.iterdir()] == ["last-use.json"]


def test_nothing_new_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "last-use.json"
    kept = LastUse(path)
    kept.write()
    kept.of("demo")
    kept.write()
    assert not path.exists()
    kept.of("demo")["a"] = 1.0
    kept.write()
    path.unlink()
    kept.write()
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "{", "3", '{"demo": 3}', '{"demo": {"a": "x"}}', "[]"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, text: str) -> None:
    path = tmp_path / "last-use.json"
    path.write_text(text)
    kept = LastUse(path)
    kept.of("demo")["a"] = 1.0
    kept.write()
    assert read_last_use(path) == {"demo": {"a": 1.0}}


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    kept = LastUse(tmp_path / "gone" / "last-use.json")
    kept.of("demo")["a"] = 1.0
    with pytest.raises(OSError, match="gone"):
        kept.write()


def test_many_that_write_at_the_same_moment_lose_nothing(tmp_path: Path) -> None:
    path = last_use_path(tmp_path / "catalog.db")
    writers = [LastUse(path) for _ in range(8)]

    def write_often(number: int) -> None:
        for at in range(20):
            writers[number].of("demo")[f"{number}-{at}"] = 1.0
            writers[number].write()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write_often, range(8)))
    assert len(read_last_use(path)["demo"]) == 8 * 20
