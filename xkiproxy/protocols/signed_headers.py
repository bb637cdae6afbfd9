"""What the signature schemes of all clouds have in common: how headers become canonical."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from operator import itemgetter

from xkiproxy.protocols.base import Mac


def fold_headers(headers: Sequence[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Names in lower case, repeated headers joined by a comma (RFC 9110 5.3)."""
    if not headers:
        return {}
    names, values = zip(*headers, strict=True)
    folded = dict(zip(_lower_case(names), values, strict=True))
    if len(folded) == len(headers):  # nearly always
        return folded
    folded = {}
    for name, value in headers:
        lower = name.lower()
        folded[lower] = folded[lower] + b"," + value if lower in folded else value
    return folded


@lru_cache(maxsize=32)
def _lower_case(names: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """A client sends the same headers with every request; there are few kinds of clients.

    The cache is small since anybody may fill it, with 32 names of 8 KB each.
    """
    return tuple(name.lower() for name in names)


class SignedHeaders:
    """The names of the signed headers of a client, prepared: they stay the same from day to day."""

    __slots__ = ("_pick", "_template", "line", "names")

    def __init__(self, line: str) -> None:
        """`line` is `SignedHeaders`: names in lower case, joined by ; and at least two of them.

        Raises:
            ValueError: they are not sorted, one stands there twice, or there is only one.
        """
        names = line.split(";")
        if names != sorted(set(names)) or len(names) < 2:
            raise ValueError("names must be sorted and without repetition")
        self.line = line.encode("ascii")
        self.names = tuple(name.encode("ascii") for name in names)
        self._pick = itemgetter(*self.names)
        self._template = b"".join(name.replace(b"%", b"%%") + b":%b\n" for name in self.names)

    def lines(self, headers: Mapping[bytes, bytes]) -> bytes:
        """`name:value` and a line feed for each; raises KeyError where a header is missing."""
        values: tuple[bytes, ...] = self._pick(headers)
        return self._template % values


def hmac_sha256(key: bytes) -> Mac:
    """HMAC-SHA256 under a key that is used for many messages.

    The hash's states after the two forms of the key are kept, as RFC 2104 section 4 describes: a
    code then costs half. `key` has at most 64 bytes.
    """
    block = key.ljust(64, b"\0")
    inner = hashlib.sha256(block.translate(_INNER))
    outer = hashlib.sha256(block.translate(_OUTER))

    def mac(data: bytes) -> bytes:
        first = inner.copy()
        first.update(data)
        second = outer.copy()
        second.update(first.digest())
        return second.hexdigest().encode("ascii")

    return mac


_INNER = bytes(byte ^ 0x36 for byte in range(256))
_OUTER = bytes(byte ^ 0x5C for byte in range(256))


def basic_timestamp(date: str) -> float | None:
    """Seconds since the epoch of `yyyymmddThhmmssZ` (ISO 8601, basic), None if it is no date.

    The caller has checked the form: what is left to be wrong is a 31st of February.
    """
    try:
        return datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None
