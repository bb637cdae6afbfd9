"""The dispatcher: how operations reach the lanes of a KMI.

Each KMI has a bounded queue and a fixed number of lanes. A free lane takes everything that waits,
up to `max_batch`: nothing is delayed to fill a batch; batches grow by themselves while lanes are
busy. An operation whose deadline has passed is dropped before it costs the KMI anything. A full
queue refuses at once. When a lane breaks, what it was given runs again elsewhere, once: encrypt
and decrypt can be repeated safely.

`InlineKmi` is the same interface for a KMI whose operations cost less than a queue.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from prometheus_client import Counter, Histogram

from xkiproxy.crypto.operations import Fault, Operation, OperationError, Result
from xkiproxy.kmi.base import InlineLane, KmiState, Lane, LaneError
from xkiproxy.observability.metrics import Metrics

_log = logging.getLogger(__name__)

_MAX_ATTEMPTS = 2


class Kmi(Protocol):
    """A running KMI, as key stores see it."""

    name: str
    type: str
    state: KmiState
    checked: float
    """When `check` last ran, on the clock of `time.monotonic`."""
    error: str
    """Why the state is not `connected`."""

    async def submit(self, operation: Operation, deadline: float) -> Result:
        """The result of an operation; `deadline` on the clock of `time.monotonic`.

        Raises:
            OperationError: what went wrong; THROTTLED when the queue is full, DEADLINE_EXCEEDED.
        """
        ...

    async def check(self) -> None:
        """A deep check: sets `state`, `checked` and `error`."""
        ...

    async def close(self) -> None: ...


class KmiMetrics:
    """The metrics of one KMI, with its name filled in and its children at hand."""

    def __init__(self, metrics: Metrics, kmi: str) -> None:
        self._metrics = metrics
        self._kmi = kmi
        self._durations: dict[type, Histogram] = {}
        self._outcomes: dict[tuple[type, str], Counter] = {}
        self.batch_size = metrics.kmi_batch_size.labels(kmi)
        self.queue_depth = metrics.kmi_queue_depth.labels(kmi)
        self._lanes = {s: metrics.kmi_lanes.labels(kmi, s) for s in ("idle", "busy", "failed")}

    def finished(self, kind: type, seconds: float, outcome: str) -> None:
        """Count an operation; `outcome` is `ok` or the name of a Fault in lower case."""
        duration = self._durations.get(kind)
        if duration is None:
            duration = self._metrics.kmi_operation_duration.labels(self._kmi, kind.__name__.lower())
            self._durations[kind] = duration
        duration.observe(seconds)
        counter = self._outcomes.get((kind, outcome))
        if counter is None:
            operation = kind.__name__.lower()
            counter = self._metrics.kmi_operations.labels(self._kmi, operation, outcome)
            self._outcomes[kind, outcome] = counter
        counter.inc()

    def set_lanes(self, **counts: int) -> None:
        """Set how many lanes are idle, busy and failed."""
        for state, count in counts.items():
            self._lanes[state].set(count)

    def set_state(self, state: KmiState) -> None:
        """Set the one state that is 1."""
        for other in KmiState:
            self._metrics.kmi_state.labels(self._kmi, other.value).set(other is state)


class InlineKmi:
    """A KMI that executes in the caller: no queue, no batch, no waiting."""

    def __init__(self, name: str, kind: str, lane: InlineLane, metrics: KmiMetrics) -> None:
        self.name = name
        self.type = kind
        self.state = KmiState.DISCONNECTED
        self.checked = float("-inf")
        self.error = "not checked yet"
        self._lane = lane
        self._metrics = metrics
        metrics.set_lanes(idle=1)

    async def submit(self, operation: Operation, deadline: float) -> Result:
        """See `Kmi.submit`."""
        began = time.monotonic()
        if began >= deadline:
            self._metrics.finished(type(operation), 0.0, "deadline_exceeded")
            raise _deadline_exceeded()
        try:
            result = self._lane.execute(operation)
        except OperationError as error:
            outcome = error.fault.name.lower()
            self._metrics.finished(type(operation), time.monotonic() - began, outcome)
            raise
        self._metrics.finished(type(operation), time.monotonic() - began, "ok")
        return result

    async def check(self) -> None:
        """See `Kmi.check`."""
        self.checked = time.monotonic()
        try:
            self._lane.probe()
        except OperationError as error:
            self._become(KmiState.DISCONNECTED, error.message)
        else:
            self._become(KmiState.CONNECTED, "")

    def refresh(self) -> None:
        """Take over what another process changed in the KMI; a failure shows in the state."""
        try:
            self._lane.refresh()
        except OperationError as error:
            self._become(KmiState.DISCONNECTED, error.message)

    async def close(self) -> None:
        """Close the lane."""
        self._lane.close()

    def _become(self, state: KmiState, error: str) -> None:
        if state is not self.state:
            _log.info("KMI %s is %s%s", self.name, state, f": {error}" if error else "")
        self.state = state
        self.error = error
        self._metrics.set_state(state)


class _Item:
    """An operation on its way."""

    __slots__ = ("attempts", "deadline", "future", "operation", "since")

    def __init__(
        self, operation: Operation, deadline: float, since: float, future: asyncio.Future[Result]
    ) -> None:
        self.operation = operation
        self.deadline = deadline
        self.since = since
        self.future = future
        self.attempts = 0


class QueuedKmi:
    """A KMI with lanes, a bounded queue and batches."""

    def __init__(
        self,
        name: str,
        kind: str,
        lanes: Sequence[Lane],
        metrics: KmiMetrics,
        *,
        queue_size: int,
        max_batch: int,
    ) -> None:
        """Start working; must be called in a running event loop."""
        self.name = name
        self.type = kind
        self.state = KmiState.CONNECTED
        self.checked = float("-inf")
        self.error = ""
        self._lanes = list(lanes)
        self._metrics = metrics
        self._queue: deque[_Item] = deque()
        self._queue_size = queue_size
        self._max_batch = max_batch
        self._idle: list[asyncio.Future[None]] = []
        self._failed = 0
        self._loop = asyncio.get_running_loop()
        self._workers = [asyncio.create_task(self._work(lane)) for lane in self._lanes]

    async def submit(self, operation: Operation, deadline: float) -> Result:
        """See `Kmi.submit`."""
        if self._failed == len(self._lanes):
            raise OperationError(Fault.UNAVAILABLE, "The key manager is away.")
        if len(self._queue) >= self._queue_size:
            raise OperationError(Fault.THROTTLED, "Too many requests wait for the key manager.")
        now = time.monotonic()
        item = _Item(operation, deadline, now, self._loop.create_future())
        timer = self._loop.call_later(deadline - now, _expire, item)
        self._enqueue(item)
        outcome = "internal"
        try:
            result = await item.future
            outcome = "ok"
            return result
        except OperationError as error:
            outcome = error.fault.name.lower()
            raise
        finally:
            timer.cancel()
            self._metrics.finished(type(operation), time.monotonic() - now, outcome)

    async def check(self) -> None:
        """See `Kmi.check`: probes one lane after the other."""
        self.checked = time.monotonic()
        errors = [error for lane in self._lanes if (error := await _probe(lane))]
        good = len(self._lanes) - len(errors)
        if good == len(self._lanes):
            self.state = KmiState.CONNECTED
        else:
            self.state = KmiState.DEGRADED if good else KmiState.DISCONNECTED
        self.error = errors[0] if errors else ""
        self._metrics.set_state(self.state)

    async def close(self) -> None:
        """Stop the workers and close the lanes; what still waits is refused."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        self._refuse_all("The proxy is stopping.")
        for lane in self._lanes:
            await lane.close()

    def _enqueue(self, item: _Item, *, first: bool = False) -> None:
        if first:
            self._queue.appendleft(item)
        else:
            self._queue.append(item)
        while self._idle:
            waiter = self._idle.pop()
            if not waiter.done():
                waiter.set_result(None)
                break

    async def _work(self, lane: Lane) -> None:
        while True:
            batch = self._take_batch()
            if not batch:
                waiter = self._loop.create_future()
                self._idle.append(waiter)
                self._report_lanes()
                await waiter
                continue
            self._metrics.batch_size.observe(len(batch))
            self._report_lanes()
            try:
                outcomes = await lane.execute([item.operation for item in batch])
            except LaneError as error:
                self._lane_broke(batch, error)
                return
            except Exception:
                # Whatever a lane raises, the requests it was given must get an answer.
                _log.exception("KMI %s: a lane failed", self.name)
                self._lane_broke(batch, LaneError("internal error"))
                return
            for item, outcome in zip(batch, outcomes, strict=True):
                _settle(item, outcome)

    def _take_batch(self) -> list[_Item]:
        batch: list[_Item] = []
        while self._queue and len(batch) < self._max_batch:
            item = self._queue.popleft()
            if not item.future.done():  # done: its deadline passed, or its client went away
                batch.append(item)
        self._metrics.queue_depth.set(len(self._queue))
        return batch

    def _lane_broke(self, batch: Sequence[_Item], error: LaneError) -> None:
        _log.warning("KMI %s: a lane broke: %s", self.name, error)
        self._failed += 1
        alone = self._failed == len(self._lanes)
        self.state = KmiState.DISCONNECTED if alone else KmiState.DEGRADED
        self.error = str(error)
        self._metrics.set_state(self.state)
        self._report_lanes()
        for item in reversed(batch):
            item.attempts += 1
            if item.attempts >= _MAX_ATTEMPTS or alone:
                _settle(item, OperationError(Fault.UNAVAILABLE, "The key manager is away."))
            else:
                self._enqueue(item, first=True)
        if alone:
            self._refuse_all("The key manager is away.")

    def _refuse_all(self, why: str) -> None:
        while self._queue:
            _settle(self._queue.popleft(), OperationError(Fault.UNAVAILABLE, why))

    def _report_lanes(self) -> None:
        idle = sum(not waiter.done() for waiter in self._idle)
        busy = len(self._lanes) - idle - self._failed
        self._metrics.set_lanes(idle=idle, busy=busy, failed=self._failed)


async def _probe(lane: Lane) -> str:
    try:
        await lane.probe()
    except (OperationError, LaneError) as error:
        return str(error)
    return ""


def _settle(item: _Item, outcome: Result | OperationError) -> None:
    if item.future.done():
        return
    if isinstance(outcome, OperationError):
        item.future.set_exception(outcome)
    else:
        item.future.set_result(outcome)


def _expire(item: _Item) -> None:
    _settle(item, _deadline_exceeded())


def _deadline_exceeded() -> OperationError:
    return OperationError(Fault.DEADLINE_EXCEEDED, "The key manager missed the deadline.")
