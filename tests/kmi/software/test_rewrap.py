"""A keyring under a new master key: nothing is lost, whatever happens on the way."""

from __future__ import annotations

import base64
import fcntl
import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from xkiproxy.config.models import SoftwareSettings
from xkiproxy.config.secrets import SecretError, SecretSource
from xkiproxy.crypto.algorithms import KEY_SIZES, KeySpec
from xkiproxy.crypto.operations import Decrypt, Describe, Encrypt, Fault, OperationError
from xkiproxy.kmi.base import KeyManagerError
from xkiproxy.kmi.software import (
    Keyring,
    MasterKeyChanged,
    SoftwareLane,
    create_keyring,
    make_keyring,
    new_master_key,
    open_keyring,
    rewrap_keyring,
)

Contents = dict[str, dict[int, bytes]]

_REWRAPPER = """
import sys
from pathlib import Path
from xkiproxy.config.models import SoftwareSettings
from xkiproxy.kmi.software import rewrap_keyring

folder = Path(sys.argv[1])
settings = SoftwareSettings(
    name="local", type="software", keyring=folder / "keyring.db", master_key=folder / "master.key"
)
print("ready", flush=True)
while True:
    rewrap_keyring(settings)
"""

_FULL = """
import resource, sys
from pathlib import Path
from xkiproxy.config.models import SoftwareSettings
from xkiproxy.kmi.base import KeyManagerError
from xkiproxy.kmi.software import open_keyring, rewrap_keyring

folder = Path(sys.argv[1])
settings = SoftwareSettings(
    name="local", type="software", keyring=folder / "keyring.db", master_key=folder / "master.key"
)
open_keyring(settings).close()
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    rewrap_keyring(settings)
except KeyManagerError as error:
    print(error)
    sys.exit(1)
"""


def contents(keyring: Keyring) -> Contents:
    try:
        keys = keyring.unwrap_all()
    finally:
        keyring.close()
    assert not [key.info.problem for key in keys if key.info.problem]
    return {key.info.key_id: dict(key.materials) for key in keys}


@pytest.fixture
def settings(path: Path, master_key: str) -> SoftwareSettings:
    file = path.with_name("master.key")
    file.touch(0o600)
    file.write_text(master_key + "\n")
    return settings_of(path, SecretSource(file=file))


def settings_of(path: Path, source: SecretSource) -> SoftwareSettings:
    return SoftwareSettings(name="local", type="software", keyring=path, master_key=source)


@pytest.fixture
def filled(settings: SoftwareSettings) -> Contents:
    keyring = open_keyring(settings)
    for number in range(20):
        keyring.create(f"key-{number:02}", list(KeySpec)[number % 4])
        for _ in range(number % 3):
            keyring.rotate(f"key-{number:02}")
    return contents(keyring)


def test_every_version_is_as_it_was(
    settings: SoftwareSettings, filled: Contents, master_key: str
) -> None:
    path, file = settings.keyring, settings.keyring.with_name("master.key")
    done = rewrap_keyring(settings)
    assert (done.place, done.in_force, done.versions) == (file, True, 39)
    assert file.read_text().strip() != master_key
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert contents(open_keyring(settings)) == filled
    assert {other.name for other in path.parent.iterdir()} == {"keyring.db", "master.key"}


def test_the_old_master_key_opens_nothing_any_more(
    settings: SoftwareSettings, filled: Contents, master_key: str
) -> None:
    keyring = open_keyring(settings)
    with keyring._database.reading() as connection:
        rows = connection.execute("SELECT wrapped FROM versions").fetchall()
        before = [bytes(row[0]) for row in rows]
    keyring.close()
    rewrap_keyring(settings)
    with pytest.raises(MasterKeyChanged, match="not the one"):
        Keyring(settings.keyring, master_key)
    held = settings.keyring.read_bytes()
    new = (settings.keyring.with_name("master.key")).read_text().strip()
    assert not [wrapped for wrapped in before if wrapped in held]
    assert base64.b64decode(new) not in held
    assert not [m for versions in filled.values() for m in versions.values() if m in held]


def test_ciphertexts_of_all_versions_still_decrypt(settings: SoftwareSettings) -> None:
    keyring = open_keyring(settings)
    keyring.create("k", KeySpec.AES_256)
    lane = SoftwareLane(keyring)
    made = []
    for version in (1, 2, 3):
        made.append(lane.execute(Encrypt("k", b"text %d" % version, aad=b"a")))
        keyring.rotate("k")
        lane.refresh()
    lane.close()
    rewrap_keyring(settings)
    lane = SoftwareLane(open_keyring(settings))
    for version, c in enumerate(made, 1):
        again = lane.execute(
            Decrypt("k", c.ciphertext, iv=c.iv, version=version, aad=b"a")  # type: ignore[union-attr]
        )
        assert again.plaintext == b"text %d" % version  # type: ignore[union-attr]
    lane.close()


def test_it_can_be_done_again_and_again(settings: SoftwareSettings, filled: Contents) -> None:
    for _ in range(3):
        assert rewrap_keyring(settings).versions == 39
    assert contents(open_keyring(settings)) == filled


# ---- interrupted


def readable(settings: SoftwareSettings) -> Contents:
    """What is in the keyring, by the key in place or by the file that the error names."""
    try:
        return contents(open_keyring(settings))
    except MasterKeyChanged as error:
        beside = settings.keyring.with_name("master.key.new")
        assert f"left that in {beside}" in str(error)
        assert "xkiproxy keyring rewrap" in str(error)
        return contents(Keyring(settings.keyring, beside.read_text().strip()))


def test_kill_at_any_moment(settings: SoftwareSettings, filled: Contents) -> None:
    chance = random.Random()
    folder = settings.keyring.parent
    for _ in range(25):
        child = subprocess.Popen(
            [sys.executable, "-c", _REWRAPPER, str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0, 0.06))
        child.send_signal(signal.SIGKILL)
        _, errors = child.communicate()
        assert child.returncode == -signal.SIGKILL, errors
        assert readable(settings) == filled
        if chance.random() < 0.5:  # else the next child goes on from what this one has left
            rewrap_keyring(settings)
            assert contents(open_keyring(settings)) == filled
            assert not (folder / "master.key.new").exists()


def fail(*args: object, **kwargs: object) -> None:
    raise OSError(5, "planted")


@pytest.mark.parametrize("target", ["os.link", "write_secret_file", "sync_directory"])
def test_a_new_master_key_that_cannot_be_written(
    target: str,
    settings: SoftwareSettings,
    filled: Contents,
    master_key: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(f"xkiproxy.kmi.software.rewrap.{target}", fail)
        with pytest.raises(KeyManagerError, match="the keyring was not changed"):
            rewrap_keyring(settings)
    assert contents(Keyring(settings.keyring, master_key)) == filled
    assert rewrap_keyring(settings).versions == 39
    assert contents(open_keyring(settings)) == filled


def test_a_move_that_fails_is_finished_by_the_next_one(
    settings: SoftwareSettings, filled: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = settings.keyring.with_name("master.key.new")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(KeyManagerError, match="put that there") as caught:
            rewrap_keyring(settings)
    assert str(beside) in str(caught.value)
    assert beside.read_text().strip() not in str(caught.value)
    with pytest.raises(MasterKeyChanged):
        open_keyring(settings)
    assert readable(settings) == filled
    assert rewrap_keyring(settings).versions is None
    assert contents(open_keyring(settings)) == filled
    assert not beside.exists()


@pytest.mark.parametrize("size", [0, 4_096, 12_000])
def test_a_full_disk(size: int, settings: SoftwareSettings, filled: Contents) -> None:
    """First there is no room for the master key, then none for the transaction."""
    command = [sys.executable, "-c", _FULL, str(settings.keyring.parent), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "cannot be written" in done.stdout or "the disk" in done.stdout
    assert contents(open_keyring(settings)) == filled
    assert rewrap_keyring(settings).versions == 39
    assert contents(open_keyring(settings)) == filled


# ---- what is refused


def unchanged(settings: SoftwareSettings) -> Callable[[], None]:
    files = {p: p.read_bytes() for p in settings.keyring.parent.iterdir()}

    def check() -> None:
        assert {p: p.read_bytes() for p in settings.keyring.parent.iterdir()} == files

    return check


def test_a_wrong_master_key(settings: SoftwareSettings, filled: Contents) -> None:
    settings.keyring.with_name("master.key").write_text(new_master_key())
    check = unchanged(settings)
    with pytest.raises(MasterKeyChanged, match="not the one"):
        rewrap_keyring(settings)
    check()


def test_a_wrong_master_key_and_a_wrong_one_beside(
    settings: SoftwareSettings, filled: Contents
) -> None:
    for name in ("master.key", "master.key.new"):
        settings.keyring.with_name(name).touch(0o600)
        settings.keyring.with_name(name).write_text(new_master_key())
    check = unchanged(settings)
    with pytest.raises(MasterKeyChanged, match=r"master\.key\.new is not the one"):
        rewrap_keyring(settings)
    check()


def test_a_key_that_does_not_unwrap(settings: SoftwareSettings, filled: Contents) -> None:
    keyring = open_keyring(settings)
    with keyring._database.writing() as connection:
        connection.execute("UPDATE versions SET wrapped = zeroblob(60) WHERE key_id = 'key-01'")
    keyring.close()
    with pytest.raises(
        KeyManagerError, match=r"key-01: version 2 was altered.*nothing was changed"
    ):
        rewrap_keyring(settings)
    keyring = open_keyring(settings)
    keyring.destroy("key-01")
    del filled["key-01"]
    assert contents(keyring) == filled
    assert rewrap_keyring(settings).versions == 37


def test_two_at_the_same_time(settings: SoftwareSettings, filled: Contents) -> None:
    descriptor = os.open(settings.keyring.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(KeyManagerError, match="another rewrap is at work"):
            rewrap_keyring(settings)
    finally:
        os.close(descriptor)
    assert contents(open_keyring(settings)) == filled


def test_the_same_master_key_again(settings: SoftwareSettings, filled: Contents) -> None:
    with pytest.raises(KeyManagerError, match="has already; nothing was changed"):
        rewrap_keyring(settings, settings.keyring.with_name("master.key"))
    assert contents(open_keyring(settings)) == filled


def test_a_file_beside_that_others_can_read(settings: SoftwareSettings, filled: Contents) -> None:
    beside = settings.keyring.with_name("master.key.new")
    beside.write_text(new_master_key())
    beside.chmod(0o644)
    with pytest.raises(SecretError, match="chmod 0600"):
        rewrap_keyring(settings)
    assert contents(open_keyring(settings)) == filled


# ---- a master key that is no file


def test_the_environment_is_somebody_elses_to_change(
    settings: SoftwareSettings,
    filled: Contents,
    master_key: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MASTER_KEY_OF_THE_TEST", master_key)
    named = settings_of(settings.keyring, SecretSource(env="MASTER_KEY_OF_THE_TEST"))
    with pytest.raises(KeyManagerError, match="--new-master-key FILE"):
        rewrap_keyring(named)
    place = settings.keyring.with_name("the-new-one")
    done = rewrap_keyring(named, place)
    assert (done.place, done.in_force, done.versions) == (place, False, 39)
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    with pytest.raises(MasterKeyChanged, match="belongs into environment variable") as caught:
        open_keyring(named)
    assert str(place) in str(caught.value)
    assert rewrap_keyring(named, place).versions is None  # it is done already
    monkeypatch.setenv("MASTER_KEY_OF_THE_TEST", place.read_text())
    assert contents(open_keyring(named)) == filled


# ---- beside others that have it open


def test_nothing_is_written_under_a_master_key_of_the_past(
    settings: SoftwareSettings, filled: Contents
) -> None:
    keyring = open_keyring(settings)
    rewrap_keyring(settings)
    changes: list[Callable[[], object]] = [
        lambda: keyring.create("new", KeySpec.AES_256),
        lambda: keyring.rotate("key-01"),
        lambda: keyring.destroy("key-01"),
        lambda: keyring.get("key-01"),
        keyring.list,
    ]
    for change in changes:
        with pytest.raises(MasterKeyChanged):
            change()
    keyring.close()
    assert contents(open_keyring(settings)) == filled


def test_a_lane_goes_on_with_what_it_has(settings: SoftwareSettings, filled: Contents) -> None:
    lane = SoftwareLane(open_keyring(settings))
    rewrap_keyring(settings)
    after = open_keyring(settings)
    after.create("later", KeySpec.AES_256)
    after.rotate("key-00")
    for _ in range(2):
        lane.refresh()
        lane.probe()
        assert "restart the server" in lane.warning
    made = lane.execute(Encrypt("key-00", b"text"))
    decrypt = Decrypt("key-00", made.ciphertext, iv=made.iv, version=1)  # type: ignore[union-attr]
    assert lane.execute(decrypt).plaintext == b"text"  # type: ignore[union-attr]
    newer = Decrypt("key-00", made.ciphertext, iv=made.iv, version=2)  # type: ignore[union-attr]
    for operation in (Describe("later"), newer):
        with pytest.raises(OperationError) as caught:
            lane.execute(operation)
        assert caught.value.fault is Fault.UNAVAILABLE
    lane.close()
    after.close()


# ---- made new


def test_make_both(tmp_path: Path) -> None:
    named = settings_of(tmp_path / "keyring.db", SecretSource(file=tmp_path / "master.key"))
    assert make_keyring(named)
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {0o600}
    keyring = open_keyring(named)
    assert len(keyring.create("k", KeySpec.SM4).versions) == 1
    assert {len(m) for m in contents(keyring)["k"].values()} == {KEY_SIZES[KeySpec.SM4]}


def test_a_master_key_that_is_there_is_used(settings: SoftwareSettings, master_key: str) -> None:
    settings.keyring.unlink()
    assert not make_keyring(settings)
    Keyring(settings.keyring, master_key).close()


def test_a_keyring_that_is_there_is_left(settings: SoftwareSettings, filled: Contents) -> None:
    settings.keyring.with_name("master.key").rename(settings.keyring.with_name("away.key"))
    check = unchanged(settings)
    with pytest.raises(KeyManagerError, match="is there already"):
        make_keyring(settings)
    check()


def test_a_master_key_of_no_use_is_left(settings: SoftwareSettings) -> None:
    settings.keyring.unlink()
    file = settings.keyring.with_name("master.key")
    file.write_text("no master key")
    with pytest.raises(KeyManagerError, match="32 bytes"):
        make_keyring(settings)
    assert file.read_text() == "no master key"
    assert not settings.keyring.exists()


def test_another_process_makes_it_first(
    settings: SoftwareSettings, master_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.keyring.unlink()
    create_keyring(settings.keyring, master_key)
    monkeypatch.setattr(os.path, "lexists", lambda path: path != settings.keyring)
    with pytest.raises(KeyManagerError, match="there already"):
        make_keyring(settings)
