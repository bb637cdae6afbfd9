"""XKS bodies: any input whatever is decoded, or refused in the protocol's words."""

from __future__ import annotations

import base64
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from xkiproxy.crypto.operations import Fault, OperationError
from xkiproxy.protocols.base import Identity, Refusal, Trouble
from xkiproxy.protocols.xks import XksProtocol

METADATA = {
    "awsPrincipalArn": "arn:aws:iam::123456789012:user/Alice",
    "kmsKeyArn": "arn:aws:kms:us-east-2:123456789012:/key/1234abcd",
    "kmsOperation": "Encrypt",
    "kmsRequestId": "4112f4d6-db54-4af4-ae30-c55a22a8dfae",
}
CALLS = ("health", "metadata", "encrypt", "decrypt")

protocol = XksProtocol()
SIGNER = Identity("AKIDEXAMPLE", "", 0.0)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from(
    ["plaintext", "ciphertext", "initializationVector", "authenticationTag", "ciphertextMetadata",
     "encryptionAlgorithm", "additionalAuthenticatedData",
     "ciphertextDataIntegrityValueAlgorithm"]
)  # fmt: skip
values = (
    json_values
    | st.binary(max_size=40).map(lambda data: base64.b64encode(data).decode())
    | st.sampled_from(["AES_GCM", "SHA_256"])
)


def decode_or_refuse(body: bytes, key: str) -> None:
    for call in CALLS:
        try:
            _, fields = protocol.open(call, body, SIGNER)
            protocol.decode(call, key, fields)
        except Refusal as error:
            assert 400 <= error.status < 500
        except OperationError as error:
            assert 400 <= protocol.refuse(error).status < 500


@given(st.binary(max_size=300), st.text(max_size=10))
def test_any_bytes_are_decoded_or_refused(body: bytes, key: str) -> None:
    decode_or_refuse(body, key)


@given(st.dictionaries(names, values), st.text(max_size=130))
def test_any_fields_are_decoded_or_refused(fields: dict[str, Any], key: str) -> None:
    try:
        body = json.dumps({"requestMetadata": METADATA, **fields}).encode()
    except UnicodeEncodeError:
        return
    decode_or_refuse(body, key)


@given(json_values)
def test_any_metadata_is_decoded_or_refused(metadata: Any) -> None:
    decode_or_refuse(json.dumps({"requestMetadata": metadata}).encode(), "k")


def test_every_fault_and_trouble_has_its_words() -> None:
    for fault in Fault:
        refusal = protocol.refuse(OperationError(fault, "why"))
        fields = json.loads(protocol.encode_refusal(refusal, "id"))
        assert fields["errorName"].endswith("Exception")
        assert 400 <= refusal.status < 600
    for trouble in Trouble:
        assert protocol.refuse(trouble).code.endswith("Exception")
