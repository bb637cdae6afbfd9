"""Google's side of EKM for the tests: tokens signed by google-auth, and the keys as a JWK Set."""

from __future__ import annotations

import base64
import http.server
import json
import ssl
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from google.auth import crypt, jwt
from harness import make_certificate

ACCOUNT = "service-123456789012@gcp-sa-ekms.iam.gserviceaccount.com"
AUDIENCE = "https://localhost"
RESOURCE = "projects/p/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/1"


def b64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def number(value: int) -> str:
    return b64url(value.to_bytes((value.bit_length() + 7) // 8, "big"))


@dataclass
class SigningKey:
    """One of Google's keys."""

    kid: str
    key: rsa.RSAPrivateKey = field(
        default_factory=lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048)
    )

    def private_pem(self) -> bytes:
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def public_pem(self) -> bytes:
        return self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def jwk(self, **changes: Any) -> dict[str, Any]:
        numbers = self.key.public_key().public_numbers()
        found = {"kty": "RSA", "alg": "RS256", "use": "sig", "kid": self.kid}
        return {**found, "n": number(numbers.n), "e": number(numbers.e), **changes}

    def sign(self, claims: dict[str, Any], header: dict[str, Any] | None = None) -> str:
        signer = crypt.RSASigner.from_string(self.private_pem(), self.kid)
        return jwt.encode(signer, claims, header=header).decode()


def claims(now: float | None = None, **changes: Any) -> dict[str, Any]:
    """What Google's token for the service agent says; a claim that is None is left out."""
    issued = int(time.time() if now is None else now)
    found = {
        "iss": "https://accounts.google.com",
        "aud": AUDIENCE,
        "azp": "100000000000000000000",
        "sub": "100000000000000000000",
        "email": ACCOUNT,
        "email_verified": True,
        "iat": issued,
        "exp": issued + 3600,
        **changes,
    }
    return {name: value for name, value in found.items() if value is not None}


def key_set(*keys: SigningKey) -> str:
    return json.dumps({"keys": [key.jwk() for key in keys]})


def request(reason: str | None = "CUSTOMER_INITIATED_ACCESS", **fields: Any) -> dict[str, Any]:
    """The fields of a request as Cloud EKM sends it."""
    context: dict[str, Any] = {"relativeResourceName": RESOURCE}
    if reason is not None:
        context["accessReasonContext"] = {"reason": reason}
    return {**fields, "additionalContext": context}


class KeyServer:
    """The server of Google's keys: HTTPS, in a thread, with its certificate in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        make_certificate(folder)
        self.certificate = folder / "server.crt"
        self.document = ""
        self.status = 200
        self.headers: dict[str, str] = {}
        self.asked = 0
        self.port = 0
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(self.certificate, folder / "server.key")
        self._server: http.server.ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}/oauth2/v3/certs"

    def start(self) -> None:
        """Listen, at the port of before if there was one."""
        served = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                served.asked += 1
                self.send_response_only(served.status)
                for name, value in served.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(served.document.encode())

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.socket = self._context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


def keystore_table(**google: Any) -> str:
    """A key store for the end of a configuration; `google` is what its table has beside."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in google.items()]
    return (
        '\n[[keystore]]\nname = "gcp"\nprotocol = "ekm"\npath_prefix = "/gcp"\n'
        'kmi = ["local"]\ndeadline_ms = 5000\n\n[keystore.google]\n'
        f'service_accounts = ["{ACCOUNT}"]\naudience = "{AUDIENCE}"\n' + "\n".join(lines) + "\n"
    )
