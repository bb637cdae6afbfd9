"""The messages of EKM: every wire name stands here, in the order of docs/protocols/ekm.md.

They are protocol buffers in JSON (the ProtoJSON format of protobuf.dev): a field may be written in
lowerCamelCase or as in its definition, null and absence mean its default, and bytes come in either
alphabet of Base64, padded or not.
"""

from __future__ import annotations

import binascii
from collections.abc import Mapping, Set
from dataclasses import dataclass
from enum import Enum
from typing import Any

from xkiproxy.crypto import envelope
from xkiproxy.crypto.algorithms import IV_SIZES, TAG_SIZE, Algorithm
from xkiproxy.crypto.caller import Caller
from xkiproxy.crypto.operations import (
    CiphertextFormat,
    Decrypt,
    Decrypted,
    Encrypt,
    Encrypted,
    Fault,
    OperationError,
    invalid_ciphertext,
)
from xkiproxy.protocols.base import Fields, Refusal
from xkiproxy.protocols.ekm import errors
from xkiproxy.protocols.ekm.errors import FieldRefusal, invalid
from xkiproxy.protocols.fields import Field, Group, Text, Whole, base64, object_schema

_IV_SIZE = IV_SIZES[Algorithm.AES_GCM]
_URL_SAFE = str.maketrans("-_", "+/")
_BASE64_PATTERN = "^[A-Za-z0-9+/_-]*={0,2}$"


class AccessReason(Enum):
    """Why Google asks (Key Access Justifications), with the numbers of its definition."""

    REASON_UNSPECIFIED = 0
    CUSTOMER_INITIATED_SUPPORT = 1
    GOOGLE_INITIATED_SERVICE = 2
    THIRD_PARTY_DATA_REQUEST = 3
    GOOGLE_INITIATED_REVIEW = 4
    CUSTOMER_INITIATED_ACCESS = 5
    GOOGLE_INITIATED_SYSTEM_OPERATION = 6
    REASON_NOT_EXPECTED = 7
    MODIFIED_CUSTOMER_INITIATED_ACCESS = 8
    MODIFIED_GOOGLE_INITIATED_SYSTEM_OPERATION = 9
    GOOGLE_RESPONSE_TO_PRODUCTION_ALERT = 10
    CUSTOMER_AUTHORIZED_WORKFLOW_SERVICING = 11


_REASON_NAMES = {reason.value: reason.name for reason in AccessReason}
_UNSPECIFIED = AccessReason.REASON_UNSPECIFIED.name


@dataclass(frozen=True, slots=True)
class ProtoBytes:
    """A field of type bytes. `max_size` is in bytes, before Base64."""

    name: str
    description: str
    required: bool = False
    max_size: int | None = None

    def read(self, fields: Fields) -> bytes:
        """Its value, empty where it is absent; raises Refusal."""
        value = _get(fields, self.name)
        if value is None:
            return b""
        if not isinstance(value, str):
            raise invalid(self.name, "must be a string in Base64")
        data = _decode(value)
        if data is None:
            raise invalid(self.name, "is not valid Base64")
        if self.max_size is not None and len(data) > self.max_size:
            raise invalid(self.name, f"must be at most {self.max_size} bytes")
        return data

    def require(self, fields: Fields) -> bytes:
        """Its value; raises Refusal, also where it is absent or empty, which is the same here."""
        value = self.read(fields)
        if not value:
            raise errors.required(self.name)
        return value

    def schema(self) -> dict[str, Any]:
        """See `xkiproxy.protocols.fields.Field.schema`."""
        return {
            "type": "string",
            "contentEncoding": "base64",
            "pattern": _BASE64_PATTERN,
            "description": self.description,
        }


@dataclass(frozen=True, slots=True)
class Details:
    """The details of an error: a list of messages, each with its `@type`."""

    name: str = "details"
    required: bool = False

    def schema(self) -> dict[str, Any]:
        """See `xkiproxy.protocols.fields.Field.schema`."""
        field = (Text("field", "Its path.", True), Text("description", "What is wrong with it."))
        message = object_schema(
            (
                Text("@type", "The type of the message.", True),
                Group("fieldViolations", "The fields at fault.", field, many=True),
            )
        )
        return {"type": "array", "items": message, "description": "Which field is at fault."}


_PLAINTEXT = ProtoBytes("plaintext", "What to wrap.", required=True)
_BLOB = ProtoBytes("wrappedBlob", "What wrap has given out.", required=True)
_AAD = ProtoBytes(
    "additionalAuthenticatedData", "What the tag covers beside.", max_size=envelope.MAX_AAD_SIZE
)
_RESOURCE = Text("relativeResourceName", "The key version at Google Cloud.")
_REASON = Text("reason", "Why: a code of Key Access Justifications.")
_REASON_CONTEXT = Group("accessReasonContext", "Why the key is asked for.", (_REASON,))
_CONTEXT = Group(
    "additionalContext", "What Google says of the request.", (_RESOURCE, _REASON_CONTEXT)
)
_REASON_PATH = f"{_CONTEXT.name}.{_REASON_CONTEXT.name}.{_REASON.name}"

REQUESTS: dict[str, tuple[Field, ...]] = {
    "wrap": (_PLAINTEXT, _AAD, _CONTEXT),
    "unwrap": (_BLOB, _AAD, _CONTEXT),
}
"""The fields of each request."""

ANSWERS: dict[str, tuple[Field, ...]] = {"wrap": (_BLOB,), "unwrap": (_PLAINTEXT,)}
"""The fields of each answer."""

ERROR: tuple[Field, ...] = (
    Whole("code", "A google.rpc.Code.", 1, 16, 2, required=True),
    Text("message", "In words.", True),
    Details(),
)

_MESSAGES = {
    "wrap": "google.cloud.ekms.v0.WrapRequest",
    "unwrap": "google.cloud.ekms.v0.UnwrapRequest",
}

OTHER_METHODS = frozenset({"asymmetricSign", "destroyKey", "getPublicKey"})
"""What EKM can ask of a key beside, and this proxy refuses."""


def request_fields(call: str) -> tuple[Field, ...]:
    """All fields of a request."""
    return REQUESTS[call]


def answer_fields(call: str) -> tuple[Field, ...]:
    """All fields of a good answer."""
    return ANSWERS[call]


def parse_refusal() -> Refusal:
    """What a body that is no JSON object gets."""
    return invalid("body", "is not a JSON object in UTF-8")


def decode_caller(call: str, fields: Fields, principal: str) -> Caller:
    """`additionalContext`, with the principal that has signed; raises Refusal."""
    context = _object(fields, _CONTEXT.name, _CONTEXT.name)
    resource = _get(context, _RESOURCE.name)
    if resource is not None and not isinstance(resource, str):
        raise invalid(f"{_CONTEXT.name}.{_RESOURCE.name}", "must be a string")
    return Caller(
        operation=call,
        key_arn=resource or "",
        principal=principal,
        access_reason=_reason(context),
    )


def _reason(context: Fields) -> str:
    """The name of the reason: what is not said is the default of its type, as ProtoJSON has it."""
    where = f"{_CONTEXT.name}.{_REASON_CONTEXT.name}"
    value = _get(_object(context, _REASON_CONTEXT.name, where), _REASON.name)
    if value is None:
        return _UNSPECIFIED
    if isinstance(value, str):
        return value or _UNSPECIFIED
    if type(value) is int:  # a bool is an int to Python, and to no one else
        return _REASON_NAMES.get(value, str(value))
    raise invalid(_REASON_PATH, "must be the name or the number of a reason")


def check_reason(call: str, fields: Fields, allowed: Set[str]) -> None:
    """Refuse a reason that is none of those allowed.

    Raises:
        Refusal: 403 `PERMISSION_DENIED` that names the field with the message's full name.
    """
    reason = _reason(_object(fields, _CONTEXT.name, _CONTEXT.name))
    if reason not in allowed:
        field = f"{_MESSAGES[call]}.{_REASON_PATH}"
        why = "the key's owner does not permit this justification"
        raise FieldRefusal(403, "PERMISSION_DENIED", field, why, "access_reason")


def decode_wrap(key_id: str, fields: Fields, form: CiphertextFormat) -> Encrypt:
    """A wrap request; raises Refusal."""
    return Encrypt(
        key_id=key_id,
        plaintext=_PLAINTEXT.require(fields),
        algorithm=Algorithm.AES_GCM,
        aad=_AAD.read(fields),
        format=form,
    )


def decode_unwrap(key_id: str, fields: Fields, form: CiphertextFormat) -> Decrypt:
    """An unwrap request; raises Refusal, or OperationError for a blob that cannot be ours."""
    blob = _BLOB.require(fields)
    aad = _AAD.read(fields)
    version = None
    if form is CiphertextFormat.ENVELOPE:
        version = envelope.key_version(blob[: envelope.METADATA_SIZE])
        blob = blob[envelope.METADATA_SIZE :]
    if len(blob) < _IV_SIZE + TAG_SIZE:
        raise invalid_ciphertext()
    return Decrypt(
        key_id,
        blob[_IV_SIZE:],
        blob[:_IV_SIZE],
        version,
        algorithm=Algorithm.AES_GCM,
        aad=aad,
        format=form,
    )


def encode_wrapped(result: Encrypted, form: CiphertextFormat) -> Fields:
    """The answer to wrap: `metadata || iv || ciphertext || tag`, since EKM keeps one blob.

    Raises:
        OperationError: the key manager's IV has another size, so that the blob could not be read.
    """
    if len(result.iv) != _IV_SIZE:
        raise OperationError(Fault.INTERNAL, f"The IV has {len(result.iv)} bytes.")
    metadata = envelope.metadata(result.version) if form is CiphertextFormat.ENVELOPE else b""
    return {_BLOB.name: base64(b"%b%b%b" % (metadata, result.iv, result.ciphertext))}


def encode_unwrapped(result: Decrypted) -> Fields:
    """The answer to unwrap."""
    return {_PLAINTEXT.name: base64(result.plaintext)}


def _get(fields: Mapping[Any, Any], name: str) -> Any:
    """A field under either of its names; raises Refusal where both are there."""
    value = fields.get(name)
    other = fields.get(_OTHER_NAMES[name])
    if value is not None and other is not None:
        raise invalid(name, "stands there twice")
    return other if value is None else value


_OTHER_NAMES: dict[str, str | None] = {
    _PLAINTEXT.name: None,
    _BLOB.name: "wrapped_blob",
    _AAD.name: "additional_authenticated_data",
    _CONTEXT.name: "additional_context",
    _RESOURCE.name: "relative_resource_name",
    _REASON_CONTEXT.name: "access_reason_context",
    _REASON.name: None,
}
"""The names of the definition, where those of JSON differ; no JSON object has the name None."""


def _object(fields: Fields, name: str, where: str) -> Fields:
    """A message within another; its default is an empty one. Raises Refusal."""
    value = _get(fields, name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise invalid(where, "must be an object")
    return value


def _decode(text: str) -> bytes | None:
    """Base64 of either alphabet, padded or not; None if it is not that."""
    if "-" in text or "_" in text:
        if "+" in text or "/" in text:
            return None
        text = text.translate(_URL_SAFE)
    if len(text) % 4 and not text.endswith("="):
        text += "=" * (-len(text) % 4)
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:  # binascii.Error, or not ASCII
        return None
