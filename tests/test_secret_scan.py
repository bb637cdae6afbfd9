"""The scan of the test run's outputs finds what it is to find."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
import secret_scan
from test_end_to_end import Installation


def planted(folder: Path, secret: str) -> list[str]:
    """What is found when a secret stands in a log."""
    log = folder / "planted.log"
    log.write_text(f"line one\nsomething {secret} something\n")
    try:
        return secret_scan.leaks(folder)
    finally:
        log.unlink()  # the scan at the end of the run would find it too


def test_every_kind_of_secret_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Installation(tmp_path / "demo")
    made.start()
    plaintext = b"a-plaintext-that-is-looked-for"
    made.encrypt(plaintext)
    made.stop()
    folder = tmp_path / "demo"
    assert secret_scan.leaks(tmp_path) == []
    private_key = (folder / "tls" / "server.key").read_text().splitlines()[1]
    for secret in (
        made.cloud.secret,
        (folder / "master.key").read_text().strip(),
        private_key,
        plaintext.decode(),
        plaintext.hex(),
        base64.b64encode(plaintext).decode(),
    ):
        (leak,) = planted(tmp_path, secret)
        assert leak.endswith(f"planted.log:2:something {secret} something")
    outputs = {file.name for pattern in secret_scan.OUTPUTS for file in tmp_path.rglob(pattern)}
    assert {"server.log", "audit.jsonl", "admin.log", "printed.log", "processes.log"} <= outputs
    assert "serve" in (tmp_path / "processes.log").read_text()
    assert "PATH=" in (tmp_path / "processes.log").read_text()


def test_the_hmac_of_a_closed_audit_log_is_no_secret(tmp_path: Path) -> None:
    (tmp_path / "hmac.key").write_text("ab" * 32)
    (tmp_path / "audit-9.jsonl").write_text('{"event":"audit_closed","file":"audit-9.jsonl"}\n')
    (tmp_path / "audit-9.jsonl.hmac").write_text(f"{'cd' * 32}  audit-9.jsonl\n")
    assert "ab" * 32 in secret_scan.secrets(tmp_path)
    assert secret_scan.leaks(tmp_path) == []
