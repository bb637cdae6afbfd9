"""What networks do, done to both kinds of KMI over a network: no request hangs, all come back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pykmip import PyKmip
from transit import TransitSite

from benchmarks.relay import Relay
from xkiproxy.config.models import KmiSettings
from xkiproxy.crypto.algorithms import KeySpec
from xkiproxy.crypto.operations import Encrypt, Encrypted, Fault, OperationError
from xkiproxy.kmi.queued import QueuedKmi
from xkiproxy.kmi.registry import open_key_manager, open_kmi
from xkiproxy.observability.metrics import Metrics

Settings = Callable[[int], KmiSettings]
"""The settings of a KMI that is reached on a port."""

_FAILED = {Fault.UNAVAILABLE, Fault.DEADLINE_EXCEEDED}


def make_key(settings: KmiSettings) -> None:
    manager = open_key_manager(settings)
    manager.create("key", KeySpec.AES_256)
    manager.close()


@pytest.fixture
def kmip(tmp_path: Path) -> Iterator[tuple[int, Settings]]:
    server = PyKmip(tmp_path / "kmip")
    server.start()
    with ThreadPoolExecutor() as pool:  # a manager has an event loop of its own
        pool.submit(make_key, server.settings()).result()
    yield (
        server.port,
        lambda port: server.settings(
            address=f"localhost:{port}", lanes=2, operation_timeout_ms=300,
            connect_timeout_seconds=0.5,
        ),
    )  # fmt: skip
    server.stop()


@pytest.fixture
def transit(tmp_path: Path) -> Iterator[tuple[int, Settings]]:
    site = TransitSite(tmp_path / "transit")
    yield (
        site.server.port,
        lambda port: site.settings(
            address=f"https://localhost:{port}", lanes=2, operation_timeout_ms=300,
            start_timeout_seconds=0.5,
        ),
    )  # fmt: skip
    site.server.close()


@pytest.fixture(params=["kmip", "transit"])
async def far(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Relay, QueuedKmi]]:
    """A KMI behind a relay."""
    port, settings = request.getfixturevalue(request.param)
    relay = Relay(port)
    await relay.start()
    kmi = open_kmi(settings(relay.port), Metrics())
    assert isinstance(kmi, QueuedKmi)
    kmi.start()
    await kmi.check()
    yield relay, kmi
    await kmi.close()
    await relay.stop()


async def attempt(kmi: QueuedKmi, seconds: float = 2.0) -> bool:
    """Whether an encryption succeeds; it fails clearly, and in time, if it does not."""
    began = time.monotonic()
    try:
        made = await kmi.submit(Encrypt("key", b"x"), began + seconds)
    except OperationError as error:
        assert error.fault in _FAILED
        assert time.monotonic() - began < seconds + 0.5
        return False
    assert isinstance(made, Encrypted)
    return True


async def stall(relay: Relay) -> None:
    relay.stall()
    await asyncio.sleep(0.8)
    relay.reset()
    relay.flow()


async def cut(relay: Relay) -> None:
    relay.cut(13)
    await asyncio.sleep(0.4)
    relay.flow()


async def reset(relay: Relay) -> None:
    relay.reset()


async def refuse(relay: Relay) -> None:
    await relay.stop()
    await asyncio.sleep(0.4)
    await relay.start()


async def swallow(relay: Relay) -> None:
    """Connections are taken, and nothing ever comes back."""
    relay.reset()
    relay.stall()
    await asyncio.sleep(1.2)
    relay.reset()
    relay.flow()


@pytest.mark.parametrize("fault", [stall, cut, reset, refuse, swallow])
async def test_each_fault_passes(
    far: tuple[Relay, QueuedKmi], fault: Callable[[Relay], Awaitable[None]]
) -> None:
    relay, kmi = far
    assert await attempt(kmi)
    for _ in range(2):
        hurting = asyncio.ensure_future(fault(relay))
        while not hurting.done():
            await asyncio.gather(*(attempt(kmi) for _ in range(8)))
            await asyncio.sleep(0.02)
        await hurting
        deadline = time.monotonic() + 10
        while not await attempt(kmi):
            assert time.monotonic() < deadline, kmi.error
            await asyncio.sleep(0.05)
    assert all(await asyncio.gather(*(attempt(kmi) for _ in range(20))))


async def test_a_slow_network_is_only_slow(far: tuple[Relay, QueuedKmi]) -> None:
    relay, kmi = far
    assert await attempt(kmi)
    relay.request_delay = 0.05
    began = time.monotonic()
    assert all(await asyncio.gather(*(attempt(kmi) for _ in range(20))))
    assert time.monotonic() - began > 0.05
