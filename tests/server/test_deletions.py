"""A server destroys a key once it has said for a day that it will, whatever the catalog says."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from test_end_to_end import Installation, wait_for

from xkiproxy.config import load_config
from xkiproxy.crypto.operations import KeyState
from xkiproxy.keystores.sqlite_catalog import SqliteCatalog
from xkiproxy.kmi.registry import open_key_manager
from xkiproxy.server.runtime import Runtime

DAY = 86_400
KEPT = "xkiproxy keys delete demo-key --kmi local --cancel"


@pytest.fixture
def made(tmp_path: Path) -> Installation:
    """A proxy with the catalog of a year ago, when its key was about to be deleted."""
    found = Installation(tmp_path / "proxy")
    put_back(found, time.time() - 360 * DAY)
    return found


def put_back(made: Installation, deletion_time: float) -> None:
    catalog = SqliteCatalog(made.directory / "catalog.db")
    (entry,) = catalog.entries()
    state = KeyState.PENDING_DELETION
    catalog.put(replace(entry, state=state, deletion_time=deletion_time))
    catalog.close()


class Server:
    """The housekeeping of a server, at times that are set."""

    def __init__(self, made: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runtime = Runtime(load_config(made.config))
        self.now = time.time()
        monkeypatch.setattr("xkiproxy.server.runtime.time.time", lambda: self.now)

    def pass_time(self, seconds: int) -> None:
        for _ in range(0, seconds, 600):
            self.now += 600
            asyncio.run(self.look())

    async def look(self) -> None:
        self.runtime.catalog.refresh()
        await self.runtime._purge()

    def close(self) -> None:
        asyncio.run(self.runtime.close())


def names(made: Installation) -> list[str]:
    return [line.split()[0] for line in made.run("keys", "list").stdout.splitlines()[1:]]


def test_a_catalog_that_was_put_back_destroys_nothing_unannounced(
    made: Installation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(made, monkeypatch)
    server.pass_time(DAY)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert KEPT in caplog.text
    assert names(made) == ["demo-key"]
    server.close()
    server = Server(made, monkeypatch)  # said again by each run
    server.now += DAY
    asyncio.run(server.look())
    assert caplog.text.count(KEPT) == 2
    made.run("keys", "delete", "demo-key", "--cancel")
    server.pass_time(2 * DAY)
    assert caplog.text.count(KEPT) == 2
    assert names(made) == ["demo-key"]
    server.close()


def test_what_is_meant_is_destroyed_a_day_later(
    made: Installation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(made, monkeypatch)
    server.pass_time(DAY + 600)
    assert "destroyed as scheduled" in caplog.text
    assert names(made) == []
    server.close()


@pytest.mark.parametrize(("days", "is_named"), [(-1, True), (6, True), (8, False)])
def test_check_names_what_will_be_destroyed_and_does_not_fail(
    made: Installation, days: int, is_named: bool
) -> None:
    put_back(made, time.time() + days * DAY)
    for options in ([], ["--json"]):
        done = made.run("check", *options)
        assert (KEPT in done.stderr) == is_named
    assert json.loads(done.stdout) == []


def test_a_lost_catalog_is_noticed(made: Installation) -> None:
    file = made.directory / "catalog.db"
    lost = f"1 keys at KMI local are not in the catalog {file}: was it lost?"
    made.start()
    assert made.stop() == 0
    assert "was it lost?" not in made.run("check").stderr + made.output.read_text()
    (made.directory / "catalog.db").unlink()
    assert lost in made.run("check").stderr
    made.start()
    wait_for(lambda: lost in json.dumps(made.output.read_text()))
    assert made.stop() == 0


def test_an_empty_key_manager_has_lost_nothing(made: Installation) -> None:
    config = load_config(made.config)
    with closing(open_key_manager(config.kmi[0])) as manager:
        manager.destroy("demo-key")
    (made.directory / "catalog.db").unlink()
    assert "was it lost?" not in made.run("check").stderr
