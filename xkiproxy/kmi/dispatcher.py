"""The dispatcher: how what waits reaches the lanes of a KMI.

A free lane takes everything that waits, up to `max_batch`: nothing is delayed to fill a batch;
batches grow by themselves while lanes are busy. When a lane breaks, what it was given runs again
elsewhere, once and alone: encrypt and decrypt can be repeated safely.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque

from xkiproxy.crypto.operations import Fault, OperationError, Result
from xkiproxy.kmi.base import Lane, LaneError
from xkiproxy.kmi.metrics import KmiMetrics
from xkiproxy.kmi.queue import Item, Queue, settle
from xkiproxy.observability.timing import Batch

_log = logging.getLogger(__name__)


class Load:
    """What a lane has been given and has not settled; its next batch comes at `enough`."""

    __slots__ = ("enough", "index", "unsettled")

    def __init__(self, index: int) -> None:
        self.index = index
        """Which of the KMI's lanes it is, counted from 0."""
        self.unsettled = 0
        self.enough = 0


class Dispatcher:
    """Gives the lanes that are free what waits."""

    def __init__(self, name: str, queue: Queue, metrics: KmiMetrics) -> None:
        """`name`: the KMI's, for the log."""
        self.epoch = 0
        """What lanes remember of keys from another epoch is stale."""
        self._name = name
        self._queue = queue
        self._metrics = metrics
        self._pumping = False
        self._idle: deque[Lane] = deque()
        self._loads: dict[Lane, Load] = {}
        self._batches: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """In a running event loop, before the first lane is taken in."""
        self._loop = asyncio.get_running_loop()

    def take_in(self, index: int, lane: Lane) -> None:
        """Give a lane batches from now on; see `Load` for `index`."""
        self._loads[lane] = Load(index)
        self._idle.append(lane)
        self.schedule()

    def withdraw(self, lane: Lane) -> Load:
        """Give a lane nothing more; returns what it goes on with."""
        self._retire(lane)
        return self._loads.pop(lane)

    def is_idle(self, lane: Lane) -> bool:
        """Whether it waits for a batch."""
        return lane in self._idle

    async def close(self) -> None:
        """Wait until the lanes, which are closed by now, have let go of their batches."""
        await asyncio.gather(*self._batches, return_exceptions=True)

    def schedule(self) -> None:
        """Once in this round of the loop: what is submitted in one round makes one batch."""
        if not self._pumping and self._idle:
            self._pumping = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pumping = False
        while self._idle and (batch := self._queue.take_batch()):
            lane = self._idle.popleft()
            task = self._loop.create_task(self._execute(lane, self._loads[lane], batch))
            self._batches.add(task)
            task.add_done_callback(self._batches.discard)

    async def _execute(self, lane: Lane, load: Load, batch: list[Item]) -> None:
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

        def settle_one(index: int, outcome: Result | OperationError) -> None:
            nonlocal left
            settle(batch[index], outcome)
            left -= 1
            load.unsettled -= 1
            if load.unsettled == load.enough:
                self._free(lane)

        try:
            await lane.execute([item.operation for item in batch], self.epoch, settle_one)
        except LaneError as error:
            self._run_again(batch, started=error.started)
        except Exception:
            # Whatever a lane raises, the requests it was given must get an answer, and nobody knows
            # what state the lane is in: it is closed, so that its supervisor starts another.
            index = self._index(lane)
            _log.exception("KMI %s: lane %d failed", self._name, index)
            self._retire(lane)
            self._run_again(batch, started=True)
            await close_lane(self._name, index, lane)
        else:
            if left:
                self._make_up(lane, load, batch, left)

    def _make_up(self, lane: Lane, load: Load, batch: list[Item], left: int) -> None:
        """A lane that forgot some of a batch, or settled some twice, must not be lost by it."""
        _log.error("KMI %s: lane %d left %d open", self._name, self._index(lane), left)
        for item in batch:
            settle(item, OperationError(Fault.INTERNAL, "The key manager gave no answer."))
        load.unsettled -= left
        if load.unsettled <= load.enough and lane not in self._idle:
            self._free(lane)

    def _index(self, lane: Lane) -> int:
        """Which lane it is; -1 for one that has just been taken away."""
        load = self._loads.get(lane)
        return -1 if load is None else load.index

    def _free(self, lane: Lane) -> None:
        if lane in self._loads:
            self._idle.append(lane)
            self.schedule()

    def _retire(self, lane: Lane) -> None:
        """Give it nothing more."""
        if lane in self._idle:
            self._idle.remove(lane)

    def _run_again(self, batch: list[Item], *, started: bool) -> None:
        self._queue.put_back(batch, started=started)
        self.schedule()


async def close_lane(kmi: str, index: int, lane: Lane) -> None:
    """Whatever closing a lane raises, another must be started in its place."""
    try:
        await lane.close()
    except Exception:
        _log.exception("KMI %s: lane %d cannot be closed", kmi, index)
