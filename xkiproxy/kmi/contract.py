"""A running KMI, as key stores see it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple, Protocol

from xkiproxy.crypto.operations import Fault, Operation, OperationError, Result
from xkiproxy.kmi.base import KmiState, LaneState
from xkiproxy.kmi.standing import Standing
from xkiproxy.observability.timing import Timing


class Failure(NamedTuple):
    """What went wrong, and when."""

    error: str
    time: datetime


class Kmi(Protocol):
    """What key stores ask of a KMI: `InlineKmi` or `QueuedKmi`."""

    name: str
    type: str
    state: KmiState
    checked: float
    """When `check` last ran, on the clock of `time.monotonic`."""
    error: str
    """Why the state is not `connected`."""
    last_error: Failure | None
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


def deadline_exceeded() -> OperationError:
    """The operation was not done in time."""
    return OperationError(Fault.DEADLINE_EXCEEDED, "The key manager missed the deadline.")
