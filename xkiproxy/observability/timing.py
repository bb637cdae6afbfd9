"""Where the time of one request went; kept for few of them, since keeping it takes time."""

from __future__ import annotations

import time
from typing import NamedTuple

STAGES = ("read", "authenticate", "decode", "perform", "encode", "audit")
"""The parts of a request's time, in their order."""


class Batch(NamedTuple):
    """What a lane of a KMI took in one go."""

    lane: int
    """Which of the KMI's lanes, counted from 0; -1 for one that has broken."""
    size: int
    """How many operations."""
    taken: float
    """When, in seconds on the clock of `time.monotonic`."""


class Visit(NamedTuple):
    """An operation's way through a KMI with a queue, times as above."""

    kmi: str
    queued: float
    batch: Batch | None
    """The last one that it was in; None if it never left the queue."""
    attempts: int
    """Batches that broke their lane with it."""
    settled: float


class Timing:
    """When the stages of a request ended, and its visits to KMIs."""

    __slots__ = ("marks", "visits")

    def __init__(self) -> None:
        self.marks: list[float] = []
        """For each stage so far when it ended, in seconds on the clock of `time.monotonic`."""
        self.visits: list[Visit] = []

    def mark(self) -> None:
        """The next stage has ended."""
        self.marks.append(time.monotonic())

    def refuse(self) -> None:
        """The request has failed in the next stage; what is left is to write it down."""
        if len(self.marks) < len(STAGES) - 1:
            self.mark()

    def stages(self, began: float, ended: float) -> list[tuple[str, float, float]]:
        """The stages gone through, each with its begin and end; the last, `audit`, ends at `ended`.

        `began` is when the request did.
        """
        times = [began, *self.marks]
        names = [*STAGES[: len(self.marks)], STAGES[-1]]
        return list(zip(names, times, [*self.marks, ended], strict=True))
