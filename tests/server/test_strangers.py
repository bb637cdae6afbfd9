"""A flood of requests that nobody has signed: what of it stands in the audit log."""

from __future__ import annotations

import http.client
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from cloud import Cloud
from test_end_to_end import BASE, wait_for
from test_workers import Workers

from xkiproxy.server.strangers import Strangers

RATE = 5
BURST = 10 * RATE
FLOOD = 600


def test_a_bucket() -> None:
    strangers = Strangers(2)
    assert [strangers.admit(100.0) for _ in range(21)] == [True] * 20 + [False]
    assert [strangers.admit(101.0) for _ in range(3)] == [True, True, False]
    assert [strangers.admit(1e6) for _ in range(21)] == [True] * 20 + [False]


def test_a_summary_tells_of_all_and_is_bounded() -> None:
    strangers = Strangers(1)
    assert strangers.summary() is None
    for number in range(1000):
        strangers.leave_out("demo", "Unauthorized", "signature", f"192.0.2.{number % 200}")
    strangers.leave_out("other", "InvalidSignature", "missing", "192.0.2.0")
    summary = strangers.summary()
    assert summary is not None
    assert summary["count"] == 1001
    assert summary["refused"] == [
        {"keystore": "demo", "code": "Unauthorized", "reason": "signature", "count": 1000},
        {"keystore": "other", "code": "InvalidSignature", "reason": "missing", "count": 1},
    ]
    assert len(summary["sources"]) == 17
    assert sum(summary["sources"].values()) == 1001
    assert strangers.summary()["count"] == 1001  # type: ignore[index] # until it is written
    strangers.forget()
    assert strangers.summary() is None


@pytest.mark.parametrize("workers", [1, 2])
def test_a_flood(tmp_path: Path, workers: int) -> None:
    server = Workers(tmp_path / "demo", workers)
    text = server.config.read_text()
    server.config.write_text(f"{text}\n[audit]\nrefusals_per_second = {RATE}\n")
    server.start()
    try:
        liar = Cloud(server.cloud.access_key_id, "not-the-secret-0123456789", server.cloud.host)
        assert flood(server, liar, FLOOD) == {401}
        assert server.encrypt(b"a good request among them")[0] == 200
        assert flood(server, server.cloud, 100, key="no-such-key") == {404}

        def counted() -> int:
            return sum(record["count"] for record in left_out(server))

        wait_for(lambda: refused(server, 401) + counted() == FLOOD)
        assert refused(server, 401) < BURST * workers + 60 * RATE
        assert refused(server, 404) == 100  # who has signed has a record of each
        assert refused(server, 200) == 1
        assert counted() > FLOOD / 3
        for record in left_out(server):
            assert record["sources"] == {"127.0.0.1": record["count"]}
            (kind,) = record["refused"]
            assert kind["reason"] == "signature"
            assert record["first"] <= record["time"]
        assert server.sample("xkiproxy_auth_failures_total", reason="signature") == FLOOD
        flood(server, liar, FLOOD)
        assert server.stop() == 0
        assert refused(server, 401) + counted() == 2 * FLOOD  # nothing is lost by the stop
        server.run("audit", "verify")
    finally:
        server.stop(signal.SIGKILL)


def flood(server: Workers, cloud: Cloud, count: int, key: str = "demo-key") -> set[int]:
    """The statuses of so many requests over one connection."""
    path, body = f"{BASE}/keys/{key}/encrypt", cloud.body(Plaintext="aGVsbG8=")
    connection = http.client.HTTPSConnection(
        "localhost", server.port, context=server.trust, timeout=30
    )
    found = set()
    for _ in range(count):
        connection.request("POST", path, body, cloud.headers(path, body))
        response = connection.getresponse()
        response.read()
        found.add(response.status)
    connection.close()
    return found


def refused(server: Workers, status: int) -> int:
    return sum(record.get("status") == status for record in server.records())


def left_out(server: Workers) -> list[dict[str, Any]]:
    found = [record for record in server.records() if record.get("event") == "refusals_left_out"]
    assert "not-the-secret" not in json.dumps(found)
    return found
