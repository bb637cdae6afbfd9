"""A KMI whose operations wait for one of its lanes.

What waits is in `queue.py`, `dispatcher.py` gives it to the lanes, and `supervision.py` keeps those
running.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress

from xkiproxy.crypto.operations import Operation, OperationError, Result
from xkiproxy.kmi.base import Lane, LaneError, LaneState, Launcher
from xkiproxy.kmi.dispatcher import Dispatcher
from xkiproxy.kmi.metrics import KmiMetrics
from xkiproxy.kmi.queue import Queue
from xkiproxy.kmi.running import STARTING, RunningKmi
from xkiproxy.kmi.supervision import Supervision
from xkiproxy.observability.timing import Timing, Visit


class QueuedKmi(RunningKmi):
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
        super().__init__(name, kind, STARTING, metrics)
        self._queue = Queue(queue_size, max_batch, metrics)
        self._dispatcher = Dispatcher(name, self._queue, metrics)
        self._supervision = Supervision(
            self, launcher, self._queue, self._dispatcher, metrics, lanes
        )
        metrics.count_lanes(self._supervision.states)

    @property
    def is_full(self) -> bool:
        """See `Kmi.is_full`."""
        return len(self._queue.waiting) >= self._queue.size

    @property
    def lanes(self) -> list[LaneState]:
        """See `Kmi.lanes`."""
        return self._supervision.states()

    def start(self) -> None:
        """See `Kmi.start`."""
        self._queue.start()
        self._dispatcher.start()
        self._supervision.start()

    async def submit(
        self, operation: Operation, deadline: float, timing: Timing | None = None
    ) -> Result:
        """See `Kmi.submit`."""
        now = time.monotonic()
        item = self._queue.add(operation, deadline, timing is not None)
        self._dispatcher.schedule()
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
            self._queue.deadlines.remove(item)
            ended = time.monotonic()
            self._metrics.finished(type(operation), ended - now, outcome)
            if timing is not None:
                timing.visits.append(Visit(self.name, now, item.batch, item.attempts, ended))

    async def check(self) -> None:
        """See `Kmi.check`: every lane that is there encrypts and decrypts with its probe key.

        The first check waits until the lanes have been started, or could not be; once there is one
        it does not wait long for one that hangs.
        """
        await self._supervision.until_tried()
        self.checked = time.monotonic()
        lanes = [lane for lane in self._supervision.lanes if lane is not None]
        await asyncio.gather(*(_probe(lane) for lane in lanes))

    async def first_failures(self) -> Sequence[str]:
        """See `Kmi.first_failures`."""
        return await self._supervision.first_failures()

    def refresh(self, keys_changed: bool) -> None:
        """See `Kmi.refresh`: every lane looks its keys up again when it next needs them."""
        self._dispatcher.epoch += keys_changed

    async def close(self) -> None:
        """Stop the supervisors and close the lanes; what still waits is refused."""
        await self._supervision.close()
        await self._dispatcher.close()
        self._queue.refuse_all()


async def _probe(lane: Lane) -> None:
    with suppress(LaneError):  # its supervisor hears of it
        await lane.probe()
