"""XKS over real TLS sockets beside XKI, signed by botocore and by curl."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from typing import Any

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from harness import AWS_ID, AWS_SECRET, Answer, Proxy

from xkiproxy.crypto import envelope
from xkiproxy.crypto.envelope import integrity_value
from xkiproxy.crypto.operations import (
    CiphertextFormat,
    Decrypted,
    Encrypted,
    Fault,
    Operation,
    OperationError,
    Result,
)
from xkiproxy.keystores.credentials import Credential
from xkiproxy.keystores.keystore import KeyStore
from xkiproxy.keystores.replay import ReplayWindow
from xkiproxy.keystores.signing_keys import CachedSigningKeys
from xkiproxy.protocols.xks import XksProtocol
from xkiproxy.server.gateway import Tenant

BASE = "/aws/kms/xks/v1"
RAW_BASE = "/raw/kms/xks/v1"
METADATA = {
    "awsPrincipalArn": "arn:aws:iam::123456789012:user/Alice",
    "kmsKeyArn": "arn:aws:kms:us-east-2:123456789012:/key/1234abcd",
    "kmsOperation": "Encrypt",
    "kmsRequestId": "4112f4d6-db54-4af4-ae30-c55a22a8dfae",
    "kmsViaService": "ebs",
}


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def unb64(text: str) -> bytes:
    return base64.b64decode(text)


def headers(proxy: Proxy, path: str, body: bytes) -> dict[str, str]:
    url = f"https://localhost:{proxy.port}{path}"
    given = {"content-type": "application/json", "host": f"localhost:{proxy.port}"}
    request = AWSRequest("POST", url, data=body, headers=given)
    SigV4Auth(Credentials(AWS_ID, AWS_SECRET), "kms-xks-proxy", "us-east-2").add_auth(request)
    return {name: str(value) for name, value in request.headers.items()}


async def call(proxy: Proxy, name: str, key: str = "", base: str = BASE, **fields: Any) -> Answer:
    path = f"{base}/keys/{key}/{name}" if key else f"{base}/{name}"
    body = json.dumps({"requestMetadata": METADATA, **fields}).encode()
    return await proxy.post(path, body, headers(proxy, path, body))


async def encrypt(proxy: Proxy, plaintext: bytes = b"hello", key: str = "aes256", **f: Any) -> Any:
    return await call(
        proxy, "encrypt", key, plaintext=b64(plaintext), encryptionAlgorithm="AES_GCM", **f
    )


async def decrypt(proxy: Proxy, made: dict[str, str], key: str = "aes256", **f: Any) -> Answer:
    stored = ("ciphertext", "initializationVector", "authenticationTag", "ciphertextMetadata")
    fields = {name: made[name] for name in stored if name in made}
    return await call(proxy, "decrypt", key, encryptionAlgorithm="AES_GCM", **{**fields, **f})


def serve_raw(proxy: Proxy) -> None:
    """Serve under RAW_BASE, and nothing else, with `ciphertext_format = "raw"`."""
    keys = CachedSigningKeys([Credential(AWS_ID, AWS_SECRET, "2026-01-01T00:00:00Z")])
    store = KeyStore("raw", proxy.catalog, [proxy.kmi], keys, ReplayWindow(), deadline=5.0)
    proxy.gateway.serve([Tenant("/raw", XksProtocol(CiphertextFormat.RAW), store)])


def error(answer: Answer) -> tuple[int, str]:
    assert set(answer.fields) == {"errorName", "errorMessage"}
    message = answer.fields["errorMessage"]
    assert len(message) < 512
    assert message.isascii()
    assert message.isprintable()
    return answer.status, answer.fields["errorName"]


async def test_a_raw_key_store_gives_out_no_metadata_and_takes_none(proxy: Proxy) -> None:
    serve_raw(proxy)
    made = await encrypt(
        proxy, b"hello", base=RAW_BASE, ciphertextDataIntegrityValueAlgorithm="SHA_256"
    )
    assert made.status == 200, made.fields
    assert "ciphertextMetadata" not in made.fields
    iv, closed, tag = (
        unb64(made.fields[name])
        for name in ("initializationVector", "ciphertext", "authenticationTag")
    )
    value = integrity_value(b"", b"", iv, closed + tag)
    assert unb64(made.fields["ciphertextDataIntegrityValue"]) == value
    assert (await decrypt(proxy, made.fields, base=RAW_BASE)).fields == {"plaintext": b64(b"hello")}
    for metadata in (envelope.metadata(1), b"x"):
        refused = await decrypt(proxy, made.fields, base=RAW_BASE, ciphertextMetadata=b64(metadata))
        assert error(refused) == (400, "InvalidCiphertextException")


async def test_health(proxy: Proxy) -> None:
    body = json.dumps(
        {"requestMetadata": {"kmsRequestId": "x", "kmsOperation": "KmsHealthCheck"}}
    ).encode()
    path = f"{BASE}/health"
    answer = await proxy.post(path, body, headers(proxy, path, body))
    assert answer.status == 200
    assert answer.fields["xksProxyFleetSize"] == 1
    assert answer.fields["ekmFleetDetails"] == [
        {"id": "local", "model": "software", "healthStatus": "ACTIVE"}
    ]
    proxy.kmi.checked -= 61
    answer = await call(proxy, "health")
    assert answer.fields["ekmFleetDetails"][0]["healthStatus"] == "UNAVAILABLE"


async def test_metadata(proxy: Proxy) -> None:
    answer = await call(proxy, "metadata", "aes256")
    assert answer.fields == {
        "keySpec": "AES_256",
        "keyUsage": ["ENCRYPT", "DECRYPT"],
        "keyStatus": "ENABLED",
    }
    assert (await call(proxy, "metadata", "disabled")).fields["keyStatus"] == "DISABLED"
    assert (await call(proxy, "metadata", "deleted")).fields["keyStatus"] == "DISABLED"
    assert (await call(proxy, "metadata", "encrypt-only")).fields["keyUsage"] == ["ENCRYPT"]
    assert error(await call(proxy, "metadata", "aes128")) == (400, "InvalidKeyUsageException")


@pytest.mark.parametrize("size", [0, 1, 4300, 16000])
@pytest.mark.parametrize("aad", [b"", b"project=nile", bytes(8192)])
async def test_what_is_encrypted_decrypts(proxy: Proxy, size: int, aad: bytes) -> None:
    plaintext = bytes(i % 251 for i in range(size))
    extra = {"additionalAuthenticatedData": b64(aad)} if aad else {}
    made = await encrypt(proxy, plaintext, **extra)
    assert made.status == 200, made.fields
    assert len(unb64(made.fields["ciphertext"])) == size
    assert len(unb64(made.fields["initializationVector"])) == 12
    assert len(unb64(made.fields["authenticationTag"])) == 16
    assert len(unb64(made.fields["ciphertextMetadata"])) <= 20
    assert "ciphertextDataIntegrityValue" not in made.fields
    opened = await decrypt(proxy, made.fields, **extra)
    assert unb64(opened.fields["plaintext"]) == plaintext
    wrong = await decrypt(proxy, made.fields, additionalAuthenticatedData=b64(aad + b"x"))
    assert error(wrong) == (400, "InvalidCiphertextException")


def test_the_integrity_value_of_the_specification() -> None:
    value = integrity_value(
        b"project=nile,department=marketing",
        b"key_version=1",
        unb64("HMrlRw85cAJUd5Ax"),
        unb64("ghxkK1txeDNn3q8Y") + unb64("vBxN2ncH1oEkR8WVXpmyYQ=="),
    )
    assert b64(value) == "qHA/ImC9h5HsLRXqCyPmWgYx7tzyoTplzILbP0fPXsc="


async def test_integrity_value(proxy: Proxy) -> None:
    made = await encrypt(
        proxy,
        additionalAuthenticatedData=b64(b"aad"),
        ciphertextDataIntegrityValueAlgorithm="SHA_256",
    )
    f = {name: unb64(value) for name, value in made.fields.items()}
    stored = b"aad" + f["ciphertextMetadata"] + f["initializationVector"]
    stored += f["ciphertext"] + f["authenticationTag"]
    assert f["ciphertextDataIntegrityValue"] == hashlib.sha256(stored).digest()
    other = await encrypt(proxy, ciphertextDataIntegrityValueAlgorithm="MD5")
    assert error(other) == (400, "ValidationException")


class LyingLane:
    """Changes what it encrypts, or what it decrypts: a key manager with a fault."""

    def __init__(self, lane: Any, lies: type) -> None:
        self.lane = lane
        self.lies = lies
        self.close = lane.close

    def execute(self, operation: Operation) -> Result:
        result = self.lane.execute(operation)
        if isinstance(result, Encrypted) and self.lies is Encrypted:
            changed = bytes([result.ciphertext[0] ^ 1]) + result.ciphertext[1:]
            return Encrypted(changed, result.iv, result.version, result.algorithm, result.padding)
        if isinstance(result, Decrypted) and self.lies is Decrypted:
            return Decrypted(b"other", result.version, result.algorithm, result.padding)
        return result


@pytest.mark.parametrize("lies", [Encrypted, Decrypted])
async def test_what_does_not_decrypt_is_not_answered(proxy: Proxy, lies: type) -> None:
    proxy.lane.lane = LyingLane(proxy.lane.lane, lies)
    answer = await encrypt(proxy, ciphertextDataIntegrityValueAlgorithm="SHA_256")
    assert error(answer) == (500, "InternalException")


async def test_a_flipped_bit_anywhere_is_an_invalid_ciphertext(proxy: Proxy) -> None:
    made = (await encrypt(proxy, b"0123456789abcdef")).fields
    for name in ("ciphertext", "initializationVector", "authenticationTag", "ciphertextMetadata"):
        data = unb64(made[name])
        for i in range(len(data)):
            changed = data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]
            answer = await decrypt(proxy, {**made, name: b64(changed)})
            assert error(answer) == (400, "InvalidCiphertextException"), (name, i)


async def test_metadata_does_not_pass_for_aad_nor_the_other_way_round(proxy: Proxy) -> None:
    made = (await encrypt(proxy)).fields
    metadata = made["ciphertextMetadata"]
    without = {name: value for name, value in made.items() if name != "ciphertextMetadata"}
    for wrong in (
        await decrypt(proxy, without),
        await decrypt(proxy, without, additionalAuthenticatedData=metadata),
        await decrypt(proxy, made, additionalAuthenticatedData=metadata),
    ):
        assert error(wrong) == (400, "InvalidCiphertextException")
    as_aad = (await encrypt(proxy, additionalAuthenticatedData=metadata)).fields
    assert error(await decrypt(proxy, as_aad)) == (400, "InvalidCiphertextException")


async def test_long_arns_and_new_fields(proxy: Proxy) -> None:
    metadata = {**METADATA, "awsPrincipalArn": "a" * 2048, "kmsKeyArn": "k" * 2048, "new": {"x": 1}}
    metadata["kmsOperation"] = "SomethingNew"
    answer = await encrypt(proxy, requestMetadata=metadata, future=True)
    assert answer.status == 200


@pytest.mark.parametrize(
    ("name", "key", "fields", "status", "code"),
    [
        ("encrypt", "aes256", {}, 400, "ValidationException"),
        ("encrypt", "aes256", {"plaintext": ""}, 400, "ValidationException"),
        ("encrypt", "aes256", {"plaintext": "%", "encryptionAlgorithm": "AES_GCM"}, 400,
         "ValidationException"),
        ("encrypt", "aes256", {"plaintext": "", "encryptionAlgorithm": {}}, 400,
         "ValidationException"),
        ("encrypt", "aes256", {"requestMetadata": None}, 400, "ValidationException"),
        ("encrypt", "aes256", {"requestMetadata": {"kmsRequestId": "x"}}, 400,
         "ValidationException"),
        ("encrypt", "aes256", {"requestMetadata": {**METADATA, "kmsKeyArn": 1}}, 400,
         "ValidationException"),
        ("encrypt", "missing", {"plaintext": "", "encryptionAlgorithm": "AES_GCM"}, 404,
         "KeyNotFoundException"),
        ("encrypt", "disabled", {"plaintext": "", "encryptionAlgorithm": "AES_GCM"}, 400,
         "InvalidStateException"),
        ("encrypt", "deleted", {"plaintext": "", "encryptionAlgorithm": "AES_GCM"}, 400,
         "InvalidStateException"),
        ("encrypt", "decrypt-only", {"plaintext": "", "encryptionAlgorithm": "AES_GCM"}, 400,
         "InvalidKeyUsageException"),
        ("encrypt", "sm4", {"plaintext": "", "encryptionAlgorithm": "AES_GCM"}, 400,
         "InvalidKeyUsageException"),
        ("decrypt", "aes256", {"encryptionAlgorithm": "AES_GCM"}, 400, "ValidationException"),
        ("metadata", "a%20b", {}, 400, "ValidationException"),
    ],
)  # fmt: skip
async def test_refused_requests(
    proxy: Proxy, name: str, key: str, fields: dict[str, Any], status: int, code: str
) -> None:
    assert error(await call(proxy, name, key, **fields)) == (status, code)


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (OperationError(Fault.THROTTLED, "planted"), 429, "ThrottlingException"),
        (OperationError(Fault.UNAVAILABLE, "planted"), 503, "DependencyTimeoutException"),
        (OperationError(Fault.DEADLINE_EXCEEDED, "planted"), 503, "DependencyTimeoutException"),
        (OperationError(Fault.ACCESS_DENIED, "planted"), 403, "AccessDeniedException"),
        (OperationError(Fault.INTERNAL, "ключ\n" * 300), 500, "InternalException"),
        (RuntimeError("a secret detail"), 500, "InternalException"),
    ],
)
async def test_faults_behind_the_protocol(
    proxy: Proxy, fault: Exception, status: int, code: str
) -> None:
    proxy.lane.fault = fault
    assert error(await encrypt(proxy)) == (status, code)


async def test_paths_methods_and_sizes(proxy: Proxy) -> None:
    assert error(await proxy.post(f"{BASE}/nothing", b"{}", {})) == (404, "InvalidUriPathException")
    answer = await proxy.post(f"{BASE}/health", b"", {}, "GET")
    assert error(answer) == (405, "InvalidUriPathException")
    assert error(await encrypt(proxy, bytes(70_000))) == (501, "UnsupportedOperationException")


async def test_a_path_of_one_protocol_with_the_signature_of_the_other(proxy: Proxy) -> None:
    body = json.dumps({"requestMetadata": METADATA}).encode()
    path = f"{BASE}/health"
    answer = await proxy.post(path, body, proxy.cloud.headers(path, body))
    assert error(answer) == (401, "AuthenticationFailedException")
    path = f"{proxy.base}/health"
    answer = await proxy.post(path, body, headers(proxy, path, body))
    assert answer.status in {400, 401}
    assert answer.code in {"InvalidSignature", "Unauthorized"}


async def test_a_ciphertext_of_one_protocol_opens_through_the_other(proxy: Proxy) -> None:
    made = (await encrypt(proxy, b"across", additionalAuthenticatedData=b64(b"aad"))).fields
    blob = b"".join(
        unb64(made[name]) for name in ("ciphertextMetadata", "ciphertext", "authenticationTag")
    )
    opened = await proxy.call(
        "decrypt", "aes256", CiphertextBlob=b64(blob), Iv=made["initializationVector"],
        Aad=b64(b"aad"),
    )  # fmt: skip
    assert unb64(opened.fields["Plaintext"]) == b"across"
    back = (await proxy.call("encrypt", "aes256", Plaintext=b64(b"and back"))).fields
    blob = unb64(back["CiphertextBlob"])
    answer = await decrypt(
        proxy,
        {
            "ciphertextMetadata": b64(blob[:5]),
            "ciphertext": b64(blob[5:-16]),
            "authenticationTag": b64(blob[-16:]),
            "initializationVector": back["Iv"],
        },
    )
    assert unb64(answer.fields["plaintext"]) == b"and back"


async def test_curl_is_a_client(proxy: Proxy) -> None:
    async def curl(path: str, fields: dict[str, Any]) -> dict[str, Any]:
        process = await asyncio.create_subprocess_exec(
            "curl", "-sS", "--fail-with-body", "--noproxy", "*",
            "--cacert", str(proxy.certificate),
            "--aws-sigv4", "aws:amz:us-east-1:kms-xks-proxy", "--user", f"{AWS_ID}:{AWS_SECRET}",
            "-H", "Content-Type: application/json", "--data-binary", json.dumps(fields),
            f"https://localhost:{proxy.port}{BASE}{path}",
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 0, (out, err)
        return json.loads(out)

    request = {"requestMetadata": METADATA}
    assert (await curl("/health", request))["xksProxyFleetSize"] == 1
    assert (await curl("/keys/aes256/metadata", request))["keySpec"] == "AES_256"
    algorithm = {"encryptionAlgorithm": "AES_GCM"}
    made = await curl(
        "/keys/aes256/encrypt", {**request, **algorithm, "plaintext": b64(b"from curl")}
    )
    opened = await curl("/keys/aes256/decrypt", {**request, **algorithm, **made})
    assert unb64(opened["plaintext"]) == b"from curl"


async def test_the_audit_record_has_the_request_of_the_cloud(proxy: Proxy) -> None:
    await encrypt(proxy)
    record = proxy.records()[-1]
    assert record["kms_request_id"] == METADATA["kmsRequestId"]
    assert record["principal"] == METADATA["awsPrincipalArn"]
    assert (record["keystore"], record["operation"], record["key"]) == ("aws", "encrypt", "aes256")
