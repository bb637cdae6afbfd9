"""xkiproxy.toml: every mistake named by its place, in one run; secrets only from where they may."""

from __future__ import annotations

import os
from base64 import b64encode
from pathlib import Path

import pytest

from xkiproxy.config import ConfigError, load_config
from xkiproxy.config.secrets import SecretError, SecretSource, write_secret_file
from xkiproxy.crypto.operations import CiphertextFormat
from xkiproxy.keystores.credentials import CredentialError, parse_credentials

GOOD = """
[server]
listen = "0.0.0.0:8443"
admin_listen = "127.0.0.1:9464"
workers = 1
[server.tls]
certificate = "tls/server.crt"
private_key = "tls/server.key"

[[kmi]]
name = "local"
type = "software"
keyring = "keyring.db"

[[keystore]]
name = "demo"
protocol = "xki"
path_prefix = "/demo"
kmi = ["local"]
credentials = "credentials/demo.toml"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "xkiproxy.toml"
    path.write_text(text)
    return path


def problems(folder: Path, text: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text))
    return {problem.where: problem.what for problem in caught.value.problems}


def test_the_file_of_the_documentation(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD))
    assert config.server.listen == "0.0.0.0:8443"
    assert config.find_kmi("local").type == "software"
    assert config.keystore[0].ciphertext_format is CiphertextFormat.ENVELOPE
    assert config.audit.path == tmp_path / "audit.jsonl"
    assert config.catalog.path == tmp_path / "catalog.db"
    assert config.keystore[0].credentials.file == tmp_path / "credentials" / "demo.toml"


@pytest.mark.parametrize(
    ("old", "new", "where", "what"),
    [
        ('listen = "0.0.0.0:8443"', 'listen = "8443"', "server.listen", "host:port"),
        ('listen = "0.0.0.0:8443"', 'listen = "a:99999"', "server.listen", "host:port"),
        ('listen = "0.0.0.0:8443"', "listen = 8443", "server.listen", "valid string"),
        ('"127.0.0.1:9464"', '"0.0.0.0:8443"', "server", "need the same port"),
        ('"127.0.0.1:9464"', '"127.0.0.1:8443"', "server", "need the same port"),
        ('"127.0.0.1:9464"', '"[::]:8443"', "server", "need the same port"),
        ("workers = 1", "workers = 0", "server.workers", "greater than or equal to 1"),
        ("workers = 1", "workerz = 1", "server.workerz", "unknown key"),
        ("workers = 1", "max_body_bytes = 1", "server.max_body_bytes", "1024"),
        ("workers = 1", "idle_timeout_seconds = 0", "server.idle_timeout_seconds", "greater"),
        ("workers = 1", "plaintext = true", "server", "contradict"),
        ('certificate = "tls/server.crt"', "", "server.tls.certificate", "is missing"),
        (
            'private_key = "tls/server.key"',
            'private_key = { env = "KEY" }',
            "server.tls",
            "from a file or a credential",
        ),
        (
            'private_key = "tls/server.key"',
            'private_key = "k"\nclient_names = ["a"]',
            "server.tls",
            "needs client_ca",
        ),
        ('type = "software"', 'type = "tpm"', "kmi[0].type", "unknown type 'tpm'"),
        ('type = "software"', "", "kmi[0].type", "is missing"),
        ('keyring = "keyring.db"', "", "kmi[0].keyring", "is missing"),
        ('keyring = "keyring.db"', "keyring = 1", "kmi[0].keyring", "path"),
        ('name = "local"', 'name = "Local HSM"', "kmi[0].name", "pattern"),
        ('name = "local"', 'name = "other"', "keystore[0].kmi[0]", "no [[kmi]] named 'local'"),
        ('protocol = "xki"', 'protocol = "soap"', "keystore[0].protocol", "xki"),
        ('path_prefix = "/demo"', 'path_prefix = "demo"', "keystore[0].path_prefix", '"/name"'),
        ('path_prefix = "/demo"', 'path_prefix = "/a b"', "keystore[0].path_prefix", '"/name"'),
        ('"/demo"', '"/demo/kms/xki/v1"', "keystore[0].path_prefix", 'write "/demo"'),
        ('"/demo"', '"/kms/xks/v1"', "keystore[0].path_prefix", 'write ""'),
        ('kmi = ["local"]', "kmi = []", "keystore[0].kmi", "at least 1"),
        ('kmi = ["local"]', 'kmi = "local"', "keystore[0].kmi", "tuple"),
        (
            'credentials = "credentials/demo.toml"',
            'credentials = { file = "a", env = "B" }',
            "keystore[0].credentials",
            "exactly one of",
        ),
        (
            'credentials = "credentials/demo.toml"',
            'credentials = { credential = "../x" }',
            "keystore[0].credentials",
            "without a slash",
        ),
        (
            'credentials = "credentials/demo.toml"',
            'credentials = { secret = "in the clear" }',
            "keystore[0].credentials.secret",
            "unknown key",
        ),
        (
            'credentials = "credentials/demo.toml"',
            'credentials = "c"\nciphertext_format = "zip"',
            "keystore[0].ciphertext_format",
            "envelope",
        ),
        (
            'kmi = ["local"]',
            'kmi = ["local", "b"]\ndeadline_ms = 250\nhedge_after_ms = 126',
            "keystore[0]",
            "half of deadline_ms",
        ),
        (
            'credentials = "credentials/demo.toml"',
            'credentials = "c"\ndeadline_ms = 0',
            "keystore[0].deadline_ms",
            "greater",
        ),
        ("[server]\n", "[loging]\n[server]\n", "loging", "unknown section"),
        ("[server]\n", '[log]\nlevel = "loud"\n[server]\n', "log.level", "debug"),
    ],
)
def test_a_mistake_is_named_by_its_place(
    tmp_path: Path, old: str, new: str, where: str, what: str
) -> None:
    assert old in GOOD
    found = problems(tmp_path, GOOD.replace(old, new, 1))
    assert what in found.get(where, ""), found


def test_all_mistakes_are_found_in_one_run(tmp_path: Path) -> None:
    text = GOOD.replace("0.0.0.0:8443", "nowhere").replace('"software"', '"tpm"')
    text = text.replace('"/demo"', '"demo"').replace('kmi = ["local"]', 'kmi = ["a", "local"]')
    text += '[[keystore]]\nname = "demo"\nprotocol = "xki"\npath_prefix = ""\nkmi = ["local"]\n'
    found = problems(tmp_path, text)
    assert set(found) == {
        "server.listen",
        "kmi[0].type",
        "keystore[0].path_prefix",
        "keystore[0].kmi[0]",
        "keystore[1].credentials",
        "keystore[1].name",
    }


def test_names_and_prefixes_are_unique(tmp_path: Path) -> None:
    store = GOOD[GOOD.index("[[keystore]]") :]
    kmi = GOOD[GOOD.index("[[kmi]]") : GOOD.index("[[keystore]]")]
    found = problems(tmp_path, GOOD + store + kmi)
    assert set(found) == {"kmi[1].name", "keystore[1].name", "keystore[1].path_prefix"}


@pytest.mark.parametrize(
    ("text", "what"),
    [("a = [", "not valid TOML"), ("kmi = 1", "array of tables"), ("", "[server.tls] is missing")],
)
def test_files_that_are_far_off(tmp_path: Path, text: str, what: str) -> None:
    assert any(what in found for found in problems(tmp_path, text).values())


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="xkiproxy init"):
        load_config(tmp_path / "none.toml")


@pytest.mark.parametrize(("address", "allowed"), [("127.0.0.1:1", True), ("0.0.0.0:1", False)])
def test_plaintext_is_for_loopback_only(tmp_path: Path, address: str, allowed: bool) -> None:
    start, end = GOOD.index("[server.tls]"), GOOD.index("[[kmi]]")
    text = (GOOD[:start] + GOOD[end:]).replace("0.0.0.0:8443", address)
    text = text.replace("workers = 1", "plaintext = true")
    if allowed:
        assert load_config(write(tmp_path, text)).server.tls is None
    else:
        assert "loopback" in problems(tmp_path, text)["server"]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "xkiproxy.toml")
    (problem,) = caught.value.problems
    assert "xkiproxy init, or name it with --config or XKIPROXY_CONFIG" in str(problem)


class TestSecrets:
    def test_file(self, tmp_path: Path) -> None:
        path = tmp_path / "secret"
        path.write_text("  the secret\n")
        path.chmod(0o600)
        assert SecretSource(file=path).read() == "the secret"

    @pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o610])
    def test_file_that_others_can_reach(self, tmp_path: Path, mode: int) -> None:
        path = tmp_path / "secret"
        path.write_text("the secret")
        path.chmod(mode)
        with pytest.raises(SecretError, match="chmod 0600") as caught:
            SecretSource(file=path).read()
        assert "the secret" not in str(caught.value)

    def test_file_missing_or_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(SecretError, match="No such file"):
            SecretSource(file=tmp_path / "none").read()
        with pytest.raises(SecretError, match="not a regular file"):
            SecretSource(file=tmp_path).read()

    def test_file_that_is_not_text(self, tmp_path: Path) -> None:
        path = tmp_path / "secret"
        path.write_bytes(b"\xff\xfe")
        path.chmod(0o600)
        with pytest.raises(SecretError, match="UTF-8"):
            SecretSource(file=path).read()

    def test_empty_file(self, tmp_path: Path) -> None:
        path = tmp_path / "pin"
        path.write_text("\n")
        path.chmod(0o600)
        with pytest.raises(SecretError, match="is empty"):
            SecretSource(file=path).read()

    def test_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        source = SecretSource(env="XKIPROXY_TEST_SECRET")
        with pytest.raises(SecretError, match="XKIPROXY_TEST_SECRET is not set"):
            source.read()
        monkeypatch.setenv("XKIPROXY_TEST_SECRET", "the secret")
        assert source.read() == "the secret"
        assert "the secret" not in repr(source)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
    @pytest.mark.parametrize(
        ("owner", "caller", "says"),
        [
            (65534, 0, "belongs to nobody and you are root; run this as nobody: runuser -u nobody"),
            (
                54321,
                0,
                "belongs to 54321 and you are root; run this as 54321: setpriv --reuid=54321",
            ),
            (65534, 54321, "run this as nobody, or if 54321 is the proxy's user: chown 54321 "),
        ],
    )
    def test_file_of_somebody_else(
        self,
        owner: int,
        caller: int,
        says: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Root is told to be the service's user: giving the file away would stop the service."""
        path = tmp_path / "secret"
        path.write_text("x")
        path.chmod(0o600)
        os.chown(path, owner, -1)
        monkeypatch.setattr("os.geteuid", lambda: caller)
        with pytest.raises(SecretError) as caught:
            SecretSource(file=path).read()
        assert says in str(caught.value)
        assert ("chown" in str(caught.value)) is (caller != 0)

    def test_credentials_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = SecretSource(credential="master-key")
        monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
        with pytest.raises(SecretError, match=r"systemd-run .*LoadCredential=master-key:FILE"):
            source.read()
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
        with pytest.raises(SecretError, match="No such file"):
            source.read()
        (tmp_path / "master-key").write_text("the secret\n")
        assert source.read() == "the secret"


class TestCredentials:
    GOOD = (
        '[[credential]]\naccess_key_id = "XKIAAAAAAAAA"\n'
        'access_key_secret = "0123456789abcdef"\ncreated = "2026-01-01T00:00:00Z"\n'
    )

    def test_a_list(self) -> None:
        text = self.GOOD + self.GOOD.replace("AAAA", "BBBB")
        first, second = parse_credentials(text, "f")
        assert first.access_key_id == "XKIAAAAAAAAA"
        assert second.access_key_secret == "0123456789abcdef"
        assert "0123456789abcdef" not in repr(first)

    def test_an_empty_list_lets_nobody_in(self) -> None:
        assert parse_credentials("credential = []", "f") == []

    @pytest.mark.parametrize("text", ["", "# what was here has gone\n"])
    def test_a_file_that_was_cut_short_is_none(self, text: str) -> None:
        with pytest.raises(CredentialError, match=r"there is no .*, write credential = "):
            parse_credentials(text, "f")

    @pytest.mark.parametrize(
        ("old", "new", "what"),
        [
            ("access_key_id", "id", "access_key_id: is missing"),
            ("created", "expires", "created: is missing"),
            ('"XKIAAAAAAAAA"', '"a/b/c/d/e/f"', "8 to 128"),
            ('"XKIAAAAAAAAA"', "5", "8 to 128"),
            ('"0123456789abcdef"', '"short"', "16 to 256"),
            ('"0123456789abcdef"', '"with space 0123456789"', "16 to 256"),
            ("[[credential]]", "[[credentials]]", "only [[credential]]"),
            ("[[credential]]", "[credential]", "array"),
            ("created", "extra = 1\ncreated", "extra: unknown key"),
            ("=", "", "not valid TOML"),
        ],
    )
    def test_mistakes_without_their_secrets(self, old: str, new: str, what: str) -> None:
        with pytest.raises(CredentialError) as caught:
            parse_credentials(self.GOOD.replace(old, new, 1), "the-file")
        assert "the-file" in str(caught.value)
        assert what in str(caught.value)
        assert "0123456789abcdef" not in str(caught.value)

    def test_an_id_twice(self) -> None:
        with pytest.raises(CredentialError, match="twice"):
            parse_credentials(self.GOOD + self.GOOD, "f")


def test_the_audit_log_of_a_worker_is_kept_as_the_configuration_says(tmp_path: Path) -> None:
    text = GOOD + ('\n[audit]\nmax_bytes = 65536\nfsync = true\nhmac_key = "audit.key"\n')
    audit = load_config(write(tmp_path, text)).share(1).audit
    assert audit.path == tmp_path / "audit-2.jsonl"
    assert (audit.max_bytes, audit.max_age_hours, audit.fsync) == (65536, 24, True)
    key = bytes(range(32))
    source = audit.hmac_key
    assert source is not None
    for written in (key.hex(), b64encode(key).decode()):
        (tmp_path / "audit.key").unlink(missing_ok=True)
        write_secret_file(tmp_path / "audit.key", written + "\n")
        assert source.read_key() == key
    loose = "B" * 43 + "="  # its last bits are none of a key's
    for wrong in ("", "zz" * 32, key.hex()[:-2], b64encode(key + b"x").decode(), loose):
        (tmp_path / "audit.key").unlink()
        write_secret_file(tmp_path / "audit.key", wrong)
        with pytest.raises(SecretError, match=r"must be 32 bytes|is empty") as caught:
            source.read_key()
        assert not wrong or wrong not in str(caught.value)


def test_an_audit_log_is_not_rotated_all_the_time(tmp_path: Path) -> None:
    found = problems(tmp_path, GOOD + "\n[audit]\nmax_bytes = 100\n")
    assert found == {"audit.max_bytes": "must be 0 (no limit) or at least 65536"}
