"""`xkiproxy credentials`: nothing lost, nothing shown, nothing left half-written."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cli_site import ACCESS_KEY_ID, ACCESS_KEY_SECRET, Run, Site

from xkiproxy.config.secrets import SecretError, SecretSource
from xkiproxy.keystores import credentials_file
from xkiproxy.keystores.credentials import Credential, CredentialError, load_credentials
from xkiproxy.keystores.credentials_file import changing_credentials, format_credentials, newest

TEXT = 'a "quoted" \\ secret of 20'.replace(" ", "~")


def ids(site: Site) -> list[str]:
    return [c.access_key_id for c in load_credentials(SecretSource(file=site.credentials))]


def test_add_prints_the_credential_once(run: Run, site: Site) -> None:
    added = run("credentials", "add", "--config", site.config, "--json")
    fields = added.json()
    assert list(fields) == ["keystore", "access_key_id", "access_key_secret", "created"]
    assert re.fullmatch(r"XKI[A-Z2-7]{21}", fields["access_key_id"])
    assert re.fullmatch(r"[A-Za-z0-9_-]{43,}", fields["access_key_secret"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", fields["created"])
    assert "xkiproxy reload" in added.err
    assert ids(site) == [ACCESS_KEY_ID, fields["access_key_id"]]
    stored = load_credentials(SecretSource(file=site.credentials))
    assert stored[1].access_key_secret == fields["access_key_secret"]
    listed = run("credentials", "list", "--config", site.config)
    assert fields["access_key_id"] in listed.out
    assert fields["access_key_secret"] not in listed.out + listed.err


def test_add_in_the_form_of_the_other_cloud(run: Run, xks_site: Site) -> None:
    fields = run("credentials", "add", "--config", xks_site.config, "--json").json()
    assert re.fullmatch(r"[A-Z2-7]{20,30}", fields["access_key_id"])
    assert re.fullmatch(r"[A-Za-z0-9+/=]{43,64}", fields["access_key_secret"])
    assert len(base64.b64decode(fields["access_key_secret"], validate=True)) == 32
    assert ids(xks_site) == [ACCESS_KEY_ID, fields["access_key_id"]]


def test_add_for_people(run: Run, site: Site) -> None:
    added = run("credentials", "add", "-c", site.config)
    assert added.status == 0
    assert "access_key_secret" in added.out


def test_list_shows_no_secret(run: Run, site: Site) -> None:
    listed = run("credentials", "list", "--config", site.config, "--json")
    created = "2026-01-02T03:04:05Z"
    assert listed.json() == [
        {"access_key_id": ACCESS_KEY_ID, "created": created, "last_used": None}
    ]
    for outcome in (listed, run("credentials", "list", "--config", site.config)):
        assert ACCESS_KEY_SECRET not in outcome.out + outcome.err


def test_revoke(run: Run, site: Site) -> None:
    added = run("credentials", "add", "--config", site.config, "--json").json()
    revoked = run("credentials", "revoke", ACCESS_KEY_ID, "--config", site.config, "--json")
    assert revoked.json() == {
        "keystore": "demo",
        "access_key_id": ACCESS_KEY_ID,
        "revoked": True,
    }
    assert "xkiproxy reload" in revoked.err
    assert ids(site) == [added["access_key_id"]]


def test_revoke_refuses_the_unknown_and_the_last(run: Run, site: Site) -> None:
    before = site.credentials.read_bytes()
    unknown = run("credentials", "revoke", "XKINOBODY", "--config", site.config)
    assert (unknown.status, "no credential XKINOBODY" in unknown.err) == (1, True)
    last = run("credentials", "revoke", ACCESS_KEY_ID, "--config", site.config)
    assert (last.status, "--force" in last.err) == (1, True)
    assert site.credentials.read_bytes() == before
    forced = run("credentials", "revoke", ACCESS_KEY_ID, "--force", "--config", site.config)
    assert forced.status == 0
    assert ids(site) == []
    # A list that is empty can be filled again.
    assert run("credentials", "add", "--config", site.config).status == 0


def test_the_file_is_replaced_as_a_whole(run: Run, site: Site) -> None:
    before = site.credentials.stat()
    with site.credentials.open() as reader:
        assert run("credentials", "add", "--config", site.config).status == 0
        assert reader.read().count("[[credential]]") == 1  # who was reading still reads the old one
    after = site.credentials.stat()
    assert stat.S_IMODE(after.st_mode) == 0o600
    assert after.st_ino != before.st_ino
    assert [path.name for path in site.credentials.parent.iterdir()] == ["demo.toml"]


def test_a_failed_write_changes_nothing(
    run: Run, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = site.credentials.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    failed = run("credentials", "add", "--config", site.config)
    assert (failed.status, "No space left" in failed.err, failed.out) == (1, True, "")
    assert site.credentials.read_bytes() == before
    assert [path.name for path in site.credentials.parent.iterdir()] == ["demo.toml"]


def test_adds_at_the_same_time_lose_none(site: Site) -> None:
    command = [sys.executable, "-m", "xkiproxy", "credentials", "add", "--config", site.config]
    processes = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(6)
    ]
    assert [process.wait() for process in processes] == [0] * 6
    assert len(set(ids(site))) == 7


def test_a_missing_file_is_made(run: Run, site: Site) -> None:
    site.credentials.unlink()
    assert run("credentials", "add", "--config", site.config).status == 0
    assert stat.S_IMODE(site.credentials.stat().st_mode) == 0o600
    assert len(ids(site)) == 1


def test_a_missing_directory_is_an_error(run: Run, site: Site) -> None:
    site.credentials.unlink()
    site.credentials.parent.rmdir()
    failed = run("credentials", "add", "--config", site.config)
    assert (failed.status, "No such file" in failed.err) == (1, True)


def test_a_link_is_followed(site: Site, tmp_path: Path) -> None:
    link = tmp_path / "link.toml"
    link.symlink_to(site.credentials)
    with changing_credentials(link) as credentials:
        credentials.append(Credential("XKISECOND", TEXT, "2026-01-01T00:00:00Z"))
    assert link.is_symlink()
    assert ids(site) == [ACCESS_KEY_ID, "XKISECOND"]


def test_a_file_that_others_read_is_refused(run: Run, site: Site) -> None:
    site.credentials.chmod(0o640)
    for arguments in (["list"], ["add"], ["revoke", ACCESS_KEY_ID]):
        refused = run("credentials", *arguments, "--config", site.config)
        assert (refused.status, "chmod 0600" in refused.err) == (1, True)
    assert ACCESS_KEY_ID in site.credentials.read_text()


def test_a_broken_file_is_refused_and_kept(run: Run, site: Site) -> None:
    site.credentials.write_text("[[credential]]\nsecret = 'hunter2hunter2'\n")
    refused = run("credentials", "add", "--config", site.config)
    assert (refused.status, "credential[0]" in refused.err) == (1, True)
    assert "hunter2" not in refused.err
    assert "hunter2" in site.credentials.read_text()


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ('{ env = "DEMO_CREDENTIALS" }', "environment variable DEMO_CREDENTIALS"),
        ('{ credential = "demo" }', "$CREDENTIALS_DIRECTORY/demo"),
    ],
)
def test_other_sources_are_not_changed(run: Run, site: Site, source: str, place: str) -> None:
    site.add_keystore(source)
    for arguments in (["add"], ["revoke", "XKISOMETHING"]):
        refused = run("credentials", *arguments, "--keystore", "second", "--config", site.config)
        assert (refused.status, place in refused.err) == (1, True)


def test_several_key_stores_must_be_told_apart(run: Run, site: Site) -> None:
    site.add_keystore('"credentials/second.toml"')
    refused = run("credentials", "list", "--config", site.config)
    assert (refused.status, "demo, second" in refused.err) == (1, True)
    wrong = run("credentials", "list", "--keystore", "third", "--config", site.config)
    assert (wrong.status, "demo, second" in wrong.err) == (1, True)
    assert run("credentials", "add", "--keystore", "second", "--config", site.config).status == 0
    assert ids(site) == [ACCESS_KEY_ID]


def test_misuse_is_status_2(run: Run, site: Site) -> None:
    assert run("credentials", "revoke", "--config", site.config).status == 2
    assert run("credentials", "add", "--secret", "x", "--config", site.config).status == 2


def test_help_has_examples(run: Run) -> None:
    for command in ("add", "list", "revoke"):
        assert "Example: xkiproxy credentials" in run("credentials", command, "--help").out


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    credentials = [Credential("XKIFIRST", TEXT, "2026-01-01T00:00:00Z")]
    file = tmp_path / "file.toml"
    with changing_credentials(file) as empty:
        empty.extend(credentials)
    assert load_credentials(SecretSource(file=file)) == credentials
    assert TEXT not in repr(credentials)
    assert format_credentials([]).startswith("#")


def test_an_exception_writes_nothing(site: Site) -> None:
    before = site.credentials.read_bytes()
    with contextlib.suppress(KeyError), changing_credentials(site.credentials) as credentials:
        credentials.clear()
        raise KeyError
    assert site.credentials.read_bytes() == before


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SecretError), changing_credentials(tmp_path):
        pass
    with pytest.raises(CredentialError), changing_credentials(tmp_path / "no" / "file"):
        pass


def test_newest() -> None:
    def credential(name: str, created: str) -> Credential:
        return Credential(name, TEXT, created)

    old = credential("old", "2026-01-01T00:00:00Z")
    late = credential("late", "2026-01-01 00:00:01+00:00")
    same = credential("same", "2026-01-01T00:00:01")
    odd = credential("odd", "yesterday")
    assert newest([]) is None
    assert newest([odd]) is odd
    assert newest([late, old, odd]) is late
    assert newest([late, same, old]) is same


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_the_owner_stays(site: Site, tmp_path: Path) -> None:
    os.chown(site.credentials, 12345, 12345)
    credentials_file._replace(site.credentials, "# nothing\n")
    assert site.credentials.stat().st_uid == 12345
