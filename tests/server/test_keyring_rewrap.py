"""A rewrap beside a running server: it goes on with the keys it has, and says so."""

from __future__ import annotations

import base64
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_end_to_end import wait_for
from test_workers import Workers


@pytest.fixture(params=[1, 2], ids=["one process", "two workers"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Workers]:
    made = Workers(tmp_path / "demo", request.param)
    made.start()
    yield made
    made.stop(signal.SIGKILL)


def test_it_goes_on_and_a_restart_takes_all_over(server: Workers) -> None:
    old = server.encrypt(b"before")[1]
    server.run("keyring", "rewrap")
    wait_for(lambda: server.sample("xkiproxy_kmi_state", state="degraded") > 0)
    assert server.admin("readyz")[0] == 200
    for _ in range(20):
        status, made = server.encrypt(b"after")
        assert status == 200
        assert server.decrypt(made) == b"after"
        assert server.decrypt(old) == b"before"
    server.run("keys", "disable", "demo-key")  # states come from the catalog
    wait_for(lambda: server.encrypt(b"x")[0] == 403)
    server.run("keys", "enable", "demo-key")
    server.run("keys", "rotate", "demo-key")
    wait_for(lambda: server.encrypt(b"x")[0] == 200)
    server.stop()
    assert "restart the server" in server.output.read_text()
    server.start()
    assert server.sample("xkiproxy_kmi_state", state="degraded") == 0
    assert server.decrypt(made) == b"after"
    assert server.decrypt(old) == b"before"
    assert server.encrypt(b"x")[0] == 200


def test_a_start_names_the_command_that_finishes_a_rewrap(server: Workers) -> None:
    server.stop()
    old, new = (server.directory / name for name in ("master.key", "master.key.new"))
    before = old.read_text()
    server.run("keyring", "rewrap")
    old.rename(new)  # as a kill before the move leaves it
    old.touch(0o600)
    old.write_text(before)
    refused = server.run("serve", status=1)
    assert f"left that in {new}" in refused.stderr
    assert "xkiproxy keyring rewrap" in refused.stderr
    server.run("keyring", "rewrap")
    server.start()
    assert server.encrypt(b"x")[0] == 200


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    made = Workers(tmp_path / "demo")
    yield made
    made.stop(signal.SIGKILL)


def kill(server: Workers, number: int) -> int:
    """The process ID of a worker that is no more."""
    pid = server.pids()[number]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: server.pids().get(number) not in {None, pid})
    return pid


def test_a_worker_that_is_replaced_opens_the_keyring_with_the_new_master_key(
    workers: Workers,
) -> None:
    """It was handed the one of the start; the others go on as they are, until they are replaced."""
    workers.start()
    old = workers.encrypt(b"before")[1]
    workers.run("keyring", "rewrap")
    wait_for(lambda: workers.sample("xkiproxy_kmi_state", state="degraded") > 0)
    before = workers.pids()
    kill(workers, 1)
    wait_for(lambda: workers.admin("readyz")[0] == 200)
    assert workers.pids()[2] == before[2]
    states = [worker["kmis"][0]["state"] for worker in workers.status()["workers"]]
    assert states == ["connected", "degraded"]
    assert workers.sample("xkiproxy_kmi_state", state="degraded") == 1
    for _ in range(20):
        assert workers.encrypt(b"after")[0] == 200
        assert workers.decrypt(old) == b"before"
    workers.run("keys", "rotate", "demo-key")
    new = newest(workers)
    # Who does not know a version must not say that its ciphertext is wrong.
    assert {decrypted(workers, new) for _ in range(20)} <= {200, 503}
    kill(workers, 2)
    wait_for(lambda: workers.sample("xkiproxy_kmi_state", state="degraded") == 0)
    wait_for(lambda: workers.admin("readyz")[0] == 200)
    assert {decrypted(workers, new) for _ in range(20)} == {200}
    assert workers.decrypt(old) == b"before"


def newest(server: Workers) -> dict[str, Any]:
    """A ciphertext of the second version, which the worker makes that knows it."""
    found: list[dict[str, Any]] = []

    def is_made() -> bool:
        found.append(server.encrypt(b"rotated")[1])
        return version(found[-1]) == 2

    wait_for(is_made)
    return found[-1]


def version(made: dict[str, Any]) -> int:
    """The version that a ciphertext names, in its first five bytes (`crypto/envelope.py`)."""
    return int.from_bytes(base64.b64decode(made["CiphertextBlob"])[1:5], "big")


def decrypted(server: Workers, made: dict[str, Any]) -> int:
    fields = {name: made[name] for name in ("CiphertextBlob", "Iv")}
    return server.call("decrypt", "demo-key", **fields)[0]


def test_a_master_key_that_somebody_else_puts_in_place_is_asked_for_by_name(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker cannot be replaced without it; the other one goes on."""
    credentials, new = workers.directory.parent / "held", workers.directory / "new.key"
    credentials.mkdir()
    held = (workers.directory / "master.key").rename(credentials / "master.key")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    text = workers.config.read_text()
    workers.config.write_text(re.sub('"[^"]*master.key"', '{ credential = "master.key" }', text))
    workers.start()
    workers.run("keyring", "rewrap", "--new-master-key", str(new))
    os.kill(workers.pids()[1], signal.SIGKILL)
    said = f"wrote that to {new}: it belongs into $CREDENTIALS_DIRECTORY/master.key"

    def is_asked_for() -> bool:
        lines = workers.output.read_text().splitlines()
        return any("worker 1 cannot start" in line and said in line for line in lines)

    wait_for(is_asked_for)
    for _ in range(5):
        assert workers.encrypt(b"x")[0] == 200
    held.write_text(new.read_text())
    wait_for(lambda: workers.admin("readyz")[0] == 200)
    assert [worker["kmis"][0]["state"] for worker in workers.status()["workers"]] == [
        "connected", "degraded",
    ]  # fmt: skip
