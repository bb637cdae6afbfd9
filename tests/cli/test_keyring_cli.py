"""`xkiproxy keyring`, as its user types it."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_site import Run, Site

from xkiproxy.kmi.software import Keyring

_SECOND = '[[kmi]]\nname = "second"\ntype = "software"\nkeyring = "second.db"\n'
_HSM = """
[[kmi]]
name = "local"
type = "pkcs11"
module = "/nowhere.so"
token = "token"
pin = "pin"
"""


def keyring(site: Site) -> Path:
    return site.directory / "keyring.db"


def master_key(site: Site) -> str:
    return (site.directory / "master.key").read_text().strip()


@pytest.fixture
def made(run: Run, site: Site) -> Site:
    assert run("keyring", "create", "--config", site.config).status == 0
    assert run("keys", "create", "k", "--config", site.config).status == 0
    return site


def test_create(run: Run, site: Site) -> None:
    missing = run("keys", "create", "k", "--config", site.config)
    assert missing.status == 1
    done = run("keyring", "create", "--kmi", "local", "--json", "--config", site.config)
    assert done.json() == {
        "kmi": "local",
        "keyring": str(keyring(site)),
        "master_key": str(site.directory / "master.key"),
        "master_key_is_new": True,
    }
    assert run("keys", "create", "k", "--config", site.config).status == 0


def test_a_lost_keyring_is_made_new_as_the_error_says(run: Run, made: Site) -> None:
    before = master_key(made)
    keyring(made).unlink()
    refused = run("keys", "create", "other", "--config", made.config)
    assert "xkiproxy keyring create" in refused.err
    done = run("keyring", "create", "--config", made.config)
    assert done.status == 0
    assert "which was there" in done.out
    assert master_key(made) == before
    assert before not in done.out + done.err
    assert run("keys", "create", "other", "--config", made.config).status == 0


def test_create_overwrites_nothing(run: Run, made: Site) -> None:
    before, key = keyring(made).read_bytes(), master_key(made)
    refused = run("keyring", "create", "--config", made.config)
    assert (refused.status, refused.out) == (1, "")
    assert "is there already; it was left as it is" in refused.err
    assert (keyring(made).read_bytes(), master_key(made)) == (before, key)


def test_create_without_the_environment(
    run: Run, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MASTER_KEY_OF_THE_TEST", raising=False)
    text = site.config.read_text()
    named = '"keyring.db"\nmaster_key = { env = "MASTER_KEY_OF_THE_TEST" }'
    site.config.write_text(text.replace('"keyring.db"', named))
    refused = run("keyring", "create", "--config", site.config)
    assert refused.status == 1
    assert "MASTER_KEY_OF_THE_TEST is not set; put a master key there first" in refused.err
    assert not keyring(site).exists()


def test_rewrap(run: Run, made: Site) -> None:
    before = master_key(made)
    done = run("keyring", "rewrap", "--config", made.config)
    assert done.status == 0
    assert "Wrapped 1 versions of keys anew." in done.out
    assert "restart the servers" in done.out
    after = master_key(made)
    assert after != before
    assert not [key for key in (before, after) if key in done.out + done.err]
    listed = run("keys", "list", "--json", "--config", made.config).json()
    assert [(key["id"], key["state"]) for key in listed] == [("k", "ENABLED")]
    done = run("keyring", "rewrap", "--kmi", "local", "--json", "--config", made.config)
    assert done.json() == {
        "kmi": "local",
        "keyring": str(keyring(made)),
        "master_key": str(made.directory / "master.key"),
        "in_force": True,
        "versions": 1,
    }


def test_an_interrupted_rewrap_is_finished(
    run: Run, made: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError(5, "planted")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        assert run("keyring", "rewrap", "--config", made.config).status == 1
    refused = run("keys", "list", "--config", made.config)
    assert refused.status == 1
    assert "finish it with: xkiproxy keyring rewrap" in refused.err
    done = run("keyring", "rewrap", "--config", made.config)
    assert done.status == 0
    assert "this one has finished it" in done.out
    assert run("keys", "list", "--config", made.config).status == 0


def test_rewrap_to_another_file(run: Run, made: Site) -> None:
    before, place = master_key(made), made.directory / "new"
    done = run("keyring", "rewrap", "--new-master-key", place, "--config", made.config)
    assert done.status == 0
    assert f"Put it into {made.directory / 'master.key'} now" in done.out
    assert master_key(made) == before
    refused = run("keys", "list", "--config", made.config)
    assert f"the last rewrap wrote that to {place}" in refused.err
    Keyring(keyring(made), place.read_text().strip()).close()
    place.rename(made.directory / "master.key")
    assert run("keys", "list", "--config", made.config).status == 0


@pytest.mark.parametrize("command", ["create", "rewrap"])
def test_which_kmi(command: str, run: Run, site: Site) -> None:
    unknown = run("keyring", command, "--kmi", "third", "--config", site.config)
    assert unknown.status == 1
    assert "there is no KMI 'third' of type software; there are: local" in unknown.err
    text = site.config.read_text()
    site.config.write_text(text + _SECOND)
    several = run("keyring", command, "--config", site.config)
    assert several.status == 1
    assert "say which with --kmi, of: local, second" in several.err
    before, rest = text.split("[[kmi]]")
    site.config.write_text(before + _HSM + rest[rest.index("[[keystore]]") :])
    none = run("keyring", command, "--config", site.config)
    assert none.status == 1
    assert "no KMI of type software" in none.err


@pytest.mark.parametrize("command", ["create", "rewrap"])
def test_help_has_an_example(command: str, run: Run) -> None:
    assert f"xkiproxy keyring {command} --kmi local" in run("keyring", command, "--help").out
