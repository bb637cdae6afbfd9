"""Which keys a key store may use, and that any other is a key that does not exist."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from xkiproxy.config.models import KeystoreSettings
from xkiproxy.crypto.algorithms import KeySpec, Usage
from xkiproxy.crypto.operations import (
    Decrypt,
    Describe,
    Encrypt,
    Fault,
    KeyDescription,
    KeyState,
    Operation,
    OperationError,
)
from xkiproxy.keystores import key_patterns
from xkiproxy.keystores.catalog import CatalogEntry
from xkiproxy.keystores.failover import Failover
from xkiproxy.keystores.key_patterns import KeyPatterns
from xkiproxy.keystores.keystore import KeyStore
from xkiproxy.keystores.replay import ReplayWindow
from xkiproxy.keystores.signing_keys import CachedSigningKeys
from xkiproxy.keystores.sqlite_catalog import SqliteCatalog
from xkiproxy.keystores.trail import Trail
from xkiproxy.kmi.base import KmiState


@pytest.mark.parametrize(
    ("patterns", "admitted", "refused"),
    [
        (["cards"], ["cards"], ["cards2", "my-cards", "Cards", "card", ""]),
        (["payroll-*"], ["payroll-1", "payroll-"], ["payroll", "my-payroll-1", "Payroll-1"]),
        (["*-eu"], ["cards-eu", "-eu"], ["cards-eu-1", "eu"]),
        (["a*b*c"], ["abc", "a.b.c"], ["acb", "abcd"]),
        (["v1.0"], ["v1.0"], ["v1x0"]),
        (["cards", "payroll-*"], ["cards", "payroll-1"], ["cards-payroll-1", "other"]),
        (["*"], ["anything"], []),
    ],
)
def test_what_a_pattern_admits(
    patterns: list[str], admitted: list[str], refused: list[str]
) -> None:
    keys = KeyPatterns(patterns)
    for _ in range(2):  # the second verdict is a remembered one
        assert [key for key in [*admitted, *refused] if keys.admit(key)] == admitted


def test_many_stars_cost_no_time() -> None:
    began = time.monotonic()
    assert not KeyPatterns(["a*" * 40 + "b"]).admit("a" * 128)
    assert time.monotonic() - began < 1


def test_what_is_remembered_is_bounded() -> None:
    keys = KeyPatterns(["k-*"])
    for number in range(key_patterns._MAX_REMEMBERED + 10):
        assert keys.admit(f"k-{number}")
    assert len(keys._verdicts) <= key_patterns._MAX_REMEMBERED


def test_no_key_is_disabled_unless_it_is_said() -> None:
    given = {
        "name": "demo", "protocol": "xki", "path_prefix": "/demo", "kmi": ["local"],
        "credentials": "demo.toml",
    }  # fmt: skip
    adapter = TypeAdapter(KeystoreSettings)
    for more in ({}, {"disabled_keys": []}):
        assert adapter.validate_python({**given, **more}).disabled_keys == ()
    with pytest.raises(ValidationError, match=r"disabled_keys\.0"):
        adapter.validate_python({**given, "disabled_keys": ["card?"]})


@pytest.mark.parametrize("keys", [[], [""], ["card?"], ["[ab]"], ["a b"], ["x" * 129], "cards"])
def test_what_is_no_pattern_is_refused(keys: Any) -> None:
    given = {
        "name": "demo", "protocol": "xki", "path_prefix": "/demo", "kmi": ["local"],
        "credentials": "demo.toml",
    }  # fmt: skip
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(KeystoreSettings).validate_python({**given, "keys": keys})
    assert {error["loc"][0] for error in caught.value.errors()} >= {"keys"}


class Untouched:
    """A KMI and policies that nobody may ask."""

    name, state, is_full = "one", KmiState.CONNECTED, False

    async def submit(self, *arguments: Any) -> Any:
        raise AssertionError("a key outside of the key store reached the KMI")

    def check(self, *arguments: Any) -> None:
        raise AssertionError("a key outside of the key store reached the policies")


OPERATIONS = [
    Describe,
    lambda key: Encrypt(key, b"x"),
    lambda key: Decrypt(key, b"x" * 16, b"i" * 12, 1),
]


@pytest.mark.parametrize("kmis", [1, 2])
@pytest.mark.parametrize("make", OPERATIONS)
def test_a_key_outside_is_one_that_does_not_exist(tmp_path: Path, make: Any, kmis: int) -> None:
    """The same fault, the same words, after the same steps: before policies, states and KMIs."""
    catalog, parts = SqliteCatalog(tmp_path / "catalog.db"), list[Any]()
    for number in range(kmis):
        part = Untouched()
        part.name = f"kmi-{number}"
        parts.append(part)
        catalog.put(CatalogEntry(part.name, "cards", KeyState.ENABLED, Usage.BOTH, 0.0))
        catalog.put(CatalogEntry(part.name, "gone", KeyState.DISABLED, Usage.BOTH, 0.0))
    refreshed = []
    store = KeyStore(
        "demo", catalog, parts, CachedSigningKeys([]), ReplayWindow(), deadline=1,
        authorizer=Untouched(),  # type: ignore[arg-type]
        failover=Failover(SimpleNamespace()) if kmis > 1 else None,  # type: ignore[arg-type]
        keys=KeyPatterns(["payroll-*"]),
    )  # fmt: skip
    store._catalog = SimpleNamespace(  # type: ignore[assignment]
        get=catalog.get, refresh=lambda: refreshed.append(1), revision=0
    )
    said = {outcome(store, make(key)) for key in ("cards", "gone", "missing", "payroll-missing")}
    assert said == {(Fault.KEY_NOT_FOUND, "There is no such key.", "")}
    assert len(refreshed) == 4  # each is looked for a second time


def outcome(store: KeyStore, operation: Operation) -> tuple[Fault, str, str]:
    trail = Trail()
    with pytest.raises(OperationError) as caught:
        asyncio.run(store.perform(operation, time.monotonic() + 1, trail))
    return caught.value.fault, caught.value.message, trail.kmi


@pytest.mark.parametrize("kmis", [1, 2])
@pytest.mark.parametrize("make", OPERATIONS[1:])
def test_what_the_configuration_disables_is_disabled(tmp_path: Path, make: Any, kmis: int) -> None:
    """Whatever the catalog says, at all KMIs, and no KMI is asked."""
    store = disabling(tmp_path, kmis, ["cards", "gone-*"])
    kmi, words = "kmi-0", "The key is disabled at the proxy."
    assert outcome(store, make("cards")) == (Fault.KEY_DISABLED, words, kmi)
    assert outcome(store, make("gone-disabled")) == (Fault.KEY_DISABLED, words, kmi)
    # What is to be destroyed is not kept by it, and what is nowhere does not come to be.
    assert outcome(store, make("gone-soon"))[0] is Fault.KEY_PENDING_DELETION
    assert outcome(store, make("gone-missing"))[0] is Fault.KEY_NOT_FOUND


def test_what_the_configuration_disables_is_described_so(tmp_path: Path) -> None:
    store = disabling(tmp_path, 1, ["cards"])
    described = KeyDescription("of the KMI", KeySpec.AES_256, Usage.BOTH, 1, None)
    store.kmis[0].submit = answering(described)  # type: ignore[method-assign]
    for key, state in (("cards", KeyState.DISABLED), ("other", KeyState.ENABLED)):
        found = asyncio.run(store.perform(Describe(key), time.monotonic() + 1, Trail()))
        assert isinstance(found, KeyDescription)
        assert found.state is state


def answering(result: Any) -> Any:
    async def submit(*arguments: Any) -> Any:
        return result

    return submit


def disabling(folder: Path, kmis: int, patterns: list[str]) -> KeyStore:
    """A key store of KMIs that nobody may ask, with these keys disabled by its configuration."""
    catalog, parts = SqliteCatalog(folder / "catalog.db"), list[Any]()
    states = {
        "cards": KeyState.ENABLED, "other": KeyState.ENABLED,
        "gone-disabled": KeyState.DISABLED, "gone-soon": KeyState.PENDING_DELETION,
    }  # fmt: skip
    for number in range(kmis):
        part = Untouched()
        part.name = f"kmi-{number}"
        parts.append(part)
        for key, state in states.items():
            catalog.put(CatalogEntry(part.name, key, state, Usage.BOTH, 0.0))
    failover = Failover(SimpleNamespace()) if kmis > 1 else None  # type: ignore[arg-type]
    return KeyStore(
        "demo", catalog, parts, CachedSigningKeys([]), ReplayWindow(), deadline=1,
        failover=failover, disabled=KeyPatterns(patterns),
    )  # fmt: skip
