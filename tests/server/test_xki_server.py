"""XKI over real TLS sockets, signed by the cloud's own signer: every call, every error code."""

from __future__ import annotations

import asyncio
import base64
import json
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cloud import METADATA, SM3
from harness import Proxy

from xkiproxy.crypto.operations import Fault, KeyState, OperationError
from xkiproxy.keystores.catalog import CatalogEntry


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def unb64(text: str) -> bytes:
    return base64.b64decode(text)


async def test_health(proxy: Proxy) -> None:
    answer = await proxy.call("health")
    assert answer.status == 200
    assert answer.fields["Status"] == "ACTIVE"
    proxy.lane.fault = OperationError(Fault.UNAVAILABLE, "planted")
    await proxy.kmi.check()
    answer = await proxy.call("health")
    assert (answer.status, answer.fields["Status"]) == (200, "UNAVAILABLE")


async def test_health_without_a_recent_check_is_unavailable(proxy: Proxy) -> None:
    proxy.kmi.checked -= 61
    assert (await proxy.call("health")).fields["Status"] == "UNAVAILABLE"


async def test_meta(proxy: Proxy) -> None:
    expected = {"aes256": "AES_256", "aes192": "AES_192", "aes128": "AES_128", "sm4": "SM4"}
    for key, spec in expected.items():
        answer = await proxy.call("meta", key)
        assert answer.status == 200
        assert answer.fields["KeySpec"] == f"Aliyun_{spec}"
        assert answer.fields["KeyState"] == "ENABLED"
        assert answer.fields["Origin"] == "EXTERNAL_KEY_STORE"
    assert (await proxy.call("meta", "disabled")).fields["KeyState"] == "DISABLED"
    assert (await proxy.call("meta", "deleted")).fields["KeyState"] == "PENDING_DELETION"


@pytest.mark.parametrize(
    ("key", "fields"),
    [
        ("aes256", {}),
        ("aes192", {"Algorithm": "AES_GCM"}),
        ("aes128", {"Aad": b64(b"context")}),
        ("aes256", {"Iv": b64(bytes(12))}),
        ("aes256", {"Algorithm": "AES_CBC"}),
        ("aes256", {"Algorithm": "AES_CBC", "PaddingMode": "NO_PADDING"}),
        ("aes256", {"Algorithm": "AES_CBC", "Iv": b64(bytes(16))}),
        ("aes256", {"Algorithm": "AES_ECB"}),
        ("aes192", {"Algorithm": "AES_ECB", "PaddingMode": "NO_PADDING"}),
        ("sm4", {}),
        ("sm4", {"Algorithm": "SM4_GCM", "Aad": b64(b"context")}),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [0, 16, 32, 6144, 16384])
async def test_what_is_encrypted_decrypts(
    proxy: Proxy, key: str, fields: dict[str, Any], size: int
) -> None:
    plaintext = bytes(i % 251 for i in range(size))
    made = await proxy.call("encrypt", key, Plaintext=b64(plaintext), **fields)
    assert made.status == 200, made.fields
    assert made.fields["KeyId"] == key
    assert ("Iv" in made.fields) == (fields.get("Algorithm") != "AES_ECB")
    assert ("PaddingMode" in made.fields) == (made.fields["Algorithm"] in {"AES_CBC", "AES_ECB"})
    again = {name: made.fields[name] for name in ("Iv", "PaddingMode") if name in made.fields}
    if "Aad" in fields:
        again["Aad"] = fields["Aad"]
    opened = await proxy.call(
        "decrypt", key, CiphertextBlob=made.fields["CiphertextBlob"],
        Algorithm=made.fields["Algorithm"], **again,
    )  # fmt: skip
    assert opened.status == 200, opened.fields
    assert unb64(opened.fields["Plaintext"]) == plaintext
    assert opened.fields["Algorithm"] == made.fields["Algorithm"]


async def test_random(proxy: Proxy) -> None:
    seen = set()
    for length in (1, 32, 1024):
        answer = await proxy.call("random", Length=length)
        assert answer.fields["OutputForm"] == "PLAIN"
        assert len(unb64(answer.fields["Output"])) == length
        seen.add(answer.fields["Output"])
    assert len(seen) == 3
    answer = await proxy.call("random", OutputForm="NONE")
    assert (answer.status, "Output" in answer.fields) == (200, False)


async def test_the_three_headers_and_a_new_request_id_on_every_answer(proxy: Proxy) -> None:
    good = await proxy.call("health")
    bad = await proxy.call("meta", "missing")
    nowhere = await proxy.post("/nowhere", b"", {})
    for answer in (good, bad, nowhere):
        assert answer.headers["x-xki-specification"] == "1.0.0"
        assert answer.headers["x-xki-server"].startswith("xkiproxy/")
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.headers["Server"] == "xkiproxy"
        assert uuid.UUID(answer.fields["RequestId"]).version == 4
    assert good.headers["x-xki-kms-request-id"] == METADATA["KmsRequestId"]
    assert bad.headers["x-xki-kms-request-id"] == METADATA["KmsRequestId"]
    assert nowhere.headers["x-xki-kms-request-id"] == ""
    assert len({a.fields["RequestId"] for a in (good, bad, nowhere)}) == 3


async def test_sm3_signature(proxy: Proxy) -> None:
    path, body = f"{proxy.base}/health", proxy.cloud.body()
    headers = proxy.cloud.headers(path, body, algorithm=SM3)
    assert (await proxy.post(path, body, headers)).status == 200


async def test_signed_query(proxy: Proxy) -> None:
    path, body = f"{proxy.base}/health", proxy.cloud.body()
    headers = proxy.cloud.headers(path, body, query={"b": "x y", "a": "1"})
    assert (await proxy.post(path + "?b=x%20y&a=1", body, headers)).status == 200
    headers = proxy.cloud.headers(path, body, query={"b": "x y", "a": "1"})
    assert (await proxy.post(path + "?b=x%20y&a=2", body, headers)).status == 401


async def test_percent_encoded_key_in_the_path(proxy: Proxy) -> None:
    path, body = f"{proxy.base}/keys/aes%3256/meta", proxy.cloud.body()
    answer = await proxy.post(path, body, proxy.cloud.headers(path, body))
    assert (answer.status, answer.fields.get("KeyId")) == (200, "aes256")


# ---- refusals: authentication ---------------------------------------------------------------


async def test_tampered_stale_replayed_and_foreign_requests(proxy: Proxy) -> None:
    path, body = f"{proxy.base}/keys/aes256/encrypt", proxy.cloud.body(Plaintext=b64(b"x"))
    headers = proxy.cloud.headers(path, body)
    tampered = await proxy.post(path, body.replace(b"=", b"A", 1), headers)
    assert (tampered.status, tampered.code) == (401, "Unauthorized")

    assert (await proxy.post(path, body, headers)).status == 200
    replayed = await proxy.post(path, body, headers)
    assert (replayed.status, replayed.code) == (401, "Unauthorized")

    past = datetime.now(UTC) - timedelta(minutes=16)
    stale = await proxy.post(path, body, proxy.cloud.headers(path, body, at=past))
    assert (stale.status, stale.code) == (400, "InvalidAcsDate")

    foreigner = type(proxy.cloud)("XKISOMEBODYELSE000000001", "some-other-secret-0123")
    foreign = await proxy.post(path, body, foreigner.headers(path, body))
    assert (foreign.status, foreign.code) == (401, "Unauthorized")
    assert foreign.fields["Message"] == tampered.fields["Message"] == replayed.fields["Message"]


async def test_missing_and_malformed_authorization(proxy: Proxy) -> None:
    path, body = f"{proxy.base}/health", proxy.cloud.body()
    headers = proxy.cloud.headers(path, body)
    without = {name: value for name, value in headers.items() if name != "Authorization"}
    answer = await proxy.post(path, body, without)
    assert (answer.status, answer.code) == (401, "Unauthorized")
    answer = await proxy.post(path, body, {**without, "Authorization": "Basic abc"})
    assert (answer.status, answer.code) == (400, "InvalidSignature")
    answer = await proxy.post(path, body, {**headers, "x-acs-date": "now"})
    assert (answer.status, answer.code) == (400, "InvalidAcsDate")


async def test_a_nonce_is_used_once_even_with_a_fresh_signature(proxy: Proxy) -> None:
    path, body = f"{proxy.base}/health", proxy.cloud.body()
    nonce = {"x_acs_signature_nonce": "the-same"}
    assert (await proxy.post(path, body, proxy.cloud.headers(path, body, **nonce))).status == 200
    later = datetime.now(UTC) + timedelta(seconds=3)
    again = proxy.cloud.headers(path, body, at=later, **nonce)
    assert (await proxy.post(path, body, again)).status == 401
    assert proxy.sample("xkiproxy_auth_failures_total", keystore="demo", reason="replay") == 1


async def test_the_date_of_a_refused_request_uses_no_nonce(proxy: Proxy) -> None:
    """A wrong signature must not burn the nonce of the right one."""
    path, body = f"{proxy.base}/health", proxy.cloud.body()
    headers = proxy.cloud.headers(path, body)
    bad = {**headers, "Authorization": headers["Authorization"][:-4] + "0000"}
    assert (await proxy.post(path, body, bad)).status == 401
    assert (await proxy.post(path, body, headers)).status == 200


# ---- refusals: the request ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "key", "fields", "status", "code"),
    [
        ("meta", "aes256", {"RequestMetadata": None}, 400, "RequestMetadataRequired"),
        ("meta", "aes256", {"RequestMetadata": {}}, 400, "InvalidRequestMetadata"),
        ("encrypt", "aes256", {}, 400, "PlaintextRequired"),
        ("encrypt", "aes256", {"Plaintext": "%"}, 400, "InvalidPlaintext"),
        ("encrypt", "aes256", {"Plaintext": "", "Algorithm": "DES"}, 400, "InvalidAlgorithm"),
        ("encrypt", "aes256", {"Plaintext": "", "Algorithm": "SM4_GCM"}, 400, "InvalidOperation"),
        ("encrypt", "sm4", {"Plaintext": "", "Algorithm": "AES_CBC"}, 400, "InvalidOperation"),
        ("encrypt", "aes256", {"Plaintext": "", "Iv": "AA=="}, 400, "InvalidIv"),
        ("decrypt", "aes256", {"Iv": b64(bytes(12))}, 400, "CiphertextBlobRequired"),
        ("decrypt", "aes256", {"CiphertextBlob": b64(bytes(64))}, 400, "IvRequired"),
        (
            "decrypt", "aes256",
            {"CiphertextBlob": b64(b"\x01\0\0\0\x01" + bytes(32)), "Iv": b64(bytes(12))},
            400, "InvalidCiphertextBlob",
        ),
        ("encrypt", "missing", {"Plaintext": ""}, 404, "KeyNotFound"),
        ("meta", "missing", {}, 404, "KeyNotFound"),
        ("meta", "a%20b", {}, 400, "InvalidExternalKeyId"),
        ("encrypt", "disabled", {"Plaintext": ""}, 403, "KeyDisabledForbidden"),
        ("encrypt", "deleted", {"Plaintext": ""}, 400, "KeyPendingDeletionForbidden"),
        ("encrypt", "decrypt-only", {"Plaintext": ""}, 403, "KeyUsageForbidden"),
        (
            "decrypt", "encrypt-only",
            {"CiphertextBlob": b64(b"\x01\0\0\0\x01" + bytes(32)), "Iv": b64(bytes(12))},
            403, "KeyUsageForbidden",
        ),
        ("random", "", {"Length": 0}, 400, "InvalidLength"),
        ("random", "", {"OutputForm": "PUBLIC_KEY_WRAPPED"}, 400, "PublicKeyBlobRequired"),
    ],
)  # fmt: skip
async def test_refused_requests(
    proxy: Proxy, call: str, key: str, fields: dict[str, Any], status: int, code: str
) -> None:
    answer = await proxy.call(call, key, **fields)
    assert (answer.status, answer.code) == (status, code), answer.fields
    assert set(answer.fields) == {"RequestId", "Code", "Message"}


async def test_a_body_that_is_not_json(proxy: Proxy) -> None:
    path = f"{proxy.base}/health"
    answer = await proxy.post(path, b"{", proxy.cloud.headers(path, b"{"))
    assert (answer.status, answer.code) == (400, "InvalidRequest")


@pytest.mark.parametrize(
    "path",
    ["/", "/demo", "/demo/kms/xki/v1", "/demo/kms/xki/v1/", "/demo/kms/xki/v1/nothing",
     "/other/kms/xki/v1/health", "/kms/xki/v1/health", "/demo/kms/xki/v1/keys/aes256",
     "/demo/kms/xki/v1/keys/aes256/delete", "/demo/kms/xki/v1/keys/a/b/meta",
     "/demo/kms/xki/v1/locks/a/meta", "/demo/kms/xki/v2/health", "/demo/kms/xki/v1/meta",
     "/demo/kms/xki/v1/keys/aes256/health"],
)  # fmt: skip
async def test_paths_that_are_none(proxy: Proxy, path: str) -> None:
    body = proxy.cloud.body()
    answer = await proxy.post(path, body, proxy.cloud.headers(path, body))
    assert (answer.status, answer.code) == (404, "XkiNotFound")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
async def test_methods_other_than_post(proxy: Proxy, method: str) -> None:
    for path in (f"{proxy.base}/health", f"{proxy.base}/keys/aes256/meta"):
        answer = await proxy.post(path, b"", {}, method)
        assert (answer.status, answer.code) == (405, "MethodNotAllowed")


async def test_invalid_key_state(proxy: Proxy) -> None:
    proxy.lane.fault = OperationError(Fault.KEY_UNUSABLE, "planted")
    answer = await proxy.call("encrypt", "aes256", Plaintext="")
    assert (answer.status, answer.code) == (400, "InvalidKeyState")


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (OperationError(Fault.THROTTLED, "planted"), 429, "TooManyRequests"),
        (OperationError(Fault.UNAVAILABLE, "planted"), 503, "ServiceUnavailable"),
        (OperationError(Fault.DEADLINE_EXCEEDED, "planted"), 504, "Timeout"),
        (OperationError(Fault.ACCESS_DENIED, "planted"), 403, "AccessForbidden"),
        (RuntimeError("a secret detail"), 500, "InternalServerError"),
    ],
)
async def test_faults_behind_the_protocol(
    proxy: Proxy, fault: Exception, status: int, code: str
) -> None:
    proxy.lane.fault = fault
    answer = await proxy.call("encrypt", "aes256", Plaintext="")
    assert (answer.status, answer.code) == (status, code)
    assert "secret detail" not in json.dumps(answer.fields)
    proxy.lane.fault = None
    assert (await proxy.call("encrypt", "aes256", Plaintext="")).status == 200


# ---- what must hold around a request --------------------------------------------------------


async def test_a_change_of_state_holds_for_the_next_request(proxy: Proxy) -> None:
    def put(state: KeyState) -> None:
        entry = proxy.catalog.get("local", "aes256")
        assert entry is not None
        proxy.catalog.put(CatalogEntry(entry.kmi, entry.key_id, state, entry.usage, entry.created))

    assert (await proxy.call("encrypt", "aes256", Plaintext="")).status == 200
    put(KeyState.DISABLED)
    assert (await proxy.call("encrypt", "aes256", Plaintext="")).code == "KeyDisabledForbidden"
    put(KeyState.ENABLED)
    assert (await proxy.call("encrypt", "aes256", Plaintext="")).status == 200


async def test_audit_records(proxy: Proxy) -> None:
    marker = b"the-plaintext-of-this-test"
    made = await proxy.call("encrypt", "aes256", Plaintext=b64(marker))
    await proxy.call("encrypt", "disabled", Plaintext=b64(marker))
    path = f"{proxy.base}/health"
    await proxy.post(path, b"", {})
    first, second, third = proxy.records()
    assert first["request_id"] == made.fields["RequestId"]
    assert first["kms_request_id"] == METADATA["KmsRequestId"]
    assert first["keystore"] == "demo"
    assert (first["operation"], first["key"], first["key_version"]) == ("encrypt", "aes256", 1)
    assert (first["principal"], first["instance"]) == (
        METADATA["PrincipalArn"], METADATA["KmsInstanceId"],
    )  # fmt: skip
    assert (first["kmi"], first["source"], first["code"]) == ("local", "127.0.0.1", "OK")
    assert first["access_key_id"] == proxy.cloud.access_key_id
    assert (second["code"], second["status"]) == ("KeyDisabledForbidden", 403)
    assert (third["code"], third["reason"], third["access_key_id"]) == (
        "Unauthorized", "missing", "",
    )  # fmt: skip
    text = proxy.audit_path.read_text()
    secrets = (marker.decode(), b64(marker), proxy.cloud.secret, made.fields["CiphertextBlob"])
    assert not [secret for secret in secrets if secret in text]
    assert proxy.sample("xkiproxy_audit_records_total") == 3


async def test_an_answer_leaves_only_after_its_record_is_written(proxy: Proxy) -> None:
    assert (await proxy.call("encrypt", "aes256", Plaintext="")).status == 200
    descriptor = proxy.audit._file.descriptor
    read_only = proxy.audit_path.open()
    proxy.audit._file.descriptor = read_only.fileno()
    for _ in range(2):
        answer = await proxy.call("encrypt", "aes256", Plaintext="")
        assert (answer.status, answer.code) == (503, "ServiceUnavailable")
    assert "audit" in proxy.condition.reasons
    proxy.audit._file.descriptor = descriptor
    read_only.close()
    proxy.audit.check()
    proxy.condition.recover("audit")
    assert (await proxy.call("encrypt", "aes256", Plaintext="")).status == 200


async def test_metrics(proxy: Proxy) -> None:
    for _ in range(3):
        await proxy.call("encrypt", "aes256", Plaintext="")
    await proxy.call("encrypt", "missing", Plaintext="")
    labels = {"keystore": "demo", "protocol": "xki", "operation": "encrypt"}
    assert proxy.sample("xkiproxy_requests_total", **labels, code="OK") == 3
    assert proxy.sample("xkiproxy_requests_total", **labels, code="KeyNotFound") == 1
    assert proxy.sample("xkiproxy_request_duration_seconds_count", **labels) == 4
    assert proxy.sample("xkiproxy_requests_in_flight") == 0
    assert proxy.sample(
        "xkiproxy_kmi_operations_total", kmi="local", operation="encrypt", outcome="ok"
    ) == 3  # fmt: skip


async def test_what_clients_send_makes_no_new_series(proxy: Proxy) -> None:
    async def series() -> set[tuple[str, ...]]:
        return {
            (sample.name, *sample.labels.values())
            for family in proxy.metrics.registry.collect()
            for sample in family.samples
        }

    await proxy.post("/a", b"", {})
    await proxy.call("meta", "missing-0")
    before = await series()
    for i in range(5):
        await proxy.post(f"/nowhere-{i}", b"", {})
        await proxy.call("meta", f"missing-{i}")
    assert await series() == before


async def test_many_requests_at_once_on_many_connections(proxy: Proxy) -> None:
    async def round_trip(i: int) -> bool:
        plaintext = f"message {i}".encode()
        made = await proxy.call("encrypt", "aes256", Plaintext=b64(plaintext))
        opened = await proxy.call(
            "decrypt", "aes256", CiphertextBlob=made.fields["CiphertextBlob"],
            Iv=made.fields["Iv"],
        )  # fmt: skip
        return unb64(opened.fields["Plaintext"]) == plaintext

    assert all(await asyncio.gather(*(round_trip(i) for i in range(50))))
