"""TTLV, the encoding of KMIP messages: tag, type, length, value (KMIP 1.4, section 9.1).

A tag has 3 bytes, a type 1, a length 4 (of the value without its padding), and a value is filled up
to whole 8 bytes. Encoders return bytes; what stands in a structure is encoded before it.
"""

from __future__ import annotations

import struct

STRUCTURE, INTEGER, LONG, BIG_INTEGER, ENUMERATION = 1, 2, 3, 4, 5
BOOLEAN, TEXT, BYTES, DATE_TIME, INTERVAL = 6, 7, 8, 9, 10

HEADER_SIZE = 8
MAX_DEPTH = 16

_HEADER = struct.Struct(">II")
_INTEGER = struct.Struct(">IIiI")
_ENUMERATION = struct.Struct(">IIII")
_LONG = struct.Struct(">IIq")
_PADDING = [bytes(-size % 8) for size in range(8)]

_UNSIGNED = (ENUMERATION, BOOLEAN, INTERVAL)
_SIZES = {INTEGER: 4, LONG: 8, ENUMERATION: 4, BOOLEAN: 8, DATE_TIME: 8, INTERVAL: 4}
_KINDS = {*_SIZES, BIG_INTEGER}


class TtlvError(Exception):
    """Bytes are no TTLV; the text says what is wrong and nothing of a value."""


def structure(tag: int, *items: bytes) -> bytes:
    """A structure of items that are encoded already."""
    body = b"".join(items)
    return _HEADER.pack(tag << 8 | STRUCTURE, len(body)) + body


def integer(tag: int, value: int) -> bytes:
    """A signed integer of 32 bits."""
    return _INTEGER.pack(tag << 8 | INTEGER, 4, value, 0)


def enumeration(tag: int, value: int) -> bytes:
    """One of the values that the specification numbers."""
    return _ENUMERATION.pack(tag << 8 | ENUMERATION, 4, value, 0)


def boolean(tag: int, value: bool) -> bytes:
    """True or false, in 8 bytes."""
    return _LONG.pack(tag << 8 | BOOLEAN, 8, value)


def octets(tag: int, value: bytes) -> bytes:
    """A byte string."""
    size = len(value)
    return b"%b%b%b" % (_HEADER.pack(tag << 8 | BYTES, size), value, _PADDING[size & 7])


def text(tag: int, value: str) -> bytes:
    """A text string, in UTF-8."""
    data = value.encode()
    size = len(data)
    return b"%b%b%b" % (_HEADER.pack(tag << 8 | TEXT, size), data, _PADDING[size & 7])


class Structure:
    """A decoded structure: its items in their order."""

    __slots__ = ("items", "tag")

    def __init__(self, tag: int, items: list[tuple[int, Value]]) -> None:
        self.tag = tag
        self.items = items

    def all(self, tag: int) -> list[Value]:
        """The values of every item with a tag."""
        return [value for found, value in self.items if found == tag]

    def find(self, tag: int) -> Value | None:
        """The value of the first item with a tag, None if there is none."""
        for found, value in self.items:
            if found == tag:
                return value
        return None

    def structure(self, tag: int) -> Structure:
        """The structure with a tag; raises TtlvError if there is none."""
        value = self.find(tag)
        if type(value) is not Structure:
            raise TtlvError(f"0x{self.tag:06x} has no structure 0x{tag:06x}")
        return value

    def number(self, tag: int) -> int:
        """The number with a tag; raises TtlvError if there is none."""
        value = self.find(tag)
        if type(value) is not int:
            raise TtlvError(f"0x{self.tag:06x} has no number 0x{tag:06x}")
        return value

    def octets(self, tag: int) -> bytes:
        """The byte string with a tag; raises TtlvError if there is none."""
        value = self.find(tag)
        if type(value) is not bytes:
            raise TtlvError(f"0x{self.tag:06x} has no byte string 0x{tag:06x}")
        return value

    def text(self, tag: int) -> str:
        """The text string with a tag; raises TtlvError if there is none."""
        value = self.find(tag)
        if type(value) is not str:
            raise TtlvError(f"0x{self.tag:06x} has no text 0x{tag:06x}")
        return value


class Raw(bytes):
    """The bytes of a value whose type is not known here; it is no byte string.

    KMIP 2.0 has added the first one (Date-Time Extended, 2.1, section 9.1.2), and attributes that
    nobody here asks for may have it.
    """


Value = int | bool | str | bytes | Structure
"""Numbers (also enumerations, and times in seconds), truth values, texts, bytes, structures; and
`Raw`.
"""


def message_size(header: bytes | bytearray) -> int:
    """The size in bytes of the message that begins with these 8 bytes."""
    return HEADER_SIZE + int.from_bytes(header[4:8])


def decode(data: bytes) -> Structure:
    """Decode one structure, which takes all of the bytes.

    Raises:
        TtlvError: a length does not fit, a text is none, or something follows.
    """
    items = _items(data, 0, len(data), 0)
    if len(items) != 1 or type(items[0][1]) is not Structure:
        raise TtlvError("it is not one structure")
    return items[0][1]


def _items(data: bytes, start: int, end: int, depth: int) -> list[tuple[int, Value]]:
    if depth > MAX_DEPTH:
        raise TtlvError(f"structures stand deeper than {MAX_DEPTH} in each other")
    items: list[tuple[int, Value]] = []
    while start < end:
        if start + HEADER_SIZE > end:
            raise TtlvError("an item is cut short")
        word, size = _HEADER.unpack_from(data, start)
        begin = start + HEADER_SIZE
        start = begin + size + (-size & 7)
        if start > end:
            raise TtlvError(f"0x{word >> 8:06x} is longer than what it stands in")
        items.append((word >> 8, _value(data, word, begin, size, depth)))
    return items


def _value(data: bytes, word: int, begin: int, size: int, depth: int) -> Value:
    kind = word & 0xFF
    if kind == STRUCTURE:
        return Structure(word >> 8, _items(data, begin, begin + size, depth + 1))
    if kind == BYTES:
        return data[begin : begin + size]
    if kind == TEXT:
        try:
            return data[begin : begin + size].decode()
        except UnicodeDecodeError:
            raise TtlvError(f"0x{word >> 8:06x} is no UTF-8") from None
    if kind not in _KINDS:
        return Raw(data[begin : begin + size])
    if kind != BIG_INTEGER and _SIZES[kind] != size:
        raise TtlvError(f"0x{word >> 8:06x} has type {kind} and {size} bytes")
    is_signed = kind not in _UNSIGNED
    number = int.from_bytes(data[begin : begin + size], signed=is_signed)
    return bool(number) if kind == BOOLEAN else number
