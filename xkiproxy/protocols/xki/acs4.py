"""ACS4: the request signature of Alibaba Cloud, verified and made.

    canonical = METHOD \\n path \\n query \\n headers \\n signed \\n hex(H(body))
    to_sign   = algorithm \\n hex(H(canonical))
    key       = HMAC^4("aliyun_v4" + secret; date, region, product, "aliyun_v4_request")
    signature = hex(HMAC(key, to_sign))

H and HMAC are SHA-256, or SM3 (GB/T 32905). Sources: Alibaba Cloud's own signer
(`alibabacloud-gateway-pop`), against which the tests check this module, and docs/protocols/xki.md.

What changes with every request (date, nonce, body) is parsed every time; what stays the same for a
day (the credential, its scope, the names of the signed headers) is parsed once and remembered.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from urllib.parse import quote, unquote_plus

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.hmac import HMAC

from xkiproxy.protocols.base import Identity, Mac, Reason, Refusal, SignedRequest, SigningKeys
from xkiproxy.protocols.signed_headers import (
    SignedHeaders,
    basic_timestamp,
    fold_headers,
    hmac_sha256,
)

PRODUCT = "kms"
WINDOW_SECONDS = 15 * 60
"""How far a request's date may be off, either way."""

_TERMINATOR = "aliyun_v4_request"
_DATE_HEADER = b"x-acs-date"
_NONCE_HEADER = b"x-acs-signature-nonce"
_ACCESS_KEY_HEADER = b"x-acs-accesskey-id"
_MAX_NONCE_SIZE = 128

_HEAD = re.compile(
    r"(?P<algorithm>ACS4-HMAC-SHA256|ACS4-HMAC-SM3) +"
    r"Credential=(?P<access_key_id>[^/,;\s]{1,128})/(?P<date>[0-9]{8})"
    r"/(?P<region>[^/,;\s]{1,64})/(?P<product>[^/,;\s]{1,64})/(?P<terminator>[^/,;\s]{1,64}), *"
    r"SignedHeaders=(?P<signed>[!#$%&'*+.^_`|~0-9a-z-]+(?:;[!#$%&'*+.^_`|~0-9a-z-]+)*)"
)
_SIGNATURE = re.compile(rb" *Signature=([0-9a-f]{64})")
_BASIC_DATE = re.compile(r"[0-9]{8}T[0-9]{6}Z")
_EXTENDED_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode("ascii")


def _hmac_sha256(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, "sha256")


def _sm3(data: bytes) -> bytes:
    # hashlib has SM3 only where the system's OpenSSL has it; cryptography brings its own.
    digest = hashes.Hash(hashes.SM3())
    digest.update(data)
    return digest.finalize().hex().encode("ascii")


def _hmac_sm3(key: bytes, data: bytes) -> bytes:
    mac = HMAC(key, hashes.SM3())
    mac.update(data)
    return mac.finalize()


def _keyed_hmac_sm3(key: bytes) -> Mac:
    return lambda data: _hmac_sm3(key, data).hex().encode("ascii")


class SignatureAlgorithm(Enum):
    """The two algorithms of ACS4, with their hash and their HMAC, once and under a kept key."""

    HMAC_SHA256 = (
        "ACS4-HMAC-SHA256", "x-acs-content-sha256", _sha256, _hmac_sha256, hmac_sha256,
    )  # fmt: skip
    HMAC_SM3 = ("ACS4-HMAC-SM3", "x-acs-content-sm3", _sm3, _hmac_sm3, _keyed_hmac_sm3)

    def __init__(
        self,
        wire_name: str,
        content_header: str,
        hex_digest: Callable[[bytes], bytes],
        mac: Callable[[bytes, bytes], bytes],
        keyed: Callable[[bytes], Mac],
    ) -> None:
        self.wire_name = wire_name
        self.content_header = content_header
        self.wire_bytes = wire_name.encode("ascii")
        self.hex_digest = hex_digest
        """The hash in lower-case hex."""
        self.mac = mac
        self.keyed = keyed


_ALGORITHMS = {algorithm.wire_name: algorithm for algorithm in SignatureAlgorithm}


@dataclass(frozen=True, slots=True)
class _Head:
    """The part of an Authorization header that stays the same for a day."""

    algorithm: SignatureAlgorithm
    access_key_id: str
    access_key_bytes: bytes
    date: str
    region: str
    product: str
    scope: str
    signed: SignedHeaders
    content_header: bytes
    is_ours: bool
    """Product and terminator are right."""
    is_complete: bool
    """All headers are signed that must be."""
    first_hour: bytes
    """How `x-acs-date` begins, in its basic form."""

    def mac(self, secret: str) -> Mac:
        key = signing_key(self.algorithm, secret, self.date, self.region, self.product)
        return self.algorithm.keyed(key)

    def is_of_day(self, date: bytes) -> bool:
        return date.startswith(self.first_hour) or date.replace(b"-", b"").startswith(
            self.first_hour
        )


def verify(request: SignedRequest, keys: SigningKeys, now: float) -> Identity:
    """Verify a signed request; `now` is in seconds since the epoch.

    Raises:
        Refusal: 400 `InvalidSignature` if the Authorization header cannot be parsed, 400
            `InvalidAcsDate` if the date is missing, unreadable or over 15 minutes off, and 401
            `Unauthorized`, always in the same words, for everything that does not verify.
    """
    headers = fold_headers(request.headers)
    head, signature = _parse_authorization(headers.get(b"authorization"))
    date = headers.get(_DATE_HEADER, b"")
    timestamp = _timestamp(date)
    if abs(now - timestamp) > WINDOW_SECONDS:
        raise Refusal(400, "InvalidAcsDate", "The x-acs-date is over 15 minutes off.", "stale")
    if not (head.is_ours and head.is_of_day(date)):
        raise _unauthorized("scope")
    nonce = headers.get(_NONCE_HEADER, b"")
    if not (head.is_complete and 1 <= len(nonce) <= _MAX_NONCE_SIZE):
        raise _unauthorized("unsigned_header")
    claimed = headers.get(_ACCESS_KEY_HEADER)
    if claimed and claimed != head.access_key_bytes:
        raise _unauthorized("unknown_access_key")
    try:
        lines = head.signed.lines(headers)
    except KeyError:
        raise _unauthorized("unsigned_header") from None

    # From here on an unknown access key, a wrong body and a wrong signature take the same steps:
    # nothing may tell them apart, neither words nor time.
    algorithm = head.algorithm
    body_hash = algorithm.hex_digest(request.body)
    body_matches = hmac.compare_digest(body_hash, headers[head.content_header])
    known, mac = keys.get(head.access_key_id, head.scope, head.mac)
    expected = _signature(mac, request, lines, head, body_hash)
    signature_matches = hmac.compare_digest(expected, signature)
    if not (known & body_matches & signature_matches):
        raise _unauthorized(_reason(known, body_matches))
    return Identity(head.access_key_id, nonce.decode("latin-1"), timestamp + WINDOW_SECONDS)


def sign(
    method: str,
    path: str,
    query: str,
    headers: Mapping[str, str],
    body: bytes,
    *,
    access_key_id: str,
    secret: str,
    region: str,
    algorithm: SignatureAlgorithm = SignatureAlgorithm.HMAC_SHA256,
) -> str:
    """The Authorization header of a request, for clients.

    `headers` must already hold host, x-acs-date, x-acs-signature-nonce and the content hash;
    every x-acs-*, host and content-type header among them is signed.
    """
    raw = [(name.encode("ascii"), value.strip().encode("utf-8")) for name, value in headers.items()]
    folded = fold_headers(raw)
    signed = sorted(name for name in folded if _is_signed(name))
    date = folded[_DATE_HEADER].decode("ascii").replace("-", "").partition("T")[0]
    scope = f"{date}/{region}/{PRODUCT}/{_TERMINATOR}"
    start = f"{algorithm.wire_name} Credential={access_key_id}/{scope},"
    head = _parse_head(f"{start}SignedHeaders={b';'.join(signed).decode('ascii')}".encode())
    request = SignedRequest(method, path, query, raw, body)
    mac = head.mac(secret)
    body_hash = algorithm.hex_digest(body)
    signature = _signature(mac, request, head.signed.lines(folded), head, body_hash)
    names = head.signed.line.decode("ascii")
    return f"{start}SignedHeaders={names},Signature={signature.decode('ascii')}"


def signing_key(
    algorithm: SignatureAlgorithm, secret: str, date: str, region: str, product: str
) -> bytes:
    """The 32-byte key that an access key's secret gives for one day (yyyymmdd) and region."""
    key = ("aliyun_v4" + secret).encode("utf-8")
    for part in (date, region, product, _TERMINATOR):
        key = algorithm.mac(key, part.encode("utf-8"))
    return key


def _signature(
    mac: Mac, request: SignedRequest, lines: bytes, head: _Head, body_hash: bytes
) -> bytes:
    canonical = b"%b\n%b\n%b\n%b\n%b\n%b" % (
        request.method.encode("ascii"),
        (request.path or "/").encode("utf-8", "surrogateescape"),
        _canonical_query(request.query) if request.query else b"",
        lines,
        head.signed.line,
        body_hash,
    )
    algorithm = head.algorithm
    to_sign = b"%b\n%b" % (algorithm.wire_bytes, algorithm.hex_digest(canonical))
    return mac(to_sign)


def _is_signed(name: bytes) -> bool:
    return name.startswith(b"x-acs-") or name in {b"host", b"content-type"}


def _canonical_query(query: str) -> bytes:
    pairs = [part.partition("=")[::2] for part in query.split("&") if part]
    decoded = [(unquote_plus(name), unquote_plus(value)) for name, value in pairs]
    decoded.sort(key=lambda pair: pair[0])
    encoded = (f"{quote(name, safe='~')}={quote(value, safe='~')}" for name, value in decoded)
    return "&".join(encoded).encode("ascii")


def _parse_authorization(value: bytes | None) -> tuple[_Head, bytes]:
    if not value:
        raise _unauthorized("missing")
    head, comma, tail = value.rpartition(b",")
    signature = _SIGNATURE.fullmatch(tail)
    if not comma or signature is None:
        raise _malformed("it ends with ,Signature=<64 lower-case hex digits>")
    return _parse_head(head), signature[1]


@lru_cache(maxsize=256)
def _parse_head(value: bytes) -> _Head:
    match = _HEAD.fullmatch(value.decode("latin-1"))
    if match is None:
        raise _malformed(
            "write it as ACS4-HMAC-SHA256 (or -SM3) Credential=<id>/<yyyymmdd>/<region>/kms/"
            "aliyun_v4_request,SignedHeaders=<a;b;c>,Signature=<hex>"
        )
    try:
        signed = SignedHeaders(match["signed"])
    except ValueError:
        raise _malformed("SignedHeaders must be sorted and without repetition") from None
    algorithm = _ALGORITHMS[match["algorithm"]]
    content_header = algorithm.content_header.encode("ascii")
    needed = {b"host", _DATE_HEADER, _NONCE_HEADER, content_header}
    return _Head(
        algorithm=algorithm,
        access_key_id=match["access_key_id"],
        access_key_bytes=match["access_key_id"].encode("latin-1"),
        date=match["date"],
        region=match["region"],
        product=match["product"],
        scope=f"{algorithm.wire_name}/{match['date']}/{match['region']}/{match['product']}",
        signed=signed,
        content_header=content_header,
        is_ours=match["product"] == PRODUCT and match["terminator"] == _TERMINATOR,
        is_complete=needed.issubset(signed.names),
        first_hour=match["date"].encode("ascii") + b"T",
    )


@lru_cache(maxsize=64)
def _timestamp(value: bytes) -> float:
    """Seconds since the epoch of `yyyymmddThhmmssZ` (or the same with - and : inside)."""
    if not value:
        raise Refusal(400, "InvalidAcsDate", "The x-acs-date header is missing.", "date")
    date = value.decode("latin-1")
    if _BASIC_DATE.fullmatch(date) or _EXTENDED_DATE.fullmatch(date):
        timestamp = basic_timestamp(date.replace("-", "").replace(":", ""))
        if timestamp is not None:
            return timestamp
    raise Refusal(400, "InvalidAcsDate", "Write x-acs-date as yyyymmddThhmmssZ, in UTC.", "date")


def _malformed(hint: str) -> Refusal:
    message = f"The Authorization header cannot be parsed: {hint}."
    return Refusal(400, "InvalidSignature", message, "malformed")


def _unauthorized(reason: Reason) -> Refusal:
    return Refusal(401, "Unauthorized", "The request is not authenticated.", reason)


def _reason(known: bool, body_matches: bool) -> Reason:
    if not known:
        return "unknown_access_key"
    return "signature" if body_matches else "body_hash"
