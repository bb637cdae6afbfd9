"""Google's tokens: google-auth signs them, and everything that is wrong with one is refused."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import math
from typing import Any

import pytest
from google_cloud import ACCOUNT, AUDIENCE, SigningKey, b64url, claims, key_set
from hypothesis import given
from hypothesis import strategies as st

from xkiproxy.crypto.operations import Fault, OperationError
from xkiproxy.protocols.base import Identity, Refusal
from xkiproxy.protocols.ekm.tokens import (
    LEEWAY_SECONDS,
    KeySetError,
    TokenVerifier,
    parse_keys,
)

NOW = 1_800_000_000.0
GOOGLE = SigningKey("google-1")
OTHER = SigningKey("google-2")
STRANGER = SigningKey("google-1")  # another key under the ID of Google's


def verifier(*keys: SigningKey, **changes: Any) -> TokenVerifier:
    settings = {"audience": AUDIENCE, "service_accounts": [ACCOUNT], **changes}
    return TokenVerifier(keys=parse_keys(key_set(*(keys or (GOOGLE,))), "a test"), **settings)


def headers(token: str | bytes) -> list[tuple[bytes, bytes]]:
    text = token.encode() if isinstance(token, str) else token
    return [(b"Host", b"localhost"), (b"Authorization", b"Bearer " + text)]


def refusal(given_headers: Any, now: float = NOW, by: TokenVerifier | None = None) -> str:
    """Why it is refused; the client is told the same of all."""
    with pytest.raises(Refusal) as caught:
        (by or verifier()).verify(given_headers, now)
    assert caught.value.status == 401
    assert caught.value.code == "UNAUTHENTICATED"
    assert caught.value.message == "The request is not authenticated."
    return caught.value.reason


def forged(header: Any, body: Any, signature: bytes = b"x" * 256) -> str:
    parts = [value if isinstance(value, bytes) else json.dumps(value).encode()
             for value in (header, body)]  # fmt: skip
    return ".".join(b64url(part) for part in (*parts, signature))


def test_a_token_of_google_is_taken_and_names_its_service_account() -> None:
    token = GOOGLE.sign(claims(NOW))
    assert verifier().verify(headers(token), NOW) == Identity(ACCOUNT, "", NOW + 3660)


@pytest.mark.parametrize("issuer", ["accounts.google.com", "https://accounts.google.com"])
def test_google_writes_its_name_in_two_ways(issuer: str) -> None:
    token = GOOGLE.sign(claims(NOW, iss=issuer))
    assert verifier().verify(headers(token), NOW).access_key_id == ACCOUNT


@pytest.mark.parametrize("name", [b"authorization", b"AUTHORIZATION"])
@pytest.mark.parametrize("scheme", [b"Bearer ", b"bearer ", b"BEARER   "])
def test_header_and_scheme_are_in_any_case(name: bytes, scheme: bytes) -> None:
    token = GOOGLE.sign(claims(NOW)).encode()
    assert verifier().verify([(name, scheme + token)], NOW).access_key_id == ACCOUNT


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"iss": "https://accounts.example.com"}, "scope"),
        ({"iss": ["https://accounts.google.com"]}, "scope"),
        ({"iss": None}, "malformed"),
        ({"aud": "https://proxy.example.com"}, "scope"),
        ({"aud": AUDIENCE + "/"}, "scope"),
        ({"aud": [AUDIENCE]}, "scope"),
        ({"aud": None}, "malformed"),
        ({"email": "service-999@gcp-sa-ekms.iam.gserviceaccount.com"}, "unknown_access_key"),
        ({"email": ACCOUNT.upper()}, "unknown_access_key"),
        ({"email": [ACCOUNT]}, "malformed"),
        ({"email": None}, "malformed"),
        ({"email_verified": False}, "unknown_access_key"),
        ({"email_verified": "true"}, "unknown_access_key"),
        ({"email_verified": 1}, "unknown_access_key"),
        ({"email_verified": None}, "malformed"),
        ({"exp": NOW - LEEWAY_SECONDS - 1}, "stale"),
        ({"exp": None}, "malformed"),
        ({"exp": "never"}, "malformed"),
        ({"exp": True}, "malformed"),
        ({"exp": math.inf}, "malformed"),
        ({"exp": math.nan}, "malformed"),
        ({"iat": NOW + LEEWAY_SECONDS + 1}, "stale"),
        ({"iat": None}, "malformed"),
        ({"iat": "now"}, "malformed"),
    ],
)  # fmt: skip
def test_a_wrong_claim_is_refused(changes: dict[str, Any], reason: str) -> None:
    assert refusal(headers(GOOGLE.sign(claims(NOW, **changes)))) == reason


def test_clocks_may_differ_by_a_minute() -> None:
    for changes in ({"exp": NOW - LEEWAY_SECONDS}, {"iat": NOW + LEEWAY_SECONDS}):
        token = GOOGLE.sign(claims(NOW, **changes))
        assert verifier().verify(headers(token), NOW).access_key_id == ACCOUNT


def test_a_token_without_a_signature_is_refused() -> None:
    for algorithm in ("none", "None", ""):
        header = {"alg": algorithm, "typ": "JWT", "kid": GOOGLE.kid}
        for signature in (b"", b"x"):
            assert refusal(headers(forged(header, claims(NOW), signature))) == "malformed"


@pytest.mark.parametrize("algorithm", ["HS256", "RS256"])
def test_the_public_key_is_no_secret_to_sign_with(algorithm: str) -> None:
    """The attack of RFC 8725 section 2.1: an HMAC under what everybody knows."""
    header = {"alg": algorithm, "typ": "JWT", "kid": GOOGLE.kid}
    signed = forged(header, claims(NOW)).rpartition(".")[0]
    mac = hmac.digest(GOOGLE.public_pem(), signed.encode(), hashlib.sha256)
    wanted = "malformed" if algorithm == "HS256" else "signature"
    assert refusal(headers(f"{signed}.{b64url(mac)}")) == wanted


@pytest.mark.parametrize("algorithm", ["RS384", "RS512", "PS256", "ES256", "rs256", None, 1])
def test_the_algorithm_is_not_the_senders_to_choose(algorithm: Any) -> None:
    token = GOOGLE.sign(claims(NOW), header={"alg": algorithm})
    assert refusal(headers(token)) == "malformed"


@pytest.mark.parametrize("kid", [None, 1, ["google-1"], ""])
def test_a_key_must_be_named(kid: Any) -> None:
    header = {"alg": "RS256", "typ": "JWT", "kid": kid}
    assert refusal(headers(forged(header, claims(NOW)))) in {"malformed", "unknown_token_key"}


def test_a_key_that_google_does_not_have_is_refused() -> None:
    assert refusal(headers(OTHER.sign(claims(NOW)))) == "unknown_token_key"
    assert refusal(headers(STRANGER.sign(claims(NOW)))) == "signature"


def test_a_key_in_the_token_itself_is_not_looked_at() -> None:
    header = {"jku": "https://attacker.example.com", "x5c": ["x"]}
    assert refusal(headers(STRANGER.sign(claims(NOW), header=header))) == "signature"
    header = {"jwk": STRANGER.jwk()}
    assert refusal(headers(STRANGER.sign(claims(NOW), header=header))) == "malformed"


def test_an_extension_that_must_be_understood_is_not() -> None:
    token = GOOGLE.sign(claims(NOW), header={"crit": ["new"], "new": 1})
    assert refusal(headers(token)) == "malformed"


def test_every_changed_character_is_refused() -> None:
    token = GOOGLE.sign(claims(NOW))
    by = verifier()
    for i, character in enumerate(token):
        other = "A" if character != "A" else "B"
        changed = token[:i] + other + token[i + 1 :]
        if base64.urlsafe_b64decode(changed.rpartition(".")[2] + "==") != base64.urlsafe_b64decode(
            token.rpartition(".")[2] + "=="
        ) or i < token.rindex("."):
            assert refusal(headers(changed), by=by)


def test_headers_that_are_missing_or_doubled_are_refused() -> None:
    token = GOOGLE.sign(claims(NOW)).encode()
    assert refusal([]) == "missing"
    assert refusal([(b"Authorization", b"")]) == "missing"
    assert refusal([(b"Authorization", token)]) == "malformed"
    assert refusal([(b"Authorization", b"Basic " + token)]) == "malformed"
    assert refusal([(b"Authorization", b"Bearer " + token + b" x")]) == "malformed"
    twice = headers(token) + headers(token)
    assert refusal(twice) == "malformed"
    assert refusal([*headers(token), (b"authorization", b"Bearer a.b.c")]) == "malformed"


def test_an_oversized_token_is_refused_before_it_is_read() -> None:
    assert refusal(headers(GOOGLE.sign(claims(NOW, filler="x" * 4096)))) == "malformed"


def test_a_large_header_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    token = GOOGLE.sign(claims(NOW), header={"x": "y" * 400})
    monkeypatch.setattr("jwt.get_unverified_header", None)
    assert refusal(headers(token)) == "malformed"


@pytest.mark.parametrize("value", [10**400, float("inf"), float("nan"), "1", True])
@pytest.mark.parametrize("name", ["iat", "exp", "nbf"])
def test_what_is_no_date_is_refused(name: str, value: Any) -> None:
    assert refusal(headers(GOOGLE.sign(claims(NOW, **{name: value})))) == "malformed"


def test_a_token_is_not_good_before_its_time() -> None:
    assert refusal(headers(GOOGLE.sign(claims(NOW, nbf=NOW + 61)))) == "stale"
    token = GOOGLE.sign(claims(NOW, nbf=NOW + 59))
    assert verifier().verify(headers(token), NOW).access_key_id == ACCOUNT


@pytest.mark.parametrize("depth", [50, 100, 500, 1000])
def test_a_deeply_nested_token_is_refused_and_nothing_more(depth: int) -> None:
    nested = b"[" * depth + b"]" * depth
    header = b'{"alg":"RS256","kid":"google-1","x":' + nested + b"}"
    assert refusal(headers(forged(header, claims(NOW)))) in {"malformed", "signature"}


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    assert refusal([(b"authorization", data)])
    assert refusal(headers(data))


@given(st.lists(st.binary(max_size=80), min_size=3, max_size=3))
def test_any_three_parts_are_refused(parts: list[bytes]) -> None:
    assert refusal(headers(".".join(map(b64url, parts))))


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
))  # fmt: skip
def test_whatever_google_signed_in_place_of_claims_is_refused(payload: Any) -> None:
    header = {"alg": "RS256", "typ": "JWT", "kid": GOOGLE.kid}
    signed = forged(header, payload).rpartition(".")[0]
    from google.auth import crypt

    signature = crypt.RSASigner.from_string(GOOGLE.private_pem()).sign(signed.encode())
    assert refusal(headers(f"{signed}.{b64url(signature)}"))


def test_without_any_key_nothing_can_be_said_of_a_token() -> None:
    by = TokenVerifier(AUDIENCE, [ACCOUNT], {})
    with pytest.raises(OperationError) as caught:
        by.verify(headers(GOOGLE.sign(claims(NOW))), NOW)
    assert caught.value.fault is Fault.UNAVAILABLE
    assert refusal([], by=by) == "missing"


def test_a_good_token_is_verified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    by, token = verifier(), GOOGLE.sign(claims(NOW))
    first = by.verify(headers(token), NOW)
    monkeypatch.setattr("jwt.decode", None)
    assert by.verify(headers(token), NOW + 100) is first


def test_what_is_remembered_ends_with_the_token() -> None:
    by, token = verifier(), GOOGLE.sign(claims(NOW))
    by.verify(headers(token), NOW + 3660)
    assert refusal(headers(token), NOW + 3661, by) == "stale"


def test_what_is_remembered_ends_with_the_key() -> None:
    keys = parse_keys(key_set(GOOGLE, OTHER), "a test")
    by, token = TokenVerifier(AUDIENCE, [ACCOUNT], keys), GOOGLE.sign(claims(NOW))
    by.verify(headers(token), NOW)
    del keys[GOOGLE.kid]
    assert refusal(headers(token), by=by) == "unknown_token_key"
    keys[GOOGLE.kid] = keys[OTHER.kid]
    assert refusal(headers(token), by=by) == "signature"


def test_what_is_remembered_is_bounded_and_holds_no_token() -> None:
    by = verifier()
    by.verify(headers(GOOGLE.sign(claims(NOW))), NOW)
    ((digest, verified),) = by._good.items()
    for i in range(2000):
        by._good[i.to_bytes(4, "big")] = verified
        if len(by._good) > 1024:
            by._good.pop(next(iter(by._good)))
    by.verify(headers(GOOGLE.sign(claims(NOW, jti="another"))), NOW)
    assert len(by._good) == 1024
    assert digest not in by._good


def test_nothing_of_a_token_is_in_what_is_said_of_it() -> None:
    by = verifier()
    token = STRANGER.sign(claims(NOW))
    with pytest.raises(Refusal) as caught:
        by.verify(headers(token), NOW)
    told = "".join(map(repr, (caught.value, caught.value.__cause__, by, by._good)))
    for part in token.split("."):
        assert part not in told
        assert part[:16] not in told


@pytest.mark.parametrize(
    ("document", "why"),
    [
        ("", "is not JSON"),
        ("[]", "no JWK Set"),
        ('{"keys": {}}', "no JWK Set"),
        ('{"keys": []}', "has no RSA key"),
        ('{"keys": [1, null, {"kid": 1}]}', "has no RSA key"),
        (json.dumps({"keys": [GOOGLE.jwk(use="enc")]}), "has no RSA key"),
        (json.dumps({"keys": [GOOGLE.jwk(alg="RS512")]}), "has no RSA key"),
        (json.dumps({"keys": [GOOGLE.jwk(kty="oct", k="AAAA")]}), "has no RSA key"),
        (json.dumps({"keys": [GOOGLE.jwk(n="AQAB")]}), "has no RSA key"),
        (json.dumps({"keys": [GOOGLE.jwk(n="%")]}), "has no RSA key"),
        (json.dumps({"keys": [GOOGLE.jwk(n=None)]}), "has no RSA key"),
    ],
)
def test_what_holds_no_key_is_refused(document: str, why: str) -> None:
    with pytest.raises(KeySetError, match=f"^google.json: .*{why}"):
        parse_keys(document, "google.json")


def test_keys_beside_are_left_out() -> None:
    document = json.dumps({"keys": [GOOGLE.jwk(), {"kty": "EC", "kid": "ec"}, OTHER.jwk(alg="x")]})
    assert set(parse_keys(document, "a test")) == {GOOGLE.kid}


@given(st.text(max_size=200))
def test_any_document_has_keys_or_is_refused(document: str) -> None:
    with pytest.raises(KeySetError):
        parse_keys(document, "a test")
