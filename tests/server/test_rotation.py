"""Certificate, credential and policy change by SIGHUP under a thousand requests a second."""

from __future__ import annotations

import hashlib
import json
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cloud import Cloud
from harness import make_certificate
from test_end_to_end import BASE, wait_for
from test_policies_server import Guarded

_POLICY = "permit(principal, action, resource);"
_RATE = 1000
_SECONDS = 8


class Rotated(Guarded):
    """An installation with a certificate of an authority, which can make another."""

    def __init__(self, directory: Path, workers: int) -> None:
        super().__init__(directory, workers)
        self.policy.write_text(_POLICY)
        self._authority: Any = make_certificate(directory, "authority", common_name="authority")
        self.authority = directory / "authority.crt"
        self.trust = ssl.create_default_context(cafile=str(self.authority))
        self.make_certificate()

    def make_certificate(self) -> None:
        make_certificate(self.directory / "tls", issuer=self._authority)


@pytest.fixture(params=[1, 2], ids=["one process", "two workers"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rotated]:
    made = Rotated(tmp_path / "demo", request.param)
    made.start()
    yield made
    made.stop()


def load_on(server: Rotated, results: Path) -> subprocess.Popen[str]:
    """The load generator: its requests are due at fixed times, and each answer is checked."""
    credentials = server.directory.parent / "first.toml"
    credentials.write_bytes((server.directory / "credentials" / "demo.toml").read_bytes())
    credentials.chmod(0o600)
    return subprocess.Popen(
        [
            sys.executable, "-m", "benchmarks", "load", "--url", f"https://localhost:{server.port}",
            "--credentials", str(credentials), "--ca", str(server.authority),
            "--rate", str(_RATE), "--connections", "16", "--seconds", str(_SECONDS),
            "--json", str(results),
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def presented(server: Rotated) -> bytes:
    """The fingerprint of the certificate that a new connection gets."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", server.port)) as sock,
        context.wrap_socket(sock) as secured,
    ):
        certificate = secured.getpeercert(binary_form=True)
    assert certificate is not None
    return hashlib.sha256(certificate).digest()


def hang_up(server: Rotated) -> None:
    """SIGHUP, and wait until it has been obeyed."""
    before = server.status()["reload"]["number"]
    assert server.process is not None
    server.process.send_signal(signal.SIGHUP)
    wait_for(lambda: server.status()["reload"]["number"] > before)
    assert server.status()["reload"]["problems"] == []


def status_of(server: Rotated, cloud: Cloud, call: str = "health", key: str = "") -> int:
    path = f"{BASE}/keys/{key}/{call}" if key else f"{BASE}/{call}"
    body = cloud.body(**({"Plaintext": "eA=="} if call == "encrypt" else {}))
    return server.send(path, body, cloud.headers(path, body))[0]


def test_what_is_new_holds_on_the_next_request_and_no_request_fails(
    server: Rotated, tmp_path: Path
) -> None:
    results = tmp_path / "load.json"
    load = load_on(server, results)
    wait_for(lambda: server.sample("xkiproxy_requests_total") > _RATE)
    for _ in range(2):
        added = json.loads(server.run("credentials", "add", "--json").stdout)
        fresh = Cloud(added["access_key_id"], added["access_key_secret"], host=server.cloud.host)
        assert status_of(server, fresh) == 401
        old = presented(server)
        server.make_certificate()
        server.policy.write_text(
            _POLICY + '\nforbid(principal, action, resource) when { context.access_key_id == "'
            f'{fresh.access_key_id}" }};'
        )
        hang_up(server)
        assert presented(server) != old
        assert status_of(server, fresh) == 200
        assert status_of(server, fresh, "encrypt", "demo-key") == 403
        server.run("credentials", "revoke", fresh.access_key_id)
        hang_up(server)
        assert status_of(server, fresh) == 401
    said, _ = load.communicate(timeout=60)
    assert load.returncode == 0, said  # an error or a wrong answer would be 1
    result = next(iter(json.loads(results.read_text()).values()))
    assert result["ok"] >= 0.9 * _RATE * _SECONDS
    assert (result["errors"], result["wrong"], result["reconnects"]) == ({}, 0, 0)
