"""Quotas and source networks in a running server, in one process and in several."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_end_to_end import BASE
from test_workers import Workers

from xkiproxy.config import ConfigError, load_config
from xkiproxy.server.networks import Network, Networks


@pytest.fixture(params=[1, 2], ids=["one process", "two workers"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Workers]:
    made = Workers(tmp_path / "demo", request.param)
    yield made
    made.stop()


def add(server: Workers, text: str) -> None:
    with server.config.open("a") as file:
        file.write(text)


def retry_after(server: Workers) -> tuple[int, str | None]:
    path, body = f"{BASE}/keys/demo-key/meta", server.cloud.body()
    connection = http.client.HTTPSConnection(
        "localhost", server.port, context=server.trust, timeout=30
    )
    with contextlib.closing(connection):
        connection.request("POST", path, body, server.cloud.headers(path, body))
        response = connection.getresponse()
        response.read()
        return response.status, response.getheader("Retry-After")


def test_a_quota_holds_over_all_workers(server: Workers) -> None:
    add(server, "quota.key = { rate = 0.001, burst = 10 }\n")
    server.start()
    outcomes = [server.encrypt(b"x") for _ in range(14)]
    assert [status for status, _ in outcomes] == [200] * 10 + [429] * 4
    assert outcomes[-1][1]["Code"] == "TooManyRequests"
    status, seconds = retry_after(server)
    assert (status, 900 <= int(seconds or 0) <= 1000) == (429, True)
    assert server.encrypt(b"x", "another-key")[0] == 404  # its own quota
    assert server.call("health")[0] == 200
    assert server.sample("xkiproxy_shed_total", reason="quota_key") == 5
    assert sum(record.get("quota") == "key" for record in server.records()) == 5
    server.config.write_text(server.config.read_text().replace("burst = 10", "burst = 12"))
    assert "the settings of key store demo have changed" in server.run("reload").stdout
    # What has been taken counts: a reload gives no new quota.
    assert [server.encrypt(b"x")[0] for _ in range(4)] == [200, 200, 429, 429]


def test_with_a_full_replay_window_nothing_is_taken_for_a_replay(server: Workers) -> None:
    text = server.config.read_text()
    server.config.write_text(text.replace("[server]\n", "[server]\nreplay_capacity = 64\n", 1))
    server.start()
    outcomes = [server.encrypt(b"x") for _ in range(200)]
    assert {status for status, _ in outcomes} == {200, 429}
    assert retry_after(server) == (429, "1")
    assert server.sample("xkiproxy_shed_total", reason="replay_window") > 0
    assert "replay" not in {record.get("reason") for record in server.records()}


def test_a_network_that_is_not_admitted(server: Workers) -> None:
    add(server, 'source_networks = ["192.0.2.0/24", "2001:db8::/32"]\n')
    server.start()
    for call, key in (("health", ""), ("meta", "demo-key")):
        status, answer = server.call(call, key)
        assert (status, answer["Code"]) == (403, "AccessForbidden")
    headers = {"host": "localhost"}
    assert server.send(f"{BASE}/health", b"unsigned", headers)[0] == 403  # before the signature
    assert server.sample("xkiproxy_auth_failures_total", reason="source_network") == 3
    assert {record["reason"] for record in server.records()} == {"source_network"}
    text = server.config.read_text()
    server.config.write_text(text.replace("192.0.2.0/24", "127.0.0.0/8"))
    assert "the settings of key store demo have changed" in server.run("reload").stdout
    assert {server.call("health")[0] for _ in range(8)} == {200}


@pytest.mark.parametrize(
    ("address", "admitted"),
    [
        ("192.0.2.1", True),
        ("192.0.3.1", False),
        ("::ffff:192.0.2.9", True),
        ("::ffff:192.0.3.9", False),
        ("2001:db8::1", True),
        ("2001:db9::1", False),
        ("2001:db8::1%eth0", True),
        ("", False),
        ("here", False),
    ],
)
def test_addresses(address: str, admitted: bool) -> None:
    listed: list[Network] = [
        ipaddress.ip_network("192.0.2.0/24"), ipaddress.ip_network("2001:db8::/32")
    ]  # fmt: skip
    networks = Networks(listed)
    assert [networks.admit(address), networks.admit(address)] == [admitted, admitted]


def test_what_is_remembered_of_addresses_does_not_grow() -> None:
    networks = Networks([ipaddress.ip_network("::/0")])
    assert all(networks.admit(f"2001:db8::{number:x}") for number in range(10_000))
    assert len(networks._verdicts) <= 4096


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('source_networks = ["192.0.2.1/24"]', "keystore[0].source_networks[0]"),
        ('source_networks = ["here"]', "keystore[0].source_networks[0]"),
        ("source_networks = [3]", "keystore[0].source_networks[0]"),
        ("source_networks = []", "keystore[0].source_networks"),
        ("quota.all = { rate = 0 }", "keystore[0].quota.all.rate"),
        ("quota.key = { burst = 5 }", "keystore[0].quota.key.rate"),
        ("quota.principal = { rate = 1, burst = 0 }", "keystore[0].quota.principal.burst"),
        ("quota.nobody = { rate = 1 }", "keystore[0].quota.nobody"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, where: str) -> None:
    made = Workers(tmp_path / "demo", 1)
    add(made, text + "\n")
    with pytest.raises(ConfigError) as caught:
        load_config(made.config)
    assert [problem.where for problem in caught.value.problems] == [where]
