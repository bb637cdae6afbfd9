"""Which KMI serves a key, and when none may."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xkiproxy.crypto.algorithms import Usage
from xkiproxy.crypto.operations import (
    Fault,
    KeyState,
    OperationError,
    OutputForm,
    Random,
    RandomBytes,
    Result,
)
from xkiproxy.crypto.wrapping import Wrapping, WrappingAlgorithm
from xkiproxy.keystores.catalog import CatalogEntry
from xkiproxy.keystores.keystore import KeyStore
from xkiproxy.keystores.replay import ReplayWindow
from xkiproxy.keystores.signing_keys import CachedSigningKeys
from xkiproxy.keystores.sqlite_catalog import SqliteCatalog
from xkiproxy.keystores.trail import Trail
from xkiproxy.kmi.base import KmiState

UP, DOWN = KmiState.CONNECTED, KmiState.DISCONNECTED
ENABLED, DISABLED = KeyState.ENABLED, KeyState.DISABLED


def store(tmp_path: Path, states: list[tuple[KmiState, KeyState | None]]) -> KeyStore:
    catalog, kmis = SqliteCatalog(tmp_path / "catalog.db"), list[Any]()
    for number, (kmi_state, key_state) in enumerate(states):
        kmis.append(SimpleNamespace(name=f"kmi-{number}", state=kmi_state))
        if key_state is not None:
            catalog.put(CatalogEntry(f"kmi-{number}", "k", key_state, Usage.BOTH, 0.0))
    return KeyStore("demo", catalog, kmis, CachedSigningKeys([]), ReplayWindow(), deadline=1)


@pytest.mark.parametrize(
    ("states", "chosen"),
    [
        ([(UP, ENABLED), (UP, ENABLED)], 0),
        ([(DOWN, ENABLED), (UP, ENABLED)], 1),
        ([(DOWN, ENABLED), (DOWN, ENABLED)], 0),
        ([(UP, None), (UP, ENABLED)], 1),
        ([(DOWN, None), (DOWN, ENABLED)], 1),
    ],
)
def test_the_first_that_has_the_key_and_is_there(
    tmp_path: Path, states: list[tuple[KmiState, KeyState | None]], chosen: int
) -> None:
    kmi, entry = store(tmp_path, states)._find("k")
    assert (kmi.name, entry.kmi) == (f"kmi-{chosen}",) * 2


@pytest.mark.parametrize(
    "states",
    [
        [(UP, DISABLED), (UP, ENABLED)],
        [(DOWN, DISABLED), (UP, ENABLED)],
        [(UP, ENABLED), (UP, DISABLED)],
        [(UP, ENABLED), (DOWN, KeyState.PENDING_DELETION)],
    ],
)
def test_a_key_disabled_at_one_kmi_is_served_by_none(
    tmp_path: Path, states: list[tuple[KmiState, KeyState | None]]
) -> None:
    _, entry = store(tmp_path, states)._find("k")
    assert entry.state is not ENABLED


async def drawing(operation: Random, deadline: float, timing: object) -> Result:
    """Stands for a KMI."""
    return RandomBytes(bytes(operation.length))


async def test_public_key_wrappings_at_once_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = threading.Event()

    def slow(wrapping: Wrapping, data: bytes) -> bytes:
        """Stands for SM2, which takes long."""
        may_end.wait(30)
        return b"wrapped"

    monkeypatch.setattr("xkiproxy.keystores.keystore.wrap", slow)
    demo = store(tmp_path, [(UP, ENABLED)])
    demo.kmis[0].submit = drawing  # type: ignore[method-assign, assignment]
    wrapping = Wrapping(WrappingAlgorithm.SM2PKE, b"")
    operation = Random(32, OutputForm.PUBLIC_KEY_WRAPPED, wrapping)

    async def draw() -> str:
        try:
            await demo.perform(operation, time.monotonic() + 60, Trail())
        except OperationError as error:
            return error.fault.name
        return "wrapped"

    for _ in range(2):  # those that have ended count no more
        may_end.clear()
        tasks = [asyncio.create_task(draw()) for _ in range(11)]
        try:
            await asyncio.wait(tasks, timeout=10, return_when=asyncio.FIRST_COMPLETED)
        finally:
            may_end.set()
        said = await asyncio.gather(*tasks)
        assert said == ["wrapped"] * 8 + [Fault.THROTTLED.name] * 3
