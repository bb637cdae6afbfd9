"""EKM bodies: what is read from them, what is refused and in which words. No server, no KMI."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from google_cloud import ACCOUNT, AUDIENCE, RESOURCE, SigningKey, claims, key_set, request
from hypothesis import given
from hypothesis import strategies as st

from xkiproxy.crypto import envelope
from xkiproxy.crypto.algorithms import Algorithm
from xkiproxy.crypto.caller import Caller
from xkiproxy.crypto.operations import (
    CiphertextFormat,
    Decrypt,
    Decrypted,
    Encrypt,
    Encrypted,
    Fault,
    Health,
    OperationError,
)
from xkiproxy.protocols.base import Identity, Refusal, SignedRequest, Trouble
from xkiproxy.protocols.ekm import EkmProtocol, errors, messages
from xkiproxy.protocols.ekm.tokens import TokenVerifier, parse_keys

SIGNER = Identity(ACCOUNT, "", 0.0)
TOKENS = TokenVerifier(AUDIENCE, [ACCOUNT], {})
IV, CIPHERTEXT, TAG = b"iv-iv-iv-iv-", b"ciphertext", b"t" * 16

protocol = EkmProtocol(TOKENS)
raw = EkmProtocol(TOKENS, ciphertext_format=CiphertextFormat.RAW)
choosy = EkmProtocol(TOKENS, {"CUSTOMER_INITIATED_ACCESS"})


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def read(call: str, fields: Any, key: str = "k", by: EkmProtocol = protocol) -> tuple[Caller, Any]:
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    caller, parsed = by.open(call, body, SIGNER)
    return caller, by.decode(call, key, parsed)


def refused(call: str, fields: Any, key: str = "k", by: EkmProtocol = protocol) -> dict[str, Any]:
    """The body of the refusal, which names the field that is at fault if there is one."""
    try:
        read(call, fields, key, by)
    except OperationError as error:
        refusal = by.refuse(error)
    except Refusal as error:
        refusal = error
    else:
        pytest.fail("it was taken")
    found = json.loads(by.encode_refusal(refusal, "id"))
    assert found["code"] == errors.CODES[refusal.code]
    assert refusal.status in errors.codes()
    assert refusal.code in errors.codes()[refusal.status]
    return {"status": refusal.status, "name": refusal.code, **found}


def field(found: dict[str, Any]) -> str:
    (detail,) = found["details"]
    assert detail["@type"] == "type.googleapis.com/google.rpc.BadRequest"
    (violation,) = detail["fieldViolations"]
    assert set(violation) == {"field", "description"}
    return violation["field"]


def test_the_protocol_verifies_tokens() -> None:
    google = SigningKey("google-1")
    keys = parse_keys(key_set(google), "a test")
    by = EkmProtocol(TokenVerifier(AUDIENCE, [ACCOUNT], keys))
    headers = [(b"authorization", b"Bearer " + google.sign(claims(1000)).encode())]
    signed = SignedRequest("POST", "/x", "", headers, b"")
    assert by.authenticate(signed, None, 1000.0).access_key_id == ACCOUNT  # type: ignore[arg-type]


def test_a_wrap_request_with_who_asks_and_why() -> None:
    fields = request(plaintext=b64(b"dek"), additionalAuthenticatedData=b64(b"aad"), new={"a": 1})
    caller, operation = read("wrap", fields)
    assert caller == Caller(
        operation="wrap",
        key_arn=RESOURCE,
        principal=ACCOUNT,
        access_reason="CUSTOMER_INITIATED_ACCESS",
    )
    assert operation == Encrypt("k", b"dek", algorithm=Algorithm.AES_GCM, aad=b"aad")


def test_an_unwrap_request_has_the_parts_of_the_blob() -> None:
    blob = envelope.metadata(7) + IV + CIPHERTEXT + TAG
    _, operation = read("unwrap", request(wrappedBlob=b64(blob)))
    assert operation == Decrypt("k", CIPHERTEXT + TAG, IV, 7, algorithm=Algorithm.AES_GCM)
    _, operation = read("unwrap", request(wrappedBlob=b64(blob[5:])), by=raw)
    assert (operation.iv, operation.ciphertext) == (IV, CIPHERTEXT + TAG)
    assert operation.version is None
    assert operation.format is CiphertextFormat.RAW


def test_answers() -> None:
    encrypt, decrypt = read("wrap", request(plaintext="AAAA"))[1], None
    made = Encrypted(CIPHERTEXT + TAG, IV, 7, Algorithm.AES_GCM, None)
    body = json.loads(protocol.encode(encrypt, made, "id"))
    assert body == {"wrappedBlob": b64(envelope.metadata(7) + IV + CIPHERTEXT + TAG)}
    body = json.loads(raw.encode(encrypt, made, "id"))
    assert body == {"wrappedBlob": b64(IV + CIPHERTEXT + TAG)}
    opened = Decrypted(b"dek", 7, Algorithm.AES_GCM, None)
    assert json.loads(protocol.encode(decrypt, opened, "id")) == {"plaintext": b64(b"dek")}
    assert protocol.headers("anything") == b""


def test_a_blob_that_could_not_be_read_is_not_given_out() -> None:
    """A key manager whose IVs are of another size would make ciphertexts that nobody can part."""
    made = Encrypted(CIPHERTEXT + TAG, bytes(16), 7, Algorithm.AES_GCM, None)
    with pytest.raises(OperationError) as caught:
        protocol.encode(read("wrap", request(plaintext="AAAA"))[1], made, "id")
    assert caught.value.fault is Fault.INTERNAL


def test_what_is_no_answer_to_it_is_a_fault_of_ours() -> None:
    with pytest.raises(TypeError):
        protocol.encode(Health(), None, "id")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["-_8=", "-_8", "+/8=", "+/8"]
)  # fmt: skip
def test_base64_is_of_either_alphabet_and_padded_or_not(text: str) -> None:
    assert read("wrap", {"plaintext": text})[1].plaintext == b"\xfb\xff"


@pytest.mark.parametrize("text", ["+_8=", "A", "AA=", "AAA=A", "AA A", "AA\n==", "====", "é==="])
def test_what_is_no_base64_is_refused(text: str) -> None:
    assert field(refused("wrap", {"plaintext": text})) == "plaintext"


def test_names_are_those_of_json_or_of_the_definition() -> None:
    fields = {
        "plaintext": "AAAA",
        "additional_authenticated_data": b64(b"aad"),
        "additional_context": {
            "relative_resource_name": RESOURCE,
            "access_reason_context": {"reason": "GOOGLE_INITIATED_SERVICE"},
        },
    }
    caller, operation = read("wrap", fields)
    assert (caller.key_arn, caller.access_reason) == (RESOURCE, "GOOGLE_INITIATED_SERVICE")
    assert operation.aad == b"aad"
    both = {**fields, "additionalAuthenticatedData": "AAAA"}
    assert field(refused("wrap", both)) == "additionalAuthenticatedData"


@pytest.mark.parametrize(
    ("context", "reason"),
    [
        ({"accessReasonContext": {"reason": "GOOGLE_INITIATED_REVIEW"}}, "GOOGLE_INITIATED_REVIEW"),
        ({"accessReasonContext": {"reason": "ONE_OF_TOMORROW"}}, "ONE_OF_TOMORROW"),
        ({"accessReasonContext": {"reason": 5}}, "CUSTOMER_INITIATED_ACCESS"),
        ({"accessReasonContext": {"reason": 99}}, "99"),
        ({"accessReasonContext": {"reason": ""}}, "REASON_UNSPECIFIED"),
        ({"accessReasonContext": {}}, "REASON_UNSPECIFIED"),
        ({"accessReasonContext": None}, "REASON_UNSPECIFIED"),
        ({}, "REASON_UNSPECIFIED"),
        (None, "REASON_UNSPECIFIED"),
    ],
)
def test_a_reason_is_a_name_or_a_number_or_not_said(context: Any, reason: str) -> None:
    caller, _ = read("wrap", {"plaintext": "AAAA", "additionalContext": context})
    assert caller.access_reason == reason


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({}, "plaintext"),
        ({"plaintext": None}, "plaintext"),
        ({"plaintext": ""}, "plaintext"),
        ({"plaintext": 1}, "plaintext"),
        ({"plaintext": "AAAA", "additionalAuthenticatedData": []}, "additionalAuthenticatedData"),
        ({"plaintext": "AAAA", "additionalAuthenticatedData": b64(bytes(65536))},
         "additionalAuthenticatedData"),
        ({"plaintext": "AAAA", "additionalContext": []}, "additionalContext"),
        ({"plaintext": "AAAA", "additionalContext": {"relativeResourceName": 1}},
         "additionalContext.relativeResourceName"),
        ({"plaintext": "AAAA", "additionalContext": {"accessReasonContext": "x"}},
         "additionalContext.accessReasonContext"),
        ({"plaintext": "AAAA", "additionalContext": {"accessReasonContext": {"reason": True}}},
         "additionalContext.accessReasonContext.reason"),
        ({"plaintext": "AAAA", "additionalContext": {"accessReasonContext": {"reason": 1.5}}},
         "additionalContext.accessReasonContext.reason"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(fields: dict[str, Any], wrong: str) -> None:
    found = refused("wrap", fields)
    assert (found["status"], found["code"]) == (400, 3)
    assert field(found) == wrong


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b'"x"'])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    found = refused("wrap", body)
    assert (found["status"], found["code"]) == (400, 3)
    assert field(found) == "body"  # without details it would be a ciphertext that is wrong


@pytest.mark.parametrize("key", ["", "a/b", "a b", "a%20b", "x" * 129, "é"])
def test_a_key_id_has_a_form(key: str) -> None:
    assert field(refused("wrap", request(plaintext="AAAA"), key)) == "key"


@pytest.mark.parametrize(
    "blob", [b"\x01", bytes(5) + IV + TAG, b"\x02\0\0\0\x01" + IV + TAG,
             envelope.metadata(1) + IV + TAG[1:], envelope.metadata(1)]
)  # fmt: skip
def test_a_blob_that_cannot_be_ours_failed_to_decrypt(blob: bytes) -> None:
    found = refused("unwrap", request(wrappedBlob=b64(blob)))
    assert (found["status"], found["name"]) == (400, "INVALID_ARGUMENT")
    assert "details" not in found


def test_a_blob_without_metadata_may_be_too_short_as_well() -> None:
    assert refused("unwrap", request(wrappedBlob=b64(bytes(27))), by=raw)["status"] == 400
    assert read("unwrap", request(wrappedBlob=b64(bytes(28))), by=raw)[1].iv == bytes(12)


@pytest.mark.parametrize("call", sorted(messages.OTHER_METHODS))
def test_calls_that_are_not_offered_are_said_to_be(call: str) -> None:
    found = refused(call, request())
    assert (found["status"], found["code"]) == (501, 12)


@pytest.mark.parametrize("reason", [None, "", "GOOGLE_INITIATED_SERVICE", "customer", 2, 99])
@pytest.mark.parametrize("call", ["wrap", "unwrap"])
def test_a_reason_that_is_not_allowed_is_refused_with_its_field(call: str, reason: Any) -> None:
    fields = request(reason, plaintext="AAAA", wrappedBlob=b64(envelope.metadata(1) + IV + TAG))
    found = refused(call, fields, by=choosy)
    assert (found["status"], found["name"]) == (403, "PERMISSION_DENIED")
    message = "WrapRequest" if call == "wrap" else "UnwrapRequest"
    path = "additionalContext.accessReasonContext.reason"
    assert field(found) == f"google.cloud.ekms.v0.{message}.{path}"
    with pytest.raises(Refusal) as caught:
        read(call, fields, by=choosy)
    assert caught.value.reason == "access_reason"


def test_a_reason_that_is_allowed_is_taken() -> None:
    for reason in ("CUSTOMER_INITIATED_ACCESS", 5):
        read("wrap", request(reason, plaintext="AAAA"), by=choosy)


@pytest.mark.parametrize("why", [*Fault, *Trouble])
def test_every_failure_has_its_words(why: Fault | Trouble) -> None:
    failure = OperationError(why, "planted") if isinstance(why, Fault) else why
    refusal = protocol.refuse(failure)
    body = json.loads(protocol.encode_refusal(refusal, "id"))
    assert body == {"code": errors.CODES[refusal.code], "message": refusal.message}
    assert refusal.code in errors.codes()[refusal.status]


def test_only_what_the_owner_forbids_is_permission_denied() -> None:
    """Cloud EKM disables a key version at that: no state and no mistake may do so."""
    denied = [why for why in Fault if protocol.refuse(OperationError(why, "")).status == 403]
    assert denied == [Fault.ACCESS_DENIED]
    assert all(protocol.refuse(why).status != 403 for why in Trouble)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
) | st.binary(max_size=60).map(b64)
names = st.sampled_from(
    ["plaintext", "wrappedBlob", "wrapped_blob", "additionalAuthenticatedData",
     "additional_authenticated_data", "additionalContext", "relativeResourceName",
     "accessReasonContext", "reason"]
)  # fmt: skip
objects = st.dictionaries(names, values | st.dictionaries(names, values, max_size=3), max_size=5)


def decode_or_refuse(body: bytes, key: str) -> None:
    for call in protocol.key_methods:
        for by in (protocol, raw, choosy):
            try:
                read(call, body, key, by)
            except Refusal as error:
                assert 400 <= error.status <= 501
            except OperationError as error:
                assert 400 <= by.refuse(error).status < 500


@given(st.binary(max_size=300), st.text(max_size=10))
def test_any_bytes_are_decoded_or_refused(body: bytes, key: str) -> None:
    decode_or_refuse(body, key)


@given(objects, st.sampled_from(["k", "", "é"]))
def test_any_object_is_decoded_or_refused(fields: dict[str, Any], key: str) -> None:
    decode_or_refuse(json.dumps(fields).encode(), key)


@given(st.binary(min_size=1, max_size=200), st.booleans(), st.booleans())
def test_bytes_come_through_in_each_form_of_base64(data: bytes, safe: bool, padded: bool) -> None:
    text = (base64.urlsafe_b64encode if safe else base64.b64encode)(data).decode()
    text = text if padded else text.rstrip("=")
    assert read("wrap", {"plaintext": text})[1].plaintext == data


@given(st.binary(max_size=60), st.binary(min_size=12, max_size=12), st.integers(1, 2**32 - 1))
def test_what_wrap_gives_out_unwrap_takes_apart(data: bytes, iv: bytes, version: int) -> None:
    made = Encrypted(data + TAG, iv, version, Algorithm.AES_GCM, None)
    for by in (protocol, raw):
        blob = json.loads(by.encode(read("wrap", {"plaintext": "AAAA"})[1], made, "id"))
        _, operation = read("unwrap", blob, by=by)
        assert (operation.ciphertext, operation.iv) == (made.ciphertext, iv)
        assert operation.version == (version if by is protocol else None)
