"""The lanes of a KMI: started, watched, replaced, brought home.

Each lane has a supervisor that replaces it, with growing pauses, and brings it home from another
endpoint once its own is back. While no lane is there and none can be started, the breaker is open.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress

from xkiproxy.kmi.base import BreakReason, KmiState, Lane, LaneError, LaneState, Launcher
from xkiproxy.kmi.dispatcher import Dispatcher, Load, close_lane
from xkiproxy.kmi.metrics import KmiMetrics
from xkiproxy.kmi.queue import Queue
from xkiproxy.kmi.running import RunningKmi

_log = logging.getLogger(__name__)

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


class Supervision:
    """Keeps the lanes of a KMI running, and its state true."""

    def __init__(
        self,
        kmi: RunningKmi,
        launcher: Launcher,
        queue: Queue,
        dispatcher: Dispatcher,
        metrics: KmiMetrics,
        lanes: int,
    ) -> None:
        """`lanes`: how many; `dispatcher` gets each once it has been started."""
        self._kmi = kmi
        self._launcher = launcher
        self._queue = queue
        self._dispatcher = dispatcher
        self._metrics = metrics
        self.lanes: list[Lane | None] = [None] * lanes
        """By their index; None for one that is not there."""
        self._failures: list[str] = [""] * lanes
        """Why the last start of each lane failed; empty where it did not."""
        self._first_starts = _FirstStarts(lanes)
        self._closing = False
        self._supervisors: list[asyncio.Task[None]] = []
        self._ending: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Start the lanes; in a running event loop."""
        self._loop = asyncio.get_running_loop()
        count = len(self.lanes)
        self._supervisors = [self._loop.create_task(self._supervise(i)) for i in range(count)]

    def states(self) -> list[LaneState]:
        """What each lane does, by its index."""
        return [self._state_of(index) for index in range(len(self.lanes))]

    def _state_of(self, index: int) -> LaneState:
        lane = self.lanes[index]
        if lane is None:
            return LaneState.FAILED if self._failures[index] else LaneState.STARTING
        return LaneState.IDLE if self._dispatcher.is_idle(lane) else LaneState.BUSY

    async def until_tried(self) -> None:
        """Wait until the lanes have been started, or could not be.

        Once one is there, not for long: another may hang.
        """
        await self._first_starts.any_tried.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE_SECONDS):
                await self._first_starts.all_tried.wait()

    async def first_failures(self) -> Sequence[str]:
        """What the first start of each lane failed with, once all were tried."""
        await self._first_starts.all_tried.wait()
        return self._first_starts.failures

    async def close(self) -> None:
        """End the supervisors, and with them the lanes."""
        self._closing = True
        for supervisor in self._supervisors:
            supervisor.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        await asyncio.gather(*self._ending, return_exceptions=True)

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
                self._first_starts.note(index, error.message)
                if error.reason is BreakReason.LOGIN:
                    return
            else:
                try:
                    broken = await self._serve(index, lane)
                finally:
                    await close_lane(self._kmi.name, index, self._remove(index))
                _log.warning("KMI %s: lane %d broke: %s", self._kmi.name, index, broken.message)
                self._metrics.restarted(broken.reason)
                if time.monotonic() - began > _STEADY_SECONDS:
                    pause = 0.0
            alone = not self._queue.breaker_is_open and not any(self.lanes)
            # Requests wait for the last lane: it is not made to wait long.
            await asyncio.sleep(min(pause, _FIRST_PAUSE_SECONDS) if alone else pause)
            pause = min(max(pause * 2, _FIRST_PAUSE_SECONDS), _LAST_PAUSE_SECONDS)

    async def _start(self, index: int, *, home: bool = False) -> Lane:
        """All at the same time: what must wait for another does so in the launcher."""
        try:
            return await self._launcher.launch(index, home=home)
        except LaneError:
            raise
        except Exception as error:
            # Whatever it was (no thread, no memory): it is tried again, as any failed start.
            _log.exception("KMI %s: lane %d cannot be started", self._kmi.name, index)
            raise LaneError(type(error).__name__, BreakReason.START) from None

    async def _serve(self, index: int, lane: Lane) -> LaneError:
        self._take_in(index, lane)
        self._failures[index] = ""
        # Why others are still away, rather than why this one was.
        self._kmi.error = next(filter(None, self._failures), self._kmi.error)
        self._queue.breaker_is_open = False
        self._become()
        self._first_starts.note(index)
        broken = await self._until_broken(index)
        self._kmi.note(broken.message)
        return broken

    def _take_in(self, index: int, lane: Lane) -> None:
        self.lanes[index] = lane
        self._dispatcher.take_in(index, lane)

    async def _until_broken(self, index: int) -> LaneError:
        """Why the lane of this index broke, whichever it was by then."""
        home = self._loop.create_task(self._bring_home(index))
        try:
            while True:
                lane = self.lanes[index]
                assert lane is not None  # noqa: S101 - only the caller takes it away
                broken = await lane.wait_broken()
                if self.lanes[index] is lane:
                    return broken
        finally:
            # Not awaited: to end a start that hangs may take seconds, and requests wait for a lane.
            home.cancel()
            self._ending.add(home)
            home.add_done_callback(self._ending.discard)

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
            _log.info("KMI %s: lane %d is back at its own endpoint", self._kmi.name, index)
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
            await close_lane(self._kmi.name, index, old)

    def _withdraw(self, index: int) -> tuple[Lane, Load]:
        """Take away the lane of an index, so that it is given nothing more."""
        lane = self.lanes[index]
        assert lane is not None  # noqa: S101 - only its supervisor takes it away, once
        self.lanes[index] = None
        return lane, self._dispatcher.withdraw(lane)

    def _remove(self, index: int) -> Lane:
        lane, _ = self._withdraw(index)
        self._become()
        return lane

    def _start_failed(self, index: int, error: LaneError) -> None:
        if error.message not in self._failures:
            _log.error("KMI %s: a lane cannot be started: %s", self._kmi.name, error.message)
        self._failures[index] = error.message
        self._kmi.note(error.message)
        if not any(self.lanes):
            # Nothing is there and nothing can be started: the next request need not wait for it.
            self._queue.open_breaker()
        self._become()

    def _become(self) -> None:
        up = sum(lane is not None for lane in self.lanes)
        if up == len(self.lanes):
            state = KmiState.CONNECTED
        else:
            state = KmiState.DEGRADED if up else KmiState.DISCONNECTED
        self._kmi.become(state, quiet=self._closing)


class _FirstStarts:
    """What came of the first start of each lane."""

    def __init__(self, lanes: int) -> None:
        self.failures: list[str] = []
        self.any_tried = asyncio.Event()
        self.all_tried = asyncio.Event()
        self._untried = set(range(lanes))

    def note(self, index: int, failure: str = "") -> None:
        """A lane was started, or failed to be; of later starts nothing is noted."""
        if index not in self._untried:
            return
        self._untried.remove(index)
        if failure and failure not in self.failures:
            self.failures.append(failure)
        self.any_tried.set()
        if not self._untried:
            self.all_tried.set()
