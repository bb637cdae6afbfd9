"""The client's side of XKI: signed requests as Alibaba Cloud KMS sends them, and their answers.

Pure, as all of a protocol: what comes from outside (time, nonce, request ID) is an argument.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import orjson

from xkiproxy.protocols.xki.acs4 import SignatureAlgorithm, sign

API_VERSION = "2016-01-20"
"""What `x-acs-version` says: the version of the KMS API. A proxy does not look at it."""

CONTENT_TYPE = "application/json"

ACTIONS = {
    "health": "Health",
    "meta": "DescribeKey",
    "encrypt": "Encrypt",
    "decrypt": "Decrypt",
    "random": "GenerateRandom",
}
"""The operation of KMS behind each call, for `x-acs-action` and `KmsOperation`."""


@dataclass(frozen=True, slots=True)
class Signer:
    """With what a request is signed."""

    access_key_id: str
    secret: str = field(repr=False)
    region: str = "cn-hangzhou"
    algorithm: SignatureAlgorithm = SignatureAlgorithm.HMAC_SHA256


@dataclass(frozen=True, slots=True)
class Request:
    """A signed request; `headers` are all that it needs but its length."""

    path: str
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: `code` and `message` are empty unless it is an error."""

    status: int
    request_id: str
    fields: Mapping[str, Any] = field(repr=False)
    code: str = ""
    message: str = ""


def call_path(external_proxy_path: str, call: str, key_id: str = "") -> str:
    """The path of a call, such as `/demo/kms/xki/v1/keys/my-key/encrypt`."""
    base = external_proxy_path.rstrip("/")
    return f"{base}/keys/{key_id}/{call}" if key_id else f"{base}/{call}"


def encrypt_fields(
    plaintext: bytes,
    *,
    algorithm: str | None = None,
    iv: str | None = None,
    aad: bytes | None = None,
    padding: str | None = None,
) -> dict[str, str]:
    """The parameters of encrypt; `iv` is Base64 already, and what is None is left out."""
    return _present(
        Plaintext=_base64(plaintext),
        Algorithm=algorithm,
        Iv=iv,
        Aad=None if aad is None else _base64(aad),
        PaddingMode=padding,
    )


def decrypt_fields(
    ciphertext_blob: str,
    *,
    algorithm: str | None = None,
    iv: str | None = None,
    aad: bytes | None = None,
    padding: str | None = None,
) -> dict[str, str]:
    """The parameters of decrypt; the blob and `iv` are Base64, and what is None is left out."""
    return _present(
        CiphertextBlob=ciphertext_blob,
        Algorithm=algorithm,
        Iv=iv,
        Aad=None if aad is None else _base64(aad),
        PaddingMode=padding,
    )


def random_fields(
    length: int | None = None,
    output_form: str | None = None,
    public_key_der: bytes | None = None,
    wrapping_key_spec: str | None = None,
    wrapping_algorithm: str | None = None,
) -> dict[str, Any]:
    """The parameters of random; what is None is left out, for the proxy's default."""
    return _present(
        Length=length,
        OutputForm=output_form,
        PublicKeyBlob=None if public_key_der is None else _base64(public_key_der),
        WrappingKeySpec=wrapping_key_spec,
        WrappingAlgorithm=wrapping_algorithm,
    )


def build_request(
    call: str,
    path: str,
    fields: Mapping[str, Any],
    signer: Signer,
    *,
    host: str,
    now: float,
    nonce: str,
    kms_request_id: str,
) -> Request:
    """Sign a call. `host` is the Host header; `now` is in seconds since the epoch."""
    metadata = {"KmsRequestId": kms_request_id, "KmsOperation": f"kms:{ACTIONS[call]}"}
    body = orjson.dumps({"RequestMetadata": metadata, **fields})
    headers = {
        "host": host,
        "content-type": CONTENT_TYPE,
        "x-acs-accesskey-id": signer.access_key_id,
        "x-acs-action": ACTIONS[call],
        "x-acs-version": API_VERSION,
        "x-acs-date": datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%SZ"),
        "x-acs-signature-nonce": nonce,
        signer.algorithm.content_header: signer.algorithm.digest(body).hex(),
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
        algorithm=signer.algorithm,
    )
    return Request(path, headers | {"authorization": authorization}, body)


def read_answer(status: int, body: bytes) -> Answer:
    """Read the body of an answer.

    Raises:
        ValueError: it is not a JSON object, so that no XKI proxy can have sent it.
    """
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise ValueError("the answer is not JSON") from None
    if not isinstance(fields, dict):
        raise ValueError("the answer is not a JSON object")
    request_id = str(fields.pop("RequestId", ""))
    if status == 200:
        return Answer(status, request_id, fields)
    code, message = str(fields.get("Code", "")), str(fields.get("Message", ""))
    return Answer(status, request_id, fields, code, message)


def _present(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
