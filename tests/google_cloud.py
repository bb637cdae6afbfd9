"""Google's side of EKM for the tests: tokens signed by google-auth, and the keys as a JWK Set."""

from __future__ import annotations

import base64
import json
import time
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from google.auth import crypt, jwt

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
