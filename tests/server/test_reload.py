"""A changed configuration taken over by a running server: whole or not at all, nothing lost."""

from __future__ import annotations

import hashlib
import http.client
import json
import random
import ssl
import threading
import time
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cloud import Cloud
from harness import make_certificate
from test_end_to_end import BASE, Installation
from test_workers import Workers

SECOND = """
[[keystore]]
name = "second"
protocol = "xki"
path_prefix = "/second"
kmi = ["local"]
credentials = "credentials/demo.toml"
deadline_ms = 5000
"""


@pytest.fixture(params=[1, 2], ids=["one process", "two workers"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Workers]:
    made = Workers(tmp_path / "demo", request.param)
    made.start()
    yield made
    made.stop()


def reload(server: Installation) -> list[str]:
    changes: list[str] = json.loads(server.run("reload", "--json").stdout)["changes"]
    return changes


def refused(server: Installation) -> str:
    done = server.run("reload", status=1)
    assert "nothing was changed" in done.stderr
    return done.stderr


def everywhere(server: Installation, cloud: Cloud) -> set[int]:
    """The answers to some requests, on connections of their own: they reach all workers."""
    path, answers = f"{BASE}/health", set()
    for _ in range(12):
        body = cloud.body()
        answers.add(server.send(path, body, cloud.headers(path, body))[0])
    return answers


def presented(server: Installation) -> str:
    pem = ssl.get_server_certificate(("localhost", server.port))
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()


def test_credentials_are_rotated(server: Workers) -> None:
    added = json.loads(server.run("credentials", "add", "--json").stdout)
    host = server.cloud.host
    fresh = Cloud(added["access_key_id"], added["access_key_secret"], host=host)
    assert everywhere(server, fresh) == {401}
    warning = f"does not know {fresh.access_key_id} yet: run xkiproxy reload"
    older = server.cloud.access_key_id
    asked = server.run("kms-config", "--json")
    assert warning in asked.stderr
    assert json.loads(asked.stdout)["AccessKeyId"] == fresh.access_key_id
    assert "reload" not in server.run("kms-config", "--access-key-id", older).stderr
    assert reload(server) == [f"key store demo has the new credential {fresh.access_key_id}"]
    assert "reload" not in server.run("kms-config").stderr
    assert everywhere(server, fresh) == {200} == everywhere(server, server.cloud)
    server.run("credentials", "revoke", server.cloud.access_key_id)
    (change,) = reload(server)
    assert change == f"key store demo has the credential {server.cloud.access_key_id} no more"
    assert everywhere(server, server.cloud) == {401}
    assert everywhere(server, fresh) == {200}
    assert reload(server) == []


def test_the_certificate_is_replaced(server: Workers) -> None:
    """Connections that are there stay and are served; new ones meet the new certificate."""
    old = http.client.HTTPSConnection("localhost", server.port, context=server.trust, timeout=30)
    old.connect()
    before = presented(server)
    make_certificate(server.directory / "tls")
    changes = reload(server)
    after = presented(server)
    assert changes == [f"the certificate is now sha256-{after}"]
    assert after != before
    assert {presented(server) for _ in range(12)} == {after}
    path, body = f"{BASE}/health", server.cloud.body()
    old.request("POST", path, body, server.cloud.headers(path, body))
    assert old.getresponse().read().startswith(b'{"RequestId"')
    old.close()


@pytest.mark.parametrize(("begins", "ends"), [(-9, -1), (1, 9)], ids=["expired", "too early"])
def test_a_certificate_out_of_its_time_replaces_none(
    server: Workers, begins: int, ends: int
) -> None:
    """It is served after a start, for then there is none to keep: who pins it may still come."""
    before = presented(server)
    make_certificate(
        server.directory / "tls", begins=timedelta(days=begins), ends=timedelta(days=ends)
    )
    said = "expired on" if ends < 0 else "is not valid before"
    assert f"server.crt: {said}" in refused(server)
    assert {presented(server) for _ in range(8)} == {before}
    assert everywhere(server, server.cloud) == {200}
    server.stop()
    server.start()
    assert presented(server) != before
    (line, *_) = [line for line in server.output.read_text().splitlines() if "all the same" in line]
    assert "ERROR" in line
    assert f"server.crt: {said}" in line
    # And it keeps nobody from changing the rest.
    server.run("credentials", "add")
    assert "has the new credential" in reload(server)[0]


def test_key_stores_come_and_go(server: Workers) -> None:
    original = server.config.read_text()
    path = "/second/kms/xki/v1/health"

    def ask() -> int:
        body = server.cloud.body()
        return server.send(path, body, server.cloud.headers(path, body))[0]

    assert ask() == 404
    server.config.write_text(original + SECOND)
    assert reload(server) == ["key store second is new"]
    assert {ask() for _ in range(8)} == {200}
    server.config.write_text(original.replace("deadline_ms = 5000", "deadline_ms = 4000"))
    assert set(reload(server)) == {
        "key store second is no more",
        "the settings of key store demo have changed",
    }
    assert {ask() for _ in range(8)} == {404}


def test_a_replay_is_refused_after_a_reload_too(server: Workers) -> None:
    path, body = f"{BASE}/health", server.cloud.body()
    headers = server.cloud.headers(path, body)
    assert server.send(path, body, headers)[0] == 200
    server.run("credentials", "add")
    reload(server)
    assert {server.send(path, body, headers)[0] for _ in range(6)} == {401}


def test_a_mistake_changes_nothing_and_is_named(server: Workers) -> None:
    original = server.config.read_text()
    credentials = server.directory / "credentials" / "demo.toml"
    certificate = server.directory / "tls" / "server.crt"
    saved = {file: file.read_text() for file in (server.config, credentials, certificate)}
    before = presented(server)
    server.run("credentials", "add")  # good, beside something bad: it is not taken either
    added = tomllib.loads(credentials.read_text())["credential"][-1]
    fresh = Cloud(added["access_key_id"], added["access_key_secret"], host=server.cloud.host)
    good = credentials.read_text()
    broken = [
        (server.config, original + "nonsense", "not valid TOML"),
        (server.config, original + SECOND.replace("local", "no"), "keystore[1].kmi[0]"),
        (server.config, original.replace('"local"', '"other"'), "kmi: cannot change"),
        (server.config, original.replace("workers = ", "workers = 1"), "server.workers: cannot"),
        (credentials, "[[credential]]\n", "keystore[0]"),
        (certificate, "nonsense", "server.tls"),
    ]
    random.shuffle(broken)
    for file, text, named in broken:
        file.write_text(text)
        assert named in refused(server), text
        file.write_text(good if file == credentials else saved[file])
        assert everywhere(server, server.cloud) == {200}
        assert everywhere(server, fresh) == {401}
        assert presented(server) == before
    assert not [record for record in server.records() if record.get("event") == "reload_ok"]
    assert [record for record in server.records() if record.get("event") == "reload_failed"]
    # Two are seen by the command already, which then asks the server for nothing.
    assert server.sample("xkiproxy_reloads_total", outcome="failed") == len(broken) - 2
    assert server.sample("xkiproxy_config_last_reload_successful") == 0
    reload(server)
    assert server.sample("xkiproxy_reloads_total", outcome="ok") == 1
    assert server.sample("xkiproxy_config_last_reload_successful") == 1
    assert everywhere(server, fresh) == {200}


def test_the_last_use_of_each_credential_is_listed(server: Workers) -> None:
    unused = json.loads(server.run("credentials", "add", "--json").stdout)["access_key_id"]
    reload(server)
    before = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert everywhere(server, server.cloud) == {200}
    reload(server)  # what was seen before it is not forgotten
    server.stop()
    listed = json.loads(server.run("credentials", "list", "--json").stdout)
    used = {row["access_key_id"]: row["last_used"] for row in listed}
    assert used[server.cloud.access_key_id] >= before
    assert used[unused] is None
    assert "not seen" in server.run("credentials", "list").stdout


def test_under_load_nothing_is_lost(server: Workers) -> None:
    """Credentials, certificates and key stores change; clients see no error."""
    original = server.config.read_text()
    trust = ssl.create_default_context()
    trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
    outcomes: list[int] = []
    stopping = threading.Event()

    def client(keeps: bool) -> None:
        connection = None
        while not stopping.is_set():
            if connection is None or not keeps:
                connection = http.client.HTTPSConnection(
                    "localhost", server.port, context=trust, timeout=30
                )
            path, body = f"{BASE}/health", server.cloud.body()
            connection.request("POST", path, body, server.cloud.headers(path, body))
            answer = connection.getresponse()
            answer.read()
            outcomes.append(answer.status)
            if not keeps:
                connection.close()

    threads = [threading.Thread(target=client, args=(keeps,)) for keeps in (True, True, False)]
    for thread in threads:
        thread.start()
    for round_ in range(4):
        server.run("credentials", "add", "--keystore", "demo")
        make_certificate(server.directory / "tls")
        server.config.write_text(original + (SECOND if round_ % 2 == 0 else ""))
        assert len(reload(server)) == 3
        time.sleep(0.1)
    stopping.set()
    for thread in threads:
        thread.join()
    assert len(outcomes) > 100
    assert set(outcomes) == {200}
    events = [record for record in server.records() if record.get("event") == "reload_ok"]
    assert len(events) >= 4
    assert not any(server.cloud.secret in json.dumps(event) for event in events)


def test_without_a_server(tmp_path: Path) -> None:
    made = Installation(tmp_path / "demo")
    assert "is the server running?" in made.run("reload", status=1).stderr
    assert made.run("kms-config").stderr == ""


def test_the_server_of_another_directory_is_refused(server: Workers, tmp_path: Path) -> None:
    """It would go on with a credential that was revoked, and the command would say: done."""
    other = Installation(tmp_path / "other")
    text = other.config.read_text().replace(str(other.admin_port), str(server.admin_port))
    other.config.write_text(text)
    said = refused(other)
    assert str(server.config.resolve()) in said
    assert str(other.config.resolve()) in said
    assert "an admin_listen of its own" in said
    assert server.status()["reload"]["number"] == 0


def test_a_link_to_the_configuration_is_the_same_file(server: Workers, tmp_path: Path) -> None:
    (tmp_path / "link.toml").symlink_to(server.config)
    done = server.run("reload", "--config", str(tmp_path / "link.toml"), config=False)
    assert "nothing has changed" in done.stdout


def test_the_date_of_the_oldest_credential_is_shown(server: Workers) -> None:
    name = "xkiproxy_credential_created_timestamp_seconds"
    path = server.directory / "credentials" / "demo.toml"
    (first,) = tomllib.loads(path.read_text())["credential"]
    made = datetime.fromisoformat(first["created"]).timestamp()
    assert server.sample(name, keystore="demo") == made
    path.write_text(path.read_text().replace(first["created"], "2025-01-01T00:00:00Z"))
    server.run("credentials", "add", "--keystore", "demo")
    original = server.config.read_text()
    server.config.write_text(original + SECOND)
    reload(server)
    oldest = datetime(2025, 1, 1, tzinfo=UTC).timestamp()
    for keystore in ("demo", "second"):
        assert server.sample(name, keystore=keystore) == oldest
    server.run("credentials", "revoke", first["access_key_id"], "--keystore", "demo")
    server.config.write_text(original)
    reload(server)
    assert server.sample(name, keystore="demo") > made - 1
    assert 'keystore="second"' not in "".join(
        line for line in server.admin("metrics")[1].splitlines() if line.startswith(name)
    )
