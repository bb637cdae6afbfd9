"""`xkiproxy fingerprint`, checked against OpenSSL."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cli_site import Run, Site

KEYS = ["certificate_sha256", "certificate_sm3", "public_key_sha256", "public_key_sm3"]


def openssl(*arguments: object, data: bytes | None = None) -> bytes:
    command = ["openssl", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, input=data).stdout


def digest(algorithm: str, data: bytes) -> str:
    printed = openssl("dgst", f"-{algorithm}", "-r", data=data).decode()
    return f"{algorithm}-{printed.split()[0]}"


def expected(certificate: Path) -> dict[str, str]:
    printed = openssl("x509", "-in", certificate, "-noout", "-fingerprint", "-sha256").decode()
    whole = openssl("x509", "-in", certificate, "-outform", "DER")
    pem = openssl("x509", "-in", certificate, "-noout", "-pubkey")
    key = openssl("pkey", "-pubin", "-outform", "DER", data=pem)
    return {
        "certificate_sha256": "sha256-" + printed.split("=")[1].strip().replace(":", "").lower(),
        "certificate_sm3": digest("sm3", whole),
        "public_key_sha256": digest("sha256", key),
        "public_key_sm3": digest("sm3", key),
    }


def make_certificate(directory: Path, name: str, *key: str) -> Path:
    file = directory / f"{name}.crt"
    openssl(
        "req", "-x509", "-newkey", *key, "-nodes", "-subj", f"/CN={name}",
        "-keyout", directory / f"{name}.key", "-out", file, "-days", "2",
    )  # fmt: skip
    return file


@pytest.mark.parametrize(
    "key",
    [("rsa:2048",), ("ec", "-pkeyopt", "ec_paramgen_curve:P-256"), ("ed25519",), ("sm2", "-sm3")],
    ids=lambda key: key[0],
)
def test_openssl_agrees(run: Run, tmp_path: Path, key: tuple[str, ...]) -> None:
    file = make_certificate(tmp_path, "one", *key)
    found = run("fingerprint", file, "--json").json()
    assert list(found) == KEYS
    assert found == expected(file)


def test_a_certificate_without_version(run: Run, tmp_path: Path) -> None:
    key, request, file = tmp_path / "key", tmp_path / "csr", tmp_path / "v1.crt"
    openssl("req", "-new", "-newkey", "ed25519", "-nodes", "-subj", "/CN=v1", "-keyout", key,
            "-out", request)  # fmt: skip
    openssl("x509", "-req", "-in", request, "-signkey", key, "-out", file)
    assert run("fingerprint", file, "--json").json() == expected(file)


def test_the_configured_one_is_the_default(run: Run, site: Site) -> None:
    found = run("fingerprint", "--config", site.config, "--json").json()
    assert found == expected(site.certificate)
    people = run("fingerprint", "--config", site.config)
    assert all(value in people.out for value in found.values())


def test_several_are_an_array(run: Run, tmp_path: Path, site: Site) -> None:
    other = make_certificate(tmp_path, "other", "ed25519")
    both = [expected(site.certificate), expected(other)]
    assert run("fingerprint", site.certificate, other, "--json").json() == both
    chain = tmp_path / "chain.crt"
    chain.write_bytes(site.certificate.read_bytes() + other.read_bytes())
    assert run("fingerprint", chain, "--json").json() == both
    assert "CN=other" in run("fingerprint", chain).out


def test_what_is_no_certificate_is_refused(run: Run, tmp_path: Path, site: Site) -> None:
    garbage = tmp_path / "garbage"
    garbage.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    for file in (garbage, site.private_key, tmp_path / "missing", tmp_path):
        failed = run("fingerprint", file, "--json")
        assert (failed.status, failed.out) == (1, "")
        assert str(file) in failed.err
        assert "PRIVATE" not in failed.err


def test_without_tls_there_is_none(run: Run, site: Site) -> None:
    text = site.config.read_text()
    start, end = text.index("[server.tls]"), text.index("[[kmi]]")
    site.config.write_text(text[:start] + "plaintext = true\n" + text[end:])
    failed = run("fingerprint", "--config", site.config)
    assert (failed.status, "no [server.tls]" in failed.err) == (1, True)


def test_help_has_an_example(run: Run) -> None:
    assert "Example: xkiproxy fingerprint" in run("fingerprint", "--help").out
