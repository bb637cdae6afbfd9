"""A proxy inside the test's event loop: real sockets, real TLS, faults planted behind them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
from cloud import Cloud
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from yarl import URL

from xkiproxy.crypto.algorithms import KeySpec, Usage
from xkiproxy.crypto.operations import KeyState, Operation, Result
from xkiproxy.keystores.catalog import CatalogEntry
from xkiproxy.keystores.keystore import KeyStore
from xkiproxy.keystores.sqlite_catalog import SqliteCatalog
from xkiproxy.kmi.inline import InlineKmi
from xkiproxy.kmi.software import (
    Keyring,
    SoftwareLane,
)
from xkiproxy.observability.audit import AuditLog
from xkiproxy.observability.metrics import Metrics
from xkiproxy.server.condition import Condition
from xkiproxy.server.gateway import Gateway
from xkiproxy.server.listener import Listener

KEYS = {
    "aes256": KeySpec.AES_256,
    "aes192": KeySpec.AES_192,
    "aes128": KeySpec.AES_128,
    "sm4": KeySpec.SM4,
    "disabled": KeySpec.AES_256,
    "deleted": KeySpec.AES_256,
    "encrypt-only": KeySpec.AES_256,
    "decrypt-only": KeySpec.AES_256,
}
STATES = {"disabled": KeyState.DISABLED, "deleted": KeyState.PENDING_DELETION}
USAGES = {"encrypt-only": Usage.ENCRYPT, "decrypt-only": Usage.DECRYPT}


AWS_ID = "BETWEENABCDEFGHIJKLM"
AWS_SECRET = "PqTjvwAWKC+nZpMbw/yJkQ2s0mTUXb3dLHgRfVnc1xE="


class FaultyLane:
    """The software lane, with a fault in front of it when a test plants one."""

    def __init__(self, lane: SoftwareLane) -> None:
        self.lane = lane
        self.fault: Exception | None = None

    @property
    def warning(self) -> str:
        return self.lane.warning

    def execute(self, operation: Operation) -> Result:
        if self.fault is not None:
            raise self.fault
        return self.lane.execute(operation)

    def probe(self) -> None:
        if self.fault is not None:
            raise self.fault
        self.lane.probe()

    def refresh(self) -> None:
        self.lane.refresh()

    def close(self) -> None:
        self.lane.close()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    fields: dict[str, Any]

    @property
    def code(self) -> str:
        return self.fields.get("Code", "")


@dataclass
class Proxy:
    """A running proxy and a cloud to call it."""

    cloud: Cloud
    listener: Listener
    gateway: Gateway
    store: KeyStore
    kmi: InlineKmi
    lane: FaultyLane
    catalog: SqliteCatalog
    metrics: Metrics
    condition: Condition
    audit: AuditLog
    audit_path: Path
    certificate: Path
    session: aiohttp.ClientSession
    base: str = "/demo/kms/xki/v1"
    sent: list[bytes] = field(default_factory=list)

    @property
    def port(self) -> int:
        return self.listener.address[1]

    async def post(
        self, path: str, body: bytes, headers: dict[str, str], method: str = "POST"
    ) -> Answer:
        url = URL(f"https://localhost:{self.port}{path}", encoded=True)
        async with self.session.request(method, url, data=body, headers=headers) as response:
            raw = await response.read()
            return Answer(response.status, dict(response.headers), json.loads(raw))

    async def call(self, call: str, key: str = "", **fields: Any) -> Answer:
        """A request as the cloud makes it."""
        path = f"{self.base}/keys/{key}/{call}" if key else f"{self.base}/{call}"
        body = self.cloud.body(**fields)
        return await self.post(path, body, self.cloud.headers(path, body))

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.audit_path.read_text().splitlines()]

    def sample(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


def make_certificate(
    folder: Path,
    name: str = "server",
    *,
    common_name: str = "localhost",
    dns_names: tuple[str, ...] = ("localhost",),
    issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None = None,
    begins: timedelta = timedelta(hours=-1),
    ends: timedelta = timedelta(days=2),
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A certificate and its key, in `<name>.crt` and `<name>.key`; self-signed without issuer."""
    key = ec.generate_private_key(ec.SECP256R1())
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else []
    subject = x509.Name(attributes)
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begins)
        .not_valid_after(now + ends)
    )
    if dns_names:
        names = [x509.DNSName(dns_name) for dns_name in dns_names]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if issuer is None:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
    certificate = builder.sign(issuer[1] if issuer else key, hashes.SHA256())
    (folder / f"{name}.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    key_file = folder / f"{name}.key"
    key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    key_file.chmod(0o600)
    return certificate, key


def fill_catalog(catalog: SqliteCatalog, keyring: Keyring) -> None:
    for name, spec in KEYS.items():
        keyring.create(name, spec)
        state = STATES.get(name, KeyState.ENABLED)
        catalog.put(CatalogEntry("local", name, state, USAGES.get(name, Usage.BOTH), 1_700_000_000))
