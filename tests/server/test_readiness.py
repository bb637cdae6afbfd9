"""When a load balancer may send requests: what /readyz says with a KMI away, and at the end."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hsm import make_hsm
from test_end_to_end import Installation, wait_for
from test_failover_server import TwoKmis
from test_workers import Workers

DELAY = 4.0


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoKmis]:
    made = TwoKmis(tmp_path / "demo", make_hsm(tmp_path / "hsm", monkeypatch))
    # The second's token is not there; nothing else is wrong.
    head, _, tail = made.config.read_text().rpartition('token = "t1"')
    made.config.write_text(f'{head}token = "none"{tail}')
    yield made
    made.stop(signal.SIGKILL)


def test_a_kmi_that_is_away_is_a_problem_and_no_obstacle(two: TwoKmis) -> None:
    two.start()
    wait_for(lambda: "kmi second is disconnected" in two.admin("status")[1])
    assert two.admin("readyz") == (200, "ok\n")
    assert two.encrypt(b"served by the first")[0] == 200
    assert "ready, with problems" in two.admin("")[1]
    assert "kmi second is disconnected" in two.admin("")[1]


@pytest.fixture(params=[1, 2], ids=["one process", "two workers"])
def slow_to_stop(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Workers]:
    made = Workers(tmp_path / "demo", request.param)
    text = made.config.read_text()
    made.config.write_text(
        text.replace("[server]\n", f"[server]\nshutdown_delay_seconds = {DELAY}\n", 1)
    )
    made.start()
    yield made
    made.stop(signal.SIGKILL)


def terminate(server: Installation) -> None:
    assert server.process is not None
    server.process.send_signal(signal.SIGTERM)


def test_it_serves_on_while_balancers_notice(slow_to_stop: Workers) -> None:
    assert slow_to_stop.process is not None
    began = time.monotonic()
    terminate(slow_to_stop)
    wait_for(lambda: slow_to_stop.admin("readyz") == (503, "it is being stopped\n"))
    while time.monotonic() < began + DELAY - 1.5:
        assert slow_to_stop.encrypt(b"a request of the last seconds")[0] == 200
    assert slow_to_stop.process.wait(timeout=30) == 0
    assert time.monotonic() - began >= DELAY
    assert "still serving" in slow_to_stop.output.read_text()


def test_a_second_signal_ends_the_delay(slow_to_stop: Workers) -> None:
    assert slow_to_stop.process is not None
    text = slow_to_stop.config.read_text()
    slow_to_stop.stop()
    slow_to_stop.config.write_text(text.replace(f"= {DELAY}\n", "= 300\n"))
    slow_to_stop.start()
    terminate(slow_to_stop)
    wait_for(lambda: slow_to_stop.admin("readyz")[0] == 503)
    terminate(slow_to_stop)
    assert slow_to_stop.process.wait(timeout=30) == 0
