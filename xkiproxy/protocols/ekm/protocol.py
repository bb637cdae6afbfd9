"""The EKM dialect as the gateway sees it: tokens, decoding, encoding, errors."""

from __future__ import annotations

import re
from collections.abc import Set

import orjson

from xkiproxy.crypto.caller import Caller
from xkiproxy.crypto.operations import (
    CiphertextFormat,
    Decrypted,
    Encrypted,
    HealthReport,
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
from xkiproxy.protocols.ekm import errors, messages
from xkiproxy.protocols.ekm.tokens import TokenVerifier
from xkiproxy.protocols.fields import parse_object

_KEY_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class EkmProtocol:
    """EKM with the settings of one key store.

    Pure: it does no I/O, and its only state is which tokens `verifier` has found good.
    """

    name = "ekm"
    base_path = "/kms/ekm/v0"
    calls: frozenset[str] = frozenset()
    key_calls: frozenset[str] = frozenset()
    key_methods = frozenset({"wrap", "unwrap"}) | messages.OTHER_METHODS

    def __init__(
        self,
        verifier: TokenVerifier,
        allowed_reasons: Set[str] | None = None,
        ciphertext_format: CiphertextFormat = CiphertextFormat.ENVELOPE,
    ) -> None:
        """`allowed_reasons` are names of Key Access Justifications; without them all may ask."""
        self._verifier = verifier
        self._allowed_reasons = allowed_reasons
        self._format = ciphertext_format

    def authenticate(self, request: SignedRequest, keys: SigningKeys, now: float) -> Identity:
        """Verify Google's token; raises Refusal, and OperationError while there are no keys."""
        del keys  # the key store has no secret in common with Google
        return self._verifier.verify(request.headers, now)

    def open(self, call: str, body: bytes, identity: Identity) -> tuple[Caller, Fields]:
        """Parse a body as far as its additionalContext; raises Refusal."""
        fields = parse_object(body)
        if fields is None:
            raise messages.parse_refusal()
        return messages.decode_caller(call, fields, identity.access_key_id), fields

    def decode(self, call: str, key_id: str, fields: Fields) -> Action:
        """Read the fields of a call; raises Refusal or OperationError."""
        if call in messages.OTHER_METHODS:
            raise errors.unimplemented(call)
        if _KEY_ID.fullmatch(key_id) is None:
            raise errors.invalid("key", "must be 1 to 128 of A-Z a-z 0-9 - . _")
        if self._allowed_reasons is not None:
            messages.check_reason(call, fields, self._allowed_reasons)
        if call == "wrap":
            return messages.decode_wrap(key_id, fields, self._format)
        return messages.decode_unwrap(key_id, fields, self._format)

    def encode(self, action: Action, result: Result | HealthReport, request_id: str) -> bytes:
        """The body of an answer with status 200; raises OperationError."""
        del request_id  # EKM has none; the audit record has it
        match result:
            case Encrypted():
                return orjson.dumps(messages.encode_wrapped(result, self._format))
            case Decrypted():
                return orjson.dumps(messages.encode_unwrapped(result))
        raise TypeError(f"{type(result).__name__} is no answer to {type(action).__name__}")

    def refuse(self, why: OperationError | Trouble) -> Refusal:
        """A failure in the words of EKM."""
        return errors.refusal(why)

    def encode_refusal(self, refusal: Refusal, request_id: str) -> bytes:
        """The body of an error: a google.rpc.Status."""
        del request_id
        return orjson.dumps(errors.encode(refusal))

    def headers(self, caller_request_id: str) -> bytes:
        """EKM has no headers of its own."""
        del caller_request_id
        return b""
