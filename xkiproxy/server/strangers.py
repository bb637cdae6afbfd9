"""Refusals of clients that have not proven who they are: a flood of them must not fill the disk.

Each has a record of its own in the audit log up to a rate. What is more is counted, and once a
second one record tells of all of them. Requests with a valid signature always have their own.
"""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import Any

EVENT = "refusals_left_out"

_BURST_SECONDS = 10
_MAX_SOURCES = 16


class Strangers:
    """Says which refusals have a record, and keeps count of the others."""

    def __init__(self, rate: int) -> None:
        """`rate`: records a second; ten seconds' worth may come at once."""
        self._rate = rate
        self._left = float(rate * _BURST_SECONDS)
        self._filled = 0.0
        self._begin()

    def _begin(self) -> None:
        self._first: datetime | None = None
        self._refused: Counter[tuple[str, str, str]] = Counter()
        self._sources: Counter[str] = Counter()

    def admit(self, now: float) -> bool:
        """Whether a refusal at this moment (`time.monotonic`) gets a record of its own."""
        filled = self._left + (now - self._filled) * self._rate
        self._left = min(filled, float(self._rate * _BURST_SECONDS))
        self._filled = now
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def leave_out(self, keystore: str, code: str, reason: str, source: str) -> None:
        """Count a refusal that gets none."""
        self._first = self._first or datetime.now(UTC)
        self._refused[keystore, code, reason] += 1
        known = source in self._sources or len(self._sources) < _MAX_SOURCES
        self._sources[source if known else "others"] += 1

    def summary(self) -> dict[str, Any] | None:
        """The record of those that were left out since `forget`; None if there are none."""
        if self._first is None:
            return None
        return {
            "time": datetime.now(UTC),
            "event": EVENT,
            "first": self._first,
            "count": self._refused.total(),
            "refused": [
                {"keystore": keystore, "code": code, "reason": reason, "count": count}
                for (keystore, code, reason), count in self._refused.items()
            ],
            "sources": dict(self._sources),
        }

    def forget(self) -> None:
        """The summary has been written."""
        self._begin()
