"""What the signature schemes of all clouds have in common: how headers become canonical."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime


def fold_headers(headers: Sequence[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Names in lower case, values trimmed, repeated headers joined by a comma (RFC 9110 5.3)."""
    folded: dict[bytes, bytes] = {}
    for name, value in headers:
        lower = name.lower()
        if lower in folded:
            folded[lower] = folded[lower] + b"," + value.strip()
        else:
            folded[lower] = value.strip()
    return folded


def basic_timestamp(date: str) -> float | None:
    """Seconds since the epoch of `yyyymmddThhmmssZ` (ISO 8601, basic), None if it is no date.

    The caller has checked the form: what is left to be wrong is a 31st of February.
    """
    try:
        return datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None
