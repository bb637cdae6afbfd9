"""Keys that await deletion are shown as metrics, so that somebody is told before they are gone."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from test_end_to_end import Installation, wait_for
from test_workers import Workers

from xkiproxy.config import load_config
from xkiproxy.crypto.operations import KeyState
from xkiproxy.server.runtime import Runtime

DAY = 86_400
PENDING = "xkiproxy_keys_pending_deletion"
DESTRUCTION = "xkiproxy_key_destruction_timestamp_seconds"

SECOND = """
[[kmi]]
name = "other"
type = "software"
keyring = "keyring.db"
master_key = "master.key"

[[keystore]]
name = "second"
protocol = "xki"
path_prefix = "/second"
kmi = ["other", "local"]
credentials = "credentials/demo.toml"
keys = ["demo-*"]
"""


@pytest.fixture(params=[1, 2], ids=["one process", "two workers"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Workers]:
    made = Workers(tmp_path / "demo", request.param)
    made.start()
    yield made
    made.stop()


def shown(server: Workers, keystore: str = "demo") -> tuple[float, float | None]:
    """How many keys of a key store await deletion, and when the first is destroyed."""
    text, label = server.admin("metrics")[1], f'{{keystore="{keystore}"}}'
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if label in line)
    when = values.get(DESTRUCTION + label)
    return float(values[PENDING + label]), None if when is None else float(when)


def test_a_deletion_is_shown_until_it_is_cancelled(server: Workers) -> None:
    assert shown(server) == (0, None)
    before = time.time()
    server.run("keys", "delete", "demo-key", "--days", "7")
    wait_for(lambda: shown(server)[0] == 1)
    when = shown(server)[1]
    assert when is not None
    assert before + 8 * DAY <= when <= time.time() + 8 * DAY
    server.run("keys", "create", "another")
    server.run("keys", "delete", "another", "--days", "30")
    wait_for(lambda: shown(server) == (2, when))
    server.run("keys", "delete", "demo-key", "--cancel")
    wait_for(lambda: shown(server)[0] == 1)
    later = shown(server)[1]
    assert later is not None
    assert later > when + 20 * DAY
    server.run("keys", "delete", "another", "--cancel")
    wait_for(lambda: shown(server) == (0, None))


def test_what_no_key_store_may_use_is_shown_for_none(server: Workers) -> None:
    server.run("keys", "delete", "demo-key", "--days", "7")
    wait_for(lambda: shown(server)[0] == 1)
    when = shown(server)[1]
    assert shown(server, "") == (0, None)
    text = server.config.read_text()
    server.config.write_text(text + 'keys = ["payroll-*"]\n')
    server.run("reload")
    assert shown(server) == (0, None)
    assert shown(server, "") == (1, when)  # it will be destroyed all the same
    server.config.write_text(text)
    server.run("reload")
    assert shown(server) == (1, when)
    assert shown(server, "") == (0, None)


def test_it_is_shown_by_whichever_worker_is_there(tmp_path: Path) -> None:
    server = Workers(tmp_path / "demo")
    server.run("keys", "delete", "demo-key", "--days", "7")
    server.start()
    found = shown(server)
    assert found[0] == 1
    os.kill(server.pids()[1], signal.SIGKILL)  # the one that destroys keys
    deadline = time.monotonic() + 30
    while server.sample("xkiproxy_worker_restarts_total") == 0:
        assert shown(server) == found
        assert time.monotonic() < deadline, "the worker was not replaced"
    wait_for(lambda: server.admin("readyz")[0] == 200)
    assert shown(server) == found
    server.stop()


def test_a_key_at_two_kmis_is_one_key_and_what_is_due_has_a_day_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Installation(tmp_path / "proxy")
    made.config.write_text(made.config.read_text() + SECOND)
    made.run("keys", "enable", "demo-key", "--kmi", "other")
    runtime = Runtime(load_config(made.config))
    now = time.time()
    monkeypatch.setattr("xkiproxy.server.runtime.time.time", lambda: now)
    for entry in runtime.catalog.entries():
        due = now - 300 * DAY if entry.kmi == "local" else now + DAY
        pending = replace(entry, state=KeyState.PENDING_DELETION, deletion_time=due)
        runtime.catalog.put(pending)
    asyncio.run(look(runtime))
    snapshot = runtime.metrics.collection.snapshot()
    assert snapshot[PENDING] == {("",): [0], ("demo",): [1], ("second",): [1]}
    # Nobody has watched it yet, so it is as if its date had come this moment.
    assert snapshot[DESTRUCTION] == {("demo",): [now + DAY], ("second",): [now + DAY]}
    began, now = now, now + 600
    asyncio.run(watch(runtime))
    now += 600
    asyncio.run(watch(runtime))
    assert runtime.metrics.collection.snapshot()[DESTRUCTION]["demo",] == [began + 600 + DAY]
    asyncio.run(runtime.close())


async def look(runtime: Runtime) -> None:
    await runtime._refresh()


async def watch(runtime: Runtime) -> None:
    await runtime._purge()
    await runtime._refresh()
