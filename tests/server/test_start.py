"""A KMI that hangs holds up others neither at a start nor later."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_end_to_end import Installation

from xkiproxy.config import load_config
from xkiproxy.kmi.base import KmiState
from xkiproxy.observability.audit import AuditLog
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

    def refresh(self, keys_changed: bool) -> None:
        pass

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


async def test_the_health_of_others_stays_fresh_beside_one_whose_check_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xkiproxy.server.runtime._PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr("xkiproxy.server.runtime._CHECK_SECONDS", 0.02)
    made = await asyncio.to_thread(Installation, tmp_path / "proxy")
    runtime = Runtime(load_config(made.config))
    runtime.kmis["hung"] = HungKmi()  # type: ignore[assignment]
    audit = AuditLog(tmp_path / "audit.jsonl")
    try:
        await asyncio.wait_for(runtime.start(), 10)
        before = asyncio.all_tasks()
        housekeeping = asyncio.create_task(runtime.keep_fresh(audit, purges=False))
        try:
            await checked_anew(runtime, 5)
        finally:
            housekeeping.cancel()
            await asyncio.wait({housekeeping}, timeout=10)
        assert housekeeping.cancelled()
        assert asyncio.all_tasks() == before, "a check goes on after the end"
    finally:
        await asyncio.wait_for(runtime.close(), 10)
        audit.close()


async def checked_anew(runtime: Runtime, times: int) -> None:
    """Wait until the KMI beside the one that hangs was checked so many times."""
    (kmi,) = runtime.tenants[0].store.kmis
    async with asyncio.timeout(10):
        for _ in range(times):
            last = kmi.checked
            while kmi.checked == last:
                await asyncio.sleep(0.01)
