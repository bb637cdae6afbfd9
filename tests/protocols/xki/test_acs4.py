"""The ACS4 verifier against Alibaba Cloud's own signer, and against everything that is not it."""

from __future__ import annotations

import hashlib
import uuid
from datetime import UTC, datetime
from urllib.parse import urlencode

import pytest
from alibabacloud_darabonba_encode_util.encoder import Encoder
from alibabacloud_gateway_pop.client import Client as AlibabaSigner
from hypothesis import given
from hypothesis import strategies as st

from xkiproxy.keystores.credentials import Credential
from xkiproxy.keystores.signing_keys import CachedSigningKeys
from xkiproxy.protocols.base import Refusal, SignedRequest
from xkiproxy.protocols.xki import acs4

ID, SECRET = "XKITESTACCESSKEY00000001", "a-secret-of-the-tests-0123456789"
NOW = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC).timestamp()
ALGORITHMS = ["ACS4-HMAC-SHA256", "ACS4-HMAC-SM3"]
PATH = "/demo/kms/xki/v1/keys/demo-key/encrypt"
BODY = b'{"Plaintext":"aGVsbG8="}'


def keys(*extra: Credential) -> CachedSigningKeys:
    return CachedSigningKeys([Credential(ID, SECRET, "2026-01-01T00:00:00Z"), *extra])


def signed(
    algorithm: str = ALGORITHMS[0],
    *,
    body: bytes = BODY,
    path: str = PATH,
    query: dict[str, str] | None = None,
    now: float = NOW,
    scope_date: str | None = None,
    product: str = "kms",
    region: str = "cn-hangzhou",
    access_key_id: str = ID,
    secret: str = SECRET,
    without: tuple[str, ...] = (),
    **extra: str,
) -> SignedRequest:
    """A request signed by the cloud's own code."""
    date = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%SZ")
    payload = Encoder.hex_encode(Encoder.hash(body, algorithm))
    headers = {
        "host": "proxy.example.com",
        "content-type": "application/json; charset=utf-8",
        "x-acs-accesskey-id": access_key_id,
        "x-acs-action": "Encrypt",
        "x-acs-version": "2016-01-20",
        "x-acs-date": date,
        "x-acs-signature-nonce": str(uuid.uuid4()),
        f"x-acs-content-{'sm3' if 'SM3' in algorithm else 'sha256'}": payload,
        **{name.replace("_", "-"): value for name, value in extra.items()},
    }
    for name in without:
        del headers[name]
    signer = AlibabaSigner()
    day = scope_date or date[:8]
    key = signer.get_signingkey(algorithm, secret, product, region, day)
    headers["Authorization"] = signer.get_authorization(
        path, "POST", query or {}, headers, algorithm, payload, access_key_id, key,
        product, region, day,
    )  # fmt: skip
    # As an HTTP parser hands them over: without white space around their values.
    raw = [(name.encode(), value.strip().encode()) for name, value in headers.items()]
    return SignedRequest("POST", path, urlencode(query or {}), raw, body)


def refused(request: SignedRequest, now: float = NOW) -> Refusal:
    with pytest.raises(Refusal) as caught:
        acs4.verify(request, keys(), now)
    return caught.value


def with_header(request: SignedRequest, name: str, value: bytes | None) -> SignedRequest:
    """The request with a header replaced, or taken away."""
    headers = [(n, v) for n, v in request.headers if n.lower() != name.lower().encode()]
    if value is not None:
        headers.append((name.encode(), value))
    return SignedRequest(request.method, request.path, request.query, headers, request.body)


def header(request: SignedRequest, name: str) -> bytes:
    return dict(request.headers)[name.encode()]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_clouds_signer_is_accepted(algorithm: str) -> None:
    identity = acs4.verify(signed(algorithm), keys(), NOW)
    assert identity.access_key_id == ID
    assert identity.expires == NOW + 900


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "request_parts",
    [
        {"body": b""},
        {"body": bytes(range(256)) * 200},
        {"path": "/kms/xki/v1/keys/a%2Db%20c/meta"},
        {"path": "/kms/xki/v1/keys/%E5%AF%86/meta"},
        {"query": {"b": "2", "a": "1", "c": ""}},
        {"query": {"sp ace": "x y+z", "密": "钥/?&=", "~": "*'()"}},
        {"x_acs_odd": "  inner   spaces kept, outer not  "},
        {"x_acs_empty": ""},
        {"x_acs_unicode": "ümlaut"},
        {"region": "cn-shanghai-finance-1"},
        {"without": ("content-type",)},
        {"without": ("x-acs-accesskey-id", "x-acs-action", "x-acs-version")},
    ],
    ids=str,
)
def test_clouds_signer_is_accepted_on_odd_requests(algorithm: str, request_parts: dict) -> None:
    acs4.verify(signed(algorithm, **request_parts), keys(), NOW)


def test_names_of_headers_in_any_case() -> None:
    request = signed()
    headers = [(name.title(), value) for name, value in request.headers]
    acs4.verify(
        SignedRequest(request.method, request.path, request.query, headers, request.body),
        keys(),
        NOW,
    )


def test_repeated_header_is_joined_by_a_comma_as_the_signer_does() -> None:
    request = signed(x_acs_tag="one,two")
    headers = [(n, v) for n, v in request.headers if n != b"x-acs-tag"]
    headers += [(b"x-acs-tag", b"one"), (b"X-Acs-Tag", b"two")]
    acs4.verify(SignedRequest("POST", request.path, "", headers, request.body), keys(), NOW)


def test_date_with_dashes_and_colons() -> None:
    request = signed(x_acs_date="2026-11-23T12:00:00Z")
    acs4.verify(request, keys(), NOW)


def test_several_credentials_at_once() -> None:
    other = Credential("XKITESTACCESSKEY00000002", "another-secret-of-the-tests", "2026-01-01")
    both = keys(other)
    request = signed(access_key_id=other.access_key_id, secret=other.access_key_secret)
    assert acs4.verify(request, both, NOW).access_key_id == other.access_key_id
    assert acs4.verify(signed(), both, NOW).access_key_id == ID


def test_own_signer_makes_what_the_clouds_makes() -> None:
    for algorithm in acs4.SignatureAlgorithm:
        request = signed(algorithm.wire_name, query={"b": "x y", "a": ""})
        headers = {n.decode(): v.decode() for n, v in request.headers if n != b"Authorization"}
        made = acs4.sign(
            "POST", request.path, request.query, headers, request.body,
            access_key_id=ID, secret=SECRET, region="cn-hangzhou", algorithm=algorithm,
        )  # fmt: skip
        assert made.encode() == header(request, "Authorization")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_corrupted_byte_is_refused(algorithm: str) -> None:
    """One byte of one part at a time: path, query, body, each signed header, the signature."""
    query = {"a": "1"}
    good = signed(algorithm, query=query, body=BODY)
    variants: list[SignedRequest] = []
    for name in ("path", "query", "method"):
        text = getattr(good, name)
        for i in range(len(text)):
            parts = {"method": good.method, "path": good.path, "query": good.query}
            parts[name] = text[:i] + chr(ord(text[i]) ^ 1) + text[i + 1 :]
            variants.append(SignedRequest(**parts, headers=good.headers, body=good.body))
    for i in range(len(good.body)):
        body = bytearray(good.body)
        body[i] ^= 1
        variants.append(
            SignedRequest(good.method, good.path, good.query, good.headers, bytes(body))
        )
    for name, value in good.headers:
        for i in range(len(value)):
            broken = bytearray(value)
            broken[i] ^= 1
            variants.append(with_header(good, name.decode(), bytes(broken)))
    for variant in variants:
        with pytest.raises(Refusal) as caught:
            acs4.verify(variant, keys(), NOW)
        assert caught.value.status in {400, 401}
    assert len(variants) > 400


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (None, "Unauthorized"),
        (b"", "Unauthorized"),
        (b"Bearer abc", "InvalidSignature"),
        (b"ACS3-HMAC-SHA256 Credential=a/20261123/r/kms/aliyun_v4_request", "InvalidSignature"),
        (b"ACS4-HMAC-SHA256 Signature=" + b"0" * 64, "InvalidSignature"),
        (b"\xff\xfe,Signature=" + b"0" * 64, "InvalidSignature"),
    ],
)
def test_authorization_header_missing_or_malformed(value: bytes | None, code: str) -> None:
    error = refused(with_header(signed(), "Authorization", value))
    assert (error.status, error.code) == (401 if code == "Unauthorized" else 400, code)


@pytest.mark.parametrize(
    "change",
    [
        (b"Signature=", b"Signature=Z"),
        (b"SignedHeaders=content-type;host", b"SignedHeaders=host;content-type"),
        (b"SignedHeaders=content-type;host", b"SignedHeaders=content-type;host;host"),
        (b"SignedHeaders=content-type;", b"SignedHeaders=;content-type;"),
        (b"/20261123/", b"/2026112/"),
        (b"Credential=", b"Credential=/"),
    ],
)
def test_malformed_parts_of_the_authorization_header(change: tuple[bytes, bytes]) -> None:
    request = signed()
    value = header(request, "Authorization")
    assert change[0] in value
    error = refused(with_header(request, "Authorization", value.replace(*change)))
    assert (error.status, error.code) == (400, "InvalidSignature")


def test_repeated_authorization_header_is_refused() -> None:
    request = signed()
    headers = [*request.headers, (b"authorization", header(request, "Authorization"))]
    twice = SignedRequest("POST", request.path, "", headers, request.body)
    assert refused(twice).code in {"InvalidSignature", "Unauthorized"}


@pytest.mark.parametrize("off", [-901, 901, 86_400, -86_400])
def test_stale_or_future_date(off: int) -> None:
    error = refused(signed(now=NOW + off))
    assert (error.status, error.code) == (400, "InvalidAcsDate")


@pytest.mark.parametrize("off", [-900, -1, 0, 1, 900])
def test_date_within_the_window(off: int) -> None:
    acs4.verify(signed(now=NOW + off), keys(), NOW)


@pytest.mark.parametrize(
    "date", [None, b"", b"yesterday", b"20261123", b"20260231T000000Z", b"20261123T120000+0800"]
)
def test_missing_or_unreadable_date(date: bytes | None) -> None:
    error = refused(with_header(signed(), "x-acs-date", date))
    assert (error.status, error.code) == (400, "InvalidAcsDate")


@pytest.mark.parametrize(
    "name", ["x-acs-signature-nonce", "x-acs-content-sha256", "host"]
)  # fmt: skip
def test_headers_that_must_be_signed(name: str) -> None:
    """Present but not covered by the signature: the signer never saw it."""
    request = signed(without=(name,))
    hashed = hashlib.sha256(BODY).hexdigest().encode()
    error = refused(with_header(request, name, hashed))
    assert (error.status, error.code, error.reason) == (401, "Unauthorized", "unsigned_header")


def test_date_that_is_not_signed() -> None:
    """Its place in SignedHeaders is taken away, and the signature made over the rest."""
    request = signed(without=("x-acs-date",))
    error = refused(with_header(request, "x-acs-date", b"20261123T120000Z"))
    assert (error.status, error.code) == (401, "Unauthorized")


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"scope_date": "20261122"}, "scope"),
        ({"product": "ecs"}, "scope"),
        ({"secret": "the-wrong-secret-of-the-tests"}, "signature"),
        ({"access_key_id": "XKIUNKNOWNACCESSKEY00009"}, "unknown_access_key"),
        ({"x_acs_signature_nonce": ""}, "unsigned_header"),
        ({"x_acs_signature_nonce": "n" * 129}, "unsigned_header"),
        ({"x_acs_accesskey_id": "XKITESTACCESSKEY00000002"}, "unknown_access_key"),
    ],
)
def test_signed_yet_not_acceptable(parts: dict, reason: str) -> None:
    error = refused(signed(**parts))
    assert (error.status, error.code, error.reason) == (401, "Unauthorized", reason)


def test_body_that_is_not_the_signed_one() -> None:
    request = signed()
    other = SignedRequest("POST", request.path, "", request.headers, b"{}")
    assert refused(other).reason == "body_hash"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_content_hash_that_is_not_the_bodys_is_refused_though_it_is_signed(
    algorithm: str,
) -> None:
    """The signature is right, also over the header that is wrong."""
    name = "x_acs_content_sm3" if "SM3" in algorithm else "x_acs_content_sha256"
    for value in ("0" * 64, "", Encoder.hex_encode(Encoder.hash(b"{}", algorithm))):
        assert refused(signed(algorithm, **{name: value})).reason == "body_hash"


def test_nothing_tells_an_unknown_access_key_from_a_wrong_signature() -> None:
    unknown = refused(signed(access_key_id="XKIUNKNOWNACCESSKEY00009"))
    wrong = refused(signed(secret="the-wrong-secret-of-the-tests"))
    body = refused(SignedRequest("POST", PATH, "", signed().headers, b"{}"))
    said = {(error.status, error.code, error.message) for error in (unknown, wrong, body)}
    assert said == {(401, "Unauthorized", "The request is not authenticated.")}


class CountingKeys(CachedSigningKeys):
    """Counts derivations: the time that matters."""

    derived = 0

    def get(self, access_key_id, scope, derive):
        def counting(secret: str) -> bytes:
            self.derived += 1
            return derive(secret)

        return super().get(access_key_id, scope, counting)


STRANGER = "XKIUNKNOWNACCESSKEY00009"


@pytest.mark.parametrize("first", [ID, STRANGER])
def test_signing_keys_are_derived_together_so_that_time_tells_no_access_key(first: str) -> None:
    """Whoever asked first, what follows in that scope derives nothing, for known and unknown."""
    counting = CountingKeys([Credential(ID, SECRET, "2026-01-01")])
    derived = []
    for access_key_id in (first, ID, STRANGER, "XKIUNKNOWNACCESSKEY00010", ID):
        before = counting.derived
        try:
            acs4.verify(signed(access_key_id=access_key_id), counting, NOW)
        except Refusal as error:
            assert error.reason == "unknown_access_key"
        derived.append(counting.derived - before)
    assert derived == [2, 0, 0, 0, 0]


def test_what_is_remembered_of_signing_keys_does_not_grow_with_what_clients_write() -> None:
    cache = keys()
    for i in range(5000):
        cache.get(ID, f"scope-{i}", lambda secret: secret.encode())
    assert len(cache._scopes) <= 256


@given(st.binary(max_size=200))
def test_any_authorization_header_is_refused_in_order(value: bytes) -> None:
    error = refused(with_header(signed(), "Authorization", value))
    assert error.status in {400, 401}


@given(st.binary(max_size=40))
def test_any_date_is_refused_in_order(value: bytes) -> None:
    error = refused(with_header(signed(), "x-acs-date", value))
    assert error.status in {400, 401}
