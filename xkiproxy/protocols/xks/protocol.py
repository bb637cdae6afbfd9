"""The XKS dialect as the gateway sees it: signatures, decoding, encoding, errors."""

from __future__ import annotations

import re

import orjson

from xkiproxy.crypto.caller import Caller
from xkiproxy.crypto.operations import (
    CiphertextFormat,
    Decrypt,
    Decrypted,
    Describe,
    Encrypt,
    Encrypted,
    Health,
    HealthReport,
    KeyDescription,
    OperationError,
    Result,
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
from xkiproxy.protocols.fields import parse_object
from xkiproxy.protocols.xks import errors, messages, sigv4

_KEY_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class XksProtocol:
    """XKS with the settings of one key store. Pure: it holds no state and does no I/O."""

    name = "xks"
    base_path = "/kms/xks/v1"
    calls = frozenset({"health"})
    key_calls = frozenset({"metadata", "encrypt", "decrypt"})
    key_methods: frozenset[str] = frozenset()

    def __init__(self, ciphertext_format: CiphertextFormat = CiphertextFormat.ENVELOPE) -> None:
        self._format = ciphertext_format

    def authenticate(self, request: SignedRequest, keys: SigningKeys, now: float) -> Identity:
        """Verify the SigV4 signature; raises Refusal."""
        return sigv4.verify(request, keys, now)

    def open(self, call: str, body: bytes, identity: Identity) -> tuple[Caller, Fields]:
        """Parse a body as far as its requestMetadata; raises Refusal."""
        del identity  # KMS names the principal
        fields = parse_object(body)
        if fields is None:
            raise messages.parse_refusal()
        return messages.decode_caller(call, fields), fields

    def decode(self, call: str, key_id: str, fields: Fields) -> Action:
        """Read the parameters of a call; raises Refusal or OperationError."""
        if call == "health":
            return Health()
        if _KEY_ID.fullmatch(key_id) is None:
            raise errors.invalid("externalKeyId", "must be 1 to 128 of A-Z a-z 0-9 - . _")
        if call == "encrypt":
            return messages.decode_encrypt(key_id, fields, self._format)
        if call == "decrypt":
            return messages.decode_decrypt(key_id, fields, self._format)
        return Describe(key_id)

    def encode(self, action: Action, result: Result | HealthReport, request_id: str) -> bytes:
        """The body of an answer with status 200; raises OperationError."""
        del request_id  # XKS has none; the audit record has it
        return orjson.dumps(self._encode_fields(action, result))

    def _encode_fields(self, action: Action, result: Result | HealthReport) -> Fields:
        match result:  # a tuple of both would be made for each request
            case Encrypted() if isinstance(action, Encrypt):
                return messages.encode_encrypted(result, self._format)
            case Decrypted() if isinstance(action, Decrypt):
                return messages.encode_decrypted(result)
            case KeyDescription() if isinstance(action, Describe):
                return messages.encode_description(result)
            case HealthReport() if isinstance(action, Health):
                return messages.encode_health(result)
        raise TypeError(f"{type(result).__name__} is no answer to {type(action).__name__}")

    def refuse(self, why: OperationError | Trouble) -> Refusal:
        """A failure in the words of XKS."""
        return errors.refusal(why)

    def encode_refusal(self, refusal: Refusal, request_id: str) -> bytes:
        """The body of an error: `errorName`, `errorMessage`."""
        del request_id
        message = errors.printable(refusal.message)
        return orjson.dumps({"errorName": refusal.code, "errorMessage": message})

    def headers(self, caller_request_id: str) -> bytes:
        """XKS has no headers of its own."""
        del caller_request_id
        return b""
