"""The life of a key, with a real keyring and a real catalog."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from xkiproxy.crypto.algorithms import KeySpec, Usage
from xkiproxy.crypto.operations import KeyState
from xkiproxy.keystores import lifecycle
from xkiproxy.keystores.catalog import CatalogEntry
from xkiproxy.keystores.lifecycle import ManagedKey
from xkiproxy.keystores.sqlite_catalog import SqliteCatalog
from xkiproxy.kmi.base import KeyInfo, KeyManagerError
from xkiproxy.kmi.software import Keyring, create_keyring, new_master_key

DAY = 86_400


class Host:
    """One process's view: a catalog and a keyring, opened for itself."""

    def __init__(self, folder: Path, master_key: str) -> None:
        self.catalog = SqliteCatalog(folder / "catalog.db")
        self.keyring = Keyring(folder / "keyring.db", master_key)

    def create(self, key_id: str, usage: Usage = Usage.BOTH) -> ManagedKey:
        return lifecycle.create_key(
            self.catalog, self.keyring, "local", key_id, KeySpec.AES_256, usage
        )

    def show(self, key_id: str) -> ManagedKey:
        return lifecycle.show_key(self.catalog, self.keyring, "local", key_id)

    def enable(self, key_id: str, usage: Usage | None = None) -> ManagedKey:
        return lifecycle.enable_key(self.catalog, self.keyring, "local", key_id, usage)

    def disable(self, key_id: str) -> ManagedKey:
        return lifecycle.disable_key(self.catalog, self.keyring, "local", key_id)

    def rotate(self, key_id: str) -> ManagedKey:
        return lifecycle.rotate_key(self.catalog, self.keyring, "local", key_id)

    def delete(self, key_id: str, days: int = 7) -> ManagedKey:
        return lifecycle.schedule_deletion(self.catalog, self.keyring, "local", key_id, days)

    def cancel(self, key_id: str) -> ManagedKey:
        return lifecycle.cancel_deletion(self.catalog, self.keyring, "local", key_id)

    def purge(self, now: float) -> list[CatalogEntry]:
        """As a server does each minute, at this one."""
        lifecycle.watch_due(self.catalog, now)
        return lifecycle.purge_due(self.catalog, {"local": self.keyring}, now)

    def watch(self, since: float, seconds: float = DAY) -> float:
        """A server that runs all the time, but for restarts; returns the time after it."""
        for step in range(0, int(seconds), 600):
            assert self.purge(since + step) == []
        return since + seconds

    def close(self) -> None:
        self.catalog.close()
        self.keyring.close()


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    master_key = new_master_key()
    create_keyring(tmp_path / "keyring.db", master_key)
    pair = Host(tmp_path, master_key), Host(tmp_path, master_key)
    yield pair
    for host in pair:
        host.close()


@pytest.fixture
def host(hosts: tuple[Host, Host]) -> Host:
    return hosts[0]


def test_create_enables(host: Host) -> None:
    key = host.create("k", Usage.ENCRYPT)
    assert (key.state, key.usage, key.version) == ("ENABLED", Usage.ENCRYPT, 1)
    assert (key.spec, key.problem, key.deletion_time) == (KeySpec.AES_256, "", None)
    assert host.show("k") == key


def test_create_refuses_what_is_there(host: Host) -> None:
    host.create("k")
    with pytest.raises(KeyManagerError, match="already"):
        host.create("k")
    host.keyring.create("half", KeySpec.AES_256)
    with pytest.raises(KeyManagerError, match="keys enable half"):
        host.create("half")
    host.keyring.destroy("k")
    with pytest.raises(KeyManagerError, match="has lost it"):
        host.create("k")
    with pytest.raises(KeyManagerError, match="1 to 128"):
        host.create("no/slash")


def test_a_key_of_an_interrupted_creation(host: Host) -> None:
    host.keyring.create("k", KeySpec.SM4)
    assert host.show("k").state == lifecycle.UNREGISTERED
    assert host.catalog.get("local", "k") is None
    key = host.enable("k", Usage.DECRYPT)
    assert (key.state, key.usage) == ("ENABLED", Usage.DECRYPT)
    with pytest.raises(KeyManagerError, match="usage was set"):
        host.enable("k", Usage.BOTH)
    assert host.enable("k").usage is Usage.DECRYPT


def test_enable_and_disable_can_be_repeated(host: Host) -> None:
    host.create("k")
    assert [host.disable("k").state for _ in range(2)] == ["DISABLED"] * 2
    assert [host.enable("k").state for _ in range(2)] == ["ENABLED"] * 2


def test_the_entry_says_who_changed_it(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUDO_USER", raising=False)
    host.create("k")
    made = host.catalog.get("local", "k")
    assert made is not None
    assert f"({os.getuid()})" in made.changed_by
    monkeypatch.setenv("SUDO_USER", "alice")
    host.enable("k")  # it is enabled: nothing was changed, by nobody
    assert host.catalog.get("local", "k") == made
    host.rotate("k")
    rotated = host.catalog.get("local", "k")
    assert rotated == replace(made, version=2, changed_by=f"{made.changed_by}, by sudo of alice")


@pytest.mark.parametrize(
    "change",
    [
        lambda at: lifecycle.disable_key(*at, "k"),
        lambda at: lifecycle.set_usage(*at, "k", Usage.DECRYPT),
        lambda at: lifecycle.label_key(*at, "k", {"a": "b"}),
        lambda at: lifecycle.rotate_key(*at, "k"),
        lambda at: lifecycle.schedule_deletion(*at, "k", 30),
    ],
)
def test_each_change_says_whose_it_is(
    host: Host, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]
) -> None:
    monkeypatch.setenv("SUDO_USER", "alice")
    host.create("k")
    monkeypatch.setenv("SUDO_USER", "bob")
    change((host.catalog, host.keyring, "local"))
    changed = host.catalog.get("local", "k")
    assert changed is not None
    assert changed.changed_by.endswith("by sudo of bob")


def test_a_user_without_a_name_is_a_number(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUDO_USER", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 4_000_000_000)
    host.create("k")
    made = host.catalog.get("local", "k")
    assert made is not None
    assert made.changed_by == "4000000000"


def test_rotate(host: Host) -> None:
    host.create("k")
    assert host.rotate("k").version == 2
    host.disable("k")
    assert host.rotate("k").version == 3


def test_the_rotation_of_a_key_that_is_not_registered_registers_nothing(host: Host) -> None:
    host.keyring.create("k", KeySpec.AES_256)
    key = host.rotate("k")
    assert (key.state, key.version) == (lifecycle.UNREGISTERED, 2)
    assert host.catalog.entries() == []
    (noted,) = host.catalog.rotations()
    assert (noted.kmi, noted.key_id, noted.version) == ("local", "k", 2)
    assert f"({os.getuid()})" in noted.changed_by
    assert host.enable("k", Usage.DECRYPT).version == 2
    assert host.rotate("k").version == 3
    assert host.catalog.rotations() == []


def test_unknown_keys(host: Host) -> None:
    for change in (host.show, host.enable, host.disable, host.rotate, host.delete, host.cancel):
        with pytest.raises(KeyManagerError, match="keys list"):
            change("k")
    assert host.catalog.entries() == []


def test_a_kmi_is_asked_after_the_catalog_was_changed(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that hangs must not hold up who stops the use of a key."""
    host.create("k")
    states: list[str] = []

    def hang(key_id: str) -> KeyInfo | None:
        entry = host.catalog.get("local", key_id)
        states.append("" if entry is None else entry.state)
        raise KeyManagerError("the module gave no answer")

    monkeypatch.setattr(host.keyring, "get", hang)
    key = host.disable("k")
    assert (states, key.state, key.spec, key.usage) == (["DISABLED"], "DISABLED", None, Usage.BOTH)
    assert "the module gave no answer" in key.problem
    assert host.enable("k").state == "ENABLED"


def test_a_key_that_the_kmi_has_lost(host: Host) -> None:
    host.create("k")
    host.keyring.destroy("k")
    key = host.show("k")
    assert (key.spec, key.version, key.problem) == (None, None, "KMI local has no such key")
    assert lifecycle.list_keys(host.catalog, host.keyring, "local") == [key]
    for change in (host.enable, host.rotate):
        with pytest.raises(KeyManagerError, match="no such key"):
            change("k")
    assert host.disable("k").state == "DISABLED"


def test_an_unusable_key_is_not_enabled(host: Host) -> None:
    host.create("k")
    host.disable("k")
    with host.keyring._database.writing() as connection:
        connection.execute("UPDATE versions SET wrapped = zeroblob(60)")
    with pytest.raises(KeyManagerError, match="altered"):
        host.enable("k")
    assert host.show("k").state == "DISABLED"


@pytest.mark.parametrize("days", [-1, 0, 6, 367])
def test_refused_days(days: int, host: Host) -> None:
    host.create("k")
    with pytest.raises(KeyManagerError, match="7 to 366"):
        host.delete("k", days)
    assert host.show("k").state == "ENABLED"


@pytest.mark.parametrize("days", [7, 366])
def test_deletion_and_its_cancellation(days: int, host: Host) -> None:
    host.create("k")
    before = time.time()
    key = host.delete("k", days)
    assert key.state == "PENDING_DELETION"
    assert key.deletion_time is not None
    assert before + days * DAY <= key.deletion_time <= time.time() + days * DAY
    for change in (host.enable, host.disable, host.rotate, host.delete):
        with pytest.raises(KeyManagerError, match="delete k --cancel"):
            change("k")
    assert host.show("k") == key
    kept = host.cancel("k")
    assert (kept.state, kept.deletion_time, kept.usage) == ("DISABLED", None, Usage.BOTH)
    with pytest.raises(KeyManagerError, match="does not await"):
        host.cancel("k")


def test_purge_destroys_what_is_due(host: Host) -> None:
    for name in ("due", "later", "kept"):
        host.create(name)
    host.delete("due", 7)
    host.delete("later", 8)
    when = host.show("due").deletion_time
    assert when is not None
    assert host.purge(when - 0.001) == []
    destroyed = host.purge(host.watch(when))
    assert [entry.key_id for entry in destroyed] == ["due"]
    assert host.purge(when + DAY) == []
    assert [info.key_id for info in host.keyring.list()] == ["kept", "later"]
    assert [entry.key_id for entry in host.catalog.entries()] == ["kept", "later"]


def due(host: Host) -> float:
    """A key whose date has come, and that date."""
    host.create("k")
    when = host.delete("k").deletion_time
    assert when is not None
    return when


def test_a_date_that_has_passed_destroys_nothing_for_a_day(host: Host) -> None:
    """As of a catalog that was put back: its deletion may have been cancelled since."""
    later = due(host) + 300 * DAY
    assert host.purge(later) == []
    (entry,) = host.catalog.entries()
    assert lifecycle.destruction_time(entry) == later + DAY
    after = host.watch(later)
    assert host.purge(after - 1) == []
    host.cancel("k")
    assert host.purge(after) == []
    (entry,) = host.catalog.entries()
    assert (entry.state, entry.watched_since, entry.watched_until) == (
        KeyState.DISABLED, None, None,
    )  # fmt: skip
    assert host.keyring.get("k") is not None


def test_a_key_that_is_deleted_again_has_its_day_again(host: Host) -> None:
    after = host.watch(due(host))
    host.cancel("k")
    host.delete("k")
    assert host.purge(after) == []


@pytest.mark.parametrize("pause", [601, 7 * DAY, -1, -2 * DAY], ids=str)
def test_the_day_begins_anew_where_nobody_has_looked(host: Host, pause: float) -> None:
    """A copy from within the day that is put back, a host that slept, a clock that jumps."""
    when = due(host) + 3 * DAY
    until = host.watch(when, DAY - 600) - 600
    resumed = until + pause
    assert host.purge(resumed) == []
    after = host.watch(resumed)
    assert [entry.key_id for entry in host.purge(after)] == ["k"]


def test_when_a_key_is_destroyed_is_known_before(host: Host) -> None:
    when = due(host)

    def expected(now: float) -> float:
        (entry,) = host.catalog.entries()
        return lifecycle.expected_destruction(entry, now)

    assert expected(when - 5 * DAY) == when + DAY
    assert expected(when + 60) == when + 60 + DAY  # no server has seen it due
    half = host.watch(when + 60, DAY / 2)
    assert expected(half) == when + 60 + DAY
    assert expected(half + 9 * DAY) == half + 10 * DAY  # the day begins anew


def test_a_restart_does_not_put_the_day_off(hosts: tuple[Host, Host]) -> None:
    one, two = hosts
    half = one.watch(due(one), DAY / 2)
    after = two.watch(half, DAY / 2)
    assert [entry.key_id for entry in two.purge(after)] == ["k"]


def test_nothing_is_destroyed_that_nobody_has_watched(host: Host) -> None:
    when = due(host)
    assert lifecycle.purge_due(host.catalog, {"local": host.keyring}, when + 9 * DAY) == []
    after = host.watch(when)
    assert lifecycle.purge_due(host.catalog, {"local": host.keyring}, after + DAY) == []
    assert host.keyring.get("k") is not None


def test_purge_obeys_a_cancellation_it_has_not_seen(hosts: tuple[Host, Host]) -> None:
    one, two = hosts
    one.create("k")
    one.delete("k")
    two.catalog.refresh()
    one.cancel("k")
    (stale,) = two.catalog.entries()
    assert stale.state is KeyState.PENDING_DELETION
    later = time.time() + 8 * DAY
    stale = replace(stale, watched_since=later - DAY, watched_until=later)
    assert lifecycle.is_to_be_destroyed(stale, later)
    assert not lifecycle._purge(two.catalog, {"local": two.keyring}, stale, later)
    assert two.keyring.get("k") is not None
    assert one.show("k").state == "DISABLED"


def test_purge_finishes_what_was_interrupted(host: Host) -> None:
    host.create("k")
    host.delete("k")
    host.keyring.destroy("k")
    assert [entry.key_id for entry in host.purge(host.watch(time.time() + 8 * DAY))] == ["k"]
    assert host.catalog.entries() == []


def test_purge_leaves_what_it_cannot_destroy(host: Host) -> None:
    host.create("k")
    host.delete("k")
    host.catalog.put(
        CatalogEntry("away", "k", KeyState.PENDING_DELETION, Usage.BOTH, 1.0, deletion_time=1.0)
    )
    with host.keyring._database.reading() as connection:
        connection.execute("PRAGMA query_only = ON")  # a KMI that refuses
    later = host.watch(time.time() + 8 * DAY)
    assert host.purge(later) == []
    assert len(host.catalog.entries()) == 2
    with host.keyring._database.reading() as connection:
        connection.execute("PRAGMA query_only = OFF")
    assert [entry.kmi for entry in host.purge(later)] == ["local"]
    assert [entry.kmi for entry in host.catalog.entries()] == ["away"]


def test_two_purges_at_once(hosts: tuple[Host, Host]) -> None:
    for number in range(20):
        hosts[0].create(f"k{number}")
        hosts[0].delete(f"k{number}")
    later = hosts[0].watch(time.time() + 8 * DAY)
    start = threading.Barrier(2)
    destroyed: list[CatalogEntry] = []

    def purge(host: Host) -> None:
        start.wait()
        destroyed.extend(host.purge(later))

    threads = [threading.Thread(target=purge, args=(host,)) for host in hosts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({entry.key_id for entry in destroyed}) == len(destroyed) == 20
    for host in hosts:
        host.catalog.refresh()
        assert host.catalog.entries() == []
        assert host.keyring.list() == []


def test_a_due_key_is_disabled_at_the_other_kmis_of_its_key_stores(host: Host) -> None:
    """Or it would serve there again on the day on which it is destroyed here."""
    when = due(host)
    (entry,) = host.catalog.entries()
    alive = replace(entry, state=KeyState.ENABLED, deletion_time=None)
    for kmi in ("b", "c", "elsewhere"):
        host.catalog.put(replace(alive, kmi=kmi))
    host.catalog.put(replace(alive, kmi="b", key_id="another"))
    groups = [[entry.kmi, "b"], ["c", entry.kmi], ["b", "elsewhere"]]
    found = lifecycle.watch_due(host.catalog, when)
    changed = lifecycle.disable_twins(host.catalog, found, groups)
    assert [(e.kmi, e.key_id) for e in changed] == [("b", "k"), ("c", "k")]
    states = {(e.kmi, e.key_id): e.state for e in host.catalog.entries()}
    assert states == {
        (entry.kmi, "k"): KeyState.PENDING_DELETION,
        ("b", "k"): KeyState.DISABLED,
        ("c", "k"): KeyState.DISABLED,
        ("elsewhere", "k"): KeyState.ENABLED,
        ("b", "another"): KeyState.ENABLED,
    }
    assert lifecycle.disable_twins(host.catalog, found, groups) == []
