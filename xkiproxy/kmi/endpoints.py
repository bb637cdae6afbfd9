"""Which of several tokens or addresses a lane is started at."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Endpoints:
    """Sends each start of a lane to the next endpoint, so that none is left out for good.

    At first lane 0 goes to the first, lane 1 to the second, and so on: that is a lane's home, to
    which it can be brought again when its starts have led it elsewhere. One where the last start
    failed is passed over while there are others: a lane that is to replace a broken one must not
    spend its time at an endpoint that is known to be away. While all are away, they are tried
    evenly: one that hangs has one lane, not all.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._next: dict[int, int] = {}
        self._at: dict[int, int] = {}
        self._failed: set[int] = set()
        self._under_way = [0] * count

    @contextmanager
    def starting(self, lane: int, *, home: bool = False) -> Iterator[int]:
        """While a lane is started: at which endpoint, or at its home. Both are counted from 0."""
        endpoint = self._home_of(lane) if home else self._next_for(lane)
        self._under_way[endpoint] += 1
        try:
            yield endpoint
        except asyncio.CancelledError:
            raise  # that says nothing of the endpoint
        except BaseException:
            self._failed.add(endpoint)
            raise
        else:
            self._at[lane] = endpoint
            self._failed.discard(endpoint)
        finally:
            self._under_way[endpoint] -= 1

    def is_away(self, lane: int) -> bool:
        """Whether it was last started elsewhere than at its home."""
        home = self._home_of(lane)
        return self._at.get(lane, home) != home

    def _home_of(self, lane: int) -> int:
        return lane % self._count

    def _next_for(self, lane: int) -> int:
        first = self._next.get(lane, lane)
        order = [(first + i) % self._count for i in range(self._count)]
        chosen = min(order, key=lambda i: (1 + self._under_way[i]) * (i in self._failed))
        self._next[lane] = chosen + 1
        return chosen
