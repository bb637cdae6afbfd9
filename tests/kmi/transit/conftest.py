"""A Transit server for each test, and KMIs on it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from transit import TransitSite
from transit_server import TransitServer

from xkiproxy.config.models import TransitSettings
from xkiproxy.kmi.queued import QueuedKmi
from xkiproxy.kmi.registry import open_kmi
from xkiproxy.kmi.transit import TransitKeyManager
from xkiproxy.observability.metrics import Metrics

StartKmi = Callable[[TransitSettings], Awaitable[QueuedKmi]]
OpenManager = Callable[[TransitSettings], TransitKeyManager]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[TransitSite]:
    """A server with the key `key`, and what a proxy needs to use it."""
    made = TransitSite(tmp_path / "transit")
    yield made
    made.server.close()


@pytest.fixture
def server(site: TransitSite) -> TransitServer:
    return site.server


@pytest.fixture
async def start_kmi() -> AsyncIterator[StartKmi]:
    """Start a KMI and wait until its lanes are there, or could not be started."""
    started: list[QueuedKmi] = []

    async def start(settings: TransitSettings) -> QueuedKmi:
        kmi = open_kmi(settings, Metrics())
        assert isinstance(kmi, QueuedKmi)
        started.append(kmi)
        kmi.start()
        await kmi.check()
        return kmi

    yield start
    for kmi in started:
        await kmi.close()


@pytest.fixture
def open_manager() -> Iterator[OpenManager]:
    opened: list[TransitKeyManager] = []

    def open_(settings: TransitSettings) -> TransitKeyManager:
        opened.append(TransitKeyManager(settings))
        return opened[-1]

    yield open_
    for manager in opened:
        manager.close()
