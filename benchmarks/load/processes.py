"""A load from several generator processes, which start together."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from benchmarks.load.loops import BILLION
from benchmarks.load.preparation import prepare
from benchmarks.load.requests import Material
from benchmarks.load.results import LoadError, LoadResult, merge
from benchmarks.load.run import Plan

_LINE_SECONDS = 2.0
_REFRESH_SECONDS = 0.5
_LEAD_NS = 100_000_000
"""From the last one's being ready to the start: time for the word to reach all."""
_MAX_LINE = 1 << 24
_ROOT = Path(__file__).parents[2]

Probe = Callable[[], dict[str, float]]
"""The CPU seconds so far of each process of a server."""


class _Progress:
    """Requests done, rate and errors, on standard error, while a load runs."""

    def __init__(self, processes: int, wanted: bool) -> None:
        self.counts = [(0, 0)] * processes
        self._wanted = wanted
        self._updates = sys.stderr.isatty()

    async def show(self, start: int) -> None:
        """From `start` (ns) until cancelled: one line that changes, or one every two seconds."""
        if not self._wanted:
            return
        await _sleep_until(start)
        before, then = 0, time.monotonic()
        try:
            while True:
                await asyncio.sleep(_REFRESH_SECONDS if self._updates else _LINE_SECONDS)
                done, failed = (sum(column) for column in zip(*self.counts, strict=True))
                now = time.monotonic()
                self._write(done, (done - before) / (now - then), failed)
                before, then = done, now
        finally:
            if self._updates:
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()

    def _write(self, done: int, rate: float, failed: int) -> None:
        text = f"{done:>10,} requests {rate:>9,.0f}/s {failed:>7,} errors"
        sys.stderr.write(f"\r{text}\x1b[K" if self._updates else text + "\n")
        sys.stderr.flush()


class _Child:
    """A generator process."""

    def __init__(self, process: Process, index: int, progress: _Progress) -> None:
        self._process = process
        self._index = index
        self._progress = progress

    @classmethod
    async def start(cls, index: int, progress: _Progress) -> _Child:
        """Start it; it waits for its task."""
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.load.generator",
            stdin=PIPE, stdout=PIPE, limit=_MAX_LINE, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        return cls(process, index, progress)

    async def write(self, message: dict[str, Any]) -> None:
        """Send a line."""
        stdin = self._process.stdin
        assert stdin is not None
        # If it has ended meanwhile, the next `read` says so.
        with suppress(ConnectionError):
            stdin.write(json.dumps(message).encode() + b"\n")
            await stdin.drain()

    async def read(self, name: str) -> Any:
        """Wait for the message of this name; raises LoadError."""
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            message = json.loads(line)
            if name in message:
                return message[name]
            if "error" in message:
                raise LoadError(message["error"])
            if "done" in message:
                self._progress.counts[self._index] = (message["done"], message["failed"])
        raise LoadError(f"a generator ended with status {await self._process.wait()}")

    async def stop(self) -> None:
        """End it, whatever it does."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


class Generators:
    """Generator processes that take one load after the other: `async with` ends them.

    To start them takes longer than a short load.
    """

    def __init__(self, processes: int = 1, *, progress: bool = True) -> None:
        self._wanted = processes
        self._shown = _Progress(processes, progress)
        self._children: list[_Child] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(child.stop() for child in self._children))

    async def run(self, plan: Plan, material: Material, probe: Probe | None = None) -> LoadResult:
        """Run a load from all of them; see `run_load`."""
        if not 1 <= self._wanted <= plan.connections:
            raise LoadError("processes: at least one, and a connection for each")
        while len(self._children) < self._wanted:
            self._children.append(await _Child.start(len(self._children), self._shown))
        self._shown.counts = [(0, 0)] * self._wanted
        for index, (child, part) in enumerate(
            zip(self._children, plan.share(self._wanted), strict=True)
        ):
            phase = index / self._wanted
            await child.write(
                {"plan": part.to_json(), "material": asdict(material), "phase": phase}
            )
        return await _run_children(plan, self._children, self._shown, probe)


async def run_load(
    plan: Plan,
    processes: int = 1,
    *,
    material: Material | None = None,
    probe: Probe | None = None,
    progress: bool = True,
) -> LoadResult:
    """Run a load from so many processes; `probe` reads the server's CPU at start and end.

    `material` is asked of the target unless it is given.

    Raises:
        LoadError: the target or a generator does not work at all.
    """
    material = material or await prepare(plan.target, plan.workload)
    async with Generators(processes, progress=progress) as generators:
        return await generators.run(plan, material, probe)


async def _run_children(
    plan: Plan, children: list[_Child], shown: _Progress, probe: Probe | None
) -> LoadResult:
    await asyncio.gather(*(child.read("ready") for child in children))
    begin = time.perf_counter_ns() + _LEAD_NS
    start = begin + int(plan.warm_up * BILLION)
    for child in children:
        await child.write({"begin": begin})
    showing = asyncio.create_task(shown.show(start))
    try:
        ended = asyncio.gather(*(child.read("ended") for child in children))
        await _sleep_until(start)
        before = probe() if probe is not None else {}
        await ended
        after = probe() if probe is not None else {}
        results = await asyncio.gather(*(child.read("result") for child in children))
    finally:
        showing.cancel()
        await asyncio.gather(showing, return_exceptions=True)
    result = merge(LoadResult.from_json(found) for found in results)
    # A process that came meanwhile has spent all its time in the load.
    result.server_cpu_seconds = {
        name: seconds - before.get(name, 0.0) for name, seconds in after.items()
    }
    return result


async def _sleep_until(when: int) -> None:
    await asyncio.sleep(max(0.0, (when - time.perf_counter_ns()) / BILLION))
