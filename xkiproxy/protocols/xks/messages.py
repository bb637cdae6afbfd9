"""The messages of XKS: every wire name stands here, in the order of docs/protocols/xks.md."""

from __future__ import annotations

from typing import Any

from xkiproxy import __version__
from xkiproxy.crypto import envelope
from xkiproxy.crypto.algorithms import TAG_SIZE, Algorithm, KeySpec, Usage
from xkiproxy.crypto.caller import Caller
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
from xkiproxy.protocols.base import Fields, Refusal
from xkiproxy.protocols.fields import (
    Binary,
    Field,
    Group,
    Text,
    Texts,
    Whole,
    base64,
    caller_reader,
)
from xkiproxy.protocols.xks import errors
from xkiproxy.protocols.xks.errors import invalid

VENDOR = "xkiproxy"

IV_SIZES = (12, 16)
MAX_METADATA_SIZE = 20

_ALGORITHM = "AES_GCM"
_INTEGRITY = "SHA_256"

# ---- requests -----------------------------------------------------------------------------------

_CALLER = {
    "kmsRequestId": "request_id",
    "kmsOperation": "operation",
    "kmsKeyArn": "key_arn",
    "awsPrincipalArn": "principal",
    "awsSourceVpc": "source_vpc",
    "awsSourceVpce": "source_vpc_endpoint",
    "kmsViaService": "via_service",
}
_CALLER_REQUIRED = {
    "health": frozenset({"kmsRequestId", "kmsOperation"}),
    "metadata": frozenset({"kmsRequestId", "kmsOperation", "awsPrincipalArn"}),
    "encrypt": frozenset({"kmsRequestId", "kmsOperation", "awsPrincipalArn", "kmsKeyArn"}),
    "decrypt": frozenset({"kmsRequestId", "kmsOperation", "awsPrincipalArn", "kmsKeyArn"}),
}
_read_caller = caller_reader(_CALLER)

_ENCRYPTION_ALGORITHM = Text("encryptionAlgorithm", "The only one.", True, (_ALGORITHM,))
_AAD = Binary(
    "additionalAuthenticatedData", "What the tag covers beside.", max_size=envelope.MAX_AAD_SIZE
)
_PLAINTEXT = Binary("plaintext", "What to encrypt.", required=True)
_INTEGRITY_ALGORITHM = Text(
    "ciphertextDataIntegrityValueAlgorithm", "Asks for an integrity value.", False, (_INTEGRITY,)
)
_CIPHERTEXT = Binary("ciphertext", "As long as its plaintext.", required=True)
_IV = Binary("initializationVector", "12 or 16 bytes.", required=True)
_TAG = Binary("authenticationTag", "16 bytes.", required=True)
_METADATA = Binary(
    "ciphertextMetadata", "What encrypt gave out beside.", max_size=MAX_METADATA_SIZE
)

REQUESTS: dict[str, tuple[Field, ...]] = {
    "health": (),
    "metadata": (),
    "encrypt": (_PLAINTEXT, _ENCRYPTION_ALGORITHM, _AAD, _INTEGRITY_ALGORITHM),
    "decrypt": (_CIPHERTEXT, _IV, _TAG, _ENCRYPTION_ALGORITHM, _AAD, _METADATA),
}
"""The parameters of each call, beside `request_metadata`."""

# ---- answers ------------------------------------------------------------------------------------

ANSWERS: dict[str, tuple[Field, ...]] = {
    "health": (
        Whole("xksProxyFleetSize", "How many proxies.", 1, 1_000_000, 1, required=True),
        Text("xksProxyVendor", "Who made the proxy.", True),
        Text("xksProxyModel", "Its name and version.", True),
        Text("ekmVendor", "Who made the key manager.", True),
        Group(
            "ekmFleetDetails",
            "The key managers.",
            (
                Text("id", "Its name.", True),
                Text("model", "Its type.", True),
                Text("healthStatus", "How it is.", True, tuple(Availability)),
            ),
            required=True,
            many=True,
        ),
    ),
    "metadata": (
        Text("keySpec", "Type and size.", True, ("AES_256",)),
        Texts("keyUsage", "What it is for.", ("ENCRYPT", "DECRYPT"), required=True),
        Text("keyStatus", "Its state at the proxy.", True, ("ENABLED", "DISABLED")),
    ),
    "encrypt": (
        _CIPHERTEXT,
        _IV,
        _TAG,
        _METADATA,
        Binary("ciphertextDataIntegrityValue", "SHA-256 of all of it, when asked for."),
    ),
    "decrypt": (Binary("plaintext", "What was encrypted.", required=True),),
}
ERROR: tuple[Field, ...] = (
    Text("errorName", "What is wrong.", True),
    Text("errorMessage", "In words."),
)


def request_metadata(call: str) -> Group:
    """`requestMetadata` as a call must have it."""
    needed = _CALLER_REQUIRED[call]
    fields = tuple(Text(name, "Opaque.", name in needed) for name in _CALLER)
    return Group("requestMetadata", "What KMS says of the request.", fields, required=True)


def request_fields(call: str) -> tuple[Field, ...]:
    """All fields of a request."""
    return (request_metadata(call), *REQUESTS[call])


def answer_fields(call: str) -> tuple[Field, ...]:
    """All fields of a good answer."""
    return ANSWERS[call]


def decode_caller(call: str, fields: Fields) -> Caller:
    """`requestMetadata`: which fields it must have depends on the call. Raises Refusal."""
    metadata = fields.get("requestMetadata")
    if not isinstance(metadata, dict):
        raise invalid("requestMetadata", "must be an object")
    if _CALLER_REQUIRED[call] <= metadata.keys():
        caller = _read_caller(metadata)
        if caller is not None:
            return caller
    values = {}
    for wire_name, name in _CALLER.items():
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
    integrity = fields.get(_INTEGRITY_ALGORITHM.name)
    if integrity is not None and integrity != _INTEGRITY:
        raise invalid(_INTEGRITY_ALGORITHM.name, f"must be {_INTEGRITY}")
    return Encrypt(
        key_id=key_id,
        plaintext=_PLAINTEXT.require(fields, errors),
        algorithm=Algorithm.AES_GCM,
        aad=_AAD.read(fields, errors) or b"",
        format=form,
        integrity=integrity is not None,
    )


def decode_decrypt(key_id: str, fields: Fields, form: CiphertextFormat) -> Decrypt:
    """A decrypt request; raises Refusal, or OperationError if it cannot be one of ours."""
    _check_algorithm(fields)
    ciphertext = _CIPHERTEXT.require(fields, errors)
    iv = _IV.require(fields, errors)
    tag = _TAG.require(fields, errors)
    metadata = _METADATA.read(fields, errors) or b""
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
        aad=_AAD.read(fields, errors) or b"",
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
    if fields.get(_ENCRYPTION_ALGORITHM.name) != _ALGORITHM:
        raise invalid(_ENCRYPTION_ALGORITHM.name, f"must be {_ALGORITHM}")
