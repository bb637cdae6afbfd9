"""The replay window: a nonce is used once while its request could still be accepted."""

from __future__ import annotations

from typing import Protocol

from xkiproxy.crypto.operations import Fault, OperationError

DEFAULT_CAPACITY = 4_000_000
"""Requests of 15 minutes: 4,400 a second."""


class Replay(Protocol):
    """What a key store asks of a replay window."""

    def admit(self, access_key_id: str, nonce: str, expires: float, now: float) -> bool:
        """Whether this is the first use of a nonce; times are seconds since the epoch.

        Raises:
            OperationError: THROTTLED, when no more can be remembered: a replay could not be told.
        """
        ...


def window_is_full() -> OperationError:
    """The refusal of a request whose nonce cannot be remembered."""
    details = {"full": "replay_window"}
    return OperationError(Fault.THROTTLED, "Too many requests in 15 minutes.", details=details)


class ReplayWindow:
    """Remembers the nonces of verified requests until their dates are too old to be accepted.

    A nonce is kept as its 64-bit hash, keyed anew in every process (SipHash, PEP 456): 90 bytes
    instead of 200, and with two million of them alive one request in 10**13 is refused wrongly,
    never accepted wrongly. Only requests with a right signature get here, so nobody without a
    credential can fill it.
    """

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        self._seen: set[int] = set()
        self._by_second: dict[int, list[int]] = {}
        self._capacity = capacity
        self._purged_until = 0

    def __len__(self) -> int:
        return len(self._seen)

    def admit(self, access_key_id: str, nonce: str, expires: float, now: float) -> bool:
        """See `Replay.admit`."""
        second = int(now)
        if second > self._purged_until:
            self._purge(second)
        mark = hash((access_key_id, nonce))
        if mark in self._seen:
            return False
        if len(self._seen) >= self._capacity:
            raise window_is_full()
        self._seen.add(mark)
        self._by_second.setdefault(int(expires) + 1, []).append(mark)
        return True

    def _purge(self, second: int) -> None:
        """Forget what expired, a second's worth at a time: no long pause on the hot path."""
        for expired in [when for when in self._by_second if when < second]:
            self._seen.difference_update(self._by_second.pop(expired))
        self._purged_until = second
