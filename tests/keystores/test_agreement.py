"""KMIs that hold the same keys, and KMIs that only say so."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from xkiproxy.crypto.algorithms import KeySpec, Usage
from xkiproxy.crypto.operations import CiphertextFormat, KeyState
from xkiproxy.keystores.agreement import disagreements
from xkiproxy.keystores.catalog import CatalogEntry
from xkiproxy.keystores.key_patterns import KeyPatterns
from xkiproxy.keystores.sqlite_catalog import SqliteCatalog
from xkiproxy.kmi.base import KmiState
from xkiproxy.kmi.inline import InlineKmi
from xkiproxy.kmi.metrics import KmiMetrics
from xkiproxy.kmi.software import Keyring, SoftwareLane, create_keyring, new_master_key
from xkiproxy.observability.metrics import Metrics

ENVELOPE, RAW = CiphertextFormat.ENVELOPE, CiphertextFormat.RAW


class Pair:
    """Two software KMIs; the second has a copy of the first's keyring, until one is changed."""

    def __init__(self, folder: Path) -> None:
        self.catalog = SqliteCatalog(folder / "catalog.db")
        self.kmis: list[InlineKmi] = []
        self.keyrings: list[Keyring] = []
        master_key = new_master_key()
        create_keyring(folder / "one.db", master_key)
        first = Keyring(folder / "one.db", master_key, "the test")
        for name, spec in (("aes", KeySpec.AES_256), ("sm4", KeySpec.SM4)):
            first.create(name, spec)
        first.close()
        shutil.copy(folder / "one.db", folder / "two.db")
        for name in ("one", "two"):
            keyring = Keyring(folder / f"{name}.db", master_key, "the test")
            metrics = KmiMetrics(Metrics(), name)
            self.keyrings.append(keyring)
            self.kmis.append(InlineKmi(name, "software", SoftwareLane(keyring), metrics))
            for key in ("aes", "sm4"):
                self.allow(name, key)

    def allow(
        self, kmi: str, key: str, usage: Usage = Usage.BOTH, state: KeyState = KeyState.ENABLED
    ) -> None:
        self.catalog.put(CatalogEntry(kmi, key, state, usage, 0.0))

    async def look(
        self, form: CiphertextFormat = ENVELOPE, keys: KeyPatterns | None = None
    ) -> list[str]:
        for kmi in self.kmis:
            kmi.refresh(True)
            await kmi.check()
        return await disagreements(self.kmis, self.catalog, form, keys)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


@pytest.mark.parametrize("form", [ENVELOPE, RAW])
async def test_the_same_keys(pair: Pair, form: CiphertextFormat) -> None:
    assert await pair.look(form) == []


async def test_a_key_of_the_same_name(pair: Pair) -> None:
    pair.keyrings[1].destroy("aes")
    pair.keyrings[1].create("aes", KeySpec.AES_256)
    one, two = await pair.look()
    assert one.startswith("key aes: what KMI one encrypts KMI two cannot decrypt: ")
    assert two.startswith("key aes: what KMI two encrypts KMI one cannot decrypt: ")


async def test_a_version_that_only_one_has(pair: Pair) -> None:
    pair.keyrings[0].rotate("aes")
    (text,) = await pair.look()
    assert text.startswith("key aes: what KMI one encrypts KMI two cannot decrypt: ")


async def test_a_key_that_only_the_catalog_has(pair: Pair) -> None:
    pair.keyrings[1].destroy("sm4")
    texts = await pair.look()
    assert "key sm4: KMI two cannot encrypt: " in "\n".join(texts)
    assert any("what KMI one encrypts KMI two cannot decrypt" in text for text in texts)


async def test_what_is_not_used_is_not_tried(pair: Pair) -> None:
    for key in ("aes", "sm4"):
        pair.keyrings[1].destroy(key)
        pair.keyrings[1].create(key, KeySpec.AES_256)
    pair.allow("two", "aes", state=KeyState.DISABLED)
    pair.allow("two", "sm4", usage=Usage.ENCRYPT)
    (text,) = await pair.look()
    assert "key sm4: what KMI two encrypts KMI one" in text
    pair.kmis[1].state = KmiState.DISCONNECTED
    assert await disagreements(pair.kmis, pair.catalog, ENVELOPE) == []


async def test_nothing_secret_is_said(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "urandom", lambda size: b"p" * size)
    pair.keyrings[1].destroy("aes")
    pair.keyrings[1].create("aes", KeySpec.AES_256)
    assert "pppp" not in "".join(await pair.look())


async def test_a_key_outside_of_the_key_store_is_not_tried(pair: Pair) -> None:
    pair.keyrings[1].destroy("aes")
    pair.keyrings[1].create("aes", KeySpec.AES_256)
    assert await pair.look(keys=KeyPatterns(["sm*"])) == []
    assert len(await pair.look(keys=KeyPatterns(["a*"]))) == 2
