"""What is counted of a KMI."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from xkiproxy.kmi.base import BreakReason, KmiState, LaneState
from xkiproxy.observability.metrics import Metrics
from xkiproxy.observability.series import Count, Distribution


class KmiMetrics:
    """The metrics of one KMI, with its name filled in and its children at hand."""

    def __init__(self, metrics: Metrics, kmi: str) -> None:
        self._metrics = metrics
        self._kmi = kmi
        self._operations: dict[tuple[type, str], tuple[Distribution, Count]] = {}
        self.batch_size = metrics.kmi_batch_size.labels(kmi)
        self.queue_depth = metrics.kmi_queue_depth.labels(kmi)
        self.queue_capacity = metrics.kmi_queue_capacity.labels(kmi)

    def finished(self, kind: type, seconds: float, outcome: str) -> None:
        """Count an operation; `outcome` is `ok`, `cancelled` or a Fault's name in lower case."""
        children = self._operations.get((kind, outcome))
        if children is None:
            operation = kind.__name__.lower()
            children = self._operations[kind, outcome] = (
                self._metrics.kmi_operation_duration.labels(self._kmi, operation),
                self._metrics.kmi_operations.labels(self._kmi, operation, outcome),
            )
        duration, counter = children
        duration.observe(seconds)
        counter.inc()

    def count_lanes(self, read: Callable[[], Sequence[LaneState]]) -> None:
        """Say whom to ask what the lanes do, whenever the metrics are read."""
        for state in LaneState:
            level = self._metrics.kmi_lanes.labels(self._kmi, state.value)
            level.set_function(partial(_count, read, state))

    def restarted(self, reason: BreakReason) -> None:
        """Count a lane that broke, or could not be started."""
        self._metrics.kmi_lane_restarts.labels(self._kmi, reason.value).inc()

    def set_state(self, state: KmiState) -> None:
        """Set the one state that is 1."""
        for other in KmiState:
            self._metrics.kmi_state.labels(self._kmi, other.value).set(other is state)


def _count(read: Callable[[], Sequence[LaneState]], state: LaneState) -> int:
    return read().count(state)
