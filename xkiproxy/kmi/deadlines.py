"""Deadlines of many operations with one timer.

A timer for each, and its end when the operation is done in time, costs as much as the way through
the queue. So the operations that wait are a set, and there is one timer for the first of them to
be over: by then that one, and nearly all others, have long been done.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

_COARSENESS_SECONDS = 0.005
"""At most so late is an operation ended: of a thousand that end together, few need a round."""


class Timed(Protocol):
    """What has a deadline, on the clock of `time.monotonic`."""

    @property
    def deadline(self) -> float: ...


_Item = TypeVar("_Item", bound=Timed)


class Deadlines(Generic[_Item]):
    """Those that wait; `expire` is called with those whose deadline passes while they do."""

    __slots__ = ("_expire", "_first", "_loop", "_timer", "_waiting")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, expire: Callable[[list[_Item]], None]
    ) -> None:
        self._loop = loop
        self._expire = expire
        self._waiting: set[_Item] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._first = float("inf")
        """No deadline is looked at before this."""

    def add(self, item: _Item) -> None:
        """It begins to wait."""
        self._waiting.add(item)
        if item.deadline < self._first:
            self._look_at(item.deadline)

    def remove(self, item: _Item) -> None:
        """It has come to its end."""
        self._waiting.discard(item)

    def _look_at(self, moment: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._first = moment
        pause = max(moment - time.monotonic(), 0.0)
        self._timer = self._loop.call_later(pause + _COARSENESS_SECONDS / 2, self._look)

    def _look(self) -> None:
        now = time.monotonic()
        self._timer, self._first = None, float("inf")
        if over := [item for item in self._waiting if item.deadline <= now]:
            self._waiting.difference_update(over)
            self._expire(over)
        if self._waiting:
            self._look_at(min(item.deadline for item in self._waiting))
