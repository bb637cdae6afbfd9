"""A KMI whose operations cost less than a queue."""

from __future__ import annotations

import time
from collections.abc import Sequence

from xkiproxy.crypto.operations import Operation, OperationError, Result
from xkiproxy.kmi.base import InlineLane, KmiState, LaneState
from xkiproxy.kmi.contract import deadline_exceeded
from xkiproxy.kmi.metrics import KmiMetrics
from xkiproxy.kmi.running import RunningKmi
from xkiproxy.observability.logging import utf8
from xkiproxy.observability.timing import Timing


class InlineKmi(RunningKmi):
    """A KMI that executes in the caller: no queue, no batch, no waiting."""

    def __init__(self, name: str, kind: str, lane: InlineLane, metrics: KmiMetrics) -> None:
        super().__init__(name, kind, "not checked yet", metrics)
        self.is_full = False
        self._lane = lane
        metrics.count_lanes(lambda: self.lanes)

    @property
    def lanes(self) -> list[LaneState]:
        """See `Kmi.lanes`: it is never busy when somebody asks."""
        failed = self.state is KmiState.DISCONNECTED and self.last_error is not None
        return [LaneState.FAILED if failed else LaneState.IDLE]

    async def submit(
        self, operation: Operation, deadline: float, timing: Timing | None = None
    ) -> Result:
        """See `Kmi.submit`."""
        del timing  # all of its time is the operation's
        began = time.monotonic()
        outcome = "internal"
        try:
            if began >= deadline:
                raise deadline_exceeded()
            result = self._lane.execute(operation)
            outcome = "ok"
            return result
        except OperationError as error:
            outcome = error.fault.name.lower()
            raise
        finally:
            self._metrics.finished(type(operation), time.monotonic() - began, outcome)

    async def check(self) -> None:
        """See `Kmi.check`."""
        self.checked = time.monotonic()
        try:
            self._lane.probe()
        except OperationError as error:
            self._become(KmiState.DISCONNECTED, error.message)
        else:
            self._become_usable()

    async def first_failures(self) -> Sequence[str]:
        """See `Kmi.first_failures`: there is nothing to start."""
        return ()

    def start(self) -> None:
        """See `Kmi.start`."""

    def refresh(self, keys_changed: bool) -> None:
        """See `Kmi.refresh`; a failure shows in the state."""
        del keys_changed  # the lane notices by itself
        try:
            self._lane.refresh()
        except OperationError as error:
            self._become(KmiState.DISCONNECTED, error.message)
        else:
            if self._lane.warning and self.state is KmiState.CONNECTED:
                self._become_usable()

    async def close(self) -> None:
        """Close the lane."""
        self._lane.close()

    def _become_usable(self) -> None:
        warning = self._lane.warning
        self._become(KmiState.DEGRADED if warning else KmiState.CONNECTED, warning)

    def _become(self, state: KmiState, error: str) -> None:
        if error:
            self.note(utf8(error))  # it may name a file
        self.become(state)
