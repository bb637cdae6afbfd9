"""Google's ID tokens: who sends a request, proven by a JWT that Google has signed.

A token is a bearer secret: whoever has it can use it until it expires. So nothing of one stands in
a message, a log or a `repr` here, and what is remembered of a good one is its SHA-256 alone. The
rules are those of "Verify the integrity of the ID token" (OpenID Connect, Google Identity) and of
RFC 8725: the algorithm is fixed here and never taken from the token.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from typing import Protocol as Interface

import jwt
import orjson
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt.algorithms import RSAAlgorithm

from xkiproxy.crypto.operations import Fault, OperationError
from xkiproxy.protocols.base import Identity, Reason
from xkiproxy.protocols.ekm.errors import unauthenticated
from xkiproxy.protocols.signed_headers import fold_headers

ISSUERS = ("https://accounts.google.com", "accounts.google.com")
LEEWAY_SECONDS = 60.0
"""How far the clocks may differ."""
MAX_TOKEN_SIZE = 4096
"""Bytes; Google's have about 1,000."""

_ALGORITHM = "RS256"
_MAX_REMEMBERED = 1024
_MIN_KEY_BITS = 2048
_LATEST = 1e12
"""In seconds since the epoch; beyond it no number is a date (nor is NaN)."""
_HEADER = re.compile(rb"(?i:bearer) +([A-Za-z0-9_-]{1,512}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+)")
"""What is parsed before the signature is verified is bounded: Google's has 100 characters."""
_CLAIMS = ["iss", "aud", "exp", "iat", "email", "email_verified"]
_OPTIONS: Any = {
    "require": _CLAIMS,
    "strict_aud": True,
    # The clock is the caller's: see `_check_times`.
    "verify_exp": False,
    "verify_iat": False,
    "verify_nbf": False,
}


class KeySetError(ValueError):
    """A document holds no keys that could verify a token; the text says why."""


class PublicKeys(Interface):
    """The issuer's keys as they are now, by their `kid`."""

    def get(self, kid: str, /) -> RSAPublicKey | None:
        """The key of this ID."""
        ...

    def __len__(self) -> int:
        """How many there are; with none no token can be verified."""
        ...


@dataclass(frozen=True, slots=True)
class _Verified:
    identity: Identity
    kid: str
    key: RSAPublicKey


class TokenVerifier:
    """Verifies tokens for one key store, and remembers those that it has found good."""

    def __init__(self, audience: str, service_accounts: Iterable[str], keys: PublicKeys) -> None:
        """`audience` is `https://` and the host of the key URIs; accounts are e-mail addresses."""
        self._audience = audience
        self._service_accounts = frozenset(service_accounts)
        self._keys = keys
        self._good: dict[bytes, _Verified] = {}

    def verify(self, headers: Sequence[tuple[bytes, bytes]], now: float) -> Identity:
        """Who has sent a request with these headers; `now` is in seconds since the epoch.

        Raises:
            Refusal: 401 `UNAUTHENTICATED`, always in the same words.
            OperationError: UNAVAILABLE: there are no keys to verify it with.
        """
        token = _bearer(headers)
        if not len(self._keys):
            raise OperationError(Fault.UNAVAILABLE, "Tokens cannot be verified at the moment.")
        # To tell by its time which hash is known helps nobody to a token that has it.
        digest = hashlib.sha256(token).digest()
        known = self._good.get(digest)
        # A key that was withdrawn takes with it what it has signed.
        if known is not None and self._keys.get(known.kid) is known.key:
            if now <= known.identity.expires:
                return known.identity
            raise unauthenticated("stale")
        verified = self._verify(token.decode("ascii"), now)
        if len(self._good) >= _MAX_REMEMBERED:
            del self._good[next(iter(self._good))]
        self._good[digest] = verified
        return verified.identity

    def _verify(self, token: str, now: float) -> _Verified:
        kid = _key_id(token)
        key = self._keys.get(kid)
        if key is None:
            raise unauthenticated("unknown_token_key")
        claims = self._claims(token, key)
        expires = _check_times(claims, now)
        email = claims["email"]
        if claims["email_verified"] is not True or email not in self._service_accounts:
            raise unauthenticated("unknown_access_key")
        return _Verified(Identity(email, "", expires), kid, key)

    def _claims(self, token: str, key: RSAPublicKey) -> dict[str, Any]:
        """What a token says, once its signature, issuer and audience are good; raises Refusal."""
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                key,
                algorithms=[_ALGORITHM],
                audience=self._audience,
                issuer=ISSUERS,
                options=_OPTIONS,
            )
        except (jwt.PyJWTError, RecursionError) as error:
            raise unauthenticated(_reason(error)) from None
        if not isinstance(claims["email"], str):
            raise unauthenticated("malformed")
        return claims


def _bearer(headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """The token of the one Authorization header; raises Refusal."""
    value = fold_headers(headers).get(b"authorization")
    if not value:
        raise unauthenticated("missing")
    # Two headers are folded into one value with a comma, which no token has.
    match = _HEADER.fullmatch(value) if len(value) <= MAX_TOKEN_SIZE else None
    if match is None:
        raise unauthenticated("malformed")
    return match[1]


def _key_id(token: str) -> str:
    """Which key is said to have signed; raises Refusal."""
    try:
        header = jwt.get_unverified_header(token)
    except (jwt.PyJWTError, RecursionError):
        raise unauthenticated("malformed") from None
    kid = header.get("kid")
    if header.get("alg") != _ALGORITHM or not isinstance(kid, str):
        raise unauthenticated("malformed")
    return kid


def _check_times(claims: dict[str, Any], now: float) -> float:
    """Until when a token is good, in seconds since the epoch; raises Refusal."""
    issued, expires = claims["iat"], claims["exp"]
    begins = claims.get("nbf", issued)
    for value in (issued, expires, begins):
        if type(value) not in {int, float} or not abs(value) < _LATEST:
            raise unauthenticated("malformed")
    if now > expires + LEEWAY_SECONDS or now < max(issued, begins) - LEEWAY_SECONDS:
        raise unauthenticated("stale")
    return float(expires + LEEWAY_SECONDS)


def _reason(error: Exception) -> Reason:
    if isinstance(error, jwt.InvalidSignatureError):
        return "signature"
    if isinstance(error, jwt.InvalidAudienceError | jwt.InvalidIssuerError):
        return "scope"
    return "malformed"


def parse_keys(document: str | bytes, where: str) -> dict[str, RSAPublicKey]:
    """The keys of a JWK Set (RFC 7517) that can sign with RS256, by their `kid`.

    Others are left out, as RFC 7517 section 5 wants it. `where` is for messages.

    Raises:
        KeySetError: it is none, or holds no such key.
    """
    try:
        parsed = orjson.loads(document)
    except orjson.JSONDecodeError:
        raise KeySetError(f"{where}: is not JSON") from None
    entries = parsed.get("keys") if isinstance(parsed, dict) else None
    if not isinstance(entries, list):
        raise KeySetError(f'{where}: is no JWK Set, since it has no list "keys"')
    keys = {}
    for entry in entries:
        key = _parse_key(entry)
        if key is not None:
            keys[entry["kid"]] = key
    if not keys:
        wanted = f"RSA key of {_MIN_KEY_BITS} bits or more for {_ALGORITHM}"
        raise KeySetError(f"{where}: has no {wanted}")
    return keys


def _parse_key(entry: Any) -> RSAPublicKey | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("kid"), str):
        return None
    fits = entry.get("kty") == "RSA" and entry.get("alg", _ALGORITHM) == _ALGORITHM
    if not fits or entry.get("use", "sig") != "sig":
        return None
    try:
        # Of a private key only the public half is taken.
        public = {name: entry[name] for name in ("kty", "n", "e")}
        key = RSAAlgorithm.from_jwk(public)
    except (KeyError, TypeError, ValueError, UnsupportedAlgorithm, jwt.PyJWTError):
        return None
    is_usable = isinstance(key, RSAPublicKey) and key.key_size >= _MIN_KEY_BITS
    return key if is_usable else None  # type: ignore[return-value]
