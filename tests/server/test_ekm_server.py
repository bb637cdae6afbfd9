"""EKM over real TLS sockets beside XKI, with tokens that google-auth has signed."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from google_cloud import ACCOUNT, AUDIENCE, RESOURCE, SigningKey, claims, key_set, request
from harness import Answer, Proxy

from xkiproxy.crypto.operations import Fault, OperationError
from xkiproxy.keystores.authorization import Authorizer
from xkiproxy.keystores.keystore import KeyStore
from xkiproxy.keystores.policies import parse_policies
from xkiproxy.keystores.replay import ReplayWindow
from xkiproxy.keystores.signing_keys import CachedSigningKeys
from xkiproxy.protocols.ekm import EkmProtocol
from xkiproxy.protocols.ekm.tokens import TokenVerifier, parse_keys
from xkiproxy.protocols.xki import XkiProtocol
from xkiproxy.server.gateway import Tenant
from xkiproxy.server.networks import Networks

BASE = "/gcp/kms/ekm/v0"
GOOGLE = SigningKey("google-1")
OTHER = SigningKey("google-2")


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def tenant(proxy: Proxy, policies: str = "", **settings: Any) -> Tenant:
    authorizer = Authorizer("gcp", parse_policies({"a.cedar": policies})) if policies else None
    store = KeyStore(
        "gcp", proxy.store._catalog, proxy.store.kmis, CachedSigningKeys([]), ReplayWindow(),
        deadline=5.0, authorizer=authorizer,
    )  # fmt: skip
    networks = settings.pop("networks", None)
    tokens = TokenVerifier(AUDIENCE, [ACCOUNT], parse_keys(key_set(GOOGLE), "a test"))
    return Tenant("/gcp", EkmProtocol(tokens, **settings), store, networks)


def serve(proxy: Proxy, **settings: Any) -> None:
    demo = Tenant("/demo", XkiProtocol(), proxy.store)
    proxy.gateway.serve([demo, tenant(proxy, **settings)])


@pytest.fixture
async def google(proxy: Proxy) -> Proxy:
    """The proxy, with a key store for Google."""
    serve(proxy)
    return proxy


async def call(
    proxy: Proxy, method: str, key: str = "aes256", token: str | None = None, **fields: Any
) -> Answer:
    body = json.dumps(fields if "additionalContext" in fields else request(**fields)).encode()
    headers = {"Content-Type": "application/json"}
    if token != "":
        headers["Authorization"] = f"Bearer {token or GOOGLE.sign(claims())}"
    return await proxy.post(f"{BASE}/keys/{key}:{method}", body, headers)


async def wrap(proxy: Proxy, plaintext: bytes = b"a key of Google", **fields: Any) -> Answer:
    return await call(proxy, "wrap", plaintext=b64(plaintext), **fields)


def error(answer: Answer) -> tuple[int, int]:
    assert set(answer.fields) <= {"code", "message", "details"}
    return answer.status, answer.fields["code"]


@pytest.mark.parametrize("size", [1, 32, 4096, 32768])
@pytest.mark.parametrize("aad", [b"", b"aad", bytes(8192)])
async def test_what_is_wrapped_is_unwrapped(google: Proxy, size: int, aad: bytes) -> None:
    plaintext = bytes(i % 251 for i in range(size))
    extra = {"additionalAuthenticatedData": b64(aad)} if aad else {}
    made = await wrap(google, plaintext, **extra)
    assert made.status == 200, made.fields
    blob = base64.b64decode(made.fields["wrappedBlob"])
    assert len(blob) == 5 + 12 + size + 16
    opened = await call(google, "unwrap", wrappedBlob=b64(blob), **extra)
    assert opened.fields == {"plaintext": b64(plaintext)}
    other = b64(aad + b"x")
    wrong = await call(google, "unwrap", wrappedBlob=b64(blob), additionalAuthenticatedData=other)
    assert error(wrong) == (400, 3)


async def test_a_flipped_bit_anywhere_is_not_unwrapped(google: Proxy) -> None:
    blob = base64.b64decode((await wrap(google)).fields["wrappedBlob"])
    for i in range(len(blob)):
        changed = blob[:i] + bytes([blob[i] ^ 1]) + blob[i + 1 :]
        answer = await call(google, "unwrap", wrappedBlob=b64(changed))
        assert error(answer) == (400, 3), i


async def test_a_blob_is_of_its_key(google: Proxy) -> None:
    blob = (await wrap(google)).fields["wrappedBlob"]
    assert error(await call(google, "unwrap", "decrypt-only", wrappedBlob=blob)) == (400, 3)


async def test_what_google_wrapped_opens_through_another_protocol(google: Proxy) -> None:
    made = await wrap(google, b"across", additionalAuthenticatedData=b64(b"aad"))
    blob = base64.b64decode(made.fields["wrappedBlob"])
    opened = await google.call(
        "decrypt", "aes256", CiphertextBlob=b64(blob[:5] + blob[17:]), Iv=b64(blob[5:17]),
        Aad=b64(b"aad"),
    )  # fmt: skip
    assert base64.b64decode(opened.fields["Plaintext"]) == b"across"


async def test_the_audit_record_says_who_and_why_and_nothing_of_the_token(google: Proxy) -> None:
    token = GOOGLE.sign(claims())
    await wrap(google, token=token)
    record = google.records()[-1]
    expected = {
        "keystore": "gcp",
        "operation": "wrap",
        "key": "aes256",
        "key_version": 1,
        "access_key_id": ACCOUNT,
        "principal": ACCOUNT,
        "kms_key_arn": RESOURCE,
        "kms_operation": "wrap",
        "access_reason": "CUSTOMER_INITIATED_ACCESS",
        "status": 200,
        "code": "OK",
    }
    assert expected.items() <= record.items()
    await call(google, "wrap", token=token[:-9] + "A" * 9)
    written = google.audit_path.read_text()
    assert google.records()[-1]["reason"] == "signature"
    for part in token.split("."):
        assert part[:24] not in written


async def test_records_of_other_protocols_have_no_reason(google: Proxy) -> None:
    await google.call("encrypt", "aes256", Plaintext=b64(b"x"))
    assert "access_reason" not in google.records()[-1]


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        ("", "missing"),
        ("a.b", "malformed"),
        (OTHER.sign(claims()), "unknown_token_key"),
        (GOOGLE.sign(claims(aud="https://elsewhere.example.com")), "scope"),
        (GOOGLE.sign(claims(email="nobody@example.com")), "unknown_access_key"),
        (GOOGLE.sign(claims(1_000_000_000)), "stale"),
    ],
)
async def test_without_a_good_token_nothing_is_done(google: Proxy, token: str, reason: str) -> None:
    answer = await wrap(google, token=token)
    assert error(answer) == (401, 16)
    assert answer.fields["message"] == "The request is not authenticated."
    assert google.records()[-1]["reason"] == reason
    labels = {"keystore": "gcp", "reason": reason}
    assert google.sample("xkiproxy_auth_failures_total", **labels) == 1


async def test_two_tokens_are_none(google: Proxy) -> None:
    good = f"Bearer {GOOGLE.sign(claims())}"
    path = f"{BASE}/keys/aes256:wrap"
    url = f"https://localhost:{google.port}{path}"
    pairs = [("Authorization", good), ("Authorization", good)]
    async with google.session.post(url, data=b"{}", headers=pairs) as response:
        assert response.status == 401


@pytest.mark.parametrize(
    ("key", "method", "status", "code"),
    [
        ("missing", "wrap", 404, 5),
        ("disabled", "wrap", 400, 9),
        ("deleted", "wrap", 400, 9),
        ("decrypt-only", "wrap", 400, 9),
        ("sm4", "wrap", 400, 9),
        ("a%20b", "wrap", 400, 3),
        ("aes256", "asymmetricSign", 501, 12),
        ("aes256", "getPublicKey", 501, 12),
        ("aes256", "destroyKey", 501, 12),
        ("aes256", "nothing", 404, 5),
        ("aes256", "", 404, 5),
        ("", "wrap", 404, 5),
    ],
)
async def test_refused_keys_and_calls(
    google: Proxy, key: str, method: str, status: int, code: int
) -> None:
    assert error(await call(google, method, key, plaintext="AAAA")) == (status, code)


@pytest.mark.parametrize(
    "path",
    ["/keys/aes256/wrap", "/keys/aes256", "/keys/a/b:wrap", "/wrap", ":wrap", "/health",
     "/cryptospaces/x:createKey", "/keys:wrap"],
)  # fmt: skip
async def test_other_paths_are_answered_in_the_words_of_ekm(google: Proxy, path: str) -> None:
    assert error(await google.post(BASE + path, b"{}", {})) == (404, 5)


async def test_a_colon_is_no_slash_to_the_others(google: Proxy) -> None:
    body = google.cloud.body(Plaintext="AAAA")
    path = f"{google.base}/keys/aes256:encrypt"
    answer = await google.post(path, body, google.cloud.headers(path, body))
    assert (answer.status, answer.code) == (404, "XkiNotFound")


async def test_methods_and_sizes(google: Proxy) -> None:
    answer = await google.post(f"{BASE}/keys/aes256:wrap", b"", {}, "GET")
    assert error(answer) == (405, 12)
    assert error(await wrap(google, bytes(70_000))) == (413, 11)


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (OperationError(Fault.THROTTLED, "planted"), 429, 8),
        (OperationError(Fault.UNAVAILABLE, "planted"), 503, 14),
        (OperationError(Fault.DEADLINE_EXCEEDED, "planted"), 504, 4),
        (OperationError(Fault.KEY_UNUSABLE, "planted"), 400, 9),
        (OperationError(Fault.KEY_FORBIDDEN, "planted"), 503, 14),
        (OperationError(Fault.INTERNAL, "planted"), 500, 13),
        (RuntimeError("a secret detail"), 500, 13),
    ],
)
async def test_faults_of_the_key_manager(
    google: Proxy, fault: Exception, status: int, code: int
) -> None:
    google.lane.fault = fault
    answer = await wrap(google)
    assert error(answer) == (status, code)
    assert "secret" not in answer.fields["message"]
    if status == 429:
        assert "Retry-After" in answer.headers


async def test_a_reason_that_is_not_allowed(proxy: Proxy) -> None:
    serve(proxy, allowed_reasons={"CUSTOMER_INITIATED_ACCESS"})
    assert (await wrap(proxy)).status == 200
    fields = request("THIRD_PARTY_DATA_REQUEST", plaintext="AAAA")
    answer = await call(proxy, "wrap", **fields)
    assert error(answer) == (403, 7)
    record = proxy.records()[-1]
    assert record["reason"] == "access_reason"
    assert record["access_reason"] == "THIRD_PARTY_DATA_REQUEST"
    assert record["principal"] == ACCOUNT
    labels = {"keystore": "gcp", "reason": "access_reason"}
    assert proxy.sample("xkiproxy_auth_failures_total", **labels) == 1


async def test_policies_ask_for_the_service_account_and_the_reason(proxy: Proxy) -> None:
    policy = (
        f'permit(principal == Principal::"{ACCOUNT}", action, resource) when'
        ' { context has access_reason && context.access_reason == "CUSTOMER_INITIATED_ACCESS" };'
    )
    serve(proxy, policies=policy)
    assert (await wrap(proxy)).status == 200
    answer = await call(proxy, "wrap", **request("GOOGLE_INITIATED_REVIEW", plaintext="AAAA"))
    assert error(answer) == (403, 7)
    assert proxy.records()[-1]["reason"] == "policy"
    assert (await wrap(proxy)).status == 200


async def test_an_address_that_may_not_ask_is_not_permission_denied(proxy: Proxy) -> None:
    """That would have Cloud EKM disable the key version for a mistake of the network."""
    import ipaddress

    serve(proxy, networks=Networks([ipaddress.ip_network("192.0.2.0/24")]))
    assert error(await wrap(proxy)) == (401, 16)
    assert proxy.records()[-1]["reason"] == "source_network"


async def test_old_versions_are_unwrapped_after_a_rotation(google: Proxy) -> None:
    old = (await wrap(google)).fields["wrappedBlob"]
    google.lane.lane._keyring.rotate("aes256")
    google.lane.refresh()
    new = (await wrap(google)).fields["wrappedBlob"]
    assert [base64.b64decode(blob)[4] for blob in (old, new)] == [1, 2]
    for blob in (old, new):
        answer = await call(google, "unwrap", wrappedBlob=blob)
        assert base64.b64decode(answer.fields["plaintext"]) == b"a key of Google"
