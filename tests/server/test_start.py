"""A start waits for KMIs, but not for one that hangs and that nobody needs."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_end_to_end import Installation

from xkiproxy.config import load_config
from xkiproxy.kmi.base import KmiState
from xkiproxy.server.runtime import Runtime


class HungKmi:
    """Stands for a KMI whose module does not return: its check never ends."""

    name = "hung"
    state = KmiState.DISCONNECTED
    checked = float("-inf")

    def start(self) -> None:
        pass

    async def check(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        pass


async def test_a_kmi_that_hangs_does_not_keep_others_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xkiproxy.server.runtime._PATIENCE_SECONDS", 0.05)
    made = await asyncio.to_thread(Installation, tmp_path / "proxy")
    runtime = Runtime(load_config(made.config))
    runtime.kmis["hung"] = HungKmi()  # type: ignore[assignment]
    try:
        await asyncio.wait_for(runtime.start(), 10)
        assert [kmi.state for kmi in runtime.tenants[0].store.kmis] == [KmiState.CONNECTED]
    finally:
        await asyncio.wait_for(runtime.close(), 10)


async def test_nor_one_that_a_key_store_has_no_other_than(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xkiproxy.server.runtime._PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr("xkiproxy.server.runtime._LONGEST_WAIT_SECONDS", 0.3)
    made = await asyncio.to_thread(Installation, tmp_path / "proxy")
    runtime = Runtime(load_config(made.config))
    without = SimpleNamespace(store=SimpleNamespace(kmis=[HungKmi()]), token_keys=None)
    runtime.tenants.append(without)  # type: ignore[arg-type]
    runtime.kmis["hung"] = HungKmi()  # type: ignore[assignment]
    try:
        began = time.monotonic()
        await asyncio.wait_for(runtime.start(), 10)
        assert time.monotonic() - began >= 0.3, "it was waited for"
    finally:
        await asyncio.wait_for(runtime.close(), 10)


async def test_a_start_waits_for_the_only_kmi_of_a_key_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xkiproxy.server.runtime._PATIENCE_SECONDS", 0.05)
    made = await asyncio.to_thread(Installation, tmp_path / "proxy")
    runtime = Runtime(load_config(made.config))
    runtime.tenants[0].store.kmis = [HungKmi()]  # type: ignore[list-item]
    runtime.kmis["hung"] = HungKmi()  # type: ignore[assignment]
    try:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(runtime.start(), 0.5)
    finally:
        await asyncio.wait_for(runtime.close(), 10)
