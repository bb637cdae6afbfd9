"""The messages of XKS: every wire name stands here, in the order of docs/protocols/xks.md."""

from __future__ import annotations

from typing import Any

from xkiproxy import __version__
from xkiproxy.crypto import envelope
from xkiproxy.crypto.algorithms import TAG_SIZE, Algorithm, KeySpec, Usage
from xkiproxy.crypto.operations import (
    Availability,
    CiphertextFormat,
    Decrypt,
    Decrypted,
    Encrypt,
    Encrypted,
    Fault,
    HealthReport,
    KeyDescription,
    KeyState,
    OperationError,
    invalid_ciphertext,
)
from xkiproxy.protocols.base import Caller, Fields, Refusal
from xkiproxy.protocols.json_fields import base64, binary
from xkiproxy.protocols.xks.errors import invalid

VENDOR = "xkiproxy"

IV_SIZES = (12, 16)
MAX_METADATA_SIZE = 20

_CALLER_FIELDS = {
    "kmsRequestId": "request_id",
    "kmsOperation": "operation",
    "kmsKeyArn": "key_arn",
    "awsPrincipalArn": "principal",
    "awsSourceVpc": "source_vpc",
    "kmsViaService": "via_service",
}
_CALLER_REQUIRED = {
    "health": ("kmsRequestId", "kmsOperation"),
    "metadata": ("kmsRequestId", "kmsOperation", "awsPrincipalArn"),
    "encrypt": ("kmsRequestId", "kmsOperation", "awsPrincipalArn", "kmsKeyArn"),
    "decrypt": ("kmsRequestId", "kmsOperation", "awsPrincipalArn", "kmsKeyArn"),
}
_ALGORITHM = "AES_GCM"
_INTEGRITY = "SHA_256"


def decode_caller(call: str, fields: Fields) -> Caller:
    """`requestMetadata`: which fields it must have depends on the call. Raises Refusal."""
    metadata = fields.get("requestMetadata")
    if not isinstance(metadata, dict):
        raise invalid("requestMetadata", "must be an object")
    values = {}
    for wire_name, name in _CALLER_FIELDS.items():
        value = metadata.get(wire_name)
        if value is None:
            if wire_name in _CALLER_REQUIRED[call]:
                raise invalid(f"requestMetadata.{wire_name}", "is required")
            continue
        if not isinstance(value, str):
            raise invalid(f"requestMetadata.{wire_name}", "must be a string")
        values[name] = value
    return Caller(**values)


def decode_encrypt(key_id: str, fields: Fields, form: CiphertextFormat) -> Encrypt:
    """An encrypt request; raises Refusal."""
    _check_algorithm(fields)
    integrity = fields.get("ciphertextDataIntegrityValueAlgorithm")
    if integrity not in {None, _INTEGRITY}:
        raise invalid("ciphertextDataIntegrityValueAlgorithm", f"must be {_INTEGRITY}")
    return Encrypt(
        key_id=key_id,
        plaintext=_required(fields, "plaintext"),
        algorithm=Algorithm.AES_GCM,
        aad=_aad(fields),
        format=form,
        integrity=integrity is not None,
    )


def decode_decrypt(key_id: str, fields: Fields, form: CiphertextFormat) -> Decrypt:
    """A decrypt request; raises Refusal, or OperationError if it cannot be one of ours."""
    _check_algorithm(fields)
    ciphertext = _required(fields, "ciphertext")
    iv = _required(fields, "initializationVector")
    tag = _required(fields, "authenticationTag")
    metadata = binary(fields, "ciphertextMetadata", invalid) or b""
    if len(metadata) > MAX_METADATA_SIZE:
        raise invalid("ciphertextMetadata", f"must be at most {MAX_METADATA_SIZE} bytes")
    if len(iv) not in IV_SIZES or len(tag) != TAG_SIZE:
        raise invalid_ciphertext()
    if form is CiphertextFormat.RAW and metadata:
        raise invalid_ciphertext()
    version = envelope.key_version(metadata) if form is CiphertextFormat.ENVELOPE else None
    return Decrypt(
        key_id,
        ciphertext + tag,
        iv,
        version,
        algorithm=Algorithm.AES_GCM,
        aad=_aad(fields),
        format=form,
    )


def encode_encrypted(result: Encrypted, form: CiphertextFormat) -> Fields:
    """The answer to encrypt."""
    fields = {
        "ciphertext": base64(result.ciphertext[:-TAG_SIZE]),
        "initializationVector": base64(result.iv),
        "authenticationTag": base64(result.ciphertext[-TAG_SIZE:]),
    }
    if form is CiphertextFormat.ENVELOPE:
        fields["ciphertextMetadata"] = base64(envelope.metadata(result.version))
    if result.integrity:
        fields["ciphertextDataIntegrityValue"] = base64(result.integrity)
    return fields


def encode_decrypted(result: Decrypted) -> Fields:
    """The answer to decrypt."""
    return {"plaintext": base64(result.plaintext)}


def encode_description(result: KeyDescription) -> Fields:
    """The answer to metadata; KMS uses AES-256 keys alone. Raises OperationError for others."""
    if result.spec is not KeySpec.AES_256:
        raise OperationError(Fault.UNSUPPORTED, "The key is no AES-256 key.")
    usages = {"ENCRYPT": Usage.ENCRYPT, "DECRYPT": Usage.DECRYPT}
    return {
        "keySpec": "AES_256",
        "keyUsage": [name for name, usage in usages.items() if usage in result.usage],
        "keyStatus": "ENABLED" if result.state is KeyState.ENABLED else "DISABLED",
    }


def encode_health(report: HealthReport) -> Fields:
    """The answer to health: an entry for each KMI of the key store, ten at most."""
    fleet: list[dict[str, Any]] = [
        {"id": kmi.name, "model": kmi.type, "healthStatus": _HEALTH[kmi.availability]}
        for kmi in report.kmis[:10]
    ]
    return {
        "xksProxyFleetSize": 1,
        "xksProxyVendor": VENDOR,
        "xksProxyModel": f"xkiproxy {__version__}",
        "ekmVendor": VENDOR,
        "ekmFleetDetails": fleet,
    }


_HEALTH = {
    Availability.ACTIVE: "ACTIVE",
    Availability.DEGRADED: "DEGRADED",
    Availability.UNAVAILABLE: "UNAVAILABLE",
}


def parse_refusal() -> Refusal:
    """What a body that is no JSON object gets."""
    return Refusal(400, "ValidationException", "The body is not a JSON object in UTF-8.")


def _check_algorithm(fields: Fields) -> None:
    if fields.get("encryptionAlgorithm") != _ALGORITHM:
        raise invalid("encryptionAlgorithm", f"must be {_ALGORITHM}")


def _required(fields: Fields, name: str) -> bytes:
    value = binary(fields, name, invalid)
    if value is None:
        raise invalid(name, "is required")
    return value


def _aad(fields: Fields) -> bytes:
    aad = binary(fields, "additionalAuthenticatedData", invalid) or b""
    if len(aad) > envelope.MAX_AAD_SIZE:
        raise invalid("additionalAuthenticatedData", f"is over {envelope.MAX_AAD_SIZE} bytes")
    return aad
