"""What one encrypt costs on the hot path, stage by stage, without sockets.

Run it before and after a change: `python -m benchmarks.hot_path`. Each figure is the median of
several rounds, in microseconds, with its share of the whole.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from xkiproxy.crypto.algorithms import KeySpec, Usage
from xkiproxy.crypto.operations import Encrypt, Encrypted, KeyState
from xkiproxy.keystores.catalog import CatalogEntry
from xkiproxy.keystores.credentials import Credential
from xkiproxy.keystores.encryptions import Encryptions
from xkiproxy.keystores.keystore import KeyStore
from xkiproxy.keystores.replay import ReplayWindow
from xkiproxy.keystores.signing_keys import CachedSigningKeys
from xkiproxy.keystores.sqlite_catalog import SqliteCatalog
from xkiproxy.keystores.trail import Trail
from xkiproxy.kmi.inline import InlineKmi
from xkiproxy.kmi.metrics import KmiMetrics
from xkiproxy.kmi.software import Keyring, SoftwareLane, create_keyring, new_master_key
from xkiproxy.observability.audit import AuditLog, encode
from xkiproxy.observability.metrics import Metrics
from xkiproxy.protocols.base import Identity, SignedRequest
from xkiproxy.protocols.xki import XkiProtocol, acs4

_ROUNDS, _PER_ROUND = 9, 2000
_PATH = "/demo/kms/xki/v1/keys/k/encrypt"
_CREDENTIAL = Credential("XKIBENCHMARKACCESSKEY001", "a-secret-of-the-benchmark", "2026-01-01")


def _request(algorithm: acs4.SignatureAlgorithm) -> SignedRequest:
    metadata = {
        "KmsRequestId": "req-c9f33906-45bf-4ceb-9b90-4f30a8c616a6",
        "KmsOperation": "kms:Encrypt",
        "KmsInstanceId": "kst-1234567890",
        "KmsKeyArn": "acs:kms:cn-hangzhou:123456789012:key/1111-2222",
        "PrincipalArn": "acs:kms:cn-hangzhou:123456789012:user/123456",
    }
    plaintext = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
    body = orjson.dumps({"RequestMetadata": metadata, "Plaintext": plaintext})
    headers = {
        "host": "proxy.example.com:8443",
        "content-type": "application/json; charset=utf-8",
        "x-acs-accesskey-id": _CREDENTIAL.access_key_id,
        "x-acs-action": "Encrypt",
        "x-acs-version": "2016-01-20",
        "x-acs-date": datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ"),
        "x-acs-signature-nonce": "b5c1a1c0-5c1f-4f8c-9d55-0e1e1d5f1c1a",
        algorithm.content_header: algorithm.hex_digest(body).decode("ascii"),
    }
    headers["Authorization"] = acs4.sign(
        "POST", _PATH, "", headers, body,
        access_key_id=_CREDENTIAL.access_key_id, secret=_CREDENTIAL.access_key_secret,
        region="cn-hangzhou", algorithm=algorithm,
    )  # fmt: skip
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    return SignedRequest("POST", _PATH, "", raw, body)


def _drive(coroutine: Any) -> Any:
    """The result of a coroutine that does not wait, without an event loop's share."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("it waited")


async def _measure(folder: Path) -> dict[str, float]:
    metrics = Metrics()
    master_key = new_master_key()
    create_keyring(folder / "keyring.db", master_key)
    keyring = Keyring(folder / "keyring.db", master_key, "the benchmark")
    keyring.create("k", KeySpec.AES_256)
    catalog = SqliteCatalog(folder / "catalog.db")
    catalog.put(CatalogEntry("local", "k", KeyState.ENABLED, Usage.BOTH, 0.0))
    lane = SoftwareLane(keyring)
    kmi = InlineKmi("local", "software", lane, KmiMetrics(metrics, "local"))
    keys = CachedSigningKeys([_CREDENTIAL])
    store = KeyStore(
        "demo", catalog, [kmi], keys, ReplayWindow(), deadline=1.0,
        encryptions=Encryptions(folder / "encryptions.db"),
    )  # fmt: skip
    protocol = XkiProtocol()
    audit = AuditLog(folder / "audit.jsonl")
    sha256 = _request(acs4.SignatureAlgorithm.HMAC_SHA256)
    sm3 = _request(acs4.SignatureAlgorithm.HMAC_SM3)
    now = time.time()
    identity = Identity(_CREDENTIAL.access_key_id, "", now)
    deadline = time.monotonic() + 3600
    _, fields = protocol.open("encrypt", sha256.body, identity)
    operation: Any = protocol.decode("encrypt", "k", fields)
    result = lane.execute(operation)
    assert isinstance(result, Encrypted)
    record = {"time": datetime.now(UTC), **dict.fromkeys("abcdefghijklmno", "a value of a field")}
    nonces = iter(range(10**9))

    stages: dict[str, Callable[[], Any]] = {
        "authenticate (SHA256)": lambda: protocol.authenticate(sha256, keys, now),
        "authenticate (SM3)": lambda: protocol.authenticate(sm3, keys, now),
        "replay window": lambda: store.replay.admit("id", str(next(nonces)), now + 900, now),
        "decode": lambda: protocol.decode(
            "encrypt", "k", protocol.open("encrypt", sha256.body, identity)[1]
        ),
        "perform": lambda: _drive(store.perform(operation, deadline, Trail())),
        "  of which the lane": lambda: lane.execute(operation),
        "encode": lambda: protocol.encode(operation, result, "id"),
        "audit": lambda: audit.append([encode(record)]),
    }
    costs = {name: _median_us(stage) for name, stage in stages.items()}
    await kmi.close()
    catalog.close()
    audit.close()
    return costs


def software_rate(seconds: float) -> float:
    """Encrypts a second of the software lane, called straight."""
    with tempfile.TemporaryDirectory() as folder:
        master_key = new_master_key()
        create_keyring(Path(folder) / "keyring.db", master_key)
        keyring = Keyring(Path(folder) / "keyring.db", master_key, "the benchmark")
        keyring.create("k", KeySpec.AES_256)
        lane, operation, count = SoftwareLane(keyring), Encrypt("k", bytes(32)), 0
        began = time.perf_counter()
        while time.perf_counter() < began + seconds:
            for _ in range(100):
                lane.execute(operation)
            count += 100
        rate = count / (time.perf_counter() - began)
        lane.close()
    return rate


def _median_us(stage: Callable[[], Any]) -> float:
    rounds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        for _ in range(_PER_ROUND):
            stage()
        rounds.append((time.perf_counter() - start) / _PER_ROUND * 1e6)
    return statistics.median(rounds)


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        costs = asyncio.run(_measure(Path(folder)))
    extra = ("authenticate (SM3)", "  of which the lane")
    total = sum(cost for name, cost in costs.items() if name not in extra)
    for name, cost in costs.items():
        print(f"{name:<24}{cost:8.1f} us {cost / total:7.0%}")
    print(f"{'all but SM3':<24}{total:8.1f} us")


if __name__ == "__main__":
    main()
