"""Key managers over a network: what batches are worth at 0, 1 and 5 ms of round-trip time.

The servers, for KMIP and Transit, are small ones of our own in a process of their own: they stand
for appliances that are not the bottleneck. A relay before them adds the time. Run it with:
python -m benchmarks.network
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import ssl
import tempfile
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import product
from multiprocessing.connection import Connection as Pipe
from os import urandom
from pathlib import Path
from typing import Any

import orjson
import uvloop
from aiohttp import web
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from benchmarks.relay import Relay
from xkiproxy.cli.certificate import CertificateKey, self_signed
from xkiproxy.config.models import KmipSettings, TransitSettings
from xkiproxy.config.secrets import write_secret_file
from xkiproxy.crypto.operations import Encrypt
from xkiproxy.kmi.kmip import messages, ttlv
from xkiproxy.kmi.kmip.messages import Op, Tag
from xkiproxy.kmi.kmip.ttlv import Structure
from xkiproxy.kmi.registry import open_kmi
from xkiproxy.observability.metrics import Metrics

Settings = KmipSettings | TransitSettings

ROUND_TRIPS_MS = (0, 1, 5)
BATCHES = (1, 64)
CONCURRENCIES = (1, 16, 64, 256)

_KEY = "benchmark"
_UID = "1"
_OPERATIONS = (Op.LOCATE, Op.GET_ATTRIBUTES, Op.ENCRYPT, Op.DECRYPT, Op.RNG_RETRIEVE)


# ---- the server --------------------------------------------------------------------------------


class _KmipServer(asyncio.Protocol):
    """Answers as a KMIP 1.4 server with one key does; one object for each connection."""

    _gcm = AESGCM(bytes(32))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._received = b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        while len(self._received) >= ttlv.HEADER_SIZE:
            size = ttlv.message_size(self._received)
            if len(self._received) < size:
                return
            message, self._received = self._received[:size], self._received[size:]
            self._transport.write(self._answer(ttlv.decode(message)))

    def _answer(self, message: Structure) -> bytes:
        items = [item for item in message.all(Tag.BATCH_ITEM) if isinstance(item, Structure)]
        header = ttlv.structure(
            Tag.RESPONSE_HEADER,
            ttlv.structure(
                Tag.PROTOCOL_VERSION,
                ttlv.integer(Tag.PROTOCOL_VERSION_MAJOR, 1),
                ttlv.integer(Tag.PROTOCOL_VERSION_MINOR, 4),
            ),
            ttlv.integer(Tag.BATCH_COUNT, len(items)),
        )
        return ttlv.structure(Tag.RESPONSE_MESSAGE, header, *map(self._item, items))

    def _item(self, item: Structure) -> bytes:
        operation = item.number(Tag.OPERATION)
        payload = self._payload(operation, item.structure(Tag.REQUEST_PAYLOAD))
        return ttlv.structure(
            Tag.BATCH_ITEM,
            ttlv.enumeration(Tag.OPERATION, operation),
            ttlv.octets(Tag.UNIQUE_BATCH_ITEM_ID, item.octets(Tag.UNIQUE_BATCH_ITEM_ID)),
            ttlv.enumeration(Tag.RESULT_STATUS, 0),
            ttlv.structure(Tag.RESPONSE_PAYLOAD, *payload),
        )

    def _payload(self, operation: int, asked: Structure) -> Iterator[bytes]:
        if operation == Op.DISCOVER_VERSIONS:
            yield ttlv.structure(
                Tag.PROTOCOL_VERSION,
                ttlv.integer(Tag.PROTOCOL_VERSION_MAJOR, 1),
                ttlv.integer(Tag.PROTOCOL_VERSION_MINOR, 4),
            )
        elif operation == Op.QUERY:
            for known in _OPERATIONS:
                yield ttlv.enumeration(Tag.OPERATION, known)
        elif operation == Op.LOCATE:
            wanted = messages.attributes(messages.Answer(asked)).get(Tag.NAME, [b""])[0]
            if isinstance(wanted, Structure) and wanted.text(Tag.NAME_VALUE) == _KEY:
                yield ttlv.text(Tag.UNIQUE_IDENTIFIER, _UID)
        elif operation == Op.GET_ATTRIBUTES:
            yield from _attributes()
        elif operation == Op.ENCRYPT:
            iv, aad = asked.octets(Tag.IV_COUNTER_NONCE), asked.octets(Tag.ADDITIONAL_DATA)
            data = self._gcm.encrypt(iv, asked.octets(Tag.DATA), aad)
            yield ttlv.text(Tag.UNIQUE_IDENTIFIER, _UID)
            yield ttlv.octets(Tag.DATA, data[:-16])
            yield ttlv.octets(Tag.AUTHENTICATION_TAG, data[-16:])


def _attributes() -> Iterator[bytes]:
    name = ttlv.structure(
        Tag.ATTRIBUTE_VALUE,
        ttlv.text(Tag.NAME_VALUE, _KEY),
        ttlv.enumeration(Tag.NAME_TYPE, 1),
    )
    values = {
        "Name": name,
        "State": ttlv.enumeration(Tag.ATTRIBUTE_VALUE, 2),
        "Cryptographic Algorithm": ttlv.enumeration(Tag.ATTRIBUTE_VALUE, messages.AES),
        "Cryptographic Length": ttlv.integer(Tag.ATTRIBUTE_VALUE, 256),
        "Cryptographic Usage Mask": ttlv.integer(Tag.ATTRIBUTE_VALUE, 12),
    }
    for text, value in values.items():
        yield ttlv.structure(Tag.ATTRIBUTE, ttlv.text(Tag.ATTRIBUTE_NAME, text), value)


def _transit_app() -> web.Application:
    """Answers as a Transit engine with one key does."""
    gcm = AESGCM(bytes(32))

    def encrypted(item: dict[str, Any]) -> dict[str, Any]:
        iv, aad = urandom(12), b64decode(item["associated_data"])
        data = iv + gcm.encrypt(iv, b64decode(item["plaintext"]), aad)
        return {"ciphertext": f"vault:v1:{b64encode(data).decode()}", "key_version": 1}

    async def answer(request: web.Request) -> web.Response:
        path = request.path.removeprefix("/v1/")
        body = orjson.loads(await request.read() or b"{}")
        known: dict[str, dict[str, Any]] = {
            "auth/token/lookup-self": {"ttl": 0, "renewable": False, "expire_time": None},
            f"transit/keys/{_KEY}": {
                "type": "aes256-gcm96", "latest_version": 1, "keys": {"1": 1700000000},
                "supports_encryption": True, "supports_decryption": True,
            },
        }  # fmt: skip
        if path == "sys/health":
            return web.json_response({"initialized": True, "sealed": False, "version": "1.19.0"})
        data = known.get(path, {})
        if path == "transit/random":
            data = {"random_bytes": b64encode(urandom(body["bytes"])).decode()}
        elif path == f"transit/encrypt/{_KEY}":
            data = {"batch_results": [encrypted(item) for item in body["batch_input"]]}
        return web.Response(body=orjson.dumps({"data": data}), content_type="application/json")

    app = web.Application(client_max_size=1 << 24)
    app.router.add_route("*", "/{path:.*}", answer)
    return app


async def _serve(kind: str, folder: Path, pipe: Pipe) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    loop = asyncio.get_running_loop()
    make: Any = _KmipServer
    if kind == "transit":
        runner = web.AppRunner(_transit_app(), access_log=None)
        await runner.setup()
        make = runner.server
    server = await loop.create_server(make, "127.0.0.1", 0, ssl=context)
    relay = Relay(server.sockets[0].getsockname()[1])
    await relay.start()
    pipe.send(relay.port)
    while (command := await loop.run_in_executor(None, pipe.recv)) is not None:
        # All of the round trip on one way: timers have a millisecond.
        relay.request_delay = command / 1000
        pipe.send(True)
    await relay.stop()
    server.close()


def _run_server(kind: str, folder: Path, pipe: Pipe) -> None:
    uvloop.run(_serve(kind, folder, pipe))


@contextmanager
def _server(kind: str, folder: Path) -> Iterator[tuple[int, Pipe]]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_run_server, args=(kind, folder, theirs), daemon=True
    )
    process.start()
    try:
        yield ours.recv(), ours
    finally:
        ours.send(None)
        process.join(10)
        process.kill()


# ---- the client --------------------------------------------------------------------------------


async def measure(
    settings: Settings, max_batch: int, concurrency: int, seconds: float
) -> tuple[float, float]:
    """Operations a second on one lane, and the median latency in milliseconds."""
    changes = {"max_batch": max_batch, "queue_size": 4096, "lanes": 1}
    kmi = open_kmi(settings.model_copy(update=changes), Metrics())
    kmi.start()
    await kmi.check()
    operation = Encrypt(_KEY, bytes(32))
    await kmi.submit(operation, time.monotonic() + 10)
    times: list[float] = []
    end = time.monotonic() + seconds

    async def client() -> None:
        while (began := time.monotonic()) < end:
            await kmi.submit(operation, began + 30)
            times.append(time.monotonic() - began)

    began = time.monotonic()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    took = time.monotonic() - began
    await kmi.close()
    return len(times) / took, 1000 * sorted(times)[len(times) // 2]


async def run(seconds: float) -> dict[tuple[str, int, int, int], float]:
    """Print the table.

    Returns operations a second by kind, round-trip time, largest batch and concurrency.
    """
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _make_certificate(folder)
        print("kind     round trip  batch  concurrency  operations/s  median ms")
        for kind in ("kmip", "transit"):
            with _server(kind, folder) as (port, pipe):
                settings = _settings(kind, folder, port)
                for round_trip, batch, concurrency in product(
                    ROUND_TRIPS_MS, BATCHES, CONCURRENCIES
                ):
                    pipe.send(round_trip)
                    pipe.recv()
                    rate, median = await measure(settings, batch, concurrency, seconds)
                    found[kind, round_trip, batch, concurrency] = rate
                    line = f"{kind:<8} {round_trip:>7} ms {batch:>6} {concurrency:>12}"
                    print(f"{line} {rate:>13,.0f} {median:>10.2f}", flush=True)
    most = max(CONCURRENCIES)
    for kind, round_trip in product(("kmip", "transit"), ROUND_TRIPS_MS):
        worth = found[kind, round_trip, 64, most] / found[kind, round_trip, 1, most]
        where = f"{kind} at {round_trip} ms and concurrency {most}"
        print(f"{where}: batches are worth {worth:.1f} times")
    return found


def _make_certificate(folder: Path) -> None:
    certificate, key = self_signed(["localhost"], CertificateKey.EC, datetime.now(UTC))
    (folder / "server.crt").write_text(certificate)
    write_secret_file(folder / "server.key", key)


def _settings(kind: str, folder: Path, port: int) -> Settings:
    if kind == "kmip":
        tls = {
            "ca": str(folder / "server.crt"), "certificate": str(folder / "server.crt"),
            "private_key": str(folder / "server.key"),
        }  # fmt: skip
        return KmipSettings.model_validate(
            {
                "name": "kmip", "type": "kmip", "address": f"localhost:{port}", "tls": tls,
                "version": "1.4", "operation_timeout_ms": 30_000,
            }
        )  # fmt: skip
    token = folder / "token"
    write_secret_file(token, "a-token-of-the-benchmark")
    return TransitSettings.model_validate(
        {
            "name": "transit", "type": "transit", "address": f"https://localhost:{port}",
            "auth": {"token": str(token)}, "tls": {"ca": str(folder / "server.crt")},
            "operation_timeout_ms": 30_000,
        }
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.network",
        description="What batches are worth to a KMI over a network, on one lane.",
        epilog="Example: python -m benchmarks.network --seconds 2",
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each line is measured")
    uvloop.run(run(parser.parse_args().seconds))


if __name__ == "__main__":
    main()
