"""PyKMIP's server for tests: other people's KMIP, in a process of its own, over real TLS.

It speaks KMIP 1.0 to 2.0 and has neither Re-key nor RNG Retrieve. Certificates are made here, with
the extended key usage by which it knows its clients.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from ports import free_port

from xkiproxy.config.models import KmipSettings

_PROGRAM = """
import logging, sys
from kmip.services.server import KmipServer
{patch}
server = KmipServer(
    hostname="127.0.0.1", port={port}, certificate_path="{tls}/server.crt",
    key_path="{tls}/server.key", ca_path="{tls}/ca.crt", auth_suite="TLS1.2", config_path=None,
    log_path="{folder}/pykmip.log", policy_path="{folder}/policies", enable_tls_client_auth=True,
    logging_level="WARNING", database_path="{folder}/pykmip.db",
)
with server:
    server.serve()
"""

Issuer = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def issue(folder: Path, name: str, issuer: Issuer | None = None, *, client: bool = False) -> Issuer:
    """A certificate for localhost, or for a client; an authority without an issuer."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    usage = ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=2))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if issuer is not None:
        names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
        builder = builder.add_extension(names, critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    certificate = builder.sign(issuer[1] if issuer else key, hashes.SHA256())
    (folder / f"{name}.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    file = folder / f"{name}.key"
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    file.chmod(0o600)
    return certificate, key


@dataclass
class PyKmip:
    """A server, and what a client needs of it. `patch` is Python that is run in it first."""

    folder: Path
    patch: str = ""
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        (self.folder / "policies").mkdir()
        self.authority = issue(self.folder, "ca")
        issue(self.folder, "server", self.authority)
        issue(self.folder, "client", self.authority, client=True)
        self.port = free_port()

    def settings(self, **changes: Any) -> KmipSettings:
        fields: dict[str, Any] = {
            "name": "kmip",
            "type": "kmip",
            "address": f"localhost:{self.port}",
            "tls": {
                "ca": self.folder / "ca.crt",
                "certificate": self.folder / "client.crt",
                "private_key": self.folder / "client.key",
            },
            "lanes": 1,
            "random": "generator",
            "operation_timeout_ms": 5000,
            **changes,
        }
        return KmipSettings(**fields)

    def toml(self, name: str, **changes: object) -> str:
        """The same as a table of the configuration file."""
        lines = {
            "name": name, "type": "kmip", "address": f"localhost:{self.port}", "lanes": 2,
            "random": "generator", "operation_timeout_ms": 5000, **changes,
        }  # fmt: skip
        return (
            "\n[[kmi]]\n"
            + "".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items())
            + f'[kmi.tls]\nca = "{self.folder}/ca.crt"\ncertificate = "{self.folder}/client.crt"\n'
            + f'private_key = {{ file = "{self.folder}/client.key" }}\n'
        )

    def start(self) -> None:
        program = _PROGRAM.format(
            port=self.port, tls=self.folder, folder=self.folder, patch=self.patch
        )
        with (self.folder / "server-output.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        for _ in range(400):
            if self.process.poll() is not None:
                break
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        pytest.fail((self.folder / "server-output.log").read_text())

    def stop(self, number: int = signal.SIGKILL) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.send_signal(number)
            process.wait(timeout=30)
            # It has a child, for its policies, which outlives it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
