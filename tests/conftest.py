"""What all tests share: this file also puts its folder on the path, for `cloud` and `harness`."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import ports
import pytest
import secret_scan
import uvloop
from cloud import Cloud
from harness import AWS_ID, AWS_SECRET, FaultyLane, Proxy, fill_catalog, make_certificate
from hypothesis import HealthCheck, settings

from xkiproxy.config.models import ServerSettings, TlsSettings
from xkiproxy.config.secrets import SecretSource
from xkiproxy.config.tls import read_tls
from xkiproxy.keystores.credentials import Credential
from xkiproxy.keystores.keystore import KeyStore
from xkiproxy.keystores.replay import ReplayWindow
from xkiproxy.keystores.signing_keys import CachedSigningKeys
from xkiproxy.keystores.sqlite_catalog import SqliteCatalog
from xkiproxy.kmi.inline import InlineKmi
from xkiproxy.kmi.metrics import KmiMetrics
from xkiproxy.kmi.software import Keyring, SoftwareLane, create_keyring, new_master_key
from xkiproxy.observability.audit import AuditLog
from xkiproxy.observability.metrics import Metrics
from xkiproxy.protocols.xki import XkiProtocol
from xkiproxy.protocols.xks import XksProtocol
from xkiproxy.server.condition import Condition
from xkiproxy.server.gateway import Gateway, Tenant
from xkiproxy.server.listener import Listener
from xkiproxy.server.strangers import Strangers
from xkiproxy.server.tls import server_context

# How long an example takes is the machine's affair.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


def pytest_asyncio_loop_factories(config: Any, item: Any) -> dict[str, Callable[[], Any]]:
    """Asynchronous tests run on the loop that the server runs on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session", autouse=True)
def nothing_put_out_holds_a_secret(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """At the end of the run everything that was put out is searched for everything secret."""
    yield
    assert secret_scan.leaks(tmp_path_factory.getbasetemp()) == []


@pytest.fixture
def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    return ports.free_port()


@pytest.fixture
def server_settings(tmp_path: Path) -> ServerSettings:
    make_certificate(tmp_path)
    tls = TlsSettings(
        certificate=tmp_path / "server.crt",
        private_key=SecretSource(file=tmp_path / "server.key"),
    )
    return ServerSettings(listen="127.0.0.1:0", tls=tls)


@pytest.fixture
async def proxy(tmp_path: Path, server_settings: ServerSettings) -> AsyncIterator[Proxy]:
    metrics, condition = Metrics(), Condition()
    master_key = new_master_key()
    create_keyring(tmp_path / "keyring.db", master_key)
    keyring = Keyring(tmp_path / "keyring.db", master_key, "the test")
    catalog = SqliteCatalog(tmp_path / "catalog.db")
    fill_catalog(catalog, keyring)
    lane = FaultyLane(SoftwareLane(keyring))
    kmi = InlineKmi("local", "software", lane, KmiMetrics(metrics, "local"))
    await kmi.check()
    cloud = Cloud("XKITESTACCESSKEY00000001", "a-secret-of-the-tests-0123456789")
    credentials = [Credential(cloud.access_key_id, cloud.secret, "2026-01-01T00:00:00Z")]
    store = KeyStore(
        "demo", catalog, [kmi], CachedSigningKeys(credentials), ReplayWindow(), deadline=5.0
    )
    aws_keys = CachedSigningKeys([Credential(AWS_ID, AWS_SECRET, "2026-01-01T00:00:00Z")])
    aws_store = KeyStore("aws", catalog, [kmi], aws_keys, ReplayWindow(), deadline=5.0)
    audit_path = tmp_path / "audit.jsonl"
    audit = AuditLog(audit_path)
    gateway = Gateway(
        [Tenant("/demo", XkiProtocol(), store), Tenant("/aws", XksProtocol(), aws_store)],
        audit,
        condition,
        metrics,
        Strangers(50),
    )
    assert server_settings.tls is not None
    context = server_context(server_settings.tls, read_tls(server_settings.tls))
    listener = Listener(gateway, server_settings, context)
    await listener.open()
    trusted = ssl.create_default_context(cafile=str(tmp_path / "server.crt"))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusted)) as session:
        running = Proxy(
            cloud, listener, gateway, store, kmi, lane, catalog, metrics, condition, audit,
            audit_path, tmp_path / "server.crt", session,
        )  # fmt: skip
        cloud.host = f"localhost:{running.port}"
        yield running
    await listener.drain()
    await kmi.close()
    catalog.close()
    audit.close()
    await asyncio.sleep(0)
