"""More requests than there is room for: in goes, and refused early where a queue is full."""

from __future__ import annotations

import asyncio
import contextlib
import ssl

import aiohttp
import pytest
from harness import Proxy


async def test_a_full_queue_refuses_before_the_signature(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy.kmi, "is_full", True)
    path = f"{proxy.base}/keys/aes256/meta"
    answer = await proxy.post(path, proxy.cloud.body(), {"host": proxy.cloud.host})  # unsigned
    assert (answer.status, answer.code) == (429, "TooManyRequests")
    monkeypatch.setattr(proxy.kmi, "is_full", False)
    assert (await proxy.call("meta", "aes256")).status == 200


async def test_a_flood_is_answered_in_goes(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of requests that come at once are all answered, and never too many in one go."""
    shared = proxy.listener._shared
    assert shared is not None
    longest = 0
    work = shared._work

    def counted() -> None:
        nonlocal longest
        longest = max(longest, len(shared._arrived))
        work()

    monkeypatch.setattr(shared, "_work", counted)
    connector = aiohttp.TCPConnector(ssl=ssl.create_default_context(cafile=str(proxy.certificate)),
                                     limit=400)  # fmt: skip
    async with aiohttp.ClientSession(connector=connector) as session:
        monkeypatch.setattr(proxy, "session", session)
        for _ in range(3):
            answers = await asyncio.gather(*(proxy.call("health") for _ in range(400)))
            assert {answer.status for answer in answers} == {200}
    assert 1 < longest <= 128


async def test_connections_over_the_limit_are_closed(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = proxy.listener._shared
    assert shared is not None
    assert (await proxy.call("health")).status == 200  # its connection stays
    monkeypatch.setattr(shared, "max_connections", len(shared.connections))
    context = ssl.create_default_context(cafile=str(proxy.certificate))
    reader, writer = await asyncio.open_connection("localhost", proxy.port, ssl=context)
    with contextlib.suppress(OSError):
        assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()
    assert (await proxy.call("health")).status == 200
    assert proxy.sample("xkiproxy_shed_total", keystore="", reason="connections") == 1
