"""More requests than can be answered in time: the rest is refused early and cheaply."""

from __future__ import annotations

import asyncio
import contextlib
import ssl

import pytest
from harness import Proxy


async def test_what_would_wait_too_long_is_refused_at_once(proxy: Proxy) -> None:
    shared = proxy.listener._shared
    assert shared is not None
    assert shared.gateway.longest_wait == proxy.store.deadline / 2
    shared._cost = 10.0  # seconds a request: one that waits is one too many
    answers = await asyncio.gather(*(proxy.call("health") for _ in range(40)))
    refused = [answer for answer in answers if answer.status == 429]
    assert refused
    assert {answer.status for answer in answers} == {200, 429}
    assert {answer.code for answer in refused} == {"TooManyRequests"}
    assert proxy.sample("xkiproxy_shed_total", keystore="demo", reason="overload") == len(refused)
    codes = [record["code"] for record in proxy.records()]
    assert codes.count("TooManyRequests") == len(refused)
    # What is admitted shows what a request really costs.
    for _ in range(150):
        assert (await proxy.call("health")).status == 200
    assert shared._cost < 0.01
    answers = await asyncio.gather(*(proxy.call("health") for _ in range(40)))
    assert {answer.status for answer in answers} == {200}


async def test_a_full_queue_refuses_before_the_signature(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy.kmi, "is_full", True)
    path = f"{proxy.base}/keys/aes256/meta"
    answer = await proxy.post(path, proxy.cloud.body(), {"host": proxy.cloud.host})  # unsigned
    assert (answer.status, answer.code) == (429, "TooManyRequests")
    monkeypatch.setattr(proxy.kmi, "is_full", False)
    assert (await proxy.call("meta", "aes256")).status == 200


async def test_a_long_queue_gives_the_loop_its_turn(proxy: Proxy) -> None:
    """Hundreds of requests that come at once are all answered, and the loop runs in between."""
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count_turns())
    answers = await asyncio.gather(*(proxy.call("health") for _ in range(400)))
    counting.cancel()
    assert {answer.status for answer in answers} == {200}
    assert turns > 5


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
