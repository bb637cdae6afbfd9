"""A rewrap beside a running server: it goes on with the keys it has, and says so."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

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
