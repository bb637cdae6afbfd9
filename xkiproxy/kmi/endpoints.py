"""Which of several tokens or addresses a lane is started at."""

from __future__ import annotations


class Endpoints:
    """Sends each start of a lane to the next endpoint, so that none is left out for good.

    At first lane 0 goes to the first, lane 1 to the second, and so on. One where the last start
    failed is passed over while there are others: a lane that is to replace a broken one must not
    spend its time at an endpoint that is known to be away. While all are away, they are tried
    evenly: one that hangs has one lane, not all.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._next: dict[int, int] = {}
        self._failed: set[int] = set()
        self._under_way = [0] * count

    def next(self, lane: int) -> int:
        """The endpoint for the next start of this lane; both are counted from 0.

        What comes of it must be told, by `started` or `failed`.
        """
        first = self._next.get(lane, lane)
        order = [(first + i) % self._count for i in range(self._count)]
        chosen = min(order, key=lambda i: (1 + self._under_way[i]) * (i in self._failed))
        self._next[lane] = chosen + 1
        self._under_way[chosen] += 1
        return chosen

    def started(self, endpoint: int) -> None:
        """A lane was started there."""
        self._under_way[endpoint] -= 1
        self._failed.discard(endpoint)

    def failed(self, endpoint: int) -> None:
        """A lane could not be started there."""
        self._under_way[endpoint] -= 1
        self._failed.add(endpoint)
