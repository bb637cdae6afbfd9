"""The product as its users meet it: the command, the server process, a cloud, and a kill -9."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import secret_scan
from cloud import SHA256, SM3, Cloud
from hsm import children
from ports import free_ports

BASE = "/demo/kms/xki/v1"

_SHOW_SECRETS = {"credentials", "kms-config", "call"}
"""Commands that are asked to show a secret or a plaintext."""


class Installation:
    """A directory made by `xkiproxy init`, and the server that runs on it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.output = directory.parent / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.printed = ""
        self.run("init", str(directory), config=False)
        self.port, self.admin_port = free_ports(2)
        text = self.config.read_text()
        text = text.replace("0.0.0.0:8443", f"127.0.0.1:{self.port}")
        self.config.write_text(text.replace("127.0.0.1:9464", f"127.0.0.1:{self.admin_port}"))
        credentials = tomllib.loads((directory / "credentials" / "demo.toml").read_text())
        credential = credentials["credential"][0]
        self.cloud = Cloud(
            credential["access_key_id"],
            credential["access_key_secret"],
            host=f"localhost:{self.port}",
        )
        self.trust = ssl.create_default_context(cafile=str(directory / "tls" / "server.crt"))

    @property
    def config(self) -> Path:
        return self.directory / "xkiproxy.toml"

    def run(
        self, *arguments: str, status: int = 0, config: bool = True, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        extra = ["--config", str(self.config)] if config else []
        done = subprocess.run(
            [sys.executable, "-m", "xkiproxy", *arguments, *extra],
            input=stdin, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        self.printed += done.stdout + done.stderr
        if arguments[0] not in _SHOW_SECRETS:
            self._keep("printed.log", done.stdout + done.stderr)
        assert done.returncode == status, done.stdout + done.stderr
        return done

    def _keep(self, name: str, text: str) -> None:
        """For the scan at the end of the run (`secret_scan`)."""
        with (self.directory.parent / name).open("a") as file:
            file.write(text + "\n")

    def _keep_processes(self) -> None:
        """The command lines and environments of the server and what it has started."""
        assert self.process is not None
        pids = [self.process.pid]
        while pids:
            pid = pids.pop()
            for name in ("cmdline", "environ"):
                with contextlib.suppress(OSError):
                    text = Path(f"/proc/{pid}/{name}").read_text(errors="replace")
                    self._keep("processes.log", text.replace("\0", "\n"))
            pids += children(pid)

    def start(self) -> None:
        with self.output.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "xkiproxy", "serve", "--config", str(self.config)],
                stdout=log, stderr=log,
            )  # fmt: skip
        for _ in range(900):
            if self.process.poll() is not None:
                pytest.fail(self.output.read_text())
            if self.admin("readyz")[0] == 200:
                return
            time.sleep(0.05)
        pytest.fail("the server did not become ready:\n" + self.output.read_text())

    def stop(self, number: int = signal.SIGTERM) -> int:
        process, self.process = self.process, None
        if process is None:
            return 0
        if process.poll() is None:
            self.process = process
            self.admin("metrics")
            self.admin("status")
            self._keep_processes()
            self.process = None
        process.send_signal(number)
        return process.wait(timeout=30)

    def admin(self, path: str) -> tuple[int, str]:
        status, text = self._ask_admin(path)
        self._keep("admin.log", text)
        return status, text

    def _ask_admin(self, path: str) -> tuple[int, str]:
        try:
            url = f"http://127.0.0.1:{self.admin_port}/{path}"
            with urllib.request.urlopen(url, timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def send(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPSConnection(
            "localhost", self.port, context=self.trust, timeout=30
        )
        with contextlib.closing(connection):
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def call(
        self, call: str, key: str = "", algorithm: str = SHA256, **fields: Any
    ) -> tuple[int, dict[str, Any]]:
        path = f"{BASE}/keys/{key}/{call}" if key else f"{BASE}/{call}"
        body = self.cloud.body(**fields)
        return self.send(path, body, self.cloud.headers(path, body, algorithm=algorithm))

    def encrypt(self, plaintext: bytes, key: str = "demo-key") -> tuple[int, dict[str, Any]]:
        secret_scan.plaintexts.add(plaintext)
        return self.call("encrypt", key, Plaintext=base64.b64encode(plaintext).decode())

    def decrypt(self, made: dict[str, Any], key: str = "demo-key") -> bytes:
        fields = {name: made[name] for name in ("CiphertextBlob", "Iv")}
        status, answer = self.call("decrypt", key, **fields)
        assert status == 200, answer
        return base64.b64decode(answer["Plaintext"])


@pytest.fixture
def installation(tmp_path: Path) -> Iterator[Installation]:
    made = Installation(tmp_path / "demo")
    yield made
    made.stop(signal.SIGKILL)


@pytest.fixture
def running(installation: Installation) -> Installation:
    installation.start()
    return installation


def code_within_a_second(running: Installation, wanted: str) -> None:
    """The next encrypt but for a second's grace answers with this code."""
    deadline = time.monotonic() + 1.0
    answer: dict[str, Any] = {}
    while time.monotonic() < deadline:
        _, answer = running.encrypt(b"x")
        if answer.get("Code", "OK") == wanted:
            return
    pytest.fail(f"{wanted} did not come within a second: {answer}")


def test_all_five_endpoints_by_the_clouds_signer(running: Installation) -> None:
    for algorithm in (SHA256, SM3):
        status, health = running.call("health", algorithm=algorithm)
        assert (status, health["Status"]) == (200, "ACTIVE")
        status, drawn = running.call("random", algorithm=algorithm, Length=64)
        assert (status, len(base64.b64decode(drawn["Output"]))) == (200, 64)
        status, meta = running.call("meta", "demo-key", algorithm=algorithm)
        assert (status, meta["KeySpec"], meta["KeyState"]) == (200, "Aliyun_AES_256", "ENABLED")
        status, made = running.call(
            "encrypt", "demo-key", algorithm=algorithm, Plaintext="aGVsbG8="
        )
        assert status == 200
        assert running.decrypt(made) == b"hello"


def test_tampered_stale_replayed_and_foreign(running: Installation) -> None:
    path, body = f"{BASE}/health", running.cloud.body()
    headers = running.cloud.headers(path, body)
    assert running.send(path, body + b" ", headers)[1]["Code"] == "Unauthorized"
    assert running.send(path, body, headers)[0] == 200
    assert running.send(path, body, headers)[1]["Code"] == "Unauthorized"
    old = running.cloud.headers(path, body, at=datetime.now(UTC) - timedelta(minutes=20))
    assert running.send(path, body, old)[1]["Code"] == "InvalidAcsDate"
    foreign = Cloud("XKISOMEBODYELSE000000001", "some-other-secret-0123")
    assert running.send(path, body, foreign.headers(path, body))[1]["Code"] == "Unauthorized"


def test_keys_are_changed_beside_a_running_server(running: Installation) -> None:
    _, before = running.encrypt(b"before the rotation")
    running.run("keys", "disable", "demo-key")
    code_within_a_second(running, "KeyDisabledForbidden")
    running.run("keys", "enable", "demo-key")
    code_within_a_second(running, "OK")

    running.run("keys", "rotate", "demo-key")
    deadline = time.monotonic() + 1.0
    version = b""
    while time.monotonic() < deadline and version != b"\x01\x00\x00\x00\x02":
        _, after = running.encrypt(b"after")
        version = base64.b64decode(after["CiphertextBlob"])[:5]
    assert version == b"\x01\x00\x00\x00\x02"
    assert running.decrypt(before) == b"before the rotation"
    assert running.decrypt(after) == b"after"

    running.run("keys", "delete", "demo-key", "--days", "7")
    code_within_a_second(running, "KeyPendingDeletionForbidden")
    running.run("keys", "delete", "demo-key", "--cancel")
    code_within_a_second(running, "KeyDisabledForbidden")
    running.run("keys", "enable", "demo-key")
    code_within_a_second(running, "OK")

    running.run("keys", "create", "second", "--spec", "SM4")
    status, made = running.encrypt(b"sm4", "second")
    assert status == 200
    assert running.decrypt(made, "second") == b"sm4"


def test_keys_and_states_survive_a_kill(running: Installation) -> None:
    _, made = running.encrypt(b"kept")
    running.run("keys", "create", "other")
    running.run("keys", "disable", "other")
    assert running.stop(signal.SIGKILL) == -signal.SIGKILL
    running.start()
    assert running.decrypt(made) == b"kept"
    assert running.encrypt(b"x", "other")[1]["Code"] == "KeyDisabledForbidden"
    (chain,) = json.loads(running.run("audit", "verify", "--json").stdout)["chains"]
    assert chain["records"] >= 3
    assert chain["problems"] == []
    found = running.run("audit", "search", "--key", "other", "--json").stdout.splitlines()
    # Beside it there may be the change of the key itself, if it was seen before the kill.
    codes = [json.loads(line).get("code") for line in found]
    assert [code for code in codes if code] == ["KeyDisabledForbidden"]


def test_encryptions_are_counted_by_version(running: Installation) -> None:
    def shown() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(running.run("keys", "show", "demo-key", "--json").stdout)
        return found

    for _ in range(3):
        _, made = running.encrypt(b"counted")
    running.decrypt(made)
    metrics = running.admin("metrics")[1]
    assert 'xkiproxy_key_encryptions_max{kmi="local"} 0.0' in metrics  # added up once a minute
    running.stop()
    assert (shown()["version"], shown()["encryptions"]) == (1, 3)
    running.start()
    assert 'xkiproxy_key_encryptions_max{kmi="local"} 3.0' in running.admin("metrics")[1]
    running.encrypt(b"counted")
    running.run("keys", "rotate", "demo-key")
    running.stop()
    assert (shown()["version"], shown()["encryptions"]) == (2, 0)
    database = running.directory / "encryptions.db"
    database.write_bytes(b"damaged")
    disabled = running.run("keys", "disable", "demo-key", "--json")
    assert "warning: count of encryptions" in disabled.stderr
    found = json.loads(disabled.stdout)
    assert (found["state"], found["encryptions"]) == ("DISABLED", None)


def test_sigterm_ends_with_status_0(running: Installation) -> None:
    running.encrypt(b"x")
    assert running.stop() == 0
    log = running.output.read_text()
    assert "stopping" in log
    assert "Traceback" not in log


def test_admin_endpoints(running: Installation) -> None:
    running.encrypt(b"x")
    assert running.admin("livez") == (200, "ok\n")
    assert running.admin("readyz") == (200, "ok\n")
    status = json.loads(running.admin("status")[1])
    assert status["ready"] is True
    assert status["keystores"][0]["availability"] == "ACTIVE"
    metrics = running.admin("metrics")[1]
    line = 'xkiproxy_requests_total{code="OK",keystore="demo",operation="encrypt",protocol="xki"}'
    assert f"{line} 1.0" in metrics
    assert "xkiproxy_tls_certificate_expiry_timestamp_seconds" in metrics


def test_without_an_audit_log_nothing_is_served(running: Installation) -> None:
    """The log's folder is moved away; the proxy notices, stops, and recovers when it is back."""
    audit = running.directory / "audit.jsonl"
    assert running.encrypt(b"x")[0] == 200
    audit.rename(running.directory / "old.jsonl")
    audit.mkdir()
    wait_for(lambda: running.admin("readyz")[0] == 503)
    assert running.encrypt(b"x")[1]["Code"] == "ServiceUnavailable"
    assert running.admin("livez")[0] == 200
    audit.rmdir()
    wait_for(lambda: running.admin("readyz")[0] == 200)
    assert running.encrypt(b"x")[0] == 200
    assert len(audit.read_text().splitlines()) >= 2


def test_without_a_readable_catalog_nothing_is_served(running: Installation) -> None:
    catalog = running.directory / "catalog.db"
    assert running.encrypt(b"x")[0] == 200
    for name in ("catalog.db", "catalog.db-wal", "catalog.db-shm"):
        path = running.directory / name
        if path.exists():
            with path.open("r+b") as file:
                file.write(b"garbage" * 1000)
    wait_for(lambda: running.admin("readyz")[0] == 503 or running.process.poll() is not None)
    assert running.encrypt(b"x")[0] == 503
    said = running.admin("metrics")[1]
    assert 'xkiproxy_refusing{part="audit"} 0.0' in said
    assert 'xkiproxy_refusing{part="catalog"} 1.0' in said
    assert catalog.exists()


def wait_for(condition: Any, seconds: float = 45.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("it did not come")
        time.sleep(0.05)


def test_check_compares_the_kmis_of_a_key_store(installation: Installation) -> None:
    shutil.copy(installation.directory / "keyring.db", installation.directory / "second.db")
    text = installation.config.read_text().replace('kmi = ["local"]', 'kmi = ["local", "second"]')
    second = '[[kmi]]\nname = "second"\ntype = "software"\nkeyring = "second.db"\n'
    installation.config.write_text(f"{text}\n{second}")
    installation.run("keys", "enable", "demo-key", "--kmi", "second")
    assert "no problems" in installation.run("check").stdout
    installation.run("keys", "rotate", "demo-key", "--kmi", "second")
    said = " ".join(installation.run("check", status=1).stderr.split())
    assert (
        "keystore[0].kmi: key demo-key: what KMI second encrypts KMI local cannot decrypt" in said
    )
    assert "what KMI local encrypts" not in said  # the second still has the version before


def test_check_names_each_mistake(installation: Installation) -> None:
    assert "no problems" in installation.run("check").stdout
    (installation.directory / "master.key").chmod(0o644)
    (installation.directory / "tls" / "server.key").chmod(0o640)
    (installation.directory / "credentials" / "demo.toml").write_text("x = 1")
    said = installation.run("check", status=1).stderr
    for place in ("server.tls:", "kmi[0]:", "keystore[0]:"):
        assert place in said
    found = json.loads(installation.run("check", "--json", status=1).stdout)
    assert {problem["where"] for problem in found} == {"server.tls", "kmi[0]", "keystore[0]"}
    text = installation.config.read_text()
    installation.config.write_text(text.replace("listen", "lisen", 1))
    assert "server.lisen: unknown key" in installation.run("check", status=1).stderr


def test_check_beside_a_running_server(running: Installation) -> None:
    assert "no problems" in running.run("check").stdout


def test_serve_refuses_what_check_refuses(installation: Installation) -> None:
    (installation.directory / "tls" / "server.key").chmod(0o644)
    assert "chmod 0600" in installation.run("serve", status=1).stderr


def test_a_second_server_on_the_same_files_says_why_not(running: Installation) -> None:
    assert "another process writes this audit log" in running.run("serve", status=1).stderr


def test_a_port_that_is_taken(installation: Installation) -> None:
    with socket.create_server(("127.0.0.1", installation.port)):
        said = installation.run("serve", status=1).stderr
    assert f"cannot listen on 127.0.0.1:{installation.port}" in said


def test_no_secret_and_no_plaintext_is_in_any_output(running: Installation) -> None:
    """Everything that was written by anyone, searched for everything that is secret."""
    plaintext = b"a-plaintext-that-nobody-may-see"
    _, made = running.encrypt(plaintext)
    assert running.decrypt(made) == plaintext
    running.send(f"{BASE}/health", b"{", running.cloud.headers(f"{BASE}/health", b"{"))
    wrong = Cloud(running.cloud.access_key_id, running.cloud.secret[:-1] + "!")
    path, body = f"{BASE}/health", running.cloud.body()
    running.send(path, body, wrong.headers(path, body))
    for command in (["keys", "list"], ["credentials", "list"], ["fingerprint"], ["check"]):
        running.run(*command)
    running.run("call", "health")
    metrics, status = running.admin("metrics")[1], running.admin("status")[1]
    pid = running.process.pid
    command_line = Path(f"/proc/{pid}/cmdline").read_text()
    running.stop()
    audit = (running.directory / "audit.jsonl").read_text()
    everything = running.output.read_text() + audit + running.printed
    everything += metrics + status + command_line
    master_key = (running.directory / "master.key").read_text().strip()
    for secret in (
        running.cloud.secret,
        wrong.secret,
        master_key,
        plaintext.decode(),
        base64.b64encode(plaintext).decode(),
    ):
        assert secret not in everything


def test_openssl_and_curl_are_enough_to_talk_to_it(running: Installation) -> None:
    """A GET answers 405 in JSON: a stranger's curl gets a clear answer, over the right suite."""
    curl = shutil.which("curl")
    assert curl is not None
    certificate = running.directory / "tls" / "server.crt"
    done = subprocess.run(
        [curl, "-sS", "--noproxy", "*", "--cacert", str(certificate),
         f"https://localhost:{running.port}{BASE}/health"],
        capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert json.loads(done.stdout)["Code"] == "MethodNotAllowed"
