"""XKI bodies: what is read from them, what is refused and in which words. No server, no KMI."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from xkiproxy.crypto.algorithms import Algorithm, KeySpec, Padding, Usage
from xkiproxy.crypto.caller import Caller
from xkiproxy.crypto.operations import (
    Availability,
    CiphertextFormat,
    Decrypt,
    Decrypted,
    Describe,
    Encrypt,
    Encrypted,
    Fault,
    Health,
    HealthReport,
    KeyDescription,
    KeyState,
    OperationError,
    OutputForm,
    Random,
    RandomBytes,
)
from xkiproxy.crypto.wrapping import WrappingAlgorithm
from xkiproxy.protocols.base import Identity, Refusal, Trouble
from xkiproxy.protocols.xki import XkiProtocol

METADATA = {"KmsRequestId": "req-1", "KmsOperation": "kms:Encrypt"}
CALLS = [("encrypt", "k"), ("decrypt", "k"), ("meta", "k"), ("random", ""), ("health", "")]
ENVELOPE_V1 = b"\x01\x00\x00\x00\x01"

protocol = XkiProtocol()
SIGNER = Identity("XKIEXAMPLE", "", 0.0)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def decode(call: str, fields: Any, key: str = "demo-key", dialect: XkiProtocol = protocol) -> Any:
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    _, parsed = dialect.open(call, body, SIGNER)
    return dialect.decode(call, key, parsed)


def code(call: str, fields: Any, key: str = "demo-key", dialect: XkiProtocol = protocol) -> str:
    with pytest.raises((Refusal, OperationError)) as caught:
        decode(call, fields, key, dialect)
    error = caught.value
    return error.code if isinstance(error, Refusal) else dialect.refuse(error).code


def encrypt(**fields: Any) -> dict[str, Any]:
    return {"RequestMetadata": METADATA, "Plaintext": b64(b"hello"), **fields}


def decrypt(**fields: Any) -> dict[str, Any]:
    blob = b64(ENVELOPE_V1 + bytes(32))
    return {"RequestMetadata": METADATA, "CiphertextBlob": blob, "Iv": b64(bytes(12)), **fields}


def random(**fields: Any) -> dict[str, Any]:
    return {"RequestMetadata": METADATA, **fields}


def rsa_key(bits: int = 2048) -> str:
    key = rsa.generate_private_key(65537, bits).public_key()
    return b64(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


RSA_2048 = rsa_key()


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"nonsense", b"[1]", b'"x"', b"null", b"1"])
def test_what_is_no_json_object(body: bytes) -> None:
    for call, key in CALLS:
        assert code(call, body, key) == "InvalidRequest"


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (None, "RequestMetadataRequired"),
        ("x", "InvalidRequestMetadata"),
        ([], "InvalidRequestMetadata"),
        ({}, "InvalidRequestMetadata"),
        ({"KmsRequestId": "r"}, "InvalidRequestMetadata"),
        ({"KmsOperation": "kms:Encrypt"}, "InvalidRequestMetadata"),
        ({**METADATA, "KmsRequestId": 1}, "InvalidRequestMetadata"),
        ({**METADATA, "KmsRequestId": None}, "InvalidRequestMetadata"),
        ({**METADATA, "PrincipalArn": ["a"]}, "InvalidRequestMetadata"),
        ({**METADATA, "SourceVpc": False}, "InvalidRequestMetadata"),
    ],
)
def test_request_metadata(metadata: Any, expected: str) -> None:
    for call, key in CALLS:
        assert code(call, encrypt(RequestMetadata=metadata), key) == expected


def test_metadata_is_read_whole_and_unknown_fields_are_ignored() -> None:
    metadata = {
        "KmsRequestId": "any Form / of id",
        "KmsOperation": "kms:SomethingNew",
        "KmsInstanceId": "kst-1",
        "KmsKeyArn": "acs:kms:cn-hangzhou:1:key/1",
        "PrincipalArn": "acs:kms:cn-hangzhou:1:user/2",
        "SourceVpc": "vpc-1",
        "SourceIp": "192.0.2.1",
        "KmsViaService": None,
        "New": {"a": 1},
    }
    body = json.dumps(encrypt(RequestMetadata=metadata, Future=[1])).encode()
    caller, fields = protocol.open("encrypt", body, SIGNER)
    assert caller == Caller(
        request_id="any Form / of id",
        operation="kms:SomethingNew",
        instance="kst-1",
        key_arn="acs:kms:cn-hangzhou:1:key/1",
        principal="acs:kms:cn-hangzhou:1:user/2",
        source_vpc="vpc-1",
        source_ip="192.0.2.1",
    )
    assert isinstance(protocol.decode("encrypt", "k", fields), Encrypt)


@pytest.mark.parametrize("key", ["a", "A-b_c.9", "x" * 128, "demo%2Dkey"])
def test_key_ids(key: str) -> None:
    assert decode("meta", {"RequestMetadata": METADATA}, key) == Describe(key.replace("%2D", "-"))


@pytest.mark.parametrize("key", ["", "x" * 129, "a b", "a%20b", "a%2Fb", "a:b", "ключ", "a%00"])
def test_key_ids_refused(key: str) -> None:
    for call in ("meta", "encrypt", "decrypt"):
        assert code(call, encrypt() | decrypt(), key) == "InvalidExternalKeyId"


def test_encrypt_in_full() -> None:
    fields = encrypt(Algorithm="AES_GCM", Aad=b64(b"context"), Iv=b64(bytes(12)))
    assert decode("encrypt", {**fields, "externalKeyId": "demo-key"}) == Encrypt(
        "demo-key", b"hello", Algorithm.AES_GCM, None, bytes(12), b"context"
    )


def test_encrypt_with_defaults_and_nulls() -> None:
    nothing = {"Algorithm": None, "Iv": None, "Aad": None, "PaddingMode": None}
    assert decode("encrypt", encrypt(**nothing)) == Encrypt("demo-key", b"hello")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"Plaintext": None}, "PlaintextRequired"),
        ({"Plaintext": 5}, "InvalidPlaintext"),
        ({"Plaintext": "a"}, "InvalidPlaintext"),
        ({"Plaintext": "aGVs bG8="}, "InvalidPlaintext"),
        ({"Plaintext": "aGVsbG8"}, "InvalidPlaintext"),
        ({"Plaintext": "aGVsbG8=="}, "InvalidPlaintext"),
        ({"Plaintext": "_-_-"}, "InvalidPlaintext"),
        ({"Plaintext": "ключ"}, "InvalidPlaintext"),
        ({"Algorithm": "AES"}, "InvalidAlgorithm"),
        ({"Algorithm": ""}, "InvalidAlgorithm"),
        ({"Algorithm": {}}, "InvalidAlgorithm"),
        ({"PaddingMode": "ZERO"}, "InvalidPaddingMode"),
        ({"PaddingMode": "PKCS7_PADDING"}, "InvalidPaddingMode"),
        ({"Algorithm": "SM4_GCM", "PaddingMode": "NO_PADDING"}, "InvalidPaddingMode"),
        ({"Iv": b64(bytes(16))}, "InvalidIv"),
        ({"Iv": ""}, "InvalidIv"),
        ({"Iv": 12}, "InvalidIv"),
        ({"Algorithm": "AES_CBC", "Iv": b64(bytes(12))}, "InvalidIv"),
        ({"Algorithm": "AES_ECB", "Iv": b64(bytes(16))}, "InvalidIv"),
        ({"Aad": "*"}, "InvalidAad"),
        ({"Aad": b64(bytes(65536))}, "InvalidAad"),
        ({"Algorithm": "AES_CBC", "Aad": b64(b"x")}, "InvalidAad"),
        ({"Algorithm": "AES_ECB", "Aad": b64(b"x")}, "InvalidAad"),
        ({"Algorithm": "AES_CBC", "PaddingMode": "NO_PADDING"}, "InvalidPlaintext"),
        ({"externalKeyId": "another"}, "InvalidExternalKeyId"),
        ({"externalKeyId": 7}, "InvalidExternalKeyId"),
    ],
)
def test_encrypt_refused(fields: dict[str, Any], expected: str) -> None:
    assert code("encrypt", encrypt(**fields)) == expected


def test_decrypt_in_full() -> None:
    assert decode("decrypt", decrypt(Aad=b64(b"context"))) == Decrypt(
        "demo-key", bytes(32), bytes(12), 1, None, None, b"context"
    )
    cbc = decrypt(Algorithm="AES_CBC", Iv=b64(bytes(16)), PaddingMode="NO_PADDING")
    assert decode("decrypt", cbc).padding is Padding.NONE
    ecb = decrypt(Algorithm="AES_ECB", Iv=None)
    assert decode("decrypt", ecb).iv == b""


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"CiphertextBlob": None}, "CiphertextBlobRequired"),
        ({"CiphertextBlob": 1}, "InvalidCiphertextBlob"),
        ({"CiphertextBlob": "%"}, "InvalidCiphertextBlob"),
        ({"CiphertextBlob": ""}, "InvalidCiphertextBlob"),
        ({"CiphertextBlob": b64(b"\x01\x00")}, "InvalidCiphertextBlob"),
        ({"CiphertextBlob": b64(b"\x02\x00\x00\x00\x01" + bytes(32))}, "InvalidCiphertextBlob"),
        ({"CiphertextBlob": b64(b"\x01\x00\x00\x00\x00" + bytes(32))}, "InvalidCiphertextBlob"),
        ({"CiphertextBlob": b64(ENVELOPE_V1 + bytes(15))}, "InvalidCiphertextBlob"),
        ({"Iv": None}, "IvRequired"),
        ({"Iv": None, "Algorithm": "AES_CBC"}, "IvRequired"),
        ({"Iv": b64(bytes(13))}, "InvalidIv"),
        ({"Algorithm": "RSA"}, "InvalidAlgorithm"),
        ({"PaddingMode": "NO_PADDING"}, "InvalidPaddingMode"),
        ({"Aad": 1}, "InvalidAad"),
        ({"externalKeyId": "another"}, "InvalidExternalKeyId"),
        (
            {"Algorithm": "AES_ECB", "Iv": None, "CiphertextBlob": b64(ENVELOPE_V1 + bytes(17))},
            "InvalidCiphertextBlob",
        ),
        (
            {"Algorithm": "AES_ECB", "Iv": None, "CiphertextBlob": b64(ENVELOPE_V1)},
            "InvalidCiphertextBlob",
        ),
    ],
)
def test_decrypt_refused(fields: dict[str, Any], expected: str) -> None:
    assert code("decrypt", decrypt(**fields)) == expected


def test_raw_format_takes_the_blob_as_it_is() -> None:
    raw = XkiProtocol(CiphertextFormat.RAW)
    operation = decode("decrypt", decrypt(CiphertextBlob=b64(bytes(20))), dialect=raw)
    assert (operation.ciphertext, operation.version) == (bytes(20), None)
    assert decode("encrypt", encrypt(), dialect=raw).format is CiphertextFormat.RAW


def test_random_with_defaults() -> None:
    assert decode("random", random(), "") == Random(32, OutputForm.PLAIN)
    assert decode("random", random(Length=1024, OutputForm="NONE"), "").length == 1024


def test_random_wrapped() -> None:
    fields = random(
        Length=190,
        OutputForm="PUBLIC_KEY_WRAPPED",
        PublicKeyBlob=RSA_2048,
        WrappingKeySpec="RSA_2048",
        WrappingAlgorithm="RSAES_OAEP_SHA256",
    )
    wrapping = decode("random", fields, "").wrapping
    assert wrapping.algorithm is WrappingAlgorithm.RSAES_OAEP_SHA256


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"Length": 0}, "InvalidLength"),
        ({"Length": 1025}, "InvalidLength"),
        ({"Length": -1}, "InvalidLength"),
        ({"Length": "32"}, "InvalidLength"),
        ({"Length": 32.0}, "InvalidLength"),
        ({"Length": True}, "InvalidLength"),
        ({"OutputForm": "HEX"}, "InvalidOutputForm"),
    ],
)
def test_random_refused(fields: dict[str, Any], expected: str) -> None:
    assert code("random", random(**fields), "") == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"PublicKeyBlob": None}, "PublicKeyBlobRequired"),
        ({"PublicKeyBlob": "%"}, "InvalidPublicKeyBlob"),
        ({"PublicKeyBlob": b64(b"no key")}, "InvalidPublicKeyBlob"),
        ({"PublicKeyBlob": rsa_key(3072)}, "InvalidPublicKeyBlob"),
        ({"WrappingKeySpec": None}, "WrappingKeySpecRequired"),
        ({"WrappingKeySpec": "RSA_1024"}, "InvalidWrappingKeySpec"),
        ({"WrappingKeySpec": "EC_SM2"}, "InvalidWrappingAlgorithm"),
        ({"WrappingAlgorithm": None}, "WrappingAlgorithmRequired"),
        ({"WrappingAlgorithm": "RSAES_PKCS1"}, "InvalidWrappingAlgorithm"),
        ({"WrappingAlgorithm": "SM2PKE"}, "InvalidWrappingAlgorithm"),
        ({"Length": 191}, "InvalidLength"),
        ({"Length": 215, "WrappingAlgorithm": "RSAES_OAEP_SHA1"}, "InvalidLength"),
    ],
)
def test_random_wrapping_refused(fields: dict[str, Any], expected: str) -> None:
    good = random(
        OutputForm="PUBLIC_KEY_WRAPPED",
        PublicKeyBlob=RSA_2048,
        WrappingKeySpec="RSA_2048",
        WrappingAlgorithm="RSAES_OAEP_SHA256",
    )
    assert code("random", {**good, **fields}, "") == expected


def test_policy_against_plain_random_bytes() -> None:
    strict = XkiProtocol(disable_output_form_plain=True)
    assert code("random", random(), "", strict) == "AccessForbidden"
    assert decode("random", random(OutputForm="NONE"), "", strict).output is OutputForm.NONE


def test_answers() -> None:
    gcm = Encrypted(bytes(21), bytes(12), 7, Algorithm.AES_GCM, None)
    assert json.loads(protocol.encode(Encrypt("k", b""), gcm, "id")) == {
        "RequestId": "id",
        "KeyId": "k",
        "CiphertextBlob": b64(b"\x01\x00\x00\x00\x07" + bytes(21)),
        "Iv": b64(bytes(12)),
        "Algorithm": "AES_GCM",
    }
    ecb = Encrypted(bytes(16), b"", 1, Algorithm.AES_ECB, Padding.PKCS7)
    assert json.loads(protocol.encode(Encrypt("k", b""), ecb, "id")) == {
        "RequestId": "id",
        "KeyId": "k",
        "CiphertextBlob": b64(ENVELOPE_V1 + bytes(16)),
        "Algorithm": "AES_ECB",
        "PaddingMode": "PKCS7_PADDING",
    }
    plain = Decrypted(b"hello", 1, Algorithm.AES_CBC, Padding.NONE)
    assert json.loads(protocol.encode(Decrypt("k", b"", b"", 1), plain, "id")) == {
        "RequestId": "id",
        "KeyId": "k",
        "Plaintext": b64(b"hello"),
        "Algorithm": "AES_CBC",
        "PaddingMode": "NO_PADDING",
    }
    drawn = RandomBytes(b"abc")
    assert json.loads(protocol.encode(Random(3), drawn, "id")) == {
        "RequestId": "id",
        "OutputForm": "PLAIN",
        "Output": b64(b"abc"),
    }
    none = protocol.encode(Random(3, OutputForm.NONE), RandomBytes(b""), "id")
    assert json.loads(none) == {"RequestId": "id", "OutputForm": "NONE"}
    described = KeyDescription("k", KeySpec.SM4, Usage.BOTH, 1, 0.0, KeyState.DISABLED)
    assert json.loads(protocol.encode(Describe("k"), described, "id")) == {
        "RequestId": "id",
        "KeyId": "k",
        "KeySpec": "Aliyun_SM4",
        "KeyUsage": "ENCRYPT/DECRYPT",
        "KeyState": "DISABLED",
        "Origin": "EXTERNAL_KEY_STORE",
        "CreateTime": "1970-01-01T00:00:00Z",
    }


@pytest.mark.parametrize("availability", list(Availability))
def test_health_answer(availability: Availability) -> None:
    body = json.loads(protocol.encode(Health(), HealthReport(availability, "", ()), "id"))
    assert body["Status"] == availability
    assert set(body) == {
        "RequestId", "Specification", "ServerName", "ServerVersion", "Vendor", "Status", "Message",
    }  # fmt: skip


def test_every_fault_and_trouble_has_its_words() -> None:
    for fault in Fault:
        refusal = protocol.refuse(OperationError(fault, "why", "iv"))
        assert 400 <= refusal.status < 600
        fields = json.loads(protocol.encode_refusal(refusal, "id"))
        assert set(fields) == {"RequestId", "Code", "Message"}
    for trouble in Trouble:
        assert 400 <= protocol.refuse(trouble).status < 500


@pytest.mark.parametrize(
    ("sent", "echoed"),
    [
        ("req-1", "req-1"),
        ("", ""),
        ("a\r\nSet-Cookie: x", "a??Set-Cookie: x"),
        ("密钥", "??"),
        ("x" * 5000, "x" * 1024),
    ],
)
def test_headers_echo_the_request_id_cleaned(sent: str, echoed: str) -> None:
    lines = protocol.headers(sent).decode("ascii").split("\r\n")
    assert lines.pop() == ""
    headers = dict(line.split(": ", 1) for line in lines)
    assert len(lines) == len(headers) == 3
    assert headers["x-xki-kms-request-id"] == echoed
    assert headers["x-xki-specification"] == "1.0.0"
    assert headers["x-xki-server"].startswith("xkiproxy/")


def test_secrets_are_not_in_any_repr() -> None:
    marker = b"PLAINTEXT-MARKER"
    operation = decode("encrypt", encrypt(Plaintext=b64(marker), Aad=b64(marker)))
    results = [
        operation,
        Encrypted(marker, bytes(12), 1, Algorithm.AES_GCM, None),
        Decrypted(marker, 1, Algorithm.AES_GCM, None),
        RandomBytes(marker),
        decode("decrypt", decrypt(CiphertextBlob=b64(ENVELOPE_V1 + marker), Aad=b64(marker))),
    ]
    assert not [result for result in results if "MARKER" in repr(result)]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
field_names = st.sampled_from(
    ["Plaintext", "CiphertextBlob", "Iv", "Aad", "Algorithm", "PaddingMode", "externalKeyId",
     "Length", "OutputForm", "PublicKeyBlob", "WrappingKeySpec", "WrappingAlgorithm"]
)  # fmt: skip
field_values = json_values | st.binary(max_size=64).map(b64) | st.sampled_from(
    ["AES_GCM", "AES_CBC", "AES_ECB", "SM4_GCM", "PKCS7_PADDING", "NO_PADDING", "PLAIN",
     "PUBLIC_KEY_WRAPPED", "NONE", "RSA_2048", "EC_SM2", "SM2PKE", "RSAES_OAEP_SHA1", RSA_2048]
)  # fmt: skip


def decode_or_refuse(body: bytes, key: str) -> None:
    for call, _ in CALLS:
        try:
            caller, fields = protocol.open(call, body, SIGNER)
            protocol.decode(call, key, fields)
            protocol.headers(caller.request_id)
        except Refusal as error:
            assert 400 <= error.status < 500
        except OperationError as error:
            assert 400 <= protocol.refuse(error).status < 500


@given(st.binary(max_size=300), st.text(max_size=10))
def test_any_bytes_are_decoded_or_refused(body: bytes, key: str) -> None:
    decode_or_refuse(body, key)


@given(st.dictionaries(field_names, field_values), st.text(max_size=130))
def test_any_fields_are_decoded_or_refused(fields: dict[str, Any], key: str) -> None:
    try:
        body = json.dumps({"RequestMetadata": METADATA, **fields}).encode()
    except UnicodeEncodeError:
        return
    decode_or_refuse(body, key)


@given(json_values)
def test_any_metadata_is_decoded_or_refused(metadata: Any) -> None:
    decode_or_refuse(json.dumps({"RequestMetadata": metadata}).encode(), "k")
