"""The replay window: a nonce is used once while its request could still be accepted."""

from __future__ import annotations

from typing import Protocol


class Replay(Protocol):
    """What a key store asks of a replay window."""

    def admit(self, access_key_id: str, nonce: str, expires: float, now: float) -> bool:
        """Whether this is the first use of a nonce; times are seconds since the epoch."""
        ...


class ReplayWindow:
    """Remembers the nonces of verified requests until their dates are too old to be accepted.

    A nonce is kept as its 64-bit hash, keyed anew in every process (SipHash, PEP 456): 70 bytes
    instead of 200, and with two million of them alive one request in 10**13 is refused wrongly,
    never accepted wrongly. Only requests with a right signature get here, so nobody without a
    credential can fill it.
    """

    def __init__(self, capacity: int = 4_000_000) -> None:
        self._seen: set[int] = set()
        self._by_second: dict[int, list[int]] = {}
        self._capacity = capacity
        self._purged_until = 0

    def __len__(self) -> int:
        return len(self._seen)

    def admit(self, access_key_id: str, nonce: str, expires: float, now: float) -> bool:
        """Whether this is the first use of a nonce; times are seconds since the epoch.

        A full window admits nothing: it could no longer tell a replay.
        """
        second = int(now)
        if second > self._purged_until:
            self._purge(second)
        mark = hash((access_key_id, nonce))
        if mark in self._seen or len(self._seen) >= self._capacity:
            return False
        self._seen.add(mark)
        self._by_second.setdefault(int(expires) + 1, []).append(mark)
        return True

    def _purge(self, second: int) -> None:
        """Forget what expired, a second's worth at a time: no long pause on the hot path."""
        for expired in [when for when in self._by_second if when < second]:
            self._seen.difference_update(self._by_second.pop(expired))
        self._purged_until = second
