"""`xkiproxy init`: what it makes, and that it never leaves half of it or overwrites anything."""

from __future__ import annotations

import errno
import os
import re
import socket
import ssl
import stat
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cli_site import Run
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from xkiproxy.cli import init as init_module
from xkiproxy.cli.certificate import host_names
from xkiproxy.config import load_config
from xkiproxy.keystores.credentials import load_credentials
from xkiproxy.kmi.base import KeyManagerError

FILES = {
    "catalog.db": 0o600,
    "credentials/demo.toml": 0o600,
    "keyring.db": 0o600,
    "master.key": 0o600,
    "tls/server.crt": None,
    "tls/server.key": 0o600,
    "xkiproxy.toml": None,
}


def files(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def extension(certificate: x509.Certificate, kind: type[x509.ExtensionType]) -> x509.Extension:
    return certificate.extensions.get_extension_for_class(kind)


def test_what_is_made(run: Run, tmp_path: Path) -> None:
    site = tmp_path / "new" / "site"
    made = run("init", site)
    assert made.status == 0, made.err
    assert files(site) == sorted(FILES)
    assert sorted(p.name for p in site.parent.iterdir()) == ["site"]
    for directory in (site, site / "tls", site / "credentials"):
        assert mode(directory) == 0o700
    for name, wanted in FILES.items():
        if wanted is not None:
            assert mode(site / name) == wanted, name
    for word in ("serve", "kms-config", "call health"):
        assert f"{word} --config {site / 'xkiproxy.toml'}" in made.out
    config = load_config(site / "xkiproxy.toml")
    assert [(s.name, s.path_prefix) for s in config.keystore] == [("demo", "/demo")]
    (credential,) = load_credentials(config.keystore[0].credentials)
    for path in site.rglob("*"):
        if path.is_file() and path.name != "demo.toml":
            assert credential.access_key_secret.encode() not in path.read_bytes()
    assert credential.access_key_secret not in made.out + made.err
    assert (site / "master.key").read_text().strip() not in made.out + made.err


def test_the_other_commands_work_on_it(run: Run, tmp_path: Path) -> None:
    made = run("init", tmp_path / "site", "--keystore", "acme", "--key", "first.key", "--json")
    config = made.json()["config"]
    assert config == str(tmp_path / "site" / "xkiproxy.toml")
    (key,) = run("keys", "list", "--config", config, "--json").json()
    assert (key["id"], key["spec"], key["state"]) == ("first.key", "AES_256", "ENABLED")
    values = run("kms-config", "--config", config, "--json").json()
    assert values["ExternalProxyPath"] == "/acme/kms/xki/v1"
    assert len(run("credentials", "list", "--config", config, "--json").json()) == 1


def test_the_other_protocol(run: Run, tmp_path: Path) -> None:
    made = run("init", tmp_path / "site", "--protocol", "xks", "--json")
    settings = load_config(Path(made.json()["config"]))
    assert [store.protocol for store in settings.keystore] == ["xks"]
    (credential,) = load_credentials(settings.keystore[0].credentials)
    assert re.fullmatch(r"[A-Z2-7]{20,30}", credential.access_key_id)
    assert re.fullmatch(r"[A-Za-z0-9+/=]{43,64}", credential.access_key_secret)
    text = settings.path.read_text()
    assert ("public authority" in text, "pins" in text) == (True, False)
    values = run("kms-config", "--config", settings.path, "--json").json()
    assert values["XksProxyUriPath"] == "/demo/kms/xks/v1"


@pytest.mark.parametrize("kind", ["ec", "rsa"])
def test_the_certificate(run: Run, tmp_path: Path, kind: str) -> None:
    site = tmp_path / "site"
    arguments = ("--host", "proxy.example", "--host", "192.0.2.7", "--certificate-key", kind)
    assert run("init", site, *arguments).status == 0
    file = site / "tls" / "server.crt"
    certificate = x509.load_pem_x509_certificate(file.read_bytes())
    names = extension(certificate, x509.SubjectAlternativeName).value
    assert isinstance(names, x509.SubjectAlternativeName)
    assert set(names.get_values_for_type(x509.DNSName)) >= {"localhost", "proxy.example"}
    assert socket.gethostname() in names.get_values_for_type(x509.DNSName)
    addresses = {str(a) for a in names.get_values_for_type(x509.IPAddress)}
    assert addresses == {"127.0.0.1", "::1", "192.0.2.7"}
    constraints = extension(certificate, x509.BasicConstraints)
    assert (constraints.critical, constraints.value) == (True, x509.BasicConstraints(False, None))
    usage = extension(certificate, x509.KeyUsage)
    assert isinstance(usage.value, x509.KeyUsage)
    assert (usage.critical, usage.value.digital_signature) == (True, True)
    assert not usage.value.key_cert_sign
    purposes = extension(certificate, x509.ExtendedKeyUsage).value
    assert list(purposes) == [ExtendedKeyUsageOID.SERVER_AUTH]  # type: ignore[call-overload]
    end = certificate.not_valid_after_utc
    assert timedelta(days=824) < end - datetime.now(UTC) <= timedelta(days=825)
    text = subprocess.run(
        ["openssl", "x509", "-in", file, "-noout", "-text"], check=True, capture_output=True
    ).stdout.decode()
    assert ("prime256v1" if kind == "ec" else "(3072 bit)") in text
    # It holds under the strictest rules that OpenSSL knows, as its own authority.
    strict = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", file, file]
    subprocess.run(strict, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, site / "tls" / "server.key")


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(p.relative_to(directory)): (mode(p), p.read_bytes() if p.is_file() else b"")
        for p in directory.rglob("*")
    }


def test_nothing_is_overwritten(run: Run, tmp_path: Path) -> None:
    site = tmp_path / "site"
    assert run("init", site).status == 0
    before = snapshot(tmp_path)
    again = run("init", site)
    assert again.status == 1
    assert "xkiproxy.toml: is there already; nothing was changed" in again.err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["master.key", "keyring.db", "catalog.db", "tls", "credentials"])
def test_other_files_of_ours_are_not_overwritten(run: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/nonexistent")
    refused = run("init", tmp_path)
    assert (refused.status, f"{name}: is there already" in refused.err) == (1, True)
    assert os.listdir(tmp_path) == [name]  # noqa: PTH208 - a dangling link counts too


def test_an_empty_directory_is_filled(run: Run, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir(mode=0o755)
    identity = site.stat().st_ino
    assert run("init", site).status == 0
    assert (files(site), mode(site)) == (sorted(FILES), 0o700)
    assert site.stat().st_ino == identity
    assert os.listdir(tmp_path) == ["site"]  # noqa: PTH208


def test_the_current_directory(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    (tmp_path / "README").write_text("mine")
    assert run("init").status == 0
    assert files(Path()) == sorted([*FILES, "README"])
    assert mode(tmp_path) == 0o755  # it is not ours to close
    assert run("keys", "list", "--json").json()[0]["id"] == "demo-key"


def test_a_directory_that_others_write_to_is_refused(run: Run, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    (tmp_path / "README").write_text("mine")
    refused = run("init", tmp_path)
    assert (refused.status, "chmod go-w" in refused.err) == (1, True)
    assert files(tmp_path) == ["README"]


def test_a_file_is_no_directory(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "site"):
        assert run("init", place).status == 1
    assert files(tmp_path) == ["file"]


def fail_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise KeyManagerError("it broke")

    monkeypatch.setattr(init_module, name, broken)


@pytest.mark.parametrize("step", ["create_keyring", "_create_key", "_publish"])
def test_a_failure_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    full, empty = tmp_path / "full", tmp_path / "empty"
    full.mkdir(mode=0o755)
    empty.mkdir()
    (full / "README").write_text("mine")
    before = snapshot(tmp_path)
    fail_on(step, monkeypatch)
    for place in (full, empty):
        failed = run("init", place)
        assert (failed.status, "it broke" in failed.err) == (1, True)
    if step != "_publish":
        assert run("init", tmp_path / "deep" / "er" / "site").status == 1
    after = snapshot(tmp_path)
    assert {name: data for name, (_, data) in after.items()} == {
        name: data for name, (_, data) in before.items()
    }


def test_a_failure_while_moving_takes_back_what_was_moved(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    move: Callable[[Path, Path], None] = init_module._move

    def broken(source: Path, place: Path) -> None:
        if place.name == "xkiproxy.toml":
            raise OSError(28, "No space left on device")
        move(source, place)

    monkeypatch.setattr(init_module, "_move", broken)
    failed = run("init", tmp_path)
    assert (failed.status, "No space left" in failed.err) == (1, True)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_comes_meanwhile_is_kept(tmp_path: Path) -> None:
    (tmp_path / "new").write_text("new")
    (tmp_path / "old").write_text("old")
    with pytest.raises(FileExistsError):
        init_module._move(tmp_path / "new", tmp_path / "old")
    (tmp_path / "directory").mkdir()
    (tmp_path / "other").mkdir()
    with pytest.raises(FileExistsError):
        init_module._move(tmp_path / "directory", tmp_path / "other")
    assert (tmp_path / "old").read_text() == "old"


def test_the_configuration_may_have_another_name(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("init", "--config", tmp_path / "a" / "proxy.toml").status == 0
    assert (tmp_path / "a" / "proxy.toml").exists()
    assert run("init", tmp_path / "b", "--config", tmp_path / "b" / "proxy.toml").status == 0
    assert run("init", tmp_path / "c", "--config", tmp_path / "c" / "master.key").status == 2
    monkeypatch.setenv("XKIPROXY_CONFIG", str(tmp_path / "e" / "proxy.toml"))
    assert run("init").status == 0
    assert (tmp_path / "e" / "proxy.toml").exists()
    assert run("init", tmp_path / "f").status == 0  # what is said outright goes before
    assert (tmp_path / "f" / "xkiproxy.toml").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "e", "f"]


@pytest.fixture
def careful_umask() -> Iterator[None]:
    """That of an administrator who lets nobody read what root makes."""
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.mark.usefixtures("careful_umask")
@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_the_configuration_may_have_another_place(run: Run, tmp_path: Path, there: bool) -> None:
    etc, state = tmp_path / "etc", tmp_path / "var" / "state"
    etc.mkdir(mode=0o755)
    if there:
        state.mkdir(parents=True)
    made = run("init", state, "--config", etc / "proxy.toml")
    assert made.status == 0, made.err
    assert str(etc / "proxy.toml") in made.out
    assert files(tmp_path / "etc") == ["proxy.toml"]
    assert mode(etc / "proxy.toml") == 0o644
    assert files(state) == sorted(FILES.keys() - {"xkiproxy.toml"})
    assert mode(state) == 0o700
    config = load_config(etc / "proxy.toml")
    assert (config.catalog.path, config.audit.path) == (state / "catalog.db", state / "audit.jsonl")
    listed = run("keys", "list", "--json", "--config", etc / "proxy.toml")
    assert listed.json()[0]["id"] == "demo-key"
    assert run("check", "--config", etc / "proxy.toml").status == 0


@pytest.mark.usefixtures("careful_umask")
def test_another_place_on_another_file_system(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links between file systems are refused: the configuration is copied, and never over one."""

    link = os.link

    def refused(source: Path, place: Path) -> None:
        if place.parent.name == "etc":
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        link(source, place)

    (tmp_path / "etc").mkdir(mode=0o755)
    monkeypatch.setattr(os, "link", refused)
    assert run("init", tmp_path / "a", "--config", tmp_path / "etc" / "a.toml").status == 0
    assert load_config(tmp_path / "etc" / "a.toml").path.name == "a.toml"
    assert mode(tmp_path / "etc" / "a.toml") == 0o644
    with pytest.raises(FileExistsError):
        init_module._move(tmp_path / "a" / "master.key", tmp_path / "etc" / "a.toml")
    assert load_config(tmp_path / "etc" / "a.toml").path.name == "a.toml"


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_another_place_that_is_unfit_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    state, etc = tmp_path / "state", tmp_path / "etc"
    if there:
        state.mkdir()
    config = etc / "proxy.toml"
    missing = run("init", state, "--config", config)
    assert (missing.status, "is no directory" in missing.err) == (1, True)
    etc.mkdir()
    etc.chmod(0o777)
    open_to_all = run("init", state, "--config", config)
    assert (open_to_all.status, "chmod go-w" in open_to_all.err) == (1, True)
    etc.chmod(0o755)
    config.write_text("mine")
    taken = run("init", state, "--config", config)
    assert (taken.status, "is there already" in taken.err) == (1, True)
    assert config.read_text() == "mine"
    config.unlink()

    move: Callable[[Path, Path], None] = init_module._move

    def broken(source: Path, place: Path) -> None:
        if place == config:
            raise OSError(errno.ENOSPC, "No space left on device")
        move(source, place)

    monkeypatch.setattr(init_module, "_move", broken)
    failed = run("init", state, "--config", config)
    assert (failed.status, "No space left" in failed.err) == (1, True)
    assert files(tmp_path) == []
    assert state.exists() == there


def test_misuse_is_status_2_and_makes_nothing(run: Run, tmp_path: Path) -> None:
    for arguments in (
        ["--kmi", "tape"],
        ["--protocol", "kmip"],
        ["--keystore", "../up"],
        ["--keystore", "Capital"],
        ["--host", "two words"],
        ["--host", ""],
        ["--host", "bücher.example"],
        ["--certificate-key", "dsa"],
        ["--nothing"],
    ):
        assert run("init", tmp_path / "site", *arguments).status == 2, arguments
    bad_key = run("init", tmp_path / "site", "--key", "a/b")
    assert bad_key.status == 1
    assert list(tmp_path.iterdir()) == []


def test_host_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "no host name")
    assert host_names(["*.example.com"]) == ["*.example.com", "localhost", "127.0.0.1", "::1"]
    for wrong in ("-a", "a..b", "a.", "*", "a" * 64, ".", "a\n", ".".join(["a" * 63] * 4)):
        with pytest.raises(ValueError, match="neither"):
            host_names([wrong])


def test_help_has_an_example(run: Run) -> None:
    assert "Example: xkiproxy init" in run("init", "--help").out
