"""Counters, gauges and histograms that cost little to count and can be added up.

`prometheus_client` writes them out; counting is done here, because its own take a lock for every
value and walk through a histogram's buckets. One thread counts, so none is needed. What one process
has counted is a `Snapshot` of plain values: `Collection.merge` adds up those of several processes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from operator import add
from typing import Any, Generic, TypeVar

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

Values = list[float]
"""One value; or, of a histogram, the counts of its buckets (not added up) and the sum."""

Merge = Callable[[float, float], float]

Snapshot = Mapping[str, Mapping[tuple[str, ...], Values]]
"""By the name of the family and the values of its labels."""


class Count:
    """A number that grows."""

    __slots__ = ("_value",)

    def __init__(self) -> None:
        self._value = 0.0

    def inc(self, amount: float = 1) -> None:
        """Add to it."""
        self._value += amount

    def values(self) -> Values:
        """See `Values`."""
        return [self._value]


class Level:
    """A number that goes up and down."""

    __slots__ = ("_read", "_value")

    def __init__(self) -> None:
        self._value = 0.0
        self._read: Callable[[], float] | None = None

    def set(self, value: float) -> None:
        """Say what it is."""
        self._value = value

    def set_function(self, read: Callable[[], float]) -> None:
        """Say whom to ask what it is."""
        self._read = read

    def values(self) -> Values:
        """See `Values`."""
        return [self._value if self._read is None else float(self._read())]


class Distribution:
    """How many observations were up to each of some bounds, and their sum."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def values(self) -> Values:
        """See `Values`."""
        return [*self._counts, self._sum]


_Child = TypeVar("_Child", Count, Level, Distribution)


_KINDS: dict[type, str] = {Count: "counter", Level: "gauge", Distribution: "histogram"}


class Family(Generic[_Child]):
    """A metric with a value for each combination of its labels."""

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str],
        make: Callable[[], _Child],
        bounds: Sequence[float] = (),
        *,
        merge: Merge = add,
    ) -> None:
        """`merge`: what two processes' values are together, such as the larger one."""
        self.merge = merge
        self.name = name
        self.documentation = documentation
        self.label_names = labels
        self.bounds = bounds
        self._make: Callable[[], _Child] = make
        self._children: dict[tuple[str, ...], _Child] = {}

    def labels(self, *values: str) -> _Child:
        """The child with these values; keep it where it is counted often."""
        child = self._children.get(values)
        if child is None:
            if len(values) != len(self.label_names):
                raise ValueError(f"{self.name} has the labels {', '.join(self.label_names)}")
            child = self._children[values] = self._make()
        return child

    def clear(self) -> None:
        """Forget all children: what they were about is no more."""
        self._children.clear()

    def values(self) -> dict[tuple[str, ...], Values]:
        """What all children have counted."""
        return {labels: child.values() for labels, child in self._children.items()}

    @property
    def is_gauge(self) -> bool:
        """Whether its values say how it is, rather than what was counted."""
        return self.kind == "gauge"

    @property
    def kind(self) -> str:
        """What Prometheus calls it."""
        return _KINDS[type(self._make())]

    def describe(self, values: Mapping[tuple[str, ...], Values]) -> Metric:
        """These values, for `prometheus_client`."""
        made = self._make()
        if isinstance(made, Distribution):
            return self._histogram(values)
        kind = CounterMetricFamily if isinstance(made, Count) else GaugeMetricFamily
        metric = kind(self.name, self.documentation, labels=self.label_names)
        for labels, (value,) in values.items():
            metric.add_metric(labels, value)
        return metric

    def _histogram(self, values: Mapping[tuple[str, ...], Values]) -> Metric:
        metric = HistogramMetricFamily(self.name, self.documentation, labels=self.label_names)
        names = [*map(str, map(float, self.bounds)), "+Inf"]
        for labels, (*counts, total) in values.items():
            metric.add_metric(labels, list(zip(names, accumulate(counts), strict=True)), total)
        return metric


def counter(name: str, documentation: str, *labels: str) -> Family[Count]:
    """A family of counters; `name` without `_total`."""
    return Family(name, documentation, labels, Count)


def gauge(name: str, documentation: str, *labels: str, merge: Merge = add) -> Family[Level]:
    """A family of gauges; see `Family` for `merge`."""
    return Family(name, documentation, labels, Level, merge=merge)


def histogram(
    name: str, documentation: str, *labels: str, bounds: Sequence[float]
) -> Family[Distribution]:
    """A family of histograms; `bounds` are those of the buckets but the last, ascending."""
    return Family(name, documentation, labels, lambda: Distribution(bounds), bounds)


class Collection:
    """All families of a process, as `prometheus_client` collects them."""

    def __init__(self, families: Iterable[Family[Any]]) -> None:
        self._families = {family.name: family for family in families}
        self.read: Callable[[], Snapshot] = self.snapshot
        """Where `collect` takes its values from."""

    def families(self) -> Iterable[Family[Any]]:
        """In the order in which they are written out."""
        return self._families.values()

    def snapshot(self) -> Snapshot:
        """What this process has counted so far."""
        return {name: family.values() for name, family in self._families.items()}

    def collect(self) -> Iterator[Metric]:
        """For a registry."""
        for name, values in self.read().items():
            yield self._families[name].describe(values)

    def merge(self, snapshots: Iterable[Snapshot]) -> Snapshot:
        """What several processes have counted together."""
        found: dict[str, dict[tuple[str, ...], Values]] = {}
        for snapshot in snapshots:
            for name, children in snapshot.items():
                join = self._families[name].merge
                family = found.setdefault(name, {})
                for labels, values in children.items():
                    known = family.get(labels)
                    pairs = zip(known or values, values, strict=True)
                    family[labels] = values if known is None else [join(a, b) for a, b in pairs]
        return found

    def lasting(self, snapshot: Snapshot) -> Snapshot:
        """What of an ended process still counts: all but its gauges."""
        return {
            name: children
            for name, children in snapshot.items()
            if not self._families[name].is_gauge
        }


def to_json(snapshot: Snapshot) -> list[Any]:
    """A snapshot as JSON has it."""
    return [[name, [[*child] for child in children.items()]] for name, children in snapshot.items()]


def from_json(value: Sequence[Any]) -> Snapshot:
    """What `to_json` made."""
    return {name: {tuple(labels): values for labels, values in pairs} for name, pairs in value}
