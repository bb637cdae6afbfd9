"""What a load came to."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hdrh.histogram import HdrHistogram

DEADLINE_US = 250_000
"""For so long the clouds wait for an answer."""

PERCENTILES = (50.0, 90.0, 99.0, 99.9)

_LOWEST_US, _HIGHEST_US, _DIGITS = 1, 60_000_000, 3


class LoadError(Exception):
    """A load could not be run; the text says why."""


def new_histogram() -> HdrHistogram:
    """Latencies in microseconds, from 1 us to 60 s, to three digits."""
    return HdrHistogram(_LOWEST_US, _HIGHEST_US, _DIGITS)


def histogram_of(latencies_ns: array[int]) -> HdrHistogram:
    """The histogram of latencies in nanoseconds, which are cheaper to collect in an array."""
    histogram = new_histogram()
    for micros, count in Counter(nanos // 1000 for nanos in latencies_ns).items():
        histogram.record_value(min(max(micros, _LOWEST_US), _HIGHEST_US), count)
    return histogram


@dataclass
class LoadResult:
    """The counts of the requests that were due in the measured time, and their latencies.

    `ok` answers were right; `wrong` had a wrong plaintext; `errors` are all others, by kind.
    `histogram` has the latencies of the answers that were right when they came. `seconds` go from
    the start to the last answer, or to the end of the load if that is later. `checked` encrypt
    answers were decrypted afterwards: what did not come back has been moved from `ok` to `wrong`
    or `errors`. `waited` requests of an open loop found no free connection; `signed_late` ones
    were signed while the load ran; `reconnects` are connections that had to be opened again.
    `late` right answers came over DEADLINE_US after their request was written, `longest_us` is the
    longest that one took from then: under a flood an open loop's latencies are mostly of waiting in
    the generator.
    `cpu_seconds` is the generator's own time on the CPU, `server_cpu_seconds` that of the server,
    by process.
    """

    ok: int = 0
    wrong: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    histogram: HdrHistogram = field(default_factory=new_histogram, repr=False)
    cpu_seconds: float = 0.0
    checked: int = 0
    waited: int = 0
    signed_late: int = 0
    reconnects: int = 0
    late: int = 0
    longest_us: int = 0
    server_cpu_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Right answers a second."""
        return self.ok / self.seconds if self.seconds else 0.0

    @property
    def error_count(self) -> int:
        """All errors; wrong plaintexts are counted apart."""
        return sum(self.errors.values())

    @property
    def total(self) -> int:
        """All requests that were due in the measured time."""
        return self.ok + self.wrong + self.error_count

    def latency_us(self, percentile: float) -> int:
        """The latency that this percentage of right answers did not exceed, in microseconds."""
        return int(self.histogram.get_value_at_percentile(percentile))

    def latencies_us(self) -> dict[str, int]:
        """p50, p90, p99, p99.9 and max, in microseconds."""
        values = {f"p{percentile:g}": self.latency_us(percentile) for percentile in PERCENTILES}
        return {**values, "max": int(self.histogram.get_max_value())}

    def cpu_us_per_request(self) -> dict[str, float]:
        """Time on the CPU for each request, in microseconds: of the generator and of the server."""
        spent = {"generator": self.cpu_seconds, **self.server_cpu_seconds}
        return {name: seconds * 1e6 / self.total for name, seconds in spent.items() if self.total}

    def to_json(self) -> dict[str, Any]:
        """Everything, the histogram in the encoding of HdrHistogram (V2, Base64)."""
        return {
            "ok": self.ok,
            "wrong": self.wrong,
            "errors": self.errors,
            "seconds": self.seconds,
            "rate": self.rate,
            "latency_us": self.latencies_us(),
            "cpu_seconds": self.cpu_seconds,
            "server_cpu_seconds": self.server_cpu_seconds,
            "checked": self.checked,
            "waited": self.waited,
            "signed_late": self.signed_late,
            "reconnects": self.reconnects,
            "late": self.late,
            "longest_us": self.longest_us,
            "histogram": self.histogram.encode().decode("ascii"),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LoadResult:
        """The reverse of `to_json`."""
        derived = {"rate", "latency_us", "histogram"}
        fields = {name: value for name, value in data.items() if name not in derived}
        return cls(**fields, histogram=HdrHistogram.decode(data["histogram"].encode("ascii")))

    def dumps(self) -> str:
        """`to_json` as a line of text."""
        return json.dumps(self.to_json())


def merge(results: Iterable[LoadResult]) -> LoadResult:
    """The results of generators that ran at the same time, as one."""
    merged = LoadResult()
    for result in results:
        for name in ("ok", "wrong", "checked", "waited", "signed_late", "reconnects", "late"):
            setattr(merged, name, getattr(merged, name) + getattr(result, name))
        merged.errors = dict(Counter(merged.errors) + Counter(result.errors))
        merged.seconds = max(merged.seconds, result.seconds)
        merged.longest_us = max(merged.longest_us, result.longest_us)
        merged.cpu_seconds += result.cpu_seconds
        merged.histogram.add(result.histogram)
    return merged
