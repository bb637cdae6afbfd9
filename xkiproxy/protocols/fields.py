"""The fields of JSON messages: one definition that reads them and that describes them.

A protocol lists the fields of its messages with these classes. Its decoder reads requests through
them, and its OpenAPI document is made of them (`xkiproxy.protocols.openapi`), so that the two
cannot differ. A JSON null is an absent field; unknown fields are ignored, so that a cloud can add
some. What is wrong is said in the protocol's own words.
"""

from __future__ import annotations

import binascii
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from enum import StrEnum
from typing import Any, Generic, Protocol, TypeVar

import orjson

from xkiproxy.crypto.caller import Caller
from xkiproxy.protocols.base import Fields, Refusal

_Value = TypeVar("_Value", bound=StrEnum)


class Words(Protocol):
    """How a protocol refuses a field: both take its wire name. A module will do."""

    def invalid(self, name: str, why: str) -> Refusal: ...

    def required(self, name: str) -> Refusal: ...


class Field(Protocol):
    """What all kinds of fields have."""

    @property
    def name(self) -> str: ...

    @property
    def required(self) -> bool: ...

    def schema(self) -> dict[str, Any]:
        """Its JSON Schema (draft 2020-12, as OpenAPI 3.1 has it)."""
        ...


@dataclass(frozen=True, slots=True)
class Text:
    """A string."""

    name: str
    description: str
    required: bool = False
    values: tuple[str, ...] = ()

    def schema(self) -> dict[str, Any]:
        """See `Field.schema`."""
        found: dict[str, Any] = {"type": "string", "description": self.description}
        return found | ({"enum": list(self.values)} if self.values else {})


@dataclass(frozen=True, slots=True)
class Binary:
    """Bytes in standard Base64 (RFC 4648 section 4), padded, without anything else in it.

    `max_size` is in bytes, before Base64.
    """

    name: str
    description: str
    required: bool = False
    max_size: int | None = None

    def read(self, fields: Fields, words: Words) -> bytes | None:
        """Its value, None where it is absent; raises Refusal."""
        value = fields.get(self.name)
        if value is None:
            if self.required:
                raise words.required(self.name)
            return None
        if not isinstance(value, str):
            raise words.invalid(self.name, "must be a string in Base64")
        try:
            data = binascii.a2b_base64(value, strict_mode=True)
        except ValueError:  # binascii.Error, or not ASCII
            raise words.invalid(self.name, "is not valid Base64") from None
        if self.max_size is not None and len(data) > self.max_size:
            raise words.invalid(self.name, f"must be at most {self.max_size} bytes")
        return data

    def require(self, fields: Fields, words: Words) -> bytes:
        """Its value; raises Refusal, also where it is absent."""
        value = self.read(fields, words)
        if value is None:
            raise words.required(self.name)
        return value

    def schema(self) -> dict[str, Any]:
        """See `Field.schema`."""
        found: dict[str, Any] = {
            "type": "string",
            "contentEncoding": "base64",
            "pattern": _BASE64_PATTERN,
            "description": self.description,
        }
        if self.max_size is not None:
            found["maxLength"] = (self.max_size + 2) // 3 * 4
        return found


@dataclass(frozen=True, slots=True)
class Choice(Generic[_Value]):
    """One of the values of an enumeration."""

    name: str
    description: str
    kind: type[_Value]
    required: bool = False

    def read(self, fields: Fields, words: Words) -> _Value | None:
        """Its value, None where it is absent; raises Refusal."""
        value = fields.get(self.name)
        if value is None:
            if self.required:
                raise words.required(self.name)
            return None
        try:
            return self.kind(value)
        except ValueError:
            raise words.invalid(self.name, f"must be one of {', '.join(self.kind)}") from None

    def require(self, fields: Fields, words: Words) -> _Value:
        """Its value; raises Refusal, also where it is absent."""
        value = self.read(fields, words)
        if value is None:
            raise words.required(self.name)
        return value

    def schema(self) -> dict[str, Any]:
        """See `Field.schema`."""
        return {"type": "string", "enum": list(self.kind), "description": self.description}


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole number within bounds."""

    name: str
    description: str
    minimum: int
    maximum: int
    default: int
    required: bool = False

    def read(self, fields: Fields, words: Words) -> int:
        """Its value, or its default where it is absent; raises Refusal."""
        value = fields.get(self.name)
        if value is None:
            return self.default
        # A bool is an int to Python, and to no one else.
        if type(value) is not int or not self.minimum <= value <= self.maximum:
            bounds = f"from {self.minimum} to {self.maximum}"
            raise words.invalid(self.name, f"must be a whole number {bounds}")
        return value

    def schema(self) -> dict[str, Any]:
        """See `Field.schema`."""
        return {
            "type": "integer",
            "minimum": self.minimum,
            "maximum": self.maximum,
            "default": self.default,
            "description": self.description,
        }


@dataclass(frozen=True, slots=True)
class Group:
    """An object within a message, or a list of them."""

    name: str
    description: str
    fields: Sequence[Field]
    required: bool = False
    many: bool = False

    def schema(self) -> dict[str, Any]:
        """See `Field.schema`."""
        found = object_schema(self.fields)
        if self.many:
            found = {"type": "array", "minItems": 1, "maxItems": 10, "items": found}
        return found | {"description": self.description}


@dataclass(frozen=True, slots=True)
class Texts:
    """A list of strings."""

    name: str
    description: str
    values: tuple[str, ...]
    required: bool = False

    def schema(self) -> dict[str, Any]:
        """See `Field.schema`."""
        items = {"type": "string", "enum": list(self.values)}
        return {"type": "array", "maxItems": 10, "items": items, "description": self.description}


_ONLY_TEXTS = frozenset({str})
_BASE64_PATTERN = "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"


def object_schema(fields: Sequence[Field]) -> dict[str, Any]:
    """The JSON Schema of an object with these fields, and perhaps others."""
    return {
        "type": "object",
        "properties": {field.name: field.schema() for field in fields},
        "required": [field.name for field in fields if field.required],
    }


def parse_object(body: bytes) -> Fields | None:
    """The JSON object (RFC 8259, UTF-8) in a body, or None."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return fields if isinstance(fields, dict) else None


def base64(data: bytes) -> str:
    """Standard Base64."""
    return binascii.b2a_base64(data, newline=False).decode("ascii")


def caller_reader(names: Mapping[str, str]) -> Callable[[Fields], Caller | None]:
    """What reads a request's metadata; `names` has the attribute of Caller for each wire name.

    What it makes gives None for metadata of which a field is not a string (or null): then it has to
    be looked at field by field, to say what is wrong.
    """
    by_attribute = {attribute: name for name, attribute in names.items()}
    # An attribute that a protocol does not have is looked up by a key that no JSON object has.
    keys = [by_attribute.get(attribute.name, 0) for attribute in dataclass_fields(Caller)]
    while keys[-1] == 0:
        keys.pop()
    no_texts = [""] * len(keys)

    def read(metadata: Mapping[Any, Any]) -> Caller | None:
        texts = list(map(metadata.get, keys, no_texts))
        return Caller(*texts) if _ONLY_TEXTS.issuperset(map(type, texts)) else None

    return read
