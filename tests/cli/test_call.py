"""`xkiproxy call` against a small TLS server that records what it was sent."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import formatdate
from pathlib import Path

import pytest
from alibabacloud_gateway_pop.client import Client as AlibabaSigner
from cli_site import ACCESS_KEY_SECRET, Recorded, Run, Server, Site, feed, nothing_sent

from xkiproxy.cli import http as client_http
from xkiproxy.cli.certificate import CertificateKey, self_signed
from xkiproxy.protocols.client import Signer
from xkiproxy.protocols.xki.client import XkiClient


def signed_by_alibaba(request: Recorded, secret: str = ACCESS_KEY_SECRET) -> bool:
    """Whether Alibaba Cloud's own signer makes the same Authorization of this request."""
    headers = {
        name.lower(): value
        for name, value in request.headers.items()
        if name.lower() != "authorization"
    }
    authorization = request.headers["authorization"]
    algorithm = authorization.split(" ")[0]
    access_key_id, date, region, product, _ = authorization.split("=")[1].split("/")
    sm3 = algorithm.endswith("SM3")
    content_hash = headers["x-acs-content-sm3" if sm3 else "x-acs-content-sha256"]
    assert content_hash == hashlib.new("sm3" if sm3 else "sha256", request.body).hexdigest()
    signer = AlibabaSigner()
    key = signer.get_signingkey(algorithm, secret, product, region, date)
    expected = signer.get_authorization(
        request.path, "POST", {}, headers, algorithm, content_hash, access_key_id, key, product,
        region, date,
    )  # fmt: skip
    return bool(authorization == expected)


def test_health(run: Run, site: Site, server: Server) -> None:
    server.answer = b'{"RequestId": "the-id", "Status": "ACTIVE"}'
    shown = run("call", "health", "--config", site.config, "--json").json()
    assert server.last.path == "/demo/kms/xki/v1/health"
    assert server.last.fields == {}
    assert server.last.headers["host"] == f"127.0.0.1:{server.port}"
    assert server.last.headers["content-type"] == "application/json"
    assert signed_by_alibaba(server.last)
    assert not signed_by_alibaba(server.last, "another secret")
    assert shown["status"] == 200
    assert shown["RequestId"] == "the-id"
    assert shown["Status"] == "ACTIVE"
    assert shown["tls"]["version"] == "TLSv1.3"
    assert shown["tls"]["cipher"].startswith("TLS_")
    fingerprint = run("fingerprint", "-c", site.config, "--json").json()["certificate_sha256"]
    assert shown["tls"]["certificate_sha256"] == fingerprint
    timings = shown["timings_ms"]
    assert list(timings) == ["resolve", "connect", "tls", "request", "total"]
    assert all(timings[phase] > 0 for phase in timings)
    assert timings["total"] >= timings["connect"] + timings["tls"] + timings["request"]


def test_health_for_people(run: Run, site: Site, server: Server) -> None:
    server.answer = b'{"RequestId": "the-id", "Status": "ACTIVE"}'
    shown = run("call", "health", "--config", site.config)
    assert shown.status == 0
    for text in ("ACTIVE", "the-id", "200", "TLSv1.3", "resolve ms", "total ms"):
        assert text in shown.out
    assert ACCESS_KEY_SECRET not in shown.out + shown.err


def test_sm3(run: Run, site: Site, server: Server) -> None:
    assert run("call", "health", "-c", site.config, "--signature", "sm3").status == 0
    assert server.last.headers["authorization"].startswith("ACS4-HMAC-SM3 ")
    assert signed_by_alibaba(server.last)


def test_every_request_is_new(run: Run, site: Site, server: Server) -> None:
    for _ in range(2):
        assert run("call", "meta", "my.key_1-2", "-c", site.config).status == 0
    first, second = server.requests
    assert first.path == "/demo/kms/xki/v1/keys/my.key_1-2/meta"
    assert first.headers["x-acs-signature-nonce"] != second.headers["x-acs-signature-nonce"]
    assert first.body != second.body


def test_encrypt_sends_what_was_asked(run: Run, site: Site, server: Server, tmp_path: Path) -> None:
    run("call", "encrypt", "k", "--plaintext", "hé", "--aad", "context", "-c", site.config)
    assert server.last.path == "/demo/kms/xki/v1/keys/k/encrypt"
    assert server.last.fields == {"Plaintext": "aMOp", "Aad": "Y29udGV4dA=="}
    file = tmp_path / "data"
    file.write_bytes(b"\x00\xff")
    run("call", "encrypt", "k", "--file", file, "--algorithm", "AES_CBC", "--iv",
        "AAAAAAAAAAAAAAAAAAAAAA==", "--padding", "PKCS7_PADDING", "-c", site.config)  # fmt: skip
    assert server.last.fields == {
        "Plaintext": "AP8=",
        "Algorithm": "AES_CBC",
        "Iv": "AAAAAAAAAAAAAAAAAAAAAA==",
        "PaddingMode": "PKCS7_PADDING",
    }
    assert signed_by_alibaba(server.last)


def test_standard_input(
    run: Run, site: Site, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(monkeypatch, b"from a pipe")
    run("call", "encrypt", "k", "--file", "-", "-c", site.config)
    assert base64.b64decode(server.last.fields["Plaintext"]) == b"from a pipe"


def test_decrypt_reads_what_encrypt_printed(
    run: Run, site: Site, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = {"KeyId": "k", "CiphertextBlob": "AQID", "Iv": "BAUG", "Algorithm": "AES_GCM"}
    server.answer = json.dumps({"RequestId": "1"} | answer).encode()
    printed = run("call", "encrypt", "k", "--plaintext", "x", "--json", "-c", site.config).out
    expected = {"CiphertextBlob": "AQID", "Iv": "BAUG", "Algorithm": "AES_GCM"}
    server.answer = b'{"RequestId": "2", "Plaintext": "aGVsbG8="}'
    for text in (printed, json.dumps(answer)):
        feed(monkeypatch, text.encode())
        shown = run("call", "decrypt", "k", "-c", site.config)
        assert server.last.fields == expected
        assert "hello" in shown.out
    assert server.last.path == "/demo/kms/xki/v1/keys/k/decrypt"
    run("call", "decrypt", "k", "--ciphertext", "AQID", "--iv", "BAUG", "-c", site.config)
    assert server.last.fields == {"CiphertextBlob": "AQID", "Iv": "BAUG"}
    for wrong in (b"", b"[]", b'{"CiphertextBlob": 1}', b'{"Iv": "AAAA"}'):
        feed(monkeypatch, wrong)
        assert run("call", "decrypt", "k", "-c", site.config).status == 1


def test_a_plaintext_cannot_command_the_terminal(run: Run, site: Site, server: Server) -> None:
    text = base64.b64encode(b"\x1b[2Jgone").decode()
    server.answer = json.dumps({"RequestId": "1", "Plaintext": text}).encode()
    shown = run("call", "decrypt", "k", "--ciphertext", "AQID", "-c", site.config)
    assert shown.status == 0
    assert "\x1b[2J" not in shown.out


def test_random(run: Run, site: Site, server: Server, tmp_path: Path) -> None:
    assert run("call", "random", "-c", site.config).status == 0
    assert server.last.fields == {}
    key, pem = tmp_path / "sm2.pem", tmp_path / "sm2.pub"
    subprocess.run(["openssl", "genpkey", "-algorithm", "SM2", "-out", key], check=True)
    subprocess.run(["openssl", "pkey", "-in", key, "-pubout", "-out", pem], check=True)
    der = subprocess.run(
        ["openssl", "pkey", "-in", key, "-pubout", "-outform", "DER"],
        check=True,
        capture_output=True,
    ).stdout
    raw = tmp_path / "sm2.der"
    raw.write_bytes(der)
    for file in (pem, raw):
        run("call", "random", "--length", "16", "--output-form", "PUBLIC_KEY_WRAPPED",
            "--public-key", file, "--wrapping-key-spec", "EC_SM2", "--wrapping-algorithm",
            "SM2PKE", "-c", site.config)  # fmt: skip
        assert server.last.fields == {
            "Length": 16,
            "OutputForm": "PUBLIC_KEY_WRAPPED",
            "PublicKeyBlob": base64.b64encode(der).decode(),
            "WrappingKeySpec": "EC_SM2",
            "WrappingAlgorithm": "SM2PKE",
        }


def test_without_a_configuration(
    run: Run, site: Site, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "secret"
    secret.write_text("another-secret-of-the-tests\n")
    secret.chmod(0o600)
    fingerprint = run("fingerprint", site.certificate, "--json").json()["certificate_sha256"]
    where = ("--endpoint", f"https://localhost:{server.port}", "--access-key-id", "XKIOTHER00")
    pin = ("--fingerprint", fingerprint)
    pinned = run("call", "health", *where, "--secret-file", secret, *pin)
    assert pinned.status == 0, pinned.err
    assert server.last.path == "/kms/xki/v1/health"
    assert signed_by_alibaba(server.last, "another-secret-of-the-tests")
    assert "XKIOTHER00" in server.last.headers["authorization"]
    monkeypatch.setenv("XKIPROXY_ACCESS_KEY_SECRET", "a-secret-of-the-environment")
    ca = ("--ca", site.certificate, "--path", "/other/kms/xki/v1", "--region", "eu-central-1")
    trusted = run("call", "health", *where, *ca)
    assert trusted.status == 0, trusted.err
    assert server.last.path == "/other/kms/xki/v1/health"
    assert signed_by_alibaba(server.last, "a-secret-of-the-environment")
    assert "/eu-central-1/" in server.last.headers["authorization"]
    secret.chmod(0o644)
    open_secret = run("call", "health", *where, "--secret-file", secret, *pin)
    assert (open_secret.status, "chmod 0600" in open_secret.err) == (1, True)


def test_an_untrusted_certificate(run: Run, site: Site, server: Server, tmp_path: Path) -> None:
    fingerprint = run("fingerprint", "-c", site.config, "--json").json()["certificate_sha256"]
    certificate, _ = self_signed(["other"], CertificateKey.RSA, datetime.now(UTC))
    other = tmp_path / "other.crt"
    other.write_text(certificate)
    error = nothing_sent(server, run("call", "health", "--ca", other, "-c", site.config))
    assert "not trusted" in error
    assert f"--fingerprint {fingerprint}" in error
    wrong = "sha256-" + "0" * 64
    error = nothing_sent(server, run("call", "health", "--fingerprint", wrong, "-c", site.config))
    assert f"{fingerprint}" in error
    assert wrong in error
    # The configuration's certificate was renewed, but the server still has the old one.
    site.certificate.write_text(certificate)
    error = nothing_sent(server, run("call", "health", "-c", site.config))
    assert "xkiproxy reload" in error
    assert fingerprint in error


def test_a_wrong_name_is_not_trusted(
    run: Run, site: Site, tmp_path: Path, start: Callable[..., Server]
) -> None:
    certificate, key = self_signed(["other.example"], CertificateKey.EC, datetime.now(UTC))
    file = tmp_path / "other.pem"
    file.write_text(certificate + key)
    server = start(file, file)
    site.listen_on(server.port)
    error = nothing_sent(server, run("call", "health", "--ca", file, "-c", site.config))
    assert "not trusted" in error
    error = nothing_sent(server, run("call", "health", "--ca", tmp_path / "no", "-c", site.config))
    assert "CA certificates" in error


def test_mutual_tls(run: Run, site: Site, tmp_path: Path, start: Callable[..., Server]) -> None:
    certificate, key = tmp_path / "client.crt", tmp_path / "client.key"
    command = "openssl req -x509 -newkey ed25519 -nodes -subj /CN=client -days 2"
    subprocess.run(
        [*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True
    )
    both = tmp_path / "both.pem"
    both.write_bytes(certificate.read_bytes() + key.read_bytes())
    server = start(site.certificate, site.private_key, certificate)
    site.listen_on(server.port)
    error = nothing_sent(server, run("call", "health", "-c", site.config))
    assert "--client-certificate" in error
    assert run("call", "health", "--client-certificate", both, "-c", site.config).status == 0
    wrong = run("call", "health", "--client-certificate", certificate, "-c", site.config)
    assert (wrong.status, "PEM file of certificate and key" in wrong.err) == (1, True)


@pytest.mark.parametrize(
    ("status", "code", "hint"),
    [
        (401, "Unauthorized", "credentials list"),
        (403, "KeyDisabledForbidden", "keys show"),
        (404, "KeyNotFound", "keys list"),
        (429, "TooManyRequests", "repeat"),
        (503, "ServiceUnavailable", "/readyz"),
        (504, "Timeout", "deadline_ms"),
        (400, "InvalidAlgorithm", "InvalidAlgorithm"),
    ],
)
def test_errors_say_what_to_do(
    run: Run, site: Site, server: Server, status: int, code: str, hint: str
) -> None:
    server.status = status
    server.answer = json.dumps({"RequestId": "1", "Code": code, "Message": "No [b]."}).encode()
    failed = run("call", "health", "-c", site.config)
    assert failed.status == 1
    assert f"HTTP {status} {code}: No [b]." in failed.err
    assert hint in failed.err
    assert "total ms" in failed.out
    assert json.loads(run("call", "health", "--json", "-c", site.config).out)["status"] == status


@pytest.mark.parametrize(("offset", "word"), [(-3600, "ahead of"), (3600, "behind")])
def test_a_skewed_clock(run: Run, site: Site, server: Server, offset: int, word: str) -> None:
    server.status = 400
    server.answer = b'{"RequestId": "1", "Code": "InvalidAcsDate", "Message": "Off."}'
    server.date = formatdate(time.time() + offset, usegmt=True)
    failed = run("call", "health", "-c", site.config)
    assert failed.status == 1
    assert word in failed.err
    assert "3600 s" in failed.err or "3601 s" in failed.err or "3599 s" in failed.err
    server.date = "yesterday"
    assert "Compare the clocks" in run("call", "health", "-c", site.config).err


def test_no_server(run: Run, site: Site, free_port: int) -> None:
    site.listen_on(free_port)
    failed = run("call", "health", "-c", site.config)
    assert (failed.status, "is the server running" in failed.err) == (1, True)
    unknown = run("call", "health", "--endpoint", "https://no.such.invalid:1", "-c", site.config)
    assert (unknown.status, "not resolved" in unknown.err) == (1, True)


def test_what_is_no_tls_and_who_is_silent(run: Run, site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        site.listen_on(port)
        silent = run("call", "health", "--timeout", "0.2", "-c", site.config)
        assert (silent.status, "TLS handshake failed" in silent.err) == (1, True)

        def hang_up() -> None:
            connection, _ = listener.accept()  # the one of before
            connection.close()
            connection, _ = listener.accept()
            connection.sendall(b"SSH-2.0-OpenSSH_9.9\r\n")
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        other = run("call", "health", "--timeout", "2", "-c", site.config)
        thread.join()
        assert (other.status, "TLS handshake failed" in other.err) == (1, True)


def test_a_slow_answer(run: Run, site: Site, server: Server) -> None:
    server.delay = 1
    failed = run("call", "health", "--timeout", "0.3", "-c", site.config)
    assert (failed.status, "no answer within the timeout" in failed.err) == (1, True)


def test_an_answer_of_somebody_else(run: Run, site: Site, server: Server) -> None:
    for text in (b"<html>", b"[]", b""):
        server.answer = text
        failed = run("call", "health", "-c", site.config)
        assert (failed.status, "is this an xkiproxy" in failed.err) == (1, True)
    server.answer = b'"' + b"x" * (1 << 20) + b'"'
    assert "over 1 MiB" in run("call", "health", "-c", site.config).err


def test_misuse_is_status_2(run: Run, site: Site, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x" * 20)
    secret.chmod(0o600)
    for arguments in (
        ["encrypt", "k"],
        ["encrypt", "k", "--plaintext", "a", "--file", "b"],
        ["encrypt"],
        ["meta", "a/b"],
        ["meta", "a b"],
        ["health", "--endpoint", "localhost:8443"],
        ["health", "--endpoint", "http://example.com"],
        ["health", "--endpoint", "https://localhost/path"],
        ["health", "--path", "no-slash"],
        ["health", "--signature", "md5"],
        ["health", "--fingerprint", "sha256-00"],
        ["health", "--fingerprint", "sm3-" + "0" * 64],
        ["health", "--fingerprint", "sha256-" + "0" * 64, "--ca", "x"],
        ["health", "--secret-file", str(secret)],
        ["health", "--access-key-secret", "x"],
        ["health", "--timeout", "0"],
        ["health", "--region", "a/b"],
    ):
        assert run("call", *arguments, "-c", site.config).status == 2, arguments


def test_endpoints() -> None:
    parse = client_http.parse_endpoint
    assert parse("https://proxy.example").authority == "proxy.example:443"
    assert str(parse("https://[::1]:8443/")) == "https://[::1]:8443"
    assert str(parse("http://127.0.0.1:8080")) == "http://127.0.0.1:8080"
    for wrong in ("", "https://", "ftp://x", "https://u@h", "https://h?q", "https://h:99999"):
        with pytest.raises(ValueError):
            parse(wrong)


def test_listening_everywhere_is_called_here(run: Run, site: Site, server: Server) -> None:
    for address in ("0.0.0.0", "[::]"):
        text = site.config.read_text()
        site.config.write_text(text.replace("127.0.0.1:", f"{address}:"))
        assert run("call", "health", "-c", site.config).status == 0
        assert server.last.headers["host"] == f"localhost:{server.port}"
        site.listen_on(server.port)


def test_secrets_and_bodies_have_no_repr() -> None:
    assert "hush" not in repr(Signer("XKIID", "hush", "cn-hangzhou"))
    assert "hush" not in repr(XkiClient().read_answer(200, b'{"Plaintext": "hush"}'))


def test_help_has_examples(run: Run) -> None:
    for command in ("health", "meta", "encrypt", "decrypt", "random"):
        shown = run("call", command, "--help").out
        assert f"Example: xkiproxy call {'encrypt' if command == 'decrypt' else command}" in shown
        assert "--config" in shown
