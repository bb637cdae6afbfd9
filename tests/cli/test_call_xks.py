"""`xkiproxy call` in the other protocol: against the recording server, and against a real one."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from cli_site import (
    ACCESS_KEY_ID,
    ACCESS_KEY_SECRET,
    Outcome,
    Recorded,
    Run,
    Server,
    Site,
    feed,
    nothing_sent,
)

from xkiproxy.keystores.credentials import Credential
from xkiproxy.keystores.signing_keys import CachedSigningKeys
from xkiproxy.protocols.base import SignedRequest
from xkiproxy.protocols.xks import sigv4

SIGNING_KEYS = CachedSigningKeys([Credential(ACCESS_KEY_ID, ACCESS_KEY_SECRET, "now")])
ENCRYPTED = {
    "ciphertext": "AQID",
    "initializationVector": "AAAAAAAAAAAAAAAA",
    "authenticationTag": "AAAAAAAAAAAAAAAAAAAAAA==",
    "ciphertextMetadata": "AQAAAAE=",
}


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def signed(request: Recorded) -> bool:
    """Whether the proxy's own verifier, which botocore's signer checks, takes a request."""
    headers = [(name.encode(), value.encode()) for name, value in request.headers.items()]
    raw = SignedRequest("POST", request.path, "", headers, request.body)
    return sigv4.verify(raw, SIGNING_KEYS, time.time()).access_key_id == ACCESS_KEY_ID


def test_requests(run: Run, xks_site: Site, xks_server: Server) -> None:
    config = ("-c", xks_site.config)
    assert run("call", "health", *config).status == 0
    assert xks_server.last.path == "/demo/kms/xks/v1/health"
    assert "/us-east-1/kms-xks-proxy/" in xks_server.last.headers["authorization"]
    assert signed(xks_server.last)
    assert run("call", "meta", "my.key_1-2", "--region", "eu-west-2", *config).status == 0
    assert xks_server.last.path == "/demo/kms/xks/v1/keys/my.key_1-2/metadata"
    assert "/eu-west-2/kms-xks-proxy/" in xks_server.last.headers["authorization"]
    assert signed(xks_server.last)
    text = ("--plaintext", "hé", "--aad", "context", "--algorithm", "AES_GCM")
    assert run("call", "encrypt", "k", *text, *config).status == 0
    assert xks_server.last.path == "/demo/kms/xks/v1/keys/k/encrypt"
    assert xks_server.last.fields == {
        "plaintext": "aMOp",
        "encryptionAlgorithm": "AES_GCM",
        "additionalAuthenticatedData": "Y29udGV4dA==",
    }
    assert signed(xks_server.last)


def test_decrypt_reads_what_encrypt_printed(
    run: Run, xks_site: Site, xks_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ("-c", xks_site.config)
    xks_server.answer = json.dumps(ENCRYPTED).encode()
    printed = run("call", "encrypt", "k", "--plaintext", "x", "--json", *config)
    assert printed.json().keys() == {
        *ENCRYPTED, "kms_request_id", "status", "timings_ms", "tls"
    }  # fmt: skip
    xks_server.answer = b'{"plaintext": "aGVsbG8="}'
    feed(monkeypatch, printed.out.encode())
    shown = run("call", "decrypt", "k", *config)
    assert (shown.status, "hello" in shown.out, "RequestId" in shown.out) == (0, True, False)
    assert xks_server.last.fields == {**ENCRYPTED, "encryptionAlgorithm": "AES_GCM"}
    assert xks_server.last.path == "/demo/kms/xks/v1/keys/k/decrypt"
    for name in list(ENCRYPTED)[:3]:
        feed(monkeypatch, json.dumps({k: v for k, v in ENCRYPTED.items() if k != name}).encode())
        refused = run("call", "decrypt", "k", *config)
        assert (refused.status, f"the input has no {name}" in refused.err) == (1, True)


def test_integrity_is_verified(run: Run, xks_site: Site, xks_server: Server) -> None:
    parts = [base64.b64decode(ENCRYPTED[name]) for name in (
        "ciphertextMetadata", "initializationVector", "ciphertext", "authenticationTag"
    )]  # fmt: skip
    value = hashlib.sha256(b"aad" + b"".join(parts)).digest()
    call = ("call", "encrypt", "k", "--plaintext", "x", "--integrity", "-c", xks_site.config)
    xks_server.answer = json.dumps(
        {**ENCRYPTED, "ciphertextDataIntegrityValue": b64(value)}
    ).encode()
    assert run(*call, "--aad", "aad").status == 0
    assert xks_server.last.fields["ciphertextDataIntegrityValueAlgorithm"] == "SHA_256"
    other = run(*call, "--aad", "another")
    assert (other.status, other.out) == (1, "")
    assert "ciphertextDataIntegrityValue is not that of the answer" in other.err
    xks_server.answer = json.dumps(ENCRYPTED).encode()
    missing = run(*call, "--aad", "aad")
    assert (missing.status, missing.out) == (1, "")


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["encrypt", "k", "--plaintext", "x", "--padding", "NO_PADDING"], "--padding"),
        (["encrypt", "k", "--plaintext", "x", "--iv", "AAAA"], "--iv"),
        (["encrypt", "k", "--plaintext", "x", "--algorithm", "AES_CBC"], "--algorithm"),
        (["decrypt", "k", "--ciphertext", "AAAA"], "--ciphertext"),
        (["decrypt", "k", "--iv", "AAAA"], "--iv"),
        (["health", "--signature", "sm3"], "--signature"),
        (["health", "--region", "US"], "--region"),
        (["health", "--protocol", "xki"], "--protocol"),
        (["health", "--protocol", "kmip"], "--protocol"),
    ],
)
def test_options_that_it_does_not_know(
    run: Run, xks_site: Site, xks_server: Server, arguments: list[str], option: str
) -> None:
    refused = run("call", *arguments, "-c", xks_site.config)
    assert option in nothing_sent(xks_server, refused, status=2)


def test_the_other_protocol_does_not_know_integrity(run: Run, site: Site, server: Server) -> None:
    refused = run("call", "encrypt", "k", "--plaintext", "x", "--integrity", "-c", site.config)
    assert "--integrity" in nothing_sent(server, refused, status=2)
    refused = run("call", "health", "--protocol", "xks", "-c", site.config)
    assert "speaks xki" in nothing_sent(server, refused, status=2)


def test_there_is_no_random(run: Run, xks_site: Site, xks_server: Server) -> None:
    refused = run("call", "random", "--length", "16", "-c", xks_site.config)
    assert "xks has no random" in nothing_sent(xks_server, refused)


def test_without_a_configuration(
    run: Run, xks_site: Site, xks_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XKIPROXY_ACCESS_KEY_SECRET", ACCESS_KEY_SECRET)
    done = run(
        "call", "health", "--protocol", "xks", "--endpoint",
        f"https://localhost:{xks_server.port}", "--access-key-id", ACCESS_KEY_ID,
        "--ca", xks_site.certificate,
    )  # fmt: skip
    assert done.status == 0, done.err
    assert xks_server.last.path == "/kms/xks/v1/health"
    assert signed(xks_server.last)


@pytest.mark.parametrize(
    ("offset", "said"), [(-3600, "ahead of"), (3600, "behind"), (60, "not to blame")]
)
def test_a_401_may_be_the_clock(
    run: Run, xks_site: Site, xks_server: Server, offset: int, said: str
) -> None:
    xks_server.status = 401
    xks_server.answer = b'{"errorName": "AuthenticationFailedException", "errorMessage": "No."}'
    xks_server.date = formatdate(time.time() + offset, usegmt=True)
    failed = run("call", "health", "-c", xks_site.config)
    assert failed.status == 1
    for text in ("HTTP 401 AuthenticationFailedException: No.", "credentials list", "clock", said):
        assert text in failed.err
    xks_server.date = "yesterday"
    assert "Compare the clocks" in run("call", "health", "-c", xks_site.config).err


# ---- a real server ------------------------------------------------------------------------------


class Installation:
    """A directory made by `xkiproxy init --protocol xks`, and the server that runs on it."""

    def __init__(self, directory: Path) -> None:
        self.config = directory / "xkiproxy.toml"
        self.command("init", directory, "--protocol", "xks", config=False)
        with (
            socket.create_server(("127.0.0.1", 0)) as one,
            socket.create_server(("127.0.0.1", 0)) as two,
        ):
            ports = [one.getsockname()[1], two.getsockname()[1]]
        text = self.config.read_text().replace("0.0.0.0:8443", f"127.0.0.1:{ports[0]}")
        self.config.write_text(text.replace("127.0.0.1:9464", f"127.0.0.1:{ports[1]}"))
        self.endpoint = f"https://localhost:{ports[0]}"

    def command(
        self, *arguments: object, config: bool = True, stdin: str = "", status: int = 0
    ) -> Outcome:
        words = [*map(str, arguments), *(["--config", str(self.config)] if config else [])]
        done = subprocess.run(
            [sys.executable, "-m", "xkiproxy", *words],
            input=stdin, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == status, done.stdout + done.stderr
        return Outcome(done.returncode, done.stdout, done.stderr)

    def call(self, *arguments: object, stdin: str = "") -> Any:
        return self.command("call", *arguments, "--json", stdin=stdin).json()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        log = self.config.parent / "server.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "xkiproxy", "serve", "--config", str(self.config)],
                stdout=output, stderr=output,
            )  # fmt: skip
        try:
            self._wait(process, log)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)

    def _wait(self, process: subprocess.Popen[bytes], log: Path) -> None:
        host, port = self.endpoint.removeprefix("https://").split(":")
        for _ in range(400):
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
                return
            time.sleep(0.05)
        pytest.fail("the server did not become ready:\n" + log.read_text())


def test_round_trip_with_a_server(tmp_path: Path) -> None:
    made = Installation(tmp_path / "site")
    with made.running():
        health = made.call("health")
        assert (health["status"], health["xksProxyVendor"]) == (200, "xkiproxy")
        meta = made.call("meta", "demo-key")
        assert (meta["keySpec"], meta["keyStatus"]) == ("AES_256", "ENABLED")
        aad = ("--aad", "project=nile")
        encrypt = ("encrypt", "demo-key", "--plaintext", "hello", *aad)
        for integrity in ([], ["--integrity"]):
            encrypted = made.call(*encrypt, *integrity)
            assert ("ciphertextDataIntegrityValue" in encrypted) == bool(integrity)
            text = json.dumps(encrypted)
            decrypted = made.call("decrypt", "demo-key", *aad, stdin=text)
            assert base64.b64decode(decrypted["plaintext"]) == b"hello"
        wrong = made.command("call", "decrypt", "demo-key", stdin=text, status=1)
        assert "InvalidCiphertextException" in wrong.err
        # The line that kms-config prints works as it is.
        (line,) = (
            line for line in made.command("kms-config").out.splitlines() if "call health" in line
        )
        printed = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
        assert printed.returncode == 0, printed.stderr
        assert "ACTIVE" in printed.stdout


def test_a_wrong_path_is_answered_in_the_words_of_the_other_protocol(
    run: Run, xks_site: Site, xks_server: Server
) -> None:
    xks_server.status = 404
    xks_server.answer = b'{"RequestId": "r", "Code": "XkiNotFound", "Message": "No such path."}'
    failed = run("call", "health", "--path", "/demo", "-c", xks_site.config)
    assert failed.status == 1
    assert "HTTP 404 XkiNotFound: No such path." in failed.err
    assert "ends in /kms/xks/v1 (--path)" in failed.err
    right = run("call", "health", "--path", "/no/kms/xks/v1", "-c", xks_site.config)
    assert "XkiNotFound" in right.err
    assert "--path" not in right.err
