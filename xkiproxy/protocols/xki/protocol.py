"""The XKI dialect as the gateway sees it: signatures, decoding, encoding, errors, headers."""

from __future__ import annotations

import re
from urllib.parse import unquote

import orjson

from xkiproxy import __version__
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
    OperationError,
    OutputForm,
    Random,
    RandomBytes,
    Result,
    check_parameters,
)
from xkiproxy.protocols.base import (
    Action,
    Fields,
    Identity,
    Refusal,
    SignedRequest,
    SigningKeys,
    Trouble,
)
from xkiproxy.protocols.xki import acs4, errors, messages

SPECIFICATION = "1.0.0"
SERVER_NAME = "xkiproxy"
VENDOR = "xkiproxy"

_KEY_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_MAX_ECHO = 1024


class XkiProtocol:
    """XKI with the settings of one key store. Pure: it holds no state and does no I/O."""

    name = "xki"
    base_path = "/kms/xki/v1"
    calls = frozenset({"health", "random"})
    key_calls = frozenset({"meta", "encrypt", "decrypt"})
    key_methods: frozenset[str] = frozenset()

    def __init__(
        self,
        ciphertext_format: CiphertextFormat = CiphertextFormat.ENVELOPE,
        disable_output_form_plain: bool = False,
    ) -> None:
        self._format = ciphertext_format
        self._disable_output_form_plain = disable_output_form_plain

    def authenticate(self, request: SignedRequest, keys: SigningKeys, now: float) -> Identity:
        """Verify the ACS4 signature; raises Refusal."""
        return acs4.verify(request, keys, now)

    def open(self, call: str, body: bytes, identity: Identity) -> tuple[Caller, Fields]:
        """Parse a body as far as its RequestMetadata, which every call has; raises Refusal."""
        del call, identity
        fields = messages.parse_body(body)
        return messages.decode_caller(fields), fields

    def decode(self, call: str, key_id: str, fields: Fields) -> Action:
        """Read the parameters of a call; raises Refusal or OperationError."""
        match call:
            case "encrypt":
                encrypt = messages.decode_encrypt(_key_id(key_id), fields, self._format)
                check_parameters(encrypt)
                return encrypt
            case "decrypt":
                decrypt = messages.decode_decrypt(_key_id(key_id), fields, self._format)
                check_parameters(decrypt)
                return decrypt
            case "meta":
                return Describe(_key_id(key_id))
            case "random":
                return self._decode_random(fields)
            case _:
                return Health()

    def _decode_random(self, fields: Fields) -> Random:
        operation = messages.decode_random(fields)
        if self._disable_output_form_plain and operation.output is OutputForm.PLAIN:
            why = "This key store gives out no random bytes in plain (disableOutputFormPlain)."
            raise OperationError(Fault.ACCESS_DENIED, why)
        return operation

    def encode(self, action: Action, result: Result | HealthReport, request_id: str) -> bytes:
        """The body of an answer with status 200."""
        return orjson.dumps({"RequestId": request_id, **self._encode_fields(action, result)})

    def _encode_fields(self, action: Action, result: Result | HealthReport) -> Fields:
        match result:  # a tuple of both would be made for each request
            case Encrypted() if isinstance(action, Encrypt):
                return messages.encode_encrypted(result, action.key_id, self._format)
            case Decrypted() if isinstance(action, Decrypt):
                return messages.encode_decrypted(result, action.key_id)
            case RandomBytes() if isinstance(action, Random):
                return messages.encode_random(result, action.output)
            case KeyDescription() if isinstance(action, Describe):
                return messages.encode_description(result)
            case HealthReport() if isinstance(action, Health):
                return _health_fields(result)
        raise TypeError(f"{type(result).__name__} is no answer to {type(action).__name__}")

    def refuse(self, why: OperationError | Trouble) -> Refusal:
        """A failure in the words of XKI."""
        return errors.refusal(why)

    def encode_refusal(self, refusal: Refusal, request_id: str) -> bytes:
        """The body of an error: `RequestId`, `Code`, `Message`."""
        return orjson.dumps(
            {"RequestId": request_id, "Code": refusal.code, "Message": refusal.message}
        )

    def headers(self, caller_request_id: str) -> bytes:
        """The three headers of every answer; the echo is cut and cleaned, since it is opaque."""
        return _HEADERS % _echo(caller_request_id).encode("ascii")


_HEADERS = (
    f"x-xki-specification: {SPECIFICATION}\r\nx-xki-server: {SERVER_NAME}/{__version__}\r\n"
    "x-xki-kms-request-id: %b\r\n"
).encode("ascii")


def _key_id(segment: str) -> str:
    """The external key ID that a path segment names, after percent-decoding; raises Refusal."""
    key_id = unquote(segment) if "%" in segment else segment
    if _KEY_ID.fullmatch(key_id) is None:
        raise errors.invalid("ExternalKeyId", "must be 1 to 128 of A-Z a-z 0-9 . _ -")
    return key_id


def _echo(text: str) -> str:
    """What of a client's text can stand in a header (RFC 9110 section 5.5)."""
    if len(text) <= _MAX_ECHO and text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text[:_MAX_ECHO])


def _health_fields(report: HealthReport) -> Fields:
    return {
        "Specification": SPECIFICATION,
        "ServerName": SERVER_NAME,
        "ServerVersion": __version__,
        "Vendor": VENDOR,
        "Status": report.availability,
        "Message": report.message or _HEALTH_MESSAGES[report.availability],
    }


_HEALTH_MESSAGES = {
    Availability.ACTIVE: "All key managers answer.",
    Availability.DEGRADED: "Some of the key managers are away.",
    Availability.UNAVAILABLE: "No key manager answers.",
}
