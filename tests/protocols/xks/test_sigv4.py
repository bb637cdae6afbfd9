"""The SigV4 verifier against botocore's signer, and against everything that is not it."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import given
from hypothesis import strategies as st

from xkiproxy.keystores.credentials import Credential
from xkiproxy.keystores.signing_keys import CachedSigningKeys
from xkiproxy.protocols.base import Refusal, SignedRequest
from xkiproxy.protocols.xks import sigv4

ID, SECRET = "BETWEENABCDEFGHIJKLM", "PqTjvwAWKC+nZpMbw/yJkQ2s0mTUXb3dLHgRfVnc1xE="
PATH = "/demo/kms/xks/v1/keys/demo-key/encrypt"
BODY = b'{"plaintext":"aGVsbG8="}'


def keys(*extra: Credential) -> CachedSigningKeys:
    return CachedSigningKeys([Credential(ID, SECRET, "2026-01-01T00:00:00Z"), *extra])


def signed(
    *,
    path: str = PATH,
    body: bytes = BODY,
    service: str = "kms-xks-proxy",
    access_key_id: str = ID,
    secret: str = SECRET,
    **extra: str,
) -> SignedRequest:
    """A request signed by botocore, now."""
    headers = {"host": "proxy.example.com", "content-type": "application/json"}
    headers.update({name.replace("_", "-"): value for name, value in extra.items()})
    request = AWSRequest("POST", f"https://proxy.example.com{path}", data=body, headers=headers)
    SigV4Auth(Credentials(access_key_id, secret), service, "us-east-1").add_auth(request)
    # As an HTTP parser hands them over: without white space around their values.
    raw = [(name.encode(), str(value).strip().encode()) for name, value in request.headers.items()]
    return SignedRequest("POST", path, "", raw, body)


def verify(request: SignedRequest, off: float = 0.0, known: CachedSigningKeys | None = None) -> str:
    now = datetime.now(UTC).timestamp() + off
    return sigv4.verify(request, known or keys(), now).access_key_id


def refused(request: SignedRequest, off: float = 0.0) -> Refusal:
    with pytest.raises(Refusal) as caught:
        verify(request, off)
    assert (caught.value.status, caught.value.code) == (401, "AuthenticationFailedException")
    assert caught.value.message == "The request is not authenticated."
    return caught.value


def with_header(request: SignedRequest, name: str, value: bytes | None) -> SignedRequest:
    headers = [(n, v) for n, v in request.headers if n.lower() != name.encode()]
    if value is not None:
        headers.append((name.encode(), value))
    return SignedRequest(request.method, request.path, request.query, headers, request.body)


def header(request: SignedRequest, name: str) -> bytes:
    return next(value for n, value in request.headers if n.lower() == name.encode())


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"body": b""},
        {"body": bytes(range(256)) * 30},
        {"path": "/kms/xks/v1/keys/a.b_c-d/metadata"},
        {"x_custom": "  spaces   inside  "},
        {"x_amz_security_token": "token"},
    ],
    ids=str,
)
def test_botocores_signer_is_accepted(parts: dict) -> None:
    assert verify(signed(**parts)) == ID


def test_both_credentials_of_a_rotation() -> None:
    other = Credential("BETWEENZZZZZZZZZZZZZ", "another-secret-of-the-tests-0123456789abcdef", "x")
    both = keys(other)
    request = signed(access_key_id=other.access_key_id, secret=other.access_key_secret)
    assert verify(request, known=both) == other.access_key_id
    assert verify(signed(), known=both) == ID


def test_own_signer_makes_what_botocore_makes() -> None:
    request = signed()
    names = {"host", "content-type", "x-amz-date"}
    headers = {n.decode().lower(): v.decode() for n, v in request.headers}
    made = sigv4.sign(
        "POST", PATH, {name: headers[name] for name in names}, BODY,
        access_key_id=ID, secret=SECRET, region="us-east-1",
    )  # fmt: skip
    assert made == headers["authorization"]


def test_every_corrupted_byte_is_refused() -> None:
    good = signed()
    variants = []
    for i in range(len(good.path)):
        path = good.path[:i] + chr(ord(good.path[i]) ^ 1) + good.path[i + 1 :]
        variants.append(SignedRequest("POST", path, "", good.headers, good.body))
    for i in range(len(good.body)):
        body = bytearray(good.body)
        body[i] ^= 1
        variants.append(SignedRequest("POST", good.path, "", good.headers, bytes(body)))
    for name, value in good.headers:
        if name.lower() == b"content-length":
            continue  # not signed; the HTTP layer has used it already
        for i in range(len(value)):
            broken = bytearray(value)
            broken[i] ^= 1
            variants.append(with_header(good, name.decode().lower(), bytes(broken)))
    for variant in variants:
        refused(variant)
    assert len(variants) > 300


def with_content_hash(value: str) -> SignedRequest:
    """Signed by our own signer: botocore's would take the header for the hash of the body."""
    date = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    headers = {"host": "proxy.example.com", "x-amz-date": date, "x-amz-content-sha256": value}
    headers["authorization"] = sigv4.sign(
        "POST", PATH, headers, BODY, access_key_id=ID, secret=SECRET, region="us-east-1"
    )
    raw = [(name.encode(), text.encode()) for name, text in headers.items()]
    return SignedRequest("POST", PATH, "", raw, BODY)


def test_a_content_hash_that_is_not_the_bodys_is_refused_though_it_is_signed() -> None:
    assert verify(with_content_hash(hashlib.sha256(BODY).hexdigest())) == ID
    for value in ("0" * 64, "", hashlib.sha256(b"{}").hexdigest(), "UNSIGNED-PAYLOAD"):
        assert refused(with_content_hash(value)).reason == "body_hash"


def test_a_body_that_is_not_the_one_of_a_signed_content_hash_is_refused() -> None:
    request = with_content_hash(hashlib.sha256(BODY).hexdigest())
    other = SignedRequest("POST", PATH, "", request.headers, b"{}")
    assert refused(other).reason == "body_hash"


def test_a_content_hash_that_is_not_signed_must_be_right_too() -> None:
    assert (
        verify(
            with_header(signed(), "x-amz-content-sha256", hashlib.sha256(BODY).hexdigest().encode())
        )
        == ID
    )
    wrong = with_header(signed(), "x-amz-content-sha256", b"0" * 64)
    assert refused(wrong).reason == "body_hash"


@pytest.mark.parametrize("off", [-301, 301, 86_400])
def test_stale_or_future_date(off: int) -> None:
    assert refused(signed(), off + (1 if off > 0 else -1)).reason == "stale"


@pytest.mark.parametrize("off", [-295, 295])
def test_date_within_the_window(off: int) -> None:
    assert verify(signed(), off) == ID


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"service": "kms"}, "scope"),
        ({"secret": "the-wrong-secret-of-the-tests-0123456789abcd"}, "signature"),
        ({"access_key_id": "UNKNOWNABCDEFGHIJKLM"}, "unknown_access_key"),
    ],
)
def test_signed_yet_not_acceptable(parts: dict, reason: str) -> None:
    assert refused(signed(**parts)).reason == reason


@pytest.mark.parametrize(
    "value",
    [None, b"", b"Basic x", b"AWS4-HMAC-SHA256 Credential=a", b"\xff,Signature=" + b"0" * 64],
)
def test_authorization_missing_or_malformed(value: bytes | None) -> None:
    refused(with_header(signed(), "authorization", value))


@pytest.mark.parametrize("date", [None, b"", b"now", b"20260231T000000Z"])
def test_date_missing_or_unreadable(date: bytes | None) -> None:
    refused(with_header(signed(), "x-amz-date", date))


def test_host_that_is_not_signed() -> None:
    value = header(signed(), "authorization")
    assert b"host;" in value
    request = signed()
    without = header(request, "authorization").replace(b"host;", b"")
    assert refused(with_header(request, "authorization", without)).reason == "unsigned_header"


def test_a_query_is_refused() -> None:
    request = signed()
    queried = SignedRequest("POST", request.path, "a=1", request.headers, request.body)
    assert refused(queried).reason == "malformed"


def test_the_date_of_the_scope_is_that_of_the_header() -> None:
    request = signed()
    yesterday = (datetime.now(UTC) - timedelta(days=1)).strftime("%Y%m%d").encode()
    today = datetime.now(UTC).strftime("%Y%m%d").encode()
    value = header(request, "authorization").replace(b"/" + today + b"/", b"/" + yesterday + b"/")
    assert refused(with_header(request, "authorization", value)).reason == "scope"


@given(st.binary(max_size=200))
def test_any_authorization_header_is_refused_in_order(value: bytes) -> None:
    refused(with_header(signed(), "authorization", value))
