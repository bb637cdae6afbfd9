"""`xkiproxy kms-config`: the four values, and where the secret goes."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from cli_site import ACCESS_KEY_ID, ACCESS_KEY_SECRET, Answer, Run, Site

from xkiproxy.cli.kms_config import program


def test_the_four_values(run: Run, site: Site) -> None:
    fingerprint = run("fingerprint", "-c", site.config, "--json").json()["certificate_sha256"]
    values = run("kms-config", "--config", site.config, "--json").json()
    assert values == {
        "ExternalProxyPath": "/demo/kms/xki/v1",
        "CertificateFingerprint": fingerprint,
        "AccessKeyId": ACCESS_KEY_ID,
        "AccessKeySecret": ACCESS_KEY_SECRET,
    }
    people = run("kms-config", "--config", site.config)
    assert all(value in people.out for value in values.values())
    for name in ("External Proxy Path", "Certificate Fingerprint", "AccessKey Secret"):
        assert name in people.out
    assert f"call health --config {site.config}" in people.out
    assert "--keystore" not in people.out


def test_what_aws_asks_for(run: Run, xks_site: Site, tmp_path: Path) -> None:
    values = run("kms-config", "--config", xks_site.config, "--json").json()
    assert values == {
        "XksProxyUriPath": "/demo/kms/xks/v1",
        "XksProxyAuthenticationCredential": {
            "AccessKeyId": ACCESS_KEY_ID,
            "RawSecretAccessKey": ACCESS_KEY_SECRET,
        },
    }
    file = tmp_path / "kms.json"
    written = run("kms-config", "--config", xks_site.config, "--output", file)
    assert (written.status, json.loads(file.read_text())) == (0, values)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert ACCESS_KEY_SECRET not in written.out + written.err
    people = run("kms-config", "--config", xks_site.config).out
    for text in ("Proxy URI path", "Access key ID", "Secret access key", "/demo/kms/xks/v1"):
        assert text in people
    assert "public certificate authority" in people
    assert "ingerprint  " not in people
    assert f"call health --config {xks_site.config}" in people


def test_aws_needs_no_certificate_of_ours(run: Run, xks_site: Site) -> None:
    lines = xks_site.config.read_text().splitlines()
    kept = [line for line in lines if "tls" not in line]
    kept.insert(1, "plaintext = true")
    xks_site.config.write_text("\n".join(kept) + "\n")
    assert run("kms-config", "--config", xks_site.config, "--json").status == 0


def test_a_file_for_upload(run: Run, site: Site, tmp_path: Path) -> None:
    file = tmp_path / "kms.json"
    written = run("kms-config", "--config", site.config, "--output", file)
    assert written.status == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_text()) == run("kms-config", "-c", site.config, "--json").json()
    assert ACCESS_KEY_SECRET not in written.out + written.err
    again = run("kms-config", "--config", site.config, "--output", file)
    assert (again.status, "is there already" in again.err) == (1, True)
    nowhere = run("kms-config", "--config", site.config, "--output", tmp_path / "no" / "file")
    assert (nowhere.status, "No such file" in nowhere.err) == (1, True)


def test_the_newest_credential_or_the_one_that_was_asked_for(run: Run, site: Site) -> None:
    added = run("credentials", "add", "--config", site.config, "--json").json()
    values = run("kms-config", "--config", site.config, "--json").json()
    assert values["AccessKeyId"] == added["access_key_id"]
    older = run("kms-config", "--access-key-id", ACCESS_KEY_ID, "-c", site.config, "--json")
    assert older.json()["AccessKeyId"] == ACCESS_KEY_ID
    unknown = run("kms-config", "--access-key-id", "XKINOBODY", "-c", site.config)
    assert (unknown.status, "no credential XKINOBODY" in unknown.err) == (1, True)


def test_no_credentials(run: Run, site: Site) -> None:
    run("credentials", "revoke", ACCESS_KEY_ID, "--force", "--config", site.config)
    failed = run("kms-config", "--config", site.config)
    assert (failed.status, "credentials add" in failed.err) == (1, True)


def test_key_stores_are_told_apart(run: Run, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.add_keystore('{ env = "SECOND_CREDENTIALS" }')
    monkeypatch.setenv("SECOND_CREDENTIALS", site.credentials.read_text())
    ambiguous = run("kms-config", "--config", site.config)
    assert (ambiguous.status, "demo, second" in ambiguous.err) == (1, True)
    chosen = run("kms-config", "--keystore", "second", "--config", site.config)
    assert "/second/kms/xki/v1" in chosen.out
    assert "--keystore second" in chosen.out


def status_of(config: Path, *access_key_ids: str) -> dict[str, Any]:
    """What a server with this configuration says of itself."""
    known = [{"access_key_id": known} for known in access_key_ids]
    stores = [{"name": "demo", "credentials": known}]
    return {"pid": 1, "reload": {}, "config": str(config.resolve()), "keystores": stores}


def test_a_server_that_does_not_know_the_credential_yet_is_named(
    run: Run, site: Site, answer: Answer
) -> None:
    hint = f"The running server does not know {ACCESS_KEY_ID} yet"
    answer(status_of(site.config, "XKIANOTHER"))
    assert hint in run("kms-config", "--config", site.config).err
    answer(status_of(site.config, ACCESS_KEY_ID))
    assert hint not in run("kms-config", "--config", site.config).err


def test_what_a_server_of_another_configuration_knows_does_not_matter(
    run: Run, site: Site, answer: Answer, tmp_path: Path
) -> None:
    foreign = status_of(tmp_path / "elsewhere" / "xkiproxy.toml", "XKIANOTHER")
    nameless = status_of(site.config, "XKIANOTHER")
    del nameless["config"]
    for said in (foreign, nameless, {"pid": 1, "reload": {}}, {}, [], "another program"):
        answer(said)
        done = run("kms-config", "--config", site.config)
        assert (done.status, done.err) == (0, "")


def test_the_line_names_the_program_that_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = tmp_path / "bin" / "xkiproxy"
    started.parent.mkdir()
    started.write_text("#!/bin/sh\n")
    started.chmod(0o755)
    monkeypatch.setattr("sys.argv", [str(started)])
    monkeypatch.setenv("PATH", "/nonexistent")
    assert program() == [str(started)]
    monkeypatch.setenv("PATH", str(started.parent))
    assert program() == ["xkiproxy"]
    monkeypatch.setattr("sys.argv", ["/somewhere/__main__.py"])
    assert program()[1:] == ["-m", "xkiproxy"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr("sys.argv", ["bin/xkiproxy"])
    assert program() == [str(started)]


def test_help_has_an_example(run: Run) -> None:
    assert "Example: xkiproxy kms-config" in run("kms-config", "--help").out
