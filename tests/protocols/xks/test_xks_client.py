"""The client's side of XKS: its signature is botocore's, and it believes no integrity value."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from xkiproxy.protocols.client import Answer, ArgumentError, Request, Signer, call_path
from xkiproxy.protocols.xks.client import XksClient

ID, SECRET = "XKSABCDEFGHIJKLMNOPQRSTU", "PqTjvwAWKC+nZpMbw/yJkQ2s0mTUXb3dLHgRfVnc1xE="
HOST = "proxy.example.com:8443"
NOW = 1_767_323_045.0  # 2026-01-02T03:04:05Z

client = XksClient()


def build(call: str, key: str = "", region: str = "us-east-1", **arguments: Any) -> Request:
    path = call_path("/demo/kms/xks/v1", client.calls[call].part, key)
    fields = client.fields(call, arguments)
    return client.build_request(
        call, path, fields, Signer(ID, SECRET, region),
        host=HOST, now=NOW, nonce="unused", kms_request_id="req-1",
    )  # fmt: skip


def signed_by_botocore(request: Request, region: str) -> str:
    """The Authorization header that botocore makes of a request, at the request's own time."""
    headers = {name: request.headers[name] for name in ("host", "content-type")}
    url = f"https://{HOST}{request.path}"
    made = AWSRequest("POST", url, data=request.body, headers=headers)
    made.context["timestamp"] = request.headers["x-amz-date"]
    made.headers["X-Amz-Date"] = request.headers["x-amz-date"]
    signer = SigV4Auth(Credentials(ID, SECRET), "kms-xks-proxy", region)
    canonical = signer.canonical_request(made)
    signature = signer.signature(signer.string_to_sign(made, canonical), made)
    signer._inject_signature_to_request(made, signature)
    return str(made.headers["Authorization"])


@pytest.mark.parametrize("region", ["us-east-1", "eu-central-1"])
@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("health", {}),
        ("meta", {"key": "my.key_1-2"}),
        ("encrypt", {"key": "k", "plaintext": bytes(range(256)), "aad": b"context"}),
        ("decrypt", {"key": "k", "aad": b""}),
    ],
)
def test_botocore_makes_the_same_signature(
    call: str, arguments: dict[str, Any], region: str
) -> None:
    request = build(call, region=region, **arguments)
    assert set(request.headers) == {"host", "content-type", "x-amz-date", "authorization"}
    assert request.headers["x-amz-date"] == "20260102T030405Z"
    assert datetime.fromtimestamp(NOW, UTC).isoformat() == "2026-01-02T03:04:05+00:00"
    assert request.headers["authorization"] == signed_by_botocore(request, region)
    assert SECRET not in repr(request) + request.body.decode()


def test_paths_and_request_metadata() -> None:
    expected = {
        "health": ("/demo/kms/xks/v1/health", {"kmsRequestId", "kmsOperation"}),
        "meta": (
            "/demo/kms/xks/v1/keys/k/metadata",
            {"kmsRequestId", "kmsOperation", "awsPrincipalArn"},
        ),
        "encrypt": (
            "/demo/kms/xks/v1/keys/k/encrypt",
            {"kmsRequestId", "kmsOperation", "awsPrincipalArn", "kmsKeyArn"},
        ),
        "decrypt": (
            "/demo/kms/xks/v1/keys/k/decrypt",
            {"kmsRequestId", "kmsOperation", "awsPrincipalArn", "kmsKeyArn"},
        ),
    }
    assert set(client.calls) == set(expected)
    for call, (path, names) in expected.items():
        request = build(call, "" if call == "health" else "k", region="eu-west-2")
        metadata = json.loads(request.body)["requestMetadata"]
        assert (request.path, set(metadata)) == (path, names)
        assert metadata["kmsRequestId"] == "req-1"
        assert metadata.get("awsPrincipalArn", "arn:aws:iam::").startswith("arn:aws:iam::")
        arn = metadata.get("kmsKeyArn", "arn:aws:kms:eu-west-2:")
        assert arn.startswith("arn:aws:kms:eu-west-2:")


def test_fields() -> None:
    assert client.fields("encrypt", {"plaintext": b"hello", "aad": None, "iv": None}) == {
        "plaintext": "aGVsbG8=",
        "encryptionAlgorithm": "AES_GCM",
    }
    asked = client.fields("encrypt", {"plaintext": b"", "aad": b"x", "integrity": True})
    assert asked == {
        "plaintext": "",
        "additionalAuthenticatedData": "eA==",
        "encryptionAlgorithm": "AES_GCM",
        "ciphertextDataIntegrityValueAlgorithm": "SHA_256",
    }
    for argument, value in (("iv", "AAAA"), ("padding", "NO_PADDING"), ("algorithm", "AES_CBC")):
        with pytest.raises(ArgumentError) as caught:
            client.fields("encrypt", {"plaintext": b"x", argument: value})
        assert caught.value.argument == argument


def test_what_encrypt_answered_is_decrypted() -> None:
    answer = {
        "ciphertext": "AQID",
        "initializationVector": "BAUG",
        "authenticationTag": "BwgJ",
        "ciphertextMetadata": "AQ==",
    }
    assert client.stored_fields({**answer, "status": 200}) == answer
    required = list(answer)[:3]
    for name in required:
        with pytest.raises(ValueError, match=f"has no {name}"):
            client.stored_fields({k: v for k, v in answer.items() if k != name})
    del answer["ciphertextMetadata"]
    assert client.stored_fields(answer) == answer


def test_answers() -> None:
    good = client.read_answer(200, b'{"plaintext": "aHVzaA=="}')
    assert (good.request_id, good.code, "aHVzaA" in repr(good)) == ("", "", False)
    bad = client.read_answer(404, b'{"errorName": "KeyNotFoundException", "errorMessage": "No."}')
    assert (bad.code, bad.message) == ("KeyNotFoundException", "No.")
    assert client.read_answer(404, b'{"errorName": "KeyNotFoundException"}').message == ""
    for text in (b"", b"[]", b"<html>"):
        with pytest.raises(ValueError, match="JSON object"):
            client.read_answer(200, text)


# The specification's own example of an integrity value.
SENT = {
    "ciphertextDataIntegrityValueAlgorithm": "SHA_256",
    "additionalAuthenticatedData": base64.b64encode(b"project=nile,department=marketing").decode(),
}
ANSWERED = {
    "ciphertext": "ghxkK1txeDNn3q8Y",
    "initializationVector": "HMrlRw85cAJUd5Ax",
    "authenticationTag": "vBxN2ncH1oEkR8WVXpmyYQ==",
    "ciphertextMetadata": base64.b64encode(b"key_version=1").decode(),
    "ciphertextDataIntegrityValue": "qHA/ImC9h5HsLRXqCyPmWgYx7tzyoTplzILbP0fPXsc=",
}


def test_the_integrity_value_of_the_specification() -> None:
    client.verify_answer(SENT, Answer(200, "", ANSWERED))
    parts = [base64.b64decode(SENT["additionalAuthenticatedData"])]
    for name in ("initializationVector", "ciphertext", "authenticationTag"):
        parts.append(base64.b64decode(ANSWERED[name]))
    digest = hashlib.sha256(b"".join(parts)).digest()
    without = {**ANSWERED, "ciphertextDataIntegrityValue": base64.b64encode(digest).decode()}
    del without["ciphertextMetadata"]
    client.verify_answer(SENT, Answer(200, "", without))


WRONG = base64.b64encode(b"something else").decode()


@pytest.mark.parametrize("name", ANSWERED)
@pytest.mark.parametrize("value", [WRONG, "", "no Base64", 7])
def test_a_wrong_integrity_value_is_not_believed(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"ciphertextDataIntegrityValue|Base64"):
        client.verify_answer(SENT, Answer(200, "", {**ANSWERED, name: value}))
    missing = {other: text for other, text in ANSWERED.items() if other != name}
    with pytest.raises(ValueError, match="ciphertextDataIntegrityValue"):
        client.verify_answer(SENT, Answer(200, "", missing))


def test_the_integrity_value_is_that_of_the_aad_that_was_sent() -> None:
    with pytest.raises(ValueError, match="ciphertextDataIntegrityValue"):
        client.verify_answer(
            {**SENT, "additionalAuthenticatedData": WRONG}, Answer(200, "", ANSWERED)
        )
    # Nothing is verified that was not asked for.
    client.verify_answer({}, Answer(200, "", {}))
