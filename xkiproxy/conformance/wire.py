"""What the suite exchanges with a proxy, and what it must know of a protocol to do so."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from typing import Protocol as Interface

import orjson

Fields = Mapping[str, Any]


class Unmet(Exception):
    """A requirement does not hold; the text says what came instead."""


class Skipped(Exception):
    """A case cannot be tried; the text says what it needs."""


@dataclass(frozen=True, slots=True)
class Credential:
    """An access key."""

    access_key_id: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Request:
    """An HTTP request; `path` as it goes into the request line, header names in lower case."""

    method: str
    path: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Signing:
    """What goes into a signature; a negative case changes one thing of it.

    Where a text is empty the right value is taken. `unsigned` are header names to leave out of the
    signed ones; `date` replaces the text of the date header, `scope_date` that of the credential.
    """

    credential: Credential
    region: str
    when: datetime
    nonce: str
    algorithm: str = ""
    service: str = ""
    terminator: str = ""
    scope_date: str = ""
    date: str | None = None
    unsigned: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer; header names in lower case, `seconds` from sending to the last byte."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)
    seconds: float

    @property
    def fields(self) -> Fields:
        """The JSON object in it; raises Unmet."""
        try:
            fields = orjson.loads(self.body)
        except orjson.JSONDecodeError:
            raise Unmet(f"HTTP {self.status} with a body that is not JSON") from None
        if not isinstance(fields, dict):
            raise Unmet(f"HTTP {self.status} with a body that is not a JSON object")
        return fields

    def text(self, name: str) -> str:
        """A field that must be a string; raises Unmet."""
        value = self.fields.get(name)
        if not isinstance(value, str):
            raise Unmet(f"{name} is {'missing' if value is None else 'not a string'}")
        return value

    def data(self, name: str) -> bytes:
        """A field that must be Base64 (RFC 4648 section 4); raises Unmet."""
        try:
            return binascii.a2b_base64(self.text(name), strict_mode=True)
        except ValueError:
            raise Unmet(f"{name} is not Base64") from None


@dataclass(frozen=True, slots=True)
class Expected:
    """The status and the error codes with which a proxy may refuse something."""

    statuses: tuple[int, ...]
    codes: tuple[str, ...] = ()

    def __str__(self) -> str:
        statuses = " or ".join(map(str, self.statuses))
        return f"HTTP {statuses} {' or '.join(self.codes)}".rstrip()


class Refused(StrEnum):
    """Why a proxy must refuse; each protocol has its status and codes for it."""

    UNSIGNED = "no signature"
    MALFORMED = "a signature that cannot be parsed"
    WRONG = "a wrong signature"
    STALE = "a date outside of the window"
    NO_PATH = "no such path"
    METHOD = "another method than POST"
    NOT_JSON = "a body that is not a JSON object"
    NO_METADATA = "no request metadata"
    METADATA = "wrong request metadata"
    KEY_ID = "a key ID that cannot be one"
    NO_KEY = "no such key"
    DISABLED = "a disabled key"
    USAGE = "a usage that the key has not"
    CIPHERTEXT = "a wrong ciphertext"
    TOO_LARGE = "a body over the limit"


class Wire(Interface):
    """A protocol as the suite knows it."""

    name: str
    base: str
    default_region: str
    window: timedelta
    metadata_name: str
    required_metadata: Mapping[str, tuple[str, ...]]
    """The names of the metadata that each call demands."""
    meta_call: str
    plaintext_name: str
    """The field of encrypt's request and of decrypt's answer."""
    iv_name: str
    algorithms: tuple[str, ...]
    """The signature algorithms; the first is the default."""
    date_header: str
    needed_headers: tuple[str, ...]
    """The headers that must be signed."""
    largest_plaintext: int
    """The plaintext (bytes) that every proxy must take."""
    refusals: Mapping[Refused, Expected]

    def metadata(self, call: str) -> dict[str, str]:
        """A complete request metadata."""
        ...

    def sign(self, request: Request, signing: Signing) -> Request:
        """The request with its signature."""
        ...

    def code(self, answer: Answer) -> tuple[str, str]:
        """The code and the message of an error; raises Unmet where it has another form."""
        ...

    def encrypt_fields(self, plaintext: bytes, aad: bytes | None) -> dict[str, Any]:
        """The parameters of an authenticated encryption."""
        ...

    def decrypt_fields(self, encrypted: Fields, aad: bytes | None) -> dict[str, Any]:
        """The parameters that decrypt what encrypt answered."""
        ...

    def stored(self, encrypted: Fields) -> tuple[str, ...]:
        """The names of the Base64 fields of an encrypt that decrypt needs."""
        ...


def b64(data: bytes) -> str:
    """Standard Base64."""
    return base64.b64encode(data).decode("ascii")
