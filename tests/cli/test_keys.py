"""`xkiproxy keys`, as its user types it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from xkiproxy.cli import main
from xkiproxy.crypto.algorithms import KeySpec
from xkiproxy.kmi.software import Keyring, create_keyring, new_master_key

_CONFIG = """
[server]
listen = "127.0.0.1:0"
plaintext = true

[[kmi]]
name = "local"
type = "software"
keyring = "keyring.db"

[[keystore]]
name = "demo"
protocol = "xki"
path_prefix = "/demo"
kmi = ["local"]
credentials = "demo.toml"
"""
_FIELDS = ["id", "kmi", "spec", "state", "version", "encryptions", "created", "usage"]


@dataclass
class Outcome:
    status: int
    out: str
    err: str

    @property
    def value(self) -> Any:
        return json.loads(self.out)


Keys = Callable[..., Outcome]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    master_key = new_master_key()
    create_keyring(tmp_path / "keyring.db", master_key)
    (tmp_path / "xkiproxy.toml").write_text(_CONFIG)
    for name, text in (("master.key", master_key), ("demo.toml", "")):
        (tmp_path / name).touch(0o600)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def keys(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Keys:
    def run(*args: str) -> Outcome:
        config = ["--config", str(folder / "xkiproxy.toml")]
        monkeypatch.setattr(sys, "argv", ["xkiproxy", "keys", *args, *config])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        code = caught.value.code
        return Outcome(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


def keyring(folder: Path) -> Keyring:
    return Keyring(folder / "keyring.db", (folder / "master.key").read_text())


def test_create_and_show(keys: Keys) -> None:
    made = keys("create", "k", "--json")
    assert made.status == 0
    assert list(made.value) == _FIELDS
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", made.value.pop("created"))
    made_value = json.loads(made.out)
    assert {name: made_value[name] for name in _FIELDS if name != "created"} == {
        "id": "k",
        "kmi": "local",
        "spec": "AES_256",
        "state": "ENABLED",
        "version": 1,
        "encryptions": 0,
        "usage": "both",
    }
    assert keys("show", "k", "--json").value == made_value
    text = keys("show", "k")
    assert re.search(r"^spec +AES_256$", text.out, re.MULTILINE)


@pytest.mark.parametrize("spec", KeySpec)
@pytest.mark.parametrize("usage", ["encrypt", "decrypt", "both"])
def test_create_options(spec: KeySpec, usage: str, keys: Keys) -> None:
    value = keys("create", "k", "--spec", spec.value, "--usage", usage, "--json").value
    assert (value["spec"], value["usage"]) == (spec.value, usage)


def test_list(keys: Keys) -> None:
    assert keys("list", "--json").value == []
    for name in ("b", "a"):
        keys("create", name)
    listed = keys("list", "--json")
    assert [key["id"] for key in listed.value] == ["a", "b"]
    assert [list(key) for key in listed.value] == [_FIELDS, _FIELDS]
    table = keys("list").out.splitlines()
    assert table[0].split() == [
        "ID",
        "KMI",
        "SPEC",
        "STATE",
        "VERSION",
        "ENCRYPTIONS",
        "CREATED",
        "USAGE",
        "DELETION",
        "PROBLEM",
    ]
    assert [line.split()[0] for line in table[1:]] == ["a", "b"]


def test_disable_and_enable(keys: Keys) -> None:
    keys("create", "k")
    for command, state in (("disable", "DISABLED"), ("enable", "ENABLED")):
        for _ in range(2):
            assert keys(command, "k", "--json").value["state"] == state
        assert keys("show", "k", "--json").value["state"] == state


def test_forget(keys: Keys) -> None:
    keys("create", "k", "--usage", "decrypt")
    assert "keys disable k" in keys("forget", "k").err
    keys("delete", "k", "--days", "7")
    assert "--cancel" in keys("forget", "k").err
    keys("delete", "k", "--cancel")
    assert keys("show", "k", "--json").value["state"] == "DISABLED"
    done = keys("forget", "k")
    assert done.status == 0
    assert "xkiproxy keys enable k --kmi local --usage decrypt" in done.out
    assert keys("show", "k", "--json").value["state"] == "UNREGISTERED"
    refused = keys("forget", "k")
    assert refused.status == 1
    assert "not registered" in refused.err
    assert keys("enable", "k", "--json").value["state"] == "ENABLED"


def test_usage(keys: Keys) -> None:
    keys("create", "k")
    assert "xkiproxy keys usage k encrypt" in keys("enable", "k", "--usage", "encrypt").err
    assert keys("usage", "k", "encrypt", "--json").value["usage"] == "encrypt"
    assert keys("usage", "k", "sign").status == 2
    assert "not registered" in keys("usage", "other", "both").err
    keys("delete", "k", "--days", "7")
    assert "--cancel" in keys("usage", "k", "both").err


def test_labels(keys: Keys) -> None:
    made = keys("create", "labelled", "--label", "environment=test", "--label", "a=b=c", "--json")
    assert made.value["labels"] == {"environment": "test", "a": "b=c"}
    changed = keys("label", "labelled", "environment=production", "--remove", "a", "--json")
    assert changed.value["labels"] == {"environment": "production"}
    assert keys("disable", "labelled", "--json").value["labels"] == changed.value["labels"]
    assert "environment=production" in keys("show", "labelled").out
    assert "has no label nothing" in keys("label", "labelled", "--remove", "nothing").err


@pytest.mark.parametrize(
    "text", ["", "a", "=b", "-a=b", "a=\u00e9", "a" * 64 + "=b", "a=" + "b" * 257]
)
def test_labels_that_are_refused(keys: Keys, text: str) -> None:
    refused = keys("label", "k", text)
    assert refused.status == 2
    assert "NAME=VALUE" in refused.err


def test_rotate(keys: Keys) -> None:
    keys("create", "k")
    assert keys("rotate", "k", "--json").value["version"] == 2


def test_rotate_is_refused_for_raw_key_stores(keys: Keys, folder: Path) -> None:
    keys("create", "k")
    (folder / "xkiproxy.toml").write_text(_CONFIG + 'ciphertext_format = "raw"\n')
    refused = keys("rotate", "k")
    assert refused.status == 1
    assert 'ciphertext_format = "raw"' in refused.err
    assert keys("show", "k", "--json").value["version"] == 1


def test_delete_and_cancel(keys: Keys) -> None:
    keys("create", "k")
    deleted = keys("delete", "k", "--days", "30", "--json").value
    assert list(deleted) == [*_FIELDS, "deletion_time"]
    assert deleted["state"] == "PENDING_DELETION"
    assert keys("list").out.count(deleted["deletion_time"]) == 1
    for command in ("enable", "disable", "rotate"):
        refused = keys(command, "k")
        assert refused.status == 1
        assert "keys delete k --cancel" in refused.err
    kept = keys("delete", "k", "--cancel", "--json").value
    assert list(kept) == _FIELDS
    assert kept["state"] == "DISABLED"
    assert deleted["deletion_time"] not in keys("list").out
    for option in (["--days=7"], ["--cancel"]):
        assert "each has its own catalog" in keys("delete", "k", *option).err
    assert keys("enable", "k", "--json").value["state"] == "ENABLED"


@pytest.mark.parametrize(
    "args",
    [
        ["delete", "k"],
        ["delete", "k", "--days", "6"],
        ["delete", "k", "--days", "367"],
        ["delete", "k", "--days", "7", "--cancel"],
        ["create"],
        ["create", "k", "--spec", "DES"],
        ["create", "k", "--usage", "sign"],
        ["list", "--unknown"],
    ],
)
def test_misuse(args: list[str], keys: Keys) -> None:
    if args[0] == "delete":
        keys("create", "k")
    outcome = keys(*args)
    assert outcome.status == 2
    assert outcome.out == ""


@pytest.mark.parametrize(
    "args",
    [["show"], ["enable"], ["disable"], ["rotate"], ["delete", "--days=7"], ["delete", "--cancel"]],
)
def test_an_unknown_key(args: list[str], keys: Keys) -> None:
    outcome = keys(*args, "nokey")
    assert (outcome.status, outcome.out) == (1, "")
    assert "key nokey: KMI local has no such key" in outcome.err
    assert "xkiproxy keys list" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_taken_or_impossible_id(keys: Keys) -> None:
    keys("create", "k")
    assert keys("create", "k").status == 1
    refused = keys("create", "a/b")
    assert refused.status == 1
    assert "1 to 128" in refused.err


def test_an_interrupted_creation(keys: Keys, folder: Path) -> None:
    opened = keyring(folder)
    opened.create("k", KeySpec.SM4)
    opened.close()
    assert keys("list", "--json").value[0]["state"] == "UNREGISTERED"
    assert "keys enable k" in keys("create", "k").err
    value = keys("enable", "k", "--usage", "decrypt", "--json").value
    assert (value["state"], value["usage"]) == ("ENABLED", "decrypt")
    assert keys("enable", "k", "--usage", "both").status == 1


def test_a_problem_is_shown(keys: Keys, folder: Path) -> None:
    keys("create", "k")
    opened = keyring(folder)
    with opened._database.writing() as connection:
        connection.execute("UPDATE versions SET wrapped = zeroblob(60)")
    opened.close()
    value = keys("show", "k", "--json").value
    assert list(value) == [*_FIELDS, "problem"]
    assert "version 1 was altered" in keys("list").out


def test_keys_that_the_configuration_disables(keys: Keys, folder: Path) -> None:
    for key in ("payroll", "cards"):
        keys("create", key)
    with (folder / "xkiproxy.toml").open("a") as file:
        file.write('disabled_keys = ["pay*"]\n')
    found = {key["id"]: key for key in keys("list", "--json").value}
    assert found["payroll"]["state"] == "ENABLED"  # in the catalog
    assert found["payroll"]["disabled_by"] == ["demo"]
    assert "disabled_by" not in found["cards"]
    assert "disabled_keys of key store demo" in keys("list").out
    assert "disabled_keys of key store demo" in keys("show", "payroll").err
    assert keys("show", "cards").err == ""


def test_several_kmis(keys: Keys, folder: Path) -> None:
    master_key = (folder / "master.key").read_text()
    create_keyring(folder / "second.db", master_key)
    second = '[[kmi]]\nname = "second"\ntype = "software"\nkeyring = "second.db"\n'
    (folder / "xkiproxy.toml").write_text(_CONFIG + second)
    refused = keys("list")
    assert refused.status == 1
    assert "local, second" in refused.err
    assert keys("create", "k", "--kmi", "second", "--json").value["kmi"] == "second"
    assert keys("list", "--kmi", "local", "--json").value == []
    refused = keys("list", "--kmi", "third")
    assert refused.status == 1
    assert "local, second" in refused.err


@pytest.fixture
def two_kmis(folder: Path) -> Path:
    """The key k at three KMIs, registered at none; a key store uses the first two."""
    master_key = (folder / "master.key").read_text()
    (folder / "xkiproxy.toml").write_text(
        _CONFIG.replace('kmi = ["local"]', 'kmi = ["local", "second"]')
        + '[[kmi]]\nname = "second"\ntype = "software"\nkeyring = "second.db"\n'
        + '[[kmi]]\nname = "third"\ntype = "software"\nkeyring = "second.db"\n'
    )
    create_keyring(folder / "second.db", master_key)
    for name in ("keyring.db", "second.db"):
        keyring = Keyring(folder / name, master_key, "the test")
        keyring.create("k", KeySpec.AES_256)
        keyring.close()
    return folder


@pytest.mark.usefixtures("two_kmis")
def test_labels_do_not_end_the_use_of_a_key_at_another_kmi(keys: Keys) -> None:
    here, there, apart = ("--kmi", "local"), ("--kmi", "second"), ("--kmi", "third")
    assert keys("label", "k", "a=b", *here, "--json").value["state"] == "DISABLED"
    assert keys("enable", "k", *here, "--json").value["labels"] == {"a": "b"}
    refused = keys("label", "k", "a=b", *there)
    assert refused.status == 1
    assert "xkiproxy keys enable k --kmi second --label NAME=VALUE" in refused.err
    assert keys("show", "k", *there, "--json").value["state"] == "UNREGISTERED"
    assert "KMI second has no such key" in keys("label", "missing", "a=b", *there).err
    enabled = keys("enable", "k", *there, "--label", "a=b", "--json").value
    assert (enabled["state"], enabled["labels"]) == ("ENABLED", {"a": "b"})
    # No key store uses it beside the others: there is no use to be ended.
    assert keys("label", "k", "a=b", *apart, "--json").value["state"] == "DISABLED"


def test_a_key_that_is_enabled_again_keeps_its_labels(keys: Keys) -> None:
    keys("create", "k", "--label", "a=b")
    keys("disable", "k")
    assert keys("enable", "k", "--label", "c=d", "--json").value["labels"] == {"a": "b", "c": "d"}
    assert keys("enable", "k", "--json").value["labels"] == {"a": "b", "c": "d"}


def without_secret_file(folder: Path) -> str:
    (folder / "master.key").unlink()
    return "master.key"


def without_credentials_directory(folder: Path) -> str:
    file = folder / "xkiproxy.toml"
    keyring = 'keyring = "keyring.db"\n'
    secret = 'master_key = { credential = "master-key" }\n'
    file.write_text(file.read_text().replace(keyring, keyring + secret))
    return "$CREDENTIALS_DIRECTORY"


def without_keyring(folder: Path) -> str:
    (folder / "keyring.db").rename(folder / "away.db")
    return "keyring.db"


@pytest.mark.parametrize(
    "take_away", [without_secret_file, without_credentials_directory, without_keyring]
)
def test_what_changes_the_catalog_alone_needs_no_kmi(
    take_away: Callable[[Path], str],
    keys: Keys,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    keys("create", "k")
    reason = take_away(folder)
    for args, state in (
        (["disable"], "DISABLED"),
        (["enable"], "ENABLED"),
        (["label", "a=b"], "ENABLED"),
        (["delete", "--days=7"], "PENDING_DELETION"),
        (["delete", "--cancel"], "DISABLED"),
    ):
        command, *others = args
        done = keys(command, "k", *others, "--json")
        assert (done.status, done.value["state"]) == (0, state)
        assert (done.value["spec"], done.value["version"]) == (None, None)
        assert "spec and version are not known" in done.value["problem"]
        assert done.err.startswith("warning: key k: ")
        assert reason in done.err
    text = keys("disable", "k")
    assert text.status == 0
    assert "spec " not in text.out.replace("spec and", "")
    for args in (["enable", "other"], ["disable", "other"], ["rotate", "k"], ["list"]):
        refused = keys(*args)
        assert (refused.status, refused.out) == (1, "")
        assert reason in refused.err


def test_failures_name_the_file_and_no_secret(keys: Keys, folder: Path) -> None:
    secret = (folder / "master.key").read_text()
    wrong = new_master_key()
    (folder / "master.key").write_text(wrong)
    refused = keys("list")
    assert refused.status == 1
    assert "keyring.db" in refused.err
    assert "master.key" in refused.err
    assert not [text for text in (secret, wrong) if text in refused.err]
    (folder / "master.key").chmod(0o644)
    assert "chmod 0600" in keys("list").err
    (folder / "master.key").chmod(0o600)
    (folder / "keyring.db").unlink()
    refused = keys("list")
    assert refused.status == 1
    assert "xkiproxy keyring create" in refused.err


@pytest.mark.parametrize(
    "command",
    ["create", "list", "show", "enable", "disable", "label", "rotate", "delete", "forget", "usage"],
)
def test_help_has_an_example(command: str, keys: Keys) -> None:
    assert f"xkiproxy keys {command}" in keys(command, "--help").out


def test_the_installed_command(folder: Path) -> None:
    config = str(folder / "xkiproxy.toml")
    command = [sys.executable, "-m", "xkiproxy", "keys", "create", "k", "--json", "-c", config]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["id"] == "k"
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr.startswith("xkiproxy: key k: ")
