"""How many requests there were and how long they took, over the last ten minutes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from xkiproxy.observability.series import Snapshot

STEP_SECONDS = 5.0
STEPS = 120

_REQUESTS = "xkiproxy_requests"
_DURATION = "xkiproxy_request_duration_seconds"
_CODE = 3
"""Which label of `xkiproxy_requests` is the code."""


class Sample(NamedTuple):
    """What had been counted at a time; `counts` are a histogram's, the last without a bound."""

    time: float
    requests: float
    failures: float
    counts: tuple[float, ...]


class Point(NamedTuple):
    """A step: requests and failures a second, and quantiles in seconds (NaN: no request)."""

    rate: float
    failures: float
    p50: float
    p99: float


class Trend:
    """Keeps a sample every few seconds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` of the histogram of durations, in seconds."""
        self._bounds = bounds
        self._samples: deque[Sample] = deque(maxlen=STEPS + 1)

    def add(self, now: float, snapshot: Snapshot) -> None:
        """Take a sample of what all processes have counted; `now` in seconds, on any clock."""
        requests = snapshot.get(_REQUESTS, {})
        total = sum(value for (value, *_) in requests.values())
        good = sum(value for labels, (value, *_) in requests.items() if labels[_CODE] == "OK")
        children = [values[:-1] for values in snapshot.get(_DURATION, {}).values()]
        counts = [sum(column) for column in zip(*children, strict=True)]
        sample = Sample(now, total, total - good, tuple(counts or [0.0] * (len(self._bounds) + 1)))
        if self._samples and sample.requests < self._samples[-1].requests:
            self._samples.clear()  # something was counted anew
        self._samples.append(sample)

    def points(self) -> list[Point]:
        """A point for each step, the oldest first."""
        return list(self._points())

    def _points(self) -> Iterator[Point]:
        for before, after in pairwise(self._samples):
            seconds = after.time - before.time
            counts = [b - a for a, b in zip(before.counts, after.counts, strict=True)]
            yield Point(
                (after.requests - before.requests) / seconds,
                (after.failures - before.failures) / seconds,
                quantile(self._bounds, counts, 0.5),
                quantile(self._bounds, counts, 0.99),
            )


def quantile(bounds: Sequence[float], counts: Sequence[float], share: float) -> float:
    """A quantile of a histogram, linear within its bucket as Prometheus has it; NaN without data.

    What is in the last bucket, which has no bound, is said to be at the last bound.
    """
    total = sum(counts)
    if total <= 0:
        return math.nan
    wanted = share * total
    lower, below = 0.0, 0.0
    for bound, up_to in zip(bounds, accumulate(counts), strict=False):
        if up_to >= wanted:
            inside = up_to - below
            return lower + (bound - lower) * (wanted - below) / inside
        lower, below = bound, up_to
    return bounds[-1]
