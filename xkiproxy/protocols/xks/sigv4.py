"""AWS Signature Version 4, as XKS uses it: service `kms-xks-proxy`, no query, any signed headers.

    canonical = METHOD \\n path \\n \\n headers \\n signed \\n hex(SHA-256(body))
    to_sign   = "AWS4-HMAC-SHA256" \\n x-amz-date \\n scope \\n hex(SHA-256(canonical))
    key       = HMAC^4("AWS4" + secret; date, region, "kms-xks-proxy", "aws4_request")

Source: AWS General Reference, "Create a signed AWS API request"; docs/protocols/xks.md.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import quote

from xkiproxy.protocols.base import Identity, Mac, SignedRequest, SigningKeys
from xkiproxy.protocols.signed_headers import (
    SignedHeaders,
    basic_timestamp,
    fold_headers,
    hmac_sha256,
)
from xkiproxy.protocols.xks.errors import unauthenticated

SERVICE = "kms-xks-proxy"
WINDOW_SECONDS = 5 * 60
"""How far a request's date may be off, either way."""

_ALGORITHM = "AWS4-HMAC-SHA256"
_ALGORITHM_BYTES = _ALGORITHM.encode("ascii")
_TERMINATOR = "aws4_request"
_DATE = b"x-amz-date"
_CONTENT_HASH = b"x-amz-content-sha256"
_HEAD = re.compile(
    r"AWS4-HMAC-SHA256 +Credential=(?P<id>[A-Z0-9]{1,128})/(?P<date>[0-9]{8})"
    r"/(?P<region>[a-z0-9-]{1,64})/(?P<service>[a-z0-9-]{1,64})/(?P<terminator>[a-z0-9_]{1,64})"
    r" *, *SignedHeaders=(?P<signed>[!#$%&'*+.^_`|~0-9a-z-]+(?:;[!#$%&'*+.^_`|~0-9a-z-]+)*) *"
)
_SIGNATURE = re.compile(rb" *Signature=([0-9a-f]{64})")
_DATE_FORM = re.compile(rb"[0-9]{8}T[0-9]{6}Z")
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._~-]*")
_SPACES = re.compile(rb" {2,}")


@dataclass(frozen=True, slots=True)
class _Head:
    """The part of an Authorization header that stays the same for a day."""

    access_key_id: str
    date: str
    region: str
    scope: str
    signed: SignedHeaders
    is_ours: bool
    """Service and terminator are right."""
    is_complete: bool
    """All headers are signed that must be."""
    day: bytes
    """How `x-amz-date` begins."""

    def mac(self, secret: str) -> Mac:
        return hmac_sha256(signing_key(secret, self.date, self.region))


def verify(request: SignedRequest, keys: SigningKeys, now: float) -> Identity:
    """Verify a signed request; `now` is in seconds since the epoch.

    Raises:
        Refusal: 401 `AuthenticationFailedException`, always in the same words.
    """
    headers = fold_headers(request.headers)
    head, signature = _parse_authorization(headers.get(b"authorization"))
    date = headers.get(_DATE, b"")
    timestamp = _timestamp(date)
    if abs(now - timestamp) > WINDOW_SECONDS:
        raise unauthenticated("stale")
    if not (head.is_ours and date.startswith(head.day)):
        raise unauthenticated("scope")
    if request.query:
        raise unauthenticated("malformed")
    if not head.is_complete:
        raise unauthenticated("unsigned_header")
    try:
        lines = head.signed.lines(headers)
    except KeyError:
        raise unauthenticated("unsigned_header") from None

    # From here on an unknown access key and a wrong signature take the same steps.
    body_hash = hashlib.sha256(request.body).hexdigest().encode()
    body_matches = hmac.compare_digest(headers.get(_CONTENT_HASH, body_hash), body_hash)
    known, mac = keys.get(head.access_key_id, head.scope, head.mac)
    expected = _signature(mac, request, lines, head, date, body_hash)
    signature_matches = hmac.compare_digest(expected, signature)
    if not known:
        raise unauthenticated("unknown_access_key")
    if not (body_matches & signature_matches):
        raise unauthenticated("signature" if body_matches else "body_hash")
    # XKS has no nonce, and KMS repeats a request as it is: a replay is not told apart.
    return Identity(head.access_key_id, "", timestamp + WINDOW_SECONDS)


def sign(
    method: str,
    path: str,
    headers: Mapping[str, str],
    body: bytes,
    *,
    access_key_id: str,
    secret: str,
    region: str,
) -> str:
    """The Authorization header of a request, for clients; every given header is signed."""
    raw = [(name.encode("ascii"), value.strip().encode("utf-8")) for name, value in headers.items()]
    folded = fold_headers(raw)
    date = folded[_DATE].decode("ascii")
    scope = f"{date[:8]}/{region}/{SERVICE}/{_TERMINATOR}"
    names = ";".join(sorted(name.decode("ascii") for name in folded))
    start = f"{_ALGORITHM} Credential={access_key_id}/{scope}, SignedHeaders={names}"
    head = _parse_head(start.encode())
    request = SignedRequest(method, path, "", raw, body)
    body_hash = hashlib.sha256(body).hexdigest().encode()
    lines = head.signed.lines(folded)
    signature = _signature(head.mac(secret), request, lines, head, date.encode(), body_hash)
    return f"{start}, Signature={signature.decode('ascii')}"


def signing_key(secret: str, date: str, region: str) -> bytes:
    """The 32-byte key that an access key's secret gives for one day (yyyymmdd) and region."""
    key = ("AWS4" + secret).encode("utf-8")
    for part in (date, region, SERVICE, _TERMINATOR):
        key = hmac.digest(key, part.encode("ascii"), "sha256")
    return key


def _signature(
    mac: Mac, request: SignedRequest, lines: bytes, head: _Head, date: bytes, body_hash: bytes
) -> bytes:
    canonical = b"%b\n%b\n\n%b\n%b\n%b" % (
        request.method.encode("ascii"),
        _canonical_path(request.path),
        # Spaces in a value become one; in a header's name there are none.
        _SPACES.sub(b" ", lines) if b"  " in lines else lines,
        head.signed.line,
        body_hash,
    )
    digest = hashlib.sha256(canonical).hexdigest().encode("ascii")
    to_sign = b"%b\n%b\n%b\n%b" % (_ALGORITHM_BYTES, date, head.scope.encode("ascii"), digest)
    return mac(to_sign)


def _canonical_path(path: str) -> bytes:
    if _PLAIN_PATH.fullmatch(path):  # nothing to encode
        return path.encode("ascii")
    return quote(path.encode("utf-8", "surrogateescape"), safe="/~").encode("ascii")


def _parse_authorization(value: bytes | None) -> tuple[_Head, bytes]:
    if not value:
        raise unauthenticated("missing")
    start, comma, tail = value.rpartition(b",")
    signature = _SIGNATURE.fullmatch(tail)
    if not comma or signature is None:
        raise unauthenticated("malformed")
    return _parse_head(start), signature[1]


@lru_cache(maxsize=256)
def _parse_head(value: bytes) -> _Head:
    match = _HEAD.fullmatch(value.decode("latin-1"))
    if match is None:
        raise unauthenticated("malformed")
    try:
        signed = SignedHeaders(match["signed"])
    except ValueError:
        raise unauthenticated("malformed") from None
    return _Head(
        access_key_id=match["id"],
        date=match["date"],
        region=match["region"],
        scope="/".join(match.group("date", "region", "service", "terminator")),
        signed=signed,
        is_ours=match["service"] == SERVICE and match["terminator"] == _TERMINATOR,
        is_complete={b"host", _DATE}.issubset(signed.names),
        day=match["date"].encode("ascii"),
    )


@lru_cache(maxsize=64)
def _timestamp(date: bytes) -> float:
    timestamp = basic_timestamp(date.decode("ascii")) if _DATE_FORM.fullmatch(date) else None
    if timestamp is None:
        raise unauthenticated("date")
    return timestamp
