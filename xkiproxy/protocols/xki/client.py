"""The client's side of XKI: signed requests as Alibaba Cloud KMS sends them, and their answers."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

import orjson

from xkiproxy.protocols.base import Fields
from xkiproxy.protocols.client import (
    Answer,
    Arguments,
    Call,
    Request,
    Signer,
    answer_fields,
    pick,
    wire_fields,
)
from xkiproxy.protocols.xki.acs4 import SignatureAlgorithm, sign
from xkiproxy.protocols.xki.protocol import XkiProtocol

API_VERSION = "2016-01-20"
"""What `x-acs-version` says: the version of the KMS API. A proxy does not look at it."""

CONTENT_TYPE = "application/json"

_ALGORITHMS = {"sha256": SignatureAlgorithm.HMAC_SHA256, "sm3": SignatureAlgorithm.HMAC_SM3}

_CIPHER = {"algorithm": "Algorithm", "iv": "Iv", "aad": "Aad", "padding": "PaddingMode"}
_CALLS = {
    "health": Call("health", "Health"),
    "meta": Call("meta", "DescribeKey"),
    "encrypt": Call("encrypt", "Encrypt", {"plaintext": "Plaintext"} | _CIPHER),
    "decrypt": Call("decrypt", "Decrypt", {"ciphertext": "CiphertextBlob"} | _CIPHER),
    "random": Call(
        "random",
        "GenerateRandom",
        {
            "length": "Length",
            "output_form": "OutputForm",
            "public_key": "PublicKeyBlob",
            "wrapping_key_spec": "WrappingKeySpec",
            "wrapping_algorithm": "WrappingAlgorithm",
        },
    ),
}


class XkiClient:
    """XKI as Alibaba Cloud KMS speaks it."""

    name = XkiProtocol.name
    base_path = XkiProtocol.base_path
    default_region = "cn-hangzhou"
    hashes: tuple[str, ...] = tuple(_ALGORITHMS)
    calls: Mapping[str, Call] = _CALLS
    plaintext_field = "Plaintext"
    date_errors: Mapping[str, float] = {"InvalidAcsDate": 0.0}

    def fields(self, call: str, arguments: Arguments) -> Fields:
        """The parameters of a call; what was not given is left out, for the proxy's default."""
        return wire_fields(_CALLS[call], arguments)

    def stored_fields(self, encrypted: Fields) -> Fields:
        """The blob, and with what it was made."""
        return pick(encrypted, ("CiphertextBlob",), ("Iv", "Algorithm", "PaddingMode"))

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
        """Sign a call by ACS4."""
        algorithm = _ALGORITHMS[signer.hash]
        action = _CALLS[call].operation
        metadata = {"KmsRequestId": kms_request_id, "KmsOperation": f"kms:{action}"}
        body = orjson.dumps({"RequestMetadata": metadata, **fields})
        headers = {
            "host": host,
            "content-type": CONTENT_TYPE,
            "x-acs-accesskey-id": signer.access_key_id,
            "x-acs-action": action,
            "x-acs-version": API_VERSION,
            "x-acs-date": datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%SZ"),
            "x-acs-signature-nonce": nonce,
            algorithm.content_header: algorithm.hex_digest(body).decode("ascii"),
        }
        authorization = sign(
            "POST",
            path,
            "",
            headers,
            body,
            access_key_id=signer.access_key_id,
            secret=signer.secret,
            region=signer.region,
            algorithm=algorithm,
        )
        return Request(path, headers | {"authorization": authorization}, body)

    def read_answer(self, status: int, body: bytes) -> Answer:
        """Read the body of an answer; raises ValueError."""
        fields = answer_fields(body)
        request_id = str(fields.pop("RequestId", ""))
        if status == 200:
            return Answer(status, request_id, fields)
        code, message = str(fields.get("Code", "")), str(fields.get("Message", ""))
        return Answer(status, request_id, fields, code, message)

    def verify_answer(self, sent: Fields, answer: Answer) -> None:
        """An answer of XKI says nothing of itself."""
