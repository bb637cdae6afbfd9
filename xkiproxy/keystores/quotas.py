"""Quotas: so many requests a second, with a burst, for a key store, a key and a principal.

A token bucket in the form of the generic cell rate algorithm (ITU-T I.371): of each bucket only the
time is kept at which it will be full again. A bucket that is full needs no memory, so that a table
of fixed size serves any number of keys and principals. It lies in memory that worker processes
share, without a lock: two that write at the same moment may let a request more pass.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from dataclasses import dataclass
from time import monotonic

from xkiproxy.crypto.operations import Fault, OperationError

_KEY_SIZE = 16
_PLACES = 1 << 16
_PROBES = 8
_TABLE_SIZE = _KEY_SIZE + 16 * _PLACES
_MAX_MARKS = 8192


@dataclass(frozen=True, slots=True)
class Quota:
    """`rate` requests a second on average, `burst` at once."""

    rate: float
    burst: int


def make_quota_table() -> int:
    """An anonymous file with an empty table (1 MB), for `QuotaTable`; returns its descriptor."""
    descriptor = os.memfd_create("xkiproxy-quotas", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, _TABLE_SIZE)
        os.pwrite(descriptor, os.urandom(_KEY_SIZE), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class QuotaTable:
    """When buckets will be full, by a keyed hash of whose they are.

    Times are those of `time.monotonic`, which all processes of a host share.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        """The table of several processes, or one of this process's own."""
        if descriptor is None:
            memory = mmap.mmap(-1, _TABLE_SIZE)
            memory[:_KEY_SIZE] = os.urandom(_KEY_SIZE)
        else:
            memory = mmap.mmap(descriptor, _TABLE_SIZE)
        self._key = memory[:_KEY_SIZE]
        view = memoryview(memory)
        half = _KEY_SIZE + 8 * _PLACES
        self.marks = view[_KEY_SIZE:half].cast("Q")
        self.times = view[half:].cast("d")

    def mark(self, *names: str) -> int:
        """The 64-bit keyed hash of whose bucket it is; never 0."""
        text = b"\0".join(name.encode() for name in names)
        digest = hashlib.blake2b(text, digest_size=8, key=self._key).digest()
        return int.from_bytes(digest, "little") or 1

    def place(self, mark: int, now: float) -> int:
        """The place of a bucket; one that it did not have yet is full.

        If all places that it may have are taken, it gets the one that will be full first, which
        lets that other one pass a little more.
        """
        marks, times = self.marks, self.times
        first = mark % _PLACES
        if marks[first] == mark:
            return first
        places = [(first + step) % _PLACES for step in range(_PROBES)]
        for place in places:
            if marks[place] == mark:
                return place
        full = [place for place in places if times[place] <= now]
        place = full[0] if full else min(places, key=times.__getitem__)
        marks[place], times[place] = mark, 0.0
        return place


class Quotas:
    """The quotas of a key store."""

    def __init__(self, keystore: str, quotas: dict[str, Quota], table: QuotaTable) -> None:
        """`quotas` has them by what they are for: `all`, `key`, `principal`."""
        self._keystore = keystore
        self._table = table
        self._all = quotas.get("all")
        self._key = quotas.get("key")
        self._principal = quotas.get("principal")
        self._marks: dict[tuple[str, str], int] = {}

    def take(self, key_id: str, principal: str) -> None:
        """Count a request; one that is refused by any quota counts for none.

        Raises:
            OperationError: THROTTLED; its details name the `quota`, and have the seconds, rounded
                up, after which it would be admitted (`retry_after`).
        """
        now = monotonic()
        first = self._admit(self._all, "all", "", now) if self._all else None
        second = self._admit(self._key, "key", key_id, now) if self._key and key_id else None
        third = (
            self._admit(self._principal, "principal", principal, now) if self._principal else None
        )
        times = self._table.times
        for admitted in (first, second, third):
            if admitted is not None:
                place, full = admitted
                times[place] = full

    def _admit(self, quota: Quota, kind: str, name: str, now: float) -> tuple[int, float]:
        """Where the bucket is and when it will be full with this request; raises OperationError."""
        place = self._table.place(self._mark(kind, name), now)
        full = max(self._table.times[place], now) + 1 / quota.rate
        wait = full - now - quota.burst / quota.rate
        # Sums of a thousand periods are off by a little; a period is what it is about.
        if wait > 1e-3 / quota.rate:
            details: dict[str, str | int] = {"quota": kind, "retry_after": math.ceil(wait)}
            raise OperationError(Fault.THROTTLED, f"Over the quota ({kind}).", details=details)
        return place, full

    def _mark(self, kind: str, name: str) -> int:
        mark = self._marks.get((kind, name))
        if mark is None:
            if len(self._marks) >= _MAX_MARKS:
                self._marks.clear()
            mark = self._marks[kind, name] = self._table.mark(self._keystore, kind, name)
        return mark
