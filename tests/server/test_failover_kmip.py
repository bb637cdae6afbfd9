"""Two KMIP servers with the same keys; the first one's network and process fail, under load."""

from __future__ import annotations

import asyncio
import shutil
import ssl
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from pykmip import PyKmip
from test_end_to_end import wait_for
from test_failover_server import TwoKmis
from test_hsm_server import Load
from test_workers import Workers

from benchmarks.relay import Relay

ROUNDS = 20
CLIENTS = 3


class TwoServers(Workers):
    """`kmip-a` is reached over a relay, `kmip-b` directly."""

    counted = TwoKmis.counted
    served = TwoKmis.served

    def __init__(self, directory: Path, tables: str) -> None:
        super().__init__(directory, 1)
        text = self.config.read_text().replace("deadline_ms = 5000", "deadline_ms = 2000")
        text = text.replace('kmi = ["local"]', 'kmi = ["kmip-a", "kmip-b"]')
        self.config.write_text(text + tables)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[PyKmip, PyKmip]]:
    first, second = PyKmip(tmp_path / "kmip-a"), PyKmip(tmp_path / "kmip-b")
    yield first, second
    first.stop()
    second.stop()


async def test_no_client_sees_what_happens_to_the_first(
    servers: tuple[PyKmip, PyKmip], tmp_path: Path
) -> None:
    first, second = servers
    await asyncio.to_thread(first.start)
    relay = Relay(first.port)
    await relay.start()
    tables = first.toml(
        "kmip-a", address=f"localhost:{relay.port}", operation_timeout_ms=400,
        connect_timeout_seconds=0.5,
    ) + second.toml("kmip-b")  # fmt: skip
    proxy = TwoServers(tmp_path / "demo", tables)
    try:
        await asyncio.to_thread(make_keys, proxy, first, second)
        await asyncio.to_thread(proxy.start)
        await under_load(proxy, relay, first)
    finally:
        await asyncio.to_thread(proxy.stop)
        await relay.stop()


def make_keys(proxy: TwoServers, first: PyKmip, second: PyKmip) -> None:
    """A key on the first; its database is copied, as a cluster's would be the same."""
    proxy.run("keys", "create", "demo-key", "--kmi", "kmip-a")
    first.stop()
    shutil.copy(first.folder / "pykmip.db", second.folder / "pykmip.db")
    first.start()
    second.start()
    proxy.run("keys", "enable", "demo-key", "--kmi", "kmip-b")


async def under_load(proxy: TwoServers, relay: Relay, first: PyKmip) -> None:
    trust = ssl.create_default_context(cafile=str(proxy.directory / "tls" / "server.crt"))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust)) as session:
        load = Load(proxy, session)  # type: ignore[arg-type]
        clients = [asyncio.create_task(load.client()) for _ in range(CLIENTS)]
        try:
            for number in range(ROUNDS):
                await back_on_the_first(proxy)
                await hurt(number, relay, first)
            await back_on_the_first(proxy)
        finally:
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
    assert load.wrong == []
    assert max(load.seconds) < 2.0
    ways = {"from": "kmip-a", "to": "kmip-b"}
    assert await asyncio.to_thread(proxy.counted, "xkiproxy_kmi_failovers_total", **ways) > ROUNDS


async def hurt(number: int, relay: Relay, first: PyKmip) -> None:
    """One of the ways, and its end."""
    way = number % 5
    if way == 0:
        relay.stall()
        await asyncio.sleep(0.7)
        relay.reset()
        relay.flow()
    elif way == 1:
        relay.reset()
        await asyncio.sleep(0.2)
    elif way == 2:
        relay.cut(11)
        await asyncio.sleep(0.5)
        relay.flow()
    elif way == 3:
        await relay.stop()
        await asyncio.sleep(0.5)
        await relay.start()
    else:
        await asyncio.to_thread(first.stop)
        await asyncio.sleep(0.3)
        await asyncio.to_thread(first.start)


async def back_on_the_first(proxy: TwoServers) -> None:
    """Within ten seconds all that comes is served by the preferred server."""

    def is_back() -> bool:
        before = proxy.served("kmip-a"), proxy.served("kmip-b")
        for _ in range(3):
            assert proxy.encrypt(b"x")[0] == 200
        after = proxy.served("kmip-a"), proxy.served("kmip-b")
        return after[0] - before[0] >= 3 and after[1] == before[1]

    await asyncio.to_thread(wait_for, is_back, 10.0)


def test_check_names_what_is_wrong_in_a_line(
    servers: tuple[PyKmip, PyKmip], tmp_path: Path
) -> None:
    first, second = servers
    first.start()
    second.start()
    proxy = TwoServers(tmp_path / "demo", first.toml("kmip-a") + second.toml("kmip-b"))
    assert "no problems" in proxy.run("check").stdout
    good = proxy.config.read_text()
    wrong = {
        f'{first.folder}/ca.crt"': (f'{second.folder}/ca.crt"', "its certificate is refused: "),
        f'certificate = "{first.folder}/client.crt"\nprivate_key = {{ file = "{first.folder}': (
            f'certificate = "{second.folder}/client.crt"\nprivate_key = {{ file = "{second.folder}',
            "kmi kmip-a is disconnected: localhost",
        ),
        'random = "generator"': ('random = "server"', "the server lacks RNG_RETRIEVE"),
    }
    for old, (new, complaint) in wrong.items():
        assert old in good
        proxy.config.write_text(good.replace(old, new, 1))
        said = proxy.run("check", status=1).stderr
        lines = [line for line in said.splitlines() if line.startswith("  kmi: kmi kmip-a ")]
        assert len(lines) == 1, said
        assert complaint in lines[0]
        assert "kmip-b" not in said
