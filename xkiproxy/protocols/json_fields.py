"""Reading JSON bodies: what the decoders of all protocols have in common.

A JSON null is an absent field; unknown fields are ignored, so that a cloud can add some. Each
protocol says in its own words what is wrong: it passes the function that makes its Refusal.
"""

from __future__ import annotations

import binascii
from collections.abc import Callable
from enum import StrEnum
from typing import TypeVar

import orjson

from xkiproxy.protocols.base import Fields, Refusal

Invalid = Callable[[str, str], Refusal]
"""Makes the Refusal for a field (its wire name) and a reason."""

_Choice = TypeVar("_Choice", bound=StrEnum)


def parse_object(body: bytes) -> Fields | None:
    """The JSON object (RFC 8259, UTF-8) in a body, or None."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return fields if isinstance(fields, dict) else None


def binary(fields: Fields, name: str, invalid: Invalid) -> bytes | None:
    """A field in standard Base64 (RFC 4648 section 4), padded, without anything else in it."""
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise invalid(name, "must be a string in Base64")
    try:
        return binascii.a2b_base64(value, strict_mode=True)
    except ValueError:  # binascii.Error, or not ASCII
        raise invalid(name, "is not valid Base64") from None


def choice(fields: Fields, name: str, kind: type[_Choice], invalid: Invalid) -> _Choice | None:
    """A field with one of the values of an enumeration."""
    value = fields.get(name)
    if value is None:
        return None
    try:
        return kind(value)
    except ValueError:
        raise invalid(name, f"must be one of {', '.join(kind)}") from None


def base64(data: bytes) -> str:
    """Standard Base64."""
    return binascii.b2a_base64(data, newline=False).decode("ascii")
