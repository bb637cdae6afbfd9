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
_MAX_REMEMBERED = 4096
_LONGEST_REMEMBERED = 4096
"""Names of more characters are looked up anew each time: a client chooses how long they are."""


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
        self.marks: list[int] | memoryview[int] = [0] * _PLACES
        self.times: list[float] | memoryview[float] = [0.0] * _PLACES
        self._key = os.urandom(_KEY_SIZE)
        if descriptor is not None:
            self._share(descriptor)

    def _share(self, descriptor: int) -> None:
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


_Bucket = tuple[int, int, float, float, float, str]
"""Its mark and its place; in seconds, what a request takes, what a burst takes and a little more
(sums of a thousand periods are off by less), and what a burst takes; what it is for.
"""


class Quotas:
    """The quotas of a key store."""

    def __init__(self, keystore: str, quotas: dict[str, Quota], table: QuotaTable) -> None:
        """`quotas` has them by what they are for: `all`, `key`, `principal`."""
        self._keystore = keystore
        self._quotas = quotas
        self._table = table
        self._buckets: dict[tuple[str, str], list[_Bucket]] = {}

    def take(self, key_id: str, principal: str) -> None:
        """Count a request; one that is refused by any quota counts for none.

        Raises:
            OperationError: THROTTLED; its details name the `quota`, and have the seconds, rounded
                up, after which it would be admitted (`retry_after`).
        """
        now = monotonic()
        marks, times = self._table.marks, self._table.times
        buckets = self._buckets.get((key_id, principal))
        if buckets is None:
            buckets = self._find(key_id, principal, now)
        for bucket in buckets:
            mark, place, period, limit, _, _ = bucket
            if marks[place] != mark:  # others needed it
                place = self._table.place(mark, now)
                self._buckets.pop((key_id, principal), None)
            full = times[place]
            full = (full if full > now else now) + period
            if full - now > limit:
                self._give_back(buckets[: buckets.index(bucket)], now)
                raise _over_quota(bucket, full - now)
            times[place] = full

    def _give_back(self, buckets: list[_Bucket], now: float) -> None:
        for mark, _, period, *_ in buckets:
            self._table.times[self._table.place(mark, now)] -= period

    def _find(self, key_id: str, principal: str, now: float) -> list[_Bucket]:
        """The buckets that a request is counted in; one for no key has none of a key."""
        names = {"all": "", "key": key_id, "principal": principal}
        buckets: list[_Bucket] = []
        for kind, name in names.items():
            quota = self._quotas.get(kind)
            if quota is not None and (name or kind != "key"):
                mark = self._table.mark(self._keystore, kind, name)
                place = self._table.place(mark, now)
                period, depth = 1 / quota.rate, quota.burst / quota.rate
                limit = depth + 1e-3 * period
                # Under the quota that was before a reload more time may have been taken than a
                # burst is now: such a bucket is empty, and no emptier than that.
                self._table.times[place] = min(self._table.times[place], now + depth)
                buckets.append((mark, place, period, limit, depth, kind))
        if len(self._buckets) >= _MAX_REMEMBERED:
            self._buckets.clear()
        if len(principal) <= _LONGEST_REMEMBERED:
            self._buckets[key_id, principal] = buckets
        return buckets


def _over_quota(bucket: _Bucket, seconds: float) -> OperationError:
    """`seconds` until the bucket would be full, with the request that it refuses."""
    *_, depth, kind = bucket
    details: dict[str, str | int] = {"quota": kind, "retry_after": math.ceil(seconds - depth)}
    return OperationError(Fault.THROTTLED, f"Over the quota ({kind}).", details=details)
