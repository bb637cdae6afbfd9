"""Several worker processes on one port: they share what must be shared and are replaced."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hsm import children
from test_end_to_end import BASE, Installation, wait_for

from xkiproxy.kmi.base import BreakReason
from xkiproxy.protocols.base import REASONS

_TITLE = re.compile(r"xkiproxy: worker (\d+)")


class Workers(Installation):
    """A server of several processes."""

    def __init__(self, directory: Path, workers: int = 2) -> None:
        super().__init__(directory)
        text = self.config.read_text().replace("workers = 1 ", f"workers = {workers} ")
        # A worker that is being replaced may hold one up: that is not what is tested here.
        self.config.write_text(text + "deadline_ms = 5000\n")

    def pids(self) -> dict[int, int]:
        assert self.process is not None
        found = {}
        for pid, title in children(self.process.pid).items():
            match = _TITLE.fullmatch(title)
            if match:
                found[int(match[1])] = pid
        return found

    def status(self) -> dict[str, Any]:
        status, text = self.admin("status")
        assert status == 200
        found: dict[str, Any] = json.loads(text)
        return found

    def sample(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples, of those with these labels."""
        text = self.admin("metrics")[1]
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        lines = [
            line
            for line in text.splitlines()
            if re.match(rf"{name}[{{ ]", line) and all(label in line for label in wanted)
        ]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def records(self) -> list[dict[str, Any]]:
        files = sorted(self.directory.glob("audit*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Workers]:
    made = Workers(tmp_path / "demo")
    made.start()
    yield made
    made.stop()


def test_all_workers_serve_and_are_counted_together(server: Workers) -> None:
    for _ in range(60):
        status, made = server.encrypt(b"hello")
        assert status == 200
        assert server.decrypt(made) == b"hello"
    assert server.sample("xkiproxy_requests_total") == 120
    assert server.sample("xkiproxy_request_duration_seconds_count") == 120
    assert server.sample("xkiproxy_audit_records_total") == 120
    assert server.sample("xkiproxy_build_info") == 1
    assert server.sample("xkiproxy_kmi_state") == 1
    assert server.sample("xkiproxy_kmi_lanes") == 2
    assert len(server.records()) == 120
    files = {file.name: len(file.read_text()) for file in server.directory.glob("audit*.jsonl")}
    assert set(files) == {"audit-1.jsonl", "audit-2.jsonl"}
    assert all(files.values())  # each connection is a new one: the kernel spreads them
    status = server.status()
    assert status["ready"]
    assert {worker["pid"] for worker in status["workers"]} == set(server.pids().values())


def test_what_may_go_wrong_is_counted_from_zero_on(server: Workers) -> None:
    """Else the first burst, which may be all there is, would be no change for Prometheus."""
    lines = server.admin("metrics")[1].splitlines()
    for reason in REASONS:
        assert f'xkiproxy_auth_failures_total{{keystore="demo",reason="{reason}"}} 0.0' in lines
    for reason in BreakReason:
        assert f'xkiproxy_kmi_lane_restarts_total{{kmi="local",reason="{reason}"}} 0.0' in lines
    assert 'xkiproxy_shed_total{keystore="demo",reason="overload"} 0.0' in lines
    for code in ("ServiceUnavailable", "Timeout", "InternalServerError"):
        labels = f'code="{code}",keystore="demo",operation="encrypt",protocol="xki"'
        assert f"xkiproxy_requests_total{{{labels}}} 0.0" in lines
    assert 'xkiproxy_kmi_left_alone{kmi="local"} 0.0' in lines


def test_a_replay_to_any_worker_is_refused(server: Workers) -> None:
    path = f"{BASE}/health"
    for _ in range(20):
        body = server.cloud.body()
        headers = server.cloud.headers(path, body)
        answers = [server.send(path, body, headers)[0] for _ in range(4)]
        assert answers == [200, 401, 401, 401]


def test_a_worker_that_dies_is_replaced_and_stays_counted(server: Workers) -> None:
    for _ in range(20):
        assert server.call("health")[0] == 200
    assert server.sample("xkiproxy_requests_total") == 20
    before = server.pids()
    os.kill(before[1], signal.SIGKILL)
    wait_for(lambda: server.pids().get(1) not in {None, before[1]})

    def is_ready() -> bool:
        # Nobody may ask it before it serves: that would take its first words away.
        assert server.admin("metrics")[0] == 200
        return server.admin("readyz")[0] == 200

    wait_for(is_ready)
    assert server.pids()[2] == before[2]
    assert server.sample("xkiproxy_requests_total") == 20
    assert server.sample("xkiproxy_worker_restarts_total") == 1
    for _ in range(20):
        assert server.call("health")[0] == 200
    assert server.sample("xkiproxy_requests_total") == 40


def test_a_key_disabled_beside_it_is_disabled_at_all_workers(server: Workers) -> None:
    server.run("keys", "disable", "demo-key")
    time.sleep(1)
    assert {server.encrypt(b"x")[0] for _ in range(20)} == {403}


def test_an_orderly_end_under_load(server: Workers) -> None:
    """SIGTERM: what has begun is answered, and nothing is left behind."""
    outcomes: list[int] = []
    stopping = threading.Event()

    def client() -> None:
        while not stopping.is_set():
            try:
                outcomes.append(server.call("health")[0])
            except OSError:  # not accepted any more
                return

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    pids = server.pids()
    assert server.stop() == 0
    stopping.set()
    for thread in threads:
        thread.join()
    assert set(outcomes) == {200}
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())


def test_workers_do_not_outlive_their_supervisor(server: Workers) -> None:
    pids = server.pids()
    server.stop(signal.SIGKILL)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids.values()))


def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    made = Workers(tmp_path / "demo")
    (made.directory / "audit-2.jsonl").mkdir()
    done = made.run("serve", status=1)
    assert "audit-2.jsonl: Is a directory" in done.stderr
    assert "worker 2 did not start" in done.stderr


def test_lanes_are_divided(tmp_path: Path) -> None:
    from xkiproxy.config.models import Pkcs11Settings

    settings = Pkcs11Settings(
        name="hsm", type="pkcs11", module=tmp_path / "m", token="t", pin=tmp_path / "p", lanes=5
    )
    assert [settings.share(index, 3).lanes for index in range(3)] == [2, 2, 1]


def test_metrics_are_read_while_a_worker_ends(server: Workers) -> None:
    """Who meets the end of a worker first may be whoever reads the metrics."""
    (pid, *_) = server.pids().values()
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while server.sample("xkiproxy_worker_restarts_total") == 0:
        assert server.admin("metrics")[0] == 200
        assert time.monotonic() < deadline, "the worker was not replaced"
    wait_for(lambda: server.admin("readyz")[0] == 200)
