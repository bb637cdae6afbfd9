"""What commands do to keys beside a running server stands in its audit log."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from test_end_to_end import wait_for
from test_workers import Workers

from xkiproxy.crypto.algorithms import Usage
from xkiproxy.crypto.operations import KeyState
from xkiproxy.keystores.catalog import CatalogEntry
from xkiproxy.keystores.sqlite_catalog import SqliteCatalog
from xkiproxy.server.key_changes import KeyChanges


@pytest.fixture(params=[1, 2], ids=["one process", "two workers"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Workers]:
    made = Workers(tmp_path / "demo", request.param)
    made.start()
    yield made
    made.stop(signal.SIGKILL)


def changes(server: Workers) -> list[dict[str, Any]]:
    return [record for record in server.records() if record.get("event") == "key_changed"]


def test_each_change_has_one_record(server: Workers) -> None:
    steps: list[tuple[list[str], Any, Any]] = [
        (["create", "payroll"], None, {"state": "ENABLED", "usage": ["encrypt", "decrypt"]}),
        (["rotate", "payroll"], {"version": 1}, {"version": 2, "state": "ENABLED"}),
        (["disable", "payroll"], "ENABLED", "DISABLED"),
        (["label", "payroll", "stage=test"], {"state": "DISABLED"}, {"labels": {"stage": "test"}}),
        (
            ["usage", "payroll", "decrypt"],
            {"usage": ["encrypt", "decrypt"]},
            {"usage": ["decrypt"]},
        ),
        (["forget", "payroll"], "DISABLED", None),
        (["enable", "payroll"], None, "ENABLED"),
        (["delete", "payroll", "--days", "7"], "ENABLED", "PENDING_DELETION"),
    ]
    for number, (command, before, after) in enumerate(steps, 1):
        server.run("keys", *command)
        wait_for(lambda number=number: len(changes(server)) == number)
        record = changes(server)[-1]
        assert (record["kmi"], record["key"]) == ("local", "payroll")
        # Of a key that is gone there is no entry that could say it.
        assert record["by"] is None if after is None else f"({os.getuid()})" in record["by"]
        for wanted, found in ((before, record["before"]), (after, record["after"])):
            if isinstance(wanted, dict):
                assert {name: found[name] for name in wanted} == wanted
            else:
                assert (found and found["state"]) == wanted
    assert "deletion_time" in changes(server)[-1]["after"]
    found = server.run("audit", "search", "--key", "payroll", "--json").stdout
    assert found.count("key_changed") == 8
    assert "payroll" in server.run("audit", "search", "--key", "payroll").stdout
    server.stop()
    server.run("audit", "verify")


def test_the_rotation_of_a_key_that_is_not_registered_has_its_record(server: Workers) -> None:
    server.run("keys", "create", "payroll")
    wait_for(lambda: len(changes(server)) == 1)
    for command in ("disable", "forget"):
        server.run("keys", command, "payroll")
    wait_for(lambda: changes(server)[-1]["after"] is None)
    known = len(changes(server))
    steps: list[tuple[list[str], Any, Any]] = [
        (["rotate"], None, {"state": "UNREGISTERED", "version": 2}),
        (
            ["rotate"],
            {"state": "UNREGISTERED", "version": 2},
            {"state": "UNREGISTERED", "version": 3},
        ),
        (
            ["enable"],
            {"state": "UNREGISTERED", "version": 3},
            {"state": "ENABLED", "version": 3, "usage": ["encrypt", "decrypt"]},
        ),
    ]
    for number, ((command,), before, after) in enumerate(steps, known + 1):
        wait_for(lambda: server.encrypt(b"x", "payroll")[0] == 404)
        server.run("keys", command, "payroll")
        wait_for(lambda number=number: len(changes(server)) == number)
        record = changes(server)[-1]
        assert (record["kmi"], record["key"]) == ("local", "payroll")
        assert (record["before"], record["after"]) == (before, after)
        assert f"({os.getuid()})" in record["by"]
    searched = "audit", "search", "--key", "payroll", "--operation", "key_changed"
    found = [json.loads(line) for line in server.run(*searched, "--json").stdout.splitlines()]
    assert [record["after"] for record in found[-3:]] == [after for _, _, after in steps]
    assert f"version 2 -> 3; by {record['by']}" in server.run(*searched).stdout
    server.stop()
    server.run("audit", "verify")


def test_what_could_not_be_written_is_written_later(tmp_path: Path) -> None:
    catalog, beside = (SqliteCatalog(tmp_path / "catalog.db") for _ in range(2))
    beside.put(CatalogEntry("local", "old", KeyState.ENABLED, Usage.BOTH, 0.0))
    catalog.refresh()
    noted = KeyChanges(catalog)
    assert list(noted.records()) == []
    beside.put(CatalogEntry("local", "old", KeyState.DISABLED, Usage.ENCRYPT, 0.0))
    beside.put(CatalogEntry("local", "new", KeyState.ENABLED, Usage.BOTH, 0.0))
    catalog.refresh()
    first, second = noted.records()
    assert (first["key"], first["before"]) == ("new", None)
    assert second["after"] == {"state": "DISABLED", "usage": ["encrypt"]}
    beside.remove("local", "old")
    catalog.refresh()
    assert [record["after"] for record in noted.records()] == [first["after"], None]
    noted.forget()
    assert list(noted.records()) == []
    due = CatalogEntry("local", "due", KeyState.PENDING_DELETION, Usage.BOTH, 0.0, 1.0)
    for entry in (due, replace(due, watched_since=2.0, watched_until=2.0)):
        beside.put(entry)
        catalog.refresh()
        (record,) = noted.records()
        noted.forget()
    assert record["after"]["destruction_time"] == datetime.fromtimestamp(2.0 + 86_400, UTC)
    beside.put(replace(due, watched_since=2.0, watched_until=62.0))
    catalog.refresh()
    assert list(noted.records()) == []  # it goes on being watched, which is no news
    json.dumps(first["after"])
