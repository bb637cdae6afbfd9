"""A load as data, and its run in one process."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.load.client import Target
from benchmarks.load.loops import ClosedLoop, Loop, OpenLoop, Window
from benchmarks.load.preparation import check_samples
from benchmarks.load.requests import RIGHT, WRONG, Checker, Material, RequestMaker, Supply, Workload
from benchmarks.load.results import LoadResult

_AHEAD_A_SECOND = 10_000
_MAX_AHEAD = 300_000


@dataclass(frozen=True, slots=True)
class Plan:
    """A load: a closed loop of `connections`, or an open loop of `rate` requests a second on them.

    Times are in seconds: `warm_up` is not counted, `grace` is how long answers are waited for
    after the end. `ahead` requests are signed before the start (None: as many as are likely to be
    needed). One encrypt answer in `sample_every` is decrypted after the load.
    """

    target: Target
    workload: Workload
    connections: int = 64
    seconds: float = 5.0
    rate: float | None = None
    warm_up: float = 1.0
    grace: float = 10.0
    ahead: int | None = None
    sample_every: int = 100

    @property
    def signed_ahead(self) -> int:
        """How many requests are signed before the start, by all generators together."""
        if self.ahead is not None:
            return self.ahead
        rate = self.rate or _AHEAD_A_SECOND
        return min(_MAX_AHEAD, int(rate * (self.seconds + self.warm_up)) + 1000)

    def share(self, processes: int) -> list[Plan]:
        """The plans of so many generators that do it together."""
        parts = []
        for index in range(processes):
            connections = (self.connections + index) // processes
            rate = None if self.rate is None else self.rate / processes
            ahead = self.signed_ahead // processes + 1
            parts.append(replace(self, connections=connections, rate=rate, ahead=ahead))
        return parts

    def to_json(self) -> dict[str, Any]:
        """For another process; the secret is in it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The reverse of `to_json`."""
        target, workload = Target(**data["target"]), Workload(**data["workload"])
        return cls(**{**data, "target": target, "workload": workload})


class Generator:
    """One process's part of a load: make it, `open`, `run`, `check`."""

    def __init__(self, plan: Plan, material: Material, phase: float = 0.0) -> None:
        """Signs the requests, which takes a while. `phase`: see `OpenLoop`."""
        self._plan = plan
        supply = Supply(RequestMaker(plan.workload, material), plan.signed_ahead)
        checker = Checker(plan.workload, material.sizes)
        self.loop: Loop
        if plan.rate is None:
            self.loop = ClosedLoop(
                plan.target, supply, checker, plan.connections, sample_every=plan.sample_every
            )
        else:
            self.loop = OpenLoop(
                plan.target, supply, checker, plan.connections,
                rate=plan.rate, phase=phase, sample_every=plan.sample_every,
            )  # fmt: skip

    async def open(self) -> None:
        """Open the connections; raises OSError."""
        await self.loop.open()
        # A hundred thousand requests lie about: the collector need not look at them again. Now,
        # since a load has begun by the time that `run` is called.
        gc.collect()

    async def run(self, begin: int) -> LoadResult:
        """Put the load on from `begin` (nanoseconds, perf_counter_ns) on."""
        gc.freeze()
        try:
            plan = self._plan
            return await self.loop.run(Window.of(begin, plan.warm_up, plan.seconds, plan.grace))
        finally:
            gc.unfreeze()

    async def check(self, result: LoadResult) -> None:
        """Decrypt the samples; what does not come back is no success any more."""
        verdicts = await check_samples(self._plan.target, self._plan.workload, self.loop.tally)
        result.checked = sum(verdicts.values())
        for verdict, count in verdicts.items():
            if verdict == RIGHT:
                continue
            result.ok -= count
            if verdict == WRONG:
                result.wrong += count
            else:
                kind = f"sample: {verdict}"
                result.errors[kind] = result.errors.get(kind, 0) + count
