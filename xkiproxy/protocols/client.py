"""What the client's side of every protocol offers `xkiproxy call`: signed requests, answers read.

Pure, as all of a protocol: what comes from outside (time, nonce, request ID) is an argument. The
calls and their arguments have the same names in all protocols, those of the command line; a dialect
says which of them it has, and what they are called on its wire.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from typing import Protocol as Interface

from xkiproxy.protocols.base import Fields
from xkiproxy.protocols.fields import parse_object

Arguments = Mapping[str, Any]
"""Arguments of a call, by the names of its options; one that is None was not given."""


@dataclass(frozen=True, slots=True)
class Signer:
    """With what a request is signed; `hash` is one of a dialect's `hashes`."""

    access_key_id: str
    secret: str = field(repr=False)
    region: str
    hash: str = "sha256"


@dataclass(frozen=True, slots=True)
class Request:
    """A signed request; `headers` are all that it needs but its length."""

    path: str
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: `code` and `message` are empty unless it is an error.

    `request_id` is empty in a protocol whose answers have none.
    """

    status: int
    request_id: str
    fields: Fields = field(repr=False)
    code: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Call:
    """A call as a protocol has it."""

    part: str
    """The last part of its path."""
    operation: str
    """The operation of the cloud's KMS behind it."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """The arguments that it takes, each with its name on the wire."""


class ArgumentError(ValueError):
    """A protocol cannot do with an argument what was asked for."""

    def __init__(self, argument: str, why: str) -> None:
        super().__init__(f"{argument}: {why}")
        self.argument = argument
        self.why = why


class ClientDialect(Interface):
    """A cloud's side of a wire dialect."""

    name: str
    base_path: str
    """What follows the prefix of a key store in a path."""
    default_region: str
    hashes: tuple[str, ...]
    """The names of the hashes that a signature can be made with, the usual one first."""
    calls: Mapping[str, Call]
    """The calls that this protocol has, of `health`, `meta`, `encrypt`, `decrypt`, `random`."""
    plaintext_field: str
    """The field of an answer to decrypt that holds the plaintext in Base64."""
    date_errors: Mapping[str, float]
    """The codes of errors that a wrong clock causes, each with the seconds that it must be off."""

    def fields(self, call: str, arguments: Arguments) -> Fields:
        """The parameters of one of `calls`; bytes become Base64. Raises ArgumentError."""
        ...

    def stored_fields(self, encrypted: Fields) -> Fields:
        """The parameters of decrypt that an answer to encrypt holds; raises ValueError."""
        ...

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
        """Sign a call. `host` is the Host header; `now` is in seconds since the epoch.

        Raises:
            Refusal: the access key ID or the region has a form that no signature can name.
        """
        ...

    def read_answer(self, status: int, body: bytes) -> Answer:
        """Read the body of an answer.

        Raises:
            ValueError: it is not a JSON object, so that no proxy can have sent it.
        """
        ...

    def verify_answer(self, sent: Fields, answer: Answer) -> None:
        """Verify what a good answer to the fields that were sent says of itself.

        Raises:
            ValueError: it is not so.
        """
        ...


def call_path(external_proxy_path: str, part: str, key_id: str = "") -> str:
    """The path of a call, such as `/demo/kms/xki/v1/keys/my-key/encrypt`."""
    base = external_proxy_path.rstrip("/")
    return f"{base}/keys/{key_id}/{part}" if key_id else f"{base}/{part}"


def wire_fields(call: Call, arguments: Arguments) -> dict[str, Any]:
    """The arguments that were given under their names on the wire, bytes in Base64.

    Raises:
        ArgumentError: the call does not take one of them.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    for name in given:
        if name not in call.parameters:
            raise ArgumentError(name, f"{call.part} does not take it")
    return {call.parameters[name]: _text(value) for name, value in given.items()}


def pick(fields: Fields, required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Any]:
    """The fields of these names; raises ValueError if a required one is no string."""
    for name in required:
        if not isinstance(fields.get(name), str):
            raise ValueError(f"has no {name}")
    names = (*required, *optional)
    return {name: fields[name] for name in names if fields.get(name) is not None}


def answer_fields(body: bytes) -> dict[str, Any]:
    """The JSON object that a body is; raises ValueError."""
    fields = parse_object(body)
    if fields is None:
        raise ValueError("the answer is not a JSON object")
    return dict(fields)


def _text(value: Any) -> Any:
    return base64.b64encode(value).decode("ascii") if isinstance(value, bytes) else value
