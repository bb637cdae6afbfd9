"""The client's side of XKS: signed requests as AWS KMS sends them, and their answers."""

from __future__ import annotations

import base64
import hmac
from collections.abc import Mapping
from datetime import UTC, datetime

import orjson

from xkiproxy.crypto import envelope
from xkiproxy.protocols.base import Fields
from xkiproxy.protocols.client import (
    Answer,
    ArgumentError,
    Arguments,
    Call,
    Request,
    Signer,
    answer_fields,
    pick,
    wire_fields,
)
from xkiproxy.protocols.xks import messages
from xkiproxy.protocols.xks.protocol import XksProtocol
from xkiproxy.protocols.xks.sigv4 import sign

CONTENT_TYPE = "application/json"

# Whom and what AWS KMS would name; the account is the one of its documentation.
_ACCOUNT = "123456789012"
_PRINCIPAL = f"arn:aws:iam::{_ACCOUNT}:user/xkiproxy-call"
_KEY = "1234abcd-12ab-34cd-56ef-1234567890ab"

_ALGORITHM = "encryptionAlgorithm"
_AES_GCM = "AES_GCM"
_AAD = "additionalAuthenticatedData"
_METADATA = "ciphertextMetadata"
_INTEGRITY_ALGORITHM = "ciphertextDataIntegrityValueAlgorithm"
_INTEGRITY_VALUE = "ciphertextDataIntegrityValue"

_CIPHER = {"algorithm": _ALGORITHM, "aad": _AAD}
_ENCRYPT = {"plaintext": "plaintext", "integrity": _INTEGRITY_ALGORITHM}
_CALLS = {
    "health": Call("health", "KmsHealthCheck"),
    "meta": Call("metadata", "CreateKey"),
    "encrypt": Call("encrypt", "Encrypt", _ENCRYPT | _CIPHER),
    # The ciphertext has four parts, too many for options: they come by `stored_fields`.
    "decrypt": Call("decrypt", "Decrypt", _CIPHER),
}


class XksClient:
    """XKS as AWS KMS speaks it."""

    name = XksProtocol.name
    base_path = XksProtocol.base_path
    default_region = "us-east-1"
    hashes: tuple[str, ...] = ("sha256",)
    calls: Mapping[str, Call] = _CALLS
    plaintext_field = "plaintext"
    # All that is wrong with a signature has one code. The proxy allows 5 minutes; at 4 look there.
    date_errors: Mapping[str, float] = {"AuthenticationFailedException": 240.0}

    def fields(self, call: str, arguments: Arguments) -> Fields:
        """The parameters of a call; raises ArgumentError."""
        fields = wire_fields(_CALLS[call], arguments)
        if fields.pop(_INTEGRITY_ALGORITHM, False):
            fields[_INTEGRITY_ALGORITHM] = "SHA_256"
        if "algorithm" in _CALLS[call].parameters:
            algorithm = fields.setdefault(_ALGORITHM, _AES_GCM)
            if algorithm != _AES_GCM:
                raise ArgumentError("algorithm", f"must be {_AES_GCM}")
        return fields

    def stored_fields(self, encrypted: Fields) -> Fields:
        """The ciphertext, its IV and tag, and the metadata if there is any."""
        parts = ("ciphertext", "initializationVector", "authenticationTag")
        return pick(encrypted, parts, (_METADATA,))

    def build_request(
        self,
        call: str,
        path: str,
        fields: Fields,
        signer: Signer,
        *,
        host: str,
        now: float,
        nonce: str,
        kms_request_id: str,
    ) -> Request:
        """Sign a call by SigV4."""
        del nonce  # XKS has none
        metadata = _request_metadata(_CALLS[call], signer.region, kms_request_id)
        body = orjson.dumps({"requestMetadata": metadata, **fields})
        headers = {
            "host": host,
            "content-type": CONTENT_TYPE,
            "x-amz-date": datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%SZ"),
        }
        authorization = sign(
            "POST",
            path,
            headers,
            body,
            access_key_id=signer.access_key_id,
            secret=signer.secret,
            region=signer.region,
        )
        return Request(path, headers | {"authorization": authorization}, body)

    def read_answer(self, status: int, body: bytes) -> Answer:
        """Read the body of an answer, which has no request ID; raises ValueError."""
        fields = answer_fields(body)
        if status == 200:
            return Answer(status, "", fields)
        code, message = str(fields.get("errorName", "")), str(fields.get("errorMessage", ""))
        return Answer(status, "", fields, code, message)

    def verify_answer(self, sent: Fields, answer: Answer) -> None:
        """Compute the integrity value anew, if one was asked for; raises ValueError."""
        if _INTEGRITY_ALGORITHM not in sent:
            return
        expected = envelope.integrity_value(
            _binary(sent, _AAD),
            _binary(answer.fields, _METADATA),
            _binary(answer.fields, "initializationVector"),
            _binary(answer.fields, "ciphertext") + _binary(answer.fields, "authenticationTag"),
        )
        if not hmac.compare_digest(expected, _binary(answer.fields, _INTEGRITY_VALUE)):
            raise ValueError(f"{_INTEGRITY_VALUE} is not that of the answer")


def _request_metadata(call: Call, region: str, kms_request_id: str) -> dict[str, str]:
    """What KMS says of this call: no more than the call must have."""
    values = {
        "kmsRequestId": kms_request_id,
        "kmsOperation": call.operation,
        "awsPrincipalArn": _PRINCIPAL,
        "kmsKeyArn": f"arn:aws:kms:{region}:{_ACCOUNT}:key/{_KEY}",
    }
    fields = messages.request_metadata(call.part).fields
    return {field.name: values[field.name] for field in fields if field.required}


def _binary(fields: Fields, name: str) -> bytes:
    """The bytes of a field, none if it is absent; raises ValueError if it is no Base64."""
    try:
        return base64.b64decode(fields.get(name, ""), validate=True)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is not Base64") from None
