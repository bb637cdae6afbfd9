"""What every running KMI tells of itself: its state, and what went wrong."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

from xkiproxy.kmi.base import KmiState
from xkiproxy.kmi.contract import Failure
from xkiproxy.kmi.metrics import KmiMetrics
from xkiproxy.kmi.standing import Standing

_log = logging.getLogger(__name__)

STARTING = "its lanes are starting"


class RunningKmi:
    """The part of `Kmi` that is the same with and without a queue."""

    def __init__(self, name: str, kind: str, error: str, metrics: KmiMetrics) -> None:
        """`error`: why it is not connected yet."""
        self.name = name
        self.type = kind
        self.state = KmiState.DISCONNECTED
        self.checked = float("-inf")
        self.error = error
        self.last_error: Failure | None = None
        self.standing = Standing()
        self._metrics = metrics

    def note(self, error: str) -> None:
        """Keep what went wrong."""
        self.error = error
        self.last_error = Failure(error, datetime.now(UTC))

    def become(self, state: KmiState, *, quiet: bool = False) -> None:
        """Set the state; a change is logged unless `quiet`."""
        if state is KmiState.CONNECTED:
            self.error = ""
        if state is not self.state and not quiet:
            self._log_state(state)
        self.state = state
        self._metrics.set_state(state)

    def _log_state(self, state: KmiState) -> None:
        """That lanes are there one after the other at a start is nothing to be woken for."""
        is_well = state is KmiState.CONNECTED or self.error == STARTING
        level = logging.INFO if is_well else logging.WARNING
        reason = f": {self.error}" if self.error else ""
        _log.log(level, "KMI %s is %s%s", self.name, state, reason)
