"""The dispatcher: how operations reach the lanes of a KMI.

Each KMI has a bounded queue and a fixed number of lanes. A free lane takes everything that waits,
up to `max_batch`: nothing is delayed to fill a batch; batches grow by themselves while lanes are
busy. An operation whose deadline has passed is dropped before it costs the KMI anything. A full
queue refuses at once. When a lane breaks, what it was given runs again elsewhere, once and alone:
encrypt and decrypt can be repeated safely. Each lane has a supervisor that replaces it, with
growing pauses, and brings it home from another endpoint once its own is back. While no lane is
there and none can be started, the breaker is open: requests are refused at once.

`InlineKmi` is the same interface for a KMI whose operations cost less than a queue.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import NamedTuple, Protocol

from xkiproxy.crypto.operations import Fault, Operation, OperationError, Result
from xkiproxy.kmi.base import (
    BreakReason,
    InlineLane,
    KmiState,
    Lane,
    LaneError,
    LaneState,
    Launcher,
)
from xkiproxy.kmi.deadlines import Deadlines
from xkiproxy.kmi.standing import Standing
from xkiproxy.observability.logging import utf8
from xkiproxy.observability.metrics import Metrics
from xkiproxy.observability.series import Count, Distribution
from xkiproxy.observability.timing import Batch, Timing, Visit

_log = logging.getLogger(__name__)

_MAX_ATTEMPTS = 2

_FIRST_PAUSE_SECONDS = 0.1
_LAST_PAUSE_SECONDS = 2.0
"""Pauses between the starts of a lane: none, then the first, then doubled, up to the last."""

_STEADY_SECONDS = 1.0
"""A lane that ran so long was well: its next start is not delayed."""

_HOME_SECONDS = 30.0
"""So often a lane that is at another endpoint is tried at its own."""

_DRAIN_SECONDS = 1.0
"""A lane that is replaced by one at home has so long to end its batch."""

_PATIENCE_SECONDS = 5.0
"""So long the first check waits for the other lanes once one is there."""

_STARTING = "its lanes are starting"


class Trouble(NamedTuple):
    """What went wrong, and when."""

    error: str
    time: datetime


class Kmi(Protocol):
    """A running KMI, as key stores see it."""

    name: str
    type: str
    state: KmiState
    checked: float
    """When `check` last ran, on the clock of `time.monotonic`."""
    error: str
    """Why the state is not `connected`."""
    last_error: Trouble | None
    """What went wrong last, kept when it is over: a KMI that comes and goes must not look well."""
    standing: Standing
    """For key stores that have another KMI to ask."""

    @property
    def lanes(self) -> list[LaneState]:
        """What each lane does, by its index."""
        ...

    @property
    def is_full(self) -> bool:
        """Whether `submit` would refuse: more than can be is waiting."""
        ...

    async def submit(
        self, operation: Operation, deadline: float, timing: Timing | None = None
    ) -> Result:
        """The result of an operation; `deadline` on the clock of `time.monotonic`.

        `timing` is told of the batch that it was in, where there is a queue.

        Raises:
            OperationError: what went wrong; THROTTLED when the queue is full, DEADLINE_EXCEEDED.
        """
        ...

    async def check(self) -> None:
        """A deep check: sets `state`, `checked` and `error`."""
        ...

    async def first_failures(self) -> Sequence[str]:
        """What the first start of each lane failed with, once all were tried.

        Its state says nothing of that: a lane that cannot be started at one endpoint is started at
        another.
        """
        ...

    def start(self) -> None:
        """Begin to work; in a running event loop."""
        ...

    def refresh(self, keys_changed: bool) -> None:
        """Take over what another process changed in the KMI.

        `keys_changed`: the catalog has changed, so keys may have been made, rotated or destroyed.
        """
        ...

    async def close(self) -> None: ...


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


class InlineKmi:
    """A KMI that executes in the caller: no queue, no batch, no waiting."""

    def __init__(self, name: str, kind: str, lane: InlineLane, metrics: KmiMetrics) -> None:
        self.name = name
        self.type = kind
        self.state = KmiState.DISCONNECTED
        self.checked = float("-inf")
        self.error = "not checked yet"
        self.last_error: Trouble | None = None
        self.standing = Standing()
        self.is_full = False
        self._lane = lane
        self._metrics = metrics
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
                raise _deadline_exceeded()
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
        self.error = utf8(error)  # it may name a file
        if state is not self.state:
            _log_state(self.name, state, self.error)
        self.state = state
        if error:
            self.last_error = Trouble(self.error, datetime.now(UTC))
        self._metrics.set_state(state)


class _Item:
    """An operation on its way."""

    __slots__ = ("attempts", "batch", "deadline", "followed", "future", "operation")

    def __init__(
        self,
        operation: Operation,
        deadline: float,
        future: asyncio.Future[Result],
        followed: bool,
    ) -> None:
        self.operation = operation
        self.deadline = deadline
        self.future = future
        self.attempts = 0
        self.followed = followed
        """Whether somebody wants to know of its batch."""
        if followed:
            self.batch: Batch | None = None


class _Load:
    """What a lane has been given and has not settled; its next batch comes at `enough`."""

    __slots__ = ("enough", "unsettled")

    def __init__(self) -> None:
        self.unsettled = 0
        self.enough = 0


class QueuedKmi:
    """A KMI with supervised lanes, a bounded queue and batches."""

    def __init__(
        self,
        name: str,
        kind: str,
        launcher: Launcher,
        metrics: KmiMetrics,
        *,
        lanes: int,
        queue_size: int,
        max_batch: int,
    ) -> None:
        """`launcher` starts the lanes, once `start` is called."""
        self.name = name
        self.type = kind
        self.state = KmiState.DISCONNECTED
        self.checked = float("-inf")
        self.error = _STARTING
        self.last_error: Trouble | None = None
        self.standing = Standing()
        self._launcher = launcher
        self._metrics = metrics
        self._queue: deque[_Item] = deque()
        self._queue_size = queue_size
        metrics.queue_depth.set_function(lambda: len(self._queue))
        metrics.queue_capacity.set(queue_size)
        self._max_batch = max_batch
        self._epoch = 0
        self._pumping = False
        self._lanes: list[Lane | None] = [None] * lanes
        self._failures: list[str] = [""] * lanes
        """Why the last start of each lane failed; empty where it did not."""
        metrics.count_lanes(lambda: self.lanes)
        self._idle: deque[Lane] = deque()
        self._loads: dict[Lane, _Load] = {}
        self._batches: set[asyncio.Task[None]] = set()
        self._breaker_open = False
        self._closing = False
        self._untried = set(range(lanes))
        self._first_failures: list[str] = []
        self._any_tried = asyncio.Event()
        self._all_tried = asyncio.Event()
        self._supervisors: list[asyncio.Task[None]] = []

    @property
    def is_full(self) -> bool:
        """See `Kmi.is_full`."""
        return len(self._queue) >= self._queue_size

    @property
    def lanes(self) -> list[LaneState]:
        """See `Kmi.lanes`."""
        return [self._state_of(index) for index in range(len(self._lanes))]

    def _state_of(self, index: int) -> LaneState:
        lane = self._lanes[index]
        if lane is None:
            return LaneState.FAILED if self._failures[index] else LaneState.STARTING
        return LaneState.IDLE if lane in self._idle else LaneState.BUSY

    def start(self) -> None:
        """See `Kmi.start`."""
        self._loop = asyncio.get_running_loop()
        self._deadlines = Deadlines(self._loop, self._expire)
        count = len(self._lanes)
        self._supervisors = [self._loop.create_task(self._supervise(i)) for i in range(count)]

    async def submit(
        self, operation: Operation, deadline: float, timing: Timing | None = None
    ) -> Result:
        """See `Kmi.submit`."""
        if self._breaker_open:
            raise _away()
        if self.is_full:
            raise OperationError(Fault.THROTTLED, "Too many requests wait for the key manager.")
        now = time.monotonic()
        item = _Item(operation, deadline, self._loop.create_future(), timing is not None)
        self._deadlines.add(item)
        self._queue.append(item)
        self._schedule_pump()
        outcome = "internal"
        try:
            result = await item.future
            outcome = "ok"
            return result
        except OperationError as error:
            outcome = error.fault.name.lower()
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"  # another KMI was faster
            raise
        finally:
            self._deadlines.remove(item)
            ended = time.monotonic()
            self._metrics.finished(type(operation), ended - now, outcome)
            if timing is not None:
                timing.visits.append(Visit(self.name, now, item.batch, item.attempts, ended))

    async def check(self) -> None:
        """See `Kmi.check`: every lane that is there encrypts and decrypts with its probe key.

        The first check waits until the lanes have been started, or could not be; once there is one
        it does not wait long for one that hangs.
        """
        await self._any_tried.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE_SECONDS):
                await self._all_tried.wait()
        self.checked = time.monotonic()
        lanes = [lane for lane in self._lanes if lane is not None]
        await asyncio.gather(*(_probe(lane) for lane in lanes))

    async def first_failures(self) -> Sequence[str]:
        """See `Kmi.first_failures`."""
        await self._all_tried.wait()
        return self._first_failures

    def refresh(self, keys_changed: bool) -> None:
        """See `Kmi.refresh`: every lane looks its keys up again when it next needs them."""
        self._epoch += keys_changed

    async def close(self) -> None:
        """Stop the supervisors and close the lanes; what still waits is refused."""
        self._closing = True
        for supervisor in self._supervisors:
            supervisor.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        await asyncio.gather(*self._batches, return_exceptions=True)
        self._refuse_all()

    # ---- operations ------------------------------------------------------------------------

    def _schedule_pump(self) -> None:
        """Once in this round of the loop: what is submitted in one round makes one batch."""
        if not self._pumping and self._idle:
            self._pumping = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pumping = False
        while self._idle and (batch := self._take_batch()):
            lane = self._idle.popleft()
            task = self._loop.create_task(self._execute(lane, self._loads[lane], batch))
            self._batches.add(task)
            task.add_done_callback(self._batches.discard)

    def _take_batch(self) -> list[_Item]:
        """Everything that waits, up to `max_batch`.

        What was in a batch that broke its lane goes alone: one of them may be the cause, and it
        must not take the others with it again.
        """
        batch: list[_Item] = []
        now = time.monotonic()
        while self._queue and len(batch) < self._max_batch:
            if self._queue[0].attempts and batch:
                break
            item = self._queue.popleft()
            if item.deadline <= now:
                _settle(item, _deadline_exceeded())
            if item.future.done():  # over, or nobody waits any more
                continue
            batch.append(item)
            if item.attempts:
                break
        return batch

    async def _execute(self, lane: Lane, load: _Load, batch: list[_Item]) -> None:
        self._metrics.batch_size.observe(len(batch))
        for item in batch:
            if item.followed:
                item.batch = Batch(self._index(lane), len(batch), time.monotonic())
        # When a quarter is left the lane may have its next batch: it goes on without a pause. What
        # is left of the one before counts too: a lane may refuse most of a batch before it has sent
        # anything, and must not be given one after the other then.
        left = len(batch)
        load.unsettled += left
        load.enough = left // 4

        def settle(index: int, outcome: Result | OperationError) -> None:
            nonlocal left
            _settle(batch[index], outcome)
            left -= 1
            load.unsettled -= 1
            if load.unsettled == load.enough:
                self._free(lane)

        try:
            await lane.execute([item.operation for item in batch], self._epoch, settle)
        except LaneError as error:
            self._run_again(batch, started=error.started)
        except Exception:
            # Whatever a lane raises, the requests it was given must get an answer, and nobody knows
            # what state the lane is in: it is closed, so that its supervisor starts another.
            index = self._index(lane)
            _log.exception("KMI %s: lane %d failed", self.name, index)
            self._retire(lane)
            self._run_again(batch, started=True)
            await self._close(index, lane)
        else:
            if left:
                self._make_up(lane, load, batch, left)

    def _make_up(self, lane: Lane, load: _Load, batch: list[_Item], left: int) -> None:
        """A lane that forgot some of a batch, or settled some twice, must not be lost by it."""
        _log.error("KMI %s: lane %d left %d open", self.name, self._index(lane), left)
        for item in batch:
            _settle(item, OperationError(Fault.INTERNAL, "The key manager gave no answer."))
        load.unsettled -= left
        if load.unsettled <= load.enough and lane not in self._idle:
            self._free(lane)

    def _index(self, lane: Lane) -> int:
        """Which lane it is; -1 for one that has just been taken away."""
        return self._lanes.index(lane) if lane in self._lanes else -1

    def _free(self, lane: Lane) -> None:
        if lane in self._lanes:
            self._idle.append(lane)
            self._schedule_pump()

    def _retire(self, lane: Lane) -> None:
        """Give it nothing more."""
        if lane in self._idle:
            self._idle.remove(lane)

    def _run_again(self, batch: list[_Item], *, started: bool) -> None:
        """What is not settled goes back to the front; `started` counts as an attempt."""
        for item in reversed(batch):
            if item.future.done():
                continue
            item.attempts += started
            if item.attempts >= _MAX_ATTEMPTS or self._breaker_open:
                _settle(item, _away())
            else:
                self._queue.appendleft(item)
        self._schedule_pump()

    def _expire(self, items: Iterable[_Item]) -> None:
        """End operations whose deadline has passed; the queue is for those that wait."""
        for item in items:
            _settle(item, _deadline_exceeded())
        self._queue = deque(item for item in self._queue if not item.future.done())

    def _refuse_all(self) -> None:
        while self._queue:
            _settle(self._queue.popleft(), _away())

    # ---- lanes -----------------------------------------------------------------------------

    async def _supervise(self, index: int) -> None:
        """Keep one lane running: start it, wait until it breaks, start another."""
        pause = 0.0
        while True:
            began = time.monotonic()
            try:
                lane = await self._start(index)
            except LaneError as error:
                self._metrics.restarted(error.reason)
                self._start_failed(index, error)
                self._note_first(index, error.message)
                if error.reason is BreakReason.LOGIN:
                    return
            else:
                try:
                    broken = await self._serve(index, lane)
                finally:
                    await self._close(index, self._remove(index))
                _log.warning("KMI %s: lane %d broke: %s", self.name, index, broken.message)
                self._metrics.restarted(broken.reason)
                if time.monotonic() - began > _STEADY_SECONDS:
                    pause = 0.0
            alone = not self._breaker_open and not any(self._lanes)
            # Requests wait for the last lane: it is not made to wait long.
            await asyncio.sleep(min(pause, _FIRST_PAUSE_SECONDS) if alone else pause)
            pause = min(max(pause * 2, _FIRST_PAUSE_SECONDS), _LAST_PAUSE_SECONDS)

    async def _close(self, index: int, lane: Lane) -> None:
        """Whatever closing a lane raises, another must be started in its place."""
        try:
            await lane.close()
        except Exception:
            _log.exception("KMI %s: lane %d cannot be closed", self.name, index)

    async def _start(self, index: int, *, home: bool = False) -> Lane:
        """All at the same time: what must wait for another does so in the launcher."""
        try:
            return await self._launcher.launch(index, home=home)
        except LaneError:
            raise
        except Exception as error:
            # Whatever it was (no thread, no memory): it is tried again, as any failed start.
            _log.exception("KMI %s: lane %d cannot be started", self.name, index)
            raise LaneError(type(error).__name__, BreakReason.START) from None

    async def _serve(self, index: int, lane: Lane) -> LaneError:
        self._take_in(index, lane)
        self._failures[index] = ""
        # Why others are still away, rather than why this one was.
        self.error = next(filter(None, self._failures), self.error)
        self._breaker_open = False
        self._become()
        self._note_first(index)
        broken = await self._until_broken(index)
        self._note(broken)
        return broken

    def _take_in(self, index: int, lane: Lane) -> None:
        self._lanes[index] = lane
        self._loads[lane] = _Load()
        self._idle.append(lane)
        self._schedule_pump()

    async def _until_broken(self, index: int) -> LaneError:
        """Why the lane of this index broke, whichever it was by then."""
        home = self._loop.create_task(self._bring_home(index))
        try:
            while True:
                lane = self._lanes[index]
                assert lane is not None  # noqa: S101 - only the caller takes it away
                broken = await lane.wait_broken()
                if self._lanes[index] is lane:
                    return broken
        finally:
            # Not awaited: to end a start that hangs may take seconds, and requests wait for a lane.
            home.cancel()
            self._batches.add(home)
            home.add_done_callback(self._batches.discard)

    async def _bring_home(self, index: int) -> None:
        """Replace a lane that is at another endpoint by one at its own, as soon as that is back.

        The new one works before the old one ends.
        """
        while True:
            await asyncio.sleep(_HOME_SECONDS)
            if not self._launcher.is_away(index):
                continue
            try:
                lane = await self._start(index, home=True)
            except LaneError as error:
                if error.reason is BreakReason.LOGIN:
                    return  # as anywhere: trying again could lock it
                continue
            _log.info("KMI %s: lane %d is back at its own endpoint", self.name, index)
            await self._exchange(index, lane)

    async def _exchange(self, index: int, lane: Lane) -> None:
        """Let a lane take the place of another, which ends its batch first if it can."""
        old, load = self._withdraw(index)
        self._take_in(index, lane)
        try:
            async with asyncio.timeout(_DRAIN_SECONDS):
                # To be told of it would cost every operation something.
                while load.unsettled:  # noqa: ASYNC110
                    await asyncio.sleep(_DRAIN_SECONDS / 50)
        except TimeoutError:
            pass  # what it has not settled runs again elsewhere
        finally:
            await self._close(index, old)

    def _withdraw(self, index: int) -> tuple[Lane, _Load]:
        """Take away the lane of an index, so that it is given nothing more."""
        lane = self._lanes[index]
        assert lane is not None  # noqa: S101 - only its supervisor takes it away, once
        self._lanes[index] = None
        self._retire(lane)
        return lane, self._loads.pop(lane)

    def _remove(self, index: int) -> Lane:
        lane, _ = self._withdraw(index)
        self._become()
        return lane

    def _start_failed(self, index: int, error: LaneError) -> None:
        if error.message not in self._failures:
            _log.error("KMI %s: a lane cannot be started: %s", self.name, error.message)
        self._failures[index] = error.message
        self._note(error)
        if not any(self._lanes):
            # Nothing is there and nothing can be started: the next request need not wait for it.
            self._breaker_open = True
            self._refuse_all()
        self._become()

    def _note_first(self, index: int, failure: str = "") -> None:
        """What came of the first start of a lane; of others nothing is noted."""
        if index not in self._untried:
            return
        self._untried.remove(index)
        if failure and failure not in self._first_failures:
            self._first_failures.append(failure)
        self._any_tried.set()
        if not self._untried:
            self._all_tried.set()

    def _note(self, error: LaneError) -> None:
        self.error = error.message
        self.last_error = Trouble(self.error, datetime.now(UTC))

    def _become(self) -> None:
        up = sum(lane is not None for lane in self._lanes)
        if up == len(self._lanes):
            state = KmiState.CONNECTED
            self.error = ""
        else:
            state = KmiState.DEGRADED if up else KmiState.DISCONNECTED
        if state is not self.state and not self._closing:
            _log_state(self.name, state, self.error)
        self.state = state
        self._metrics.set_state(state)


def _log_state(name: str, state: KmiState, error: str) -> None:
    """That lanes are there one after the other at a start is nothing to be woken for."""
    is_well = state is KmiState.CONNECTED or error == _STARTING
    reason = f": {error}" if error else ""
    _log.log(logging.INFO if is_well else logging.WARNING, "KMI %s is %s%s", name, state, reason)


async def _probe(lane: Lane) -> None:
    with suppress(LaneError):  # its supervisor hears of it
        await lane.probe()


def _settle(item: _Item, outcome: Result | OperationError) -> None:
    if item.future.done():
        return
    if isinstance(outcome, OperationError):
        item.future.set_exception(outcome)
    else:
        item.future.set_result(outcome)


def _away() -> OperationError:
    return OperationError(Fault.UNAVAILABLE, "The key manager is away.")


def _deadline_exceeded() -> OperationError:
    return OperationError(Fault.DEADLINE_EXCEEDED, "The key manager missed the deadline.")
