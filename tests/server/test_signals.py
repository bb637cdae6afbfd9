"""Signals that come while a server is being started: none is lost, and none leaves a mess."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hsm import children
from test_end_to_end import wait_for
from test_workers import Workers

_SLOW = """
[[kmi]]
name = "slow"
type = "transit"
address = "http://127.0.0.1:{port}"
plaintext = true
start_timeout_seconds = 60
auth.token = "token"
"""


class Silent:
    """A KMI that takes connections and says nothing, until it hangs up on them all."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]

    def was_called(self) -> bool:
        return bool(select.select([self._socket], [], [], 0)[0])

    def hang_up(self) -> None:
        self._socket.close()


@pytest.fixture
def kmi() -> Iterator[Silent]:
    made = Silent()
    yield made
    made.hang_up()


@pytest.fixture(params=[1, 2], ids=["one process", "two workers"])
def starting(request: pytest.FixtureRequest, tmp_path: Path, kmi: Silent) -> Iterator[Workers]:
    """A server that is just being started: it waits for a KMI."""
    made = Workers(tmp_path / "demo", request.param)
    token = made.directory / "token"
    token.touch(0o600)
    token.write_text("the token of a test")
    with made.config.open("a") as file:
        file.write(_SLOW.format(port=kmi.port))
    with made.output.open("ab") as log:
        made.process = subprocess.Popen(
            [sys.executable, "-m", "xkiproxy", "serve", "--config", str(made.config)],
            stdout=log, stderr=log,
        )  # fmt: skip
    wait_for(kmi.was_called)
    yield made
    made.stop(signal.SIGKILL)


def test_a_hangup_during_the_start_is_done_once_it_serves(starting: Workers, kmi: Silent) -> None:
    assert starting.process is not None
    for pid in (starting.process.pid, *children(starting.process.pid)):
        for _ in range(3):
            os.kill(pid, signal.SIGHUP)
    time.sleep(0.5)
    assert starting.process.poll() is None
    kmi.hang_up()
    wait_for(lambda: starting.admin("readyz")[0] == 200)
    wait_for(lambda: starting.status()["reload"]["number"] == 1)
    assert starting.status()["reload"]["problems"] == []
    assert starting.sample("xkiproxy_worker_restarts_total") == 0
    os.kill(starting.process.pid, signal.SIGHUP)
    wait_for(lambda: starting.status()["reload"]["number"] == 2)
    assert starting.stop() == 0


def test_a_hangup_before_the_configuration_is_read(tmp_path: Path) -> None:
    config = tmp_path / "pipe"
    os.mkfifo(config)
    process = subprocess.Popen([sys.executable, "-m", "xkiproxy", "serve", "--config", str(config)])
    with config.open("w"):  # which waits until the server opens it, and then lets it wait
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        assert process.poll() is None
    assert process.wait(timeout=30) == 1  # there was nothing in it


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_during_the_start(starting: Workers, number: signal.Signals) -> None:
    """What has been started is ended in order, and nothing waits for what does not come."""
    assert starting.process is not None
    pids = children(starting.process.pid)
    began = time.monotonic()
    assert starting.stop(number) == 0
    assert time.monotonic() - began < 10
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    log = starting.output.read_text()
    assert "stopping: what has been started is ended" in log
    assert "Traceback" not in log
    assert "ERROR" not in log


def test_a_second_stop_does_not_disturb_the_first(starting: Workers) -> None:
    assert starting.process is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        starting.process.send_signal(number)
    assert starting.process.wait(timeout=30) == 0
    assert "Traceback" not in starting.output.read_text()
