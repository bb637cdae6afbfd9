"""The operations that wait for a lane of a KMI.

The queue is bounded: a full one refuses at once. An operation whose deadline has passed is dropped
before it costs the KMI anything. While the breaker is open nothing may wait: requests are refused.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Sequence

from xkiproxy.crypto.operations import Fault, Operation, OperationError, Result
from xkiproxy.kmi.contract import deadline_exceeded
from xkiproxy.kmi.deadlines import Deadlines
from xkiproxy.kmi.metrics import KmiMetrics
from xkiproxy.observability.timing import Batch

_MAX_ATTEMPTS = 2


class Item:
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


class Queue:
    """What waits, and the deadlines of all that is not settled."""

    def __init__(self, size: int, max_batch: int, metrics: KmiMetrics) -> None:
        """At most `size` operations wait, and at most `max_batch` are taken in one go."""
        self.size = size
        self.waiting: deque[Item] = deque()
        """In order; some may be settled already."""
        self.breaker_is_open = False
        self._max_batch = max_batch
        metrics.queue_depth.set_function(lambda: len(self.waiting))
        metrics.queue_capacity.set(size)

    def start(self) -> None:
        """Begin to look at deadlines; in a running event loop."""
        self._loop = asyncio.get_running_loop()
        self.deadlines = Deadlines(self._loop, self._expire)

    def add(self, operation: Operation, deadline: float, followed: bool) -> Item:
        """Put an operation at the end; `deadlines` must be told once it is settled.

        Raises:
            OperationError: UNAVAILABLE while the breaker is open, THROTTLED when the queue is full.
        """
        if self.breaker_is_open:
            raise _away()
        if len(self.waiting) >= self.size:
            raise OperationError(Fault.THROTTLED, "Too many requests wait for the key manager.")
        item = Item(operation, deadline, self._loop.create_future(), followed)
        self.deadlines.add(item)
        self.waiting.append(item)
        return item

    def take_batch(self) -> list[Item]:
        """Everything that waits, up to `max_batch`.

        What was in a batch that broke its lane goes alone: one of them may be the cause, and it
        must not take the others with it again.
        """
        batch: list[Item] = []
        now = time.monotonic()
        while self.waiting and len(batch) < self._max_batch:
            if self.waiting[0].attempts and batch:
                break
            item = self.waiting.popleft()
            if item.deadline <= now:
                settle(item, deadline_exceeded())
            if item.future.done():  # over, or nobody waits any more
                continue
            batch.append(item)
            if item.attempts:
                break
        return batch

    def put_back(self, batch: Sequence[Item], *, started: bool) -> None:
        """What is not settled goes back to the front; `started` counts as an attempt."""
        for item in reversed(batch):
            if item.future.done():
                continue
            item.attempts += started
            if item.attempts >= _MAX_ATTEMPTS or self.breaker_is_open:
                settle(item, _away())
            else:
                self.waiting.appendleft(item)

    def open_breaker(self) -> None:
        """Refuse all that waits, and all that comes until `breaker_is_open` is False again."""
        self.breaker_is_open = True
        self.refuse_all()

    def refuse_all(self) -> None:
        """Refuse all that waits."""
        while self.waiting:
            settle(self.waiting.popleft(), _away())

    def _expire(self, items: Iterable[Item]) -> None:
        """End operations whose deadline has passed; the queue is for those that wait."""
        for item in items:
            settle(item, deadline_exceeded())
        self.waiting = deque(item for item in self.waiting if not item.future.done())


def settle(item: Item, outcome: Result | OperationError) -> None:
    """Give an operation its outcome, unless it has one."""
    if item.future.done():
        return
    if isinstance(outcome, OperationError):
        item.future.set_exception(outcome)
    else:
        item.future.set_result(outcome)


def _away() -> OperationError:
    return OperationError(Fault.UNAVAILABLE, "The key manager is away.")
