"""Fixtures of the command line's tests: running it, and a directory to run it on."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cli_site import ACCESS_KEY_ID, ACCESS_KEY_SECRET, Outcome, Run, Site

from xkiproxy.cli import main
from xkiproxy.cli.certificate import CertificateKey, host_names, self_signed
from xkiproxy.config.secrets import write_secret_file


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `xkiproxy` with these arguments, in this process."""
    monkeypatch.delenv("XKIPROXY_CONFIG", raising=False)
    monkeypatch.delenv("XKIPROXY_ACCESS_KEY_SECRET", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["xkiproxy", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        printed = capsys.readouterr()
        return Outcome(status, printed.out, printed.err)

    return run


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path / "site")
    (site.directory / "tls").mkdir(parents=True)
    (site.directory / "credentials").mkdir()
    certificate, key = self_signed(host_names([]), CertificateKey.EC, datetime.now(UTC))
    site.certificate.write_text(certificate)
    write_secret_file(site.private_key, key)
    write_secret_file(
        site.credentials,
        f'[[credential]]\naccess_key_id = "{ACCESS_KEY_ID}"\n'
        f'access_key_secret = "{ACCESS_KEY_SECRET}"\ncreated = "2026-01-02T03:04:05Z"\n',
    )
    site.listen_on(8443)
    return site
