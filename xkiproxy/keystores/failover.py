"""From one KMI to the next: what happens when the KMI that is preferred does not answer.

A KMI that is away refuses at once; one that has stalled says nothing. So an attempt may take half
of the time that is left, unless it is the last, and the next KMI gets the other half. Two that are
asked at the same time share their half. What has failed is left alone for a pause that grows with
each failure; then one request, and only one, tries it. So has one that is always the slower of two.
Encrypt and decrypt may be done twice: nothing is changed by them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import NamedTuple

from xkiproxy.crypto.operations import Fault, Operation, OperationError, Result
from xkiproxy.kmi.base import KmiState
from xkiproxy.kmi.contract import Kmi
from xkiproxy.observability.metrics import FailoverMetrics
from xkiproxy.observability.timing import Timing

_DISCONNECTED = KmiState.DISCONNECTED

_FAIR_SECONDS = 0.02
"""An attempt that had less time says nothing of the KMI."""

_ELSEWHERE = frozenset(
    {Fault.UNAVAILABLE, Fault.DEADLINE_EXCEEDED, Fault.THROTTLED, Fault.KEY_FORBIDDEN}
)
"""What another KMI may do better; everything else would be the same there."""


class Served(NamedTuple):
    """A result, and the KMI that it is of."""

    result: Result
    kmi: Kmi


Enter = Callable[[Kmi], None]
"""Checks that an operation is allowed there now, and notes the KMI; raises OperationError."""


class Failover:
    """Asks the KMIs of a key store one after the other."""

    def __init__(self, counts: FailoverMetrics, hedge_after: float | None = None) -> None:
        """`hedge_after`: the second KMI is asked too when the first has been silent for so long.

        It is in seconds; None: never.
        """
        self._counts = counts
        self._hedge_after = hedge_after

    async def submit(
        self,
        kmis: Sequence[Kmi],
        operation: Operation,
        deadline: float,
        enter: Enter,
        timing: Timing | None = None,
    ) -> Served:
        """The result of the first KMI that gives one; those that are away are asked last.

        `kmis` in order of preference; `deadline` on the clock of `time.monotonic`.

        Raises:
            OperationError: what the last of them said, or what would be the same at each.
        """
        left = _by_standing(kmis, time.monotonic())
        while True:
            one = left.pop(0)
            other = left.pop(0) if self._hedge_after is not None and left else None
            began = time.monotonic()
            limit = began + (deadline - began) / 2 if left else deadline
            try:
                if other is not None:
                    served = await self._hedge(one, other, operation, limit, enter, timing)
                else:
                    _enter(one, enter)
                    served = Served(await _ask(one, operation, limit, timing), one)
            except OperationError as error:
                if error.fault not in _ELSEWHERE or not left or time.monotonic() >= deadline:
                    raise
            else:
                if served.kmi is not kmis[0]:
                    self._counts.failed_over(kmis[0].name, served.kmi.name)
                return served

    async def _hedge(
        self,
        one: Kmi,
        other: Kmi,
        operation: Operation,
        limit: float,
        enter: Enter,
        timing: Timing | None,
    ) -> Served:
        """Ask the second when the first is slow, or fails; the first result counts."""
        _enter(one, enter)
        began = time.monotonic()
        first = asyncio.ensure_future(_ask(one, operation, limit, timing))
        asked: dict[asyncio.Future[Result], Kmi] = {first: one}
        try:
            await asyncio.wait(asked, timeout=self._hedge_after)
            if not first.done() or _failed(first):
                with suppress(OperationError):  # it may not be asked: the first has the last word
                    enter(other)
                    second = asyncio.ensure_future(_ask(other, operation, limit, timing))
                    asked[second] = other
            task = await _first_good(asked)
            if len(asked) > 1:
                self._counts.hedged("lost" if task is first else "won")
            if not first.done():
                one.standing.outrun(began, time.monotonic())
            enter(asked[task])  # so that the trail names the one whose answer it is
            return Served(task.result(), asked[task])
        finally:
            for task in asked:
                task.cancel()


def _enter(kmi: Kmi, enter: Enter) -> None:
    """As `enter`; a KMI that may not be asked is left to the next request to try."""
    try:
        enter(kmi)
    except OperationError:
        kmi.standing.give_back()
        raise


async def _ask(kmi: Kmi, operation: Operation, limit: float, timing: Timing | None) -> Result:
    """What a KMI answers until `limit`; that it did, or did not, is noted with it."""
    began = time.monotonic()
    try:
        result = await kmi.submit(operation, limit, timing)
    except OperationError as error:
        _note(kmi, error.fault, limit - began)
        raise
    kmi.standing.succeed()
    return result


def _note(kmi: Kmi, fault: Fault, seconds: float) -> None:
    """What an attempt that failed, and had so many seconds, says of the KMI."""
    if fault is Fault.UNAVAILABLE or (
        fault is Fault.DEADLINE_EXCEEDED and seconds >= _FAIR_SECONDS
    ):
        kmi.standing.fail(time.monotonic())
    elif fault not in {Fault.DEADLINE_EXCEEDED, Fault.THROTTLED}:
        kmi.standing.succeed()


async def _first_good(asked: Collection[asyncio.Future[Result]]) -> asyncio.Future[Result]:
    """The first of them that another could not do better, or the last that is left."""
    pending = set(asked)
    while True:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        last = min(done, key=_failed)
        if not pending or not _failed(last):
            return last


def _failed(task: asyncio.Future[Result]) -> bool:
    """Whether another KMI may do better."""
    error = task.exception()
    return isinstance(error, OperationError) and error.fault in _ELSEWHERE


def _by_standing(kmis: Sequence[Kmi], now: float) -> list[Kmi]:
    """The order to ask them in: the first that is worth it, then the others, those away last."""
    order = sorted(kmis, key=_is_away)
    for kmi in kmis:
        if kmi.state is not _DISCONNECTED and kmi.standing.may_try(now):
            order.remove(kmi)
            return [kmi, *order]
    return order


def _is_away(kmi: Kmi) -> bool:
    return kmi.state is _DISCONNECTED or not kmi.standing.is_good
