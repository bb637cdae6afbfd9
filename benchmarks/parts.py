"""The pure parts of one encrypt, for `benchmarks.instructions`, which counts their instructions.

As a program (`python -m benchmarks.parts NAME...`) it runs the named parts one after the other,
each after a warm-up `COUNT` and then `2 * COUNT` times, with a call of `getppid` before, between
and after: a mark that the counter sees, and that nobody else makes. There are no sockets, no event
loop and no garbage collection, and whatever is drawn or dated has the same length every time.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import ipaddress
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any, cast

from xkiproxy.config.models import ServerSettings
from xkiproxy.crypto.algorithms import KeySpec, Usage
from xkiproxy.crypto.operations import Encrypt, Encrypted, KeyState
from xkiproxy.keystores.authorization import Authorizer
from xkiproxy.keystores.catalog import CatalogEntry
from xkiproxy.keystores.credentials import Credential
from xkiproxy.keystores.encryptions import Encryptions
from xkiproxy.keystores.keystore import KeyStore
from xkiproxy.keystores.policies import Policies, split
from xkiproxy.keystores.quotas import Quota, Quotas, QuotaTable
from xkiproxy.keystores.replay import ReplayWindow
from xkiproxy.keystores.signing_keys import CachedSigningKeys
from xkiproxy.keystores.sqlite_catalog import SqliteCatalog
from xkiproxy.keystores.trail import Trail
from xkiproxy.kmi.inline import InlineKmi
from xkiproxy.kmi.metrics import KmiMetrics
from xkiproxy.kmi.software import Keyring, SoftwareLane, create_keyring, new_master_key
from xkiproxy.observability.audit import AuditLog
from xkiproxy.observability.metrics import Metrics
from xkiproxy.protocols.base import Identity, Protocol
from xkiproxy.protocols.client import ClientDialect, Signer, call_path
from xkiproxy.protocols.xki import XkiProtocol
from xkiproxy.protocols.xki.client import XkiClient
from xkiproxy.protocols.xks import XksProtocol
from xkiproxy.protocols.xks.client import XksClient
from xkiproxy.server.condition import Condition
from xkiproxy.server.connection import Connection, Shared
from xkiproxy.server.gateway import Exchange, Gateway, Tenant
from xkiproxy.server.http import Request
from xkiproxy.server.networks import Networks
from xkiproxy.server.strangers import Strangers

COUNT = 192
"""A multiple of 64: the gateway times the stages of one request in so many."""
WARM_UP = 64
_ALL = WARM_UP + 3 * COUNT

_CREDENTIAL = Credential("XKIBENCHMARKACCESSKEY001", "a-secret-of-the-benchmark", "2026-01-01")
_KEY = "a-key"
_IDENTITY = Identity(_CREDENTIAL.access_key_id, "", 0.0)
_REQUEST_ID = "0b6a3c1e-5e53-4c55-8f0a-3c1e5e534c55"
_PLAINTEXT = bytes(range(32))
_NEVER = float("inf")

Step = Callable[[], object]


def drive(work: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that does not wait, without an event loop's share."""
    try:
        work.send(None)
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("it waited")


class _Loop:
    """What a connection asks of an event loop: callbacks are kept until `run`."""

    time = staticmethod(time.monotonic)

    def __init__(self) -> None:
        self._ready: list[Callable[[], object]] = []

    def call_soon(self, callback: Callable[[], object]) -> None:
        self._ready.append(callback)

    def get_debug(self) -> bool:
        return False

    def run(self) -> None:
        """Run what is ready, until nothing is."""
        while self._ready:
            ready, self._ready = self._ready, []
            for callback in ready:
                callback()


class _Transport(asyncio.Transport):
    """Keeps what was written last."""

    def __init__(self) -> None:
        super().__init__({"peername": ("192.0.2.1", 50000)})
        self.written = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written = bytes(data)


_POLICY = """
permit(principal, action, resource) unless { context has source_vpc };
forbid(principal, action in [Action::"encrypt", Action::"decrypt"], resource)
unless { context.mode == "GCM" && !context.client_iv };
"""
_QUOTAS = {name: Quota(1e9, 1_000_000) for name in ("all", "key", "principal")}


class Bench:
    """A proxy with one key store, without its sockets."""

    def __init__(
        self, folder: Path, protocol: Protocol, client: ClientDialect, *, guarded: bool = False
    ) -> None:
        """`guarded`: with policies, quotas and source networks, which all admit what comes."""
        self.metrics = Metrics()
        self.protocol = protocol
        self.signing_keys = CachedSigningKeys([_CREDENTIAL])
        self.audit = AuditLog(folder / "audit.jsonl")
        self.lane = _lane(folder)
        kmi = InlineKmi("local", "software", self.lane, KmiMetrics(self.metrics, "local"))
        drive(kmi.check())
        catalog = SqliteCatalog(folder / "catalog.db")
        catalog.put(CatalogEntry("local", _KEY, KeyState.ENABLED, Usage.BOTH, 0.0))
        # The instructions of a slow counter must not include those of a missed deadline.
        self.store = KeyStore(
            "demo", catalog, [kmi], self.signing_keys, ReplayWindow(), deadline=3600,
            authorizer=Authorizer("demo", Policies(split("p", _POLICY))) if guarded else None,
            quotas=Quotas("demo", _QUOTAS, QuotaTable()) if guarded else None,
            encryptions=Encryptions(folder / "encryptions.db"),
        )  # fmt: skip
        networks = Networks([ipaddress.ip_network("192.0.2.0/24")]) if guarded else None
        self.tenant = Tenant("/demo", protocol, self.store, networks)
        self._client = client

    def requests(self) -> Iterator[tuple[dict[str, str], Request]]:
        """Signed requests without end, no two of them the same: their headers, and all of it."""
        client = self._client
        path = call_path("/demo" + client.base_path, "encrypt", _KEY)
        fields = client.fields("encrypt", {"plaintext": _PLAINTEXT})
        access_key_id, secret = _CREDENTIAL.access_key_id, _CREDENTIAL.access_key_secret
        signer = Signer(access_key_id, secret, client.default_region)
        now = time.time()
        for number in count():
            signed = client.build_request(
                "encrypt", path, fields, signer, host="proxy.example.com:8443", now=now,
                nonce=f"b5c1a1c0-5c1f-4f8c-9d55-{number:012x}",
                kms_request_id=f"c9f33906-45bf-4ceb-9b90-{number:012x}",
            )  # fmt: skip
            headers = {**signed.headers, "content-length": str(len(signed.body))}
            raw = [(name.encode(), value.encode()) for name, value in headers.items()]
            request = Request("POST", path, raw, "192.0.2.1", time.monotonic())
            request.body = signed.body
            yield headers, request

    def prepared(self) -> Iterator[Request]:
        """As many requests as a part needs, made before it runs."""
        return iter([request for _, request in islice(self.requests(), _ALL)])

    def wire_requests(self) -> Iterator[bytes]:
        """The same as bytes."""
        made = []
        for headers, request in islice(self.requests(), _ALL):
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            head = f"POST {request.path} HTTP/1.1\r\n{lines}\r\n"
            made.append(head.encode() + request.body)
        return iter(made)

    def operation(self) -> Encrypt:
        """What a request asks for."""
        _, fields = self.protocol.open("encrypt", next(self.requests())[1].body, _IDENTITY)
        operation = self.protocol.decode("encrypt", _KEY, fields)
        assert isinstance(operation, Encrypt)
        return operation


def _lane(folder: Path) -> SoftwareLane:
    master_key = new_master_key()
    create_keyring(folder / "keyring.db", master_key)
    keyring = Keyring(folder / "keyring.db", master_key, "the benchmark")
    keyring.create(_KEY, KeySpec.AES_256)
    return SoftwareLane(keyring)


# ---- the parts ----------------------------------------------------------------------------------


class _Counter:
    """For `_reference`: an object with state."""

    def __init__(self) -> None:
        self.total = 0

    def add(self, name: str, value: int) -> str:
        """Count, and say so."""
        self.total += value
        return f"{name}={value:04d};{self.total % 1000}"


def _reference(_: Bench) -> Step:
    """The yardstick: work of the same kind as ours that no change of the project touches.

    It must never change: all budgets are multiples of it. A fourth of it or more is hashing, as in
    a request: builds of Python differ in one and hardly in the other, and the ratios stay close.
    """
    block = bytes(1024)

    def step() -> None:
        counter = _Counter()
        found = {f"name-{i}": i for i in range(12)}
        text = ",".join([counter.add(name, value) for name, value in found.items()])
        parts = [part.partition("=") for part in text.split(",")]
        sorted(parts, key=lambda part: part[2])
        assert len({head: tail for head, _, tail in parts}) == len(found)
        for head, *_ in parts[:3]:
            hashlib.sha256(block + head.encode("ascii")).hexdigest()

    return step


def _authenticate(bench: Bench) -> Step:
    protocol, keys = bench.protocol, bench.signing_keys
    requests, now = bench.prepared(), time.time()
    return lambda: protocol.authenticate(next(requests), keys, now)


def _decode(bench: Bench) -> Step:
    protocol, requests = bench.protocol, bench.prepared()

    def step() -> None:
        _, fields = protocol.open("encrypt", next(requests).body, _IDENTITY)
        protocol.decode("encrypt", _KEY, fields)

    return step


def _encode(bench: Bench) -> Step:
    operation = bench.operation()
    result = bench.lane.execute(operation)
    assert isinstance(result, Encrypted)
    return lambda: bench.protocol.encode(operation, result, _REQUEST_ID)


def _perform(bench: Bench) -> Step:
    store, operation = bench.store, bench.operation()
    return lambda: drive(store.perform(operation, _NEVER, Trail()))


def _audit(bench: Bench) -> Step:
    """The record of an exchange, from what is known of it to the file."""
    _, request = next(bench.requests())
    caller, _ = bench.protocol.open("encrypt", request.body, _IDENTITY)

    def step() -> None:
        exchange = Exchange(bench.tenant, "encrypt", _KEY, request, timing=None)
        exchange.access_key_id = _CREDENTIAL.access_key_id
        exchange.caller = caller
        exchange.key_id, exchange.kmi, exchange.version = _KEY, "local", 1
        exchange.complete(recorded=True)
        bench.audit.append([exchange.record])

    return step


def _whole(bench: Bench) -> Step:
    """From the bytes of a request to those of its answer."""
    gateway = Gateway([bench.tenant], bench.audit, Condition(), bench.metrics, Strangers(50))
    loop, transport, requests = _Loop(), _Transport(), bench.wire_requests()
    shared = Shared(
        gateway, ServerSettings(plaintext=True, listen="127.0.0.1:0"),
        cast(asyncio.AbstractEventLoop, loop),
    )  # fmt: skip
    connection = Connection(shared)
    connection.connection_made(transport)

    def step() -> None:
        connection.data_received(next(requests))
        loop.run()
        if not transport.written.startswith(b"HTTP/1.1 200 "):
            raise RuntimeError(transport.written.decode())

    return step


def _xki(folder: Path) -> Bench:
    return Bench(folder, XkiProtocol(), XkiClient())


def _guarded(folder: Path) -> Bench:
    return Bench(folder, XkiProtocol(), XkiClient(), guarded=True)


def _xks(folder: Path) -> Bench:
    return Bench(folder, XksProtocol(), XksClient())


REFERENCE = "reference"

PARTS: dict[str, tuple[Callable[[Path], Bench], Callable[[Bench], Step]]] = {
    REFERENCE: (_xki, _reference),
    "xki-authenticate": (_xki, _authenticate),
    "xks-authenticate": (_xks, _authenticate),
    "xki-decode-encrypt": (_xki, _decode),
    "xki-encode": (_xki, _encode),
    "perform": (_xki, _perform),
    "audit": (_xki, _audit),
    "whole-xki": (_xki, _whole),
    "whole-xks": (_xks, _whole),
    "whole-guarded": (_guarded, _whole),
}
"""Each with what makes its surroundings, and itself in them."""

COUNTED = "COUNTED_BY_VALGRIND"
"""The environment variable that is set by whoever counts."""
PLANT = "PLANT_SLOWNESS_IN"
"""The environment variable that names a part to be made slower, to see that it is noticed."""


def _slower(step: Step) -> Step:
    def slow() -> None:
        step()
        assert len({str(i): i for i in range(10)}) == 10

    return slow


def _repeat(step: Step, times: int) -> None:
    for _ in range(times):
        step()


def _run(name: str, folder: Path) -> None:
    make_bench, make_step = PARTS[name]
    step = make_step(make_bench(folder))
    if os.environ.get(PLANT) == name:
        step = _slower(step)
    _repeat(step, WARM_UP)
    os.getppid()
    _repeat(step, COUNT)
    os.getppid()
    _repeat(step, 2 * COUNT)
    os.getppid()


def _begin_to_count() -> None:
    """Have valgrind count from here on: the imports before would take it longer than the parts."""
    control = subprocess.Popen(
        ["vgdb", f"--pid={os.getpid()}", "instrumentation", "on"], stdout=subprocess.DEVNULL
    )
    while control.poll() is None:
        pass  # not `wait`: valgrind listens while there is code to run
    if control.returncode:
        raise RuntimeError(f"vgdb ended with status {control.returncode}")


def main() -> None:
    """Run the parts that the command line names."""
    gc.disable()
    if COUNTED in os.environ:
        _begin_to_count()
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            _run(name, Path(folder))


if __name__ == "__main__":
    main()
